#!/usr/bin/env bash
# Pretrains YOCO-3B with the deepspeed launcher on 8 GPUs of one node or on 64 GPUs of 8 nodes.
#
#     bash examples/pretrain_yoco_3b.sh 8|64 [--resume] [key=value ...]
#     bash examples/pretrain_yoco_3b.sh 8 'data.train=[0.7, data/web_text_document, 0.3, data/code_text_document]'
#
# MEGAYOCO_HOSTFILE  nodes of the 64-GPU run (default examples/hostfile: edit it). The repository, its environment and
#                    the data must lie under the same path on all of them. With Slurm: pretrain_yoco_3b.slurm.
# MEGAYOCO_VENV, MEGAYOCO_TORCH: see tools/environment.sh.
set -euo pipefail
root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
gpus="${1:-}"
case "$gpus" in
    8) where=(--num_gpus 8) deepspeed_config=zero2_bf16.json ;;
    64) where=(--hostfile "${MEGAYOCO_HOSTFILE:-examples/hostfile}") deepspeed_config=pipeline_zero1_bf16.json ;;
    *)
        echo "error: how many GPUs? bash examples/pretrain_yoco_3b.sh 8|64 [--resume] [key=value ...]" >&2
        exit 2
        ;;
esac
shift
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
megayoco_environment ""
cd "$root"
exec deepspeed "${where[@]}" --module megayoco.train --config "examples/pretrain_yoco_3b_${gpus}gpu.yaml" \
    --deepspeed_config "ds_configs/$deepspeed_config" "$@"
