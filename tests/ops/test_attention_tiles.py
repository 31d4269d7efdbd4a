"""Tile operators: those of this machine against a softmax, those of GPUs up to the call of their kernel."""

import sys
from types import ModuleType

import pytest
import torch

from megayoco.ops import attention_tiles
from megayoco.ops.attention_tiles import OPERATORS, Tile, tile_backward, tile_forward

SCALE = 0.3


def random_inputs(T, S, dtype=torch.float64, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, heads, head_dim) for tokens, heads in ((T, 4), (S, 2), (S, 2), (T, 4))]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(q, k, v, dout, hidden):
    """out, lse, dq, dk, dv of a softmax over the scores that are not hidden."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = (torch.einsum("bthk,bshk->bhts", q, k) * SCALE).masked_fill(hidden, -torch.inf)
    out = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)
    return [out, scores.logsumexp(-1), *torch.autograd.grad(out, leaves, dout)]


def hidden_by(tile, T, S):
    row, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    if tile.mask is not None:
        return tile.mask < 0
    if not tile.causal:
        return torch.zeros(T, S, dtype=torch.bool)
    return (key > row) | (key <= row - (tile.window or S))


def assert_serves(backend, tile, T, S, head_dim=8):
    q, k, v, dout = random_inputs(T, S, head_dim=head_dim)
    wanted = expected(q, k, v, dout, hidden_by(tile, T, S))
    out, lse = tile_forward(q, k, v, tile, backend)
    got = [out, lse, *tile_backward(dout, q, k, v, out, lse, tile, backend)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


MASK = torch.zeros(2, 1, 5, 9, dtype=torch.float64).masked_fill(torch.arange(9) % 4 == 1, -torch.inf)


@pytest.mark.parametrize("backend", ["cpu_flash", "math"])
@pytest.mark.parametrize(
    ("tile", "T", "S"),
    [(Tile(SCALE), 5, 9), (Tile(SCALE), 9, 5), (Tile(SCALE, causal=True), 9, 9), (Tile(SCALE, mask=MASK), 5, 9)],
)
def test_operators_of_this_machine(backend, tile, T, S):
    assert_serves(backend, tile, T, S)


def test_a_single_query_reads_long_keys_once_for_a_group(monkeypatch):
    monkeypatch.setattr(attention_tiles, "LONG_KEYS", 9)
    assert_serves("cpu_flash", Tile(SCALE), 1, 9)
    # and its rows are those of a group
    q, k, v, _ = random_inputs(1, 9)
    shapes, flash = [], torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def kernel(q, k, v, *arguments, **options):
        shapes.append(q.shape)
        return flash(q, k, v, *arguments, **options)

    monkeypatch.setattr(attention_tiles.aten, "_scaled_dot_product_flash_attention_for_cpu", kernel, raising=False)
    tile_forward(q, k, v, Tile(SCALE), "cpu_flash")
    assert shapes == [(2, 2, 2, 8)]


BOTTOM_RIGHT = [
    (Tile(SCALE), 256, 512),
    (Tile(SCALE, causal=True), 256, 256),
    (Tile(SCALE, causal=True), 5, 9),
    (Tile(SCALE, causal=True, window=3), 5, 9),
    (Tile(SCALE, causal=True, window=1), 5, 9),
]


def reference_kernel(monkeypatch):
    """What the faked kernels below compute with: math, wherever it is called from."""
    forward, backward = OPERATORS["math"]
    monkeypatch.setitem(OPERATORS, "torch_flash", (None, None))

    def tile_of(T, S, scale, causal, left, right):
        if not causal:
            return Tile(scale)
        window = None if left < 0 else left
        hidden = hidden_by(Tile(scale, True, window), T, S)
        return Tile(scale, mask=torch.zeros(T, S, dtype=torch.float64).masked_fill(hidden, -torch.inf)[None, None])

    return forward, backward, tile_of


@pytest.mark.parametrize(("tile", "T", "S"), BOTTOM_RIGHT)
@pytest.mark.parametrize("head_dim", [8, 12])
def test_the_flash_attn_package_is_called_by_its_conventions(monkeypatch, tile, T, S, head_dim):
    forward, backward, tile_of = reference_kernel(monkeypatch)

    # signatures of flash-attn 2.7 and 2.8: a window counts the tokens on the left without the query, -1 is no limit
    def fake_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == -(-head_dim // 8) * 8
        assert window_size_right == (-1 if window_size_left < 0 else 0)
        left = -1 if window_size_left < 0 else window_size_left + 1
        out, lse = forward(q, k, v, tile_of(q.shape[1], k.shape[1], softmax_scale, causal, left, 0))
        return out, lse, None, None

    def fake_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, False)
        left = -1 if window_size_left < 0 else window_size_left + 1
        tile = tile_of(q.shape[1], k.shape[1], softmax_scale, causal, left, 0)
        for into, x in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, tile), strict=True):
            into.copy_(x)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._wrapped_flash_attn_forward, interface._wrapped_flash_attn_backward = fake_forward, fake_backward
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert_serves("flash_attn", tile, T, S, head_dim)


@pytest.fixture
def cudnn_operators():
    """The operators that nvidia-cudnn-frontend 1.22 registers, by their declaration, computed by math."""
    forward, backward = OPERATORS["math"]
    library = torch.library.Library("cudnn", "DEF")
    options = (
        "float attn_scale, bool is_causal=False, int diagonal_alignment=0, int left_bound=-1, int right_bound=-1, "
        "Tensor? seq_len_q=None, Tensor? seq_len_kv=None, Tensor? cumulative_seq_len_q=None, "
        "Tensor? cumulative_seq_len_kv=None"
    )
    library.define(f"sdpa(Tensor q, Tensor k, Tensor v, {options}) -> (Tensor, Tensor)")
    library.define(
        f"sdpa_bwd(Tensor dO, Tensor q, Tensor k, Tensor v, Tensor o, Tensor stats, {options}, "
        "bool is_deterministic=False) -> (Tensor, Tensor, Tensor)"
    )

    def masked(q, k, scale, causal, alignment, left, right):
        """Its window counts the query itself; alignment 1 is bottom-right."""
        if not causal:
            assert (alignment, left, right) == (0, -1, -1)
            return Tile(scale)
        assert alignment == 1 and right == 0
        T, S = q.shape[2], k.shape[2]
        hidden = hidden_by(Tile(scale, True, None if left < 0 else left), T, S)
        return Tile(scale, mask=torch.zeros(T, S, dtype=torch.float64).masked_fill(hidden, -torch.inf)[None, None])

    def sdpa(q, k, v, scale, causal=False, alignment=0, left=-1, right=-1, *unused):
        tile = masked(q, k, scale, causal, alignment, left, right)
        out, lse = forward(*(x.transpose(1, 2) for x in (q, k, v)), tile)
        return out.transpose(1, 2).contiguous(), lse[..., None].contiguous()

    def sdpa_bwd(dout, q, k, v, out, lse, scale, causal=False, alignment=0, left=-1, right=-1, *unused):
        assert out.stride() == dout.stride() and lse.shape == (*q.shape[:3], 1)
        tile = masked(q, k, scale, causal, alignment, left, right)
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        return tuple(x.transpose(1, 2).contiguous() for x in backward(dout, q, k, v, out, lse[..., 0], tile))

    library.impl("sdpa", sdpa, "CPU")
    library.impl("sdpa_bwd", sdpa_bwd, "CPU")
    package = ModuleType("cudnn")
    modules = {"cudnn": package, "cudnn.experimental": package, "cudnn.experimental.ops": package}
    package.experimental = package.ops = package
    before = dict(sys.modules)
    sys.modules.update(modules)
    yield
    for name in modules:
        sys.modules.pop(name, None)
    sys.modules.update({name: before[name] for name in modules if name in before})
    library._destroy()


@pytest.mark.usefixtures("cudnn_operators")
@pytest.mark.parametrize(("tile", "T", "S"), BOTTOM_RIGHT[:1] + BOTTOM_RIGHT[2:])
def test_the_cudnn_package_is_called_by_its_conventions(tile, T, S):
    assert_serves("cudnn_frontend", tile, T, S)


@pytest.mark.parametrize("backend", ["torch_flash", "fa3", "torch_cudnn"])
@pytest.mark.parametrize(
    ("tile", "S"), [(Tile(SCALE), 512), (Tile(SCALE, causal=True), 256), (Tile(SCALE, causal=True, window=9), 512)]
)
def test_torchs_cuda_kernels_accept_the_calls(backend, tile, S):
    """Up to shapes and dtypes: the kernels themselves are tested where there is a GPU."""
    if backend == "torch_cudnn" and tile.window:
        return
    q, k = (torch.empty(2, T, H, 64, dtype=torch.bfloat16, device="meta") for T, H in ((256, 4), (S, 2)))
    out, lse = tile_forward(q, k, k, tile, backend)
    assert out.shape == q.shape and (lse.shape, lse.dtype) == ((2, 4, 256), torch.float32)
    assert [x.shape for x in tile_backward(out, q, k, k, out, lse, tile, backend)] == [q.shape, k.shape, k.shape]


def test_cudnn_leaves_irregular_shapes_and_kernels_leave_masks():
    def served(backend, T, S, **options):
        q, k = (torch.empty(1, n, 1, 8, device="meta") for n in (T, S))
        return attention_tiles._serving(q, k, Tile(1.0, **options), backend)

    assert served("torch_cudnn", 256, 512) == "torch_cudnn"
    assert served("torch_cudnn", 256, 500) == served("torch_cudnn", 250, 512) == "torch_flash"
    assert served("torch_cudnn", 300, 300, causal=True) == "torch_flash"
    assert served("cudnn_frontend", 300, 500) == "torch_flash"
    assert served("cudnn_frontend", 300, 500, causal=True, window=7) == "cudnn_frontend"
    mask = torch.zeros(1, 1, 256, 512)
    assert [served(x, 256, 512, mask=mask) for x in ("torch_flash", "torch_cudnn", "flash_attn")] == ["math"] * 3
    assert served("cpu_flash", 256, 512, mask=mask) == "cpu_flash"
