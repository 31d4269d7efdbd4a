"""The retrieval evaluations end to end, asked of a model that knows all answers, or gives certain wrong ones."""

import csv
import json
import random
import re

import numpy as np
import pytest
import torch

from megayoco.config.evaluation import MultiNeedleOptions, NeedleOptions, PasskeyOptions
from megayoco.errors import UserError
from megayoco.evaluate import multi_needle, needle, passkey
from megayoco.evaluate.cases import Case, Prompt
from megayoco.evaluate.retrieval import ask, is_decided, is_exact, record_of, summarise, table
from megayoco.evaluate.subject import Subject
from tests.evaluate.oracle import TOKENIZER, Oracle, distinct_prefixes

NEEDLE = NeedleOptions(lengths=[400, 600], depths=[0.0, 0.5, 1.0], trials=2)


@pytest.fixture(autouse=True)
def text(tmp_path_factory, monkeypatch):
    """Short texts in place of the installation's, which takes a second to read."""
    from megayoco.evaluate import haystack

    monkeypatch.setattr(
        haystack, "library_files", lambda: iter([("a", f"line {i} says little\n" * 3) for i in range(99)])
    )


def read(folder):
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return samples, json.loads((folder / "results.json").read_text()), (folder / "table.csv").read_text()


@pytest.mark.parametrize(
    ("run", "options", "scalars"),
    [
        (needle.run, NEEDLE, ["needle/400", "needle/600", "needle/average"]),
        (
            multi_needle.run,
            MultiNeedleOptions(lengths=[1500], needles=[1, 4], trials=1),
            ["multi-needle/1500", "multi-needle/1500/n1", "multi-needle/1500/n4", "multi-needle/average"],
        ),
        (
            multi_needle.run,
            MultiNeedleOptions(lengths=[1500], needles=[4], depths=[0.2, 0.7], trials=2, query="all"),
            ["multi-needle/1500", "multi-needle/average"],
        ),
        (passkey.run, PasskeyOptions(lengths=[450, 700], trials=12), ["passkey/450", "passkey/700", "passkey/average"]),
        (passkey.run, PasskeyOptions(characters=[300], trials=4), ["passkey/300", "passkey/average"]),
        (passkey.run, PasskeyOptions(lengths=[500], depths=[0.0, 1.0], trials=1), ["passkey/500", "passkey/average"]),
    ],
    ids=["needle", "multi", "all", "passkey", "characters", "depths"],
)
def test_a_model_that_finds_everything_has_full_marks(run, options, scalars, tmp_path):
    summary = run(Oracle(), TOKENIZER, options, tmp_path / "out")
    assert {name for name in summary if not name.endswith("/substring")} == set(scalars)
    assert set(summary.values()) == {1.0}
    samples, results, rows = read(tmp_path / "out")
    assert results["summary"] == summary
    assert sum(row["prompts"] for row in results["table"]) == len(samples)
    assert next(csv.reader(rows.splitlines())) == list(results["table"][0])
    assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    # without a folder the scalars are the same
    assert run(Oracle(), TOKENIZER, options) == summary


@pytest.mark.parametrize(
    ("answer", "exact", "substring"),
    [
        (lambda number: f"It is {number}", 1.0, 1.0),
        (lambda number: f"1{number}2", 0.0, 1.0),
        (lambda number: f"7 or {number}", 0.0, 1.0),
        (lambda number: "", 0.0, 0.0),
        (lambda number: f"{'x' * 20}{number}", 0.0, 0.0),  # too late
    ],
    ids=["words", "longer", "second", "nothing", "late"],
)
def test_both_rules_are_counted(answer, exact, substring):
    summary = needle.run(Oracle(answer), TOKENIZER, NEEDLE)
    assert summary["needle/average"] == exact
    assert summary["needle/average/substring"] == substring


def test_rules_on_answers():
    assert is_exact("It is 123.", "123") and not is_exact("1234", "123") and not is_exact("0, 123", "123")
    assert not is_exact("none", "1")
    # decided only when neither rule can change its mind
    assert is_decided("123.", "123")
    assert not is_decided("123", "123")  # may become 1234
    assert not is_decided("7, ", "123")  # 123 may follow
    assert is_decided("7, 123", "123")
    assert is_decided("51239 ", "123")


def test_answers_end_when_they_are_decided_and_never_later_than_asked():
    options = NeedleOptions(lengths=[400], depths=[0.5], trials=1, max_new_tokens=12)
    model = Oracle(lambda number: f"{number}, then a long explanation")
    needle.run(model, TOKENIZER, options)
    assert model.steps <= 6
    model = Oracle(lambda number: "no idea at all, none, nothing")
    needle.run(model, TOKENIZER, options)
    assert model.steps == 12


