"""An export gives back exactly what went in, and says what is wrong with a folder that it cannot be read from."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megayoco.convert.export import read_export, tensor_shapes, write_export
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError
from megayoco.generate.loading import load_decoder
from megayoco.model.inference import InferenceModel
from megayoco.model.parameters import shards_of
from megayoco.presets import PRESETS
from tests.generate.models import MODELS, SHAPE, build, weights


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An export that no test changes."""
    folder = tmp_path_factory.mktemp("written") / "export"
    write_export(folder, MODELS["retention"], weights(build("retention")), ByteTokenizer(), facts={"step": 7})
    return folder


@pytest.fixture
def export(written, tmp_path):
    """An export to damage."""
    return shutil.copytree(written, tmp_path / "export")


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_built_model(name):
    assert tensor_shapes(MODELS[name]) == {key: shard.full for key, shard in shards_of(build(name)).items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_add_up_to_the_parameter_count(preset):
    model = type(MODELS["llama"])(preset=preset)
    total = sum(torch.Size(shape).numel() for shape in tensor_shapes(model).values())
    assert total == model.parameter_count()["total"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(name, dtype, tmp_path):
    decoder = build(name, dtype)
    write_export(tmp_path / "a" / "export", MODELS[name], weights(decoder), ByteTokenizer(), facts={"loss": 1.5})
    shutil.move(tmp_path / "a" / "export", tmp_path / "moved")
    export = read_export(tmp_path / "moved")
    assert export.model == MODELS[name]
    assert export.tokenizer.identity() == ByteTokenizer().identity()
    assert export.facts == {"loss": 1.5}
    loaded = load_decoder(export, dtype, torch.device("cpu"))
    assert not loaded.training
    for got in (dict(export.tensors), weights(loaded)):
        assert got.keys() == weights(decoder).keys()
        for key, expected in weights(decoder).items():
            assert got[key].dtype == dtype
            assert torch.equal(got[key], expected), key
    tied = MODELS[name].tie_embeddings
    assert ("lm_head.weight" in export.tensors) is not tied
    assert (loaded.head.weight is loaded.embed_tokens.weight) is tied
    tokens = torch.arange(30)[None]
    models = [InferenceModel.of(module) for module in (decoder, loaded)]
    logits = [model.advance(tokens, model.empty_context(), last_only=False)[0] for model in models]
    assert torch.equal(*logits)


def test_the_file_is_plain_safetensors(written):
    raw = (written / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["layers.1.mixer.gt_proj.weight"]["shape"] == [2, 32]
    config = json.loads((written / "config.json").read_text())
    assert (config["format"], config["version"], config["facts"]) == ("megayoco", 2, {"step": 7})
    assert config["model"]["self_heads"] == 2
    assert {path.name for path in written.parent.iterdir()} == {"export"}


def test_weights_are_converted_on_loading(written):
    decoder = load_decoder(read_export(written), torch.float64, torch.device("cpu"))
    for name, value in weights(build("retention")).items():
        assert torch.equal(weights(decoder)[name], value.double())


def test_a_tied_head_and_strided_tensors_are_written_all_the_same(tmp_path):
    tensors = weights(build("window"))
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    tensors["shared_kv.k_proj.weight"] = tensors["shared_kv.k_proj.weight"].t().contiguous().t()
    write_export(tmp_path / "export", MODELS["window"], tensors, ByteTokenizer())
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["shared_kv.k_proj.weight"], tensors["shared_kv.k_proj.weight"])


def test_an_older_export_is_replaced(export):
    before = read_export(export)
    old = before.tensors["norm.weight"].clone()
    write_export(export, MODELS["llama"], weights(build("llama", seed=4)), ByteTokenizer())
    assert read_export(export).model.pattern == "llama"
    assert {path.name for path in export.parent.iterdir()} == {"export"}
    # the mapped file of the reader is still the old one
    assert torch.equal(before.tensors["norm.weight"], old)


def test_a_failed_write_leaves_the_older_export(export, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    tokenizer = ByteTokenizer()
    monkeypatch.setattr(tokenizer, "save", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_export(export, MODELS["llama"], weights(build("llama")), tokenizer)
    assert read_export(export).model == MODELS["retention"]
    assert {path.name for path in export.parent.iterdir()} == {"export"}


def test_what_is_no_export_is_not_overwritten(export, tmp_path):
    arguments = (MODELS["retention"], weights(build("retention")), ByteTokenizer())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="not an export of ours"):
        write_export(tmp_path / "other", *arguments)
    with pytest.raises(UserError, match="is a file"):
        write_export(tmp_path / "other" / "config.json", *arguments)
    (export / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds an export and notes\.txt"):
        write_export(export, *arguments)
    (tmp_path / "empty").mkdir()
    write_export(tmp_path / "empty", *arguments)
    read_export(tmp_path / "empty")


def test_tensors_of_another_model_are_not_written(tmp_path):
    tensors = weights(build("retention"))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight comes with shape \(264, 32\), not \(264, 64\)"):
        write_export(tmp_path / "e", type(MODELS["llama"])(**SHAPE | {"dim": 64}), tensors, ByteTokenizer())
    del tensors["layers.3.mixer.out_proj.weight"]
    with pytest.raises(ValueError, match=r"first layers\.3\.mixer\.out_proj\.weight: it is missing"):
        write_export(tmp_path / "e", MODELS["retention"], tensors, ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def refused(folder, *parts):
    with pytest.raises(UserError) as caught:
        read_export(folder)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_parts(export):
    refused(export / "nowhere", "nowhere/config.json", "No such file")
    (export / "tokenizer" / "megayoco_tokenizer.json").unlink()
    refused(export, "megayoco_tokenizer.json")
    ByteTokenizer().save(export / "tokenizer")
    (export / "model.safetensors").unlink()
    refused(export, "holds no weights", "model.safetensors")
    (export / "config.json").unlink()
    refused(export, "config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "header too small"),
        (lambda raw: b"\xff" * 8 + raw[8:], "header too large"),
        (lambda raw: raw[:8] + b"#" + raw[9:], "invalid JSON in header"),
        (lambda raw: raw[:-5], "not fully covered"),
    ],
    ids=["empty", "length", "header", "cut short"],
)
def test_damaged_weights(export, damage, message):
    path = export / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(export, f"{path} is damaged or no safetensors file", message, "Copy it again")


def test_tensors_that_do_not_fit(export):
    path = export / "model.safetensors"
    tensors = load_file(path)
    value = tensors.pop("shared_kv.v_proj.weight")
    save_file(tensors, path)
    refused(export, f"{path} lacks the tensor shared_kv.v_proj.weight.")
    del tensors["norm.weight"]
    save_file(tensors, path)
    refused(export, "lacks the tensor norm.weight, shared_kv.v_proj.weight.")
    tensors |= {"norm.weight": torch.ones(32), "shared_kv.v_proj.weight": value, "extra.weight": torch.ones(1)}
    save_file(tensors, path)
    refused(export, "the model lacks", "extra.weight")
    del tensors["extra.weight"]
    save_file(tensors | {"norm.weight": torch.ones(31)}, path)
    refused(export, "norm.weight has shape (31,)", "(32,)")


def test_configs_that_are_not_ours_or_do_not_fit(export):
    path = export / "config.json"
    good = path.read_text()
    model = json.loads(good)["model"]
    edit(path, model=model | {"windov": 3})
    refused(export, str(path), "windov")
    edit(path, model="yoco")
    refused(export, "no section `model`")
    edit(path, model=model, version=3)
    refused(export, "version 3", "reads 1 and 2")
    edit(path, format="pt")
    refused(export, "does not describe an export of MegaYOCO")
    path.write_text("{")
    refused(export, "not JSON")
    path.write_text(json.dumps(json.loads(good) | {"model": model | {"vocab_size": 256}}))
    refused(export, "tokenizer has 257 ids", "256")
