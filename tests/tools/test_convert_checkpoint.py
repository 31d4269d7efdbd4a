"""tools/convert_checkpoint.py from the command line: what it writes, what --check catches, mistakes in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file

from megayoco.convert.formats import read_weights, write_weights
from megayoco.convert.weights import Cast, HeldTensors
from megayoco.data.command import run_command
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.generate import __main__ as generate
from tests.convert.models import LONGLLAMA, PLAIN_LLAMA, assert_same, listing, random_weights
from tests.tools.test_tools import ROOT, fails, load_tool

tool = load_tool("convert_checkpoint")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """An export of each model."""
    parent = tmp_path_factory.mktemp("sources")
    for name in ("retention", "window", "llama"):
        write_weights(parent / name, "megayoco", random_weights(name))
    return parent


@pytest.fixture(scope="module", autouse=True)
def own_module_cache(tmp_path_factory):
    """Where transformers copies the code of folders to, and imports it from."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", list(sys.path))
        loaded = [name for name in sys.modules if name.startswith("transformers_modules")]  # from another cache
        for name in loaded:
            patch.delitem(sys.modules, name)
        yield
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]


def convert(*arguments):
    return run_command(tool.main, [str(argument) for argument in arguments])


def test_the_command_line_as_it_stands(sources, tmp_path):
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "export").symlink_to(sources / "window")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    line = "tools/convert_checkpoint.py --from megayoco --to hf --load runs/quickstart --save model --check"
    assert line in tool.__doc__
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report, check = done.stdout.splitlines()
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
    files = f"float32; 9 files, {size:,} bytes"
    assert report == f"model: 40,512 parameters of a yoco model in 37 tensors, {files}"
    assert check.startswith("check: logits by MegaYocoForCausalLM of transformers on 256 tokens of text differ by ")
    assert "error" not in done.stderr.lower()
    assert_same(read_weights(tmp_path / "model"), random_weights("window"))


@pytest.mark.parametrize(
    ("model", "target", "by"),
    [
        ("retention", "hf", "MegaYocoForCausalLM of transformers"),
        ("llama", "hf", "LlamaForCausalLM of transformers"),
        ("window", "fla", "our reader"),
        ("retention", "yoco", "our reader"),
    ],
)
def test_there_and_back_in_bfloat16(sources, tmp_path, capsys, model, target, by):
    arguments = ["--from", "megayoco", "--to", target, "--load", sources / model, "--save", tmp_path / "there"]
    assert convert(*arguments, "--dtype", "bfloat16", "--shard-size", "50KB", "--check") == 0
    out = capsys.readouterr().out
    assert f"check: logits by {by} on 256 tokens of text differ by" in out
    assert "bfloat16" in out
    assert len(list((tmp_path / "there").glob("model-*.safetensors"))) == (
        0 if target == "yoco" else 3 if model == "retention" else 2
    )
    arguments = ["--from", target, "--to", "megayoco", "--load", tmp_path / "there", "--save", tmp_path / "back"]
    assert convert(*arguments, "--dtype", "float32") == 0
    rounded = random_weights(model)
    rounded = rounded._replace(tensors=Cast(Cast(rounded.tensors, torch.bfloat16), torch.float32))
    assert_same(read_weights(tmp_path / "back"), rounded)


def test_a_llama_becomes_a_longllama_and_back(tmp_path, capsys):
    write_weights(tmp_path / "llama", "llama", random_weights(PLAIN_LLAMA))
    there = ["--from", "llama", "--to", "longllama", "--load", tmp_path / "llama", "--save", tmp_path / "there"]
    assert convert(*there, "--memory-layers", "1,2", "--memory-window", "6", "--check") == 0
    by = "LongLlamaForCausalLM of transformers"
    assert f"check: logits by {by} on 252 tokens of text differ by" in capsys.readouterr().out  # 42 windows
    assert_same(read_weights(tmp_path / "there"), random_weights(LONGLLAMA))
    back = ["--from", "longllama", "--to", "easylm", "--load", tmp_path / "there", "--save", tmp_path / "back"]
    assert convert(*back, "--memory-layers", "none", "--check") == 0
    assert_same(read_weights(tmp_path / "back"), random_weights(PLAIN_LLAMA))
    assert convert(*there, "--overwrite", "--check") == 0  # as a plain LLaMA
    for more, message in (
        (["--memory-layers", "1;2", "--memory-window", "6"], "--memory-layers 1;2 is no list of numbers"),
        (["--memory-layers", "1"], "--memory-layers needs --memory-window"),
        (["--memory-window", "6"], "--memory-window is used only with --memory-layers"),
    ):
        assert message in fails(tool, [*there, "--overwrite", *more], capsys)


def test_text_comes_out_of_every_folder(sources, tmp_path, capsys):
    arguments = ["--prompt", "The ", "--greedy", "--max-new-tokens", "6", "--device", "cpu"]
    for model, targets in (("retention", ("hf", "yoco", "fla")), ("llama", ("llama",))):
        assert generate.main(["--model", str(sources / model), *arguments]) == 0
        expected = capsys.readouterr().out
        for target in targets:
            assert (
                convert("--from", "megayoco", "--to", target, "--load", sources / model, "--save", tmp_path / target)
                == 0
            )
            capsys.readouterr()
            assert generate.main(["--model", str(tmp_path / target), *arguments]) == 0
            assert capsys.readouterr().out == expected


