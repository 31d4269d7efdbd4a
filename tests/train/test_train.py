"""The trainer from its command line, one process: a whole run, its exact continuation, and what stops it."""

import functools
import gc
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megayoco.config import CrossBatchConfig
from megayoco.convert.export import read_export
from megayoco.data.indexed_writer import IndexedWriter
from megayoco.data.tokenizer import build_tokenizer

TEXT = "Give the two halves their own work: one remembers, the other reads what was remembered. " * 60


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A small dataset of bytes."""
    path = str(tmp_path_factory.mktemp("data") / "bytes")
    tokenizer = build_tokenizer("ByteTokenizer")
    with IndexedWriter(path, tokenizer.vocab_size) as writer:
        for part in range(4):
            ids = np.array([*tokenizer.encode(TEXT[part:]), tokenizer.eod], writer.dtype)
            writer.add(ids, np.array([len(ids)]))
        writer.finish({"tokenizer": {**tokenizer.identity(), "eod": tokenizer.eod, "model": None}})
    return path


@pytest.fixture(scope="module")
def config(prefix, tmp_path_factory):
    """A run of ten steps in two phases of different length, batch and rotary base."""
    values = {
        "model": dict(pattern="yoco", self_mixer="window", window=8, dim=32, layers=2, hidden_dim=64, heads=2),
        "data": {"train": prefix, "split": "75,25,0", "document_mask": True},
        "phases": [
            dict(sequence_length=32, steps=4, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup_steps=2),
            dict(name="long", sequence_length=64, steps=6, batch_size=3, learning_rate=5e-3, rope_theta=5e4),
        ],
        "validation": {"interval": 3, "batches": 2},
        "logging": {"interval": 5},
        "checkpoint": {"interval": 5},
        "output_dir": "not-used",
    }
    values["model"]["vocab_size"] = 264
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses_of(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


class Result:
    def __init__(self, code, captured):
        self.code, self.out, self.err = code, captured.out, captured.err


@pytest.fixture(scope="module", autouse=True)
def quick_starts():
    """At every start, ZeRO 3 collects garbage, a million objects of the libraries to walk, and formats every parameter
    for a log that is off."""
    import megayoco.train.loop
    import megayoco.train.session  # noqa: F401

    gc.collect()
    gc.freeze()
    torch.set_printoptions(threshold=0, edgeitems=1)
    yield
    torch.set_printoptions(profile="default")
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def quick_measurement():
    """Every start measures the processor for most of a second; here no test reads the share of it that is reached."""
    from megayoco.train import metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "measured_matmul", functools.partial(metrics.measured_matmul, seconds=0.002))
        yield


@pytest.fixture
def train(config, capsys, monkeypatch):
    """train(output, *arguments) runs the command line in a world of one and leaves it again."""
    from megayoco.parallel.launch import stop_distributed
    from megayoco.parallel.topology import destroy_topology
    from megayoco.train.__main__ import main

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEGAYOCO_THREADS", "1")

    def run(output, *arguments):
        before = dict(os.environ)
        capsys.readouterr()
        try:
            code = main(["--config", str(config), f"output_dir={output}", *arguments])
        finally:
            destroy_topology()
            stop_distributed()
            os.environ.clear()
            os.environ.update(before)
        return Result(code, capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(train, *arguments): the directory of a run, made once each; tests that change it copy it."""
    made = {}

    def run(train, *arguments):
        if arguments not in made:
            output = tmp_path_factory.mktemp("finished") / "run"
            result = train(output, *arguments)
            assert result.code == 0, result.err
            made[arguments] = output
        return made[arguments]

    return run


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """stages[ZeRO stage]: the arguments that choose it."""
    folder = tmp_path_factory.mktemp("stages")
    arguments = {0: ()}
    for stage in (2, 3):
        path = folder / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        arguments[stage] = ("--deepspeed_config", str(path))
    return arguments


def go_back(directory, step):
    """A run's directory as it was after its checkpoint of this step."""
    checkpoints = directory / "checkpoints"
    for folder in checkpoints.glob("global_step*"):
        if int(folder.name.removeprefix("global_step")) > step:
            shutil.rmtree(folder)
    (checkpoints / "latest").write_text(f"global_step{step}")


