"""Which indexed files a run reads, and in which proportions."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from megayoco.config.base import SECTION, NonNegativeInt, PositiveFloat, refuse
from megayoco.config.tuning import TuningConfig

GRAMMAR = (
    "must be a dataset prefix, a list of prefixes, a list of weight, prefix, weight, prefix, ...,"
    " a list of {prefix: ..., weight: ...}, or a blend file (.yaml, .json, .txt)"
)
Pipeline = Literal["shuffled", "linear", "doc_aware"]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DataSource:
    """One dataset of a blend."""

    prefix: str
    """Path of the indexed dataset without `.bin` and `.idx`."""

    weight: PositiveFloat | None = None
    """Share of the samples that come from this dataset, relative to the others. Give all of them a weight, or none:
    then each has its number of tokens."""

    min_document_length: NonNegativeInt | None = None
    """`data.min_document_length` of this dataset where it differs."""


Repeats = Annotated[float, Field(ge=0, le=1000)]
Blend = str | list[str | float | DataSource]


def _check_blend(field: str, value: Any) -> Any:
    """Accept what `GRAMMAR` says (mappings become DataSource), refuse the rest in one message."""
    if value is None or (isinstance(value, str) and value):
        return value
    if not isinstance(value, list) or not value:
        refuse(field, f"{GRAMMAR}; got {value!r}")
    if all(isinstance(item, dict | DataSource) for item in value):
        for item in value:
            if isinstance(item, dict) and not _is_source(item):
                refuse(field, f"{GRAMMAR}; got the entry {item!r}")
        sources = [item if isinstance(item, DataSource) else DataSource(**item) for item in value]
        if len({source.weight is None for source in sources}) > 1:
            refuse(field, "must give a weight to each dataset, or to none")
        return sources
    if all(isinstance(item, str) for item in value):
        return value
    pairs = list(zip(value[::2], value[1::2], strict=False))
    if len(value) % 2 or not all(_is_weight(weight) and isinstance(prefix, str) for weight, prefix in pairs):
        refuse(field, f"{GRAMMAR}; got {value!r}")
    return value


def _is_source(item: dict[str, Any]) -> bool:
    known = item.keys() <= {"prefix", "weight", "min_document_length"} and isinstance(item.get("prefix"), str)
    least = item.get("min_document_length")
    known = known and (least is None or (isinstance(least, int) and not isinstance(least, bool) and least >= 0))
    return known and (item.get("weight") is None or _is_weight(item["weight"]))


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DataConfig:
    """What is read. Blends follow Megatron's grammar: PREFIX, [PREFIX, ...], [WEIGHT, PREFIX, WEIGHT, PREFIX, ...]."""

    train: Blend | None = None
    """Training data: a blend of dataset prefixes, a list of {prefix, weight}, or the path of a blend file. Sources
    without weights have their number of tokens for weight. Every source is read from its start again when it ends.
    Give this or `tuning`."""

    tuning: TuningConfig | None = None
    """Instruction and chat tuning: examples from JSON lines or tables in place of `train`."""

    valid: Blend | None = None
    """Validation data, a blend as in `train`. Absent: the part of `train` that `split` sets aside."""

    split: str = "99,1,0"
    """Parts of the training data for training, validation and test; used only while `valid` is absent."""

    temperature: PositiveFloat = 1.0
    """Where `train` gives no weights: the weight of a dataset is its number of tokens to the power 1 / temperature. 1
    reads every token equally often; above 1, small datasets are read more often than large ones."""

    pipeline: Pipeline = "shuffled"
    """How training documents become samples. `shuffled`: one stream of documents in random order is cut into samples,
    which come in random order. `linear`: the samples of that stream come as they follow one another. `doc_aware`: as
    many streams as `batch_size`; a sample of each batch goes on where that of the batch before ended in its stream, and
    a stream takes the next document of all when its own ends (Focused Transformer: doc_aware_k of its code is a
    `sequence_length` of k `model.memory_window`). A new random order begins with every pass over the data, except with
    `shuffled`, where samples alone get one."""

    min_document_length: NonNegativeInt = 0
    """Documents of fewer tokens are left out of the training data."""

    long_document_weight: Repeats = 1.0
    """How often an epoch holds a document of more tokens than the sequence length, shorter ones standing in it once.
    2.5: twice, and half of them, chosen by the seed, a third time. Training data only."""

    tokenizer_type: str | None = None
    """Kind of tokenizer, for example TiktokenTokenizer. Default: the one that PREFIX.meta.json names."""

    tokenizer_model: str | None = None
    """File or name of the tokenizer's vocabulary. Default: the one that PREFIX.meta.json names."""

    tokenizer_options: dict[str, str | list[str]] | None = None
    """What else `tokenizer_type` is made with, for example {eod_token: </s>}; used only with it."""

    document_mask: bool = False
    """Whether attention and retention state stop at document borders within a sample."""

    cache_dir: str | None = None
    """Directory of the order of documents that is computed once per dataset. Default: beside the run."""

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _blend(cls, value: Any, info: Any) -> Any:
        return _check_blend(info.field_name, value)

    @field_validator("split")
    @classmethod
    def _split(cls, value: str) -> str:
        return check_split(value)

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.train is None and self.tuning is None:
            refuse("train", "is required, unless data.tuning gives examples")
        if self.train is not None and self.tuning is not None:
            refuse("tuning", "and train both say what is trained on: give one of them, and null for the other")
        if self.tuning is None:
            return self
        if self.document_mask:
            refuse("document_mask", "parts documents, and a sample of tuning is one example: leave it out")
        for name, default in _OF_DOCUMENTS.items():
            if getattr(self, name) != default:
                refuse(
                    name,
                    "is about documents, and a sample of tuning is one example: leave it out, or give it to the"
                    " phases that give train",
                )
        return self

    @property
    def has_borders(self) -> bool:
        """Whether batches say where documents begin: padding in front of an example counts as one."""
        return self.document_mask or (self.tuning is not None and self.tuning.random_padding)

    def order_settings(self, batch_size: int | None = None) -> dict[str, Any]:
        """What the order of training samples follows from, besides sequence length and seed; equal for phases that
        read on where the one before stopped.

        Args:
            batch_size: of the phase; None: whatever it may be.
        """
        if self.tuning is not None:
            return {"tuning": self.tuning.order_settings()}
        # separate validation data: then the split cuts nothing
        settings = {
            "train": [_source_values(item) for item in self.train] if isinstance(self.train, list) else self.train,
            "temperature": self.temperature,
            "long_document_weight": self.long_document_weight,
            "split": None if self.valid else self.split,
        }
        # later options stand there only where they say something: runs from before them can be resumed
        if self.pipeline != "shuffled":
            settings["pipeline"] = self.pipeline
        if self.pipeline == "doc_aware" and batch_size is not None:
            settings["streams"] = batch_size
        if self.min_document_length:
            settings["min_document_length"] = self.min_document_length
        return settings


