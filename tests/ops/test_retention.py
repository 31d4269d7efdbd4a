"""Every form of gated retention against the recurrence, in values, right context and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megayoco.ops import retention
from megayoco.ops.retention import (
    RetentionState,
    combine,
    empty_state,
    gated_retention,
    gated_retention_naive,
    gated_retention_recurrent,
    retention_state,
)

NAMES = "y state log_decay dq dk dv dlog_decay dleft_state dleft_log_decay".split()

# one token, ragged tails, several groups of pieces; documents that begin at the first token, inside pieces, on their
# edges and at the last token, one token long, and a row without any
CASES = {
    "one-token": (1, 1, 1, 4, 4, None),
    "shorter-than-a-piece": (2, 7, 3, 8, 16, None),
    "ragged": (2, 63, 3, 8, 16, None),
    "several-groups": (1, 130, 2, 16, 4, None),
    "exact": (1, 64, 2, 16, 32, None),
    "documents": (3, 131, 2, 8, 16, [[0, 5, 6, 16, 37, 64], [130], []]),
    "document-per-piece": (1, 64, 1, 4, 16, [[16, 32, 48]]),
    "document-per-token": (1, 9, 2, 4, 4, [list(range(9))]),
}


def random_inputs(B, T, H, K, V=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_decay = F.logsigmoid(3 * normal(B, T, H).to(wide)) / 4
    state, so_far = normal(B, H, K, V or K).to(wide), -normal(B, H).to(wide).abs()
    return [normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V or K), log_decay, state, so_far]


def first_tokens(starts, T):
    if starts is None:
        return None
    first = torch.full((len(starts), T), -3, dtype=torch.int64)
    for row, numbers in zip(first, starts, strict=True):
        for start in numbers:
            row[start:] = start
    return first


def run(form, inputs, **kwargs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    y, right = form(*leaves[:4], RetentionState(*leaves[4:]), **kwargs)
    finite = right.log_decay.masked_fill(right.log_decay.isinf(), 0)
    weights = torch.arange(1, finite.numel() + 1).view_as(finite)
    loss = (y * y.detach().cos()).sum() + right.state.square().sum() + (finite * weights).sum()
    return [y, *right, *torch.autograd.grad(loss, leaves)]


def assert_same(got, expected, rtol=1e-10, atol=1e-10):
    for name, one, other in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def folded(cuts):
    """gated_retention over parts of the tokens, each starting from the context of the last."""

    def form(q, k, v, log_decay, left, *, first_token, chunk):
        outputs, start = [], 0
        for stop in [*cuts, q.shape[1]]:
            part = slice(start, stop)
            first = None if first_token is None else first_token[:, part] - start
            y, left = gated_retention(
                q[:, part], k[:, part], v[:, part], log_decay[:, part], left, first_token=first, chunk=chunk
            )
            outputs.append(y)
            start = stop
        return torch.cat(outputs, 1), left

    return form


@pytest.fixture
def small_groups(monkeypatch):
    """Makes a group two pieces long, so that short inputs cross its borders."""
    monkeypatch.setattr(retention, "_group_tokens", lambda q, v, chunk, itemsize: 2 * chunk)


@pytest.mark.parametrize("case", CASES)
def test_recurrent_form_equals_the_naive_one(case):
    B, T, H, K, _, starts = CASES[case]
    inputs, first_token = random_inputs(B, T, H, K), first_tokens(starts, T)
    expected = run(gated_retention_naive, inputs, first_token=first_token)
    assert_same(run(gated_retention_recurrent, inputs, first_token=first_token), expected)


@pytest.mark.parametrize("case", CASES)
def test_chunked_form_equals_the_naive_one(case):
    B, T, H, K, chunk, starts = CASES[case]
    inputs, first_token = random_inputs(B, T, H, K, V=K + 3), first_tokens(starts, T)
    expected = run(gated_retention_naive, inputs, first_token=first_token)
    assert_same(run(gated_retention, inputs, first_token=first_token, chunk=chunk), expected)


@pytest.mark.parametrize("case", CASES)
def test_groups_of_pieces_equal_the_naive_one(case, small_groups):
    B, T, H, K, chunk, starts = CASES[case]
    inputs, first_token = random_inputs(B, T, H, K), first_tokens(starts, T)
    expected = run(gated_retention_naive, inputs, first_token=first_token)
    assert_same(run(gated_retention, inputs, first_token=first_token, chunk=chunk), expected)


@pytest.mark.parametrize("tokens", [3, 100, 300])
def test_default_chunk_equals_the_naive_one(tokens):
    inputs = random_inputs(2, tokens, 2, 8)
    first_token = first_tokens([[tokens // 2], []], tokens)
    expected = run(gated_retention_naive, inputs, first_token=first_token)
    assert_same(run(gated_retention, inputs, first_token=first_token), expected)


@pytest.mark.parametrize("case", CASES)
def test_fold_over_chunks_equals_one_pass(case):
    B, T, H, K, chunk, starts = CASES[case]
    inputs, first_token = random_inputs(B, T, H, K), first_tokens(starts, T)
    cuts = sorted({T // 3, T // 3 + 1, T // 2})  # the middle one makes a chunk of one token; T = 1: an empty one
    expected = run(gated_retention_naive, inputs, first_token=first_token)
    assert_same(run(folded(cuts), inputs, first_token=first_token, chunk=chunk), expected)


@pytest.mark.parametrize("case", CASES)
def test_state_alone_equals_the_naive_form_from_an_empty_state(case, monkeypatch):
    monkeypatch.setattr(retention, "GROUP_BYTES_CPU", 4096)  # slices of few tokens
    B, T, H, K, V, starts = CASES[case]
    _, k, v, log_decay, *_ = random_inputs(B, T, H, K, V)
    first, results = first_tokens(starts, T), []
    for naive in (False, True):
        leaves = [x.clone().requires_grad_() for x in (k, v, log_decay)]
        if naive:
            left = empty_state(B, H, K, value_dim=V, dtype=torch.float64)
            _, right = gated_retention_naive(k, *leaves, left, first_token=first)
        else:
            right = retention_state(*leaves, first_token=first)
        weight = torch.linspace(-1, 2, right.state.numel(), dtype=torch.float64).view_as(right.state)
        loss = (right.state * weight).sum() + right.log_decay.masked_fill(right.log_decay.isinf(), 0).sum()
        results.append([*right, *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_state_alone_in_bf16_keeps_fp32_and_gives_gradients_in_bf16():
    _, k, v, log_decay, *_ = random_inputs(2, 33, 2, 8, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (k, v, log_decay)]
    right = retention_state(*leaves)
    assert right.state.dtype == torch.float32
    assert [x.dtype for x in torch.autograd.grad(right.state.sum(), leaves)] == [x.dtype for x in leaves]
    expected = gated_retention_naive(k, k, v, log_decay, empty_state(2, 2, 8))[1]
    torch.testing.assert_close(right.state, expected.state, rtol=1e-5, atol=1e-5)


def test_naive_form_equals_the_parallel_definition():
    """o_n = sum over m <= n of exp(c_n - c_m) (q_n . k_m) v_m, written out: what the twin itself is held against."""
    q, k, v, log_decay, *_ = random_inputs(2, 11, 2, 4)
    c = log_decay.cumsum(1)
    expected = torch.zeros_like(v)
    for n in range(11):
        for m in range(n + 1):
            score = (q[:, n] * k[:, m]).sum(-1) * (c[:, n] - c[:, m]).exp()
            expected[:, n] += score[..., None] * v[:, m]
    y, _ = gated_retention_naive(q, k, v, log_decay, empty_state(2, 2, 4, dtype=torch.float64))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_no_tokens_change_nothing():
    inputs = random_inputs(2, 0, 3, 4)
    left = RetentionState(*inputs[4:])
    for form in (gated_retention, gated_retention_recurrent, gated_retention_naive):
        y, right = form(*inputs[:4], left, first_token=torch.zeros(2, 0, dtype=torch.int64))
        assert y.shape == (2, 0, 3, 4)
        assert torch.equal(right.state, left.state) and torch.equal(right.log_decay, left.log_decay)


def chunk_states(parts, first_token=None):
    """The state of each part of random tokens, from an empty left context."""
    q, k, v, log_decay, *_ = random_inputs(2, sum(parts), 2, 4)
    states, start = [], 0
    for length in parts:
        part = slice(start, start + length)
        first = None if first_token is None else first_token[:, part] - start
        empty = empty_state(2, 2, 4, dtype=torch.float64)
        arguments = (x[:, part] for x in (q, k, v, log_decay))
        states.append(gated_retention(*arguments, empty, first_token=first)[1])
        start += length
    whole = gated_retention(q, k, v, log_decay, empty_state(2, 2, 4, dtype=torch.float64), first_token=first_token)[1]
    return states, whole


@pytest.mark.parametrize("starts", [None, [[0, 9], [25]], [[10], [22]]], ids=str)
def test_combine_is_associative_and_equals_one_pass(starts):
    (a, b, c), whole = chunk_states([10, 7, 13], first_tokens(starts, 30))
    empty = empty_state(2, 2, 4, dtype=torch.float64)
    for other in (combine(combine(a, b), c), combine(a, combine(b, c)), combine(empty, combine(a, combine(b, c)))):
        torch.testing.assert_close(other.state, whole.state, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.log_decay, whole.log_decay, rtol=1e-12, atol=1e-12)


def test_combine_after_a_border_has_no_nan_gradient():
    (a, b, _), _ = chunk_states([10, 7, 13], first_tokens([[12], [12]], 30))
    leaves = [x.clone().requires_grad_() for x in (*a, b.state)]
    result = combine(RetentionState(*leaves[:2]), RetentionState(leaves[2], b.log_decay))
    gradients = torch.autograd.grad(result.state.square().sum(), leaves, allow_unused=True)
    assert torch.equal(gradients[0], torch.zeros_like(gradients[0]))
    torch.testing.assert_close(gradients[2], 2 * result.state)


@pytest.mark.parametrize("starts", [None, [[0, 40, 64], [33]]], ids=str)
@pytest.mark.parametrize("fading", [-50.0, -5000.0, 0.0])
def test_extreme_decays_stay_finite(fading, starts):
    inputs = [x.float() for x in random_inputs(2, 100, 2, 8)]
    inputs[3].fill_(fading)
    inputs[3][:, ::7] = 0.0
    first_token = first_tokens(starts, 100)
    results = run(gated_retention, inputs, first_token=first_token, chunk=32)
    for name, result in zip(NAMES, results, strict=True):
        assert result.isfinite().all() or (name == "log_decay" and starts), name
    expected = run(gated_retention_naive, [x.double() for x in inputs], first_token=first_token)
    assert_same([x.double() for x in results], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("logit", [0.0, 3.5, 8.0])
def test_slow_decays_survive_bf16_decoding(logit):
    """State and decay stay in fp32: rounded to bf16, a gate logit above 3.45 decays by exactly 1 and never fades."""
    B, T, H, K = 1, 2048, 2, 16
    q, k, v, _, _, _ = random_inputs(B, T, H, K, dtype=torch.bfloat16)
    log_decay = F.logsigmoid(torch.full((B, T, H), logit)) / 16
    y, left = gated_retention(q[:, :1024], k[:, :1024], v[:, :1024], log_decay[:, :1024], empty_state(B, H, K))
    outputs = [y]
    for t in range(1024, T):
        part = slice(t, t + 1)
        y, left = gated_retention(q[:, part], k[:, part], v[:, part], log_decay[:, part], left)
        outputs.append(y)
    got = torch.cat(outputs, 1)
    assert got.dtype == torch.bfloat16 and left.state.dtype == torch.float32
    empty = empty_state(B, H, K, dtype=torch.float64)
    expected, _ = gated_retention(q.double(), k.double(), v.double(), log_decay.double(), empty)
    error = (got.double() - expected)[:, 1024:].square().mean().sqrt() / expected[:, 1024:].square().mean().sqrt()
    assert error < 1e-2


def test_bf16_gradients_come_back_in_bf16():
    inputs = random_inputs(1, 70, 2, 8, dtype=torch.bfloat16)
    got = run(gated_retention, inputs, chunk=16)
    assert [x.dtype for x in got[3:]] == [torch.bfloat16] * 3 + [torch.float32] * 3
    expected = run(gated_retention_naive, [x.double() for x in inputs])
    for name, one, other in zip(NAMES, got, expected, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 2e-2, name


def test_works_under_checkpoint_with_an_earlier_chunk():
    """Recomputed chunks with a context that carries a gradient give the gradients of one pass."""
    inputs = random_inputs(1, 48, 2, 8)

    def checkpointed(q, k, v, log_decay, left, *, first_token):
        def half(q, k, v, log_decay, state, so_far):
            y, right = gated_retention(q, k, v, log_decay, RetentionState(state, so_far), chunk=8)
            return (y, *right)

        outputs = []
        for part in (slice(0, 20), slice(20, 48)):
            arguments: list[Tensor] = [x[:, part] for x in (q, k, v, log_decay)]
            y, *right = checkpoint(half, *arguments, *left, use_reentrant=False)
            left = RetentionState(*right)
            outputs.append(y)
        return torch.cat(outputs, 1), left

    expected = run(gated_retention_naive, inputs, first_token=None)
    assert_same(run(checkpointed, inputs, first_token=None), expected)


def test_gradients_of_some_inputs_only():
    q, k, v, log_decay, *left = random_inputs(1, 20, 1, 4)
    leaves = [q, k, v.requires_grad_(), log_decay]
    y, right = gated_retention(*leaves, RetentionState(*left), chunk=8)
    (got,) = torch.autograd.grad(y.square().sum(), [v])  # the right state is not used
    y, _ = gated_retention_naive(*leaves, RetentionState(*left))
    (expected,) = torch.autograd.grad(y.square().sum(), [v])
    torch.testing.assert_close(got, expected)


def test_backward_keeps_no_scores():
    """What is kept for backward: inputs and one state per group, not the (C x C) fades."""
    q, k, v, log_decay, *left = random_inputs(1, 1024, 1, 8, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        gated_retention(q.requires_grad_(), k, v, log_decay, RetentionState(*left))
    assert max(saved) == q.numel()


@pytest.mark.parametrize("form", [gated_retention, gated_retention_recurrent])
def test_narrow_decay_is_refused(form):
    inputs = random_inputs(1, 4, 1, 4)
    with pytest.raises(ValueError, match="log_decay must be fp32 or float64"):
        form(*inputs[:3], inputs[3].bfloat16(), RetentionState(*inputs[4:]))


def test_chunk_below_one_is_refused():
    inputs = random_inputs(1, 4, 1, 4)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        gated_retention(*inputs[:4], RetentionState(*inputs[4:]), chunk=0)
