"""What a path holds is recognised, or what was looked for is told; a conversion holds a layer, not a model."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from megayoco.config import model_config_to_dict
from megayoco.convert.checkpoints import checksum
from megayoco.convert.export import write_export
from megayoco.convert.formats import FORMATS, read_weights, recognise, write_weights
from megayoco.convert.weights import HeldTensors
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError
from tests.convert.models import EXPRESSED, assert_same, listing, random_weights


def write_checkpoint(folder, weights, step):
    """A training checkpoint as train/checkpoint.py leaves it: one flat buffer, and where in it everything lies."""
    folder.mkdir(parents=True)
    flat, parameters, offset = [], {}, 0
    for name, value in weights.tensors.items():
        pieces = [[0, offset, -1, 0, 0, 0, value.numel()]]
        parameters[name] = {"shape": list(value.shape), "pieces": pieces}
        flat.append(value.flatten())
        offset += value.numel()
    torch.save({"optimizer": {"master": torch.cat(flat)}}, folder / "optim_states.pt")
    sources = [{"weight": [0, "optimizer", "master"]}]
    layout = {"optimizer_step": step, "files": ["optim_states.pt"], "sources": sources, "parameters": parameters}
    (folder / "layout.json").write_text(json.dumps(layout))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in folder.iterdir()}
    note = {"format": 2, "step": step, "identity": {}, "files": files, "facts": {"step": step}}
    (folder / "megayoco.json").write_text(json.dumps(note | {"model": model_config_to_dict(weights.model)}))


def test_a_run_directory_means_its_newest_checkpoint(tmp_path):
    run = tmp_path / "run"
    old, new, exported = (random_weights("retention", seed) for seed in (1, 2, 3))
    write_export(run / "export", exported.model, exported.tensors, exported.tokenizer)
    assert recognise(run) == "megayoco"
    assert_same(read_weights(run), exported)
    write_checkpoint(run / "checkpoints" / "global_step5", old, 5)
    write_checkpoint(run / "checkpoints" / "global_step10", new, 10)
    ByteTokenizer().save(run / "tokenizer")
    for path, expected in ((run, new), (run / "checkpoints", new), (run / "checkpoints" / "global_step5", old)):
        assert recognise(path) == "megayoco"
        found = read_weights(path, "megayoco")
        assert_same(found, expected)
        assert found.tokenizer.eod == 256
    assert found.facts == {"step": 5}
    assert_same(read_weights(run / "export"), exported)


def test_a_checkpoint_that_lacks_a_parameter(tmp_path):
    weights = random_weights("retention")
    tensors = HeldTensors({name: value for name, value in weights.tensors.items() if name != "norm.weight"})
    write_checkpoint(tmp_path / "global_step1", weights._replace(tensors=tensors), 1)
    with pytest.raises(UserError, match=r"global_step1 lacks the tensor norm\.weight\."):
        read_weights(tmp_path / "global_step1")


def test_what_is_nothing_of_ours(tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        read_weights(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert recognise(tmp_path) is None
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path)
    for part in ("holds no model of a format that we know", "model_type llama (llama)", "params.json", *FORMATS):
        assert part in str(caught.value)
    for name in ("hf", "llama", "longllama", "fla"):
        with pytest.raises(UserError, match=r"config\.json describes 'bert'"):
            read_weights(tmp_path, name)
    with pytest.raises(UserError, match="does not describe an export of MegaYOCO"):
        read_weights(tmp_path, "megayoco")


def test_a_tokenizer_may_be_given(tmp_path):
    class Other(ByteTokenizer):
        vocab_size = 260

    class Larger(ByteTokenizer):
        vocab_size = 265

    weights = random_weights("retention")
    for name in ("megayoco", "hf", "yoco", "fla"):
        write_weights(tmp_path / name, name, weights)
        assert read_weights(tmp_path / name).tokenizer.vocab_size == 257
        assert read_weights(tmp_path / name, tokenizer=Other()).tokenizer.vocab_size == 260
        with pytest.raises(UserError, match="the tokenizer has 265 ids, the model's vocabulary 264"):
            read_weights(tmp_path / name, tokenizer=Larger())


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_there_is_not_replaced_unless_told(tmp_path, name):
    first, second = (random_weights(EXPRESSED.get(name, "retention"), seed) for seed in (1, 2))
    write_weights(tmp_path / "f", name, first, shard_bytes=50_000)
    with pytest.raises(UserError, match=r"is not empty\. Give --overwrite"):
        write_weights(tmp_path / "f", name, second)
    assert_same(read_weights(tmp_path / "f"), first)
    write_weights(tmp_path / "f", name, second, dtype=torch.float64, overwrite=True)
    doubled = HeldTensors({key: value.double() for key, value in second.tensors.items()})
    assert_same(read_weights(tmp_path / "f"), second._replace(tensors=doubled))
    (tmp_path / "f" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        write_weights(tmp_path / "f", name, first, overwrite=True)


@pytest.mark.parametrize("model", ["longllama", "memory"])
@pytest.mark.parametrize("name", FORMATS)
def test_memory_layers_are_kept_or_refused(tmp_path, name, model):
    weights = random_weights(model)
    if name == "megayoco":
        write_weights(tmp_path / "f", name, weights)
        found = read_weights(tmp_path / "f")
        assert_same(found, weights)
        assert (found.model.memory_layers, found.model.memory_window) == (
            weights.model.memory_layers,
            weights.model.memory_window,
        )
        return
    with pytest.raises(
        UserError, match=r"no memory layers|is no (Long)?LLaMA|has no pattern|equal depth|for every head"
    ):
        write_weights(tmp_path / "f", name, weights)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversion_that_fails_half_way_leaves_nothing(tmp_path, name):
    weights = random_weights(EXPRESSED.get(name, "retention"))

    class Damaged(HeldTensors):
        def __getitem__(self, key):
            if key == "layers.2.ffn.up_proj.weight":
                raise UserError("the source cannot be read.")
            return super().__getitem__(key)

    class Told(Damaged):
        def shape(self, key):
            return tuple(weights.tensors[key].shape)

        def dtype(self, key):
            return torch.float32

    with pytest.raises(UserError, match=r"the source cannot be read\."):
        write_weights(tmp_path / "f", name, weights._replace(tensors=Told(weights.tensors)))
    assert listing(tmp_path) == set()


PEAK = """
import sys, threading, time
from pathlib import Path
import torch
from megayoco.config import ModelConfig
from megayoco.convert.export import tensor_shapes, write_export
from megayoco.convert.formats import read_weights, write_weights

def anonymous():
    "Memory of this process but for mapped files, in bytes."
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

model = ModelConfig(dim=128, layers=32, hidden_dim=768, heads=4, vocab_size=64, self_mixer="window", window=8)

class Drawn(dict):
    def __getitem__(self, name):
        return torch.rand(super().__getitem__(name))
    def dtype(self, name):
        return torch.float32

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

write_export("source", model, Drawn(tensor_shapes(model)), None)
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
write_weights(Path("fla"), "fla", read_weights(Path("source")))  # rows change places
write_weights(Path("yoco"), "yoco", read_weights(Path("fla")))
write_weights(Path("narrow"), "megayoco", read_weights(Path("yoco")), dtype=torch.bfloat16)
done = True
watcher.join()
print(peak - before, 4 * model.parameter_count()["total"])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the memory of a process")
def test_a_conversion_holds_a_layer_not_a_model(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    growth, size = map(int, done.stdout.split())
    shutil.rmtree(tmp_path)
    # a layer has 1.4 MiB
    assert size > 40 * 2**20
    assert growth < 8 * 2**20
