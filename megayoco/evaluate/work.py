"""Items of an evaluation over the replicas of a model: each once, resumed from what is in the folder, one table.

A group of items goes to one replica, whose ranks all work on it; the replicas take groups in turn, and exchange what
they found after each round. Only the lead of the first replica writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megayoco.errors import UserError
from megayoco.evaluate.progress import Progress
from megayoco.evaluate.results import ResultsFolder
from megayoco.model.inference import InferenceModel

Record = dict[str, Any]
"""What was found about one item, JSON-able."""
SECONDS_BETWEEN_REPORTS = 0.2


@dataclass(frozen=True)
class Item:
    """One piece of work."""

    key: str
    """Its name, by which its record is found again."""
    cost: int
    """How much work it is, for the time that is left: tokens."""


def writes(model: InferenceModel) -> bool:
    """Whether this rank is the one that writes."""
    return model.is_lead and model.replica == 0


def work_through(
    model: InferenceModel,
    groups: Sequence[Sequence[Item]],
    evaluate: Callable[[Sequence[str]], Iterable[Record]],
    folder: ResultsFolder | None = None,
    progress: Progress | None = None,
    describe: Callable[[Sequence[Record]], str] = lambda records: "",
) -> list[Record]:
    """The records of all items, in the order of the groups, on every rank. Collective.

    Args:
        model: the model; its replicas share the groups.
        groups: the items.
        evaluate: the records of some items of a group, by their keys, in any order, each as soon as it is there.
        folder: where records are kept as they come; those that are in it are not made again. Looked at on the first
            rank only.
        progress: told now and then, and in the end, on the first rank.
        describe: what to say of the records so far.

    Raises:
        UserError: on every rank, if the folder cannot be used.
    """
    done: dict[str, Record] = first_rank_does(lambda: {} if folder is None or not writes(model) else folder.open())
    costs = {item.key: item.cost for group in groups for item in group}
    done = {key: record for key, record in done.items() if key in costs}
    total = sum(costs.values())
    told = -math.inf

    def keep(records: Sequence[Record]) -> None:
        nonlocal told
        done.update({record["key"]: record for record in records})
        if folder is not None and writes(model):
            folder.append(records)
        if progress is None or not writes(model):
            return
        if time.monotonic() - told >= SECONDS_BETWEEN_REPORTS or len(done) == len(costs):
            counts = f"{len(done):,} of {len(costs):,}"
            text = ", ".join(filter(None, (counts, describe(list(done.values())))))
            progress(sum(costs[key] for key in done), total, text)
            told = time.monotonic()

    keep([])
    left = [keys for group in groups if (keys := [item.key for item in group if item.key not in done])]
    for first in range(0, len(left), model.replicas):
        found: list[Record] = []
        for keys in left[first + model.replica : first + model.replica + 1]:
            for record in evaluate(keys):
                found.append(record)
                if model.replicas == 1:
                    keep([record])
        if model.replicas > 1:
            keep(_from_leads(model, found))
    return [done[item.key] for group in groups for item in group]


def _from_leads(model: InferenceModel, records: list[Record]) -> list[Record]:
    """The records of all replicas, each once, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, records if model.is_lead else [])
    return [record for part in gathered for record in part]


def first_rank_does(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first rank, on every rank, and its UserError too. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    value: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            value[0] = make()
        except UserError as error:
            value[1] = str(error)
    dist.broadcast_object_list(value, src=0)
    if value[1] is not None:
        raise UserError(value[1])
    return value[0]
