"""Bookkeeping of checkpoints and of the run's directory, without an engine: what is found, refused, kept, removed."""

import dataclasses
import json
import types

import pytest

from megayoco.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    load_config,
)
from megayoco.errors import UserError
from megayoco.train.checkpoint import FORMAT, NOTE, check_resumable, digest, find_latest, run_identity
from megayoco.train.output import plan_output, prepare_output

DS = {"zero_optimization": {"stage": 1}}


def topology(**sizes):
    return types.SimpleNamespace(**{"tensor": 1, "pipeline": 1, "sequence": 1, "data": 1, **sizes})


@pytest.fixture
def run(tmp_path):
    phase = PhaseConfig(sequence_length=8, steps=4, batch_size=4, learning_rate=1.0)
    return RunConfig(
        model=ModelConfig(pattern="llama", dim=16, layers=2, hidden_dim=32, heads=2, vocab_size=64),
        parallel=ParallelConfig(),
        data=DataConfig(train=["a", "b"]),
        phases=[phase, dataclasses.replace(phase, steps=6)],
        output_dir=str(tmp_path / "out"),
    )


def write_checkpoint(run, step, data=b"weights"):
    directory = plan_output(run, resume=True, overwrite=False).checkpoints
    folder = directory / f"global_step{step}"
    folder.mkdir(parents=True)
    (folder / "states.pt").write_bytes(data)
    identity = run_identity(run, topology(), DS, step)
    note = {"format": FORMAT, "step": step, "identity": identity, "files": {"states.pt": len(data)}}
    (folder / NOTE).write_text(json.dumps(note))
    (directory / "latest").write_text(folder.name)
    return directory


def test_latest_is_found_with_its_step(run):
    assert find_latest(write_checkpoint(run, 5)).step == 5


def test_no_checkpoint_yet_is_no_error(tmp_path):
    assert find_latest(tmp_path) is None


def change_note(folder, **values):
    note = json.loads((folder / NOTE).read_text())
    (folder / NOTE).write_text(json.dumps({**note, **values}))


def test_without_latest_the_last_complete_checkpoint_is_found(run):
    for step in (2, 5, 10):
        directory = write_checkpoint(run, step)
    (directory / "global_step10" / NOTE).unlink()
    (directory / "latest").unlink()
    assert find_latest(directory).step == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "states.pt").write_bytes(b"we"), "has 2 bytes, not 7"),
        (lambda folder: (folder / "states.pt").unlink(), "states.pt is missing"),
        (lambda folder: (folder / NOTE).unlink(), "not a complete checkpoint"),
        (lambda folder: (folder / NOTE).write_text("{"), "not a complete checkpoint"),
        (lambda folder: change_note(folder, step="5"), "not a complete checkpoint"),
        (lambda folder: change_note(folder, step=-5), "not a complete checkpoint"),
        (lambda folder: change_note(folder, files=["states.pt"]), "not a complete checkpoint"),
        (lambda folder: change_note(folder, identity=None), "not a complete checkpoint"),
        (lambda folder: (folder.parent / "latest").write_bytes(b"\xff"), "not a complete checkpoint"),
        (lambda folder: (folder.parent / "latest").write_text("global_step9"), "global_step9 is not a complete"),
    ],
)
def test_a_damaged_checkpoint_is_refused(run, damage, message):
    directory = write_checkpoint(run, 5)
    damage(directory / "global_step5")
    with pytest.raises(UserError, match=message):
        find_latest(directory)


