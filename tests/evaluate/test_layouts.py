"""One table on any layout: copies of a model share the prompts, and ranks of a copy work together."""

import json

import pytest
import torch

from megayoco.config.evaluation import NeedleOptions, PerplexityOptions
from megayoco.data.tokenizer import ByteTokenizer
from tests.evaluate.oracle import TOKENIZER, Oracle
from tests.generate.models import MODELS, build, weights

NEEDLE = NeedleOptions(lengths=[360, 430, 500], depths=[0.2, 0.9], trials=1, max_new_tokens=8)


@pytest.fixture
def haystack(tmp_path):
    path = tmp_path / "haystack.txt"
    path.write_text("".join(f"line {i} says little\n" for i in range(200)), encoding="utf-8")
    return str(path)


def evaluate(haystack, output, tensor, pipeline):
    """Both kinds of evaluation with a random model on one rank; scalars, questions asked by this rank, its replica."""
    from pathlib import Path

    from megayoco.config import ParallelConfig
    from megayoco.convert.weights import HeldTensors, Weights
    from megayoco.evaluate import needle, perplexity
    from megayoco.generate.loading import load_weights
    from megayoco.parallel.topology import build_topology

    name = "retention"
    stored = Weights(MODELS[name], HeldTensors(weights(build(name, torch.float64))), None, {})
    topology = None
    if torch.distributed.is_initialized():
        topology = build_topology(ParallelConfig(tensor=tensor, pipeline=pipeline), MODELS[name])
    model = load_weights(stored, dtype=torch.float64, topology=topology)
    options = NeedleOptions(**{**vars(NEEDLE), "haystack": haystack})
    found = needle.run(model, ByteTokenizer(), options, Path(output) / "needle")
    options = PerplexityOptions(text=haystack, length=150, documents=1, contexts=[40], ablation_tokens=20)
    return found | perplexity.run(model, ByteTokenizer(), options, Path(output) / "perplexity")


def samples(folder):
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {record["key"]: record for record in records}


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(4, 2, 1), (2, 1, 2)], ids=str)
def test_a_model_over_ranks_gives_the_table_of_one_process(workers, haystack, tmp_path, world, tensor, pipeline):
    expected = evaluate(haystack, str(tmp_path / "one"), 1, 1)
    got = workers.run(evaluate, haystack, str(tmp_path / "many"), tensor, pipeline, world=world)
    for scalars in got:
        assert scalars == pytest.approx(expected, abs=1e-6)
    one, many = samples(tmp_path / "one" / "needle"), samples(tmp_path / "many" / "needle")
    assert many == one
    assert len({record["output"] for record in one.values()}) > 1
    tables = [json.loads((tmp_path / at / "needle" / "results.json").read_text())["table"] for at in ("one", "many")]
    assert tables[0] == tables[1]


def share(haystack, output, found_before):
    """A replica that answers every prompt; how many it was asked."""
    from pathlib import Path

    from megayoco.errors import UserError
    from megayoco.evaluate import needle

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = Oracle(replica=rank, replicas=world)
    options = NeedleOptions(**{**vars(NEEDLE), "haystack": haystack, "trials": 2, "seed": 0 if found_before else 1})
    try:
        summary = needle.run(model, TOKENIZER, options, Path(output))
    except UserError as error:
        return str(error), 0
    return summary["needle/average"], model.questions


def test_replicas_share_the_groups_resume_together_and_fail_together(workers, haystack, tmp_path):
    got = workers.run(share, haystack, str(tmp_path / "out"), True, world=4)
    # six groups of two prompts over four replicas
    assert [questions for _, questions in got] == [4, 4, 2, 2]
    assert {average for average, _ in got} == {1.0}
    path = tmp_path / "out" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 12
    path.write_text("".join(lines[:-1]))
    got = workers.run(share, haystack, str(tmp_path / "out"), True, world=2)
    assert sorted(questions for _, questions in got) == [0, 1]
    assert {average for average, _ in got} == {1.0}
    errors = workers.run(share, haystack, str(tmp_path / "out"), False, world=2)
    assert len({message for message, _ in errors}) == 1
    assert "holds results of another evaluation: options.seed is 0 there and 1 here" in errors[0][0]
