"""Training samples of a phase from indexed files, over megatron-core's GPTDataset and BlendedDataset.

Shapes: N sequence length; a sample is N + 1 consecutive tokens of the concatenated, shuffled documents.

The order of samples is fixed by seed, sequence length and data alone, never by how many samples a run asks for (in
Megatron, asking for more can change what an early step saw): each source is cut into samples once, for one epoch, and
later epochs permute the same samples with a seed of their own; a blend is a function of the step for which any prefix
of a longer one is the shorter one. So the one state of a run is the number of samples consumed.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pickle
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypedDict, TypeVar

import numpy as np
import torch

from megayoco.config import DataConfig
from megayoco.data.blend import Source, parse_blend
from megayoco.data.indexed import check_prefix, outside_vocabulary, read_index, read_meta
from megayoco.data.tokenizer import Tokenizer, build_tokenizer
from megayoco.errors import UserError

# megatron-core announces that Transformer Engine and Apex are absent, which is intended
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

# it would warn of every blend that it is not cached, which is intended too
logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)

_CACHE_FORMAT = 1
_ENDLESS = 2**62
Result = TypeVar("Result")


class Sample(TypedDict):
    """tokens (N + 1,) int64; borders (n,) int64, ascending in 1..N: where a new document begins within the sample."""

    tokens: np.ndarray
    borders: np.ndarray


class SampleSource(Protocol):
    """What batches are made of: samples by number; samples_per_epoch is how many of them differ."""

    samples_per_epoch: int

    def __getitem__(self, number: int) -> Sample: ...


@dataclasses.dataclass(frozen=True)
class Datasets:
    """The samples of one phase; valid is None if there is nothing to validate on."""

    train: SampleSource
    valid: SampleSource | None


def build_datasets(
    data: DataConfig,
    *,
    sequence_length: int,
    num_samples: int,
    seed: int,
    vocab_size: int,
    default_cache_dir: str | os.PathLike[str] | None = None,
) -> Datasets:
    """Check the data of a phase and build its sample indices: every rank calls this, global rank 0 builds first.

    Args:
        data: blends `train` and `valid`; without `valid`, `split` (as 99,1,0) cuts the sequences of `train`.
        sequence_length: N.
        num_samples: how many training samples will be asked for at most; does not change their order.
        seed: of the order.
        vocab_size: of the model.
        default_cache_dir: where indices are kept if data.cache_dir is absent; None: a folder beside the dataset.

    Raises:
        UserError: on every rank, if any file is missing, broken, too short or does not fit the model.
    """
    cache_dir = data.cache_dir if data.cache_dir is not None else default_cache_dir
    train, valid = parse_blend(data.train, "data.train"), data.valid
    if valid is None:
        train_part, valid_part = _split_parts(data.split)
        valid_sources = train if valid_part[1] > valid_part[0] else []
    else:
        train_part = valid_part = (0.0, 1.0)
        valid_sources = parse_blend(valid, "data.valid")

    def build() -> Datasets:
        for source in {source.prefix: source for source in train + valid_sources}.values():
            check_prefix(source.prefix, vocab_size, sequence_length=sequence_length)
        common = (sequence_length, seed, cache_dir, vocab_size)
        return Datasets(
            train=_blended(train, train_part, num_samples, *common),
            valid=_blended(valid_sources, valid_part, None, *common) if valid_sources else None,
        )

    return rank_zero_first(build)


def resolve_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a run: the one the config names, else the one that the first dataset's meta file names.

    Raises:
        UserError: neither names one, or a dataset was made with another one.
    """
    sources = parse_blend(data.train, "data.train")
    if data.valid is not None:
        sources = sources + parse_blend(data.valid, "data.valid")
    for source in sources:
        read_index(source.prefix)  # names missing files before anything else does
    metas = {source.prefix: read_meta(source.prefix) for source in sources}
    described = {prefix: meta["tokenizer"] for prefix, meta in metas.items() if meta and "tokenizer" in meta}
    if data.tokenizer_type is not None:
        tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    elif described:
        prefix, saved = next(iter(described.items()))
        model = saved.get("model")
        if model is not None:
            beside = os.path.join(os.path.dirname(prefix), model)  # the meta file gives it relative to itself
            model = beside if os.path.exists(beside) else model
        try:
            tokenizer = build_tokenizer(
                str(saved.get("type")), model if data.tokenizer_model is None else data.tokenizer_model
            )
        except UserError as error:
            raise UserError(
                f"{prefix}.meta.json: {error} If it has moved, set data.tokenizer_type and data.tokenizer_model."
            ) from error
    else:
        raise UserError(
            f"{sources[0].prefix} has no .meta.json that names its tokenizer. Set data.tokenizer_type and"
            " data.tokenizer_model."
        )
    for prefix, saved in described.items():
        if saved.get("sha256") != tokenizer.identity()["sha256"]:
            raise UserError(
                f"{prefix} was made with another tokenizer than {tokenizer.model or tokenizer.type}: their hashes"
                " differ. Rebuild it with tools/preprocess_data.py, or set data.tokenizer_model to its own."
            )
    return tokenizer


