"""How one model is spread over processes."""

from typing import Literal

from pydantic.dataclasses import dataclass

from megayoco.config.base import SECTION, PositiveInt
from megayoco.config.model import ModelConfig
from megayoco.errors import UserError


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ParallelConfig:
    """How one model is spread over processes: world size = pipeline x data x sequence x tensor."""

    tensor: PositiveInt = 1
    """Ranks that share the heads and feed-forward columns of every layer; divides `model.heads`."""

    pipeline: PositiveInt = 1
    """Stages that the stack of layers is cut into."""

    sequence: PositiveInt = 1
    """Ranks that share every sequence, each with a part of its tokens; every sequence length divides by it times
    `bands`, with `model.memory_layers` into parts of whole windows."""

    bands: PositiveInt | Literal["auto"] = 1
    """Chunks per rank that a sequence is cut into and trained one after the other, exactly: more bands, less activation
    memory (YOCO only). 1 takes it at once; `auto` cuts as little as the free memory allows."""

    band_order: Literal["fused", "split"] = "fused"
    """Order of the work with several bands. `fused` keeps nothing but keys, values and their gradients; `split` keeps
    the hidden states between the halves too."""

    activation_checkpointing: bool = False
    """Keep only the input of each block, and compute the rest again in the backward pass."""

    def data(self, world_size: int) -> int:
        """Data-parallel replicas that the other axes leave over. Raises UserError if they do not divide."""
        ranks = self.pipeline * self.sequence * self.tensor
        if world_size % ranks:
            raise UserError(
                f"{world_size} processes cannot be split into pipeline {self.pipeline} x sequence {self.sequence}"
                f" x tensor {self.tensor} = {ranks}. Start a multiple of {ranks}, or change one of the three."
            )
        return world_size // ranks

    def validate(self, model: ModelConfig, world_size: int) -> None:
        """Raise UserError unless `model` can be cut this way over `world_size` processes."""
        if self.bands != 1:
            check_bands(self.bands, model, "parallel.bands")
        self.data(world_size)
        cut = {"heads": model.heads, "hidden_dim": model.hidden_dim, "vocab_size": model.vocab_size}
        if model.pattern == "yoco":
            cut["self_heads"] = model.num_self_heads
        for name, size in cut.items():
            if size % self.tensor:
                raise UserError(
                    f"model.{name} {size} cannot be split over parallel.tensor {self.tensor}: {size} / {self.tensor}"
                    f" leaves {size % self.tensor}. Change one of the two."
                )
        kv_heads = model.num_kv_heads
        if kv_heads % self.tensor and self.tensor % kv_heads:
            raise UserError(
                f"model.kv_heads {kv_heads} can be neither split over nor replicated on parallel.tensor {self.tensor}:"
                " one must divide the other. Change one of the two."
            )
        if self.pipeline > model.layers:
            raise UserError(
                f"parallel.pipeline {self.pipeline} needs a layer for each stage, model.layers is {model.layers}."
                " Use fewer stages."
            )


def check_bands(bands: int | str, model: ModelConfig, key: str) -> None:
    """Raise UserError if `model` cannot be trained in bands; `key` is where the user asked for them."""
    if model.memory_layers and bands not in (1, "auto"):
        raise UserError(
            f"{key} is {bands}, but layers with memory (model.memory_layers) cannot be trained in bands. Set it to 1;"
            " parallel.activation_checkpointing works with them."
        )
    if model.pattern != "yoco" and bands not in (1, "auto"):
        raise UserError(
            f"{key} is {bands}, but in the {model.pattern} pattern every layer has keys and values of its own: only"
            " YOCO's shared ones allow exact training in bands. Set it to 1; parallel.sequence and"
            " parallel.activation_checkpointing work with every pattern."
        )
