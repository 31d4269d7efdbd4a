"""python -m megayoco.generate: one real process, everything else in this one."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
import torch

from megayoco.convert.export import read_export, write_export
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError
from megayoco.generate import __main__ as command
from megayoco.generate.generation import generate
from megayoco.generate.loading import load_weights
from megayoco.generate.opening import Placement, memory_options
from megayoco.generate.options import parse, placement, sampling
from megayoco.generate.sampling import GREEDY, Sampling
from megayoco.model.window_options import WindowOptions
from tests.generate.models import MODELS, build, weights

SUMMARY = (
    r"prompt (\d+) tokens, new (\d+) tokens, prefill [\d,.]+ tokens/s, decode ([\d,.]+ tokens/s|none),"
    r" cache ([\d,]+) bytes\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with an export."""
    folder = tmp_path_factory.mktemp("run")
    write_export(folder / "export", MODELS["retention"], weights(build("retention")), ByteTokenizer())
    (folder / "checkpoints" / "global_step3").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def main(run):
    """The command in this process, on the CPU."""

    def call(*arguments, model=run):
        return command.main(["--model", str(model), "--device", "cpu", *arguments])

    return call


def expected(run, prompt, count, chosen):
    model = load_weights(read_export(run / "export"), dtype=torch.float32)
    tokenizer = ByteTokenizer()
    tokens = list(generate(model, tokenizer.encode(prompt) or [256], count, chosen, stop=[256], vocab_size=257))
    return tokenizer.decode(tokens), len(tokens)


def test_command_line_as_a_process(run):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONIOENCODING": "ascii"}
    arguments = ["--prompt", "def é", "--max-new-tokens", "12", "--seed", "4", "--top-k", "50", "--prefill-chunk", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "megayoco.generate", "--model", str(run), *arguments],
        capture_output=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    text, count = expected(run, "def é", 12, Sampling(temperature=0.8, top_k=50, seed=4))
    assert done.stdout.decode("utf-8") == f"def é{text}\n"
    # nothing else: no library has a word to say
    match = re.fullmatch(SUMMARY, done.stderr.decode())
    assert match, done.stderr.decode()
    assert (match[1], match[2]) == ("6", str(count))


def test_prompt_file_is_not_repeated(run, main, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("class Ü:\n", encoding="utf-8")
    assert main("--prompt-file", str(tmp_path / "prompt.txt"), "--greedy", "--max-new-tokens", "8") == 0
    out, err = capsys.readouterr()
    text, count = expected(run, "class Ü:\n", 8, GREEDY)
    assert out == text + "\n"
    match = re.fullmatch(SUMMARY, err)
    # two states of (2, 16, 16) and (2,); keys and values of 2 heads of 8; the last new token is not in it
    size = 4 * (2 * (2 * 16 * 16 + 2) + (10 + count - 1) * 2 * 2 * 8)
    assert match.groups()[:2] + match.groups()[3:] == ("10", str(count), f"{size:,}")


@pytest.fixture
def typed(monkeypatch):
    """Puts bytes on standard input."""

    def put(raw):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))

    return put


def test_a_prompt_from_standard_input(run, main, typed, capsys):
    typed("Zeile é\n".encode())
    assert main("--prompt-file", "-", "--greedy", "--max-new-tokens", "8") == 0
    assert capsys.readouterr().out == expected(run, "Zeile é\n", 8, GREEDY)[0] + "\n"
    typed(b"caf\xe9")
    assert main("--prompt-file", "-") == 2
    refused(capsys, "--prompt-file - is not UTF-8 (byte 3)")


def test_every_flag_of_the_choice_reaches_it():
    values = dict(
        temperature=1.5, top_k=90, top_p=0.97, min_p=0.02, repetition_penalty=1.4, repetition_window=6, seed=8
    )
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert sampling(parse(["--model", "m", "--prompt", "x", *flags])) == Sampling(**values)
    assert sampling(parse(["--model", "m", "--prompt", "x"])) == Sampling(temperature=0.8)
    assert sampling(parse(["--model", "m", "--prompt", "x", "--greedy"])) == GREEDY


def test_where_the_model_goes():
    flags = ["--device", "cpu", "--dtype", "bfloat16", "--tensor", "2", "--pipeline", "3", "--kv-dtype", "fp8"]
    flags += ["--sequence", "4"]
    there = placement(parse(["--model", "m", "--prompt", "x", *flags, "--local_rank=1"]))
    assert there == Placement(
        device="cpu", dtype="bfloat16", tensor=2, pipeline=3, sequence=4, storage="fp8", default_eviction=True
    )
    assert placement(parse(["--model", "m", "--prompt", "x"])) == Placement(default_eviction=True)


