"""The run as typed dataclasses: model, parallel, data, phases, optimizer; YAML files with dotted overrides."""

from megayoco.config.data import Blend, DataConfig, DataSource, PhaseDataConfig
from megayoco.config.loader import load_config, model_config_from_dict, model_config_to_dict, save_config
from megayoco.config.model import ModelConfig
from megayoco.config.parallel import ParallelConfig
from megayoco.config.run import (
    CheckpointConfig,
    CrossBatchConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
    ValidationConfig,
)

__all__ = [
    "Blend",
    "CheckpointConfig",
    "CrossBatchConfig",
    "DataConfig",
    "DataSource",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseConfig",
    "PhaseDataConfig",
    "RunConfig",
    "ValidationConfig",
    "load_config",
    "model_config_from_dict",
    "model_config_to_dict",
    "save_config",
]
