"""Training in bands: exact loss and gradients of a long sequence, chunk by chunk, keeping almost nothing of it.

A sequence of N tokens is cut into n bands of P x C tokens; this rank owns one chunk of C tokens of each. The self half
needs of everything left of a chunk only its boundary context; the cross half needs only the shared keys and values. So

    fused   pass 1, bands ascending, no graph:  keep the boundary contexts, write K, V into the store
            pass 2, bands descending:           self half with graph; cross half and head over K, V up to the band,
                                                which add dK, dV into the store; backward of the self half, which
                                                hands the gradient of its boundary context on to the band before
    split   pass 1 also keeps the hidden states; then the cross half of all bands in any order, which leaves their
            gradients in place; then the self half with graph and backward, descending

In descending order the gradients of a band's keys are complete just when the walk reaches it, because only queries at
or after a key see it. The cross half runs forward once and backward once, and only for the rows that carry a target.

The walk hides inside one autograd.Function that returns every parameter's gradient once, summed over chunks in fp32:
DeepSpeed sees one module call with one backward. A stage of a pipeline walks the same way; without the loss at hand it
keeps its boundary contexts and computes its bands a second time, descending, when the gradient of its output arrives.

Shapes: B batch, T tokens of this rank = n C, N tokens of the sequence = P T, D model dim, g key-value heads of this
        tensor rank, K head dim, R rows of the cross half at a time.
Source: YOCO, arXiv 2405.05254, sections 2 and 2.3 (the structure); the algorithm is described in docs/long_context.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megayoco.layers.context import KeyValues, Positions
from megayoco.layers.shared_kv import SharedKeyValues
from megayoco.model.blocks import Head, Layer, run_block
from megayoco.model.zero3 import whole_parameters, whole_until_the_end_of_backward
from megayoco.ops.attention_store import KeyValueStore
from megayoco.ops.cross_entropy import IGNORED
from megayoco.parallel.sequence import SequenceAxis

ROWS, ROWS_CPU = 4096, 1024
"""Rows of the cross half whose graph exists at a time: enough for full speed, few beside a chunk's memory."""

DENSE = 0.9
"""Share of rows with a target above which a block of rows is not compacted: its attention needs no mask."""


@dataclass(frozen=True)
class Bands:
    """How a rank walks over its sequence."""

    count: int
    """n, the number of bands."""
    axis: SequenceAxis | None = None
    """The ranks that share the sequence; None: this one has all of it."""
    order: str = "fused"
    """`fused` or `split`."""
    rows: int | None = None
    """R, rows of the cross half at a time; None: what suits the device."""

    @property
    def ranks(self) -> int:
        return 1 if self.axis is None else self.axis.ranks

    def offset(self, band: int, chunk: int) -> int:
        """Global index of the first token of this rank's chunk of a band."""
        return (band * self.ranks + (0 if self.axis is None else self.axis.rank)) * chunk


@dataclass(frozen=True)
class Stage:
    """The blocks that one rank holds, in order."""

    embed: nn.Module | None
    self_layers: Sequence[Layer]
    shared_kv: SharedKeyValues | None
    cross_layers: Sequence[Layer]
    head: Head | None
    recompute: bool = False
    """Activation checkpointing of the self half inside a chunk; the cross half never runs twice for it."""

    @property
    def has_self_half(self) -> bool:
        """Whether anything stands before the cross layers."""
        return self.embed is not None or len(self.self_layers) > 0 or self.shared_kv is not None

    def modules(self) -> list[nn.Module]:
        """The blocks that are there."""
        blocks = [self.embed, *self.self_layers, self.shared_kv, *self.cross_layers, self.head]
        return [block for block in blocks if block is not None]

    def self_parameters(self) -> list[nn.Parameter]:
        """Parameters up to the shared keys and values."""
        return _parameters([self.embed, *self.self_layers, self.shared_kv])

    def cross_parameters(self) -> list[nn.Parameter]:
        """Parameters of the cross layers and the head; a tied head's weight is among both."""
        return _parameters([*self.cross_layers, self.head])

    def parameters(self) -> list[nn.Parameter]:
        """All of them, each once."""
        return _parameters(self.modules())


