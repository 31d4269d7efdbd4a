#!/usr/bin/env bash
# Proof that retrieval is learned, on a machine without GPU: a small YOCO is trained from scratch on documents with
# facts and questions, of 256, 512, 2,048 and 8,192 tokens, exported, and asked for needles in text it has never seen,
# at up to four times the length of the last phase. Takes about twenty minutes on two cores.
#
#     bash examples/needle_tiny.sh [key=value ...]         overrides of examples/needle_tiny.yaml for training
#
# MEGAYOCO_RUN_DIR  folder of all that is written (default runs/needle_tiny); data, a finished run and finished parts of
#                   the evaluation are used again. The heat map is needle/heatmap.png in it.
# MEGAYOCO_VENV, MEGAYOCO_TORCH, MEGAYOCO_PYTHON: see tools/environment.sh.
set -euo pipefail
root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=examples/workspace.sh
source "$root/examples/workspace.sh"
workspace runs/needle_tiny

# The corpus is mixed: its last documents are the haystack, the others fill the training documents.
corpus="$work/corpus.jsonl" filler="$work/filler.jsonl" haystack="$work/haystack.jsonl" ranks="$work/ranks.tiktoken"
[ -e "$corpus" ] || show python tools/make_corpus.py --output "$corpus" --max-mb 8
[ -e "$filler" ] || { head -n -100 "$corpus" >"$filler.tmp" && mv "$filler.tmp" "$filler"; }
[ -e "$haystack" ] || { tail -n 100 "$corpus" >"$haystack.tmp" && mv "$haystack.tmp" "$haystack"; }

# A vocabulary for this text: most cities are one token, which spares the model the spelling of names.
words="$work/words.jsonl"
[ -e "$words" ] ||
    show python tools/make_retrieval.py --input "$filler" --output "$words" --documents 3000 --tokens 2400 \
        --tokenizer-type ByteTokenizer --needles 4 12 --filler 0.4 0.8
[ -e "$ranks" ] || show python tools/train_tokenizer.py --input "$words" --vocab-size 1024 --output "$ranks"

# prepare TOKENS DOCUMENTS NEEDLES LEAST_FILLER MOST_FILLER
prepare() {
    local name="$work/data/$1" tokenizer=(--tokenizer-type TiktokenTokenizer --tokenizer-model "$ranks")
    [ ! -e "${name}_text_document.idx" ] || return 0
    [ -e "$name.jsonl" ] ||
        show python tools/make_retrieval.py --input "$filler" --output "$name.jsonl" --tokens "$1" --documents "$2" \
            --needles 1 "$3" --filler "$4" "$5" "${tokenizer[@]}"
    show python tools/preprocess_data.py --input "$name.jsonl" --output-prefix "$name" "${tokenizer[@]}" --append-eod
}
prepare 256 9000 6 0 0.2
prepare 512 3600 12 0 0.8
prepare 2048 520 24 0.3 0.95
prepare 8192 240 48 0.4 0.98

run="$work/run"
if [ ! -e "$run/export/config.json" ]; then
    port="$(free_port)"
    phases=() number=0
    for length in 256 512 2048 8192; do
        phases+=("phases.$number.data.train=$work/data/${length}_text_document") number=$((number + 1))
    done
    overwrite=()
    [ ! -e "$run" ] || overwrite=(--overwrite)
    show deepspeed --quiet --num_gpus 2 --master_port "$port" --module megayoco.train \
        --config examples/needle_tiny.yaml --deepspeed_config ds_configs/cpu.json \
        "data.train=$work/data/256_text_document" "${phases[@]}" "output_dir=$run" "$@" \
        ${overwrite[@]+"${overwrite[@]}"}
fi

# Without the last spaces of the prompt: they are one token, which no training document has in front of a number.
show python -m megayoco.evaluate needle --model "$run" --output "$work/needle" --haystack "$haystack" \
    --lengths 1024 2048 4096 8192 16384 32768 --trials 5 --strip-prompt
