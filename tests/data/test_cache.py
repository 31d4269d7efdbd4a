"""The order on disk: used again, never stale, never half-written, repaired, and built once by many processes."""

import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megayoco.data import cache as module
from megayoco.data.cache import OrderSettings, open_places
from megayoco.errors import UserError

LENGTHS = [7, 1, 30, 2, 64, 5, 5, 18, 3, 40]
WHOLE = OrderSettings((0.0, 1.0), 5)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def starts(prefix, cache, settings=WHOLE):
    return open_places(prefix, settings, cache).starts.tolist()


def state(cache):
    return {str(path): path.stat().st_mtime_ns for path in cache.rglob("*")}


def test_it_is_used_again_and_goes_where_it_is_told(numbered, cache, tmp_path, monkeypatch):
    prefix = numbered("a", LENGTHS)
    first = starts(prefix, cache)
    before = state(cache)
    assert len(before) == 3 and not (tmp_path / ".megayoco-cache").exists()
    monkeypatch.chdir(tmp_path)
    assert starts("./a", "cache") == first
    assert state(cache) == before
    starts(prefix, None)
    assert (tmp_path / ".megayoco-cache").is_dir()


@pytest.mark.parametrize(
    "settings",
    [
        OrderSettings((0.0, 1.0), 6),
        OrderSettings((0.0, 1.0), None),
        OrderSettings((0.0, 0.5), 5),
        OrderSettings((0.5, 1.0), 5),
        OrderSettings((0.0, 1.0), 5, 10, 2.0),
        OrderSettings((0.0, 1.0), 5, 11, 2.0),
    ],
    ids=str,
)
def test_every_setting_has_its_own(numbered, cache, settings):
    prefix = numbered("a", LENGTHS)
    assert starts(prefix, cache, settings) != starts(prefix, cache, WHOLE) or settings.long_document == 11
    assert len(list(cache.iterdir())) == 2


def test_a_dataset_made_anew_never_uses_the_old_one(numbered, cache):
    """The same path, size and times, other content: in the index, or only in the tokens."""
    prefix = numbered("a", LENGTHS)
    times = {kind: os.stat(f"{prefix}.{kind}") for kind in ("idx", "bin")}

    def set_times():
        for kind, stat in times.items():
            os.utime(f"{prefix}.{kind}", ns=(stat.st_atime_ns, stat.st_mtime_ns))

    starts(prefix, cache)
    numbered("a", LENGTHS[::-1])
    set_times()
    assert [os.stat(f"{prefix}.{k}").st_size for k in times] == [times[k].st_size for k in times]
    places = open_places(prefix, WHOLE, cache)
    lengths = np.diff(places.ends, prepend=0)
    assert sorted(lengths.tolist()) == sorted(LENGTHS)
    assert set((places.starts + lengths).tolist()) == set(np.cumsum(LENGTHS[::-1]).tolist())
    numbered("a", LENGTHS, first=7)
    set_times()
    starts(prefix, cache)
    assert len(list(cache.iterdir())) == 3


def test_a_touched_dataset_is_looked_at_again(numbered, cache):
    prefix = numbered("a", LENGTHS)
    starts(prefix, cache)
    os.utime(f"{prefix}.bin", ns=(1, 1))
    starts(prefix, cache)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "places.npy").write_bytes(b"xx"),
        lambda folder: (folder / "places.npy").write_bytes((folder / "places.npy").read_bytes()[:-8]),
        lambda folder: (folder / "places.npy").write_bytes(bytes(288)),
        lambda folder: (folder / "places.json").write_text("{"),
        lambda folder: (folder / "places.json").write_text("{}"),
        lambda folder: (folder / "places.json").unlink(),
        lambda folder: (folder / "places.npy").unlink(),
    ],
)
def test_a_damaged_one_is_built_anew_with_a_note(numbered, cache, caplog, damage):
    prefix = numbered("a", LENGTHS)
    first = starts(prefix, cache)
    (folder,) = cache.iterdir()
    damage(folder)
    with caplog.at_level(logging.WARNING, "megayoco"):
        assert starts(prefix, cache) == first
    assert f"{folder} is damaged; building it anew" in caplog.text
    caplog.clear()
    assert starts(prefix, cache) == first
    assert not caplog.records


def test_what_killed_runs_left_is_ignored_and_removed(numbered, cache):
    prefix = numbered("a", LENGTHS)
    first = starts(prefix, cache)
    (folder,) = cache.iterdir()
    left = folder.rename(f"{folder}.tmp-{socket.gethostname()}-1")
    (left / "places.npy").write_bytes(b"half")
    assert starts(prefix, cache) == first
    assert [path.name for path in cache.iterdir()] == [folder.name]
    other = folder.rename(f"{folder}.tmp-another-node-1")  # it may be alive, and the file system may not pass locks on
    assert starts(prefix, cache) == first
    assert other.is_dir()


def test_a_disk_that_takes_nothing_is_named(numbered, monkeypatch, cache):
    prefix = numbered("a", LENGTHS)
    with pytest.raises(UserError, match=r"cannot write sample indices to /proc/nowhere.*data\.cache_dir"):
        open_places(prefix, WHOLE, "/proc/nowhere")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_places", full)
    with pytest.raises(UserError, match=r"No space left on device\. Set data\.cache_dir"):
        open_places(prefix, WHOLE, cache)
    assert not list(cache.iterdir())


def test_without_locks_it_is_built_all_the_same(numbered, cache, monkeypatch):
    def refused(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", refused)
    assert len(starts(numbered("a", LENGTHS), cache)) == len(LENGTHS)


def build_slowly(prefix, cache, log):
    original = module._build

    def build(*arguments):
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        original(*arguments)

    module._build = build
    assert sorted(starts(prefix, cache)) == sorted((np.cumsum(LENGTHS) - LENGTHS).tolist())


def test_processes_that_come_together_build_it_once(numbered, cache, tmp_path):
    prefix, log = numbered("a", LENGTHS), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_slowly, args=(prefix, cache, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "built\n"
    assert len(list(cache.iterdir())) == 1


def test_a_builder_that_is_killed_leaves_the_work_to_the_next(numbered, cache, tmp_path):
    prefix = numbered("a", LENGTHS)
    script = (
        "import sys, os, signal\nfrom megayoco.data import cache\n"
        "cache.write_text_atomically = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.open_places(sys.argv[1], cache.OrderSettings((0.0, 1.0), 5), sys.argv[2])\n"
    )
    root = Path(module.__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script, prefix, cache], cwd=root, check=False)
    assert killed.returncode == -9
    assert any(".tmp-" in path.name for path in cache.iterdir())
    assert len(starts(prefix, cache)) == len(LENGTHS)
    (folder,) = cache.iterdir()
    assert json.loads((folder / "places.json").read_text())["tokens"] == sum(LENGTHS)
