"""A checkpoint goes on at any layout: the steps after it equal those of the run that was never interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megayoco.convert.training import TrainingState, read_training_checkpoint
from megayoco.errors import UserError
from megayoco.parallel.shards import Shard
from tests.distributed.runs import Layout, exported, run
from tests.workers import Workers

STEPS = 10
"""After the checkpoint; before it there are `first`."""
RATE = 2e-3
"""At five times this rate, rounding grows a thousandfold in twenty steps, between any two layouts."""
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


class Interrupted:
    """A run at one layout, and what it had saved on its way."""

    def __init__(self, directory: Path, metrics: list[dict[str, Any]], first: int) -> None:
        self.directory = directory
        self.metrics = metrics
        self.first = first

    @property
    def saved(self) -> Path:
        return self.directory / "run" / "checkpoints" / f"global_step{self.first}"

    def copy_saved(self, directory: Path) -> None:
        """The run's directory as it was then."""
        shutil.copytree(self.saved, directory / "run" / "checkpoints" / self.saved.name)

    def losses(self) -> list[tuple[float, float]]:
        return losses(self.metrics)[self.first :]


def losses(metrics: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(workers: Workers, text: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`undisturbed(model, layout, first, ds_config)`: made once each."""
    made: dict[Any, Interrupted] = {}

    def make(model: str, layout: Layout, first: int, ds_config: dict[str, Any] | None = None) -> Interrupted:
        key = (model, layout, first, json.dumps(ds_config))
        if key not in made:
            directory, steps = tmp_path_factory.mktemp("undisturbed"), first + STEPS
            saves = {"interval": first}
            metrics = run(
                workers, directory, text, model, layout, steps, ds_config, learning_rate=RATE, checkpoint=saves
            )
            made[key] = Interrupted(directory, metrics, first)
        return made[key]

    return make


MATRIX = [
    ("yoco-retention", Layout(4, tensor=2, pipeline=2, micro_batch=4), Layout(4, zero=2)),
    ("yoco-window", Layout(4, tensor=4, micro_batch=8), Layout(4, pipeline=4)),
    ("yoco-retention", Layout(4, zero=3), Layout(4, tensor=2, zero=1)),
    ("yoco-tied", Layout(4, pipeline=2, zero=1), Layout(4, sequence=2, bands=4, zero=1)),
    # key-value heads on fewer ranks than before and replicated again, a shrinking and a growing world
    ("llama", Layout(4, tensor=4, micro_batch=4), Layout(1, micro_batch=8)),
    ("yoco-tied", Layout(1, micro_batch=8), Layout(4, tensor=2, pipeline=2, zero=1, micro_batch=4)),
    ("yoco-window", Layout(4, sequence=2, zero=3, bands=2), Layout(2, zero=3, micro_batch=4)),
]


@pytest.mark.parametrize(("model", "before", "after"), MATRIX, ids=str)
def test_ten_steps_at_another_layout_equal_the_undisturbed_run(
    workers: Workers, undisturbed: Any, text: str, tmp_path: Path, model: str, before: Layout, after: Layout
) -> None:
    whole = undisturbed(model, before, first=3)
    whole.copy_saved(tmp_path)
    metrics = run(workers, tmp_path, text, model, after, 3 + STEPS, resume="latest", learning_rate=RATE)
    got, expected = losses(metrics), whole.losses()
    assert len(got) == len(expected) == STEPS
    for step, ((loss, norm), (wanted, wanted_norm)) in enumerate(zip(got, expected, strict=True), 4):
        assert loss == pytest.approx(wanted, rel=1e-6), step
        assert norm == pytest.approx(wanted_norm, rel=1e-5), step
    # moments too: their trace in the weights after ten more steps of Adam
    weights, wanted_weights = exported(tmp_path), exported(whole.directory)
    for name, values in wanted_weights.items():
        assert np.abs(weights[name] - values).max() < 5e-6, name


SAME = [
    ("yoco-retention", Layout(4, tensor=2, pipeline=2, micro_batch=4), None),
    ("yoco-tied", Layout(4, pipeline=2, sequence=2, zero=1, micro_batch=4), BF16),
    ("yoco-window", Layout(4, tensor=2, zero=2), BF16),
    ("llama", Layout(2, zero=3), BF16),
]


@pytest.mark.parametrize(("model", "layout", "ds_config"), SAME, ids=str)
def test_ten_and_ten_steps_equal_twenty_bitwise(
    workers: Workers,
    undisturbed: Any,
    text: str,
    tmp_path: Path,
    model: str,
    layout: Layout,
    ds_config: dict[str, Any] | None,
) -> None:
    whole = undisturbed(model, layout, 10, ds_config)
    whole.copy_saved(tmp_path)
    metrics = run(workers, tmp_path, text, model, layout, 10 + STEPS, ds_config, resume="latest", learning_rate=RATE)
    assert losses(metrics) == whole.losses()
    weights, expected = exported(tmp_path), exported(whole.directory)
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("model", "layout", "ds_config"), SAME[2:], ids=str)
def test_moments_and_masters_are_those_of_the_optimizer(
    undisturbed: Any, model: str, layout: Layout, ds_config: dict[str, Any]
) -> None:
    """The squares' mean is nowhere negative, the masters round to the weights that the run exported."""
    whole = undisturbed(model, layout, 10, ds_config)
    last = whole.saved.with_name(f"global_step{10 + STEPS}")
    state, weights = TrainingState(last), read_training_checkpoint(last)
    assert state.optimizer_step == 10 + STEPS
    for name, exported_values in exported(whole.directory).items():
        master = weights.tensors[name]
        assert torch.equal(master.bfloat16().float(), torch.tensor(exported_values))
        squares = state.read(name, "exp_avg_sq", Shard(state.shapes[name]))
        assert squares.min() >= 0 and squares.max() > 0
        mean = state.read(name, "exp_avg", Shard(state.shapes[name]))
        assert bool((mean**2 <= 400 * squares + 1e-12).all())  # |m| <= sqrt(v) times a constant of the two decays


@pytest.mark.parametrize(("model", "zero"), [("yoco-retention", 1), ("yoco-tied", 2), ("yoco-tied", 3)])
def test_master_weights_equal_those_of_zero_to_fp32(
    workers: Workers, text: str, tmp_path: Path, model: str, zero: int
) -> None:
    # DeepSpeed's script does not know the files of its own optimizer for bf16 with fp32 sums (ZeRO 1)
    sums = {"data_types": {"grad_accum_dtype": "bf16" if zero == 1 else "fp32"}}
    run(workers, tmp_path, text, model, Layout(2, zero=zero), 2, {**BF16, **sums})
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "zero_to_fp32.py").exists()
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints))
    ours = read_training_checkpoint(tmp_path / "run")
    theirs = {
        {"head.weight": "lm_head.weight", "head.norm.weight": "norm.weight"}.get(k, k): v for k, v in theirs.items()
    }
    if ours.model.tie_embeddings:
        assert torch.equal(theirs.pop("lm_head.weight"), theirs["embed_tokens.weight"])
    assert theirs.keys() == set(ours.tensors)
    assert all(torch.equal(ours.tensors[name], theirs[name]) for name in theirs)


def test_a_checkpoint_without_a_parameter_is_refused(undisturbed: Any, tmp_path: Path) -> None:
    whole = undisturbed(*SAME[-1][:2], 10, SAME[-1][2])
    folder = tmp_path / whole.saved.name
    shutil.copytree(whole.saved, folder)
    layout = json.loads((folder / "layout.json").read_text())
    layout["parameters"]["norm.weight"]["pieces"].pop()
    (folder / "layout.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match=r"holds \d+ of 32 elements of a shard of norm.weight"):
        TrainingState(folder).read("norm.weight", "weight", Shard((32,)))
    with pytest.raises(UserError, match=r"layout.json has [\d,]+ bytes, not"):  # the note knows
        read_training_checkpoint(folder)
    with pytest.raises(UserError, match=r"no.weight has shape None"):
        TrainingState(folder).read("no.weight", "weight", Shard((32,)))
