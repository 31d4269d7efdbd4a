"""Safetensors files written as a stream are what the safetensors library writes, and appear whole or not at all."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megayoco.convert.export import read_export, write_export
from megayoco.convert.folder import check_destination, whole_folder
from megayoco.convert.weights import Cast, HeldTensors
from megayoco.convert.writing import write_safetensors
from megayoco.errors import UserError
from tests.convert.models import assert_same, listing, random_weights


def mixed():
    values = torch.arange(40, dtype=torch.float32)
    return HeldTensors(
        {
            "a": values[:3].to(torch.bfloat16),
            "b": values[:6].view(2, 3),
            "c": values[:5].to(torch.float16),
            "d": values.double().view(8, 5).t(),  # not contiguous
            "e": values[7],
        }
    )


def test_one_file_of_mixed_dtypes(tmp_path):
    tensors = mixed()
    assert write_safetensors(tmp_path, tensors) == ["model.safetensors"]
    assert listing(tmp_path) == {"model.safetensors"}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_their_index(tmp_path):
    tensors = mixed()
    files = write_safetensors(tmp_path, tensors, shard_bytes=40)
    # 6 + 24 bytes; 10; 320 alone, although too large; 4
    shards = [["a", "b", "c"], ["d"], ["e"]]
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    index = json.loads((tmp_path / files[-1]).read_text())
    assert index["metadata"] == {"total_size": 364, "total_parameters": 3 + 6 + 5 + 40 + 1}
    assert index["weight_map"] == {name: file for file, names in zip(files, shards, strict=False) for name in names}
    for file, names in zip(files, shards, strict=False):
        assert sorted(load_file(tmp_path / file)) == names


class Watched(dict):
    """Tensors that are told by dtype, and a log of what is asked for."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return super().__getitem__(name)

    def dtype(self, name):
        return torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_every_tensor_is_asked_for_once_in_order(tmp_path, dtype):
    weights = random_weights("retention")
    tensors = Watched(weights.tensors)
    write_export(
        tmp_path / "e", weights.model, tensors, weights.tokenizer, facts=weights.facts, dtype=dtype, shard_bytes=30000
    )
    assert tensors.asked == list(weights.tensors)
    assert len(list((tmp_path / "e").glob("*.safetensors"))) >= 4
    found = read_export(tmp_path / "e")
    assert_same(found, weights if dtype is None else weights._replace(tensors=Cast(weights.tensors, dtype)))
    assert found.facts == weights.facts


def test_a_tensor_of_another_kind_than_told_leaves_nothing(tmp_path):
    weights = random_weights("retention")
    tensors = Watched(weights.tensors)
    tensors["norm.weight"] = tensors["norm.weight"].double()
    with pytest.raises(ValueError, match=r"norm\.weight comes with dtype torch\.float64, not torch\.float32"):
        write_export(tmp_path / "e", weights.model, tensors, None)
    assert listing(tmp_path) == set()


def test_an_export_without_tokenizer(tmp_path):
    weights = random_weights("window")._replace(tokenizer=None)
    write_export(tmp_path / "e", weights.model, weights.tensors, None)
    assert listing(tmp_path / "e") == {"config.json", "model.safetensors"}
    assert read_export(tmp_path / "e").tokenizer is None
    assert_same(read_export(tmp_path / "e"), weights)


def test_exports_of_version_1_are_read(tmp_path):
    weights = random_weights("retention")
    write_export(tmp_path / "e", weights.model, weights.tensors, weights.tokenizer)
    path = tmp_path / "e" / "config.json"
    config = json.loads(path.read_text())
    del config["tokenizer"]
    path.write_text(json.dumps(config | {"version": 1}))
    assert read_export(tmp_path / "e").tokenizer.identity() == weights.tokenizer.identity()
    shutil.rmtree(tmp_path / "e" / "tokenizer")
    with pytest.raises(UserError, match="megayoco_tokenizer"):
        read_export(tmp_path / "e")


def test_a_smaller_export_leaves_no_shard_of_the_older(tmp_path):
    weights = random_weights("retention")
    for shard_bytes in (30000, 5 * 10**9):
        write_export(tmp_path / "e", weights.model, weights.tensors, weights.tokenizer, shard_bytes=shard_bytes)
    assert listing(tmp_path / "e") == {"config.json", "model.safetensors", "tokenizer"}
    assert listing(tmp_path) == {"e"}


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    weights = random_weights("retention")
    write_export(tmp_path / "e", weights.model, weights.tensors, weights.tokenizer)
    size = weights.model.parameter_count()["total"] * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    tensors = Watched(weights.tensors)
    with pytest.raises(UserError, match=f"weights of e needs {size:,} bytes, but the disk has {size - 1:,} left"):
        write_export(tmp_path / "e", weights.model, tensors, weights.tokenizer)
    assert tensors.asked == []
    assert listing(tmp_path) == {"e"}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size))
    write_export(tmp_path / "e", weights.model, tensors, weights.tokenizer)


def test_an_interrupted_write_leaves_the_older_folder(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "old").touch()

    def write():
        with whole_folder(tmp_path / "e", "the model") as folder:
            (folder / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert listing(tmp_path) == {"e"}
    assert listing(tmp_path / "e") == {"old"}


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    (tmp_path / ".e.replaced").mkdir()
    (tmp_path / ".e.replaced" / "old").touch()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "e", "the model"):
        raise ZeroDivisionError
    assert listing(tmp_path) == {"e"}
    assert listing(tmp_path / "e") == {"old"}


def test_a_link_stays_where_it_is(tmp_path):
    (tmp_path / "disk" / "e").mkdir(parents=True)
    (tmp_path / "e").symlink_to(tmp_path / "disk" / "e")
    with whole_folder(tmp_path / "e", "the model") as folder:
        (folder / "new").touch()
    assert listing(tmp_path) == {"disk", "e"} and listing(tmp_path / "disk") == {"e"}
    assert (tmp_path / "e").is_symlink() and listing(tmp_path / "e") == {"new"}


def test_destinations(tmp_path):
    check_destination(tmp_path / "absent", False)
    check_destination(tmp_path, False)
    (tmp_path / "config.json").touch()
    check_destination(tmp_path, True)
    with pytest.raises(UserError, match=r"is not empty\. Give --overwrite"):
        check_destination(tmp_path, False)
    with pytest.raises(UserError, match="is a file"):
        check_destination(tmp_path / "config.json", True)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex, which replacing it would delete"):
        check_destination(tmp_path, True)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "config.json").rename(tmp_path / "README.md")
    with pytest.raises(UserError, match="does not look like a folder of weights"):
        check_destination(tmp_path, True)


def test_rounding_that_would_make_infinities_is_refused():
    tensors = HeldTensors(
        {"a": torch.tensor([1.0, 7e4]), "b": torch.tensor([1.0, torch.inf]), "c": torch.tensor([6e4])}
    )
    cast = Cast(tensors, torch.float16)
    with pytest.raises(UserError, match=r"a has values up to 7e\+04, more than the 6\.55e\+04 that float16 can hold"):
        cast["a"]
    assert cast["b"].tolist() == [1.0, float("inf")]  # what was infinite is not our doing
    assert cast["c"].dtype == cast.dtype("c") == torch.float16
    assert torch.equal(Cast(tensors, torch.bfloat16)["a"], tensors["a"].bfloat16())
