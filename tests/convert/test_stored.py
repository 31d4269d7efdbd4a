"""Files of weights: whole or in shards, of safetensors or torch; what is wrong with them is told, no code runs."""

import argparse
import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from megayoco.convert.names import check_tensors
from megayoco.convert.stored import PickledTensors, load_restricted, open_weights
from megayoco.convert.weights import HeldTensors
from megayoco.errors import UserError


def tensors():
    return {name: torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abcd")}


def test_numbers_that_are_no_weights(tmp_path):
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    path, found = open_weights(tmp_path)
    with pytest.raises(UserError, match=f"{path}: a has dtype I8; quantised weights cannot be converted"):
        check_tensors(path, found, {"a": (2,)}, "config.json")
    found = HeldTensors({"a": torch.ones(2, dtype=torch.int8)})
    with pytest.raises(UserError, match=r"a has dtype torch\.int8; quantised"):
        check_tensors(path, found, {"a": (2,)}, "config.json")


def write_torch(folder):
    """pytorch_model-*.bin with their index."""
    values = tensors()
    for number, names in enumerate(("ab", "cd"), 1):
        torch.save({name: values[name] for name in names}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{1 + (name in 'cd')}-of-00002.bin" for name in values}
    write_index(folder / "pytorch_model.bin.index.json", weight_map)


def write_safetensors(folder):
    values = tensors()
    for number, names in enumerate(("ab", "cd"), 1):
        save_file({name: values[name] for name in names}, folder / f"model-0000{number}-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + (name in 'cd')}-of-00002.safetensors" for name in values}
    write_index(folder / "model.safetensors.index.json", weight_map)


def write_index(path, weight_map):
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def single_torch(folder):
    torch.save(tensors(), folder / "pytorch_model.bin")


def single_safetensors(folder):
    save_file(tensors(), folder / "model.safetensors")


def refused(path, *parts):
    with pytest.raises(UserError) as caught:
        open_weights(path) if path.is_dir() else load_restricted(path)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_torch, write_safetensors, single_torch, single_safetensors])
def test_all_layouts_give_the_same(tmp_path, write):
    write(tmp_path)
    _, found = open_weights(tmp_path)
    assert sorted(found.keys()) == ["a", "b", "c", "d"] and len(found) == 4
    for name, value in tensors().items():
        assert found.shape(name) == (3, 2) and found.dtype(name) == torch.float32
        assert torch.equal(found[name], value)
    with pytest.raises(KeyError):
        found["e"]


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_shards_that_do_not_fit_their_index(tmp_path, write):
    write(tmp_path)
    index = next(tmp_path.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = weight_map["a"], weight_map["c"]

    write_index(index, weight_map | {"e": first})
    refused(tmp_path, f"{first} and {index.name} disagree on the tensors e")
    write_index(index, {name: file for name, file in weight_map.items() if name != "d"})
    refused(tmp_path, f"{second} and {index.name} disagree on the tensors d")
    write_index(index, weight_map | {"a": second})
    refused(tmp_path, "disagree on the tensors a")
    write_index(index, weight_map | {"e": "gone.bin"})
    refused(tmp_path, f"{index} names files that are not there: gone.bin")
    write_index(index, weight_map | {"e": "../other.bin"})
    refused(tmp_path, "../other.bin, which is no file of its folder")
    index.write_text('{"weight_map": ["a"]}')
    refused(tmp_path, "has no `weight_map`")
    index.write_text("{")
    refused(tmp_path, "is not JSON")
    write_index(index, weight_map)
    (tmp_path / second).write_bytes((tmp_path / second).read_bytes()[:-40])
    refused(tmp_path, f"{tmp_path / second} is damaged")
    index.unlink()
    refused(tmp_path, "holds no weights: there is no model.safetensors")


class Command:
    def __reduce__(self):
        return print, ("code of the file ran",)


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    torch.save({"model": tensors(), "args": Command()}, tmp_path / "c.pth")
    refused(tmp_path / "c.pth", "holds code besides tensors: builtins.print", "It was not loaded")
    assert "ran" not in capsys.readouterr().out


def test_settings_of_training_scripts_are_passed_over(tmp_path, monkeypatch):
    def runs(self, state):
        raise AssertionError("code of the package ran")

    # a class of a package that is not there when the file is read
    Settings = type("Settings", (), {"__module__": "omegaconf", "__setstate__": runs})
    settings = Settings()
    settings.lr = 3
    monkeypatch.setitem(sys.modules, "omegaconf", types.SimpleNamespace(Settings=Settings))
    torch.save({"model": tensors(), "args": argparse.Namespace(lr=3), "cfg": settings}, tmp_path / "c.pth")
    monkeypatch.delitem(sys.modules, "omegaconf")
    safe = set(torch.serialization.get_safe_globals())
    found = load_restricted(tmp_path / "c.pth")
    assert torch.equal(found["model"]["a"], tensors()["a"])
    assert not isinstance(found["cfg"], Settings)
    assert set(torch.serialization.get_safe_globals()) == safe  # what stood for them is forgotten


def test_files_that_are_no_state_dict(tmp_path):
    path = tmp_path / "c.pth"
    refused(path, "cannot read", "No such file")
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    refused(path, "no file that torch.save has written since torch 1.6")
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:300])
    refused(path, f"{path} is damaged")
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list, not tensors by name"):
        PickledTensors(path)
    torch.save({"a": torch.ones(1), "step": 3}, path)
    with pytest.raises(UserError, match="holds more than tensors: step"):
        PickledTensors(path)


def test_one_tensor_under_two_names(tmp_path):
    one = torch.randn(4, 2)
    torch.save({"a": one, "b": one, "c": one.clone(), "d": one[:2]}, tmp_path / "c.pth")
    found = PickledTensors(tmp_path / "c.pth")
    assert found.are_one("a", "b")
    assert not found.are_one("a", "c")
    assert not found.are_one("a", "d")