def test_the_same_run_resumes_and_may_change_what_lies_ahead(run):
    found = find_latest(write_checkpoint(run, 5))
    check_resumable(found, run, topology(), DS)
    longer = dataclasses.replace(run.phases[1], steps=9, learning_rate=0.5)
    later = dataclasses.replace(run.phases[1], sequence_length=64)
    check_resumable(found, dataclasses.replace(run, phases=[run.phases[0], longer, later]), topology(), DS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: dataclasses.replace(r, seed=7), "seed = 1234, this run has 7"),
        (lambda r: dataclasses.replace(r, model=dataclasses.replace(r.model, dim=32)), "model.dim = 16.*has 32"),
        (lambda r: dataclasses.replace(r, data=DataConfig(train="c")), "data.train of phase 0"),
        (
            lambda r: dataclasses.replace(r, data=dataclasses.replace(r.data, long_document_weight=2.0)),
            "data.long_document_weight of phase 0 = 1.0, this run has 2.0",
        ),
        (lambda r: dataclasses.replace(r, data=dataclasses.replace(r.data, temperature=2.0)), "data.temperature of"),
        (lambda r: dataclasses.replace(r, phases=[r.phases[1], r.phases[1]]), "phases.0"),
        (lambda r: dataclasses.replace(r, phases=r.phases[:1]), "the run ends at step 4"),
    ],
)
def test_another_run_is_refused(run, change, message):
    found = find_latest(write_checkpoint(run, 5))
    with pytest.raises(UserError, match=message):
        check_resumable(found, change(run), topology(), DS)


def test_another_layout_is_refused_with_the_axis(run):
    found = find_latest(write_checkpoint(run, 5))
    with pytest.raises(UserError, match=r"layout tensor = 1, this run has 2.*start anew"):
        check_resumable(found, run, topology(tensor=2), DS)
    with pytest.raises(UserError, match=r"zero_optimization.stage = 1, this run has 2"):
        check_resumable(found, run, topology(), {"zero_optimization": {"stage": 2}})


def test_the_identity_survives_json_and_tells_runs_apart(run):
    identity = run_identity(run, topology(), DS, 5)
    assert json.loads(json.dumps(identity)) == identity
    assert digest(identity) != digest(run_identity(dataclasses.replace(run, seed=7), topology(), DS, 5))


def test_an_earlier_run_is_kept_without_permission_and_until_the_plan_is_carried_out(run):
    directory = write_checkpoint(run, 5)
    with pytest.raises(UserError, match=r"holds another run \(checkpoints\).*--resume.*--overwrite"):
        plan_output(run, resume=False, overwrite=False)
    plan = plan_output(run, resume=False, overwrite=True)
    assert find_latest(directory).step == 5
    (plan.directory / "notes.txt").write_text("mine")
    prepare_output(plan, run)
    assert find_latest(directory) is None
    assert sorted(path.name for path in plan.directory.iterdir()) == ["checkpoints", "config.yaml", "notes.txt"]
    assert load_config(plan.directory / "config.yaml") == run


def test_resume_finds_the_checkpoint_and_sweeps_interrupted_saves(run):
    directory = write_checkpoint(run, 5)
    (directory / ".global_step9.partial").mkdir()
    plan = plan_output(run, resume=True, overwrite=False)
    prepare_output(plan, run)
    assert plan.checkpoint.step == 5
    assert sorted(path.name for path in directory.iterdir()) == ["global_step5", "latest"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "tokenizer", "export"])
def test_resume_refuses_a_file_in_place_of_a_folder_and_the_reverse(run, name):
    path = plan_output(run, resume=True, overwrite=False).directory / name
    path.write_text("") if "." not in name else path.mkdir()
    with pytest.raises(UserError, match=rf"{name} is no .*Move it away"):
        plan_output(run, resume=True, overwrite=False)


def test_resume_refuses_an_export_that_would_replace_something_else(run):
    export = plan_output(run, resume=True, overwrite=False).directory / "export"
    export.mkdir()
    (export / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="export is not empty and not an export of ours"):
        plan_output(run, resume=True, overwrite=False)
    never = dataclasses.replace(run, checkpoint=CheckpointConfig(export="never"))
    assert plan_output(never, resume=True, overwrite=False).checkpoint is None


def test_resume_and_overwrite_exclude_each_other(run):
    with pytest.raises(UserError, match="exclude each other"):
        plan_output(run, resume=True, overwrite=True)


def test_an_output_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir .*file/out cannot be written"):
        plan_output(dataclasses.replace(run, output_dir=str(tmp_path / "file" / "out")), resume=False, overwrite=False)
