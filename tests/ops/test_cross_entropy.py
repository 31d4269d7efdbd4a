"""Linear cross entropy against all logits at once: loss, gradients, memory, and the vocabulary cut over ranks."""

import multiprocessing
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megayoco.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_naive, row_weights

NAMES = ("loss", "count", "dx", "dweight")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def random_inputs(tokens=37, dim=16, vocabulary=52, dtype=torch.float64, ignored=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    if ignored:
        targets[::5] = -100
        targets[10:20] = -100  # with chunks of 4, whole chunks
    return x, weight, targets


def run(form, x, weight, targets, scale=0.7, **kwargs):
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    loss, count = form(x, weight, targets, **kwargs)
    gradients = torch.autograd.grad(loss * scale, (x, weight))
    return [loss.detach(), count, *gradients]


def assert_same(got, expected, tolerance=1e-12):
    for name, one, other in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 37, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_all_logits_at_once(dtype, chunk_tokens, ignored):
    inputs = random_inputs(dtype=dtype, ignored=ignored)
    got = run(linear_cross_entropy, *inputs, chunk_tokens=chunk_tokens)
    assert_same(got, run(linear_cross_entropy_naive, *inputs), TOLERANCE[dtype])
    assert got[0].dtype == dtype and got[1].dtype == torch.int64


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_weights_are_factors_of_the_losses(dtype, ignored):
    inputs = random_inputs(dtype=dtype, ignored=ignored)
    weights = torch.rand(37, generator=torch.Generator().manual_seed(1))
    got = run(linear_cross_entropy, *inputs, weights=weights, chunk_tokens=4)
    assert_same(got, run(linear_cross_entropy_naive, *inputs, weights=weights), TOLERANCE[dtype])
    assert not torch.allclose(got[0], run(linear_cross_entropy, *inputs)[0])
    with pytest.raises(ValueError, match="a weight for each of 37 targets"):
        linear_cross_entropy(*inputs, weights=weights[:5])


def test_weights_of_rows_make_a_sum_of_their_means():
    targets = torch.zeros(2, 6, dtype=torch.int64)
    targets[0, :3] = targets[1, 1:3] = targets[1, 5] = -100  # rows with 0, 3, 1 and 2 targets
    losses = torch.rand(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    weights = row_weights(targets, 3, torch.float64)
    means = losses[0, 3:].mean() + losses[1, 0] + losses[1, 3:5].mean()
    torch.testing.assert_close((losses * weights * (targets >= 0)).sum(), means)
    assert row_weights(targets, 6).dtype == torch.float32 and row_weights(targets, 6)[0].tolist() == pytest.approx(
        [1 / 3] * 6
    )


def test_bf16_inputs_are_summed_in_fp32():
    """Against float64 on the same rounded inputs: nothing is lost beyond one rounding of logits and of results."""
    x, weight, targets = random_inputs(tokens=300, dtype=torch.bfloat16)
    got = run(linear_cross_entropy, x, weight, targets, chunk_tokens=8)
    expected = run(linear_cross_entropy_naive, x.double(), weight.double(), targets)
    assert [t.dtype for t in got] == [torch.float32, torch.int64, torch.bfloat16, torch.bfloat16]
    assert got[1] == expected[1]
    for index, bound in ((0, 1e-3), (2, 6e-3), (3, 6e-3)):
        error = (got[index].double() - expected[index]).norm() / expected[index].norm()
        assert error < bound, NAMES[index]


def test_confident_tokens_keep_their_bf16_gradient():
    """softmax - 1 is rounded, not softmax: at 0.999 the latter is 1 in bf16 and the gradient of x would be lost."""
    x, targets = torch.eye(8, dtype=torch.bfloat16), torch.arange(8)
    weight = 9 * torch.eye(8, dtype=torch.bfloat16)
    got = run(linear_cross_entropy, x, weight, targets, scale=1)
    expected = run(linear_cross_entropy_naive, x.double(), weight.double(), targets, scale=1)
    for index in (2, 3):
        torch.testing.assert_close(got[index].double(), expected[index], rtol=2e-2, atol=0)


def test_large_logits_do_not_overflow():
    x, weight, targets = random_inputs(dtype=torch.float32)
    got = run(linear_cross_entropy, 1e3 * x, weight, targets, chunk_tokens=8)
    expected = run(linear_cross_entropy_naive, 1e3 * x, weight, targets)
    assert_same(got, expected, 1e-3)


@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_to_predict_gives_zero_gradients(tokens):
    x, weight, _ = random_inputs(tokens=tokens, ignored=False)
    loss, count, dx, dweight = run(linear_cross_entropy, x, weight, torch.full((tokens,), -100), chunk_tokens=4)
    assert loss == 0 and count == 0
    assert torch.equal(dx, torch.zeros_like(x)) and torch.equal(dweight, torch.zeros_like(weight))


def test_views_are_accepted():
    x, weight, targets = random_inputs()
    wide_x, wide_weight = torch.cat([x, x], 1), torch.cat([weight, weight], 1).t().contiguous().t()
    got = run(linear_cross_entropy, wide_x[:, : x.shape[1]], wide_weight[:, : x.shape[1]], targets, chunk_tokens=8)
    assert_same(got, run(linear_cross_entropy_naive, x, weight, targets))


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_input_without_gradient(frozen):
    x, weight, targets = random_inputs()
    expected = run(linear_cross_entropy_naive, x, weight, targets)[3 - frozen]
    trained = (x, weight)[1 - frozen].requires_grad_()
    loss, _ = linear_cross_entropy(x, weight, targets)
    (got,) = torch.autograd.grad(0.7 * loss, [trained])
    torch.testing.assert_close(got, expected)


def test_gradients_add_up_over_calls_and_under_checkpoint():
    x, weight, targets = random_inputs()
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    for _ in range(2):
        loss, _ = checkpoint(linear_cross_entropy, *leaves, targets, chunk_tokens=8, use_reentrant=False)
        loss.backward()
    expected = run(linear_cross_entropy_naive, x, weight, targets, scale=2)
    for leaf, gradient in zip(leaves, expected[2:], strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_second_backward_is_refused():
    x, weight, targets = random_inputs()
    loss, _ = linear_cross_entropy(x.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, and counts matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_logits_of_all_tokens_never_exist():
    tokens, dim, vocabulary = 64, 4, 100
    x, weight, targets = random_inputs(tokens, dim, vocabulary, ignored=False)
    with Sizes() as sizes:
        run(linear_cross_entropy, x, weight, targets, chunk_tokens=8)
    assert sizes.largest == 8 * vocabulary
    with Sizes() as sizes:
        run(linear_cross_entropy_naive, x, weight, targets)
    assert sizes.largest == tokens * vocabulary  # the measure sees what it should


@pytest.mark.parametrize(("grad", "products"), [(True, 3 * 4), (False, 4)])
def test_evaluation_makes_no_gradients(grad, products):
    x, weight, targets = random_inputs(tokens=16, ignored=False)
    with torch.set_grad_enabled(grad), Sizes() as sizes:
        loss, _ = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets, chunk_tokens=4)
    assert sizes.products == products and loss.requires_grad == grad


def test_rows_without_loss_cost_nothing():
    x, weight, targets = random_inputs(tokens=16, ignored=False)
    targets[3:] = -100
    with Sizes() as sizes:
        run(linear_cross_entropy, x, weight, targets, chunk_tokens=4)
    assert sizes.products == 3


@pytest.mark.parametrize("wrong", [52, -1, -101, 10**9])
def test_target_outside_the_vocabulary_is_refused(wrong):
    x, weight, targets = random_inputs()
    targets[7] = wrong
    with pytest.raises(ValueError, match=rf"target {wrong} of token 7 is not in the vocabulary \(0..51\)"):
        linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, t: (x[:, :-1], w, t), "expected x"),
        (lambda x, w, t: (x, w, t[:-1]), "expected x"),
        (lambda x, w, t: (x.float(), w, t), "one dtype"),
        (lambda x, w, t: (x, w, t.int()), "int64 targets"),
    ],
)
def test_shapes_and_dtypes_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(*random_inputs()))