class EpochSource(GPTDataset):
    """One source of a blend: GPTDataset built for exactly one epoch, repeated without end in other orders.

    Sample n is sample n mod E of epoch n // E, E samples an epoch; epoch 0 has GPTDataset's order. Ids must be below
    `vocab_size`: files are too large to look at every id before training.
    """

    vocab_size: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.samples_per_epoch = int(self.sample_index.shape[0]) - 1
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number: int | None) -> Sample:  # type: ignore[override]
        """Sample `number`, any integer >= 0. The index arrays are read here because GPTDataset's own samples replace
        ids that equal its pad id, and say nothing about document borders.

        Raises:
            UserError: an id lies outside the vocabulary.
        """
        epoch, i = divmod(int(number or 0), self.samples_per_epoch)
        if epoch:
            i = int(self._epoch_order(epoch)[i])
        row = int(self.shuffle_index[i])
        (first, start), (last, stop) = self.sample_index[row].tolist(), self.sample_index[row + 1].tolist()
        parts = []
        for place in range(first, last + 1):
            offset = start if place == first else 0
            length = stop + 1 - offset if place == last else None  # one more: samples share their border token
            parts.append(self.dataset.get(int(self.document_index[place]), offset=offset, length=length))
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        borders = ends[:-1]
        # concatenate copies, so nothing refers to the memory map
        tokens = np.concatenate(parts, dtype=np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(outside_vocabulary(self.dataset.path_prefix, low, high, self.vocab_size))
        return Sample(tokens=tokens, borders=np.unique(borders[borders > 0]))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.config.random_seed, epoch]))
            self._order = epoch, generator.permutation(self.samples_per_epoch)
        return self._order[1]


class Blend(BlendedDataset):
    """Several EpochSources by weight; sample i comes from the source that is furthest behind its share."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.samples_per_epoch = sum(source.samples_per_epoch for source in self.datasets)


def rank_zero_first(build: Callable[[], Result]) -> Result:
    """`build()` on global rank 0, then on all others; an error of rank 0 is raised on all, so that none waits."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return build()
    error: Exception | None = None
    result: Result | None = None
    if distributed.get_rank() == 0:
        try:
            result = build()
        except Exception as caught:  # sent to the other ranks, then raised
            error = caught
    message: list[tuple[bool, str] | None] = [None]
    if error is not None:
        message = [(isinstance(error, UserError), f"{error}" or repr(error))]
    distributed.broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    if message[0] is not None:
        raise UserError(message[0][1]) if message[0][0] else RuntimeError(f"rank 0 failed: {message[0][1]}")
    return build() if distributed.get_rank() else result  # type: ignore[return-value]


class _TokenizerDescription:
    """What GPTDatasetConfig asks of a tokenizer; its identifiers become part of cache file names."""

    vocab_size = None
    eod = -2  # no id at all; -1 is what GPTDataset takes for padding
    unique_identifiers: ClassVar = OrderedDict(kind="ids only")


