"""Attention over a store against its dense twin: values, gradients, accumulation, memory, order."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megayoco.ops import attention_parts, attention_store
from megayoco.ops.attention_parts import Rows, cut_parts, plan_parts
from megayoco.ops.attention_store import KeyValueStore, attention_over_store, attention_over_store_naive, plan_queries

NAMES = ["out", "dq", "dk", "dv"]


def starts(lengths, tokens):
    """First token of every token's document."""
    assert sum(lengths) == tokens
    return torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])


def rows_of(kind, S, generator):
    """Indices (2, R) of some of the last tokens of S; both batch entries differ, the shorter is padded by repeating."""
    chunk = torch.arange(S * 3 // 5, S)
    picks = {
        "one": [chunk[5:6], chunk[7:8]],
        "all": [chunk, chunk],
        "random": [chunk[torch.rand(len(chunk), generator=generator) < 0.4] for _ in range(2)],
        "runs": [torch.cat([chunk[3:150], chunk[170:180], chunk[200:]]), chunk[20:]],
        "sparse": [torch.arange(3, S, S // 11), torch.arange(40, S, S // 5)],
        "first and last": [torch.tensor([0, S - 1]), torch.tensor([0, 1])],
        "padding": [chunk[:9].repeat_interleave(30), chunk[-1:].repeat(270)],
    }[kind]
    longest = max(map(len, picks))
    return torch.stack([torch.cat([x, x[-1:].repeat(longest - len(x))]) for x in picks])


def random_inputs(R, S, H, G, K=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, R, H, K), (2, S, G, K), (2, S, G, K), (2, R, H, K)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def naive(inputs, **options):
    *leaves, dout = [x.clone().requires_grad_() for x in inputs]
    out = attention_over_store_naive(*leaves, scale=0.3, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def over_store(inputs, **options):
    q, key, value, dout = inputs
    store = KeyValueStore.allocate(*key.shape, key.dtype, key.device)
    store.key.copy_(key)
    store.value.copy_(value)
    q = q.clone().requires_grad_()
    out = attention_over_store(q, store, scale=0.3, **options)
    (dq,) = torch.autograd.grad(out, q, dout)
    return [out.detach(), dq, store.dkey, store.dvalue]


def assert_equal(got, expected, tolerance=1e-11):
    for what, a, b in zip(NAMES, expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda m, what=what: f"{what}: {m}")


@pytest.fixture(params=["cpu_flash", "math"])
def backend(request, monkeypatch):
    monkeypatch.setattr(attention_store, "attention_backend", lambda *_, **__: request.param)


@pytest.mark.parametrize("keys_per_slice", [None, 64, 100])
@pytest.mark.parametrize(
    ("R", "S", "H", "G"),
    [(1, 1, 1, 1), (1, 50, 4, 2), (300, 300, 4, 2), (7, 200, 6, 2), (129, 500, 2, 2), (300, 301, 4, 1)],
)
@pytest.mark.usefixtures("backend")
def test_the_last_tokens_as_queries_equal_the_twin(R, S, H, G, keys_per_slice):
    inputs = random_inputs(R, S, H, G)
    assert_equal(over_store(inputs, keys_per_slice=keys_per_slice), naive(inputs))


DOCUMENTS = {
    "none": None,
    # borders in the middle of the queries, on the edge of a slice (64), on the edge of the chunk (300), single tokens
    "borders": [[64, 236, 130, 1, 69], [499, 1]],
    "short": [[50] * 10, [1] * 200 + [300]],
}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("kind", ["one", "all", "random", "runs", "sparse", "first and last", "padding"])
@pytest.mark.usefixtures("backend")
def test_any_subset_of_tokens_as_queries_equals_the_twin(kind, documents):
    S = 500
    index = rows_of(kind, S, torch.Generator().manual_seed(1))
    options = {"query_index": index}
    if documents:
        options["first_key"] = torch.stack([starts(row, S) for row in documents]).gather(1, index)
    inputs = random_inputs(index.shape[1], S, 4, 2)
    plan = plan_queries(index.shape[1], S, **options)
    assert_equal(over_store(inputs, keys_per_slice=64, plan=plan, **options), naive(inputs, **options))


def test_documents_of_the_last_tokens_equal_the_twin():
    S, R = 500, 260
    first_key = torch.stack([starts(row, S) for row in DOCUMENTS["borders"]])[:, -R:]
    inputs = random_inputs(R, S, 4, 2)
    assert_equal(over_store(inputs, first_key=first_key, keys_per_slice=64), naive(inputs, first_key=first_key))


def test_no_query_at_all():
    inputs = random_inputs(0, 40, 4, 2)
    out, dq, dk, dv = over_store(inputs, query_index=torch.empty(2, 0, dtype=torch.int64))
    assert out.shape == dq.shape == (2, 0, 4, 8)
    assert not dk.any() and not dv.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("kind", ["all", "random"])
@pytest.mark.usefixtures("backend")
def test_narrow_dtypes_are_as_near_as_their_rounding(kind, dtype, tolerance):
    index = rows_of(kind, 500, torch.Generator().manual_seed(1))
    inputs = random_inputs(index.shape[1], 500, 4, 2, 16, dtype)
    expected = naive([x.double() for x in inputs], query_index=index)
    got = over_store(inputs, query_index=index, keys_per_slice=64)
    assert [x.dtype for x in got] == [dtype, dtype, torch.float32, torch.float32]
    for what, a, b in zip(NAMES, expected, got, strict=True):
        error = ((b.double() - a).norm() / a.norm()).item()
        assert error < tolerance, f"{what}: relative error {error:.2e}"


def chunked(q, key, value, dout, chunk, order=1, **options):
    """Chunks of queries over prefixes of one store, as chunked training calls it."""
    store = KeyValueStore.allocate(*key.shape, key.dtype, key.device)
    store.key.copy_(key)
    store.value.copy_(value)
    outs, dqs = {}, {}
    for start in range(0, q.shape[1], chunk)[::order]:
        end = min(start + chunk, q.shape[1])
        rows = q[:, start:end].clone().requires_grad_()
        out = attention_over_store(rows, store.upto(end), scale=0.3, **options)
        (dqs[start],) = torch.autograd.grad(out, rows, dout[:, start:end])
        outs[start] = out.detach()
    out, dq = (torch.cat([x[start] for start in sorted(x)], 1) for x in (outs, dqs))
    return [out, dq, store.dkey, store.dvalue]


@pytest.mark.parametrize("chunk", [70, 256, 999])
def test_chunks_add_up_to_the_whole(chunk):
    inputs = random_inputs(300, 300, 4, 2)
    assert_equal(chunked(*inputs, chunk, order=-1, keys_per_slice=64), naive(inputs))


def test_several_layers_add_up():
    inputs = random_inputs(50, 90, 4, 2)
    q, key, value, dout = inputs
    store = KeyValueStore(key, value, *(torch.zeros_like(key) for _ in range(2)))
    q.requires_grad_()
    out = attention_over_store(attention_over_store(q, store, scale=0.3), store, scale=0.3)
    (dq,) = torch.autograd.grad(out, q, dout)
    leaves = [x.clone().requires_grad_() for x in (q, key, value)]
    expected = attention_over_store_naive(*leaves, scale=0.3)
    expected = attention_over_store_naive(expected, *leaves[1:], scale=0.3)
    assert_equal([out, dq, store.dkey, store.dvalue], [expected, *torch.autograd.grad(expected, leaves, dout)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_run_is_bit_equal(dtype):
    inputs = random_inputs(600, 600, 4, 2, 16, dtype)
    first, second = (chunked(*inputs, 250, -1, keys_per_slice=128) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_bf16_store_sums_many_chunks_in_fp32():
    inputs = random_inputs(2048, 2048, 2, 1, 16, torch.bfloat16)
    expected = naive([x.double() for x in inputs])
    for what, a, b in zip(NAMES, expected, chunked(*inputs, 32), strict=True):
        error = ((b.double() - a).norm() / a.norm()).item()
        assert error < 6e-3, f"{what}: relative error {error:.2e}"


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operator made in memory of its own."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def largest_allocation(R, S, H, sparse):
    q, key, value, dout = random_inputs(R, S, H, 2, 16, torch.float32)
    store = KeyValueStore(key, value, *(torch.zeros_like(key) for _ in range(2)))
    index = torch.linspace(0, S - 1, R).long().expand(2, R) if sparse else None
    q.requires_grad_()
    with Allocations() as allocations:
        out = attention_over_store(q, store, scale=0.3, query_index=index, keys_per_slice=256)
        torch.autograd.grad(out, q, dout)
    return allocations.largest


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.usefixtures("backend")
def test_no_allocation_grows_with_the_store(sparse):
    short, long = (largest_allocation(8, S, 2, sparse) for S in (10_000, 40_000))
    keys = 40_000 * 2 * 2 * 16 * 4
    assert long <= 1.01 * short and long < keys / 8


@pytest.mark.parametrize("backend", ["cpu_flash"], indirect=True)
@pytest.mark.usefixtures("backend")
def test_key_gradients_of_a_slice_do_not_grow_with_query_heads():
    slice_ = 2 * 256 * 2 * 16 * 4
    assert [largest_allocation(8, 4000, H, False) for H in (2, 4, 8)] == [slice_] * 3


def sparse(path, shape, dtype):
    """A tensor of zeros in a file of holes: only the pages that are written take room."""
    numbers = torch.Size(shape).numel()
    with open(path, "wb") as file:
        file.truncate(numbers * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(shape)


def test_a_store_of_more_than_two_to_the_31_numbers(tmp_path):
    """A million tokens of 24 heads of 128: documents at both ends, whose places differ by more than an int32 holds."""
    S, H, K, length = 1 << 20, 24, 128, 20
    tensors = [
        sparse(tmp_path / name, (1, S, H, K), torch.float32 if name.startswith("d") else torch.bfloat16)
        for name in ("key", "value", "dkey", "dvalue")
    ]
    assert tensors[0].numel() > 1 << 31
    store = KeyValueStore(*tensors)
    q, key, value, dout = random_inputs(2 * length, 2 * length, H, H, K, torch.bfloat16)
    ends = [slice(0, length), slice(S - length, S)]
    for at, own in zip(ends, (slice(0, length), slice(length, None)), strict=True):
        store.key[:, at], store.value[:, at] = key[:1, own], value[:1, own]
    index = torch.cat([torch.arange(S)[at] for at in ends])[None]
    first_key = torch.tensor([0, S - length]).repeat_interleave(length)[None]
    q = q[:1].requires_grad_()
    out = attention_over_store(q, store, scale=0.3, query_index=index, first_key=first_key)
    (dq,) = torch.autograd.grad(out, q, dout[:1])
    gradients = [torch.cat([x[:, at] for at in ends], 1) for x in (store.dkey, store.dvalue)]
    small = [x[:1].detach().float() for x in (q, key, value, dout)]
    expected = naive(small, first_key=torch.tensor([0, length]).repeat_interleave(length)[None])
    for what, a, b in zip(NAMES, expected, [out.detach(), dq, *gradients], strict=True):
        assert (b.float() - a).norm() < 1e-2 * a.norm(), what


def test_the_plan_of_tokens_beyond_two_to_the_31_is_that_of_the_first_ones():
    far = (1 << 31) + 77
    some = torch.rand(600, generator=torch.Generator().manual_seed(3)) < 0.7
    some[:200] = True
    index = torch.arange(600)[some][None]
    first_key = starts([150, 3, 447], 600)[index]
    near_parts = plan_parts(index.shape[1], Rows(600, index, first_key))
    far_parts = plan_parts(index.shape[1], Rows(far + 600, index + far, first_key + far))
    shifted = [part._replace(keys=slice(part.keys.start + far, part.keys.stop + far)) for part in near_parts]
    assert far_parts == shifted and {part.kind for part in shifted} == {"all", "causal", "masked"}


def test_one_slices_gradients_exist_at_a_time(monkeypatch):
    made, tile_backward = [], attention_parts.tile_backward

    def noted(*arguments):
        assert all(memory.expired() for memory in made)
        result = tile_backward(*arguments)
        made[:] = [StorageWeakRef(x.untyped_storage()) for x in result]
        return result

    monkeypatch.setattr(attention_parts, "tile_backward", noted)
    over_store(random_inputs(8, 500, 4, 2), keys_per_slice=100)
    assert made


def test_the_store_keeps_no_graph_and_writes_through_its_parts():
    store = KeyValueStore.allocate(1, 10, 2, 4, torch.bfloat16, torch.device("cpu"))
    assert store.tokens == 10 and store.dkey.dtype == torch.float32
    part = store.between(2, 5)
    part.key.fill_(3)
    part.dvalue.fill_(7)
    assert (store.key[:, 2:5] == 3).all() and (store.dvalue[:, 2:5] == 7).all() and not store.dvalue[:, :2].any()
    assert store.upto(5).tokens == 5
    assert KeyValueStore.allocate(1, 3, 1, 4, torch.float64, torch.device("cpu")).dkey.dtype == torch.float64
    with pytest.raises(ValueError, match="tokens 2 to 11 of a store of 10"):
        store.between(2, 11)


def test_without_gradients_only_under_no_grad():
    inputs = random_inputs(5, 40, 4, 2)
    store = KeyValueStore.allocate(2, 40, 2, 8, torch.float64, torch.device("cpu"), gradients=False)
    store.key.copy_(inputs[1])
    store.value.copy_(inputs[2])
    with torch.no_grad():
        out = attention_over_store(inputs[0], store.upto(40), scale=0.3)
    torch.testing.assert_close(out, naive(inputs)[0])
    assert not out.requires_grad
    with pytest.raises(ValueError, match="no buffers for gradients"):
        attention_over_store(inputs[0].requires_grad_(), store, scale=0.3)
    store.allocate_gradients()
    attention_over_store(inputs[0], store, scale=0.3).backward(inputs[3])
    assert_equal([out, inputs[0].grad, store.dkey, store.dvalue], naive([x.detach() for x in inputs]))


def test_a_second_derivative_is_refused():
    q, key, value, _ = random_inputs(5, 40, 4, 2)
    store = KeyValueStore(key, value, *(torch.zeros_like(key) for _ in range(2)))
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attention_over_store(q, store, scale=0.3).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("documents", [None, "short", "long"])
@pytest.mark.parametrize("limits", [(None, None), (None, 100), (64, 64)])
def test_the_plan_holds_every_pair_once_and_no_row_without_keys(documents, limits):
    generator = torch.Generator().manual_seed(2)
    S = 6000
    start = {
        None: torch.zeros(S, dtype=torch.int64),
        "short": starts([7, 30, 1, 62] * 60, S),
        "long": starts([2500, 40, 3000, 460], S),
    }[documents]
    token = torch.arange(S)
    for picked in (token[-700:], token[torch.rand(S, generator=generator) < 0.1], token[::97], token[-1:].repeat(300)):
        first = start[picked]
        parts = cut_parts(plan_parts(len(picked), Rows(S, picked[None], first[None])), *limits)
        count, written = torch.zeros(len(picked), S, dtype=torch.int8), torch.zeros(len(picked), dtype=torch.bool)
        visible = (first[:, None] <= token) & (token <= picked[:, None])
        for part in parts:
            area = visible[part.rows, part.keys]
            rows, keys = area.shape
            if part.kind == "causal":
                assert rows == keys and torch.equal(area, torch.ones(rows, keys, dtype=torch.bool).tril())
            elif part.kind == "all":
                assert area.all()
            else:
                assert rows <= attention_parts.MASKED_ROWS and keys <= attention_parts.MASKED_KEYS
            assert area.any(1).all()
            assert (written[part.rows] == part.merge).all()
            written[part.rows] = True
            count[part.rows, part.keys] += area
        assert torch.equal(count.bool(), visible) and count.max() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=(2, 5, 4)), "q is"),
        (dict(q=(1, 5, 4, 8)), "q is"),
        (dict(q=(2, 5, 3, 8)), "3 query heads cannot share 2"),
        (dict(q=(2, 10, 4, 8)), "R <= S"),
        (dict(dtype=torch.float64), "torch.float64 on cpu"),
        (dict(query_index=torch.zeros(2, 4, dtype=torch.int64)), "query_index must be int64"),
        (dict(query_index=torch.full((2, 5), 9)), "lie in 0 .. 8"),
        (dict(query_index=torch.tensor([[0, 1, 2, 4, 3]] * 2)), "not descend"),
        (dict(first_key=torch.zeros(2, 5, dtype=torch.int32)), "first_key must be int64"),
        (dict(first_key=torch.full((2, 5), 8)), "behind its own"),
        (dict(first_key=torch.tensor([[1, 1, 0, 0, 0]] * 2)), "not descend"),
        (dict(keys_per_slice=0), "at least 1"),
        (dict(graph=False), "q does not require grad"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    q = torch.zeros(change.pop("q", (2, 5, 4, 8)), dtype=change.pop("dtype", torch.float32))
    store = KeyValueStore.allocate(2, 9, 2, 8, torch.float32, torch.device("cpu"))
    q.requires_grad_(change.pop("graph", True))
    with pytest.raises(ValueError, match=message):
        attention_over_store(q, store, scale=1.0, **change)


def test_a_store_that_does_not_fit_together_is_refused():
    x = torch.zeros(1, 4, 2, 8)
    for tensors, message in [
        ((x, x[:, :3]), r"\(B, N, g, K\)"),
        ((x, x.double()), "one floating-point dtype"),
        ((x, x, x), "of neither"),
        ((x, x, x.double(), x.double()), "summed in torch.float32"),
        ((x, x.clone().requires_grad_()), "must not require grad"),
        ((x.mT.contiguous().mT, x), "next to each other"),
    ]:
        with pytest.raises(ValueError, match=message):
            KeyValueStore(*tensors)
