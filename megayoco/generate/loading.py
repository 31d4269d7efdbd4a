"""From weights on disk to a model in memory, whole or this rank's part of it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from megayoco.convert.weights import Weights
from megayoco.data.tokenizer import Tokenizer
from megayoco.generate.finding import read_model
from megayoco.model.bands import Stage
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.model.inference import InferenceModel, MemoryOptions
from megayoco.model.window_options import WindowOptions
from megayoco.ops.key_value_cache import STORAGES
from megayoco.parallel.shards import mark, name_of, shard_of

if TYPE_CHECKING:
    from megayoco.parallel.topology import Topology

STAGES_FOR = 4096
"""Tokens at which stages of a pipeline are cut to equal cost where the model does not say how long it was trained."""


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    topology: Topology | None = None,
    storage: str | None = None,
    memory: MemoryOptions | None = None,
    windows: WindowOptions | None = None,
) -> tuple[InferenceModel, Tokenizer]:
    """The model of a run, an export or a folder of another format, for inference.

    Args:
        path: what `--model` names.
        dtype: of the weights in memory; None: float32 on a CPU, bfloat16 on a GPU.
        device: where they go; None: the CPU.
        topology: this rank's place; None: the whole model in this process.
        storage: `int8` or `fp8` to keep growing keys and values so; None: in `dtype`.
        memory: of the layers with memory attention.
        windows: how memory layers read a long text; None: in windows as in training, and they remember everything.
            `WindowOptions().resolved(model)` is what the command line takes.

    Raises:
        UserError: there is no model, or it has no tokenizer, or cannot use its memory so.
    """
    weights, tokenizer = read_model(path)
    model = load_weights(
        weights, dtype=dtype, device=device, topology=topology, storage=storage, memory=memory, windows=windows
    )
    return model, tokenizer


def load_weights(
    weights: Weights,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    topology: Topology | None = None,
    storage: str | None = None,
    memory: MemoryOptions | None = None,
    windows: WindowOptions | None = None,
) -> InferenceModel:
    """The same from weights that have been found already. Each tensor is read by itself, straight to `device`."""
    device = torch.device("cpu") if device is None else device
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    narrow = None if storage is None else STORAGES[storage]
    windows = (windows or WindowOptions()).checked(weights.model)
    if topology is None or topology.pipeline == 1:
        return InferenceModel.of(load_decoder(weights, dtype, device, topology), topology, narrow, memory, windows)
    from megayoco.model.pipeline import split_stages  # late: it brings DeepSpeed's pipeline along

    length = weights.facts.get("sequence_length") or STAGES_FOR
    borders = split_stages(replace(weights.model, tie_embeddings=False), topology.pipeline, length)
    first, end = borders[topology.pipeline_rank : topology.pipeline_rank + 2]
    stage = _part(_on_meta(weights, dtype, topology), first, end)
    _fill(stage.modules(), weights, dtype, device)
    return InferenceModel(
        stage, weights.model, topology=topology, begins=first, storage=narrow, memory=memory, windows=windows
    )


def load_decoder(
    weights: Weights, dtype: torch.dtype, device: torch.device, topology: Topology | None = None
) -> Decoder:
    """All blocks of these weights, for inference: no gradients, evaluation mode."""
    decoder = _on_meta(weights, dtype, topology)
    _fill([decoder], weights, dtype, device)
    return decoder


def _on_meta(weights: Weights, dtype: torch.dtype, topology: Topology | None) -> Decoder:
    if topology is not None:
        topology = replace(topology, sequence=1)  # ranks of a sequence are replicas here
    with torch.device("meta"):
        return build_decoder(weights.model, topology, dtype=dtype).eval()


def _part(decoder: Decoder, first: int, end: int) -> Stage:
    """The blocks number first .. end - 1 of [embedding, layer pattern ..., head]."""
    whole = decoder.stage()
    blocks = set(map(id, whole.modules()[first:end]))

    def mine(block: nn.Module | None) -> bool:
        return block is not None and id(block) in blocks

    return Stage(
        whole.embed if mine(whole.embed) else None,
        [layer for layer in whole.self_layers if mine(layer)],
        whole.shared_kv if mine(whole.shared_kv) else None,
        [layer for layer in whole.cross_layers if mine(layer)],
        whole.head if mine(whole.head) else None,
    )


def _fill(blocks: list[nn.Module], weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Gives blocks on the meta device their weights, read one at a time: no second copy of the model exists."""
    made: dict[str, nn.Parameter] = {}
    for module in (part for block in blocks for part in block.modules()):
        for attribute, empty in list(module.named_parameters(recurse=False)):
            name, shard = name_of(empty), shard_of(empty)
            if name not in made:  # a tied head is the embedding's parameter
                # a copy, never the mapped file itself, which may change under us
                values = shard.cut(weights.tensors[name]).to(device, dtype, copy=True)
                made[name] = nn.Parameter(values.contiguous(), requires_grad=False)
                mark(made[name], name, shard)
            setattr(module, attribute, made[name])