def metrics(directory):
    """What a run computed, without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "phase", "loss", "grad_norm", "learning_rate", "tokens", "validation_loss")
    return [{name: row[name] for name in names if name in row} for row in rows]


def test_a_run_and_its_exact_continuation(train, tmp_path):
    whole = tmp_path / "whole"
    result = train(whole)
    assert result.code == 0, result.err
    for text in ("parameters", "tensor 1 x pipeline 1", "ZeRO 0, fp32", "phase long", "validation loss", "saved"):
        assert text in result.out
    rows = metrics(whole)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["tokens"] for row in steps] == [128 * s for s in range(1, 5)] + [512 + 192 * s for s in range(1, 7)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 4, 6, 9, 10]
    full = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert {"tokens_per_second", "mfu", "peak_memory_bytes", "seconds_per_step", "overhead"} <= full.keys()
    assert sorted(p.name for p in (whole / "checkpoints").glob("global_step*")) == ["global_step10", "global_step5"]
    assert list((whole / "tensorboard").iterdir())
    assert {"model.safetensors", "config.json"} <= {path.name for path in (whole / "export").iterdir()}

    # the same run, killed after its checkpoint of step 5 and some steps more
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    go_back(cut, 5)
    refused = train(cut)
    assert (refused.code, "holds another run" in refused.err) == (2, True)
    resumed = train(cut, "--resume")
    assert resumed.code == 0, resumed.err
    assert "resumed at step 5" in resumed.out
    assert metrics(cut) == rows

    again = train(cut, "--resume")
    assert again.code == 0
    assert "The run is complete" in again.out
    assert metrics(cut) == rows

    changed = train(cut, "--resume", "model.hidden_dim=96")
    assert (changed.code, "model.hidden_dim = 64, this run has 96" in changed.err) == (2, True)


def test_a_damaged_newest_checkpoint_is_passed_over_only_on_demand(train, finished, tmp_path):
    """One bit of one file: the sizes are right, the checksum is not."""
    out = shutil.copytree(finished(train), tmp_path / "out")
    losses = losses_of(out)
    newest = out / "checkpoints" / "global_step10"
    victim = newest / "mp_rank_00_model_states.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    result = train(out, "--resume")
    assert result.code == 2
    assert re.fullmatch(r"error: .*mp_rank_00_model_states.pt is not what was written.*--resume auto.*\n", result.err)
    result = train(out, "--resume", "auto")
    assert result.code == 0, result.err
    assert "passed over: " in result.out and "resumed at step 5" in result.out
    assert losses_of(out) == losses
    assert train(out, "--resume").code == 0  # the newest was made anew
    # `latest` names what is not there: the newest whole one all the same, and never a new run
    (newest.parent / "latest").write_text("global_step1")
    result = train(out, "--resume", "auto")
    assert "latest names step 1, of which there is no complete checkpoint" in result.out
    assert "resumed at step 10" in result.out
    for path in (newest, newest.with_name("global_step5")):
        (path / "layout.json").unlink()
    result = train(out, "--resume", "auto")
    assert result.code == 2
    assert re.match(
        r"error: no checkpoint in .* is whole \(.*\)\. Restore one, or start anew with --overwrite", result.err
    )


def test_weights_that_overwrite_would_delete_are_not_started_from(train, finished, tmp_path):
    out = shutil.copytree(finished(train), tmp_path / "out")
    for source in (out, out / "export"):
        result = train(out, f"model.init_from={source}", "--overwrite")
        assert result.code == 2
        assert result.err.startswith("error: --overwrite would delete model.init_from")
    assert train(out, "--resume").code == 0


def test_auto_begins_where_nothing_is_saved_and_a_tag_names_a_checkpoint(train, tmp_path):
    out = tmp_path / "out"
    result = train(out, "--resume", "auto")
    assert result.code == 0 and "new run" in result.out
    losses = losses_of(out)
    # an override behind the bare flag is no tag
    assert train(out, "--resume", "checkpoint.keep_last=2").code == 0
    result = train(out, "--resume", "global_step5")
    assert result.code == 0 and "resumed at step 5" in result.out
    assert losses_of(out) == losses
    assert train(out, "--resume", "global_step7").err.startswith("error: --resume global_step7: ")


def test_data_that_was_made_anew_is_no_data_to_resume_on(train, prefix, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(Path(prefix).parent, data)
    arguments = (
        tmp_path / "out",
        f"data.train={data / 'bytes'}",
        "phases=[{sequence_length: 32, steps: 6, batch_size: 2, learning_rate: 1e-3}]",
        "checkpoint={interval: 3, export: never}",
    )
    assert train(*arguments).code == 0
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "global_step6")
    (tmp_path / "out" / "checkpoints" / "latest").unlink()
    with IndexedWriter(str(data / "bytes"), 264, overwrite=True) as writer:
        writer.add(np.arange(3000, dtype=writer.dtype) % 256, np.array([1000, 1000, 500, 500]))
        writer.finish({"tokenizer": {**build_tokenizer("ByteTokenizer").identity(), "model": None}})
    result = train(*arguments, "--resume")
    assert result.code == 2
    assert "gives 2,500 tokens to an epoch of phase 0, but 15" in result.err
    assert "made anew" in result.err


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(train, tmp_path, monkeypatch):
    from megayoco.train import loop

    real = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda phase, step: float("nan") if step == 1 else real(phase, step))
    result = train(tmp_path / "out", "checkpoint.interval=3", "validation.interval=0")
    assert result.code == 2
    assert result.err.startswith("error: The loss of step 3 (phase 0) is nan.")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out" / "checkpoints" / "global_step3").exists()
    # step 2's loss is from before the bad update, its weights are from after it
    result = train(tmp_path / "again", "checkpoint.interval=1", "validation.interval=0")
    assert result.code == 2
    assert result.err.startswith("error: embed_tokens.weight is not finite after this update, so nothing is saved")
    assert sorted(path.name for path in (tmp_path / "again" / "checkpoints").glob("g*")) == ["global_step1"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), 2, "cannot be written: the file"),
        (OSError(28, "No space left on device", "states.pt"), 2, "cannot be written: No space left on device. Make"),
        (RuntimeError("pair.cc:553] Connection closed by peer [127.0.0.1]:1"), 1, "another process has ended"),
        (KeyboardInterrupt(), 130, "error: interrupted. Go on from the last checkpoint with --resume."),
    ],
)
def test_a_save_that_fails_is_one_line_and_costs_no_earlier_checkpoint(
    train, finished, tmp_path, monkeypatch, error, code, message
):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    output = shutil.copytree(finished(train), tmp_path / "out")
    go_back(output, 5)

    def save(self, state_dict, path):
        raise error

    monkeypatch.setattr(TorchCheckpointEngine, "save", save)
    result = train(output, "--resume")
    assert (result.code, result.err.count("\n")) == (code, 1)
    assert message in result.err
    monkeypatch.undo()
    assert "resumed at step 5" in train(output, "--resume").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=nowhere/at-all"], "nowhere/at-all.idx does not exist"),
        (["phases.1.data={train: nowhere/later}"], "nowhere/later.idx does not exist"),
        (["model.vocab_size=200"], "vocab"),
        (["phases.1.batch_size=4", "phases.1.micro_batch_size=3"], "batch_size"),
        (["parallel.tensor=2"], "1 processes cannot be split"),
        (["model.dim=8388608", "model.hidden_dim=8388608"], "The run needs about"),
        (["model.dimm=8"], "model.dimm"),
        (["model.memory_layers=[0]", "model.memory_window=16"], "data.document_mask hides documents from one another"),
        (["--zero-stage", "2"], "--zero-stage"),
        (["--deepspeed_config", "nowhere.json"], "nowhere.json"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(train, tmp_path, arguments, message):
    output = tmp_path / "out"
    result = train(output, *arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert not (output / "config.yaml").exists()


def test_overwrite_keeps_the_old_run_if_the_new_one_is_refused(train, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 1}\n')
    assert train(output, "--overwrite", "data.train=nowhere/at-all").code == 2
    assert (output / "metrics.jsonl").read_text() == '{"step": 1}\n'


def losses(directory):
    return [row["loss"] for row in metrics(directory) if "loss" in row]


def test_cross_batch_training_is_a_matter_of_a_phase(train, tmp_path, monkeypatch):
    """The first phase has it, the second has not; validation and the export never have."""
    from megayoco.layers.memory_attention import MemoryAttention

    seen = set()
    whole = MemoryAttention.forward

    def noted(self, x, positions, left):
        seen.add((x.shape[1], self.training, self.cross_batch))
        return whole(self, x, positions, left)

    monkeypatch.setattr(MemoryAttention, "forward", noted)
    output, cross_batch = tmp_path / "out", CrossBatchConfig(range=2)
    result = train(
        output,
        *("model.self_mixer=retention", "model.window=null", "model.memory_layers=[0]", "model.memory_window=16"),
        *("data.document_mask=false", "phases.0.cross_batch.range=2"),
    )
    assert result.code == 0, result.err
    assert {(length, cross) for length, training, cross in seen if training} == {(32, cross_batch), (64, None)}
    assert losses(output)[-1] < losses(output)[0] - 0.5
    again = train(output / "again", "--config", str(output / "config.yaml"), "phases.0.cross_batch=null")
    assert again.code == 0, again.err
    first, other = (losses(folder)[0] for folder in (output, output / "again"))
    assert first != other and first == pytest.approx(other, rel=0.1)
    model = read_export(output / "export").model
    assert (model.memory_layers, model.memory_window) == ((0,), 16)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_phase_may_forget_the_optimizer(train, finished, stages, tmp_path, stage):
    run, arguments = tmp_path / "reset", (*stages[stage], "checkpoint.interval=4", "phases.1.optimizer_state=reset")
    result = train(run, *arguments)
    assert "phase long: the optimizer starts afresh" in result.out, result.err
    carry, reset = losses(finished(train, *stages[stage])), losses(run)
    # the first loss of the new phase is computed before its first update
    assert carry[:5] == reset[:5]
    assert all(a != b for a, b in zip(carry[5:], reset[5:], strict=True))
    # as if an optimizer without past took over the weights: going on from the border of the phases says the same
    go_back(run, 4)
    result = train(run, *arguments, "--resume")
    assert "resumed at step 4" in result.out, result.err
    assert losses(run) == reset


@pytest.mark.parametrize(("stage", "bands"), [(0, (4, 2)), (3, (1, 4)), (3, (4, 1))])
def test_bands_change_no_loss(train, finished, stages, tmp_path, stage, bands):
    # ZeRO 3 learns the order of the modules in one phase and fetches ahead by it in the next
    arguments = stages[stage]
    result = train(tmp_path / "bands", *arguments, f"parallel.bands={bands[0]}", f"phases.1.bands={bands[1]}")
    assert result.code == 0, result.err
    for count in bands:
        assert count == 1 or f"in {count} bands" in result.out
    plain = finished(train, *arguments)
    for got, expected in zip(metrics(tmp_path / "bands"), metrics(plain), strict=True):
        assert got.pop("phase") == expected.pop("phase")
        assert got == pytest.approx(expected, rel=1e-4)


def test_a_run_goes_on_in_another_number_of_bands(train, tmp_path):
    constant, run = "phases.1.schedule=constant", tmp_path / "run"
    assert train(tmp_path / "whole", constant).code == 0
    assert train(run, constant, "parallel.bands=2", "phases.1.steps=2").code == 0
    result = train(run, constant, "parallel.bands=8", "parallel.band_order=split", "--resume")
    assert result.code == 0, result.err
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_bands_are_chosen_by_the_memory(train, tmp_path, monkeypatch):
    arguments = ("phases.1.bands=auto", "phases.1.sequence_length=2048", "phases.1.steps=1", "phases.0.steps=1")
    result = train(tmp_path / "roomy", *arguments)
    assert "bands" in result.out and "phase long: 1 (auto)" in result.out, result.err
    monkeypatch.setattr("megayoco.train.memory.free_memory", lambda *_: 6 * 2**20)
    result = train(tmp_path / "narrow", *arguments)
    assert re.search(r"phase long: [248] \(auto\), chunks of", result.out), result.out + result.err
    assert "bands: auto" not in (tmp_path / "narrow" / "config.yaml").read_text()
    monkeypatch.setattr("megayoco.train.memory.free_memory", lambda *_: 2**20)
    result = train(tmp_path / "none", *arguments)
    assert (result.code, "phases.1: bands auto finds no number that fits" in result.err) == (2, True)


def test_bands_that_do_not_fit_are_refused(train, tmp_path, monkeypatch):
    with monkeypatch.context() as gpu:  # a CPU has no fp16
        gpu.setattr("megayoco.train.session.precision", lambda _: "fp16")
        half = train(tmp_path / "fp16", "phases.1.bands=2")
    assert (half.code, "phases.1.bands needs bf16 or fp32" in half.err) == (2, True)
    odd = train(tmp_path / "odd", "parallel.bands=5")
    assert (odd.code, "phases.0.sequence_length" in odd.err) == (2, True)
    llama = train(
        tmp_path / "llama",
        "model={pattern: llama, dim: 32, layers: 2, hidden_dim: 64, heads: 2, vocab_size: 264}",
        "phases.1.bands=2",
    )
    assert llama.code == 2
    assert "phases.1.bands is 2, but in the llama pattern" in llama.err


def test_a_run_that_does_not_fit_is_told_what_helps_it(train, tmp_path, monkeypatch):
    monkeypatch.setattr("megayoco.train.memory.available_host_memory", lambda: 2**14)
    yoco = train(tmp_path / "yoco")
    assert (yoco.code, "parallel.sequence, parallel.bands, a higher ZeRO stage" in yoco.err) == (2, True), yoco.err
    llama = train(
        tmp_path / "llama", "model={pattern: llama, dim: 32, layers: 2, hidden_dim: 64, heads: 2, vocab_size: 264}"
    )
    assert (llama.code, "parallel.sequence, a higher ZeRO stage" in llama.err) == (2, True), llama.err
