"""From weights on disk to a model in memory."""

from __future__ import annotations

import torch
from torch import nn

from megayoco.convert.weights import Weights
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.parallel.shards import mark, name_of, shard_of


def load_decoder(weights: Weights, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model of these weights, whole in this process, for inference: no gradients, evaluation mode.

    Weights are read one by one, straight to `device`: no second copy of the model is ever in memory.
    """
    with torch.device("meta"):
        decoder = build_decoder(weights.model, None, dtype=dtype)
    made: dict[str, nn.Parameter] = {}
    for module in decoder.modules():
        for attribute, empty in list(module.named_parameters(recurse=False)):
            name = name_of(empty)
            if name not in made:  # a tied head is the embedding's parameter
                # a copy, never the mapped file itself, which may change under us
                values = weights.tensors[name].to(device, dtype, copy=True)
                made[name] = nn.Parameter(values, requires_grad=False)
                mark(made[name], name, shard_of(empty))
            setattr(module, attribute, made[name])
    return decoder.eval()
