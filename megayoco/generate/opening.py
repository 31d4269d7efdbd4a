"""From a command line to a model that is ready: in one process, or on the ranks that a launcher has started."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.generate.finding import read_model
from megayoco.model.window_options import WindowOptions

if TYPE_CHECKING:
    import torch

    from megayoco.config import ModelConfig
    from megayoco.convert.weights import Weights
    from megayoco.model.inference import InferenceModel, MemoryOptions
    from megayoco.parallel.launch import Launch

_MEMORY = ("memory_top_k", "memory_search", "memory_directory", "memory_device")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model goes, as the flags of generate and evaluate say it."""

    device: str | None = None
    """cpu, cuda, cuda:1; None: a GPU where there is one."""
    dtype: str | None = None
    """float32 or bfloat16; None: float32 on a CPU, bfloat16 on a GPU."""
    tensor: int | None = None
    """Ranks that share each matrix; None: all, or with `copies` 1."""
    pipeline: int = 1
    """Ranks that share the layers."""
    sequence: int = 1
    """Ranks that keep the memory of memory layers together."""
    copies: bool = False
    """Whether ranks beyond one copy of the model hold further copies, which work on other prompts."""
    storage: str | None = None
    """int8 or fp8 to keep the growing keys and values so; None: in the model's dtype."""
    memory_top_k: int | None = None
    """Remembered keys that a query of memory attention reads, the best ones; None: all."""
    memory_search: str | None = None
    """How they are found (`memory_search.SEARCHES`); None: exact."""
    memory_directory: str | None = None
    """Folder of the files that the memory is kept in; None: in memory."""
    memory_device: str | None = None
    """cpu: the memory of a model on a GPU; None: beside the model."""
    windows: WindowOptions = field(default_factory=WindowOptions)
    """How memory layers cut a text into windows, and how much they remember."""
    default_eviction: bool = False
    """Whether tokens leave a window as is best for generation where `windows` does not say; else as in training."""

    def windows_for(self, model: ModelConfig) -> WindowOptions:
        """What memory layers of this model do. Raises UserError for what the model cannot do."""
        return self.windows.resolved(model) if self.default_eviction else self.windows.checked(model)


@dataclass(frozen=True)
class Opened:
    """A model with what belongs to it."""

    model: InferenceModel
    tokenizer: Tokenizer
    facts: dict[str, Any]
    """What is known of its training; `sequence_length` is the longest trained, in tokens."""
    rank: int
    """Of this process; 0 speaks."""
    weights: Weights
    """What the model was read from."""


def open_model(path: str | os.PathLike[str], placement: Placement) -> Opened:
    """Finds, reads and places the model that `--model` names. Collective under a launcher.

    Raises:
        UserError: there is no model, or it does not fit the placement; the same on all ranks.
    """
    # late: DeepSpeed and megatron-core take seconds, and a mistake on the command line needs neither
    from megayoco.parallel.launch import read_launch

    launch = read_launch(os.environ)
    if launch.world_size == 1:
        return _open_alone(path, placement, launch)
    from megayoco.parallel.agreement import all_ranks_agree
    from megayoco.parallel.launch import start_distributed

    if placement.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {placement.device}: several processes take one GPU each. Say cpu or cuda.")
    if placement.device is not None:
        os.environ["DS_ACCELERATOR"] = placement.device
    # DeepSpeed calls collectives by names that torch is about to replace; a user can do nothing about it
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    launch, device = start_distributed()
    with all_ranks_agree():
        weights, tokenizer = read_model(path)
        layout = _layout(placement, launch.world_size)
        layout.validate(weights.model, launch.world_size)
        memory = memory_options(placement, weights.model, device)
        windows = placement.windows_for(weights.model)
    from megayoco.generate.loading import load_weights
    from megayoco.parallel.topology import build_topology

    topology = build_topology(layout, weights.model)
    with all_ranks_agree():
        model = load_weights(
            weights,
            dtype=_dtype(placement.dtype, device),
            device=device,
            topology=topology,
            storage=placement.storage,
            memory=memory,
            windows=windows,
        )
    return Opened(model, tokenizer, weights.facts, launch.rank, weights)