def test_windows_of_memory_layers(tmp_path, main, capsys):
    folder, tokenizer = tmp_path / "memory", ByteTokenizer()
    write_export(folder / "export", MODELS["longllama"], weights(build("longllama")), tokenizer)
    prompt, found = "a text that is longer than its windows, by far", []
    for flags, windows in (
        ([], WindowOptions(evicted=2)),  # half of five
        (["--memory-eviction", "5"], WindowOptions()),
        (["--memory-eviction", "1", "--memory-capacity", "3"], WindowOptions(evicted=1, capacity=3)),
        (["--last-context", "4"], WindowOptions(last_context=4)),
    ):
        model = load_weights(read_export(folder / "export"), dtype=torch.float32, windows=windows)
        tokens = list(generate(model, tokenizer.encode(prompt), 12, GREEDY, [256], prefill_chunk=7, vocab_size=257))
        arguments = ["--prompt", prompt, "--greedy", "--max-new-tokens", "12", "--prefill-chunk", "7", *flags]
        assert main(*arguments, model=folder) == 0
        found.append(capsys.readouterr().out)
        assert found[-1] == f"{prompt}{tokenizer.decode(tokens)}\n"
    assert len(set(found)) == 4
    assert main("--prompt", "x", "--memory-eviction", "6", model=folder) == 2
    refused(capsys, "--memory-eviction 6 exceeds the model's window of 5 tokens. Give at most so many.")
    assert main("--prompt", "x", "--memory-capacity", "9") == 2
    refused(capsys, "--memory-capacity: the model has no memory layers. Leave it out.")


def test_a_stop_string_ends_the_text(run, main, capsys):
    text, _ = expected(run, "abc", 60, Sampling(temperature=0.8, seed=2))
    stop = re.search("[!-~]{2}", text)[0]
    assert main("--prompt", "abc", "--seed", "2", "--max-new-tokens", "60", "--stop", "never", "--stop", stop) == 0
    out, err = capsys.readouterr()
    assert out == f"abc{text[: text.index(stop)]}\n"
    # no token more than that takes
    new = int(re.fullmatch(SUMMARY, err)[2])
    drawn = Sampling(temperature=0.8, seed=2)
    assert [stop in expected(run, "abc", count, drawn)[0] for count in (new - 1, new)] == [False, True]


@pytest.mark.parametrize(("dtype", "bytes_per_number"), [("model", 4), ("int8", 1), ("fp8", 1)])
def test_the_storage_of_keys_and_values(main, capsys, dtype, bytes_per_number):
    assert main("--prompt", "abc", "--greedy", "--max-new-tokens", "3", "--kv-dtype", dtype) == 0
    # the state of the retention stays; keys and values of 2 heads of 8, with a scale of fp32 each where narrow
    scale = 4 if bytes_per_number == 1 else 0
    size = 4 * 2 * (2 * 16 * 16 + 2) + 5 * 2 * 2 * (8 * bytes_per_number + scale)
    assert f"cache {size:,} bytes" in capsys.readouterr().err


def test_a_chat_over_standard_input(run, main, typed, capsys):
    typed(b"hi\n\n/reset\nhi\n/exit\nmore\n")
    flags = ["--temperature", "1.5", "--seed", "4", "--max-new-tokens", "6"]
    assert main("--chat", *flags) == 0
    out, err = capsys.readouterr()
    answer, _ = expected(run, "User: hi\nAssistant:", 6, Sampling(temperature=1.5, seed=4))
    assert len(answer) > 3
    # everything was forgotten: the same again
    assert out == f"{answer}\n" * 2
    reports = err.splitlines()
    assert [report.split(",")[0] for report in reports] == [
        "read 19 tokens",
        "everything is forgotten",
        "read 19 tokens",
    ]


