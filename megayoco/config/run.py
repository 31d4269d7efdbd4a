"""A run as typed sections: phases, optimizer, validation, checkpoints, logging, and all of them together."""

import dataclasses
import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from megayoco.config.base import (
    SECTION,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    refuse,
)
from megayoco.config.data import DataConfig, PhaseDataConfig
from megayoco.config.evaluation import (
    DictionaryOptions,
    HarnessOptions,
    MultiNeedleOptions,
    NeedleOptions,
    PasskeyOptions,
    PerplexityOptions,
)
from megayoco.config.model import ModelConfig
from megayoco.config.parallel import ParallelConfig
from megayoco.errors import UserError

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class OptimizerConfig:
    """AdamW. Weight decay applies to matrices only, never to the weights of norms."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the second running mean."""

    weight_decay: NonNegativeFloat = 0.1
    """Share of a weight that is taken off per step and unit of learning rate."""

    gradient_clipping: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CrossBatchConfig:
    """Cross-batch training of memory layers (Focused Transformer, arXiv 2307.03170): the memory of a window is the
    windows before it in the micro-batch, of its own sample and of other ones, with their gradients. A sample is a pack
    of `sequence_length / memory_window` windows. Validation, evaluation and generation ignore it."""

    range: NonNegativeInt
    """Windows before its own that a window sees at most; 0: none. Those beyond its own sample are the distractors that
    the training is named after."""

    stepping: bool = True
    """Whether only the last windows of a sample see all of `range`: window p of a sample of k sees at most
    p * ceil((range + 1) / (k - 1)), the first one nothing."""

    negatives: Literal["micro_batch", "neighbour"] = "micro_batch"
    """Where windows before the first sample of a micro-batch come from. `micro_batch`: nowhere. `neighbour`: from the
    last windows of the data-parallel replica before, so that the replicas together train as one with the micro-batches
    of all of them in one; the first replica has none. What is trained then depends on `micro_batch_size` times the
    number of replicas."""

    @model_validator(mode="after")
    def _check(self) -> "CrossBatchConfig":
        if self.range == 0 and self.negatives == "neighbour":
            refuse("negatives", "neighbour gives windows that range 0 does not see: leave it out, or make range larger")
        return self


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PhaseConfig:
    """A stretch of training with one sequence length, one batch size and one learning-rate schedule."""

    name: str | None = None
    """What the phase is called in logs. Default: its number."""

    sequence_length: PositiveInt
    """Tokens per sample."""

    steps: PositiveInt | None = None
    """Length of the phase in optimizer steps. Give this or `tokens`."""

    tokens: PositiveInt | None = None
    """Length of the phase in tokens, rounded up to whole steps. Give this or `steps`."""

    batch_size: PositiveInt
    """Sequences per optimizer step, over all processes together."""

    micro_batch_size: PositiveInt = 1
    """Sequences that one data-parallel replica takes through the model at once."""

    learning_rate: PositiveFloat
    """Peak learning rate."""

    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule; not used by `constant`."""

    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Course after the warm-up, down to `min_learning_rate` at the end of the phase. `wsd` holds the peak first and
    falls linearly over the last `decay_steps`."""

    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise from 0 to the peak. In a shorter phase the peak is not reached."""

    warmup_tokens: PositiveInt | None = None
    """The warm-up in tokens, rounded up to whole steps, in place of `warmup_steps`."""

    decay_steps: PositiveInt | None = None
    """Steps of the final fall of `wsd`. `wsd` requires this or `decay_tokens`."""

    decay_tokens: PositiveInt | None = None
    """The final fall of `wsd` in tokens, rounded up to whole steps."""

    rope_theta: PositiveFloat | None = None
    """Base of the rotary embedding from this phase on. Default: `model.rope_theta`."""

    optimizer_state: Literal["carry", "reset"] = "carry"
    """What becomes of AdamW's running means at the start of the phase: carried over, or set to zero."""

    bands: PositiveInt | Literal["auto"] | None = None
    """`parallel.bands` of this phase where it differs."""

    cross_batch: CrossBatchConfig | None = None
    """Cross-batch training of `model.memory_layers`. Default: a window sees all earlier windows of its own sample."""

    loss: Literal["token_mean", "row_mean"] = "token_mean"
    """What is minimised. `token_mean`: the mean over all targets of a step. `row_mean`: the mean over rows of the mean
    over their targets, so that rows with few targets weigh as much as others; a row without any counts with 0. A row is
    a window of `model.memory_window` tokens, without memory layers a sample. Validation is per target either way."""

    data: PhaseDataConfig | None = None
    """Data of this phase where it differs from the run's."""

    @model_validator(mode="after")
    def _check(self) -> "PhaseConfig":
        if (self.steps is None) == (self.tokens is None):
            refuse("steps", "or tokens says how long the phase is: give exactly one of them, and null for the other")
        if self.warmup_steps and self.warmup_tokens is not None:
            refuse("warmup_tokens", "and warmup_steps say the same: give one of them")
        if self.decay_steps is not None and self.decay_tokens is not None:
            refuse("decay_tokens", "and decay_steps say the same: give one of them")
        decay = "decay_steps" if self.decay_tokens is None else "decay_tokens"
        if self.schedule == "wsd":
            if self.num_decay_steps == 0:
                refuse("decay_steps", "or decay_tokens is required by schedule wsd")
            if self.num_warmup_steps + self.num_decay_steps > self.num_steps:
                refuse(
                    decay,
                    f"is too large: warm-up of {self.num_warmup_steps} and fall of {self.num_decay_steps} steps"
                    f" do not fit into a phase of {self.num_steps} steps",
                )
        elif self.num_decay_steps:
            refuse(decay, f"is used only by schedule wsd, not by {self.schedule}: leave it out")
        if self.min_learning_rate > self.learning_rate:
            refuse("min_learning_rate", f"must not exceed learning_rate {self.learning_rate}")
        if self.batch_size % self.micro_batch_size:
            refuse("batch_size", f"{self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all processes together."""
        return self.batch_size * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the phase."""
        return self._steps(self.steps, self.tokens)

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return self._steps(self.warmup_steps, self.warmup_tokens)

    @property
    def num_decay_steps(self) -> int:
        """Steps of the final fall of `wsd`; 0 if none is given."""
        return self._steps(self.decay_steps, self.decay_tokens)

    def micro_batches(self, data_parallel: int) -> int:
        """Micro-batches per step of each of `data_parallel` replicas. Raises UserError if they do not divide."""
        at_once = self.micro_batch_size * data_parallel
        if self.batch_size % at_once:
            raise UserError(
                f"batch_size {self.batch_size} cannot be split into micro_batch_size {self.micro_batch_size}"
                f" x {data_parallel} data-parallel replicas = {at_once}. Make batch_size a multiple of {at_once}."
            )
        return self.batch_size // at_once

    def _steps(self, steps: int | None, tokens: int | None) -> int:
        return (steps or 0) if tokens is None else math.ceil(tokens / self.tokens_per_step)


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ValidationConfig:
    """When the validation loss is computed, and on how much."""

    interval: NonNegativeInt = 0
    """Steps between two validations; 0 validates only at the end of each phase, if there is validation data."""

    batches: PositiveInt = 8
    """Batches of `batch_size` sequences that the loss is averaged over."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class EvaluationConfig:
    """What `python -m megayoco.evaluate` does, during the run: a section for each evaluation that is wanted. Results go
    to `evaluation/` in the run's directory, to the metrics and to TensorBoard."""

    interval: NonNegativeInt = 0
    """Steps between two evaluations; 0 evaluates only at the end of the run."""

    needle: NeedleOptions | None = None
    """A number hidden in a text."""

    multi_needle: MultiNeedleOptions | None = None
    """Several numbers hidden in a text."""

    passkey: PasskeyOptions | None = None
    """A number hidden in sentences that repeat."""

    dictionary: DictionaryOptions | None = None
    """Values of random keys."""

    perplexity: PerplexityOptions | None = None
    """Loss by position in long documents."""

    harness: HarnessOptions | None = None
    """Tasks of lm-evaluation-harness."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        if self.interval and not self.wanted():
            refuse("interval", "has nothing to evaluate: add a section, for example needle: {}")
        return self

    def wanted(self) -> dict[str, Any]:
        """The options of each evaluation that is wanted, by its name on the command line."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "interval"]
        given = {name.replace("_", "-"): getattr(self, name) for name in names}
        return {name: options for name, options in given.items() if options is not None}


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CheckpointConfig:
    """When the run is saved."""

    interval: NonNegativeInt = 0
    """Steps between two checkpoints; 0 saves only at the end."""

    keep_last: PositiveInt | None = None
    """Checkpoints that stay: so many of the newest. Default: all."""

    keep_every: PositiveInt | None = None
    """With `keep_last`: checkpoints of multiples of this step stay as well."""

    export: Literal["end", "every", "never"] = "end"
    """When weights are also written as safetensors: at the `end`, with `every` checkpoint, or `never`."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.keep_every is not None and self.keep_last is None:
            refuse("keep_every", "says what stays besides the newest checkpoints: give keep_last, too")
        return self


@dataclass(frozen=True, kw_only=True, config=SECTION)
class LoggingConfig:
    """What is reported."""

    interval: PositiveInt = 10
    """Steps between two lines on the console."""

    tensorboard: bool = True
    """Write TensorBoard files."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    """The shape of the model."""

    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    """How the model is spread over processes."""

    data: DataConfig
    """What is read."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """How weights are updated."""

    phases: Annotated[list[PhaseConfig], Field(min_length=1)]
    """What happens in which order."""

    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    """When the validation loss is computed."""

    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """What the model is asked during the run."""

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When the run is saved."""

    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    """What is reported."""

    output_dir: Annotated[str, Field(min_length=1)]
    """Directory of the run: config, metrics, checkpoints."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Number that initial weights and the order of the data follow from."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        ranks = self.parallel.sequence
        for number, phase in enumerate(self.phases):
            bands = self.phase_bands(number)
            chunks = ranks * (1 if bands == "auto" else bands)
            if phase.sequence_length % chunks:
                key = "parallel.bands" if phase.bands is None else f"phases.{number}.bands"
                count = f"parallel.sequence {ranks}" + ("" if chunks == ranks else f" x {key} {bands} = {chunks}")
                nearest = max(phase.sequence_length // chunks, 1) * chunks
                refuse(
                    f"phases.{number}.sequence_length",
                    f"{phase.sequence_length} cannot be cut into equal chunks for {count}: it leaves "
                    f"{phase.sequence_length % chunks} tokens. Use {nearest}, or change one of the others",
                )
            self._check_memory(number)
        return self

    def _check_memory(self, number: int) -> None:
        phase, window = self.phases[number], self.model.memory_window
        if window is None:
            if phase.cross_batch is not None:
                refuse(
                    f"phases.{number}.cross_batch", "trains memory layers: give model.memory_layers, or leave it out"
                )
            return
        if self.phase_data(number).document_mask:
            own = phase.data is not None and phase.data.document_mask is not None
            refuse(
                f"phases.{number}.data.document_mask" if own else "data.document_mask",
                "hides documents from one another, which model.memory_layers cannot: set it to false",
            )
        tunes = self.phase_data(number).tuning is not None
        if phase.cross_batch is not None and tunes:
            refuse(
                f"phases.{number}.cross_batch",
                "mixes samples, and those of data.tuning are examples of their own, padded in front: leave it out",
            )
        if tunes and self.phase_data(number).has_borders and self.parallel.sequence > 1:
            refuse(
                "parallel.sequence",
                f"{self.parallel.sequence} cannot hide the padding of data.tuning from model.memory_layers: use 1, or"
                " set random_padding to false",
            )
        ranks = self.parallel.sequence
        unit = ranks * window
        if ranks > 1 and phase.sequence_length % unit:
            refuse(
                f"phases.{number}.sequence_length",
                f"{phase.sequence_length} leaves no whole windows of model.memory_window {window} to each of"
                f" parallel.sequence {ranks} ranks: use {-(-phase.sequence_length // unit) * unit}",
            )
        needs = (
            "cross_batch" if phase.cross_batch is not None else "loss row_mean" if phase.loss == "row_mean" else None
        )
        if needs is not None and phase.sequence_length % window:
            refuse(
                f"phases.{number}.sequence_length",
                f"{phase.sequence_length} is no multiple of model.memory_window {window}, which {needs} needs:"
                f" use {-(-phase.sequence_length // window) * window}",
            )

    def phase_data(self, phase: int) -> DataConfig:
        """The data of phase number `phase`: the run's, with what the phase replaces."""
        override = self.phases[phase].data
        if override is None:
            return self.data
        return dataclasses.replace(self.data, **override.replaced())

    def phase_bands(self, phase: int) -> int | Literal["auto"]:
        """Bands of phase number `phase`."""
        own = self.phases[phase].bands
        return self.parallel.bands if own is None else own

    def row_length(self, phase: int) -> int | None:
        """Tokens of a row of the loss of phase number `phase`; None where every target weighs the same."""
        if self.phases[phase].loss == "token_mean":
            return None
        return self.model.memory_window or self.phases[phase].sequence_length

    def phase_rope_theta(self, phase: int) -> float:
        """Rotary base of phase number `phase`."""
        own = self.phases[phase].rope_theta
        return self.model.rope_theta if own is None else own