def _open_alone(path: str | os.PathLike[str], placement: Placement, launch: Launch) -> Opened:
    for name in ("tensor", "pipeline", "sequence"):
        if (getattr(placement, name) or 1) > 1:
            raise UserError(
                f"--{name} {getattr(placement, name)} needs as many processes: deepspeed --num_gpus N --module ..."
            )
    device = choose_device(placement.device)
    weights, tokenizer = read_model(path)
    memory = memory_options(placement, weights.model, device)
    windows = placement.windows_for(weights.model)
    # slow: the layers bring megatron-core along. This package first, which keeps it quiet.
    import torch

    import megayoco.parallel  # noqa: F401
    from megayoco.generate.loading import load_weights
    from megayoco.parallel.launch import thread_count

    torch.set_num_threads(thread_count(launch, os.environ))

    dtype = _dtype(placement.dtype, device)
    model = load_weights(weights, dtype=dtype, device=device, storage=placement.storage, memory=memory, windows=windows)
    return Opened(model, tokenizer, weights.facts, 0, weights)


def memory_options(placement: Placement, config: ModelConfig, device: torch.device) -> MemoryOptions | None:
    """What the flags say of the memory of memory layers; None: nothing.

    Raises:
        UserError: a flag would do nothing for this model, the folder is none, or Faiss is not installed.
    """
    given = [name for name in _MEMORY if getattr(placement, name) is not None]
    if placement.sequence > 1:
        given.append("sequence")
    if not given:
        return None
    if not config.memory_layers:
        flag = given[0].replace("_", "-")
        raise UserError(f"--{flag} is about memory layers, and the model has none. Leave it out.")
    if placement.memory_device is not None and device.type == "cpu":
        raise UserError("--memory-device cpu changes nothing for a model on the CPU. Leave it out.")
    if placement.memory_directory is not None and not Path(placement.memory_directory).is_dir():
        raise UserError(f"--memory-directory {placement.memory_directory} is no folder. Make it first.")
    import torch

    from megayoco.model.inference import MemoryOptions
    from megayoco.ops.key_value_storage import Place
    from megayoco.ops.memory_search import Search

    search = place = None
    if placement.memory_top_k is not None:
        search = Search(placement.memory_top_k, placement.memory_search or "exact")
    if placement.memory_directory is not None:
        place = Place(torch.device("cpu"), Path(placement.memory_directory))
    elif placement.memory_device is not None:
        place = Place(torch.device(placement.memory_device))
    return MemoryOptions(search, place, shared=placement.sequence > 1)


def _layout(placement: Placement, world_size: int) -> Any:
    from megayoco.config import ParallelConfig

    pipeline, sequence = placement.pipeline, placement.sequence
    flags = f"--pipeline {pipeline}" + (f" x --sequence {sequence}" if sequence > 1 else "")
    others = pipeline * sequence
    if world_size % others:
        raise UserError(f"{flags} does not divide the {world_size} processes. Start a multiple of {others}.")
    tensor = placement.tensor or (1 if placement.copies else world_size // others)
    if not placement.copies and tensor * others != world_size:
        raise UserError(
            f"{world_size} processes were started, but --tensor {tensor} x {flags} = {tensor * others}"
            f" hold the model. Start {tensor * others}."
        )
    return ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence)


def choose_device(name: str | None) -> torch.device:
    """The device by its name; None: a GPU where torch sees one (unless DS_ACCELERATOR=cpu), else the CPU."""
    import torch

    if name is None:
        usable = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device of torch. Say cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here. Say --device cpu.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported. Say cpu, cuda or cuda:1.")
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    import torch

    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))  # type: ignore[no-any-return]
