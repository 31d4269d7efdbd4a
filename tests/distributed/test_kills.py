"""A run whose ranks are all killed at random moments, in steps and in saves, learns what it would have learnt.

bash tests/run.sh tests/distributed/test_kills.py --kills 20
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.runs import Layout, run, train, write_config
from tests.workers import Workers

LAYOUT = Layout(2, zero=1)
SAVES = {"interval": 3, "keep_last": 2}
STEPS_PER_KILL = 24


def command_line(directory: Path, log: Path) -> list[int]:
    """Goes on where it can, to the end, each rank by a command of its own; returns their exit codes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "megayoco.train", "--config", "run.yaml", "--deepspeed_config", "ds.json"]
    place = {"WORLD_SIZE": str(LAYOUT.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place |= {"LOCAL_WORLD_SIZE": place["WORLD_SIZE"], "DS_ACCELERATOR": "cpu", "MEGAYOCO_THREADS": "1"}
    with log.open("ab") as output:
        ranks = [
            subprocess.Popen(
                [*command, "--resume", "auto"],
                cwd=directory,
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=output,
            )
            for rank in range(LAYOUT.world)
        ]
    return [rank.wait(240) for rank in ranks]


def run_and_kill(directory: Path, latest: Path, seconds: float) -> None:
    """Goes on where it can, until SIGKILL ends all ranks `seconds` after they have saved a checkpoint."""
    before = latest.read_text() if latest.exists() else None
    pool = Workers(LAYOUT.world)
    files = (str(directory / "run.yaml"), str(directory / "ds.json"))
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(pool.run, train, *files, "auto", world=LAYOUT.world)
        while not running.done() and (not latest.exists() or latest.read_text() == before):
            time.sleep(0.02)
        time.sleep(seconds)
        finished = running.done()
        pool.close()
        error = running.exception()
    assert not finished, error  # it was still at work
    assert str(error).count("the process died") == LAYOUT.world, error


@pytest.mark.timeout(3600)  # many kills take long; every wait inside has its own limit
def test_a_run_killed_at_random_moments_equals_one_that_was_not(
    workers: Workers, text: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = request.config.getoption("--kills")
    steps = STEPS_PER_KILL * (kills + 1)
    (tmp_path / "whole").mkdir()
    rate = 1e-3
    whole = run(workers, tmp_path / "whole", text, "yoco-window", LAYOUT, steps, learning_rate=rate, checkpoint=SAVES)
    write_config(tmp_path, text, "yoco-window", LAYOUT, steps, None, learning_rate=rate, checkpoint=SAVES)
    latest, log = tmp_path / "run" / "checkpoints" / "latest", tmp_path / "log.txt"
    moments = random.Random()
    reached = []
    for _ in range(kills):
        run_and_kill(tmp_path, latest, moments.uniform(0, 1))
        reached.append(latest.read_text())
    assert command_line(tmp_path, log) == [0] * LAYOUT.world, log.read_text()[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    got, expected = ([(x["step"], x["loss"], x["grad_norm"]) for x in part if "loss" in x] for part in (lines, whole))
    print(f"killed after the checkpoints {', '.join(reached)}")
    assert len(set(reached)) == kills  # each start went on
    assert got == expected
