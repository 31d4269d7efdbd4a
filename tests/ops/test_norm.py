"""RMS norm against its formula, and the order of cast and weight."""

import pytest
import torch

from megayoco.ops.norm import rms_norm, rms_norm_naive


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 3, 16), (4, 128)], ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no-weight"])
def test_value_and_gradients_equal_the_twin(shape, weighted):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64) if weighted else None
    results = []
    for form in (rms_norm_naive, rms_norm):
        leaves = [t.clone().requires_grad_() for t in (x, weight) if t is not None]
        y = form(leaves[0], leaves[1] if weighted else None, 1e-2)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_have_wide_statistics(dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = (100 * torch.randn(2, 64, 512, generator=generator, dtype=torch.float64)).to(dtype)
    weight = torch.randn(512, generator=generator).to(dtype)
    results = []
    for leaves in ([x.clone(), weight.clone()], [x.double(), weight.double()]):
        leaves = [t.requires_grad_() for t in leaves]
        y = rms_norm(*leaves, 1e-5)
        assert y.dtype == leaves[0].dtype
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < (5e-7 if dtype == torch.float32 else 6e-3)


def test_the_cast_comes_before_the_weight():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator).bfloat16()
    weight = torch.randn(64, generator=generator).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x, None, 1e-5) * weight)


def test_a_wider_weight_widens_the_output():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    assert rms_norm(x, weight, 1e-5).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradient_it_is_the_same_to_the_bit(dtype):
    x, weight = torch.randn(3, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    expected = rms_norm(x.requires_grad_(), weight, 1e-5)
    with torch.inference_mode():
        assert torch.equal(rms_norm(x, weight, 1e-5), expected)
    assert expected.requires_grad
