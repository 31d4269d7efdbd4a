"""Rotary embedding against complex multiplication, its frequencies, and what makes it relative."""

import pytest
import torch

from megayoco.ops.rotary import apply_rotary, apply_rotary_naive, rotary_frequencies, rotary_table

LAYOUTS = ["interleaved", "half_split"]


def rotary_naive(x, index, theta, layout):
    """Channel pairs as complex numbers, everything in float64."""
    pairs = x.shape[-1] // 2
    j = torch.arange(pairs, dtype=torch.float64)
    exponent = j / max(pairs - 1, 1) if layout == "interleaved" else j / pairs
    angle = index.double()[..., None, None] * theta**-exponent
    a, b = (x[..., 0::2], x[..., 1::2]) if layout == "interleaved" else (x[..., :pairs], x[..., pairs:])
    turned = torch.complex(a.double(), b.double()) * torch.polar(torch.ones_like(angle), angle)
    if layout == "interleaved":
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("B", "T", "H", "K"), [(1, 1, 1, 2), (2, 7, 3, 4), (1, 33, 2, 64)])
@pytest.mark.parametrize("batched", [False, True], ids=["one-index", "index-per-row"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 2e-5), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_value_and_gradient_equal_complex_multiplication(layout, B, T, H, K, batched, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, B, T, H, K, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randint(0, 50, (B, T) if batched else (T,), generator=generator)
    cos, sin = rotary_table(index, rotary_frequencies(K, 100.0, layout))
    x.requires_grad_()
    y = apply_rotary(x, cos, sin, layout)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    expected = rotary_naive(wide, index, 100.0, layout)
    (expected_dx,) = torch.autograd.grad(expected, wide, dy.double())
    assert y.dtype == dx.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=tolerance, atol=tolerance)


def test_frequencies_of_both_layouts():
    interleaved = rotary_frequencies(8, 10000.0, "interleaved")
    half_split = rotary_frequencies(8, 10000.0, "half_split")
    assert interleaved.dtype == half_split.dtype == torch.float32
    # the last pair turns with 1 / theta in YOCO, with theta ** -(1 - 2/K) in LLaMA
    torch.testing.assert_close(interleaved, torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4]))
    torch.testing.assert_close(half_split, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_the_table_is_fp32_of_global_positions():
    cos, sin = rotary_table(torch.tensor([0, 1_000_000]), torch.tensor([1.0, 1e-4]))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (2, 2)
    torch.testing.assert_close(cos[1, 1].double(), torch.tensor(100.0, dtype=torch.float64).cos(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_distance_only(layout):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    frequencies = rotary_frequencies(16, 50.0, layout)

    def score(query, key):
        turned = [
            apply_rotary(x, *rotary_table(torch.tensor([i]), frequencies), layout) for x, i in [(q, query), (k, key)]
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=1e-4, atol=1e-5)
    assert (score(7, 3) - score(3, 7)).abs() > 1e-3


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 5, 1, 8)
    with pytest.raises(ValueError, match="unknown rotary layout 'split'"):
        apply_rotary(x, torch.zeros(5, 4), torch.zeros(5, 4), "split")
    for shape in [(4, 4), (5, 8), (3, 5, 4), (1, 1, 5, 4)]:
        with pytest.raises(ValueError, match="needs cos and sin"):
            apply_rotary(x, torch.zeros(shape), torch.zeros(shape), "interleaved")
    with pytest.raises(ValueError, match="must be even"):
        rotary_frequencies(7, 10000.0, "interleaved")
    with pytest.raises(ValueError, match="theta must be positive"):
        rotary_frequencies(8, 0.0, "half_split")


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_value_and_gradient_equal_the_naive_twin(layout):
    table = rotary_table(torch.arange(3, 20), rotary_frequencies(8, 100.0, layout))
    results = []
    for form in (apply_rotary, apply_rotary_naive):
        x = torch.randn(2, 17, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = form(x, *table, layout)
        results.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), x)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_gradient_it_is_the_same_to_the_bit(layout):
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    tables = rotary_table(torch.arange(7, 12), rotary_frequencies(8, 1e4, layout))
    expected = apply_rotary(x, *tables, layout)
    with torch.inference_mode():
        assert torch.equal(apply_rotary(x, *tables, layout), expected)
    assert expected.requires_grad
