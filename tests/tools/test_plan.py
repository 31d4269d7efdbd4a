"""tools/plan.py: its arithmetic by hand, the search, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megayoco.config import load_config
from megayoco.convert.formats import write_weights
from megayoco.data.command import run_command
from megayoco.dsconfig import load_deepspeed_config
from megayoco.model.flops import training_flops_per_sequence
from megayoco.train.planning import Axes, Cluster, plan_phase, plan_run, search_layouts
from tests.convert.models import random_weights
from tests.tools.datasets import ROOT, load_tool

plan = load_tool("plan")
EXAMPLE = ROOT / "examples" / "extend_context_1m_64gpu.yaml"
ZERO2 = ROOT / "ds_configs" / "zero2_bf16.json"
ONE_PHASE = """
model: {preset: yoco-3b}
parallel: {activation_checkpointing: true}
data: {train: absent}
phases: [{sequence_length: 1048576, steps: 10, batch_size: 8, learning_rate: 1.0e-4, bands: 64}]
output_dir: out
"""


def run(*arguments: Any) -> int:
    return run_command(plan.main, [str(argument) for argument in arguments])


def cluster(**changes: Any) -> Cluster:
    values: dict[str, Any] = dict(
        gpus=8,
        gpu_memory=141 * 2**30,
        gpus_per_node=8,
        intra_node=450e9,
        interconnect=50e9,
        host_link=50e9,
        peak=989.5e12,
        matmul_efficiency=0.65,
        attention_efficiency=0.5,
        network_efficiency=0.7,
    )
    return Cluster(**{**values, **changes})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(ONE_PHASE)
    return path


def test_a_step_of_one_gpu_by_hand(config: Path) -> None:
    run = load_config(config)
    ds_config: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    found = plan_phase(run, 0, ds_config, Axes(1, 1, 1, 1), 64, cluster(gpus=1))
    N, D, F, V, H, layers = 2**20, 3072, 8192, 100_288, 24, 13
    parts = found.memory.parts
    assert parts.shared == N * 4096 and parts.shared_gradients == N * 8192
    assert parts.contexts == 64 * layers * H * (128 * 128 + 1) * 4
    assert found.memory.weights == 2 * run.model.parameter_count()["total"]
    # the self half runs forward 2 - 1/64 times, once more for checkpointing, and twice backward
    products = (10 * D * D + 2 * D * H + 6 * D * F) * N * layers * (2 - 1 / 64 + 1 + 2)
    products += 4 * D * 8 * 128 * N * (2 - 1 / 64 + 2)
    products += ((4 * D * D + 6 * D * F) * layers + 2 * D * V) * N * 3
    cross = 4 * D * N * (N + 1) / 2 * layers * 3.5
    assert found.seconds["products"] == pytest.approx(8 * products / (0.65 * 989.5e12))
    assert 8 * cross / (0.5 * 989.5e12) < found.seconds["attention"] < 8.4 * cross / (0.5 * 989.5e12)
    assert found.sent == {} and found.micro_batches == 8
    needed = 8 * training_flops_per_sequence(run.model, N)
    assert found.model_flops == needed
    assert found.mfu == pytest.approx(needed / found.seconds_per_step / 989.5e12)
    assert found.tokens_per_second == pytest.approx(8 * N / found.seconds_per_step)


def test_axes_cost_bytes_over_their_bandwidth(config: Path) -> None:
    run = load_config(config, ["parallel.tensor=2", "parallel.sequence=4", "phases.0.bands=16"])
    found = plan_phase(run, 0, {"bf16": {"enabled": True}}, Axes(2, 1, 4, 1), 16, cluster())
    gathered = 8 * 2**18 * 2 * 512 * 3  # numbers of 4 heads, to 3 ranks, for 8 sequences
    assert found.sent["sequence/shared_kv"] == gathered * 2
    assert found.sent["sequence/shared_kv_gradient"] == gathered * 4
    sent = sum(count for name, count in found.sent.items() if name.startswith("sequence"))
    assert found.seconds["sequence"] == pytest.approx(sent / (450e9 * 0.7))
    # the same over two nodes: four of a node's GPUs, one of each tensor pair, send to the other node
    nodes = plan_phase(run, 0, {"bf16": {"enabled": True}}, Axes(2, 1, 8, 1), 16, cluster(gpus=16))
    sent = sum(count for name, count in nodes.sent.items() if name.startswith("sequence"))
    assert nodes.seconds["sequence"] == pytest.approx(sent / (4 * 50e9 * 0.7))


def test_a_pipeline_waits_for_its_slowest_stage(config: Path) -> None:
    run = load_config(config, ["parallel.pipeline=2", "phases.0.bands=16"])
    found = plan_phase(run, 0, {"bf16": {"enabled": True}}, Axes(1, 2, 1, 1), 16, cluster(gpus=2))
    assert found.seconds["bubble"] > 0 and found.seconds["pipeline"] > 0
    assert found.sent["pipeline/activations"] + found.sent.get("pipeline/gradient", 0) > 8 * 2**20 * 3072 * 2


def test_auto_is_what_the_trainer_would_choose(config: Path) -> None:
    run = load_config(config, ["phases.0.bands=auto"])
    ds_config = load_deepspeed_config(ZERO2, run, 8, "cpu")
    found = plan_run(run, ds_config, Axes(1, 1, 1, 8), cluster()).phases[0]
    assert found.fits and found.bands > 1
    fewer = plan_phase(run, 0, ds_config, Axes(1, 1, 1, 8), found.bands // 2, cluster())
    assert not fewer.fits


def test_search_finds_the_fastest_that_fits_and_accounts_for_the_others() -> None:
    run = load_config(EXAMPLE)
    ds_config: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    found = search_layouts(run, ds_config, cluster(gpus=64, gpu_memory=80 * 2**30))
    assert len(found.plans) + sum(found.dropped.values()) == found.tried
    assert all(plan.fits for plan in found.plans)
    times = [plan.total_seconds for plan in found.plans]
    assert times == sorted(times)
    best, given = found.plans[0], plan_run(run, ds_config, Axes(2, 1, 8, 4), cluster(gpus=64, gpu_memory=80 * 2**30))
    assert best.total_seconds <= given.total_seconds
    # as overrides of the config it is the same plan
    again = plan_run(
        load_config(EXAMPLE, plan.overrides(best).split()),
        {**ds_config, "zero_optimization": {"stage": best.zero}},
        best.axes,
        cluster(gpus=64, gpu_memory=80 * 2**30),
    )
    assert again == best


def test_search_tells_when_memory_is_the_reason(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", config, "--gpus", 2, "--gpu-memory", 8, "--search") == 2
    found = capsys.readouterr()
    assert "phase 0 does not fit into 85% of the memory" in found.out
    assert found.err.startswith("error: None of") and "more GPUs" in found.err


def test_what_does_not_fit_is_printed_and_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "plan.json"
    flags = ["--deepspeed-config", ZERO2, "--json", target]
    assert run("--config", config, "--gpus", 1, "phases.0.bands=2", *flags) == 2
    found = capsys.readouterr()
    assert "NO" in found.out
    assert found.err.strip().splitlines()[-1].startswith("error: Phase 0 does not fit into 85% of the memory. Use")
    assert not json.loads(target.read_text())["plan"]["phases"][0]["fits"]
    assert run("--config", config, "--gpus", 1, "--gpu-memory", 800, "phases.0.bands=2", *flags) == 0


def test_traffic_behind_the_computation_has_a_row_of_its_own(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What DeepSpeed overlaps lengthens no step, and is still there."""
    found = {}
    for overlap in (False, True):
        path = tmp_path / f"{overlap}.json"
        path.write_text(
            json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_comm": overlap}})
        )
        flags = ["--gpus", 8, "--gpu-memory", 141, "--network-efficiency", 0.001]
        assert run("--config", config, "--deepspeed-config", path, *flags, "--json", tmp_path / "plan.json") == 0
        assert ("data, behind the computation" in capsys.readouterr().out) == overlap
        found[overlap] = json.loads((tmp_path / "plan.json").read_text())["plan"]["phases"][0]
    apart, behind = found[False], found[True]
    assert apart["hidden_seconds"] == 0 < behind["hidden_seconds"]
    assert behind["seconds"]["data"] + behind["hidden_seconds"] == pytest.approx(apart["seconds"]["data"])
    assert behind["seconds_per_step"] + behind["hidden_seconds"] == pytest.approx(apart["seconds_per_step"])


