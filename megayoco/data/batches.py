"""From samples to the micro-batches of one data-parallel rank.

Shapes: b sequences of a micro-batch, T tokens of a sequence; a sample holds T + 1 tokens.

Sample c + p of a run is sequence p of the step that begins with c samples consumed. Within a step of A micro-batches on
R data ranks, sequence p = (m * R + r) * b + i is row i of micro-batch m on rank r: what a step computes does not depend
on the layout, and the number of samples consumed is all that a resumed run needs, whatever its layout.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megayoco.data.samples import FiniteSource, Sample, SampleSource
from megayoco.errors import UserError

IGNORE = -100


class MicroBatch(NamedTuple):
    """What one forward pass reads.

    tokens (b, T) int64; targets (b, T) int64, -100 where no loss is taken; document_starts (b, T) int64: index in the
    sequence of the first token of each token's document, or None if documents are not told apart; weights (b, T)
    float: factors of the targets' losses, or None if each counts the same (the loader gives none).
    """

    tokens: Tensor
    targets: Tensor
    document_starts: Tensor | None
    weights: Tensor | None = None


class Batches:
    """Training batches in the order of the samples; `consumed_samples` is the whole state.

    Args:
        dataset: samples by number.
        batch_size: sequences of a step over all ranks.
        micro_batch_size: sequences of one forward pass on one rank.
        data_rank, data_size: place of this rank among the data-parallel ranks, and their number.
        consumed_samples: where to go on, 0 for a new run.
        document_mask: give document_starts, and take no loss for the first token of a document (its predecessor
            belongs to another one).
        prefetch: steps that a background thread prepares in advance; 0: none, everything happens in next_step.

    Raises:
        UserError: batch_size is not a multiple of micro_batch_size x data_size.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        consumed_samples: int = 0,
        document_mask: bool = False,
        prefetch: int = 2,
    ):
        self._plan = _Plan(dataset, batch_size, micro_batch_size, data_rank, data_size, document_mask)
        self.batch_size = batch_size
        self.micro_batches = self._plan.micro_batches
        self.consumed_samples = consumed_samples
        self._prefetch = prefetch
        self._loader: _Loader | None = None

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of this rank for the next step; counts all ranks' samples as consumed.

        An error of the background thread is raised here, at the step that it belongs to.
        """
        if self._prefetch:
            if self._loader is None:
                self._loader = _Loader(self._plan, self.consumed_samples, self._prefetch)
            step = self._loader.get()
        else:
            step = self._plan.step(self.consumed_samples)
        self.consumed_samples += self.batch_size
        return step

    def close(self) -> None:
        """Stop the background thread; another next_step starts a new one."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def __del__(self) -> None:
        if getattr(self, "_loader", None) is not None:
            self._loader.stop.set()  # type: ignore[union-attr]


