"""Every path of causal attention against the dense twin, in float64 with all gradients, and its memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megayoco.ops import attention_parts
from megayoco.ops.attention import attention_with_backend, causal_attention, causal_attention_naive

# T, S, H, G, window, documents: lengths of the packed documents over all S keys, one list per batch entry
CASES = [
    (1, 1, 1, 1, None, None),
    (1, 37, 4, 2, None, None),
    (63, 63, 4, 1, None, None),
    (64, 64, 2, 2, None, None),
    (300, 300, 4, 2, None, None),
    (1, 2, 2, 1, None, None),
    (33, 100, 4, 2, None, None),
    (130, 131, 4, 1, None, None),
    (64, 700, 2, 2, None, None),
    (1, 1, 2, 1, 1, None),
    (5, 5, 2, 1, 1, None),
    (1, 37, 4, 2, 8, None),
    (1, 37, 4, 2, 1, None),
    (300, 300, 4, 2, 7, None),
    (300, 300, 4, 2, 150, None),
    (256, 256, 2, 2, 128, None),
    (300, 300, 2, 1, 299, None),
    (300, 300, 2, 1, 300, None),
    (40, 40, 2, 1, 999, None),
    (150, 600, 4, 1, 33, None),
    (20, 600, 4, 2, 333, None),
    (257, 385, 2, 1, 128, None),
    (9, 9, 2, 1, None, [[9], [1, 8]]),
    (300, 300, 4, 2, None, [[128, 1, 127, 44], [100, 200]]),
    (150, 400, 4, 1, None, [[250, 150], [100, 278, 22]]),
    (1, 50, 4, 2, None, [[50], [20, 30]]),
    (1, 50, 4, 2, 7, [[50], [49, 1]]),
    (300, 300, 4, 2, 16, [[128, 1, 127, 44], [100, 200]]),
    (300, 300, 2, 1, 1, [[300], [299, 1]]),
    (150, 400, 4, 1, 140, [[250, 150], [100, 278, 22]]),
]


def name(case):
    T, S, H, G, window, documents = case
    return f"T{T}-S{S}-heads{H}/{G}-" + (f"W{window}" if window else "full") + ("-documents" if documents else "")


def first_keys(documents, T):
    rows = [torch.cat([torch.full((n,), sum(row[:i])) for i, n in enumerate(row)])[-T:] for row in documents]
    return torch.stack(rows)


def random_inputs(B, T, S, H, G, K, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def output_and_gradients(form, inputs, **options):
    *leaves, dout = [x.clone().requires_grad_() for x in inputs]
    out = form(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_output_and_gradients_equal_the_twin(case):
    T, S, H, G, window, documents = case
    inputs = random_inputs(2, T, S, H, G, 8)
    options = dict(scale=0.3, window=window, first_key=first_keys(documents, T) if documents else None)
    expected = output_and_gradients(causal_attention_naive, inputs, **options)
    got = output_and_gradients(causal_attention, inputs, **options)
    for what, a, b in zip(["out", "dq", "dk", "dv"], expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("case", [case for case in CASES if case[0] > 1 or not case[4]], ids=name)
def test_the_math_backend_equals_the_twin(case):
    """What serves fp32 on GPUs, and everything where no kernel passes its check."""
    T, S, H, G, window, documents = case
    window = None if window and window >= S else window  # causal_attention asks a backend for nothing else
    inputs = random_inputs(2, T, S, H, G, 8)
    options = dict(scale=0.3, window=window, first_key=first_keys(documents, T) if documents else None)
    expected = output_and_gradients(causal_attention_naive, inputs, **options)
    got = output_and_gradients(attention_with_backend, inputs, backend="math", **options)
    for what, a, b in zip(["out", "dq", "dk", "dv"], expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_square_uses_the_flash_kernel_with_grouped_heads_both_ways(dtype):
    with OperatorRecord() as record:
        output_and_gradients(causal_attention, random_inputs(2, 96, 96, 4, 2, 16, dtype), scale=0.3)
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert {flash, flash + "_backward"} <= record.names
    assert not {"repeat_interleave", "expand", "bmm", "softmax", "_softmax"} & record.names


@pytest.mark.parametrize("case", CASES, ids=name)
def test_bf16_is_as_near_as_its_rounding(case):
    T, S, H, G, window, documents = case
    inputs = random_inputs(2, T, S, H, G, 16, torch.bfloat16)
    options = dict(scale=0.25, window=window, first_key=first_keys(documents, T) if documents else None)
    expected = output_and_gradients(causal_attention_naive, [x.double() for x in inputs], **options)
    got = output_and_gradients(causal_attention, inputs, **options)
    for what, a, b in zip(["out", "dq", "dk", "dv"], expected, got, strict=True):
        assert b.dtype == torch.bfloat16
        error = (b.double() - a).norm() / a.norm().clamp(min=1e-3)
        assert error < 1e-2, f"{what}: relative error {error:.2e}"


class OperatorRecord(TorchDispatchMode):
    """Records which operators ran, and the most elements that any of them returned."""

    def __init__(self):
        super().__init__()
        self.names, self.numel = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.names.add(function.overloadpacket.__name__)
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("T", [512, 1024])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("documents", [None, [[1000, 24]]])
def test_nothing_of_queries_times_keys_is_allocated(T, window, documents):
    S, H, G, K = 1024, 2, 1, 8
    inputs = random_inputs(1, T, S, H, G, K, torch.float32)
    options = dict(scale=0.3, window=window, first_key=first_keys(documents, T) if documents else None)
    with OperatorRecord() as record:
        output_and_gradients(causal_attention, inputs, **options)
    block = attention_parts.MASKED_ROWS
    limit = block * S if documents and not window else max(S * H * K, block * (block + 64))
    assert record.numel <= limit < T * S


def test_documents_of_every_length_are_cut_into_parts_that_hold_each_pair_once():
    """The plan by itself: which rows and keys lie in a part, without any attention."""
    T, S, block = 700, 900, attention_parts.MASKED_ROWS
    lengths = [[250, block, block - 1, 1, block + 1, 137, 128], [1] * 300 + [600]]
    first_key = first_keys(lengths, T)
    count = torch.zeros(2, T, S, dtype=torch.int64)
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    visible = (key <= query) & (key >= first_key[..., None])
    for part in attention_parts.plan_parts(T, attention_parts.Rows(S, first_key=first_key)):
        assert part.kind != "causal" or part.rows.stop - part.rows.start == part.keys.stop - part.keys.start
        seen = (key <= query) if part.kind == "causal" else visible if part.kind == "masked" else key >= 0
        at = (part.batch, part.rows, part.keys)
        count[at] += seen.expand(2, T, S)[at].long()
    assert torch.equal(count, visible.long())


@pytest.mark.parametrize(("S", "window"), [(40, None), (64, None), (40, 7)])
def test_any_strides_are_read_right(S, window):
    q, k, v, _ = random_inputs(2, 40, S, 4, 2, 8)
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in (q, k, v)]
    results = []
    for leaves in ([x.requires_grad_() for x in (q, k, v)], strided):
        out = causal_attention(*leaves, scale=0.3, window=window)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    expected = causal_attention_naive(q, k, v, scale=0.3, window=window)
    results.append([expected, *torch.autograd.grad(expected.sum(), (q, k, v))])
    for contiguous, got, naive in zip(*results, strict=True):
        torch.testing.assert_close(contiguous, naive)
        torch.testing.assert_close(got, naive)


def test_a_window_reads_only_the_keys_it_needs():
    q, k, v, _ = random_inputs(1, 5, 100, 2, 1, 8)
    k[:, : 100 - (5 + 8 - 1)] = torch.nan
    v[:, : 100 - (5 + 8 - 1)] = torch.nan
    assert causal_attention(q, k, v, scale=1.0, window=8).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=(2, 4, 2, 8), v=(2, 4, 2, 8)), "1 <= T <= S"),
        (dict(k=(2, 9, 3, 8), v=(2, 9, 3, 8)), "4 query heads cannot share 3"),
        (dict(v=(2, 8, 2, 8)), "k and v are"),
        (dict(q=(2, 5, 4)), "q is"),
        (dict(k=(1, 9, 2, 8), v=(1, 9, 2, 8)), "batch and head dim"),
        (dict(k=(2, 9, 2, 6), v=(2, 9, 2, 6)), "batch and head dim"),
        (dict(window=0), "at least 1"),
        (dict(first_key=torch.zeros(2, 9, dtype=torch.int64)), "first_key must be int64"),
        (dict(first_key=torch.zeros(2, 5, dtype=torch.int32)), "first_key must be int64"),
        (dict(dtype=torch.float64), "one floating-point dtype"),
        (dict(device="meta"), "one device"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    q = torch.zeros(change.get("q", (2, 5, 4, 8)), dtype=change.get("dtype"))
    k = torch.zeros(change.get("k", (2, 9, 2, 8)))
    v = torch.zeros(change.get("v", (2, 9, 2, 8)))
    q = q.to(change.get("device", "cpu"))
    with pytest.raises(ValueError, match=message):
        causal_attention(q, k, v, scale=1.0, window=change.get("window"), first_key=change.get("first_key"))