def on_a_rank(arguments, raw):
    """What one rank of several returns and writes; only the first has something on standard input."""
    first = torch.distributed.get_rank() == 0
    sys.stdin = io.TextIOWrapper(io.BytesIO(raw if first else b"not to be read\n"))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = command.main(arguments)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("flags", "raw"),
    [
        (["--prompt", "abc", "--pipeline", "2"], b""),
        (["--prompt-file", "-"], b"abc"),
        (["--chat", "--tensor", "2"], b"abc\n/reset\nabc\n"),
    ],
    ids=["prompt over stages", "standard input over tensor ranks", "chat"],
)
def test_several_processes_write_what_one_does(run, main, typed, capsys, workers, flags, raw):
    same = ["--seed", "4", "--max-new-tokens", "12", "--temperature", "1.2", "--repetition-penalty", "1.1"]
    arguments = ["--model", str(run), "--device", "cpu", *flags, *same]
    (code, out, err), others = workers.run(on_a_rank, arguments, raw, world=2)
    typed(raw)
    alone = [flag for flag in flags if flag not in ("--pipeline", "--tensor", "2")]
    assert main(*alone, *same) == 0
    assert (code, out) == (0, capsys.readouterr().out)
    assert ("in the cache" if "--chat" in flags else "prompt 3 tokens") in err
    assert others == (0, "", "")


def test_a_memory_that_processes_share_writes_what_one_does(tmp_path, main, capsys, workers):
    """A prompt of several windows of 5 tokens and of chunks, and a text that goes on over windows."""
    folder = tmp_path / "e"
    write_export(folder, MODELS["longllama"], weights(build("longllama")), ByteTokenizer(), facts={})
    flags = ["--prompt", "abcdefghijklmnopqrstuvwxyz", "--max-new-tokens", "20", "--seed", "4", "--prefill-chunk", "7"]
    arguments = ["--model", str(folder), "--device", "cpu", *flags, "--sequence", "2"]
    first, second = workers.run(on_a_rank, arguments, b"", world=2)
    assert main(*flags, model=folder) == 0
    assert first[:2] == (0, capsys.readouterr().out)
    assert second == (0, "", "")
    with pytest.raises(UserError, match="--sequence is about memory layers, and the model has none"):
        memory_options(Placement(sequence=2), MODELS["llama"], torch.device("cpu"))


def test_processes_that_do_not_fit_are_told_once(run, workers):
    arguments = ["--model", str(run), "--device", "cpu", "--prompt", "x", "--tensor", "1"]
    first, second = workers.run(on_a_rank, arguments, b"", world=2)
    message = "2 processes were started, but --tensor 1 x --pipeline 1 = 1 hold the model. Start 1."
    assert first == (2, "", f"error: {message}\n")
    assert second == (2, "", "")


def test_a_text_longer_than_the_training_is_told(tmp_path, main, capsys):
    facts = {"sequence_length": 12}
    write_export(tmp_path / "e", MODELS["retention"], weights(build("retention")), ByteTokenizer(), facts=facts)
    for count, told in ((9, False), (10, True)):
        assert main("--prompt", "abc", "--max-new-tokens", str(count), "--greedy", model=tmp_path / "e") == 0
        err = capsys.readouterr().err
        warning = (
            "warning: 3 tokens of the prompt and up to 10 new ones exceed the 12 that the model was trained to read"
        )
        assert err.startswith(warning) is told, err


def test_an_empty_prompt_starts_a_document_and_an_export_serves_as_well(run, main, capsys):
    assert main("--prompt", "", "--greedy", "--max-new-tokens", "1", model=run / "export") == 0
    out, err = capsys.readouterr()
    assert out == expected(run, "", 1, GREEDY)[0] + "\n"
    assert re.fullmatch(SUMMARY, err).groups()[:3] == ("1", "1", "none")


def test_bfloat16_and_temperature_zero(main, capsys):
    assert main("--prompt", "x", "--temperature", "0", "--dtype", "bfloat16", "--max-new-tokens", "3") == 0
    cache = 4 * 2 * (2 * 16 * 16 + 2) + 2 * 3 * 2 * 2 * 8
    assert f"cache {cache:,} bytes" in capsys.readouterr().err


