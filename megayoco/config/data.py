"""Which indexed files a run reads, and in which proportions."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from megayoco.config.base import SECTION, PositiveFloat, refuse

GRAMMAR = (
    "must be a dataset prefix, a list of prefixes, a list of weight, prefix, weight, prefix, ...,"
    " a list of {prefix: ..., weight: ...}, or a blend file (.yaml, .json, .txt)"
)


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DataSource:
    """One dataset of a blend."""

    prefix: str
    """Path of the indexed dataset without `.bin` and `.idx`."""

    weight: PositiveFloat | None = None
    """Share of the samples that come from this dataset, relative to the others. Give all of them a weight, or none:
    then each has its number of tokens."""


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
    known = item.keys() <= {"prefix", "weight"} and isinstance(item.get("prefix"), str)
    return known and (item.get("weight") is None or _is_weight(item["weight"]))


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DataConfig:
    """What is read. Blends follow Megatron's grammar: PREFIX, [PREFIX, ...], [WEIGHT, PREFIX, WEIGHT, PREFIX, ...]."""

    train: Blend
    """Training data: a blend of dataset prefixes, a list of {prefix, weight}, or the path of a blend file. Sources
    without weights have their number of tokens for weight. Every source is read from its start again when it ends."""

    valid: Blend | None = None
    """Validation data, a blend as in `train`. Absent: the part of `train` that `split` sets aside."""

    split: str = "99,1,0"
    """Parts of the training data for training, validation and test; used only while `valid` is absent."""

    temperature: PositiveFloat = 1.0
    """Where `train` gives no weights: the weight of a dataset is its number of tokens to the power 1 / temperature. 1
    reads every token equally often; above 1, small datasets are read more often than large ones."""

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

    def order_settings(self) -> dict[str, Any]:
        """What the order of training samples follows from, besides sequence length and seed; equal for phases that
        read on where the one before stopped."""
        # separate validation data: then the split cuts nothing
        names = ("train", "temperature", "long_document_weight")
        return {**{name: getattr(self, name) for name in names}, "split": None if self.valid else self.split}


@dataclass(frozen=True, kw_only=True, config=SECTION)
class PhaseDataConfig:
    """What a phase reads instead of the run's data; what is absent stays as it is there."""

    train: Blend | None = None
    """Training data of this phase, a blend as in `data.train`."""

    valid: Blend | None = None
    """Validation data of this phase, a blend as in `data.train`."""

    split: str | None = None
    """Parts of this phase's training data, as in `data.split`."""

    temperature: PositiveFloat | None = None
    """Exponent of this phase's weights, as in `data.temperature`."""

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


def check_split(value: str) -> str:
    """Return `value` if it is three parts such as 99,1,0 with something to train on, else refuse it."""
    try:
        parts: Sequence[float] = [float(part) for part in value.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or parts[0] == 0 or not all(0 <= part < math.inf for part in parts):
        refuse("split", f"must be three parts for training, validation and test such as 99,1,0, got {value!r}")
    return value
