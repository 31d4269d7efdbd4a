"""Presets against the published parameter counts (YOCO, arXiv 2405.05254, appendix D)."""

import pytest

from megayoco.config import ModelConfig, ParallelConfig
from megayoco.presets import PAPER_VOCABULARY, PRESETS

# millions of parameters without the two vocabulary matrices: YOCO with retention, YOCO with window, Transformer
PUBLISHED = {
    "160m": (90, 86, 85),
    "400m": (317, 304, 302),
    "830m": (713, 684, 680),
    "1.4b": (1267, 1216, 1208),
    "2.7b": (2635, 2530, 2517),
    "6.8b": (6746, 6476, 6442),
    "13b": (13162, 12636, 12583),
}


def body(**fields):
    return ModelConfig(**fields).parameter_count()["body"]


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    retention, window, transformer = PUBLISHED[size]
    assert round(body(preset=f"yoco-{size}") / 1e6) == retention
    assert round(body(preset=f"yoco-{size}", self_mixer="window") / 1e6) == window
    # half a million for the table's own rounding, 0.02 % for hidden_dim as a multiple of 8
    assert body(preset=f"llama-{size}") / 1e6 == pytest.approx(transformer, abs=0.5 + 2e-4 * transformer)


def test_yoco_3b_to_the_last_parameter():
    count = ModelConfig(preset="yoco-3b").parameter_count()
    assert count == {"body": 2_829_133_824, "embedding": 2 * 308_084_736, "total": 3_445_303_296}
    tied = ModelConfig(preset="yoco-3b", tie_embeddings=True).parameter_count()
    assert tied == {"body": 2_829_133_824, "embedding": 308_084_736, "total": 3_137_218_560}


def test_a_tiny_model_counted_by_hand():
    fields = {"dim": 8, "layers": 2, "hidden_dim": 12, "heads": 4, "self_heads": 2, "kv_heads": 2, "vocab_size": 10}
    feed_forward_and_norms = 3 * 8 * 12 + 2 * 8
    retention, cross = 5 * 64 + 2 * 8, 2 * 64
    shared_kv, final_norm = 2 * (2 * 2) * 8 + 8, 8
    assert body(**fields) == retention + cross + 2 * feed_forward_and_norms + shared_kv + final_norm
    full = 2 * 64 + 2 * (2 * 2) * 8
    fields = {**fields, "pattern": "llama", "self_heads": None}
    assert body(**fields) == 2 * (full + feed_forward_and_norms) + final_norm


@pytest.mark.parametrize("size", ["tiny", "3b"])
def test_the_llama_of_a_size_is_as_large_as_its_yoco(size):
    assert body(preset=f"llama-{size}") == pytest.approx(body(preset=f"yoco-{size}"), rel=2e-3)


@pytest.mark.parametrize("size", PUBLISHED)
def test_retention_has_head_dim_256_in_the_scaling_models(size):
    assert ModelConfig(preset=f"yoco-{size}").self_head_dim == 256


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model_that_tensor_parallelism_can_cut(name):
    model = ModelConfig(preset=name)
    # the heads of gated retention set the limit: 3, 6 and 10 of them are not divisible by 4
    largest = {"yoco-160m": 1, "yoco-830m": 2, "yoco-2.7b": 2}.get(name, 4)
    ParallelConfig(tensor=largest).validate(model, largest)
    assert model.vocab_size == (4352 if "tiny" in name else PAPER_VOCABULARY)


def test_given_fields_win_over_the_preset():
    model = ModelConfig(preset="yoco-160m", layers=6, self_mixer="window", window=32)
    assert (model.dim, model.layers, model.window) == (768, 6, 32)
    assert ModelConfig(preset="yoco-160m", self_mixer="window").window == 1024
    assert ModelConfig(preset="yoco-160m").window is None
    llama = ModelConfig(preset="yoco-160m", pattern="llama")
    assert (llama.layer_pattern(), llama.self_heads) == (["full"] * 12, None)
