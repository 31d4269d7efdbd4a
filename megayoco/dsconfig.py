"""The DeepSpeed config of a run: a user's HJSON file, checked whole, completed from the run's own config.

DeepSpeed 0.19 accepts a misspelt key at top level, and in every section that is not a pydantic model, in silence. Here
every key is compared with the names that the installed DeepSpeed knows before anything is built. What the run's
config says (batch sizes, clipping, optimizer, schedule, parallel sizes) is filled in, never said twice: where a file
repeats a number it must agree, "auto" leaves it to the run's config.
"""

import copy
import difflib
import importlib.util
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import hjson
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling import constants as profiling
from deepspeed.runtime import config as ds
from deepspeed.runtime import constants
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
from deepspeed.runtime.model_checkpointing import constants as checkpointing
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from megayoco.config import RunConfig
from megayoco.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]

_BATCH_KEYS = (
    constants.TRAIN_BATCH_SIZE,
    constants.TRAIN_MICRO_BATCH_SIZE_PER_GPU,
    constants.GRADIENT_ACCUMULATION_STEPS,
)
_SWITCHES = {
    constants.PRESCALE_GRADIENTS,
    constants.DISABLE_ALLGATHER,
    constants.DISABLE_PYTHON_GC,
    constants.ZERO_ALLOW_UNTESTED_OPTIMIZER,
    constants.ZERO_FORCE_DS_CPU_OPTIMIZER,
    constants.WALL_CLOCK_BREAKDOWN,
    constants.MEMORY_BREAKDOWN,
    constants.DUMP_STATE,
    constants.DATALOADER_DROP_LAST,
}
_DATA_TYPES = ("fp32", "bf16", "fp16", None)
_CHOICES: dict[str, tuple[Any, ...]] = {
    constants.GRADIENT_ALLREDUCE_OP: ("mean", "sum"),
    constants.COMMUNICATION_DATA_TYPE: _DATA_TYPES,
    constants.SEQ_PARALLEL_COMMUNICATION_DATA_TYPE: _DATA_TYPES,
    constants.LOG_LEVEL: ("debug", "info", "warning", "error", "critical", None),
    f"{constants.DATA_TYPES}.{constants.GRAD_ACCUM_DTYPE}": _DATA_TYPES,
    f"{constants.DATA_TYPES}.{constants.BUFFER_DTYPE}": _DATA_TYPES,
}
_POSITIVE: dict[str, tuple[type, ...]] = {
    constants.STEPS_PER_PRINT: (int,),
    constants.GRADIENT_PREDIVIDE_FACTOR: (int, float),
}
_SCALARS = {
    *_SWITCHES,
    *_POSITIVE,
    *(key for key in _CHOICES if "." not in key),
    *_BATCH_KEYS,
    constants.GRADIENT_CLIPPING,
}

# A section is described by the pydantic model that DeepSpeed reads it with, by the names it looks up, or by a table
# of sections inside it.
_SECTIONS: dict[str, Any] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "timers": {"throughput": DeepSpeedThroughputTimerConfig},
    "aio": set(AIO_DEFAULT_DICT),
    "activation_checkpointing": set(ACT_CHKPT_DEFAULT),
    "pipeline": {*ds.get_pipeline_config({}), "use_reentrant"},
    constants.DATA_TYPES: {
        constants.GRAD_ACCUM_DTYPE,
        constants.BUFFER_DTYPE,
        constants.KEEP_IN_FP32_MODULES,
    },
    constants.CHECKPOINT: {
        constants.CHECKPOINT_TAG_VALIDATION,
        constants.CHECKPOINT_PARALLEL_WRITE,
        checkpointing.CHECKPOINT_SERIALIZATION,
    },
    profiling.FLOPS_PROFILER: {
        profiling.FLOPS_PROFILER_ENABLED,
        profiling.FLOPS_PROFILER_RECOMPUTE_FWD_FACTOR,
        profiling.FLOPS_PROFILER_PROFILE_STEP,
        profiling.FLOPS_PROFILER_MODULE_DEPTH,
        profiling.FLOPS_PROFILER_TOP_MODULES,
        profiling.FLOPS_PROFILER_DETAILED,
        profiling.FLOPS_PROFILER_OUTPUT_FILE,
    },
}

