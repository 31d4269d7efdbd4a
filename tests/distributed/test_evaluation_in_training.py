"""A run that is evaluated on the way trains as one that is not, and its tables do not depend on the layout."""

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.runs import Layout, exported, run

NEEDLE = {"lengths": [384, 448], "depths": [0.0, 0.6], "trials": 3, "max_new_tokens": 3}
EVALUATION = {
    "interval": 2,
    "needle": NEEDLE,
    "perplexity": {"length": 200, "documents": 3},
}
HAYSTACK = Path(__file__).with_name("text.txt")
LAYOUTS = [
    ("yoco-retention", Layout(2, zero=3)),
    ("yoco-window", Layout(4, sequence=2, bands=2, zero=1)),
    ("yoco-retention", Layout(4, tensor=2, pipeline=2)),
    ("llama", Layout(4, pipeline=4)),
    ("yoco-tied", Layout(2, tensor=2, zero=2)),
]


def evaluations(lines):
    """{step: {scalar: value}} of the metrics, without times."""
    found = {}
    for line in lines:
        if "evaluation" in line:
            scalars = {key: value for key, value in line["evaluation"].items() if not key.endswith("seconds")}
            found.setdefault(line["step"], {}).update(scalars)
    return found


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents")
    for number in range(3):
        (path / f"{number}.txt").write_text("".join(f"Line {number * 7 + i} of a long text. " for i in range(20)))
    return str(path)


def wanted(documents):
    """A short haystack: every rank reads and encodes it at every evaluation."""
    perplexity = {**EVALUATION["perplexity"], "text": documents}
    return {**EVALUATION, "needle": {**NEEDLE, "haystack": str(HAYSTACK)}, "perplexity": perplexity}


@pytest.fixture(scope="module")
def alone(workers, tmp_path_factory, text, documents):
    """Metrics of each model on one process, evaluated."""
    made = {}

    def get(model):
        if model not in made:
            directory = tmp_path_factory.mktemp("alone")
            made[model] = run(workers, directory, text, model, Layout(1), 4, evaluation=wanted(documents))
        return made[model]

    return get


@pytest.mark.parametrize(("model", "layout"), LAYOUTS, ids=lambda value: str(value))
def test_tables_do_not_depend_on_the_layout(workers, tmp_path, text, documents, alone, model, layout):
    lines = run(workers, tmp_path, text, model, layout, 4, evaluation=wanted(documents))
    expected, got = evaluations(alone(model)), evaluations(lines)
    assert set(got) == {2, 4}
    for step in (2, 4):
        assert set(got[step]) == set(expected[step])
        assert {"needle/384", "needle/average", "perplexity/nll"} <= set(got[step])
        for key, value in got[step].items():
            assert value == pytest.approx(expected[step][key], rel=1e-4, abs=1e-4), key
    # what the model answered, prompt by prompt
    samples = tmp_path / "run" / "evaluation" / "step4" / "needle" / "samples.jsonl"
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(records) == len({record["key"] for record in records}) == 12
    assert (samples.parent / "heatmap.png").exists()


@pytest.mark.parametrize("layout", [Layout(2, zero=3), Layout(4, sequence=2, bands=2)], ids=str)
def test_training_goes_on_as_if_nothing_had_been_asked(workers, tmp_path, text, documents, layout):
    for name in ("plain", "asked"):
        (tmp_path / name).mkdir()
    plain = run(workers, tmp_path / "plain", text, "yoco-retention", layout, 4)
    asked = run(workers, tmp_path / "asked", text, "yoco-retention", layout, 4, evaluation=wanted(documents))
    assert losses(plain) == losses(asked)
    weights, others = exported(tmp_path / "plain"), exported(tmp_path / "asked")
    assert all((weights[name] == others[name]).all() for name in weights)


def test_an_interrupted_evaluation_is_completed_on_resume(workers, tmp_path, text, documents):
    sections = {"evaluation": wanted(documents), "checkpoint": {"interval": 2}}
    first = run(workers, tmp_path, text, "yoco-retention", Layout(2), 4, **sections)
    directory = tmp_path / "run"
    # as if it had been killed during the evaluation of step 2, after its checkpoint
    for folder in ("checkpoints", "evaluation"):
        last = next(path for path in (directory / folder).iterdir() if path.name.endswith("step4"))
        shutil.rmtree(last)
    (directory / "checkpoints" / "latest").write_text("global_step2")
    (directory / "evaluation" / "step2" / "needle" / "results.json").unlink()
    samples = directory / "evaluation" / "step2" / "needle" / "samples.jsonl"
    kept = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(kept[:5]))
    lines = run(workers, tmp_path, text, "yoco-retention", Layout(2), 4, resume="latest", **sections)
    assert sorted(samples.read_text().splitlines(keepends=True)) == sorted(kept)
    assert samples.read_text().startswith("".join(kept[:5]))
    assert evaluations(lines) == evaluations(first)
    assert losses(lines) == losses(first)


def test_what_is_wrong_is_told_before_the_first_step(workers, tmp_path, text):
    from tests.workers import WorkerError

    for name, options, message in (
        ("needle", {"lengths": [40]}, "evaluation.needle: length 40"),
        ("needle", {"haystack": str(tmp_path / "none.txt"), "lengths": [400]}, "none.txt"),
        ("perplexity", {"text": str(tmp_path / "none.txt"), "length": 50}, "none.txt"),
    ):
        with pytest.raises(WorkerError, match=message):
            run(workers, tmp_path, text, "llama", Layout(2), 2, evaluation={name: options})
        assert not any((tmp_path / "run").iterdir())