def _blended(
    sources: list[Source],
    part: tuple[float, float],
    num_samples: int | None,
    sequence_length: int,
    seed: int,
    cache_dir: str | os.PathLike[str] | None,
    vocab_size: int,
) -> SampleSource:
    built = [_source(source.prefix, part, sequence_length, seed, cache_dir, vocab_size) for source in sources]
    if len(built) == 1:
        return built[0]
    weights = [
        float(data.samples_per_epoch if source.weight is None else source.weight)
        for data, source in zip(built, sources, strict=True)
    ]
    if num_samples is None:
        num_samples = sum(data.samples_per_epoch for data in built)
    # no cache: the indices are a fast loop, and BlendedDataset can only cache where torch.distributed runs
    try:
        return Blend(built, weights, num_samples, _config(sources[0].prefix, sequence_length, seed, None))
    except MemoryError as error:
        raise UserError(
            f"the order of {num_samples:,} samples of {len(built)} datasets does not fit in memory. Shorten the phases,"
            " or make one dataset of them."
        ) from error


def _source(
    prefix: str,
    part: tuple[float, float],
    sequence_length: int,
    seed: int,
    cache_dir: str | os.PathLike[str] | None,
    vocab_size: int,
) -> EpochSource:
    """One epoch of the sequences in `part` of a dataset; its indices come from the cache, and go there first."""
    prefix = os.path.realpath(prefix)
    lengths = read_index(prefix).lengths
    first, last = round(part[0] * len(lengths)), round(part[1] * len(lengths))
    num_tokens = int(lengths[first:last].sum(dtype=np.int64))
    if num_tokens < sequence_length + 1:
        raise UserError(
            f"{prefix}: the part {part[0]:.6g} to {part[1]:.6g} of its {len(lengths)} sequences holds {num_tokens}"
            f" tokens, fewer than one sample of {sequence_length} + 1. Change data.split, give data.valid, prepare"
            " more text, or shorten sequence_length."
        )
    indices = np.arange(first, last, dtype=np.int32)
    root = Path(prefix).parent / ".megayoco-cache" if cache_dir is None else Path(cache_dir)
    folder = root / _cache_key(prefix, indices, sequence_length, seed)

    def open_from(path: Path) -> EpochSource:
        config = _config(prefix, sequence_length, seed, str(path))
        source = EpochSource(IndexedDataset(prefix, multimodal=False), prefix, indices, None, Split.train, config)
        source.vocab_size = vocab_size
        return source

    if not folder.exists():
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            raise UserError(
                f"{folder}, written by rank 0, is not visible on rank {torch.distributed.get_rank()}. Set"
                " data.cache_dir to a folder that all nodes share."
            )
        _build_cache(folder, open_from)
    try:
        return open_from(folder)
    except (ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the sample indices in {folder} are damaged. Remove that folder: they are made anew."
        ) from error


def _build_cache(folder: Path, open_from: Callable[[Path], Any]) -> None:
    """Build in a folder of another name and rename it: a killed or a second run never leaves half an index behind."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        open_from(temporary)
        temporary.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another run was faster, with the same content
            raise UserError(
                f"cannot write sample indices to {folder}: {error.strerror or error}. Set data.cache_dir to a writable"
                " folder."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cache_key(prefix: str, indices: np.ndarray, sequence_length: int, seed: int) -> str:
    """Name of the cache folder: everything that shapes the samples, and which files they were made of."""
    import megatron.core

    # size and time stand for the content, which would take long to hash
    stats = [os.stat(f"{prefix}.{kind}") for kind in ("bin", "idx")]
    described = {
        "format": _CACHE_FORMAT,
        "megatron": megatron.core.__version__,
        "prefix": prefix,
        "files": [(stat.st_size, stat.st_mtime_ns) for stat in stats],
        "sequences": (int(indices[0]), int(indices[-1])),
        "sequence_length": sequence_length,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _config(prefix: str, sequence_length: int, seed: int, cache: str | None) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([prefix], None),
        split="1,0,0",  # EpochSource is given its sequences; this only satisfies the config's own checks
        path_to_cache=cache,
        tokenizer=_TokenizerDescription(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _split_parts(split: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ranges of the training and the validation part, as fractions of the sequences."""
    try:
        parts = [float(word) for word in split.split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or parts[0] <= 0 or not sum(parts) < float("inf"):
        raise UserError(f"data.split must be three parts such as 99,1,0 for training, validation, test, got {split!r}")
    parts = [part / sum(parts) for part in parts] + [0.0, 0.0]
    return (0.0, parts[0]), (parts[0], parts[0] + parts[1])