class ValidationBatches:
    """The same finite batches every time it is iterated, each a list of micro-batches as next_step gives.

    The first `num_batches` batches of the dataset, fewer if it is shorter; sequences that fill up the last one beyond
    the end take no loss, so no sample counts twice. Arguments as in Batches.
    """

    def __init__(
        self,
        dataset: FiniteSource,
        *,
        num_batches: int,
        batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        document_mask: bool = False,
    ):
        self._plan = _Plan(_FilledUp(dataset), batch_size, micro_batch_size, data_rank, data_size, document_mask)
        self._batch_size = batch_size
        self._num_batches = min(num_batches, -(-dataset.num_samples // batch_size))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for number in range(self._num_batches):
            yield self._plan.step(number * self._batch_size)


def accumulation_steps(batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """Micro-batches per step and rank. Raises UserError, with the arithmetic, if batch_size cannot be cut so."""
    at_once = micro_batch_size * data_size
    if batch_size % at_once or batch_size <= 0:
        raise UserError(
            f"batch_size {batch_size} is no multiple of micro_batch_size {micro_batch_size} x {data_size} data-parallel"
            f" ranks = {at_once}. Change batch_size to a multiple of {at_once}, or change micro_batch_size."
        )
    return batch_size // at_once


def collate(samples: Sequence[Sample], *, document_mask: bool) -> MicroBatch:
    """Samples of T + 1 tokens as one micro-batch of T tokens each; the padding behind num_targets takes no loss, and
    padding in front of an example is a document of its own.

    In numpy throughout: torch operations in the loader's thread would start a second pool of compute threads.
    """
    tokens = np.stack([sample["tokens"][:-1] for sample in samples])
    targets = np.stack([sample["tokens"][1:] for sample in samples])
    padded = any(sample.get("padding") for sample in samples)
    starts = np.zeros_like(tokens) if document_mask or padded else None
    for row, sample in enumerate(samples):
        targets[row, sample["num_targets"] :] = IGNORE
        if "labelled" in sample:
            targets[row, ~sample["labelled"]] = IGNORE
        if starts is not None:
            padding = sample.get("padding", 0)
            starts[row, padding:] = padding
        if starts is not None and document_mask:
            borders = sample["borders"]
            targets[row, borders - 1] = IGNORE
            inside = borders[borders < tokens.shape[1]]
            starts[row, inside] = inside
    if starts is not None:
        np.maximum.accumulate(starts, axis=1, out=starts)
    return MicroBatch(
        torch.from_numpy(tokens), torch.from_numpy(targets), None if starts is None else torch.from_numpy(starts)
    )


class _Plan:
    """Which samples a step of this rank is made of. Holds no state, so that a thread may share it."""

    def __init__(
        self,
        dataset: SampleSource,
        batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        document_mask: bool,
    ):
        self.micro_batches = accumulation_steps(batch_size, micro_batch_size, data_size)
        self.batch_size = batch_size
        self._dataset, self._document_mask = dataset, document_mask
        self._size, self._rank, self._ranks = micro_batch_size, data_rank, data_size

    def step(self, first_sample: int) -> list[MicroBatch]:
        """The micro-batches of the step that begins with this sample."""
        micro_batches = []
        for m in range(self.micro_batches):
            first = first_sample + (m * self._ranks + self._rank) * self._size
            samples = [self._dataset[first + i] for i in range(self._size)]
            micro_batches.append(collate(samples, document_mask=self._document_mask))
        return micro_batches


class _FilledUp:
    """A finite dataset, followed by samples without targets."""

    def __init__(self, dataset: FiniteSource):
        self._dataset = dataset

    def __getitem__(self, number: int) -> Sample:
        if number < self._dataset.num_samples:
            return self._dataset[number]
        return Sample(**{**self._dataset[0], "num_targets": 0})  # type: ignore[typeddict-item]


class _Loader:
    """A thread that prepares steps in order, at most `depth` in advance."""

    def __init__(self, plan: _Plan, first_sample: int, depth: int):
        self.stop = threading.Event()
        self._ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(depth)
        self._failed: BaseException | None = None
        # a daemon: a run that ends by an exception must not wait for it
        arguments = (plan, first_sample, self._ready, self.stop)
        self._thread = threading.Thread(target=_prepare, args=arguments, name="batches", daemon=True)
        self._thread.start()

    def get(self) -> list[MicroBatch]:
        item = self._failed or self._ready.get()
        if isinstance(item, BaseException):
            self._failed = item  # the thread has ended: every later call fails the same way
            raise item
        return item

    def close(self) -> None:
        self.stop.set()
        while not self._ready.empty():  # makes room for what the thread may be waiting to hand over
            self._ready.get_nowait()
        self._thread.join()


def _prepare(plan: _Plan, sample: int, ready: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        item: list[MicroBatch] | BaseException
        try:
            item = plan.step(sample)
        except BaseException as error:  # raised in the training loop by _Loader.get
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        sample += plan.batch_size
