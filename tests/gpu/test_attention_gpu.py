"""Every attention path of a GPU against the dense twin: fp32 exactly, bf16 within its rounding."""

import pytest
import torch

from megayoco.ops import backends
from megayoco.ops.attention import attention_with_backend, causal_attention, causal_attention_naive
from megayoco.ops.attention_store import KeyValueStore, attention_over_store, attention_over_store_naive
from megayoco.ops.norm import rms_norm, rms_norm_naive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KERNELS = [name for name in backends.CUDA_BACKENDS if name != "math"]

# T, S, H, G, K, window, document lengths
CASES = [
    (300, 300, 4, 2, 64, None, None),
    (512, 512, 4, 2, 128, None, None),
    (256, 1024, 6, 2, 128, None, None),
    (1, 300, 4, 2, 64, None, None),
    (130, 700, 6, 2, 128, None, None),
    (300, 300, 4, 4, 64, 33, None),
    (130, 700, 4, 2, 64, 200, None),
    (300, 400, 4, 2, 64, None, [150, 200, 20, 30]),
    (300, 400, 4, 2, 64, 50, [150, 200, 20, 30]),
]


@pytest.fixture(params=[None, *KERNELS])
def kernel(request, monkeypatch):
    """None is what auto takes. FlashAttention-3 is activated for the whole process, so it goes with None only."""
    name = request.param
    if name in backends.PACKAGES and (name == "fa3" or not backends.is_installed(backends.PACKAGES[name])):
        pytest.skip("not installed, or activated for the whole process")
    backends._serving.cache_clear()
    if name:
        monkeypatch.setenv(backends.VARIABLE, name)
    yield name
    backends._serving.cache_clear()


def gradients(form, inputs, **options):
    *leaves, dout = [x.detach().clone().requires_grad_() for x in inputs]
    out = form(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, dout.detach())]


def assert_near(got, expected, tolerance):
    for what, a, b in zip(["out", "dq", "dk", "dv"], expected, got, strict=True):
        error = (b.double() - a).norm() / a.norm()
        assert error < tolerance, f"{what}: relative error {error:.2e}"


def random_inputs(T, S, H, G, K, dtype, batch=2):
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, T, H, K), (batch, S, G, K), (batch, S, G, K), (batch, T, H, K)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1.5e-2)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("kernel")
def test_output_and_gradients_equal_the_twin(case, dtype, tolerance):
    T, S, H, G, K, window, lengths = case
    inputs = random_inputs(T, S, H, G, K, dtype)
    first_key = None
    if lengths:
        starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
        first_key = starts.repeat_interleave(torch.tensor(lengths))[-T:].expand(2, T).cuda()
    options = {"scale": K**-0.5, "window": window, "first_key": first_key}
    expected = gradients(causal_attention_naive, [x.double() for x in inputs], **options)
    assert_near(gradients(causal_attention, inputs, **options), expected, tolerance)


def over_store(inputs, **options):
    q, key, value, dout = inputs
    store = KeyValueStore(key, value)
    store.allocate_gradients()
    q = q.detach().clone().requires_grad_()
    out = attention_over_store(q, store, scale=0.1, **options)
    (dq,) = torch.autograd.grad(out, q, dout)
    return [out, dq, store.dkey, store.dvalue]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1.5e-2)], ids=str)
@pytest.mark.parametrize("rows", ["last", "some", "documents"])
@pytest.mark.usefixtures("kernel")
def test_attention_over_a_store_equals_the_twin(rows, dtype, tolerance):
    S, R = 2048, 512
    options = {}
    if rows != "last":
        some = torch.rand(1024, generator=torch.Generator().manual_seed(1)) < 0.4
        index = (S - 1024 + some.nonzero()[:, 0]).expand(2, -1).cuda()
        options, R = {"query_index": index}, index.shape[1]
    if rows == "documents":
        options["first_key"] = torch.where(index < 1500, 100, 1500)
    inputs = random_inputs(R, S, 6, 2, 128, dtype)
    expected = gradients(attention_over_store_naive, [x.double() for x in inputs], scale=0.1, **options)
    assert_near(over_store(inputs, keys_per_slice=512, **options), expected, tolerance)


@pytest.mark.usefixtures("kernel")
def test_a_long_store_needs_no_memory_of_its_length():
    """2048 queries of 24 heads over 262144 keys of 8: the gradients that flash widens to query heads stay a slice."""
    S, R = 1 << 18, 2048
    q, dout = (torch.randn(1, R, 24, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    store = KeyValueStore.allocate(1, S, 8, 128, torch.bfloat16, torch.device("cuda"))
    store.key.normal_()
    store.value.normal_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    q.requires_grad_()
    attention_over_store(q, store, scale=0.1).backward(dout)
    assert torch.cuda.max_memory_allocated() - before < 1 << 30 < S * 24 * 128 * 2 * 2 // 2
    assert store.dkey.isfinite().all() and store.dkey.any()


@pytest.mark.usefixtures("kernel")
def test_a_second_run_is_bit_equal_with_deterministic_algorithms():
    inputs = random_inputs(512, 4096, 6, 2, 128, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (over_store(inputs, keys_per_slice=1024) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_pass_the_self_check(name, head_dim, window):
    device = torch.device("cuda")
    if name == "fa3" or not backends.is_installed(backends.PACKAGES.get(name, "torch")):
        pytest.skip("not installed, or activated for the whole process")
    if not backends._fits(name, device, torch.bfloat16, head_dim, window is not None):
        pytest.skip("not made for this")

    def form(q, k, v, scale, window):
        return attention_with_backend(q, k, v, scale=scale, window=window, backend=name)

    assert backends.self_check_error(form, device, torch.bfloat16, head_dim, window) < backends.TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_equals_its_formula(dtype):
    x, weight = torch.randn(64, 512, device="cuda").to(dtype), torch.randn(512, device="cuda").to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_naive(x, weight, 1e-5))
