"""python -m megayoco.evaluate: real processes once, everything else in this one."""

import json
import os
import subprocess
import sys

import pytest

from megayoco.config.evaluation import MultiNeedleOptions, NeedleOptions, PasskeyOptions, PerplexityOptions
from megayoco.convert.export import write_export
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.evaluate import __main__ as command
from megayoco.evaluate.evaluations import EVALUATIONS
from megayoco.evaluate.flags import description
from tests.generate.models import MODELS, build, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    facts = {"step": 3, "sequence_length": 400}
    write_export(folder / "export", MODELS["retention"], weights(build("retention")), ByteTokenizer(), facts=facts)
    return folder


@pytest.fixture(scope="module")
def haystack(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "haystack.txt"
    path.write_text("".join(f"line {i} says little\n" for i in range(200)), encoding="utf-8")
    return str(path)


@pytest.fixture
def main(model, tmp_path):
    """The command in this process, on the CPU."""

    def call(name, *arguments, output=tmp_path / "out", model=model):
        return command.main([name, "--model", str(model), "--output", str(output), "--device", "cpu", *arguments])

    return call


SHORT = ["--depths", "0", "0.5", "--trials", "1", "--max-new-tokens", "5"]


def test_as_processes_under_a_launcher(model, haystack, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    arguments = ["needle", "--model", model, "--output", tmp_path / "out", "--haystack", haystack, *SHORT]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
        + ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "megayoco.evaluate"]
        + [str(argument) for argument in [*arguments, "--tensor", "2"]],
        capture_output=True,
        text=True,
        env=environment,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == [
        "needle/400",
        "needle/400/substring",
        "needle/average",
        "needle/average/substring",
    ]
    assert len(lines) == 5
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["facts"] == {"step": 3, "sequence_length": 400}
    assert results["model"]["dtype"] == "float32"
    assert results["options"]["trials"] == 1 and results["options"]["depths"] == [0.0, 0.5]
    assert results["command"].startswith("python -m megayoco.evaluate needle --model ")
    assert {"python", "torch", "megayoco"} <= results["versions"].keys()


def test_every_evaluation_runs_and_resumes(main, haystack, tmp_path, capsys):
    cases = {
        "needle": [*SHORT, "--haystack", haystack],
        "multi-needle": [*SHORT, "--haystack", haystack, "--lengths", "700", "--needles", "2", "--query", "all"],
        "passkey": ["--characters", "100", "--trials", "2", "--max-new-tokens", "3"],
        "perplexity": ["--text", haystack, "--documents", "1", "--length", "200"],
    }
    for name, arguments in cases.items():
        output = tmp_path / name
        assert main(name, *arguments, output=output) == 0
        first = capsys.readouterr().out
        assert first.startswith(f"{name}/")
        samples = (output / "samples.jsonl").read_bytes()
        assert main(name, *arguments, output=output) == 0
        assert capsys.readouterr().out == first
        assert (output / "samples.jsonl").read_bytes() == samples
        assert list(output.glob("*.png")) and (output / "table.csv").exists()


def test_overwrite_begins_again_and_deletes_only_its_own(main, haystack, tmp_path, capsys):
    needle = ["--haystack", haystack, *SHORT]
    assert main("needle", *needle) == 0
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert main("needle", *needle, "--seed", "5") == 2
    assert "options.seed is 0 there and 5 here. Name another folder, or give --overwrite." in capsys.readouterr().err
    assert main("needle", *needle, "--seed", "5", "--overwrite") == 2
    assert "holds mine.txt" in capsys.readouterr().err
    (tmp_path / "out" / "mine.txt").unlink()
    assert main("needle", *needle, "--seed", "5", "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["options"]["seed"] == 5
    # nor is anything deleted for options that turn out to be wrong behind the model
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert main("dictionary", "--lengths", "64", "--overwrite") == 2
    assert "have no room for definitions and questions" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    # a folder of something else is left alone
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("kept")
    assert main("needle", *needle, "--overwrite", output=tmp_path / "other") == 2
    assert (tmp_path / "other" / "notes.txt").read_text() == "kept"


def test_windows_of_memory_layers_belong_to_the_results(main, haystack, tmp_path, capsys):
    write_export(tmp_path / "memory" / "export", MODELS["longllama"], weights(build("longllama")), ByteTokenizer())
    text = ["--text", haystack, "--documents", "1", "--length", "60"]

    def nll(output, *flags):
        assert main("perplexity", *text, *flags, output=tmp_path / output, model=tmp_path / "memory") == 0
        return json.loads((tmp_path / output / "results.json").read_text())

    # unless told, as in training
    flags = [[], ["--memory-eviction", "5"], ["--last-context", "3", "--memory-capacity", "4"]]
    found = [nll(f"out{number}", *given) for number, given in enumerate(flags)]
    assert found[0]["summary"] == found[1]["summary"] != found[2]["summary"]
    assert found[1]["model"]["memory_eviction"] == "5" and "memory_eviction" not in found[0]["model"]
    capsys.readouterr()
    other = [*text, "--last-context", "2", "--memory-capacity", "4"]
    assert main("perplexity", *other, output=tmp_path / "out2", model=tmp_path / "memory") == 2
    assert 'model.last_context is "3" there and "2" here' in capsys.readouterr().err
    assert main("perplexity", *text, "--last-context", "2", output=tmp_path / "none") == 2
    assert "--last-context: the model has no memory layers. Leave it out." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neddle"], "there is no evaluation 'neddle'. Did you mean needle?"),
        (["ruler"], "there is no evaluation 'ruler'. There are needle, multi-needle, passkey, dictionary, perplexity"),
        (["--model", "x"], "the name of an evaluation comes first: needle, "),
        (["needle"], "the following arguments are required: --model, --output. See python -m megayoco.evaluate needle"),
        (["needle", "--model", "m", "--output", "o", "--depth", "1"], "unrecognized arguments: --depth 1"),
        (["needle", "--model", "m", "--output", "o", "--depths", "2"], "--depths should be less than or equal to 1"),
        (["needle", "--model", "m", "--output", "o", "--lengths", "0"], "--lengths should be greater than 0, got 0"),
        (
            ["needle", "--model", "m", "--output", "o", "--lengths", "9", "--interval", "3", "--max-length", "9"],
            "--len",
        ),
        (["needle", "--model", "m", "--output", "o", "--interval", "3"], "--interval and max_length belong together"),
        (
            ["passkey", "--model", "m", "--output", "o", "--characters", "9", "--depths", "0"],
            "--depths are drawn where",
        ),
        (
            ["multi-needle", "--model", "m", "--output", "o", "--needles", "70"],
            "--needles should be less than or equal",
        ),
        (["multi-needle", "--model", "m", "--output", "o", "--query", "two"], "--query: invalid choice: 'two'"),
        (["perplexity", "--model", "m", "--output", "o"], "--text or data names the documents: give exactly one"),
        (["needle", "--model", "m", "--output", "o", "--tensor", "0"], "--tensor: must be an integer above 0"),
        (["needle", "--model", "m", "--output", "o", "--memory-capacity", "0"], "--memory-capacity must be at least 1"),
        (
            ["needle", "--model", "m", "--output", "o", "--memory-eviction", "2", "--last-context", "2"],
            "--memory-eviction and --last-context are two ways to cut a text into windows. Give one of them.",
        ),
        (["needle", "--model", "/nowhere", "--output", "o"], "--model /nowhere does not exist"),
        (["needle", "--model", "/nowhere", "--output", __file__], "test_command.py is a file. Name a folder."),
        (["needle", "--model", "/nowhere", "--output", "o", "--haystack", "/no/x"], "--haystack /no/x: no such file"),
        (["perplexity", "--model", "/nowhere", "--output", "o", "--text", "/no/x"], "--text /no/x: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line_are_told_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_help_tells_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in EVALUATIONS)
    for name, options in {
        "needle": NeedleOptions,
        "multi-needle": MultiNeedleOptions,
        "passkey": PasskeyOptions,
        "perplexity": PerplexityOptions,
    }.items():
        with pytest.raises(SystemExit) as done:
            command.main([name, "--help"])
        assert done.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for field in options.__dataclass_fields__:
            assert f" --{field.replace('_', '-')} " in text.replace(",", " ")
            told = " ".join(description(options, field).replace("`", "").split())
            assert len(told) > 20 and told in text, field
    assert "Default: 2048." in text
