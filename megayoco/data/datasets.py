"""The samples of a phase: from what the config says about data to training and validation sources.

Nothing here is collective. Every process opens the same files and finds the same order; what is computed once per node
lies in the cache (`cache.py`). The caller makes an error of one rank the error of all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megayoco.config import DataConfig, RunConfig
from megayoco.data.blend import Source, expand_blend_files, parse_blend
from megayoco.data.cache import OrderSettings, open_places
from megayoco.data.indexed import check_vocabulary, read_index, read_meta
from megayoco.data.samples import (
    Blend,
    FiniteSource,
    SampleSource,
    TokenStream,
    TrainingSource,
    ValidationBlend,
    ValidationSource,
)
from megayoco.data.tokenizer import Tokenizer, build_described, build_tokenizer
from megayoco.errors import UserError


@dataclass(frozen=True)
class SourceShare:
    """One dataset of a training blend: its share of the samples, all together 1, and the tokens of one epoch of it."""

    prefix: str
    share: float
    tokens_per_epoch: int


@dataclass(frozen=True)
class Datasets:
    """The samples of one phase; valid is None if there is nothing to validate on."""

    train: SampleSource
    valid: FiniteSource | None
    shares: tuple[SourceShare, ...]


def build_datasets(
    data: DataConfig,
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    default_cache_dir: str | os.PathLike[str] | None = None,
) -> Datasets:
    """Check the data of a phase and open it. Not collective.

    Args:
        data: what the phase reads.
        sequence_length: N; a sample holds N + 1 tokens.
        seed: of the order.
        vocab_size: of the model.
        default_cache_dir: where orders are kept if data.cache_dir is absent; None: a folder beside each dataset.

    Raises:
        UserError: any file is missing, broken, too short or does not fit the model.
    """
    data = expand_blend_files(data, "data")
    cache_dir = data.cache_dir if data.cache_dir is not None else default_cache_dir
    train = parse_blend(data.train, "data.train")
    if data.temperature != 1 and any(source.weight is not None for source in train):
        raise UserError(
            f"data.temperature {data.temperature:g} makes weights of the datasets' sizes, but data.train gives weights."
            " Leave out one of them."
        )
    if data.valid is None:
        train_part, valid_part = _split_parts(data.split)
        valid, temperature = (train, data.temperature) if valid_part[1] > valid_part[0] else ([], 1.0)
    else:
        train_part = valid_part = (0.0, 1.0)
        valid, temperature = parse_blend(data.valid, "data.valid"), 1.0

    def stream(source: Source, settings: OrderSettings, least: int) -> TokenStream:
        places = open_places(source.prefix, settings, cache_dir)
        check_vocabulary(source.prefix, places.dtype, vocab_size)
        if places.num_tokens < least:
            begin, end = settings.part
            raise UserError(
                f"{source.prefix}: the part {begin:.6g} to {end:.6g} of its sequences holds {places.num_tokens} tokens,"
                f" fewer than the {least} of one sample. Change data.split, give data.valid, prepare more text, or"
                " shorten sequence_length."
            )
        return TokenStream(places, vocab_size)

    weight = data.long_document_weight
    settings = OrderSettings(train_part, seed, None if weight == 1 else sequence_length, weight)
    trained = [TrainingSource(stream(source, settings, sequence_length + 1), sequence_length, seed) for source in train]
    weights = _weights(train, [source.tokens_per_epoch for source in trained], data.temperature)
    shares = [
        SourceShare(source.prefix, share, opened.tokens_per_epoch)
        for source, share, opened in zip(train, (np.array(weights) / sum(weights)).tolist(), trained, strict=True)
    ]

    settings = OrderSettings(valid_part, None)
    validated = [ValidationSource(stream(source, settings, 2), sequence_length, seed) for source in valid]
    sizes = [source.num_samples for source in validated]
    return Datasets(
        train=trained[0] if len(trained) == 1 else Blend(trained, weights),
        valid=(validated[0] if len(validated) == 1 else ValidationBlend(validated, _weights(valid, sizes, temperature)))
        if validated
        else None,
        shares=tuple(shares),
    )


def with_blend_files(run: RunConfig) -> RunConfig:
    """The run with the content of every blend file in its place: what it reads is then fixed, and saved with it.

    Raises:
        UserError: a file is missing or holds no blend.
    """
    phases = [
        phase
        if phase.data is None
        else dataclasses.replace(phase, data=expand_blend_files(phase.data, f"phases.{number}.data"))
        for number, phase in enumerate(run.phases)
    ]
    return dataclasses.replace(run, data=expand_blend_files(run.data, "data"), phases=phases)


def resolve_tokenizer(data: DataConfig, *others: DataConfig) -> Tokenizer:
    """The tokenizer of a run: the one the config names, else the one that the first dataset's meta file names.

    Args:
        data: of the run.
        others: of its phases; their datasets are checked as well.

    Raises:
        UserError: neither names one, or a dataset was made with another one.
    """
    sources: dict[str, None] = {}  # in order, each once
    for section in (data, *others):
        section = expand_blend_files(section, "data")
        for value, key in ((section.train, "data.train"), (section.valid, "data.valid")):
            sources.update({source.prefix: None for source in (parse_blend(value, key) if value is not None else [])})
    for prefix in sources:
        if not (os.path.isfile(f"{prefix}.idx") and os.path.isfile(f"{prefix}.bin")):
            read_index(prefix)  # names missing files before anything else does
    metas = {prefix: read_meta(prefix) for prefix in sources}
    described = {prefix: meta["tokenizer"] for prefix, meta in metas.items() if meta and "tokenizer" in meta}
    if data.tokenizer_type is not None:
        tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model, data.tokenizer_options)
    elif described:
        prefix, saved = next(iter(described.items()))
        try:
            tokenizer = build_described(saved, os.path.dirname(prefix), data.tokenizer_model)
        except UserError as error:
            raise UserError(
                f"{prefix}.meta.json: {error} If it has moved, set data.tokenizer_type and data.tokenizer_model."
            ) from error
    else:
        raise UserError(
            f"{next(iter(sources))} has no .meta.json that names its tokenizer. Set data.tokenizer_type and"
            " data.tokenizer_model."
        )
    for prefix, saved in described.items():
        if saved.get("sha256") != tokenizer.identity()["sha256"]:
            raise UserError(
                f"{prefix} was made with another tokenizer than {tokenizer.model or tokenizer.type}: their hashes"
                " differ. Rebuild it with tools/preprocess_data.py, or set data.tokenizer_model to its own."
            )
    return tokenizer


def _weights(sources: Sequence[Source], sizes: Sequence[int], temperature: float) -> list[float]:
    """The weight of each source: its own, or else its size to the power 1 / temperature."""
    largest = max(sizes)
    weights = [
        (size / largest) ** (1 / temperature) if source.weight is None else source.weight
        for source, size in zip(sources, sizes, strict=True)
    ]
    if not (min(weights) / sum(weights) > 1e-15):
        source = sources[int(np.argmin(weights))]
        raise UserError(
            f"{source.prefix} has next to no weight beside the other datasets, so it would never be read. Leave it out,"
            " or change the weights or data.temperature."
        )
    return weights


def _split_parts(split: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ranges of the training and the validation part, as fractions of the sequences."""
    parts = [float(word) for word in split.split(",")]  # three, as the config has checked
    total, train, both = sum(parts), parts[0], parts[0] + parts[1]
    return (0.0, train / total), (train / total, both / total)