def test_check_catches_what_is_not_the_same(sources, tmp_path, capsys, monkeypatch):
    def write_wrongly(directory, target, weights, **options):
        """Everything right but one matrix, by a thousandth."""
        tensors = HeldTensors({name: weights.tensors[name].clone() for name in weights.tensors})
        tensors["layers.1.ffn.down_proj.weight"][3] *= 1.001
        write_weights(directory, target, weights._replace(tensors=tensors), **options)

    monkeypatch.setattr(tool, "write_weights", write_wrongly)
    for target, by in (("hf", "MegaYocoForCausalLM"), ("yoco", "our reader")):
        arguments = ["--from", "megayoco", "--to", target, "--load", sources / "retention", "--check"]
        message = fails(tool, [*arguments, "--save", tmp_path / target], capsys)
        assert f"logits of {tmp_path / target} by {by}" in message and "over 1e-04" in message


def test_a_tokenizer_where_there_is_none(sources, tmp_path, capsys):
    weights = random_weights("retention")._replace(tokenizer=None)
    write_weights(tmp_path / "bare", "yoco", weights)
    arguments = ["--from", "yoco", "--to", "megayoco", "--load", tmp_path / "bare", "--check"]
    assert convert(*arguments, "--save", tmp_path / "none") == 0
    out = capsys.readouterr().out
    assert "no tokenizer came with the weights" in out and "on 256 random tokens differ" in out
    assert generate.main(["--model", str(tmp_path / "none"), "--prompt", "x", "--device", "cpu"]) == 2
    assert "has no tokenizer. tools/convert_checkpoint.py --tokenizer" in capsys.readouterr().err

    ByteTokenizer().save(tmp_path / "ours")
    write_for_transformers(ByteTokenizer(), tmp_path / "theirs")
    for number, path in enumerate(("ours", "theirs", "theirs/tokenizer.json")):
        save = tmp_path / str(number)
        assert convert(*arguments, "--save", save, "--tokenizer", tmp_path / path) == 0
        assert "on 256 tokens of text" in capsys.readouterr().out
        assert read_weights(save).tokenizer.encode("ä") == ByteTokenizer().encode("ä")
    (tmp_path / "text").write_text("1234567")
    assert (
        convert(
            *arguments, "--save", tmp_path / "3", "--tokenizer", tmp_path / "ours", "--check-text", tmp_path / "text"
        )
        == 0
    )
    assert "on 7 tokens of text" in capsys.readouterr().out


def test_an_older_conversion_is_replaced_on_request(sources, tmp_path, capsys):
    arguments = ["--from", "megayoco", "--to", "hf", "--save", tmp_path / "f", "--load"]
    assert convert(*arguments, sources / "retention") == 0
    assert "--overwrite" in fails(tool, [*arguments, sources / "window"], capsys)
    assert_same(read_weights(tmp_path / "f"), random_weights("retention"))
    assert convert(*arguments, sources / "window", "--overwrite") == 0
    assert_same(read_weights(tmp_path / "f"), random_weights("window"))
    assert listing(tmp_path) == {"f"}


def test_the_export_of_a_run_stays_in_the_format_of_runs(sources, tmp_path, capsys):
    export = tmp_path / "run" / "export"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    arguments = ["--from", "megayoco", "--load", sources / "retention", "--save", export]
    message = fails(tool, [*arguments, "--to", "hf"], capsys)
    assert f"--save {export} is where its run keeps its own export" in message
    assert listing(tmp_path / "run") == {"checkpoints"}
    assert convert(*arguments, "--to", "megayoco") == 0
    # beside what is no run, the name means nothing
    assert convert(*arguments[:-1], tmp_path / "export", "--to", "hf") == 0


def test_nothing_is_written_where_names_do_not_match(tmp_path, capsys):
    write_weights(tmp_path / "source", "hf", random_weights("retention"))
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary.weight"] = tensors.pop("model.layers.0.self_attn.gt_proj.weight")
    save_file(tensors, path)
    arguments = ["--from", "hf", "--to", "megayoco", "--load", tmp_path / "source", "--save", tmp_path / "f"]
    assert "lacks the tensor model.layers.0.self_attn.gt_proj.weight." in fails(tool, arguments, capsys)
    assert listing(tmp_path) == {"source"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--load": "none"}, "none does not exist"),
        ({"--from": "llama"}, "only LlamaForCausalLM can be read here"),
        ({"--to": "llama"}, "a model of pattern yoco is no LLaMA"),
        ({"--shard-size": "5 pages"}, "--shard-size 5 pages is no size. Say 5GB"),
        ({"--shard-size": "0"}, "--shard-size 0 is no size"),
        ({"--tokenizer": "none"}, "--tokenizer none does not exist"),
        ({"--check-text": "none"}, "--check-text is used only by --check"),
        ({"--check-text": "none", "--check": None}, "--check-text none cannot be read: No such file"),
        ({"--dtype": "float16"}, "norm.weight has values up to"),
    ],
    ids=str,
)
def test_mistakes(tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    weights = random_weights("retention")
    weights.tensors["norm.weight"][0] = 1e6
    write_weights(tmp_path / "source", "megayoco", weights)
    if changes.get("--from") == "llama":
        (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "megayoco"}))
    flags = {"--from": "megayoco", "--to": "hf", "--load": "source", "--save": "f"} | changes
    arguments = [part for flag, value in flags.items() for part in (flag, value) if part is not None]
    assert message in fails(tool, arguments, capsys)
    assert listing(tmp_path) == {"source"}


def test_sizes():
    assert [tool.shard_bytes(size) for size in ("5GB", "500mb", "1 K", "7")] == [5 * 10**9, 5 * 10**8, 1000, 7]
