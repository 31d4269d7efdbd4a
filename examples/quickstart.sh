#!/usr/bin/env bash
# From raw text to a trained YOCO that writes text, on a machine without GPU: corpus, tokenizer, data, training in four
# processes (tensor 2 x pipeline 2) with a checkpoint half-way, resume, generation, and a folder for transformers. Takes
# about five minutes on two cores.
#
#     bash examples/quickstart.sh [key=value ...]         overrides of examples/quickstart.yaml for training, other than steps
#
# MEGAYOCO_RUN_DIR  folder of all that is written (default runs/quickstart); corpus, tokenizer and data are used again.
# MEGAYOCO_VENV, MEGAYOCO_TORCH, MEGAYOCO_PYTHON: see tools/environment.sh.
set -euo pipefail
root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=examples/workspace.sh
source "$root/examples/workspace.sh"
workspace runs/quickstart

ranks="$work/ranks.tiktoken" corpus="$work/corpus.jsonl" data="$work/data/corpus" run="$work/run"
[ -e "$corpus" ] || show python tools/make_corpus.py --output "$corpus" --max-mb 8
[ -e "$ranks" ] || show python tools/train_tokenizer.py --input "$corpus" --vocab-size 4096 --output "$ranks"
[ -e "${data}_text_document.idx" ] ||
    show python tools/preprocess_data.py --input "$corpus" --output-prefix "$data" \
        --tokenizer-type TiktokenTokenizer --tokenizer-model "$ranks" --append-eod --workers 2

port="$(free_port)"
train=(deepspeed --quiet --num_gpus 4 --master_port "$port" --module megayoco.train --config examples/quickstart.yaml
    --deepspeed_config ds_configs/cpu.json parallel.tensor=2 parallel.pipeline=2
    "data.train=${data}_text_document" "output_dir=$run" "$@")

overwrite=()
[ ! -e "$run" ] || overwrite=(--overwrite)
show "${train[@]}" phases.0.steps=40 ${overwrite[@]+"${overwrite[@]}"}
echo "quickstart: half of the steps are done; the rest starts from the checkpoint"
show "${train[@]}" --resume

show python -m megayoco.generate --model "$run" --prompt "def " --max-new-tokens 64

show python tools/convert_checkpoint.py --from megayoco --to hf --load "$run" --save "$work/hf" --overwrite --check

show python examples/check_loss.py "$run" --fall 1.5
