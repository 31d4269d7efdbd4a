"""Every attention path of a GPU against the dense twin: fp32 exactly, bf16 within its rounding."""

import pytest
import torch

from megayoco.ops import backends
from megayoco.ops.attention import attention_with_backend, causal_attention, causal_attention_naive
from megayoco.ops.norm import rms_norm, rms_norm_naive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# T, S, H, G, K, window, document lengths
CASES = [
    (300, 300, 4, 2, 64, None, None),
    (1, 300, 4, 2, 64, None, None),
    (130, 700, 6, 2, 128, None, None),
    (300, 300, 4, 4, 64, 33, None),
    (130, 700, 4, 2, 64, 200, None),
    (300, 400, 4, 2, 64, None, [150, 200, 20, 30]),
    (300, 400, 4, 2, 64, 50, [150, 200, 20, 30]),
]


def gradients(form, inputs, **options):
    *leaves, dout = [x.detach().clone().requires_grad_() for x in inputs]
    out = form(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, dout.detach())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1.5e-2)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_the_twin(case, dtype, tolerance):
    T, S, H, G, K, window, lengths = case
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, T, H, K), (2, S, G, K), (2, S, G, K), (2, T, H, K)]
    inputs = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    first_key = None
    if lengths:
        starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
        first_key = starts.repeat_interleave(torch.tensor(lengths))[-T:].expand(2, T).cuda()
    options = {"scale": K**-0.5, "window": window, "first_key": first_key}
    expected = gradients(causal_attention_naive, [x.double() for x in inputs], **options)
    got = gradients(causal_attention, inputs, **options)
    for what, a, b in zip(["out", "dq", "dk", "dv"], expected, got, strict=True):
        error = (b.double() - a).norm() / a.norm()
        assert error < tolerance, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("name", ["torch_flash", "flash_attn"])
def test_kernels_pass_the_self_check(name, head_dim, window):
    if name == "flash_attn" and not backends.is_installed(name):
        pytest.skip("flash-attn is not installed")

    def form(q, k, v, scale, window):
        return attention_with_backend(q, k, v, scale=scale, window=window, backend=name)

    error = backends.self_check_error(form, torch.device("cuda"), torch.bfloat16, head_dim, window)
    assert error < backends.TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_equals_its_formula(dtype):
    x, weight = torch.randn(64, 512, device="cuda").to(dtype), torch.randn(512, device="cuda").to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_naive(x, weight, 1e-5))
