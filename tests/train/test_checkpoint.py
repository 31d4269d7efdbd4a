"""Bookkeeping of checkpoints and of the run's directory, without an engine: what is found, refused, kept, removed."""

import dataclasses
import hashlib
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
from megayoco.convert.checkpoints import FORMAT, NOTE, find_latest, recover
from megayoco.data.tokenizer import build_tokenizer
from megayoco.errors import UserError
from megayoco.train.checkpoint import check_resumable, check_tokenizer, digest, layout_values, prune, run_identity
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
    directory = plan_output(run, resume="latest", overwrite=False).checkpoints
    folder = directory / f"global_step{step}"
    folder.mkdir(parents=True)
    (folder / "states.pt").write_bytes(data)
    files = {"states.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    note = {"format": FORMAT, "step": step, "identity": run_identity(run, DS, step), "files": files}
    note |= {"layout": layout_values(topology(), DS), "tokenizer": build_tokenizer("ByteTokenizer").identity()}
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
        (lambda folder: change_note(folder, step=4), "holds the checkpoint of step 4: give the folder its name back"),
        (lambda folder: (folder.parent / "latest").write_text("../other/global_step5"), "no checkpoint"),
        (lambda folder: change_note(folder, identity=None), "not a complete checkpoint"),
        (lambda folder: (folder.parent / "latest").write_bytes(b"\xff"), "latest names .*, no checkpoint"),
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


def test_another_layout_is_refused_only_for_states_on_nvme(run):
    found = find_latest(write_checkpoint(run, 5))
    check_resumable(found, run, topology(tensor=2), {"zero_optimization": {"stage": 3}})
    nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(UserError, match=r"tensor 1 x .*ZeRO 1; optimizer states on NVMe .* not at tensor 2 x"):
        check_resumable(found, run, topology(tensor=2), nvme)


def test_another_tokenizer_is_refused(run):
    found = find_latest(write_checkpoint(run, 5))
    check_tokenizer(found, build_tokenizer("ByteTokenizer"))
    other = build_tokenizer("ByteTokenizer")
    other.vocab_size = 300
    with pytest.raises(UserError, match=r"another tokenizer \(vocab_size 257, the data of this run has 300\)"):
        check_tokenizer(found, other)


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (CheckpointConfig(), [2, 4, 6, 8, 9]),
        (CheckpointConfig(keep_last=1), [8, 9]),
        (CheckpointConfig(keep_last=2, keep_every=4), [4, 6, 8, 9]),
    ],
)
def test_pruning_keeps_the_newest_the_multiples_and_what_lies_ahead(run, config, left):
    for step in (2, 4, 6, 8, 9):
        directory = write_checkpoint(run, step)
    prune(directory, 8, config)
    assert sorted(int(path.name[11:]) for path in directory.glob("global_step*")) == left
    assert not list(directory.glob(".*"))


def test_a_replacement_that_was_cut_short_is_undone(run):
    directory = write_checkpoint(run, 5)
    (directory / "global_step5").rename(directory / ".global_step5.replaced")
    recover(directory)
    assert find_latest(directory).step == 5
    assert not (directory / ".global_step5.replaced").exists()


def test_a_tag_that_is_not_there_is_told_with_those_that_are(run):
    write_checkpoint(run, 5)
    assert plan_output(run, resume="global_step5", overwrite=False).checkpoint.step == 5
    with pytest.raises(UserError, match=r"--resume global_step6: .* has no such checkpoint, but global_step5"):
        plan_output(run, resume="global_step6", overwrite=False)


def test_latest_names_the_checkpoint_that_the_run_goes_on_from(run):
    write_checkpoint(run, 5)
    directory = write_checkpoint(run, 8)
    prepare_output(plan_output(run, resume="global_step5", overwrite=False), run)
    assert find_latest(directory).step == 5


def test_the_identity_survives_json_and_tells_runs_apart(run):
    identity = run_identity(run, DS, 5)
    assert json.loads(json.dumps(identity)) == identity
    assert digest(identity) != digest(run_identity(dataclasses.replace(run, seed=7), DS, 5))


def test_an_earlier_run_is_kept_without_permission_and_until_the_plan_is_carried_out(run):
    directory = write_checkpoint(run, 5)
    with pytest.raises(UserError, match=r"holds another run \(checkpoints\).*--resume.*--overwrite"):
        plan_output(run, resume=None, overwrite=False)
    plan = plan_output(run, resume=None, overwrite=True)
    assert find_latest(directory).step == 5
    (plan.directory / "notes.txt").write_text("mine")
    prepare_output(plan, run)
    assert find_latest(directory) is None
    assert sorted(path.name for path in plan.directory.iterdir()) == ["checkpoints", "config.yaml", "notes.txt"]
    assert load_config(plan.directory / "config.yaml") == run


def test_resume_finds_the_checkpoint_and_sweeps_interrupted_saves(run):
    directory = write_checkpoint(run, 5)
    (directory / ".global_step9.partial").mkdir()
    plan = plan_output(run, resume="latest", overwrite=False)
    prepare_output(plan, run)
    assert plan.checkpoint.step == 5
    assert sorted(path.name for path in directory.iterdir()) == ["global_step5", "latest"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "tokenizer", "export"])
def test_resume_refuses_a_file_in_place_of_a_folder_and_the_reverse(run, name):
    path = plan_output(run, resume="latest", overwrite=False).directory / name
    path.write_text("") if "." not in name else path.mkdir()
    with pytest.raises(UserError, match=rf"{name} is no .*Move it away"):
        plan_output(run, resume="latest", overwrite=False)


def test_resume_refuses_an_export_that_would_replace_something_else(run):
    export = plan_output(run, resume="latest", overwrite=False).directory / "export"
    export.mkdir()
    (export / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="export is not empty and not an export of ours"):
        plan_output(run, resume="latest", overwrite=False)
    never = dataclasses.replace(run, checkpoint=CheckpointConfig(export="never"))
    assert plan_output(never, resume="latest", overwrite=False).checkpoint is None


def test_resume_and_overwrite_exclude_each_other(run):
    with pytest.raises(UserError, match="exclude each other"):
        plan_output(run, resume="latest", overwrite=True)


def test_an_output_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir .*file/out cannot be written"):
        plan_output(dataclasses.replace(run, output_dir=str(tmp_path / "file" / "out")), resume=None, overwrite=False)
