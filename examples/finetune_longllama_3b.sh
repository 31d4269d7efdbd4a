#!/usr/bin/env bash
# Extends OpenLLaMA-3B with memory attention on 8 GPUs of one node, after the recipe of LongLLaMA-3B.
#
#     bash examples/finetune_longllama_3b.sh CHECKPOINT_FOLDER [--resume] [key=value ...]
#     bash examples/finetune_longllama_3b.sh open_llama_3b data.train=data/long_documents_text_document
#
# CHECKPOINT_FOLDER  of OpenLLaMA-3B or another LLaMA without grouped heads, as downloaded from Hugging Face. For another
#                    size give model.dim, model.layers and so on too.
# MEGAYOCO_VENV, MEGAYOCO_TORCH: see tools/environment.sh.
#
# Afterwards: python tools/convert_checkpoint.py --from megayoco --to longllama --load runs/longllama-3b --save model
set -euo pipefail
root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
checkpoint="${1:-}"
if [ ! -f "$checkpoint/config.json" ]; then
    echo "error: which checkpoint? bash examples/finetune_longllama_3b.sh CHECKPOINT_FOLDER [--resume] [key=value ...]" >&2
    exit 2
fi
checkpoint="$(cd -P -- "$checkpoint" && pwd)"
shift
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
megayoco_environment ""
cd "$root"
exec deepspeed --num_gpus 8 --module megayoco.train --config examples/finetune_longllama_3b.yaml \
    --deepspeed_config ds_configs/zero2_bf16.json "model.init_from=$checkpoint" "$@"
