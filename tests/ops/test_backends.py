"""Choice of the attention implementation, with packages and devices faked."""

from types import SimpleNamespace

import pytest
import torch

from megayoco.errors import UserError
from megayoco.ops import backends
from megayoco.ops.attention import causal_attention_naive


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    remembered = backends._passes_check
    remembered.cache_clear()
    yield
    remembered.cache_clear()


def fake(monkeypatch, *, installed=(), working=("flash_attn", "torch_flash")):
    monkeypatch.setattr(backends, "is_installed", lambda package: package in installed)
    monkeypatch.setattr(backends, "_passes_check", lambda name, *_: name in working)


def queries(device="cuda", dtype=torch.bfloat16, head_dim=64):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 8, 2, head_dim))


@pytest.mark.parametrize(
    ("choice", "installed", "working", "q", "options", "expected"),
    [
        ("auto", [], ["torch_flash"], queries("cpu", torch.float32), {}, "cpu_flash"),
        ("auto", ["flash_attn"], ["flash_attn"], queries("cpu"), {}, "cpu_flash"),
        ("auto", [], ["torch_flash"], queries(), {}, "torch_flash"),
        ("auto", [], [], queries(), {}, "math"),
        ("auto", ["flash_attn"], ["flash_attn", "torch_flash"], queries(), {}, "flash_attn"),
        ("auto", ["flash_attn"], ["flash_attn", "torch_flash"], queries(), {"square": True}, "torch_flash"),
        ("auto", ["flash_attn"], ["flash_attn", "torch_flash"], queries(), {"documents": True}, "torch_flash"),
        ("auto", ["flash_attn"], ["torch_flash"], queries(), {}, "torch_flash"),
        ("auto", ["flash_attn"], ["flash_attn"], queries(dtype=torch.float32), {}, "math"),
        ("auto", ["flash_attn"], ["flash_attn"], queries(head_dim=12), {}, "math"),
        ("torch", ["flash_attn"], ["flash_attn", "torch_flash"], queries(), {}, "torch_flash"),
        ("flash_attn", ["flash_attn"], ["flash_attn", "torch_flash"], queries(), {"square": True}, "flash_attn"),
        ("flash_attn", ["flash_attn"], ["flash_attn"], queries(dtype=torch.float32), {}, "math"),
    ],
)
def test_choice(monkeypatch, choice, installed, working, q, options, expected):
    fake(monkeypatch, installed=installed, working=working)
    monkeypatch.setenv(backends.VARIABLE, choice)
    assert backends.attention_backend(q, None, **options) == expected


def test_a_choice_that_cannot_be_followed_is_an_error(monkeypatch):
    fake(monkeypatch)
    monkeypatch.setenv(backends.VARIABLE, "fa9")
    with pytest.raises(UserError, match="MEGAYOCO_ATTENTION=fa9 is unknown: set it to one of auto, torch, flash_attn"):
        backends.describe_backends()
    monkeypatch.setenv(backends.VARIABLE, "flash_attn")
    with pytest.raises(UserError, match="not installed"):
        backends.describe_backends("cuda")
    fake(monkeypatch, installed=["flash_attn"], working=["torch_flash"])
    with pytest.raises(UserError, match="needs a CUDA device"):
        backends.describe_backends("cpu")
    with pytest.raises(UserError, match="failed its self-check"):
        backends.attention_backend(queries(), None)


@pytest.mark.parametrize("choice", ["auto", "torch", "flash_attn"])
def test_the_description_names_every_operation(monkeypatch, choice):
    fake(monkeypatch, installed=["flash_attn", "fla"])
    monkeypatch.setenv(backends.VARIABLE, choice)
    described = backends.describe_backends("cuda")
    assert list(described) == ["attention", "retention", "cross entropy", "rotary and norm", "optional packages"]
    assert ("flash_attn" in described["attention"]) == (choice != "torch")
    assert described["optional packages"] == "flash_attn, fla"


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
