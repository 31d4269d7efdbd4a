"""Training in bands on a GPU: the gradients of the plain model, the same bits every time, memory as estimated."""

from __future__ import annotations

import pytest
import torch

from megayoco.config import ModelConfig
from megayoco.model.bands import Bands, banded_loss
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.train.activations import Work, step_activations, whole_model
from tests.model.cases import Batch, batch, gradients

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIXERS = {"retention": dict(self_heads=4), "window": dict(self_mixer="window", window=200, self_heads=8)}


def decoder(mixer: str, dtype: torch.dtype, **shape: int) -> Decoder:
    sizes = {"dim": 512, "layers": 4, "hidden_dim": 768, "heads": 8, "kv_heads": 2, "vocab_size": 40, **shape}
    return build_decoder(ModelConfig(**sizes, **MIXERS[mixer]), None, dtype=dtype).to(DEVICE)  # type: ignore[arg-type]


def on_device(data: Batch) -> Batch:
    return tuple(None if x is None else x.to(DEVICE) for x in data)  # type: ignore[return-value]


@pytest.mark.parametrize("order", ["fused", "split"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_fp32_gradients_equal_the_plain_models(mixer: str, order: str) -> None:
    model, data = decoder(mixer, torch.float32), on_device(batch(2048, share=0.5))
    plain = gradients(model, model(*data)[0])
    got = gradients(model, banded_loss(model.stage(), Bands(4, order=order, rows=300), *data)[0])
    for name, expected in plain.items():
        assert (got[name] - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16_gradients_of_many_chunks_are_as_near_as_those_of_one(mixer: str) -> None:
    data = on_device(batch(4096, rows=1))
    wide, narrow = decoder(mixer, torch.float32), decoder(mixer, torch.bfloat16)
    exact = gradients(wide, wide(*data)[0])
    plain = gradients(narrow, narrow(*data)[0])
    got = gradients(narrow, banded_loss(narrow.stage(), Bands(32), *data)[0])
    ratios = {name: float((got[name] - x).norm() / (plain[name] - x).norm()) for name, x in exact.items()}
    assert sum(ratios.values()) / len(ratios) < 1.15, ratios


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_second_step_is_bit_equal_with_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch, mixer: str) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, data = decoder(mixer, torch.bfloat16), on_device(batch(2048, share=0.5))
    torch.use_deterministic_algorithms(True)
    try:
        steps = [gradients(model, banded_loss(model.stage(), Bands(4), *data)[0]) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, first in steps[0].items():
        assert first.isfinite().all() and torch.equal(first, steps[1][name]), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_peak_memory_is_as_estimated(mixer: str) -> None:
    model = decoder(mixer, torch.bfloat16, vocab_size=4096)
    stage, tokens, bands = model.stage(), 1 << 17, 16
    ids = torch.randint(0, 4096, (1, tokens), device=DEVICE)
    banded_loss(stage, Bands(2), ids[:, :4096], ids[:, :4096], None)[0].backward()  # kernels have their workspaces
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    banded_loss(stage, Bands(bands), ids, ids, None)[0].backward()
    work = Work(model=model.config, batch=1, length=tokens, width=2, bands=bands, gpu=True)
    sizes = [float(sum(p.numel() for p in part)) for part in (stage.self_parameters(), stage.cross_parameters())]
    expected = step_activations(work, whole_model(model.config), (sizes[0], sizes[1])).total - 24 * tokens
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected, rel=0.15)
