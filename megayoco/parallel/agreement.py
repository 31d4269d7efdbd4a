"""No rank fails alone: what one rank finds wrong, every rank raises, so that none waits for a peer that has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megayoco.errors import UserError


class AgreedError(UserError):
    """A user error that every rank raises with the same message; rank 0 speaks for all."""


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def all_ranks_agree() -> Iterator[None]:
    """Run a body of local checks on every rank; if any rank raises UserError, all raise AgreedError when it is over.

    The body must not call a collective operation: ranks that failed would miss it.
    """
    error: UserError | None = None
    try:
        yield
    except AgreedError:
        raise
    except UserError as caught:
        error = caught
    raise_together(None if error is None else str(error), error)


def raise_together(message: str | None, cause: Exception | None = None) -> None:
    """Raise AgreedError on every rank if any rank passes a message. Collective.

    The message is that of the lowest rank that has one; how many ranks found other things wrong is added.
    """
    messages: list[str | None] = [message]
    if _world_size() > 1:
        messages = [None] * _world_size()
        dist.all_gather_object(messages, message)
    distinct = list(dict.fromkeys(text for text in messages if text is not None))
    if distinct:
        others = f" (and {len(distinct) - 1} other problem(s) on other ranks)" if len(distinct) > 1 else ""
        raise AgreedError(distinct[0] + others) from cause


def barrier() -> None:
    """Wait for every rank; nothing to wait for in a world of one."""
    if _world_size() > 1:
        dist.barrier()
