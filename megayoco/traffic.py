"""How many bytes this process sends, by group and purpose: counted where our collectives are called.

A collective counts as what the usual algorithms put on the wire of one rank: an all-gather of n bytes per rank over P
ranks n (P - 1), a reduce-scatter to n bytes per rank the same, an all-reduce of n bytes 2 n (P - 1) / P, a message
its size. Counted is what the model needs to run over several ranks, that is everything on the tensor, sequence and
pipeline axes, and what replicas show one another; gradients and parameters over the data axis are DeepSpeed's own and
are not.

    sequence/halo, sequence/state               what mixers of the self-decoder ask of the ranks to the left
    sequence/shared_kv, sequence/kv             keys and values: the shared ones, those of a full or memory layer
    sequence/..._gradient                       the same, backward
    sequence/memory                             results of the parts of a memory that ranks share in inference
    tensor/output, tensor/gradient              sums of a layer's outputs and of its input's gradient
    tensor/loss, tensor/logits                  the head over a cut vocabulary
    tensor/weight_gradient                      weights of key-value heads that several ranks hold
    data/negatives                              keys and values of a memory layer for the next replica
    pipeline/activations, pipeline/gradient     what goes to the next stage and comes back
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor


class Traffic:
    """Bytes by name, `group/kind`, since the last `take`."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def message(self, name: str, tensor: Tensor, times: int = 1) -> None:
        """`tensor` sent to one other rank, `times` times."""
        self._bytes[name] += times * tensor.numel() * tensor.element_size()

    def all_gather(self, name: str, own: Tensor, ranks: int) -> None:
        """Every rank gets every rank's `own`."""
        self.message(name, own, ranks - 1)

    def reduce_scatter(self, name: str, own: Tensor, ranks: int) -> None:
        """Every rank keeps its part, the size of `own`, of a sum over ranks."""
        self.message(name, own, ranks - 1)

    def all_reduce(self, name: str, tensor: Tensor, ranks: int) -> None:
        """Every rank gets the sum of all ranks' `tensor`."""
        self._bytes[name] += 2 * (ranks - 1) * tensor.numel() * tensor.element_size() // ranks

    def take(self) -> dict[str, int]:
        """What was counted since the last call, by name; starts anew."""
        taken = dict(sorted(self._bytes.items()))
        self._bytes.clear()
        return taken


TRAFFIC = Traffic()
"""The counter of this process."""