def test_the_peak_is_that_of_the_runs_format(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = {}
    for name, flags in (("bf16", ["--deepspeed-config", ZERO2]), ("fp32", [])):
        arguments = ["--gpus", 8, "--gpu-memory", 800, *flags, "--json", tmp_path / "plan.json"]
        assert run("--config", config, *arguments) == 0
        found[name] = json.loads((tmp_path / "plan.json").read_text())
    assert "67 TFLOP/s peak" in capsys.readouterr().out
    assert [found[name]["cluster"]["peak"] / 1e12 for name in ("bf16", "fp32")] == [989.5, 67]
    products = [found[name]["plan"]["phases"][0]["seconds"]["products"] for name in ("bf16", "fp32")]
    assert products[1] == pytest.approx(products[0] * 989.5 / 67)


def test_prints_every_phase_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    flags = ["--deepspeed_config", ZERO2, "--gpus", 64, "--json", target]
    assert run("--config", EXAMPLE, "phases.3.bands=32", *flags, "--interconnect", 400) == 0
    out = capsys.readouterr().out
    for text in ("4k", "1m", "1,048,576", "32, 4,096", "sequence/shared_kv_gradient", "model FLOP utilisation", "yes"):
        assert text in out
    values = json.loads(target.read_text())["plan"]
    run_config = load_config(EXAMPLE, ["phases.3.bands=32"])
    assert [phase["bands"] for phase in values["phases"]] == [run_config.phase_bands(number) for number in range(4)]
    assert values["axes"] == {"tensor": 2, "pipeline": 1, "sequence": 8, "data": 4}
    assert run("--config", EXAMPLE, "--deepspeed-config", ZERO2, "--gpus", 64, "--search", "--json", target) == 0
    table = capsys.readouterr().out
    assert "tried" in table and "the first one: parallel.tensor=" in table
    search = json.loads(target.read_text())["search"]
    assert len(search["plans"]) == 10 and search["plans"][0]["overrides"] in table


def test_the_shape_is_that_of_the_weights_that_a_run_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights("window")
    write_weights(tmp_path / "start", "megayoco", weights)
    config, target = tmp_path / "run.yaml", tmp_path / "plan.json"
    config.write_text(
        f"""
model: {{init_from: {tmp_path / "start"}}}
data: {{train: absent}}
phases: [{{sequence_length: 64, steps: 1, batch_size: 2, learning_rate: 1.0e-4}}]
output_dir: out
"""
    )
    assert run("--config", config, "--gpus", 1, "--json", target) == 0, capsys.readouterr().err
    phase = json.loads(target.read_text())["plan"]["phases"][0]
    assert phase["memory"]["weights"] == 4 * sum(t.numel() for t in weights.tensors.values())
    assert run("--config", config, "--gpus", 1, f"model.init_from={tmp_path / 'absent'}") == 2
    assert "error: model.init_from: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", 6], "6 processes cannot be split into"),
        (["--gpus", 64, "parallel.sequence=64"], "tensor 2 = 128"),
        (["--gpus", 64, "phases.3.bands=3"], "phases.3.sequence_length 1048576 cannot be cut"),
        (["--gpus", 64, "phases.3.bands=auto", "--gpu-memory", 9], "phases.3: bands auto finds no number that fits"),
        (["--gpus", 64, "model.preset=llama-3b"], "phases.1.bands is 2, but in the llama pattern"),
        (["--gpus", 48], "phases.0: batch_size 1024 cannot be split"),
        (["--gpus", 64, "parallel.tensr=2"], "unknown key parallel.tensr"),
        (["--gpus", 64, "--json", "absent/plan.json"], "--json absent/plan.json cannot be written"),
        (["--gpus", 64, "--deepspeed_config", "absent.json"], "absent.json cannot be read"),
    ],
)
def test_mistakes_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str) -> None:
    given = [] if "--deepspeed_config" in arguments else ["--deepspeed_config", ZERO2]
    assert run("--config", EXAMPLE, *given, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--gpus", "0", "must be an integer above 0, got '0'"),
        ("--gpu-memory", "-1", "must be a number above 0, got '-1'"),
        ("--interconnect", "fast", "must be a number above 0, got 'fast'"),
        ("--peak-tflops", "inf", "must be a number above 0, got 'inf'"),
        ("--matmul-efficiency", "1.5", "must be at most 1, got '1.5'"),
        ("--gpu", "8", "unrecognized arguments"),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("--config", EXAMPLE, "--gpus", 64, flag, value)
    assert message in capsys.readouterr().err