def test_stops_at_the_end_of_a_document(tmp_path, main, capsys):
    # hidden states of the head are all ones, and only the row of the end of a document likes ones
    tensors = weights(build("retention"))
    tensors["lm_head.weight"] = torch.zeros(264, 32)
    for layer in range(4):
        tensors[f"layers.{layer}.mixer.out_proj.weight"].zero_()
        tensors[f"layers.{layer}.ffn.down_proj.weight"].zero_()
    tensors["embed_tokens.weight"].fill_(1.0)
    tensors["lm_head.weight"][256] = 1.0
    tensors["lm_head.weight"][257] = 2.0  # padding, never chosen
    write_export(tmp_path / "e", MODELS["retention"], tensors, ByteTokenizer())
    assert main("--prompt", "ab", "--max-new-tokens", "9", "--greedy", model=tmp_path / "e") == 0
    out, err = capsys.readouterr()
    assert out == "ab\n"
    assert "new 1 tokens" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --prompt --prompt-file --chat is required. See python -m megayoco.generate --help"),
        (["--prompt", "x", "--prompt-file", "y"], "not allowed with argument"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0."),
        (["--prompt", "x", "--prefill-chunk", "-1"], "--prefill-chunk must be at least 1, got -1."),
        (["--prompt", "x", "--max-new", "3"], "unrecognized arguments: --max-new 3"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "x", "--top-k", "0"], "top_k must be at least 1"),
        (["--prompt", "x", "--top-p", "2"], "top_p must be above 0"),
        (["--prompt", "x", "--greedy", "--top-k", "3"], "--greedy draws nothing"),
        (["--prompt", "x", "--dtype", "float16"], "--dtype: invalid choice"),
        (["--prompt", "x", "--device", "gpu"], "--device gpu is no device of torch"),
        (["--prompt", "x", "--device", "meta"], "--device meta is not supported"),
        (["--prompt", "x", "--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--prompt", "x", "--greedy", "--min-p", "0.1"], "leave out --temperature, --top-k, --top-p, --min-p, or"),
        (["--prompt", "x", "--min-p", "2"], "min_p must be from 0 to 1"),
        (["--prompt", "x", "--repetition-window", "9"], "repetition_window 9 penalises nothing without a repetition_p"),
        (["--prompt", "x", "--stop", "a", "--stop", ""], "--stop '' would end every text"),
        (["--prompt", "x", "--chat"], "not allowed with argument"),
        (["--prompt", "x", "--chat-format", "plain"], "--chat-format plain says how to chat: give --chat, too"),
        (["--chat", "--chat-format", "palin"], "chat format palin cannot be read (No such file or directory). Give a"),
        (["--prompt", "x", "--tensor", "0"], "--tensor must be at least 1, got 0."),
        (["--prompt", "x", "--tensor", "2"], "--tensor 2 needs as many processes"),
        (["--prompt", "x", "--kv-dtype", "int4"], "--kv-dtype: invalid choice"),
        (["--prompt", "x", "--last-context", "0"], "--last-context must be at least 1, got 0."),
        (["--prompt", "x", "--last-context", "2", "--memory-eviction", "2"], "are two ways to cut a text into windows"),
        (["--prompt-file", "/nowhere/prompt"], "--prompt-file /nowhere/prompt cannot be read: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_the_command_line(main, capsys, arguments, message):
    assert main(*arguments) == 2
    refused(capsys, message)


def refused(capsys, *parts):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_nothing_is_remembered_of_nothing_or_into_a_folder(main, tmp_path, capsys):
    assert main("--prompt", "x", "--save-memory", str(tmp_path)) == 2
    refused(capsys, f"--save-memory '{tmp_path}' is a folder. Give the name of a file.")
    assert main("--prompt", "", "--save-memory", str(tmp_path / "m")) == 2
    refused(capsys, "an empty prompt leaves nothing to remember to --save-memory. Give it a text.")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_model(main, tmp_path, capsys):
    def check(folder, *parts):
        assert main("--prompt", "x", model=folder) == 2
        refused(capsys, str(folder), *parts)

    check(tmp_path / "none", "does not exist. Give a run directory, or the folder of a model")
    (tmp_path / "file").touch()
    check(tmp_path / "file", "is a file")
    check(tmp_path, "is neither a run directory nor a model")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    check(tmp_path, "describes no model that we know")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    check(tmp_path, "config.json has no hidden_size")
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    check(tmp_path, "has no checkpoint yet")
    (tmp_path / "checkpoints" / "global_step7").mkdir()
    check(tmp_path, "has no complete checkpoint", "--resume", "checkpoint.export=every")
    (tmp_path / "export").mkdir()
    check(tmp_path, "export holds no model of a format that we know")


def test_a_prompt_file_in_another_encoding(main, tmp_path, capsys):
    (tmp_path / "p").write_bytes(b"caf\xe9")
    assert main("--prompt-file", str(tmp_path / "p")) == 2
    refused(capsys, "is not UTF-8 (byte 3)")


def test_weights_that_are_not_finite(main, tmp_path, capsys):
    tensors = weights(build("llama"))
    tensors["norm.weight"][3] = torch.nan
    write_export(tmp_path / "e", MODELS["llama"], tensors, ByteTokenizer())
    assert main("--prompt", "x", model=tmp_path / "e") == 2
    assert "error: the model's logits are not finite" in capsys.readouterr().err
