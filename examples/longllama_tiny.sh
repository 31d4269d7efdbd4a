#!/usr/bin/env bash
# Proof that memory attention finds things far beyond its training context, on a machine without GPU: a small LLaMA
# with one memory layer is trained by cross-batch training (Focused Transformer) to find pass keys in 512 tokens, and
# the same LLaMA without memory on the same data. Both are then asked in up to 32,768 tokens of filler.
#
#     bash examples/longllama_tiny.sh [key=value ...]      overrides of examples/longllama_tiny.yaml for both trainings
#
# MEGAYOCO_RUN_DIR  folder of all that is written (default runs/longllama_tiny); data, finished runs and finished parts
#                   of the evaluations are used again. The pictures are memory/heatmap.png and plain/heatmap.png in it.
# MEGAYOCO_VENV, MEGAYOCO_TORCH, MEGAYOCO_PYTHON: see tools/environment.sh.
set -euo pipefail
root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=examples/workspace.sh
source "$root/examples/workspace.sh"
workspace runs/longllama_tiny

# prepare NAME INPUT [flags ...]
prepare() {
    local name="$work/data/$1" input="$2"
    shift 2
    [ -e "${name}_text_document.idx" ] || show python tools/preprocess_data.py --input "$input" --output-prefix "$name" \
        --tokenizer-type ByteTokenizer "$@"
}
for length in 256 512; do
    [ -e "$work/$length.jsonl" ] ||
        show python tools/make_passkey.py --output "$work/$length.jsonl" --documents 16000 --characters "$length"
    prepare "$length" "$work/$length.jsonl" # without --append-eod: a document fills a sample
done
[ -e "$work/filler.jsonl" ] ||
    show python tools/make_passkey.py --output "$work/filler.jsonl" --documents 8000 --characters 512 --without-key
prepare filler "$work/filler.jsonl"
[ -e "$work/corpus.jsonl" ] || show python tools/make_corpus.py --output "$work/corpus.jsonl" --max-mb 8
prepare text "$work/corpus.jsonl" --append-eod

# train NAME [key=value ...]
train() {
    local run="$work/$1" data="$work/data"
    shift
    [ ! -e "$run/export/config.json" ] || return 0
    local port overwrite=()
    port="$(free_port)"
    [ ! -e "$run" ] || overwrite=(--overwrite)
    show deepspeed --quiet --num_gpus 2 --master_port "$port" --module megayoco.train \
        --config examples/longllama_tiny.yaml --deepspeed_config ds_configs/cpu.json \
        "data.train=[0.6, $data/256_text_document, 0.4, $data/text_text_document]" \
        "phases.1.data.train=[0.6, $data/512_text_document, 0.4, $data/text_text_document]" \
        "phases.2.data.train=[0.3, $data/512_text_document, 0.4, $data/filler_text_document, 0.3, $data/text_text_document]" \
        "output_dir=$run" "$@" ${overwrite[@]+"${overwrite[@]}"}
}
train run-memory "$@"
train run-plain model.memory_layers=[] model.memory_window=null \
    phases.0.cross_batch=null phases.1.cross_batch=null phases.2.cross_batch=null "$@"

for name in memory plain; do
    show python -m megayoco.evaluate passkey --model "$work/run-$name" --output "$work/$name" \
        --lengths 512 1024 2048 4096 8192 16384 32768 --trials 25
done
