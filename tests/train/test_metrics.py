"""The arithmetic behind the figures of a run: peaks, utilisation, overhead; and what is kept of the metrics."""

import json

import pytest

from megayoco.config import ModelConfig
from megayoco.model.flops import flops_per_sequence
from megayoco.train.metrics import IntervalClock, Peak, model_flops_per_step, peak_from_table
from megayoco.train.report import step_line, truncate_metrics

MODEL = dict(pattern="llama", dim=64, layers=4, hidden_dim=128, heads=4, vocab_size=256)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 67.0),
        ("NVIDIA H100 PCIe", 756.5, 51.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA H200", 989.5, 67.0),
        ("NVIDIA GB200", 2500.0, 80.0),
        ("NVIDIA L40S", 362.0, 91.6),
        ("AMD Instinct MI300X", 1307.4, 163.4),
    ],
)
def test_peak_of_a_device_is_that_of_the_longest_name(name, half, single):
    assert peak_from_table(name, "bf16") == half * 1e12
    assert peak_from_table(name, "fp32") == single * 1e12


def test_an_unknown_device_has_no_entry():
    assert peak_from_table("NVIDIA RTX A4000", "bf16") is None  # not the A40
    assert peak_from_table("Quantum 9000", "bf16") is None


def test_rates_of_an_interval():
    clock = IntervalClock(started=100.0)
    clock.add_step(1.5, tokens=1000, flops=6e12)
    clock.add_step(1.5, tokens=1000, flops=6e12)
    clock.excluded_seconds = 2.0  # a checkpoint
    rates = clock.rates(Peak(1e13, ""), now=106.0)
    assert rates == pytest.approx({"seconds_per_step": 2, "tokens_per_second": 500, "mfu": 0.3, "overhead": 0.25})


def test_a_step_costs_three_forward_passes_of_every_sequence():
    model = ModelConfig(**MODEL)
    assert model_flops_per_step(model, 32, 8) == 24 * flops_per_sequence(model, 32)


def test_metrics_after_the_checkpoint_and_broken_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 2, 3)) + '{"step": 1, "lo')
    truncate_metrics(tmp_path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2]
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b'{"step": 1}\n\xff\n[1]\nnull\n{"step": "x"}\n{"step": 2}\n')
    truncate_metrics(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_metrics(tmp_path / "absent", 2)


def test_the_console_line_names_every_figure():
    values = {"step": 7, "phase": "0", "loss": 2.5, "grad_norm": None, "learning_rate": 3e-4, "tokens": 4_200_000}
    values |= {"tokens_per_second": 12345.0, "mfu": 0.4321, "peak_memory_bytes": 3 * 1024**3}
    line = step_line(values, 100)
    for text in ("  7/100", "loss 2.5000", "overflow", "3.000e-04", "4.2M", "12.3k tokens/s", "43.2%", "3.00 GiB"):
        assert text in line
