"""The samples of a phase: from what the config says about data to training and validation sources.

Nothing here is collective. Every process opens the same files and finds the same order; what is computed once per node
lies in the cache (`cache.py`). The caller makes an error of one rank the error of all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megayoco.config import DataConfig, RunConfig
from megayoco.config.tuning import TuningConfig, TuningSource
from megayoco.data.blend import Source, expand_blend_files, parse_blend
from megayoco.data.cache import OrderSettings, Places, open_places
from megayoco.data.document_streams import DocumentSource, DocumentStreams
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

if TYPE_CHECKING:
    from megayoco.data.tuning_examples import Counts


@dataclass(frozen=True)
class SourceShare:
    """One dataset of a training blend: its share of the samples (of the tokens, where documents are dealt to streams),
    all together 1, and the tokens of one epoch of it. Of examples for tuning: files for prefix, padding included in the
    tokens, and a hash of the content."""

    prefix: str
    share: float
    tokens_per_epoch: int
    content: str | None = None


@dataclass(frozen=True)
class Datasets:
    """The samples of one phase; valid is None if there is nothing to validate on; notes: what the user should know."""

    train: SampleSource
    valid: FiniteSource | None
    shares: tuple[SourceShare, ...]
    notes: tuple[str, ...] = ()


def build_datasets(
    data: DataConfig,
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    batch_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    default_cache_dir: str | os.PathLike[str] | None = None,
) -> Datasets:
    """Check the data of a phase and open it. Not collective.

    Args:
        data: what the phase reads.
        sequence_length: N; a sample holds N + 1 tokens.
        seed: of the order.
        vocab_size: of the model.
        batch_size: of the phase; needed by data.pipeline doc_aware only.
        tokenizer: of the run; needed by data.tuning only.
        default_cache_dir: where orders are kept if data.cache_dir is absent; None: a folder beside each dataset.

    Raises:
        UserError: any file is missing, broken, too short or does not fit the model; a record cannot be used.
    """
    data = expand_blend_files(data, "data")
    opening = _Opening(data, sequence_length, seed, vocab_size, default_cache_dir)
    if data.tuning is not None:
        if tokenizer is None:
            raise ValueError("data.tuning needs the tokenizer of the run")
        return _tuning_datasets(data.tuning, tokenizer, opening)
    train = parse_blend(data.train, "data.train")
    if data.temperature != 1 and any(source.weight is not None for source in train):
        raise UserError(
            f"data.temperature {data.temperature:g} makes weights of the datasets' sizes, but data.train gives weights."
            " Leave out one of them."
        )
    train_part, valid_part = ((0.0, 1.0),) * 2 if data.valid is not None else _split_parts(data.split)
    places = [
        opening.places(source, opening.training_settings(source, train_part), sequence_length + 1) for source in train
    ]
    weights = _weights(train, [found.num_tokens for found in places], data.temperature)
    shares = [
        SourceShare(source.prefix, share, found.num_tokens)
        for source, share, found in zip(train, (np.array(weights) / sum(weights)).tolist(), places, strict=True)
    ]
    if data.pipeline == "shuffled":
        samples = _shuffled(places, weights, opening)
    else:
        settings = [opening.training_settings(source, train_part) for source in train]
        streams = 1 if data.pipeline == "linear" else batch_size
        if streams is None:
            raise ValueError("data.pipeline doc_aware needs the batch size of the phase")
        samples = DocumentStreams(
            [DocumentSource(*one) for one in zip(places, weights, settings, strict=True)],
            streams=streams,
            sequence_length=sequence_length,
            seed=seed,
            vocab_size=vocab_size,
            cache_dir=opening.cache_dir,
        )
    return Datasets(samples, _validation(data, train, valid_part, opening), tuple(shares))


@dataclass(frozen=True)
class _Opening:
    """How the datasets of a phase are opened."""

    data: DataConfig
    sequence_length: int
    seed: int
    vocab_size: int
    default_cache_dir: str | os.PathLike[str] | None

    @property
    def cache_dir(self) -> str | os.PathLike[str] | None:
        return self.data.cache_dir if self.data.cache_dir is not None else self.default_cache_dir

    def training_settings(self, source: Source, part: tuple[float, float]) -> OrderSettings:
        data = self.data
        weight = data.long_document_weight
        return OrderSettings(
            part,
            self.seed,
            None if weight == 1 else self.sequence_length,
            weight,
            data.min_document_length if source.min_length is None else source.min_length,
            shuffled=data.pipeline == "shuffled",  # else the streams shuffle, anew in each epoch
        )

    def places(self, source: Source, settings: OrderSettings, least: int) -> Places:
        """The order of a dataset of at least so many tokens."""
        places = open_places(source.prefix, settings, self.cache_dir)
        check_vocabulary(source.prefix, places.dtype, self.vocab_size)
        if places.num_tokens < least:
            begin, end = settings.part
            short = (
                f" Documents of fewer than {settings.min_length} tokens are left out." if settings.min_length else ""
            )
            raise UserError(
                f"{source.prefix}: the part {begin:.6g} to {end:.6g} of its sequences holds {places.num_tokens} tokens,"
                f" fewer than the {least} of one sample.{short} Change data.split, give data.valid, prepare more text,"
                " or shorten sequence_length."
            )
        return places


def _shuffled(places: Sequence[Places], weights: Sequence[float], opening: _Opening) -> SampleSource:
    sources = [
        TrainingSource(TokenStream(found, opening.vocab_size), opening.sequence_length, opening.seed)
        for found in places
    ]
    return sources[0] if len(sources) == 1 else Blend(sources, weights)


def _validation(
    data: DataConfig, train: Sequence[Source], part: tuple[float, float], opening: _Opening
) -> FiniteSource | None:
    """Every token of the validation data once: of `data.valid`, or of the part of the training data set aside."""
    if data.valid is None:
        sources, temperature = (list(train), data.temperature) if part[1] > part[0] else ([], 1.0)
    else:
        sources, temperature = parse_blend(data.valid, "data.valid"), 1.0
    if not sources:
        return None
    settings = OrderSettings(part, None)
    opened = [
        ValidationSource(
            TokenStream(opening.places(source, settings, 2), opening.vocab_size), opening.sequence_length, opening.seed
        )
        for source in sources
    ]
    if len(opened) == 1:
        return opened[0]
    return ValidationBlend(opened, _weights(sources, [source.num_samples for source in opened], temperature))


def _tuning_datasets(tuning: TuningConfig, tokenizer: Tokenizer, opening: _Opening) -> Datasets:
    from megayoco.data.tuning import TuningSamples, TuningValidation  # late: most runs do without
    from megayoco.data.tuning_cache import Examples, open_examples, source_name

    if tokenizer.vocab_size > opening.vocab_size:
        raise UserError(
            f"data.tuning: the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {opening.vocab_size}."
            f" Set model.vocab_size to at least {tokenizer.vocab_size}."
        )
    N, made = opening.sequence_length, {}

    def opened(sources: Sequence[TuningSource]) -> list[Examples]:
        found = [
            open_examples(source, tokenizer, N, cache_dir=opening.cache_dir, workers=tuning.workers)
            for source in sources
        ]
        made.update({source_name(source): examples for source, examples in zip(sources, found, strict=True)})
        return found

    options: dict[str, Any] = {"sequence_length": N, "seed": opening.seed, "random_padding": tuning.random_padding}
    examples = opened(tuning.sources)
    weights = [
        len(found) if source.weight is None else source.weight
        for source, found in zip(tuning.sources, examples, strict=True)
    ]
    shares = [
        SourceShare(source_name(source), weight / sum(weights), len(found) * N, found.content)
        for source, weight, found in zip(tuning.sources, weights, examples, strict=True)
    ]
    valid: FiniteSource | None
    if tuning.valid:
        valid = TuningValidation(opened(tuning.valid), **options)
    else:
        valid = _validation(opening.data, [], (0.0, 1.0), opening)
    notes = [_describe(name, examples.counts, len(examples)) for name, examples in made.items()]
    return Datasets(TuningSamples(examples, weights, **options), valid, tuple(shares), tuple(notes))


def _describe(name: str, counts: Counts, examples: int) -> str:
    """What became of the records of a source; what is lost is a warning."""
    text = (
        f"{name}: {examples:,} examples of {counts.tokens:,} tokens, {counts.labelled:,} of them learned, from"
        f" {counts.records:,} records"
    )
    if counts.left_out:
        text += f"; filters left out {counts.left_out:,}"
    if counts.cut:
        text += f"; {counts.cut:,} were cut to the lengths allowed"
    if counts.unlabelled:
        text += f"; warning: {counts.unlabelled:,} were dropped, because nothing of them would be learned"
    return text


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
    elif not sources:
        raise UserError(
            "data.tuning reads records, which name no tokenizer. Set data.tokenizer_type and data.tokenizer_model, for"
            " example to HuggingFaceTokenizer and the folder of the model."
        )
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