_OF_DOCUMENTS: dict[str, Any] = {
    field.name: field.default
    for field in fields(DataConfig)
    if field.name in ("split", "temperature", "pipeline", "min_document_length", "long_document_weight")
}
"""What `train` alone is read by, with the defaults."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PhaseDataConfig:
    """What a phase reads instead of the run's data; what is absent stays as it is there."""

    train: Blend | None = None
    """Training data of this phase, a blend as in `data.train`, in place of the run's `train` or `tuning`."""

    tuning: TuningConfig | None = None
    """Examples of this phase, as in `data.tuning`, in place of the run's `train` or `tuning`."""

    valid: Blend | None = None
    """Validation data of this phase, a blend as in `data.train`."""

    split: str | None = None
    """Parts of this phase's training data, as in `data.split`."""

    temperature: PositiveFloat | None = None
    """Exponent of this phase's weights, as in `data.temperature`."""

    pipeline: Pipeline | None = None
    """How documents become samples of this phase, as in `data.pipeline`."""

    min_document_length: NonNegativeInt | None = None
    """Tokens of the shortest document that this phase reads, as in `data.min_document_length`."""

    long_document_weight: Repeats | None = None
    """How often this phase reads documents longer than its sequence length, as in `data.long_document_weight`."""

    document_mask: bool | None = None
    """Whether attention and retention state stop at document borders within a sample of this phase."""

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _blend(cls, value: Any, info: Any) -> Any:
        return _check_blend(info.field_name, value)

    @field_validator("split")
    @classmethod
    def _split(cls, value: str | None) -> str | None:
        return value if value is None else check_split(value)

    @model_validator(mode="after")
    def _check(self) -> "PhaseDataConfig":
        if self.tuning is None:
            return self
        if self.train is not None:
            refuse("tuning", "and train both say what is trained on: give one of them")
        for name in ("document_mask", *_OF_DOCUMENTS):
            if getattr(self, name):
                refuse(name, "is about documents, and a sample of tuning is one example: leave it out")
        return self

    def replaced(self) -> dict[str, Any]:
        """The fields of the run's data that this phase gives, with the values that they take."""
        changes = {name: value for name, value in vars(self).items() if value is not None and name in _PHASE_FIELDS}
        if self.train is not None:
            changes["tuning"] = None
        if self.tuning is not None:
            changes |= {"train": None, "document_mask": False, **_OF_DOCUMENTS}
        return changes


_PHASE_FIELDS = [field.name for field in fields(PhaseDataConfig)]


def _source_values(item: Any) -> Any:
    """An item of a blend; of a DataSource what it says."""
    if not isinstance(item, DataSource):
        return item
    values = {"prefix": item.prefix, "weight": item.weight}
    return values if item.min_document_length is None else {**values, "min_document_length": item.min_document_length}


def check_split(value: str) -> str:
    """Return `value` if it is three parts such as 99,1,0 with something to train on, else refuse it."""
    try:
        parts: Sequence[float] = [float(part) for part in value.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or parts[0] == 0 or not all(0 <= part < math.inf for part in parts):
        refuse("split", f"must be three parts for training, validation and test such as 99,1,0, got {value!r}")
    return value