def test_prompts_of_one_length_and_trial_share_what_they_have_in_common():
    options = NeedleOptions(lengths=[1500], trials=1, max_new_tokens=1)
    task = needle.needle_task(TOKENIZER, options, None)
    prompts = task.build(task.groups[0])
    model = Oracle()
    list(ask(model, TOKENIZER, prompts, options))
    rows = [prompt.tokens for prompt in prompts]
    assert model.tokens_read == distinct_prefixes(rows)
    # the depths 0, 0.1, ... 1 leave 6.5 of 11 prompts' tokens to be read
    assert 0.55 < model.tokens_read / sum(map(len, rows)) < 0.7


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path):
    expected = needle.run(Oracle(lambda n: n if int(n) % 2 else "1"), TOKENIZER, NEEDLE, tmp_path / "whole")
    model = Oracle(lambda n: n if int(n) % 2 else "1", interrupt_after=5)
    with pytest.raises(KeyboardInterrupt):
        needle.run(model, TOKENIZER, NEEDLE, tmp_path / "out")
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 5
    with open(tmp_path / "out" / "samples.jsonl", "a") as file:
        file.write('{"key": "length 600, nee')  # killed while it wrote
    model = Oracle(lambda n: n if int(n) % 2 else "1")
    # reading in other pieces changes no result
    options = NeedleOptions(**{**vars(NEEDLE), "prefill_chunk": 100})
    seen = []
    summary = needle.run(
        model, TOKENIZER, options, tmp_path / "out", lambda done, total, text: seen.append((done, total, text))
    )
    assert summary == expected and 0 < summary["needle/average"] < 1
    assert model.questions == 12 - 5
    assert seen[0][0] > 0 and seen[-1][:2] == (6000, 6000) and seen[-1][2].startswith("12 of 12, exact 0.")
    samples, results, rows = read(tmp_path / "out")
    whole, same, same_rows = read(tmp_path / "whole")
    assert sorted(samples, key=str) == sorted(whole, key=str)
    assert (results["table"], rows) == (same["table"], same_rows)
    # and once more: nothing is left to ask
    model = Oracle()
    assert needle.run(model, TOKENIZER, NEEDLE, tmp_path / "out") == expected
    assert model.questions == 0


def test_a_folder_of_other_results_is_refused(tmp_path):
    subject = Subject({"norms_sha256": "a"})
    options = NeedleOptions(lengths=[400], depths=[0.5], trials=1)
    needle.run(Oracle(), TOKENIZER, options, tmp_path, subject=subject)

    def refused(message, options=options, subject=subject, run=needle.run):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(UserError, match=message):
            run(Oracle(), TOKENIZER, options, tmp_path, subject=subject)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    refused("options.seed is 0 there and 3 here", NeedleOptions(**{**vars(options), "seed": 3}))
    refused(r"options.lengths is \[400\] there and \[500\]", NeedleOptions(**{**vars(options), "lengths": [500]}))
    refused('model.norms_sha256 is "a" there and "b" here', subject=Subject({"norms_sha256": "b"}))
    refused('evaluation is "needle" there', PasskeyOptions(lengths=[400], trials=1), run=passkey.run)
    (tmp_path / "settings.json").rename(tmp_path / "notes.json")
    refused("is not empty and holds no results")


def test_prompts_beyond_the_trained_length_are_noted(tmp_path, caplog):
    options = NeedleOptions(lengths=[400, 600], depths=[0.5], trials=1)
    needle.run(Oracle(), TOKENIZER, options, tmp_path / "a", subject=Subject(trained_length=500))
    assert "prompts of up to 600 tokens; the model was trained on sequences of up to 500" in caplog.text
    assert read(tmp_path / "a")[1]["notes"] == caplog.messages
    caplog.clear()
    needle.run(Oracle(), TOKENIZER, options, subject=Subject(trained_length=600))
    assert not caplog.messages
    options = PasskeyOptions(characters=[300], trials=1)
    passkey.run(Oracle(), TOKENIZER, options, subject=Subject(trained_length=500))
    assert re.fullmatch(r"prompts of up to 5\d\d tokens; the model was .* up to 500", caplog.messages[0])


def test_random_states_are_left_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002 (the state that others may use)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    needle.run(Oracle(), TOKENIZER, NEEDLE)
    passkey.run(Oracle(), TOKENIZER, PasskeyOptions(characters=[300], trials=2))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def record(length, depth, exact, needles=1, drawn=False):
    prompt = Prompt(Case(length, None if drawn else depth, 0, needles), depth, [1], "5", drawn)
    return record_of(prompt, "5" if exact else "55")


def test_tables_by_length_needles_and_depth():
    records = [
        record(100, 0.5, True),
        record(100, 0.5, False),
        record(100, 1 / 11, True),
        record(200, 0.0, False, needles=2),
        record(100, 0.97, True, drawn=True),
        record(100, 1.0, False, drawn=True),
    ]
    assert [(row["length"], row["needles"], row["depth_percent"], row["exact"]) for row in table(records)] == [
        (100, 1, "9.09", 1.0),
        (100, 1, "50", 0.5),
        (100, 1, "90-100", 0.5),
        (200, 2, "0", 0.0),
    ]
    assert summarise("needle", records) == {
        "needle/100": 0.6,
        "needle/100/substring": 1.0,
        "needle/100/n1": 0.6,
        "needle/200": 0.0,
        "needle/200/substring": 1.0,
        "needle/200/n2": 0.0,
        "needle/average": 0.5,
        "needle/average/substring": 1.0,
    }
