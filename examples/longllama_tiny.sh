#!/usr/bin/env bash
# Proof that memory attention looks things up far beyond its training context, on a machine without GPU: a small LLaMA
# with one memory layer is trained by cross-batch training (Focused Transformer) on dictionaries of 512 tokens, and the
# same LLaMA without memory on the same data. Both are then asked for keys in dictionaries of up to 32,768 tokens.
#
#     bash examples/longllama_tiny.sh [key=value ...]      overrides of examples/longllama_tiny.yaml for both trainings
#
# MEGAYOCO_RUN_DIR  folder of all that is written (default runs/longllama_tiny); data, finished runs and finished parts
#                   of the evaluations are used again. The curves are memory/curve.png and plain/curve.png in it.
# MEGAYOCO_VENV, MEGAYOCO_TORCH, MEGAYOCO_PYTHON: see tools/environment.sh.
set -euo pipefail
root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
work="${MEGAYOCO_RUN_DIR:-runs/longllama_tiny}"
case "$work" in /*) ;; *) work="$(if [ -n "${MEGAYOCO_RUN_DIR:-}" ]; then pwd -P; else echo "$root"; fi)/$work" ;; esac
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
megayoco_environment ""
cd "$root"
mkdir -p "$work/data"

show() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

data="$work/data/dictionary_text_document"
if [ ! -e "$data.idx" ]; then
    show python tools/make_dictionary.py --output "$work/dictionary.jsonl" --documents 20000 --tokens 512 --overwrite
    # without --append-eod: a document fills a sample, and its halves are windows
    show python tools/preprocess_data.py --input "$work/dictionary.jsonl" --output-prefix "$work/data/dictionary" \
        --tokenizer-type ByteTokenizer
fi

# Two small processes on a CPU, also where there are GPUs; a free port, so that two of these can run side by side.
export DS_ACCELERATOR=cpu

# train NAME [key=value ...]
train() {
    local run="$work/$1"
    shift
    [ ! -e "$run/export/config.json" ] || return 0
    local port overwrite=()
    port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    [ ! -e "$run" ] || overwrite=(--overwrite)
    show deepspeed --quiet --num_gpus 2 --master_port "$port" --module megayoco.train \
        --config examples/longllama_tiny.yaml --deepspeed_config ds_configs/cpu.json "data.train=$data" \
        "output_dir=$run" "$@" ${overwrite[@]+"${overwrite[@]}"}
}
train run-memory "$@"
train run-plain model.memory_layers=[] model.memory_window=null phases.0.cross_batch=null phases.1.cross_batch=null "$@"

for name in memory plain; do
    show python -m megayoco.evaluate dictionary --model "$work/run-$name" --output "$work/$name" \
        --lengths 512 1024 2048 4096 8192 16384 32768 --trials 10
done
