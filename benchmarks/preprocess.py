"""Preparing data against the classical scheme of the Megatron family, on the same text with the same workers.

    python benchmarks/preprocess.py [--mb 24] [--workers 2] [--rounds 3] [--output benchmarks/results/preprocess.json]

The classical scheme is contained here: multiprocessing.Pool.imap over the lines (in groups of 32, as Megatron-LM does),
one json.loads, one encode and one list of ids per line, a single writer that makes one numpy array of each. It encodes
by the same libraries: tiktoken's `encode_ordinary`, or `Tokenizer.encode` of tokenizers. Ours is
tools/preprocess_data.py. Both run as fresh processes, alternately; measured are the whole time from start to exit, the
processor time of all processes together, which other work on the machine changes less, and their memory (resident set
sizes added up, shared pages several times). Both outputs must be equal to the byte.

Reported for a tiktoken rank file and a byte-level BPE tokenizer.json, which are trained here on the same text: seconds,
MB of text per second, and the ratio classical / ours of each round. Then ours on 1x, 4x and 16x the text, and the time
of a run on one short document, which is what starting takes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=24.0, help="megabytes of text, from tools/make_corpus.py")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where text and vocabularies are kept; a temporary folder if absent"
    )
    parser.add_argument("--output", type=Path, help="write the result as JSON as well")
    parser.add_argument("--classical", nargs=5, metavar="X", help=argparse.SUPPRESS)  # a run of the baseline
    options = parser.parse_args()
    if options.classical:
        classical(*options.classical)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(options, folder)
    report(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    load = [round(os.getloadavg()[0], 1)]
    text, models = make_inputs(folder, options.mb, options.vocab_size)
    size = sum(len(json.loads(line)["text"].encode()) for line in text.open(encoding="utf-8"))
    comparison: dict[str, Any] = {}
    for kind, model in models.items():
        rounds: dict[str, list[Cost]] = {"classical": [], "ours": []}
        for number in range(options.rounds):
            commands = {
                "classical": classical_command(kind, model, text, folder / "classical", options.workers),
                "ours": our_command(kind, model, text, folder / "ours", options.workers),
            }
            for name in list(commands)[:: 1 if number % 2 else -1]:
                rounds[name].append(measure(commands[name]))
            compare(folder / "classical", folder / "ours_text_document")
        comparison[kind] = {name: summary(costs, size) for name, costs in rounds.items()}
        for name in ("seconds", "cpu_seconds"):
            pairs = zip(rounds["classical"], rounds["ours"], strict=True)
            ratios = [getattr(theirs, name) / getattr(ours, name) for theirs, ours in pairs]
            comparison[kind][f"ratio of {name}"] = {
                "median": round(statistics.median(ratios), 2),
                "rounds": [round(ratio, 2) for ratio in ratios],
            }
    result = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "orjson", "tiktoken", "tokenizers")},
        "text": {"bytes": size, "documents": sum(1 for _ in text.open("rb")), "vocabulary": options.vocab_size},
        "workers": options.workers,
        "comparison": comparison,
        "growth": {kind: growth(options, folder, kind, model, text, size) for kind, model in models.items()},
        "start": {kind: start(options, folder, kind, model) for kind, model in models.items()},
    }
    # of this benchmark and of whatever else ran: above the number of cores, compare processor seconds
    result["load_average"] = [*load, round(os.getloadavg()[0], 1)]
    return result


def summary(costs: list[Cost], size: int) -> dict[str, float]:
    seconds = statistics.median(cost.seconds for cost in costs)
    return {
        "seconds": round(seconds, 3),
        "megabytes_per_second": round(size / 1e6 / seconds, 2),
        "cpu_seconds": round(statistics.median(cost.cpu_seconds for cost in costs), 3),
        "peak_megabytes": round(max(cost.peak_megabytes for cost in costs)),
    }


def make_inputs(folder: Path, megabytes: float, vocab_size: int) -> tuple[Path, dict[str, Path]]:
    """The text, and a rank file and a tokenizer.json trained on it."""
    text, ranks, bpe = folder / "text.jsonl", folder / "ranks.tiktoken", folder / "tokenizer.json"
    if not text.exists():
        tool("make_corpus", "--output", text, "--max-mb", megabytes)
    if not ranks.exists():
        tool("train_tokenizer", "--input", text, "--vocab-size", vocab_size, "--output", ranks)
    if not bpe.exists():
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        lines = text.open(encoding="utf-8")
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
        tokenizer.save(str(bpe))
    return text, {"TiktokenTokenizer": ranks, "HuggingFaceTokenizer": bpe}


def tool(name: str, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def our_command(kind: str, model: Path, text: Path, output: Path, workers: int) -> list[str]:
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(text), "--output-prefix"]
    command += [str(output), "--tokenizer-type", kind, "--tokenizer-model", str(model), "--append-eod", "--overwrite"]
    command += ["--workers", str(workers), "--log-interval", "1000000000"]
    return command + (["--eod-token", END] if kind == "HuggingFaceTokenizer" else [])


def classical_command(kind: str, model: Path, text: Path, output: Path, workers: int) -> list[str]:
    arguments = kind, str(model), str(text), str(output), str(workers)
    return [sys.executable, str(Path(__file__).resolve()), "--classical", *arguments]


class Cost(NamedTuple):
    """Of a command and the processes below it: seconds from start to exit, processor seconds, peak memory in MB."""

    seconds: float
    cpu_seconds: float
    peak_megabytes: float


def measure(command: list[str]) -> Cost:
    """Run a command to its end."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=errors)
        peak = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, resident(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if status:
            errors.seek(0)
            sys.exit(f"{shlex.join(command)}\n{errors.read().decode()}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak / 1e6)


def resident(pid: int) -> int:
    """Bytes in memory of a process and everything below it."""
    total = 0
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            total = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                total += sum(resident(int(child)) for child in file.read().split())
    except (OSError, ValueError, IndexError):  # it ended meanwhile
        pass
    return total


def growth(
    options: argparse.Namespace, folder: Path, kind: str, model: Path, text: Path, size: int
) -> list[dict[str, float]]:
    """Ours on 1, 4 and 16 times the text."""
    rows = []
    for times in (1, 4, 16):
        larger = folder / "larger.jsonl"
        with larger.open("wb") as file:
            for _ in range(times):
                file.write(text.read_bytes())
        cost = measure(our_command(kind, model, larger, folder / "ours", options.workers))
        larger.unlink()
        rows.append({"times": times, **summary([cost], times * size)})
    return rows


def start(options: argparse.Namespace, folder: Path, kind: str, model: Path) -> dict[str, float]:
    """Seconds of a run on one short document: what starting, loading the vocabulary and ending take."""
    short = folder / "short.jsonl"
    short.write_text('{"text": "one short document"}\n')
    command = our_command(kind, model, short, folder / "short", options.workers)
    costs = [measure(command) for _ in range(5)]
    return {
        "seconds": round(statistics.median(cost.seconds for cost in costs), 3),
        "cpu_seconds": round(statistics.median(cost.cpu_seconds for cost in costs), 3),
    }


def compare(theirs: Path, ours: Path) -> None:
    for kind in ("bin", "idx"):
        if Path(f"{theirs}.{kind}").read_bytes() != Path(f"{ours}.{kind}").read_bytes():
            sys.exit(f"{theirs}.{kind} and {ours}.{kind} differ: the benchmark would compare different work")


class Encoder:
    """One line to the ids of its document, as the tools of the Megatron family do it."""

    encode_text: Any = None
    eod: int = 0

    def __init__(self, kind: str, model: str):
        self.kind, self.model = kind, model

    def initializer(self) -> None:
        if self.kind == "TiktokenTokenizer":
            from megayoco.data.tokenizer import TiktokenTokenizer

            tokenizer = TiktokenTokenizer(self.model)
            import tiktoken

            engine = tokenizer.engine
            encoding = tiktoken.Encoding(
                "ranks", pat_str=engine.pattern, mergeable_ranks=engine.ranks, special_tokens=engine.special_tokens
            )
            Encoder.encode_text, Encoder.eod = encoding.encode_ordinary, tokenizer.eod
        else:
            from tokenizers import Tokenizer

            bpe = Tokenizer.from_file(self.model)
            bpe.encode_special_tokens = True
            Encoder.encode_text = lambda text: bpe.encode(text, add_special_tokens=False).ids
            Encoder.eod = bpe.token_to_id(END)

    def encode(self, line: str) -> tuple[list[int], int]:
        text = json.loads(line)["text"]
        ids = Encoder.encode_text(text)
        if ids:
            ids.append(Encoder.eod)
        return ids, len(line)


def classical(kind: str, model: str, text: str, output: str, workers: str) -> None:
    """The baseline: Pool.imap, one encode per line, a single writer with megatron-core's arithmetic."""
    encoder = Encoder(kind, model)
    lengths = []
    with (
        open(text, encoding="utf-8") as lines,
        multiprocessing.Pool(int(workers), initializer=encoder.initializer) as pool,
        open(f"{output}.bin", "wb") as data,
    ):
        for ids, _ in pool.imap(encoder.encode, lines, 32):
            if ids:
                data.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
                lengths.append(len(ids))
    with open(f"{output}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + (8).to_bytes(1, "little"))
        index.write(len(lengths).to_bytes(8, "little") + (len(lengths) + 1).to_bytes(8, "little"))
        index.write(np.array(lengths, np.int32).tobytes())
        index.write((np.cumsum([0, *lengths[:-1]]) * 2).astype(np.int64).tobytes())
        index.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def report(result: dict[str, Any]) -> None:
    print(f"{result['text']['bytes'] / 1e6:.1f} MB of text, {result['workers']} workers")
    for kind, values in result["comparison"].items():
        rows = {name: values[name] for name in ("classical", "ours")}
        rows |= {f"ours, {row['times']}x": row for row in result["growth"][kind]}
        print(kind)
        for name, row in rows.items():
            print(
                f"  {name:12} {row['seconds']:7.2f} s {row['megabytes_per_second']:7.2f} MB/s"
                f" {row['cpu_seconds']:7.2f} s of processors {row['peak_megabytes']:5} MB of memory"
            )
        for name in ("seconds", "cpu_seconds"):
            ratio = values[f"ratio of {name}"]
            print(f"  classical / ours, {name}: {ratio['median']:.2f} {ratio['rounds']}")
        begin = result["start"][kind]
        print(f"  start        {begin['seconds']:7.2f} s, {begin['cpu_seconds']:.2f} s of processors")


if __name__ == "__main__":
    main()
