"""Preparation: the same bytes whatever the workers, the chunks and the interruptions; nothing lost without a word."""

import fcntl
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megayoco.data import encode, partial, prepare, workers
from megayoco.data.encode import Task
from megayoco.data.indexed import check_prefix, read_index
from megayoco.data.inputs import find_inputs
from megayoco.data.prepare import Interrupted, preprocess
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError

ROOT = Path(__file__).parents[2]
BYTES = Task("ByteTokenizer", append_eod=True)
SKIP = Task("ByteTokenizer", append_eod=True, skip=True, max_document_bytes=1000)
TWO_KEYS = Task("ByteTokenizer", fields={"text": ("text",), "title": ("title",)}, skip=True)


def lines_of(records) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


def corpus(folder: Path, documents: int = 200) -> list:
    """Files of documents of all kinds, among them some that cannot be used."""
    folder.mkdir(exist_ok=True)
    kinds = [
        lambda i: {"text": f"document {i} " + "words " * (i % 9), "title": f"title {i}"},
        lambda i: {"text": f"é🙂 {i}\n" * (i % 5), "title": ""},
        lambda i: {"text": "", "title": "empty"},
        lambda i: {"text": "no title"} if i % 11 == 0 else {"text": "\ud800", "title": "surrogate"},
        lambda i: b"not json" if i % 23 == 0 else b"",
    ]
    records = [kinds[i % len(kinds)](i) for i in range(documents)]
    third = documents // 3
    for number in range(3):
        (folder / f"{number}.jsonl").write_bytes(lines_of(records[number * third : (number + 1) * third]))
    return find_inputs([str(folder)]).sources


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokens_of(prefix) -> list[list[int]]:
    import numpy as np

    index = check_prefix(str(prefix), 300)
    tokens = np.fromfile(f"{prefix}.bin", index.dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The input, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("prepared")
    sources = corpus(folder / "in")
    preprocess(sources, str(folder / "out" / "c"), TWO_KEYS)
    return sources, outputs(folder / "out")


def test_skipped_records_are_listed_and_all_others_written(expected):
    sources, files = expected
    pairs = [f"c_{key}_document.{kind}" for key in ("text", "title") for kind in ("bin", "idx", "meta.json")]
    assert sorted(files) == sorted([*pairs, "c_skipped.jsonl"])
    listed = [json.loads(line) for line in files["c_skipped.jsonl"].splitlines()]
    meta = json.loads(files["c_text_document.meta.json"])
    titles = json.loads(files["c_title_document.meta.json"])
    lines = [line for source in sources for line in Path(source.path).read_bytes().split(b"\n") if line]
    assert meta["skipped"] == titles["skipped"] == len(listed) >= 5
    for counts in (meta, titles):
        assert counts["documents"] + counts["empty_documents"] + counts["skipped"] == len(lines)
    assert {entry["reason"].split("(")[0] for entry in listed} == {"not JSON ", "no key 'title', only 'text'"}
    for entry in listed:
        line = Path(entry["file"]).read_bytes().split(b"\n")[entry["line"] - 1]
        assert line == b"not json" or b'"title"' not in line


@settings(deadline=None, max_examples=15)
@given(chunk_bytes=st.integers(1, 5000))
def test_chunks_of_any_size_give_the_same_bytes(expected, tmp_path_factory, chunk_bytes):
    sources, files = expected
    folder = tmp_path_factory.mktemp("again")
    preprocess(sources, str(folder / "c"), TWO_KEYS, chunk_bytes=chunk_bytes)
    assert outputs(folder) == files


def test_workers_give_the_same_bytes(expected, tmp_path):
    sources, files = expected
    preprocess(sources, str(tmp_path / "c"), TWO_KEYS, workers=3, chunk_bytes=400)
    assert outputs(tmp_path) == files


@pytest.mark.parametrize("record_every", [0, 400])
def test_an_interruption_behind_any_chunk_changes_nothing(expected, tmp_path, monkeypatch, record_every):
    """Interrupted again and again, each run doing a few more chunks, until it is done."""
    sources, files = expected
    monkeypatch.setattr(partial, "RECORD_BYTES", record_every)
    seen = []

    def stop_after(chunks):
        def report(totals):
            nonlocal chunks
            chunks -= 1
            if chunks < 0:
                raise KeyboardInterrupt

        return report

    for attempt in range(60):
        try:
            preprocess(
                sources, str(tmp_path / "c"), TWO_KEYS, chunk_bytes=300, resume=True, report=stop_after(1 + attempt % 4)
            )
            break
        except Interrupted as error:
            seen.append(str(error))
            assert not list(tmp_path.glob("c_*"))  # nothing that looks finished
    assert any("--resume" in text for text in seen)
    assert len(seen) > 5
    assert outputs(tmp_path) == files


def test_a_kill_while_the_files_get_their_names_is_repaired(expected, tmp_path, monkeypatch):
    sources, files = expected
    calls = 0
    replace = os.replace

    for survive in range(12):
        folder = tmp_path / str(survive)
        calls = 0

        def killed(source, target, survive=survive):
            nonlocal calls
            if ".partial" not in str(target):
                calls += 1
                if calls > survive:
                    raise SystemExit  # neither UserError nor Ctrl-C: nothing reacts to it
            return replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        try:
            preprocess(sources, str(folder / "c"), TWO_KEYS)
            break
        except SystemExit:
            pass
        monkeypatch.undo()
        assert not (folder / "c_title_document.idx").exists() or survive >= 6
        with pytest.raises(UserError, match="unfinished run"):
            preprocess(sources, str(folder / "c"), TWO_KEYS)
        preprocess(sources, str(folder / "c"), TWO_KEYS, resume=True)
        assert outputs(folder) == files
    assert survive == 7  # two pairs of three files and the report


DRIVER = """
import sys, time
from megayoco.data import partial
from megayoco.data.chunks import CHUNK_BYTES
from megayoco.data.command import run_command
from megayoco.data.encode import Task
from megayoco.data.inputs import find_inputs
from megayoco.data.prepare import preprocess

if __name__ == "__main__":
    folder, prefix, workers, resume, slow = sys.argv[1:]
    partial.RECORD_BYTES = 2000
    def report(totals):
        print(totals.records, flush=True)
        time.sleep(float(slow))
    run = lambda arguments: preprocess(
        find_inputs([folder]).sources, prefix, Task("ByteTokenizer", append_eod=True), workers=int(workers),
        resume=resume == "resume", chunk_bytes=300, report=report,
    )
    sys.exit(run_command(run, []))
"""


@pytest.fixture
def driver(tmp_path):
    """driver(prefix, workers, resume, slow) -> a started process that reports every chunk."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_bytes(lines_of({"text": f"document {i} " * (1 + i % 7)} for i in range(300)))

    def start(prefix, workers=1, resume=False, slow=0.01, **options):
        arguments = [sys.executable, script, source, prefix, workers, "resume" if resume else "fresh", slow]
        return subprocess.Popen(
            [str(a) for a in arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return start


def wait_for_records(process, least: int) -> None:
    for line in process.stdout:
        if int(line) >= least:
            return
    raise AssertionError(process.stderr.read())


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_and_resume_give_the_undisturbed_result(driver, tmp_path, workers):
    process = driver(tmp_path / "two" / "c", workers)
    wait_for_records(process, 60)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == (workers if workers > 1 else 0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for _ in range(500):  # the workers notice
        if not any(alive(child) for child in children):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("a worker outlived its parent")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["c.partial"]
    recorded = json.loads((tmp_path / "two" / "c.partial" / "state.json").read_text())
    assert 0 < recorded["totals"]["records"] < 300
    second = driver(tmp_path / "two" / "c", workers, resume=True)
    wait_for_records(second, recorded["totals"]["records"])
    second.kill()
    second.communicate()
    third = driver(tmp_path / "two" / "c", workers, resume=True, slow=0)
    out, error = third.communicate()
    assert third.returncode == 0, error
    assert int(out.split()[0]) >= recorded["totals"]["records"]  # it did not begin again
    preprocess(find_inputs([str(tmp_path / "in")]).sources, str(tmp_path / "one" / "c"), BYTES)
    assert outputs(tmp_path / "two") == outputs(tmp_path / "one")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_the_remedy(driver, tmp_path, number, code):
    # a shell's background job, such as this suite may be, hands on that Ctrl-C is ignored
    process = driver(tmp_path / "o" / "c", workers=2, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for_records(process, 60)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == code
    assert error.splitlines()[-1].startswith("error: interrupted: ") and "--resume" in error
    assert "Traceback" not in error
    assert (tmp_path / "o" / "c.partial" / "state.json").exists()


def test_a_full_disk_is_an_error_and_resume_goes_on(driver, tmp_path):
    def limit():  # of a file's size: the same OSError in the same places as a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = driver(tmp_path / "o" / "c", slow=0, preexec_fn=limit)
    _, error = process.communicate()
    assert process.returncode == 2
    assert error.startswith("error: cannot write") and "--resume goes on" in error
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["c.partial"]
    second = driver(tmp_path / "o" / "c", resume=True, slow=0)
    assert second.communicate() and second.returncode == 0
    preprocess(find_inputs([str(tmp_path / "in")]).sources, str(tmp_path / "whole" / "c"), BYTES)
    assert outputs(tmp_path / "o") == outputs(tmp_path / "whole")


def test_two_runs_on_one_prefix_are_refused(expected, tmp_path):
    sources, files = expected
    (tmp_path / "c.partial").mkdir()
    with open(tmp_path / "c.partial" / "lock", "w") as other:
        other.write("process 17 on there")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="is being written by process 17 on there"):
                preprocess(sources, str(tmp_path / "c"), TWO_KEYS, **options)
    preprocess(sources, str(tmp_path / "c"), TWO_KEYS)  # what a dead run left is no obstacle
    assert outputs(tmp_path) == files


def interrupt(sources, prefix, task, after=3, **options) -> None:
    count = 0

    def report(totals):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        preprocess(sources, prefix, task, chunk_bytes=300, report=report, **options)


def test_an_unfinished_run_is_kept_for_the_same_settings(expected, tmp_path, monkeypatch):
    sources, files = expected
    monkeypatch.setattr(partial, "RECORD_BYTES", 0)
    prefix = str(tmp_path / "c")
    interrupt(sources, prefix, TWO_KEYS, after=15)
    with pytest.raises(UserError, match=r"holds an unfinished run\. Give --resume to go on with it, or --overwrite"):
        preprocess(sources, prefix, TWO_KEYS)
    other = {
        "--append-eod was false and is true": Task("ByteTokenizer", fields=TWO_KEYS.fields, skip=True, append_eod=True),
        "--on-error was skip and is stop": Task("ByteTokenizer", fields=TWO_KEYS.fields),
        "--max-document-mb": Task("ByteTokenizer", fields=TWO_KEYS.fields, skip=True, max_document_bytes=5000),
        "--json-keys": Task("ByteTokenizer", fields={"text": ("text",)}, skip=True),
    }
    for message, task in other.items():
        with pytest.raises(UserError, match=message):
            preprocess(sources, prefix, task, resume=True)
    with pytest.raises(UserError, match="--input was 3 files and is 2 files"):
        preprocess(sources[:2], prefix, TWO_KEYS, resume=True)
    os.utime(sources[1].path, ns=(1, 1))
    changed = find_inputs([str(Path(sources[0].path).parent)]).sources
    with pytest.raises(UserError, match=r"1\.jsonl has changed since the run"):
        preprocess(changed, prefix, TWO_KEYS, resume=True)
    os.utime(sources[1].path, ns=(sources[1].modified, sources[1].modified))
    preprocess(sources, prefix, TWO_KEYS, resume=True)
    assert outputs(tmp_path) == files
    interrupt(sources, prefix, TWO_KEYS, overwrite=True)
    assert {name: outputs_or_none(tmp_path / name) for name in files} == files  # the old pairs are still there
    preprocess(sources, prefix, TWO_KEYS, overwrite=True)
    assert outputs(tmp_path) == files


def outputs_or_none(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def test_resume_without_an_unfinished_run(expected, tmp_path, monkeypatch):
    """Job scripts give --resume always: it begins, goes on, or finds that all is done; other data are not replaced."""
    sources, files = expected
    prefix = str(tmp_path / "c")
    first = preprocess(sources, prefix, TWO_KEYS, resume=True)
    assert outputs(tmp_path) == files
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(encode, "encode_chunk", None)
    (tmp_path / "c.partial").mkdir()  # it was killed when only the folder was left
    (tmp_path / "c.partial" / "settings.json").write_text("{}")
    again = preprocess(sources, prefix, TWO_KEYS, resume=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert again.keys == first.keys and again.skipped == first.skipped
    for other in (sources[:2], sources):
        task = TWO_KEYS if other != sources else Task("ByteTokenizer", fields=TWO_KEYS.fields, append_eod=True)
        with pytest.raises(UserError, match=r"c_text_document\.bin exists"):
            preprocess(other, prefix, task, resume=True)


def test_output_damaged_between_the_runs_is_noticed(expected, tmp_path, monkeypatch):
    sources, _ = expected
    monkeypatch.setattr(partial, "RECORD_BYTES", 0)
    interrupt(sources, str(tmp_path / "c"), TWO_KEYS)
    os.truncate(tmp_path / "c.partial" / "text.bin", 3)
    with pytest.raises(UserError, match=r"text\.bin is shorter than the"):
        preprocess(sources, str(tmp_path / "c"), TWO_KEYS, resume=True)
    (tmp_path / "c.partial" / "state.json").write_text('{"position": 5}')
    with pytest.raises(UserError, match=r"state\.json is not the state of a run. Give --overwrite"):
        preprocess(sources, str(tmp_path / "c"), TWO_KEYS, resume=True)


def test_files_of_the_user_in_the_partial_folder_survive(expected, tmp_path):
    sources, files = expected
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "notes.txt").write_text("mine")
    preprocess(sources, str(tmp_path / "c"), TWO_KEYS)
    assert [path.name for path in (tmp_path / "c.partial").iterdir()] == ["notes.txt"]


def write(path: Path, *records) -> list:
    path.write_bytes(lines_of(records))
    return find_inputs([str(path)]).sources


def test_a_mistake_keeps_what_was_done_and_skipping_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "RECORD_BYTES", 0)
    records = [{"text": f"document {i}"} for i in range(100)]
    sources = write(tmp_path / "a.jsonl", *records[:70], b"{", *records[70:])
    prefix = str(tmp_path / "o" / "c")
    with pytest.raises(UserError, match=r"a\.jsonl, line 71: not JSON.*--on-error skip.*\d+ documents are kept"):
        preprocess(sources, prefix, Task("ByteTokenizer"), chunk_bytes=200)
    totals = preprocess(sources, prefix, Task("ByteTokenizer", skip=True), chunk_bytes=200, resume=True)
    assert (totals.records, totals.skipped) == (100, 1)
    assert tokens_of(f"{prefix}_text_document") == [list(record["text"].encode()) for record in records]


def test_every_kind_of_unusable_record_is_counted(tmp_path):
    good = {"text": "good"}
    bad = [
        b"{",
        b"[1]",
        b"5",
        b'{"text": "\xff"}',
        {"body": "x"},
        {"text": None},
        {"text": 5},
        {"text": ["x"]},
        b"{} {}",
    ]
    bad += [{"text": "x" * 1000}, b'{"text": "cut']
    records = [record for pair in zip([good] * len(bad), bad, strict=True) for record in pair]
    sources = write(tmp_path / "a.jsonl", *records)
    content = Path(sources[0].path).read_bytes()
    Path(sources[0].path).write_bytes(content[:-1])  # the file is cut in its last line
    for options in ({}, {"chunk_bytes": 50}, {"workers": 2, "chunk_bytes": 100}):
        prefix = str(tmp_path / "o" / "c")
        totals = preprocess(find_inputs([sources[0].path]).sources, prefix, SKIP, overwrite=True, **options)
        assert (totals.records, totals.skipped) == (len(bad), len(bad))
        assert tokens_of(f"{prefix}_text_document") == [[*b"good", 256]] * len(bad)
        listed = [json.loads(line) for line in Path(f"{prefix}_skipped.jsonl").read_text().splitlines()]
        assert [entry["line"] for entry in listed] == list(range(2, 2 * len(bad) + 1, 2))
        assert "is longer than 0 MB" in listed[-2]["reason"]
        assert "the file may be cut short" in listed[-1]["reason"]
    for number, record in enumerate(bad[:9]):
        sources = write(tmp_path / "b.jsonl", good, record)
        with pytest.raises(UserError, match=r"b\.jsonl, line 2: "):
            preprocess(sources, str(tmp_path / f"b{number}"), Task("ByteTokenizer"))


def test_no_document_at_all_is_an_error(tmp_path):
    for records, task in [([{"text": ""}], BYTES), ([b"{"], SKIP), ([], BYTES)]:
        with pytest.raises(UserError, match="no document with text under the key 'text'"):
            preprocess(write(tmp_path / "a.jsonl", *records), str(tmp_path / "o" / "c"), task)
        assert not list((tmp_path / "o").iterdir())


class Picky(ByteTokenizer):
    """A tokenizer that refuses some documents and fails at others."""

    def _encode_batch(self, texts, allow_special):
        for text in texts:
            if "refuse" in text:
                raise UserError("this text is refused.")
            if "fail" in text:
                raise BaseException("a panic")
        return super()._encode_batch(texts, allow_special)


def test_a_document_that_the_tokenizer_refuses_has_a_place(tmp_path, monkeypatch):
    monkeypatch.setattr(Task, "build_tokenizer", lambda self: Picky())
    records = [{"text": text, "title": "t"} for text in ("a", "refuse 1", "b", "refuse 2", "c")]
    sources = write(tmp_path / "a.jsonl", *records)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: this text is refused\. Repair"):
        preprocess(sources, str(tmp_path / "o"), BYTES)
    totals = preprocess(sources, str(tmp_path / "o"), TWO_KEYS)
    assert (totals.records, totals.skipped) == (3, 2)
    assert tokens_of(tmp_path / "o_text_document") == [[97], [98], [99]]
    assert len(tokens_of(tmp_path / "o_title_document")) == 3
    sources = write(tmp_path / "b.jsonl", {"text": "a"}, {"text": "fail"})
    with pytest.raises(RuntimeError, match=r"b\.jsonl, lines 1 to 2: BaseException: a panic"):
        preprocess(sources, str(tmp_path / "p"), SKIP)


def die(connection, *rest):
    connection.recv()
    os._exit(9)


def answer_with_a_bug(connection, *rest):
    connection.recv()
    connection.send(("bug", "Traceback of a worker"))
    time.sleep(60)


def test_a_worker_that_dies_or_fails_ends_the_run_with_the_place(tmp_path, monkeypatch):
    sources = write(tmp_path / "a.jsonl", *[{"text": "fine"}] * 50)
    for serve, error, message in [
        (die, UserError, r"a\.jsonl, lines 1 to \d+: a worker process died \(exit code 9\)"),
        (answer_with_a_bug, RuntimeError, r"a\.jsonl, lines 1 to \d+: a worker process failed:\nTraceback of a worker"),
    ]:
        monkeypatch.setattr(workers, "_serve", serve)
        with pytest.raises(error, match=message):
            preprocess(sources, str(tmp_path / "o" / "c"), BYTES, workers=2, chunk_bytes=200)
        assert list((tmp_path / "o").iterdir()) == []


def test_a_killed_worker_ends_the_run_and_what_was_done_is_kept(driver, tmp_path):
    process = driver(tmp_path / "o" / "c", workers=2)
    wait_for_records(process, 60)
    (first, _) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 2
    assert "a worker process died (exit code -9)" in error and "--resume goes on" in error
    with pytest.raises(UserError, match=r"c\.partial holds an unfinished run"):
        read_index(str(tmp_path / "o" / "c_text_document"))


def test_a_damaged_file_is_counted_and_the_next_one_read(tmp_path):
    good = {"text": "good"}
    packed = gzip.compress(lines_of([{"text": os.urandom(50).hex()} for _ in range(100)]))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-1000])
    write(tmp_path / "b.jsonl", good)
    sources = find_inputs([str(tmp_path)]).sources
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, line \d+: the gzip data are cut short after line \d+\. Copy"):
        preprocess(sources, str(tmp_path / "o" / "c"), BYTES)
    totals = preprocess(sources, str(tmp_path / "o" / "c"), SKIP)
    (listed,) = (json.loads(line) for line in (tmp_path / "o" / "c_skipped.jsonl").read_text().splitlines())
    tokens = tokens_of(tmp_path / "o" / "c_text_document")
    assert totals.skipped == 1
    assert len(tokens) == listed["line"] > 50  # the whole lines before the damage, and the file behind it
    assert tokens[-1] == [*b"good", 256]


def test_special_tokens_are_text_unless_allowed(tmp_path, monkeypatch):
    seen = []

    class Recorder(ByteTokenizer):
        def _encode_batch(self, texts, allow_special):
            seen.append(allow_special)
            return super()._encode_batch(texts, allow_special)

    monkeypatch.setattr(Task, "build_tokenizer", lambda self: Recorder())
    sources = write(tmp_path / "a.jsonl", {"text": "<|endoftext|>"})
    for allowed in (False, True):
        preprocess(sources, str(tmp_path / f"{allowed}"), Task("ByteTokenizer", allow_special=allowed))
        meta = json.loads((tmp_path / f"{allowed}_text_document.meta.json").read_text())
        assert meta["allow_special"] is allowed
    assert seen == [False, True]


def test_a_meta_file_of_very_many_sources_lists_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_MAX_LISTED", 3)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("text")
    preprocess(find_inputs([str(tmp_path)]).sources, str(tmp_path / "o"), BYTES)
    meta = json.loads((tmp_path / "o_text_document.meta.json").read_text())
    assert meta["sources"] == [{"path": str(tmp_path), "files": 4, "bytes": 16}]
    assert tokens_of(tmp_path / "o_text_document") == [[*b"text", 256]] * 4


def test_a_key_that_is_no_file_name_is_refused(tmp_path):
    sources = write(tmp_path / "a.jsonl", {"a/b": "x"})
    with pytest.raises(UserError, match="'a/b' cannot be part of a file name"):
        preprocess(sources, str(tmp_path / "o"), Task("ByteTokenizer", fields={"a/b": ("a/b",)}))


def test_the_state_on_disk_never_runs_ahead_of_the_files(expected, tmp_path, monkeypatch):
    """At every state that was ever visible, the files hold at least what it says: so any kill leaves a good one."""
    sources, _ = expected
    monkeypatch.setattr(partial, "RECORD_BYTES", 0)
    written = partial._write_synced
    checked = 0

    def check(path, text):
        nonlocal checked
        if path.name == "state.json":
            state = json.loads(text)
            for key, (tokens, sequences, _) in state["outputs"].items():
                assert (path.parent / f"{key}.bin").stat().st_size == 2 * tokens
                assert (path.parent / f"{key}.lengths").stat().st_size == 4 * sequences
            assert (path.parent / "skipped.jsonl").stat().st_size == state["skipped_bytes"]
            checked += 1
        written(path, text)

    monkeypatch.setattr(partial, "_write_synced", check)
    preprocess(sources, str(tmp_path / "c"), TWO_KEYS, chunk_bytes=500)
    assert checked > 10


@pytest.mark.parametrize("change", ["grows", "is rewritten", "is removed"])
def test_an_input_that_changes_under_the_run_is_an_error(tmp_path, monkeypatch, change):
    sources = write(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(50)))
    monkeypatch.setattr(partial, "RECORD_BYTES", 0)

    def alter(totals):
        if totals.records == 50:
            if change == "is removed":
                os.remove(tmp_path / "a.jsonl")
            else:
                (tmp_path / "a.jsonl").write_bytes(b'{"text": "late"}\n' * (900 if change == "grows" else 1))

    with pytest.raises(UserError, match=r"a\.jsonl (changed|was removed) while it was read") as caught:
        preprocess(sources, str(tmp_path / "o"), BYTES, report=alter)
    assert "--resume" not in str(caught.value)
    assert not list(tmp_path.glob("o_*"))


def test_a_folder_is_no_output_prefix(tmp_path):
    sources = write(tmp_path / "a.jsonl", {"text": "x"})
    for prefix in (f"{tmp_path}/new/", f"{tmp_path}/"):
        with pytest.raises(UserError, match="names a folder"):
            preprocess(sources, prefix, BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
