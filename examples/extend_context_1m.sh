#!/usr/bin/env bash
# Trains YOCO-3B at 4K, then extends its context to 64K, 256K and 1M tokens, on 8 GPUs of one node or on 64 of 8 nodes.
#
#     bash examples/extend_context_1m.sh 8|64 [--resume] [key=value ...]
#
# What it will need and how long a step will take: python tools/plan.py --config examples/extend_context_1m_8gpu.yaml
# --deepspeed_config ds_configs/zero2_bf16.json --gpus 8 --gpu-memory 80.
#
# MEGAYOCO_HOSTFILE  nodes of the 64-GPU run (default examples/hostfile: edit it). The repository, its environment and
#                    the data must lie under the same path on all of them.
# MEGAYOCO_VENV, MEGAYOCO_TORCH: see tools/environment.sh.
set -euo pipefail
root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
gpus="${1:-}"
case "$gpus" in
    8) where=(--num_gpus 8) ;;
    64) where=(--hostfile "${MEGAYOCO_HOSTFILE:-examples/hostfile}") ;;
    *)
        echo "error: how many GPUs? bash examples/extend_context_1m.sh 8|64 [--resume] [key=value ...]" >&2
        exit 2
        ;;
esac
shift
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
megayoco_environment ""
cd "$root"
exec deepspeed "${where[@]}" --module megayoco.train --config "examples/extend_context_1m_${gpus}gpu.yaml" \
    --deepspeed_config ds_configs/zero2_bf16.json "$@"
