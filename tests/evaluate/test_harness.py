"""Tasks of lm-eval from names to results: the small ones of the package, a folder of the user's, every layout."""

from __future__ import annotations

import json
import os
import random
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megayoco.config.evaluation import HarnessOptions
from megayoco.convert.export import write_export
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError
from megayoco.evaluate import __main__ as command
from megayoco.evaluate import harness
from megayoco.evaluate.subject import Subject
from megayoco.model.inference import InferenceModel
from tests.generate.models import MODELS, build, weights

TOKENIZER = ByteTokenizer()
TASKS = Path(harness.__file__).parent / "tasks"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # what lm-eval tells of the machine comes from pip and other processes, which take seconds
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def model():
    return InferenceModel.of(build("retention", torch.float64))


def documents(name):
    return [json.loads(line) for line in (TASKS / name).read_text(encoding="utf-8").splitlines()]


def plain_score(model, context, continuation):
    """Sum of log p from the logits of all rows."""
    tokens = [TOKENIZER.eod, *TOKENIZER.encode(context + continuation)]
    logits, _ = model.advance(torch.tensor([tokens[:-1]]), model.empty_context(1), last_only=False)
    log_p = logits[0].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])
    return float(log_p[len(TOKENIZER.encode(context)) :].sum())


def test_the_tasks_of_the_package_end_to_end(tmp_path, capsys):
    folder = tmp_path / "run"
    decoder = build("retention")
    write_export(folder / "export", MODELS["retention"], weights(decoder), TOKENIZER, facts={"sequence_length": 60})
    arguments = ["harness", "--model", str(folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert command.main([*arguments, "--tasks", "megayoco_basics", "--limit", "4", "--log-samples"]) == 0

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # lm-eval's own format
    assert set(results["results"]) == {"megayoco_arithmetic", "megayoco_facts", "megayoco_prose"}
    assert results["n-samples"]["megayoco_facts"] == {"original": 64, "effective": 4}
    assert results["n-shot"] == {"megayoco_arithmetic": 4, "megayoco_facts": 0, "megayoco_prose": 0}
    assert results["config"]["limit"] == 4
    assert "samples" not in results
    assert results["megayoco"]["command"].startswith("python -m megayoco.evaluate")

    model = InferenceModel.of(decoder)
    right = 0
    for document in documents("facts.jsonl")[4:8]:  # the first four are for few-shot prompts
        scores = [plain_score(model, document["text"], f" {choice}") for choice in document["choices"]]
        right += document["choices"][int(np.argmax(scores))] == document["answer"]
    assert results["results"]["megayoco_facts"]["acc,none"] == right / 4
    texts = [document["text"] for document in documents("prose.jsonl")[:4]]
    bits = -sum(plain_score(model, "", text) for text in texts) / sum(map(len, texts)) / np.log(2)
    assert results["results"]["megayoco_prose"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)

    out, err = capsys.readouterr()
    assert "|megayoco_facts" in out
    assert "harness/megayoco_arithmetic/exact_match/first-number" in out
    assert "trained on at most 60" in err or "trained on at most 60" in str(results["megayoco"]["notes"])
    header, *rows = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert header == "task,metric,filter,value,stderr,shots"
    assert len(rows) == 6
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples_megayoco_arithmetic.jsonl").open()]
    prompt = samples[0]["arguments"][0][0]
    assert prompt.count("=") == 5
    assert prompt.startswith(documents("arithmetic.jsonl")[0]["problem"])


def test_sums_and_choices_of_the_package_are_right():
    for document in documents("arithmetic.jsonl"):
        left, sign, right = document["problem"].split()
        value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        assert str(value) == document["answer"], document
    for document in documents("facts.jsonl"):
        assert len(set(document["choices"])) == 4, document
        assert document["answer"] in document["choices"], document


TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""


@pytest.fixture
def local(tmp_path):
    """A folder with two tasks of the user's."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"Count to {n}:", "answer": f"{n}"} for n in range(3, 8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = folder / "data.jsonl"
    mean = "aggregation: mean, higher_is_better: true"
    generate = f"generation_kwargs: {{until: ['\\n'], max_gen_toks: 5}}\nmetric_list: [{{metric: exact_match, {mean}}}]"
    (folder / "a.yaml").write_text(TASK.format(name="words", data=data, kind="generate_until", more=generate))
    perplexity = f"metric_list: [{{metric: perplexity, aggregation: perplexity}}, {{metric: acc, {mean}}}]"
    (folder / "b.yaml").write_text(TASK.format(name="answers", data=data, kind="loglikelihood", more=perplexity))
    return folder


def test_a_folder_of_the_users_and_an_interruption(model, local, tmp_path, monkeypatch):
    options = HarnessOptions(tasks=["local_*"], include_path=[str(local)], batch_size=2)
    calls, limit = [], None
    losses = InferenceModel.losses

    def counted(*arguments):
        calls.append(None)
        if limit is not None and len(calls) > limit:
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(InferenceModel, "losses", counted)
    whole = harness.run(model, TOKENIZER, options, tmp_path / "whole")
    assert set(whole) == {
        "harness/local_answers/perplexity",
        "harness/local_answers/acc",
        "harness/local_words/exact_match",
    }
    expected = [plain_score(model, f"Count to {n}:", f"{n}") for n in range(3, 8)]
    assert whole["harness/local_answers/perplexity"] == pytest.approx(np.exp(-np.mean(expected)), rel=1e-4)

    whole_calls, limit = len(calls), 2
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        harness.run(model, TOKENIZER, options, tmp_path / "parts")
    assert not (tmp_path / "parts" / "results.json").exists()
    calls.clear()
    limit = None
    assert harness.run(model, TOKENIZER, options, tmp_path / "parts") == whole
    assert len(calls) == whole_calls - 2
    # a task that has changed since gets no old answers
    (local / "data.jsonl").write_text('{"question": "Count to 3:", "answer": "4"}\n')
    changed = harness.run(model, TOKENIZER, options, tmp_path / "parts")
    assert changed["harness/local_answers/perplexity"] != whole["harness/local_answers/perplexity"]


def test_nothing_of_the_process_is_changed(model, local, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state(), dict(os.environ)  # noqa: NPY002
    options = HarnessOptions(tasks=["local_answers"], include_path=[str(local)])
    harness.run(model, TOKENIZER, options)
    harness.check(TOKENIZER, options)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert dict(os.environ) == before[3]


def test_what_a_maximum_cuts_off_is_told(model, local, tmp_path, caplog):
    options = HarnessOptions(tasks=["local_answers"], include_path=[str(local)], max_length=10)
    harness.run(model, TOKENIZER, options, tmp_path / "out", subject=Subject(trained_length=8))
    # eod and 11 of the question; the answer is predicted, not read
    told = "5 of 5 requests exceed max_length 10 tokens and lost their beginnings, 10 tokens in all; the longest has 12"
    assert told in caplog.text
    assert "the longest request has 10 tokens, the model was trained on at most 8" in caplog.text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["megayoco"]["notes"][0] == told


def test_results_of_other_options_are_refused_before_the_work(model, local, tmp_path):
    options = HarnessOptions(tasks=["local_answers"], include_path=[str(local)])
    harness.run(model, TOKENIZER, options, tmp_path / "out")
    other = HarnessOptions(tasks=["local_nothing"], include_path=[str(local)])
    with pytest.raises(UserError, match="holds results of another evaluation"):
        harness.run(model, TOKENIZER, other, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include_path": ["nowhere"]}, "include_path nowhere is no folder"),
        ({"metadata": "[1]"}, "is no JSON object"),
        ({"metadata": "{"}, "is not JSON"),
        ({"tasks": ["megayoco_facts,megayoco_basics"]}, "task megayoco_facts is named twice"),
        ({"apply_chat_template": True}, "has no chat template"),
        ({"start_token": "bos"}, "the tokenizer has no such token"),
    ],
    ids=str,
)
def test_wrong_options_are_told_before_there_is_a_model(options, message):
    with pytest.raises(UserError, match=message):
        harness.check(TOKENIZER, HarnessOptions(**{"tasks": ["megayoco_facts"], **options}))


def test_generation_arguments_are_names_with_values(capsys):
    arguments = ["harness", "--model", "none", "--output", "none", "--tasks", "megayoco_facts"]
    assert command.main([*arguments, "--gen-kwargs", "temperature=0.7,greedy"]) == 2
    assert "error: --gen-kwargs has 'greedy', which is no name=value" in capsys.readouterr().err


def test_an_unknown_task_is_told_with_those_that_are_near(monkeypatch):
    from megayoco.evaluate import harness_tasks

    # lm-eval's own ten thousand take half a minute
    monkeypatch.setattr(harness_tasks, "TaskManager", partial(harness_tasks.TaskManager, include_defaults=False))
    with pytest.raises(UserError, match=r"no task 'megayoco_fact'.*Did you mean megayoco_facts"):
        harness.check(TOKENIZER, HarnessOptions(tasks=["megayoco_fact"]))


def test_a_task_without_its_data_is_told(local):
    (local / "data.jsonl").unlink()
    with pytest.raises(UserError, match="task local_words cannot be loaded: FileNotFoundError"):
        harness.check(TOKENIZER, HarnessOptions(tasks=["local_words"], include_path=[str(local)]))


def test_metadata_and_a_tokenizer_of_transformers_reach_the_tasks(model, local):
    """Tasks like RULER's make texts of a length that they measure with the model's tokenizer."""
    (local / "make.py").write_text(
        "import datasets\n"
        "from transformers import AutoTokenizer\n"
        "def make(lengths, tokenizer, **rest):\n"
        "    count = len(AutoTokenizer.from_pretrained(tokenizer)('abcd').input_ids)\n"
        "    rows = [{'question': 'q', 'answer': f'{count} {length}'} for length in lengths]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n"
    )
    text = (local / "b.yaml").read_text().replace("local_answers", "local_made").replace("dataset_path: json\n", "")
    start, end = text.index("dataset_kwargs:"), text.index("test_split")
    (local / "c.yaml").write_text(text[:start] + "custom_dataset: !function make.make\n" + text[end:])
    metadata = '{"lengths": [16, 32]}'
    options = HarnessOptions(tasks=["local_made"], include_path=[str(local)], metadata=metadata)
    got = harness.run(model, TOKENIZER, options)["harness/local_made/perplexity"]
    expected = [plain_score(model, "q", f"4 {length}") for length in (16, 32)]
    assert got == pytest.approx(np.exp(-np.mean(expected)), rel=1e-4)


def test_without_lm_eval_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs lm-eval, which is not installed: pip install "lm-eval>='):
        harness.check(TOKENIZER, HarnessOptions(tasks=["megayoco_facts"]))
    setup = runpy.run_path(str(Path(harness.__file__).parents[2] / "setup.py"))
    assert setup["EXTRAS"]["eval"] == [harness.LM_EVAL]


def evaluate(output, tensor):
    """The scalars on one rank, and what it printed to the terminal."""
    import contextlib
    import io

    from megayoco.config import ParallelConfig
    from megayoco.convert.weights import HeldTensors, Weights
    from megayoco.generate.loading import load_weights
    from megayoco.parallel.topology import build_topology

    os.environ["HF_HUB_OFFLINE"] = "1"
    name = "retention"
    stored = Weights(MODELS[name], HeldTensors(weights(build(name, torch.float64))), None, {})
    topology = None
    if torch.distributed.is_initialized():
        topology = build_topology(ParallelConfig(tensor=tensor), MODELS[name])
    model = load_weights(stored, dtype=torch.float64, topology=topology)
    options = HarnessOptions(tasks=["megayoco_basics"], limit=3, batch_size=2)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = harness.run(model, TOKENIZER, options, Path(output), progress=lambda done, total, text: None)
    return found, printed.getvalue()


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (3, 1)], ids=["tensor-2", "replicas-3"])
def test_every_layout_gives_the_results_of_one_process(workers, tmp_path, world, tensor):
    expected, table = evaluate(tmp_path / "one", 1)
    ranks = workers.run(evaluate, str(tmp_path / "many"), tensor, world=world)
    for got, _ in ranks:
        # whole models take the same batches; shards add up in another order
        assert got == (expected if tensor == 1 else pytest.approx(expected, rel=1e-9))
    assert [printed for _, printed in ranks] == [table] + [""] * (world - 1)
    kept = [(tmp_path / at / "samples.jsonl").read_text().splitlines() for at in ("one", "many")]
    assert {json.loads(line)["key"] for line in kept[0]} == {json.loads(line)["key"] for line in kept[1]}