def banded_loss(
    stage: Stage,
    bands: Bands,
    inputs: Tensor,
    targets: Tensor,
    starts: Tensor | None,
    shared: KeyValues | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of whole sequences on a stage that ends with the head.

    Args:
        inputs: tokens (B, T) int64, or hidden states (B, T, D) where the stage does not begin with the embedding; this
            rank's chunks, band after band.
        targets: (B, T) int64, -100 where none is learned.
        starts: (B, T) int64, global index of the first token of each token's document; None: no borders.
        shared: this rank's shared keys and values (B, T, g, K), where they were made on an earlier stage.
        weights: (B, T) floating point, factors of the targets' losses; None: 1.

    Returns:
        Weighted sum of the losses over this rank's targets (fp32 or wider) and their number (int64), both 0-d.

    Raises:
        ValueError: T is no multiple of the number of bands.
    """
    count = (targets != IGNORED).sum()
    if not torch.is_grad_enabled():
        with whole_parameters(stage.parameters(), stage.modules()):
            walk = _Walk(stage, bands, inputs, starts, shared, weights)
            return walk.evaluate(targets), count
    key, value = (None, None) if shared is None else shared
    with whole_parameters(stage.parameters(), stage.modules()):
        parameters = stage.parameters()
        loss: Tensor = _BandedLoss.apply(stage, bands, targets, weights, starts, inputs, key, value, *parameters)  # type: ignore[no-untyped-call]
    return loss, count


def banded_stage(
    stage: Stage, bands: Bands, inputs: Tensor, starts: Tensor | None, shared: KeyValues | None = None
) -> tuple[Tensor, KeyValues | None]:
    """Output of a stage that another one follows: hidden states (B, T, D), and this rank's shared keys and values.

    Arguments as in `banded_loss`. The keys and values are those that came in, or those that this stage made, or None.
    """
    if not torch.is_grad_enabled():
        walk = _Walk(stage, bands, inputs, starts, shared)
        return walk.forward()
    key, value = (None, None) if shared is None else shared
    hidden, key_out, value_out = _BandedStage.apply(stage, bands, starts, inputs, key, value, *stage.parameters())  # type: ignore[no-untyped-call]
    return hidden, None if key_out is None else KeyValues(key_out, value_out)


class _BandedLoss(torch.autograd.Function):
    """Makes every gradient of the sum of losses in forward; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        stage: Stage,
        bands: Bands,
        targets: Tensor,
        weights: Tensor | None,
        starts: Tensor | None,
        inputs: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *parameters: nn.Parameter,
    ) -> Tensor:
        shared = None if key is None or value is None else KeyValues(key, value)
        walk = _Walk(stage, bands, inputs, starts, shared, weights)
        loss = walk.loss(targets)
        ctx.stage = stage
        ctx.gradients = [walk.input_gradient, *walk.shared_gradient, *walk.parameter_gradients(parameters)]
        ctx.dtypes = [None if x is None else x.dtype for x in (inputs, key, value, *parameters)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a banded loss were handed out already: backward runs once")
        gradients, ctx.gradients = ctx.gradients, None
        whole_until_the_end_of_backward(ctx.stage.parameters())
        return None, None, None, None, None, *_rounded(gradients, ctx.dtypes, dloss)


class _BandedStage(torch.autograd.Function):
    """Walks forward without a graph; backward walks the bands again, descending."""

    @staticmethod
    def forward(
        ctx: Any,
        stage: Stage,
        bands: Bands,
        starts: Tensor | None,
        inputs: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        shared = None if key is None or value is None else KeyValues(key, value)
        ctx.walk = _Walk(stage, bands, inputs, starts, shared)
        ctx.parameters = parameters
        hidden, out = ctx.walk.forward(keep_contexts=True)
        return (hidden, None, None) if out is None else (hidden, out.key.clone(), out.value.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor, dkey: Tensor | None, dvalue: Tensor | None) -> tuple[Tensor | None, ...]:
        walk, ctx.walk = ctx.walk, None
        walk.backward(dhidden, None if dkey is None or dvalue is None else KeyValues(dkey, dvalue))
        dparameters = _rounded(walk.parameter_gradients(ctx.parameters), [p.dtype for p in ctx.parameters])
        shared = (None if g is None else g.to(walk.dtype) for g in walk.shared_gradient)
        return None, None, None, walk.input_gradient, *shared, *dparameters


class _Walk:
    """One micro-batch on its way through the bands of one stage."""

    def __init__(
        self,
        stage: Stage,
        bands: Bands,
        inputs: Tensor,
        starts: Tensor | None,
        shared: KeyValues | None,
        weights: Tensor | None = None,
    ) -> None:
        B, T = inputs.shape[:2]
        if T % bands.count:
            raise ValueError(f"{T} tokens of a rank do not divide into {bands.count} bands")
        self.stage, self.bands, self.chunk = stage, bands, T // bands.count
        self.inputs, self.shared = inputs.detach(), None if shared is None else KeyValues(*(x.detach() for x in shared))
        self.starts, self.weights = starts, weights
        self.rows = bands.rows or (ROWS_CPU if inputs.device.type == "cpu" else ROWS)
        self.dtype: torch.dtype = inputs.dtype
        if stage.embed is not None:
            self.dtype = next(stage.embed.parameters()).dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.store: KeyValueStore | None = None
        self.contexts: list[list[Any]] = []
        """Boundary contexts, one per self layer, before each band."""
        self.input_gradient: Tensor | None = None
        self.shared_gradient: tuple[Tensor | None, Tensor | None] = (None, None)
        self._parameter_gradients: dict[int, Tensor] = {}
        self._pending: list[Any] = []
        self._own: list[KeyValues] = []
        self._wants_input = inputs.is_floating_point() and inputs.requires_grad
        self._wants_shared = shared is not None and shared.key.requires_grad

    # -- the three walks ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, targets: Tensor) -> Tensor:
        """Sum of losses without gradients: one ascending walk that keeps only K and V."""
        total = self._zero()
        rows = _target_rows(targets, self.bands.count)
        self._publish_shared(gradients=False)
        left = self._empty_contexts()
        for b in range(self.bands.count):
            hidden, made, left = self._self_half(b, self._input(b), left)
            self._publish(b, made, gradients=False)
            self._wait()
            for chosen, wanted, weights in self._target_blocks(b, rows[b], targets):
                x, _ = self._cross_half(b, hidden, chosen)
                total += self._head(x, wanted, weights)
        return total

    def loss(self, targets: Tensor) -> Tensor:
        """Sum of losses; leaves every gradient in this object."""
        rows = _target_rows(targets, self.bands.count)
        self._publish_shared(gradients=True)
        total = self._zero()
        if self.bands.order == "split":
            hidden = self._ascend(self.bands.count, keep_hidden=True)
            assert hidden is not None
            for b in range(self.bands.count):
                at = self._at(b)
                loss, gradient = self._cross_loss(b, hidden[:, at], targets, rows[b])
                hidden[:, at] = 0 if gradient is None else gradient
                total += loss
            self._descend(hidden, None)
            return total
        # the last band needs no first pass: its graph is used at once
        self._ascend(self.bands.count - 1)
        gradient_right: list[Tensor | None] | None = None
        for b in reversed(range(self.bands.count)):
            graph = self._self_graph(b)
            if b == self.bands.count - 1:
                self._publish(b, graph.shared, gradients=True)
                self._wait()
            loss, dhidden = self._cross_loss(b, graph.hidden.detach(), targets, rows[b])
            total += loss
            gradient_right = self._self_backward(graph, dhidden, self._shared_gradient(b, None), gradient_right)
            del graph, dhidden  # before the next band makes its own
        self._release()
        return total

    @torch.no_grad()
    def forward(self, keep_contexts: bool = False) -> tuple[Tensor, KeyValues | None]:
        """Hidden states behind the stage and the shared keys and values that go on with them."""
        self._publish_shared(gradients=False)
        outputs = []
        left = self._empty_contexts()
        for b in range(self.bands.count):
            if keep_contexts:
                self.contexts.append(left)
            hidden, made, left = self._self_half(b, self._input(b), left)
            if made is not None:
                self._own.append(made)
            if self.stage.cross_layers:
                self._publish(b, made, gradients=False)
                self._wait()
                blocks = [self._cross_half(b, hidden, chosen)[0] for chosen in self._all_blocks()]
                hidden = torch.cat(blocks, 1)
            outputs.append(hidden)
        shared = self.shared
        if self._own:
            shared = KeyValues(*(torch.cat(parts, 1) for parts in zip(*self._own, strict=True)))
            self._own = []
        return torch.cat(outputs, 1), shared

    def backward(self, dhidden: Tensor, dshared: KeyValues | None) -> None:
        """All gradients, given those of what `forward` returned."""
        if self.store is not None:
            key, value = self.store.key, self.store.value
            dkey, dvalue = (torch.zeros_like(x, dtype=self.wide) for x in (key, value))
            self.store = KeyValueStore(key, value, dkey, dvalue)
        self._descend(dhidden, dshared, through_cross=True)

    def parameter_gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """In the wide dtype, for each of `parameters` that needs one; handed out once."""
        found: list[Tensor | None] = []
        for parameter in parameters:
            gradient = self._parameter_gradients.pop(id(parameter), None)
            if gradient is None and parameter.requires_grad:
                gradient = torch.zeros_like(parameter, dtype=self.wide)
            found.append(gradient)
        return found

    # -- the self half -----------------------------------------------------------------------------------------------

    def _ascend(self, stop: int, keep_hidden: bool = False) -> Tensor | None:
        """Pass 1 over the first bands, without graph. Keeps the context before each band, and of the band `stop`."""
        left = self._empty_contexts()
        kept = []
        with torch.no_grad():
            for b in range(stop):
                self.contexts.append(left)
                if not self.stage.has_self_half:
                    kept.append(self._input(b))
                    continue
                hidden, made, left = self._self_half(b, self._input(b), left)
                self._publish(b, made, gradients=True)
                if keep_hidden:
                    kept.append(hidden)
            self.contexts.append(left)
        if not keep_hidden:
            return None
        self._wait()
        return torch.cat(kept, 1)

    def _descend(self, dhidden: Tensor, dshared: KeyValues | None, through_cross: bool = False) -> None:
        """The last pass: self half with graph and backward, given the gradient of its hidden states; through_cross:
        given that of the cross layers' output instead."""
        gradient_right: list[Tensor | None] | None = None
        for b in reversed(range(self.bands.count)):
            at = self._at(b)
            graph = self._self_graph(b)
            gradient: Tensor | None = dhidden[:, at]
            if through_cross and self.stage.cross_layers:
                gradient = self._cross_backward(b, graph.hidden.detach(), dhidden[:, at])
            onward = None if dshared is None else KeyValues(dshared.key[:, at], dshared.value[:, at])
            gradient_right = self._self_backward(graph, gradient, self._shared_gradient(b, onward), gradient_right)
        self._release()

    def _self_graph(self, b: int) -> _Graph:
        leaves = [[x.detach().requires_grad_() for x in context] for context in self.contexts[b]]
        left = [type(context)(*parts) for context, parts in zip(self.contexts[b], leaves, strict=True)]
        source = self._input(b)
        if self._wants_input:
            source = source.detach().requires_grad_()
        with torch.enable_grad():
            hidden, made, right = self._self_half(b, source, left)
        self.contexts[b] = []
        return _Graph(b, source, [x for parts in leaves for x in parts], hidden, made, [x for c in right for x in c])

    def _self_half(self, b: int, x: Tensor, left: list[Any]) -> tuple[Tensor, KeyValues | None, list[Any]]:
        stage, positions = self.stage, self._positions(b)
        if stage.embed is not None:
            x = stage.embed(x)
        rights = []
        for layer, context in zip(stage.self_layers, left, strict=True):
            x, right = run_block(layer, x, positions, context, stage.recompute)
            rights.append(right)
        if stage.shared_kv is None:
            return x, None, rights
        empty = stage.shared_kv.empty_context(x.shape[0], x.dtype, x.device)
        x, made = run_block(stage.shared_kv, x, positions, empty, stage.recompute)
        return x, made, rights

    def _self_backward(
        self,
        graph: _Graph,
        dhidden: Tensor | None,
        dshared: KeyValues | None,
        dright: list[Tensor | None] | None,
    ) -> list[Tensor | None]:
        """Backward of one band's self half; returns the gradient of its left context."""
        b = graph.band
        if not self.stage.has_self_half:
            self._keep_input_gradient(b, dhidden)
            self._keep_shared_gradient(b, dshared)
            return []
        outputs, gradients = [], []
        if dhidden is not None:
            outputs.append(graph.hidden)
            gradients.append(dhidden.to(graph.hidden.dtype))
        if graph.shared is not None and dshared is not None:
            for output, gradient in zip(graph.shared, dshared, strict=True):
                outputs.append(output)
                gradients.append(gradient.to(output.dtype))
        else:
            self._keep_shared_gradient(b, dshared)
        for output, maybe in zip(graph.right, dright or [None] * len(graph.right), strict=True):
            if maybe is not None:
                outputs.append(output)
                gradients.append(maybe)
        parameters = [p for p in self.stage.self_parameters() if p.requires_grad]
        leaves = [*graph.left, *([graph.source] if self._wants_input else [])]
        needed = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        if not needed:
            return [None] * len(graph.left)
        found = torch.autograd.grad(
            [o for o, _ in needed], [*leaves, *parameters], [g for _, g in needed], allow_unused=True
        )
        self._add(parameters, found[len(leaves) :])
        if self._wants_input:
            self._keep_input_gradient(b, found[len(leaves) - 1])
        return list(found[: len(graph.left)])

    # -- the cross half ----------------------------------------------------------------------------------------------

    def _cross_half(self, b: int, hidden: Tensor, chosen: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Cross layers over some rows (B, R) of a band; returns their output and the rows that went in, a leaf where
        gradients are on."""
        x, positions = _take(hidden, chosen), self._positions(b).rows(chosen)
        rows = x
        if torch.is_grad_enabled():
            x = rows = x.detach().requires_grad_()
        if self.store is not None:
            last = self.chunk if isinstance(chosen, Tensor) else chosen.stop
            store = self.store.upto(self.bands.offset(b, self.chunk) + last)
            for layer in self.stage.cross_layers:
                x, _ = layer(x, positions, store)
        return x, rows

    def _cross_loss(self, b: int, hidden: Tensor, targets: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Loss of a band and the gradient of its hidden states, None where no row carries a target."""
        total, gradient = self._zero(), None
        parameters = [p for p in self.stage.cross_parameters() if p.requires_grad]
        for chosen, wanted, weights in self._target_blocks(b, rows, targets):
            with torch.enable_grad():
                x, leaf = self._cross_half(b, hidden, chosen)
                loss = self._head(x, wanted, weights)
            found = torch.autograd.grad(loss, [leaf, *parameters], allow_unused=True)
            self._add(parameters, found[1:])
            total += loss.detach()
            if gradient is None:
                gradient = torch.zeros_like(hidden)
            _put(gradient, chosen, found[0])
            del found  # all the half's gradients, before the next block makes its graph
        return total, gradient

    def _cross_backward(self, b: int, hidden: Tensor, doutput: Tensor) -> Tensor:
        """The same for a stage without head: the cross layers again, and back from the gradient of their output."""
        gradient = torch.empty_like(hidden)
        parameters = [p for p in self.stage.cross_parameters() if p.requires_grad]
        for chosen in self._all_blocks():
            with torch.enable_grad():
                x, leaf = self._cross_half(b, hidden, chosen)
            found = torch.autograd.grad(x, [leaf, *parameters], _take(doutput, chosen), allow_unused=True)
            self._add(parameters, found[1:])
            _put(gradient, chosen, found[0])
            del found
        return gradient

    def _all_blocks(self) -> Iterator[slice]:
        """Blocks of at most R rows of a chunk."""
        for start in range(0, self.chunk, self.rows):
            yield slice(start, min(start + self.rows, self.chunk))

    def _target_blocks(
        self, b: int, rows: Tensor | None, targets: Tensor
    ) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
        """Blocks of at most R rows of a band's chunk that carry targets, with those of `targets` and their weights
        (B, rows)."""
        targets, weights = targets[:, self._at(b)], None if self.weights is None else self.weights[:, self._at(b)]
        if rows is None:
            for block in self._all_blocks():
                yield block, targets[:, block], None if weights is None else weights[:, block]
            return
        if rows.shape[1] == 0:
            return
        wanted = targets.gather(1, rows)
        repeated = rows[:, 1:] == rows[:, :-1]  # padding: its loss counts once
        wanted[:, 1:].masked_fill_(repeated, IGNORED)
        for block, some in zip(rows.split(self.rows, 1), wanted.split(self.rows, 1), strict=True):
            yield block, some, None if weights is None else weights.gather(1, block)

    def _head(self, x: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        assert self.stage.head is not None
        return self.stage.head(x, targets, weights)[0]  # type: ignore[no-any-return]

    # -- the store of shared keys and values -------------------------------------------------------------------------

    def _publish(self, b: int, own: KeyValues | None, gradients: bool) -> None:
        """Write one band's keys and values into the store, from every rank."""
        if own is None or not (self.stage.cross_layers):
            return
        size = self.bands.ranks * self.chunk
        if self.store is None:
            B, _, g, K = own.key.shape
            self.store = KeyValueStore.allocate(
                B, self.bands.count * size, g, K, dtype=own.key.dtype, device=own.key.device, gradients=gradients
            )
        region = slice(b * size, (b + 1) * size)
        with torch.no_grad():
            if self.bands.axis is None:
                self.store.key[:, region] = own.key
                self.store.value[:, region] = own.value
            else:
                pending = self.bands.axis.gather_into(own, self.store.key[:, region], self.store.value[:, region])
                self._pending.append(pending)

    def _publish_shared(self, gradients: bool) -> None:
        """The keys and values that an earlier stage made."""
        if self.shared is None:
            return
        for b in range(self.bands.count):
            at = self._at(b)
            self._publish(b, KeyValues(self.shared.key[:, at], self.shared.value[:, at]), gradients)
        self._wait()

    def _wait(self) -> None:
        for pending in self._pending:
            pending.wait()
        self._pending = []

    def _shared_gradient(self, b: int, onward: KeyValues | None) -> KeyValues | None:
        """Gradient of this rank's keys and values of a band, complete once all later bands and this one are done."""
        if self.store is None:
            return onward
        assert self.store.dkey is not None and self.store.dvalue is not None
        size = self.bands.ranks * self.chunk
        region = slice(b * size, (b + 1) * size)
        dkey, dvalue = self.store.dkey[:, region], self.store.dvalue[:, region]
        if self.bands.axis is not None:
            dkey, dvalue = self.bands.axis.reduce_scatter(dkey, dvalue)
        if onward is not None:
            dkey, dvalue = dkey + onward.key, dvalue + onward.value
        return KeyValues(dkey, dvalue)

    # -- small things ------------------------------------------------------------------------------------------------

    def _at(self, b: int) -> slice:
        return slice(b * self.chunk, (b + 1) * self.chunk)

    def _positions(self, b: int) -> Positions:
        """Made anew for each use: their rotary tables, kept for all bands, would grow with the sequence."""
        start = None if self.starts is None else self.starts[:, self._at(b)]
        return Positions.of_chunk(self.bands.offset(b, self.chunk), self.chunk, self.inputs.device, start)

    def _input(self, b: int) -> Tensor:
        return self.inputs[:, self._at(b)]

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self.wide, device=self.inputs.device)

    def _empty_contexts(self) -> list[Any]:
        layers: Any = self.stage.self_layers
        return [x.mixer.empty_context(self.inputs.shape[0], self.dtype, self.inputs.device) for x in layers]

    def _add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Sums over chunks in the wide dtype, whatever the parameters' own."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            total = self._parameter_gradients.get(id(parameter))
            if total is None:
                # a gradient in the wide dtype is this walk's own unless autograd handed out a view of something else
                fresh = gradient.dtype == self.wide and gradient.is_contiguous() and not gradient._is_view()
                self._parameter_gradients[id(parameter)] = gradient if fresh else gradient.to(self.wide, copy=True)
            else:
                total += gradient

    def _keep_input_gradient(self, b: int, gradient: Tensor | None) -> None:
        if not self._wants_input:
            return
        if self.input_gradient is None:
            self.input_gradient = torch.zeros_like(self.inputs)
        if gradient is not None:
            self.input_gradient[:, self._at(b)] = gradient

    def _keep_shared_gradient(self, b: int, gradient: KeyValues | None) -> None:
        if not self._wants_shared or gradient is None:
            return
        assert self.shared is not None
        key, value = self.shared_gradient
        if key is None or value is None:
            key, value = (torch.zeros_like(x, dtype=self.wide) for x in self.shared)
            self.shared_gradient = key, value
        key[:, self._at(b)], value[:, self._at(b)] = gradient.key, gradient.value

    def _release(self) -> None:
        self.store, self.contexts = None, []


@dataclass(frozen=True)
class _Graph:
    """One band's self half with its graph."""

    band: int
    source: Tensor
    left: list[Tensor]
    hidden: Tensor
    shared: KeyValues | None
    right: list[Tensor]


def _rounded(
    gradients: list[Tensor | None], dtypes: Sequence[torch.dtype | None], factor: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients times a factor, scaled in the wide dtype and rounded once. Empties the list, so that wide and rounded
    ones never lie side by side."""
    rounded: list[Tensor | None] = []
    for number, dtype in enumerate(dtypes):
        gradient, gradients[number] = gradients[number], None
        if gradient is not None and factor is not None:
            # not in the gradient's own dtype: bf16 would round the factor, the same way for all that comes before
            gradient = gradient.to(torch.promote_types(gradient.dtype, factor.dtype)).mul_(factor)
        rounded.append(None if gradient is None else gradient.to(dtype))
    return rounded


def _parameters(modules: Sequence[nn.Module | None]) -> list[nn.Parameter]:
    found = {id(p): p for module in modules if module is not None for p in module.parameters()}
    return list(found.values())


def _target_rows(targets: Tensor, bands: int) -> list[Tensor | None]:
    """For each band the rows that carry a target: None where nearly all do, else (B, R) row numbers, ascending; a
    sequence of the batch with fewer of them repeats its last one."""
    chunks = targets.unflatten(1, (bands, -1)).transpose(0, 1) != IGNORED
    most = chunks.sum(-1).amax(-1).tolist()
    rows: list[Tensor | None] = []
    for chunk, R in zip(chunks, most, strict=True):
        if DENSE * chunk.shape[1] < R:
            rows.append(None)
            continue
        order = chunk.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :R]
        last = (chunk.sum(1, keepdim=True) - 1).clamp(min=0)
        rows.append(order.gather(1, torch.arange(R, device=targets.device).minimum(last)))
    return rows


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    if isinstance(rows, slice):
        return x[:, rows]
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def _put(gradient: Tensor, rows: slice | Tensor, found: Tensor) -> None:
    if isinstance(rows, slice):
        gradient[:, rows] = found
    else:
        # padding rows add zero to the row that they repeat
        gradient.scatter_add_(1, rows[..., None].expand(-1, -1, found.shape[2]), found)