_ELSEWHERE = {
    "optimizer": "The optimizer is set in the run's config, section optimizer",
    "scheduler": "The learning-rate schedule is set in the run's config, section phases",
    "data_efficiency": "Data and sequence lengths are set in the run's config, sections data and phases",
    "tensor_parallel": "Set parallel.tensor in the run's config",
    "sequence_parallel_size": "Set parallel.sequence in the run's config",
    "expert_parallel": "There are no experts here",
    "hybrid_engine": "It serves reinforcement learning, which is not done here",
    "autotuning": "It starts runs of its own, which this trainer does not take part in",
    "weight_quantization": "It serves inference, which does not go through DeepSpeed here",
    "datastates_ckpt": "Checkpoints are set in the run's config, section checkpoint",
    constants.TORCH_AUTOCAST: "Precision is set by the sections bf16 and fp16",
    constants.MANAGED_GRADIENT_ACCUMULATION: "The trainer says itself where a step ends",
    f"{constants.DATA_TYPES}.{constants.PARAM_DTYPE}": "Precision is set by the sections bf16 and fp16",
    f"{constants.CHECKPOINT}.{constants.LOAD_UNIVERSAL_CHECKPOINT}": "A run resumes from its own checkpoints",
    f"{constants.CHECKPOINT}.{constants.USE_NODE_LOCAL_STORAGE_CHECKPOINT}": "All ranks write to the run's output_dir",
    f"{constants.CHECKPOINT}.{checkpointing.CHECKPOINT_WRITER}": "DeepSpeed's usual writer is used",
    "zero_optimization.cpu_offload": "Set zero_optimization.offload_optimizer.device",
    "zero_optimization.cpu_offload_param": "Set zero_optimization.offload_param.device",
    "zero_optimization.cpu_offload_use_pin_memory": "Set pin_memory in the sections that offload",
}
"""Keys that DeepSpeed knows and that have no place in a run of this trainer, with what to do instead."""


def load_deepspeed_config(
    path: str | os.PathLike[str] | None,
    run: RunConfig,
    data_parallel: int,
    device: torch.device | str,
    *,
    phase: int = 0,
) -> dict[str, Any]:
    """Read a DeepSpeed config file and complete it for `deepspeed.initialize`.

    Args:
        path: an HJSON file (JSON with comments); None is fp32 and ZeRO 0.
        run: its parallel sizes, its gradient clipping and the batch sizes of phase number `phase` are used.
        data_parallel: replicas that gradients are reduced over.
        device: what the run computes on; decides whether a 16-bit format can be used.

    Returns:
        The config with all three batch sizes, `gradient_clipping` (DeepSpeed takes 1.0 for an absent one),
        `zero_optimization.stage` and the pipeline section written out.

    Raises:
        UserError: unreadable or malformed file; duplicate or unknown key, with the nearest valid one; a value of the
            wrong kind; a number that disagrees with the run's config; a combination that cannot work.
    """
    name = "the DeepSpeed config" if path is None else os.fspath(path)
    config: dict[str, Any] = {} if path is None else _read(name)
    _check_keys(name, config)
    _fill_batch_sizes(name, config, run, data_parallel, phase)
    _fill(name, config, constants.GRADIENT_CLIPPING, run.optimizer.gradient_clipping, "optimizer.gradient_clipping")
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = int(DeepSpeedZeroConfig(**zero).stage)
    _fill_pipeline(name, config, run)
    _check_precision(name, config, torch.device(device), run.parallel.pipeline)
    _check_with_deepspeed(name, config)
    if zero["stage"] >= 2 and run.parallel.pipeline > 1:
        raise UserError(
            f"{name}: zero_optimization.stage {zero['stage']} cuts gradients, which pipeline stages still add to."
            f" Use stage 0 or 1 with parallel.pipeline {run.parallel.pipeline}, or set parallel.pipeline=1."
        )
    return config


def precision(config: dict[str, Any]) -> Precision:
    """The format that parameters and activations have under a DeepSpeed config."""
    if DeepSpeedBF16Config(**config.get("bf16", {})).enabled:
        return "bf16"
    return "fp16" if DeepSpeedFP16Config(**config.get("fp16", {})).enabled else "fp32"


