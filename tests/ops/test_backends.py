"""Choice of the attention implementation, with packages and devices faked."""

from types import SimpleNamespace

import pytest
import torch

from megayoco.errors import UserError
from megayoco.ops import attention_tiles, backends
from megayoco.ops.attention import causal_attention_naive

FLASH, CUDNN = "torch_flash", "torch_cudnn"
ALL = ("fa3", CUDNN, FLASH, "flash_attn", "cudnn_frontend")


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    remembered = backends._serving, backends._passes_check
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def fake(monkeypatch, *, installed=(), working=ALL, capability=9):
    monkeypatch.setattr(backends, "is_installed", lambda package: package in installed)
    monkeypatch.setattr(backends, "_passes_check", lambda name, *_: name in working)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))


def queries(device="cuda", dtype=torch.bfloat16, head_dim=64):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 8, 2, head_dim))


@pytest.mark.parametrize(
    ("choice", "world", "q", "window", "expected"),
    [
        ("auto", {}, queries("cpu", torch.float32), None, "cpu_flash"),
        ("math", {}, queries("cpu", torch.float32), None, "math"),
        ("auto", {}, queries("meta"), None, "math"),
        ("auto", {}, queries(), None, CUDNN),
        ("auto", {}, queries(), 9, FLASH),
        ("auto", {}, queries(head_dim=256), None, FLASH),
        ("auto", dict(capability=8), queries(), None, FLASH),
        ("auto", dict(working=[FLASH]), queries(), None, FLASH),
        ("auto", dict(working=[CUDNN]), queries(), None, "math"),
        ("auto", dict(working=[]), queries(), None, "math"),
        ("auto", {}, queries(dtype=torch.float32), None, "math"),
        ("auto", {}, queries(head_dim=12), None, CUDNN),
        ("auto", {}, queries(head_dim=260), None, "math"),
        ("auto", dict(installed=["flash_attn_interface"]), queries(), None, "fa3"),
        ("auto", dict(installed=["flash_attn_interface"]), queries(), 9, "fa3"),
        ("auto", dict(installed=["flash_attn_interface"], capability=8), queries(), None, FLASH),
        ("auto", dict(installed=["flash_attn_interface"], working=[CUDNN, FLASH]), queries(), None, CUDNN),
        ("auto", dict(installed=["flash_attn", "cudnn"]), queries(), 9, FLASH),
        (FLASH, dict(installed=["flash_attn_interface"]), queries(), None, FLASH),
        (CUDNN, dict(installed=["flash_attn_interface"]), queries(), 9, "fa3"),
        ("flash_attn", dict(installed=["flash_attn"]), queries(), None, "flash_attn"),
        ("flash_attn", dict(installed=["flash_attn"]), queries(dtype=torch.float32), None, "math"),
        ("cudnn_frontend", dict(installed=["cudnn"]), queries(), 9, "cudnn_frontend"),
        ("math", {}, queries(), None, "math"),
    ],
)
def test_choice(monkeypatch, choice, world, q, window, expected):
    fake(monkeypatch, **world)
    monkeypatch.setenv(backends.VARIABLE, choice)
    assert backends.attention_backend(q, window) == expected


def test_deterministic_algorithms_rule_out_torchs_cudnn_kernel(monkeypatch):
    fake(monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        assert backends.attention_backend(queries(), None) == FLASH
    finally:
        torch.use_deterministic_algorithms(False)
    assert backends.attention_backend(queries(), None) == CUDNN


@pytest.mark.parametrize(
    ("choice", "device", "message"),
    [
        ("fa9", "cpu", "MEGAYOCO_ATTENTION=fa9 is unknown: set it to one of auto, cpu_flash, math, fa3"),
        ("flash_attn", "cuda", "flash_attn is not installed"),
        ("fa3", "cuda", "flash_attn_interface is not installed"),
        (FLASH, "cpu", "needs a CUDA device, the run uses cpu: set it to one of auto, cpu_flash, math"),
        ("cpu_flash", "cuda", "needs the CPU, the run uses cuda"),
    ],
)
def test_a_choice_that_can_never_be_followed_is_an_error_at_the_start(monkeypatch, choice, device, message):
    fake(monkeypatch)
    monkeypatch.setenv(backends.VARIABLE, choice)
    with pytest.raises(UserError, match=message):
        backends.describe_backends(device)


def test_a_chosen_kernel_that_does_not_run_is_an_error(monkeypatch):
    fake(monkeypatch, working=[FLASH])
    monkeypatch.setenv(backends.VARIABLE, CUDNN)
    with pytest.raises(UserError, match=r"torch_cudnn does not run here for torch\.bfloat16, head dim 64: unset it"):
        backends.attention_backend(queries(), None)


def test_the_description_names_every_operation(monkeypatch):
    fake(monkeypatch, installed=["flash_attn_interface", "fla"])
    described = backends.describe_backends("cuda")
    assert list(described) == ["attention", "retention", "cross entropy", "rotary and norm", "optional packages"]
    assert described["attention"] == "fa3, else torch_cudnn, else torch_flash, else math (fp16, bf16); math (fp32)"
    assert described["optional packages"] == "flash_attn_interface, fla"
    fake(monkeypatch, capability=8)
    assert backends.describe_backends("cuda")["attention"].startswith("torch_flash, else math (fp16")
    assert backends.describe_backends("cpu")["attention"] == "cpu_flash"
    monkeypatch.setenv(backends.VARIABLE, "math")
    assert backends.describe_backends("cpu")["attention"] == "math, by MEGAYOCO_ATTENTION"


@pytest.mark.parametrize("window", [None, 100])
def test_the_self_check_sees_a_wrong_mask_and_a_wrong_gradient(window):
    def right(q, k, v, scale, window):
        return causal_attention_naive(q, k, v, scale=scale, window=window)

    def one_token_more(q, k, v, scale, window):
        return right(q, k, v, scale, (window or 200) + 1)

    def no_key_gradient(q, k, v, scale, window):
        return right(q, k.detach() + 0 * k, v, scale, window)

    def error(form):
        return backends.self_check_error(form, torch.device("cpu"), torch.bfloat16, 16, window)

    assert error(right) < 1e-2
    assert error(one_token_more) > backends.TOLERANCE
    assert error(no_key_gradient) > backends.TOLERANCE


def test_a_backend_that_does_not_run_is_not_used():
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="does not run here and is not used"):
        assert not backends._passes_check("torch_flash", cpu, torch.bfloat16, 16, True)
    assert backends._passes_check("cpu_flash", cpu, torch.bfloat16, 16, True)
    assert backends._passes_check("math", cpu, torch.bfloat16, 16, False)


def test_a_wrong_kernel_stops_the_run_with_a_remedy(monkeypatch):
    def wrong(q, k, v, tile):
        out, lse = attention_tiles._cpu_flash_forward(q, k, v, tile)
        return out * 1.1, lse

    monkeypatch.setitem(attention_tiles.OPERATORS, "cpu_flash", (wrong, attention_tiles._cpu_flash_backward))
    with pytest.raises(UserError, match=r"cpu_flash is wrong here \(relative .*\): set MEGAYOCO_ATTENTION=math"):
        backends._passes_check("cpu_flash", torch.device("cpu"), torch.bfloat16, 16, False)
