"""The configuration: what it derives and what it refuses."""

from __future__ import annotations

import pytest
from transformers import DynamicCache

from megayoco.hf.configuration_megayoco import MegaYocoConfig
from tests.hf.models import MODELS, hf_config


def test_the_cache_follows_from_the_config():
    config = hf_config(MODELS["window"], num_self_layers=1)
    assert config.layer_types == ["sliding_attention"] + ["full_attention"] * 3
    assert config.kv_sharing_modes == [None, "store", "reuse", "reuse"]
    kinds = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "DynamicLayer", "DummyLayer", "DummyLayer"]
    assert DynamicCache(config=config).layers[0].sliding_window == 7
    assert hf_config(MODELS["retention"]).layer_types[:2] == ["linear_attention"] * 2


def test_a_saved_config_comes_back(tmp_path):
    # values that are defaults of the class, of other fields and of none
    config = hf_config(MODELS["tied"], num_hidden_layers=14, num_self_layers=13, eos_token_id=[2, 5], bos_token_id=0)
    config.save_pretrained(tmp_path)
    loaded = MegaYocoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "transformers_version": None} == {**config.to_dict(), "transformers_version": None}
    assert (loaded.num_self_layers, loaded.num_key_value_heads, loaded.rope_theta) == (13, 4, 10000.0)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("retention", dict(self_mixer="mamba"), "self_mixer must be one of retention, window, got 'mamba'"),
        ("retention", dict(sliding_window=7), "sliding_window belongs to self_mixer window, got 7"),
        ("window", dict(sliding_window=None), "sliding_window must be a positive integer, got None"),
        ("window", dict(sliding_window=1), "sliding_window must be at least 2"),
        ("window", dict(num_hidden_layers=0), "num_hidden_layers must be a positive integer, got 0"),
        ("window", dict(num_self_layers=4), "num_self_layers must leave a cross layer"),
        ("window", dict(num_self_layers=None), "num_self_layers must be a positive integer"),
        ("window", dict(num_self_heads=3), "num_self_heads must cut hidden_size 32"),
        ("window", dict(num_attention_heads=32, num_key_value_heads=32), "num_attention_heads must cut hidden_size 32"),
        ("window", dict(num_key_value_heads=3), "num_key_value_heads must divide num_attention_heads 4, got 3"),
        ("window", dict(rope_theta=0), "rope_theta must be a positive number, got 0"),
        ("window", dict(rope_theta={"factor": 2}), "rope_theta must be a positive number"),
        ("window", dict(rope_scaling={"rope_type": "yarn", "factor": 2}), "rope_scaling is not supported"),
        ("window", dict(rms_norm_eps="small"), "rms_norm_eps must be a positive number, got 'small'"),
        ("window", dict(vocab_size=True), "vocab_size must be a positive integer, got True"),
        ("window", dict(layer_types=["full_attention"] * 4), "layer_types contradicts self_mixer 'window'"),
    ],
)
def test_impossible_configs_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        hf_config(MODELS[model], **changes)
