"""examples/check_loss.py: the exit code of the quickstart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(run: Path, *arguments: str) -> int:
    command = [sys.executable, ROOT / "examples" / "check_loss.py", run, *arguments]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.parametrize(("last", "code"), [(6.4, 0), (6.6, 1), (float("nan"), 1)])
def test_the_mean_of_the_last_ten_steps_must_lie_under_the_first(tmp_path: Path, last: float, code: int) -> None:
    losses = [8.0, *[9.0] * 5, *[last - 1, last + 1] * 5]
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines.insert(8, {"step": 3, "valid_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert check(tmp_path) == code


def test_no_run_or_too_short_a_run_is_told_apart_from_a_bad_one(tmp_path: Path) -> None:
    assert check(tmp_path) == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 8.0}\n')
    assert check(tmp_path) == 2