def _read(name: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        section: dict[str, Any] = {}
        for key, value in items:
            if key in section:
                raise UserError(f"{name}: {key} is given twice in one section. Remove one.")
            section[key] = value
        return section

    try:
        config = hjson.loads(Path(name).read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}. Check --deepspeed_config.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}).") from None
    except hjson.HjsonDecodeError as error:
        raise UserError(f"{name}, line {error.lineno}: not valid JSON: {error.msg}.") from None
    except RecursionError:
        raise UserError(f"{name} is nested too deeply to be a DeepSpeed config.") from None
    if not isinstance(config, dict):
        raise UserError(f"{name} must hold an object of keys and values.")
    return config


def _check_keys(name: str, config: dict[str, Any]) -> None:
    removed: dict[str, str] = getattr(ds, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    removed_zero: dict[str, str] = getattr(ds, "_REMOVED_ZERO_CONFIG_KEYS", {})
    for key, value in config.items():
        if key in removed:
            raise UserError(f"{name}: {key}: {removed[key]}")
        if key in _SECTIONS:
            if key == "zero_optimization" and isinstance(value, dict):
                for old in removed_zero.keys() & value.keys():
                    raise UserError(f"{name}: {key}.{old}: {removed_zero[old]}")
            _check_section(name, key, _SECTIONS[key], value)
        elif key not in _SCALARS and key not in _ELSEWHERE:
            raise UserError(f"{name}: unknown key {key}. {_nearest(key, [*_SCALARS, *_SECTIONS], '')}")
        _check_value(name, key, value)
    for monitor, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if config.get(monitor, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise UserError(f"{name}: {monitor}.enabled needs the package {package}. Install it, or remove {monitor}.")


def _check_value(name: str, where: str, value: Any) -> None:
    """Refuse values of the keys that DeepSpeed uses unseen; `where` is the dotted key."""
    if where in _ELSEWHERE:
        raise UserError(f"{name}: {where} cannot be set here. {_ELSEWHERE[where]}, and remove the key.")
    if where in _SWITCHES and not isinstance(value, bool):
        raise UserError(f"{name}: {where} must be true or false, got {value!r}.")
    if where in _CHOICES and value not in _CHOICES[where]:
        allowed = ", ".join("null" if choice is None else choice for choice in _CHOICES[where])
        raise UserError(f"{name}: {where} must be one of {allowed}, got {value!r}.")
    if where in _POSITIVE and (type(value) not in _POSITIVE[where] or value <= 0):
        raise UserError(f"{name}: {where} must be a number above 0, got {value!r}.")


def _check_with_deepspeed(name: str, config: dict[str, Any]) -> None:
    """Let DeepSpeed read its part: what it refuses there would otherwise end the run with a traceback."""
    whole = copy.deepcopy(config)
    for key in _BATCH_KEYS:
        whole[key] = 1  # their product is ours to check; DeepSpeed may not know the number of ranks yet
    try:
        ds.DeepSpeedConfig(whole, mpu=_OneRank())
    except (ds.DeepSpeedConfigError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name}: DeepSpeed refuses it: {' '.join(str(error).split())}") from error


class _OneRank:
    """What DeepSpeed asks of an mpu to multiply batch sizes."""

    def get_data_parallel_world_size(self) -> int:
        return 1


def _check_section(name: str, where: str, section: Any, value: Any) -> None:
    """Refuse unknown keys of the section at the dotted key `where`, and values that its pydantic model refuses."""
    if not isinstance(value, dict):
        raise UserError(f"{name}: {where} must hold an object of keys and values, got {value!r}.")
    inner: dict[str, Any] = {}
    if isinstance(section, type) and issubclass(section, BaseModel):
        for field_name, field in section.model_fields.items():
            inner[field_name] = inner[field.alias or field_name] = _model_in(field.annotation)
    elif isinstance(section, dict):
        inner = section
    else:
        inner = dict.fromkeys(section)
    for key, item in value.items():
        _check_value(name, f"{where}.{key}", item)
        if key not in inner:
            raise UserError(f"{name}: unknown key {where}.{key}. {_nearest(key, inner, where + '.')}")
        if inner[key] is not None and item is not None and isinstance(item, dict):
            _check_section(name, f"{where}.{key}", inner[key], item)
    if isinstance(section, type):
        try:
            section(**value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join([where, *(str(part) for part in problem["loc"])])
            got = f", got {problem['input']!r}" if problem["loc"] else ""  # else the whole section
            raise UserError(f"{name}: {place}: {problem['msg']}{got}.") from None
        except (AssertionError, ValueError) as error:
            raise UserError(f"{name}: {where}: {error}.") from None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model that an annotation such as `Model | None` names, if any."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _nearest(key: str, known: Iterable[str], prefix: str) -> str:
    names = sorted(known)
    if found := difflib.get_close_matches(key, names, 1, 0.6):
        return f"Did you mean {prefix}{found[0]}?"
    return f"Valid keys here: {', '.join(names)}."


def _fill(name: str, config: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Write `value`, which the run's config calls `origin`; a file that already says something else is refused."""
    given = config.get(key, "auto")
    if given != "auto" and given != value:
        raise UserError(
            f"{name}: {key} is {given!r}, but the run's config says {value} ({origin})."
            " Remove the key here: the run's config decides."
        )
    config[key] = value


def _fill_batch_sizes(name: str, config: dict[str, Any], run: RunConfig, data_parallel: int, phase: int) -> None:
    batch, micro = run.phases[phase].batch_size, run.phases[phase].micro_batch_size
    accumulation = run.phases[phase].micro_batches(data_parallel)
    product = f"phases.{phase}: batch_size {batch} = micro_batch_size {micro} x {accumulation} micro-batches"
    product += f" x {data_parallel} data-parallel replicas"
    _fill(name, config, constants.TRAIN_BATCH_SIZE, batch, product)
    _fill(name, config, constants.TRAIN_MICRO_BATCH_SIZE_PER_GPU, micro, product)
    _fill(name, config, constants.GRADIENT_ACCUMULATION_STEPS, accumulation, product)


def _fill_pipeline(name: str, config: dict[str, Any], run: RunConfig) -> None:
    pipeline = config.setdefault("pipeline", {})
    for key in ("pipe_partitioned", "grad_partitioned"):
        # DeepSpeed's default (true) scatters what goes between stages over the tensor ranks as if it were equal on
        # all of them; the key and value shards in it are not, and the losses would be silently wrong
        if pipeline.get(key, "auto") not in (False, "auto"):
            raise UserError(
                f"{name}: pipeline.{key} must be false: what stages exchange differs between tensor ranks."
                " Remove the key, it is written for you."
            )
        pipeline[key] = False
    stages = run.parallel.pipeline
    if pipeline.get("stages", "auto") not in (stages, "auto"):
        raise UserError(
            f"{name}: pipeline.stages is {pipeline['stages']!r}, but parallel.pipeline of the run's config is {stages}."
            " Remove the key here: the run's config decides."
        )


def _check_precision(name: str, config: dict[str, Any], device: torch.device, stages: int) -> None:
    kind = precision(config)
    if kind == "bf16" and precision({**config, "bf16": {}}) == "fp16":
        raise UserError(f"{name}: bf16.enabled and fp16.enabled exclude each other. Remove one.")
    if kind == "fp16" and not (device.type != "cpu" and get_accelerator().is_fp16_supported()):
        raise UserError(f"{name}: fp16 cannot be used on device {device}. Use bf16, or fp32 by removing the section.")
    if kind == "bf16" and device.type != "cpu" and not get_accelerator().is_bf16_supported():
        raise UserError(f"{name}: bf16 cannot be used on device {device}. Use fp16, or fp32 by removing the section.")
    accumulation = config.get(constants.DATA_TYPES, {}).get(constants.GRAD_ACCUM_DTYPE)
    if accumulation not in (None, kind) and config["zero_optimization"]["stage"] == 0:
        raise UserError(
            f"{name}: data_types.grad_accum_dtype {accumulation} differs from the parameters' {kind}, which DeepSpeed"
            " supports only with ZeRO. Set zero_optimization.stage to 1, or remove data_types."
        )
    # without it a pipeline's stages before the last get wrong fp32 sums of gradients
    at_once = kind != "bf16" or stages == 1 or config["bf16"].setdefault("immediate_grad_update", True)
    if at_once is not True:
        raise UserError(
            f"{name}: bf16.immediate_grad_update must be true with parallel.pipeline {stages}: without it DeepSpeed's"
            " gradients are wrong. Remove the key."
        )
    if config.get(constants.GRADIENT_ALLREDUCE_OP) == "sum" and config["zero_optimization"]["stage"] == 3:
        raise UserError(f"{name}: gradient_allreduce_op sum does not go with ZeRO 3. Remove the key, or use stage 2.")