@pytest.mark.parametrize(("argument", "value"), [("chunk_tokens", 0), ("rank_offset", 1)])
def test_arguments_are_checked(argument, value):
    with pytest.raises(ValueError, match=argument):
        linear_cross_entropy(*random_inputs(), **{argument: value})


# ---- vocabulary cut over ranks -------------------------------------------------------------------------------------


def rank_cases():
    """Inputs that hurt: ranks that own no target, a token that only one rank can see, no token at all."""
    x, weight, targets = random_inputs()
    far = weight.clone()
    far[13:] -= 100 * x.sum(0, keepdim=True).sign()  # most of the softmax underflows on every rank but the first
    return {
        "mixed": (x, weight, targets),
        "one-owner": (x, weight, targets.clamp(max=5)),
        "far": (x, far, targets),
        "no-loss": (x, weight, torch.full_like(targets, -100)),
        "no-tokens": (x[:0], weight, targets[:0]),
    }


RANKS = 4


def run_rank(rank, folder):
    """One of four processes: shares the vocabulary with all of them, then with its neighbour only."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    arguments = dict(rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **arguments)
    try:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        results = {}
        for size, group in ((4, dist.group.WORLD), (2, pairs[rank // 2])):
            for name, (x, weight, targets) in rank_cases().items():
                rows = weight.shape[0] // size
                offset = rank % size * rows
                part = weight[offset : offset + rows]
                kwargs = dict(group=group, rank_offset=offset, chunk_tokens=8)
                results[size, name] = run(linear_cross_entropy, x, part, targets, **kwargs)
                with torch.no_grad():
                    loss, _ = linear_cross_entropy(x, part, targets, **kwargs)
                torch.testing.assert_close(loss, results[size, name][0])
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_cut_vocabulary_equals_one_process(tmp_path):
    # processes forked from one that has imported torch, instead of four imports
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch"])
    start_processes(run_rank, args=(str(tmp_path),), nprocs=RANKS, start_method="forkserver")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for name, inputs in rank_cases().items():
        loss, count, dx, dweight = run(linear_cross_entropy_naive, *inputs)
        for rank, result in enumerate(results):
            for size in (4, 2):
                expected = [loss, count, dx, dweight.chunk(size)[rank % size]]
                assert_same(result[size, name], expected, 1e-11)
