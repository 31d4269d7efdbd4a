"""A saved memory is the context: continued, it says what the context says, and nothing else is taken for it."""

import dataclasses
import hashlib
import io
import json
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megayoco.convert.export import write_export
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError
from megayoco.generate import __main__ as command
from megayoco.generate.generation import pad_left, prefill
from megayoco.generate.memory_files import load_memory, save_memory
from megayoco.model.decoder import build_decoder
from megayoco.model.inference import InferenceModel, MemoryOptions, cache_bytes
from megayoco.model.window_options import WindowOptions
from megayoco.ops.key_value_cache import STORAGES, KeyValueCache
from megayoco.ops.key_value_storage import Place
from megayoco.ops.memory_search import Search
from tests.generate.models import MODELS, SHAPE, build, inference, weights
from tests.generate.test_command import refused

TEXT = random.Random(1).choices(range(SHAPE["vocab_size"]), k=37)
MORE = [TEXT[3:12], TEXT[20:21]]
EXACT = dict(rtol=1e-12, atol=1e-12)
FEW = MemoryOptions(Search(3))


def logits_after(model, context, tokens):
    return model.advance(torch.tensor([tokens]), context, last_only=False)[0]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def place_of(context):
    """Where the keys of the first cache begin."""
    cache = next(layer for layer in context.layers if isinstance(layer, KeyValueCache))
    return cache.spans(0, cache.tokens)[0][0].key.data_ptr()


def is_mapped(path, address):
    spans = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    return any(int(a, 16) <= address < int(b, 16) for a, b in (span.split("-") for span in spans))


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "copied"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_memory_is_continued_like_the_context(name, mapped, tmp_path):
    model, file = inference(name, torch.float64), tmp_path / "text.memory"
    context = prefill(model, TEXT, chunk=10)
    save_memory(file, context, model, TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["text.memory"]
    before = digest(file)
    again = inference(name, torch.float64)
    loaded, tokens = load_memory(file, again, mapped=mapped)
    assert tokens == tuple(TEXT)
    assert loaded.length == len(TEXT)
    assert cache_bytes(loaded) == cache_bytes(context)
    place = place_of(loaded)
    assert is_mapped(file, place) == mapped
    # many prompts share it, in turn and nested, and neither it nor the file changes
    for tokens in (*MORE, *MORE):
        torch.testing.assert_close(logits_after(again, loaded, tokens), logits_after(model, context, tokens), **EXACT)
    longer = prefill(again, MORE[0], context=loaded, chunk=2)
    assert place_of(longer) == place
    expected = logits_after(model, prefill(model, [*TEXT, *MORE[0]]), MORE[1])
    torch.testing.assert_close(logits_after(again, longer, MORE[1]), expected, **EXACT)
    # what was read behind a memory can be saved with it
    save_memory(tmp_path / "longer.memory", longer, again)
    third, tokens = load_memory(tmp_path / "longer.memory", model, mapped=mapped)
    assert tokens == ()
    torch.testing.assert_close(logits_after(model, third, MORE[1]), expected, **EXACT)
    assert digest(file) == before


@pytest.mark.parametrize("use", [{"evicted": 2}, {"evicted": 3, "capacity": 6}, {"last_context": 4}], ids=str)
def test_a_memory_goes_on_in_the_windows_that_it_was_read_in(use, tmp_path):
    decoder = build("longllama", torch.float64)
    model = InferenceModel.of(decoder, windows=WindowOptions(**use))
    context = prefill(model, TEXT, chunk=10)
    save_memory(tmp_path / "m", context, model)
    loaded, _ = load_memory(tmp_path / "m", model)
    for tokens in MORE:
        torch.testing.assert_close(logits_after(model, loaded, tokens), logits_after(model, context, tokens), **EXACT)
    flags = " ".join(f"{flag} {count}" for flag, count in WindowOptions(**use).given().items())
    with pytest.raises(UserError, match=f"saved with {flags}, here it is --memory-eviction 1. Give the same"):
        load_memory(tmp_path / "m", InferenceModel.of(decoder, windows=WindowOptions(evicted=1)))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["retention", "longllama"])
def test_narrow_storage_is_kept_as_it_is(name, storage, tmp_path):
    model = inference(name, torch.float32, STORAGES[storage])
    context = prefill(model, TEXT)
    save_memory(tmp_path / "m", context, model)
    loaded, _ = load_memory(tmp_path / "m", model)
    for got, expected in zip(loaded.layers, context.layers, strict=True):
        if isinstance(got, KeyValueCache):
            assert got.is_narrow and got.bytes == expected.bytes
            assert torch.equal(got.key, expected.key) and torch.equal(got.value, expected.value)
    got, expected = (logits_after(model, x, MORE[0]) for x in (loaded, context))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=f"saved with --kv-dtype {storage}, here it is model. Give the same"):
        load_memory(tmp_path / "m", inference(name))


@pytest.mark.parametrize("name", ["retention", "longllama", "memory"])
def test_rows_of_unequal_lengths(name, tmp_path):
    model = inference(name, torch.float64)
    tokens, padding = pad_left(model, [TEXT[:20], TEXT[:13], TEXT[:4]])
    context = model.absorb(tokens, model.empty_context(3, padding=padding))
    save_memory(tmp_path / "m", context, model)
    loaded, _ = load_memory(tmp_path / "m", model)
    more = torch.tensor([TEXT[20:29]]).expand(3, -1)
    got, expected = (model.advance(more, x, last_only=False)[0] for x in (loaded, context))
    torch.testing.assert_close(got, expected, **EXACT)


def test_a_memory_in_files_and_with_a_search(tmp_path):
    """The whole model: many keys are dense, few are not, and where they lie changes nothing."""
    dense = inference("longllama", torch.float64)
    expected = logits_after(dense, prefill(dense, TEXT), MORE[0])
    results = {}
    for top_k in (3, 100):
        for place in (None, Place(torch.device("cpu"), tmp_path)):
            memory = MemoryOptions(Search(top_k), place)
            model = InferenceModel.of(build("longllama", torch.float64), memory=memory)
            context = prefill(model, TEXT, chunk=8)
            results[top_k, place is None] = logits_after(model, context, MORE[0])
            caches = [layer for layer in context.layers if isinstance(layer, KeyValueCache)]
            assert [cache.place.directory for cache in caches] == [place and tmp_path] * 2
            file = tmp_path / "m"
            save_memory(file, context, model)
            loaded = load_memory(file, model).context
            torch.testing.assert_close(logits_after(model, loaded, MORE[0]), results[top_k, place is None], **EXACT)
            file.unlink()
    torch.testing.assert_close(results[100, True], expected, **EXACT)
    assert torch.equal(results[100, False], results[100, True])
    assert torch.equal(results[3, False], results[3, True])
    assert float((results[3, True] - expected).abs().max()) > 1e-3
    # the keys and values that a YOCO shares between its layers stay where they were
    yoco = InferenceModel.of(build("memory"), memory=MemoryOptions(None, Place(torch.device("cpu"), tmp_path)))
    places = [x.place.directory for x in yoco.empty_context().layers if isinstance(x, KeyValueCache)]
    assert places == [tmp_path, None]
    with pytest.raises(ValueError, match="the model has no memory layers"):
        InferenceModel.of(build("llama"), memory=FEW)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A memory of `longllama`, and the model."""
    model, file = inference("longllama"), tmp_path_factory.mktemp("memory") / "m"
    save_memory(file, prefill(model, TEXT), model, TEXT)
    return file, model


def other(what):
    config = MODELS["longllama"]
    if what == "weights":
        return InferenceModel.of(build("longllama", seed=4))
    if what == "dtype":
        return inference("longllama", torch.float64)
    changed = {"window": dict(memory_window=4), "layers": dict(memory_layers=(1, 3)), "base": dict(rope_theta=5e5)}
    return InferenceModel.of(build_decoder(dataclasses.replace(config, **changed[what]), None, dtype=torch.float32))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("weights", "is the memory of a model with other weights. Give --model that one"),
        ("dtype", "was saved with --dtype float32, here it is float64. Give the same"),
        ("window", "is the memory of another model (memory_window 5, here 4). Give --model that one"),
        ("layers", "is the memory of another model (memory_layers [1, 2], here [1, 3])"),
        ("base", "is the memory of another model (rope_theta 10000.0, here 500000.0)"),
    ],
)
def test_the_memory_of_another_model_is_refused(saved, what, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load_memory(saved[0], other(what))


def header_of(raw):
    length = struct.unpack("<Q", raw[:8])[0]
    return length, json.loads(raw[8 : 8 + length])


def test_every_kind_of_damage_is_noticed(saved, tmp_path):
    (file, model), damaged = saved, tmp_path / "damaged"
    raw = file.read_bytes()
    length, header = header_of(raw)
    begin = 8 + length
    places = {name: begin + entry["data_offsets"][0] + 3 for name, entry in header.items() if name != "__metadata__"}
    places["a number of the metadata"] = raw.index(b'length\\": 37') + len('length\\": ')
    places["a shape"] = raw.index(b'"shape":[1,2,37') + len('"shape":[')
    for name, place in places.items():
        changed = bytearray(raw)
        changed[place] = ord("4") if changed[place] in b"0123" else changed[place] ^ 1
        damaged.write_bytes(changed)
        with pytest.raises(UserError, match="is damaged or no file of ours"):
            load_memory(damaged, model)
        assert name
    for size in (0, 5, 100, begin + 9, len(raw) - 1):
        damaged.write_bytes(raw[:size])
        with pytest.raises(UserError, match="Copy it again, or save it again"):
            load_memory(damaged, model)
    damaged.write_bytes(raw + b"x")
    with pytest.raises(UserError, match="is damaged"):
        load_memory(damaged, model)
    damaged.write_bytes(raw)
    assert load_memory(damaged, model).tokens == tuple(TEXT)


def test_what_is_no_memory(saved, tmp_path):
    file, model = saved
    save_file({"x": torch.zeros(3)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.txt").write_text("a book")
    (tmp_path / "ranks.rank-0-of-4").write_text("")
    for name, told in (
        ("weights.safetensors", "is damaged or no file of ours"),
        ("text.txt", "is damaged or no file of ours"),
        ("absent", "there is no memory .*absent. Make it with --save-memory"),
        ("ranks", r"was saved by 4 process\(es\), and 1 run here. Start as many"),
    ):
        with pytest.raises(UserError, match=told):
            load_memory(tmp_path / name, model)
    for name, told in ((file, "exists. Delete it"), (tmp_path / "no" / "m", "no is no folder, so m cannot")):
        with pytest.raises(UserError, match=told):
            save_memory(name, model.empty_context(), model)
    assert not [path for path in file.parent.iterdir() if "tmp" in path.name]


def on_a_rank(folder, tensor, pipeline):
    """Saves and continues, and says what is refused."""
    from megayoco.config import ParallelConfig
    from megayoco.convert.weights import HeldTensors, Weights
    from megayoco.generate.loading import load_weights
    from megayoco.parallel.topology import build_topology

    stored = Weights(MODELS["memory"], HeldTensors(weights(build("memory", torch.float64))), None, {})
    topology = build_topology(ParallelConfig(tensor=tensor, pipeline=pipeline), MODELS["memory"])
    model = load_weights(stored, dtype=torch.float64, topology=topology, memory=FEW)

    def error_of(file, model):
        try:
            load_memory(file, model)
        except UserError as error:
            return str(error)
        return ""

    for name in ("a", "b"):
        save_memory(folder / name, prefill(model, TEXT), model, TEXT)
    logits = logits_after(model, load_memory(folder / "a", model).context, MORE[0])
    elsewhere = dataclasses.replace(topology, tensor=tensor * pipeline, pipeline=1)
    elsewhere = InferenceModel(model.stage, model.config, topology=elsewhere, memory=FEW)
    errors = [error_of(folder / "absent", model), error_of(folder / "a", elsewhere)]
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        (folder / "b.rank-1-of-4").replace(folder / "a.rank-1-of-4")
    torch.distributed.barrier()
    return logits, [*errors, error_of(folder / "a", model), error_of(folder / "b", model)]


def test_every_rank_has_a_file_of_its_own(workers, tmp_path):
    whole = InferenceModel.of(build("memory", torch.float64), memory=FEW)
    expected = logits_after(whole, prefill(whole, TEXT), MORE[0])
    for logits, errors in workers.run(on_a_rank, tmp_path, 2, 2, world=4):
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        for error, told in zip(
            errors,
            (
                "there is no memory",
                "saved by tensor rank 0 of 2, stage 0 of 2; here are --tensor 4 --pipeline 1",
                "rank-1-of-4 was not saved together with the other ranks' files",
                "rank-1-of-4 is missing beside b.rank-0-of-4",
            ),
            strict=True,
        ):
            assert told in error
    with pytest.raises(UserError, match=r"was saved by 4 process\(es\), and 1 run here"):
        load_memory(tmp_path / "a", whole)


# The command


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    """The command in this process, over exports of a model with memory layers and of one without."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("longllama", "retention"):
        write_export(folder / name, MODELS[name], weights(build(name)), ByteTokenizer())

    def call(*arguments, model="longllama"):
        return command.main(["--model", str(folder / model), "--device", "cpu", *map(str, arguments)])

    return call


def test_a_book_is_read_once_and_asked_often(main, tmp_path, capsys):
    book, text, flags = (
        tmp_path / "book.txt",
        "It was a dark and stormy night. " * 4,
        ["--seed", "3", "--max-new-tokens"],
    )
    book.write_text(text)
    memory = tmp_path / "book.memory"
    assert main("--save-memory", memory, "--prompt-file", book) == 0
    out, err = capsys.readouterr()
    # memory layers keep all, others what is left of a window of five from which two leave at a time
    size = 2 * 128 * 2 * 2 * 8 * 4 + 2 * 4 * 2 * 2 * 8 * 4
    assert out == ""
    assert re.fullmatch(
        rf"read 128 tokens at [\d,.]+ tokens/s; .*book.memory remembers 128 tokens in {size:,} bytes\n", err
    )
    for question in ("Who?", "Why so?"):
        assert main("--memory", memory, "--prompt", question, *flags, 9, "--repetition-penalty", 1.3) == 0
        got = capsys.readouterr()
        assert main("--prompt", text + question, *flags, 9, "--repetition-penalty", 1.3) == 0
        assert got.out == capsys.readouterr().out.removeprefix(text)
        assert f"prompt {len(question)} tokens" in got.err
    # behind it another chapter
    assert main("--memory", memory, "--prompt", "Then the", "--save-memory", tmp_path / "second") == 0
    assert "read 8 tokens" in capsys.readouterr().err
    assert main("--memory", tmp_path / "second", "--prompt", " sun", *flags, 9) == 0
    got = capsys.readouterr().out
    assert main("--prompt", text + "Then the sun", *flags, 9) == 0
    assert got == capsys.readouterr().out.removeprefix(text + "Then the")


def test_a_chat_behind_a_memory(main, tmp_path, capsys, monkeypatch):
    def chat(turns, *flags):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(turns), encoding="ascii"))
        assert main("--chat", "--greedy", "--max-new-tokens", 5, *flags) == 0
        return capsys.readouterr()

    memory = tmp_path / "m"
    assert main("--save-memory", memory, "--prompt", "A tale.\n") == 0
    capsys.readouterr()
    assert (
        main("--prompt", "A tale.\nUser: hi\nAssistant:", "--greedy", "--max-new-tokens", 5, "--stop", "\nUser:") == 0
    )
    answer = capsys.readouterr().out.removeprefix("A tale.\nUser: hi\nAssistant:")
    got = chat(b"hi\n/reset\nhi\n", "--memory", memory)
    assert got.out == answer * 2
    assert "everything is forgotten, but what --memory holds" in got.err
    assert chat(b"hi\n").out != answer


def test_flags_of_the_memory(main, tmp_path, capsys):
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    flags = ("--prompt", text, "--greedy", "--max-new-tokens", 12)
    assert main(*flags) == 0
    dense = capsys.readouterr().out
    for few in (["--memory-top-k", 500], ["--memory-directory", tmp_path]):
        assert main(*flags, *few) == 0
        assert capsys.readouterr().out == dense
    assert main(*flags, "--memory-top-k", 1) == 0
    assert capsys.readouterr().out != dense
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--memory-top-k", "0"], "--memory-top-k must be at least 1, got 0"),
        (["--memory-search", "exact"], "--memory-search says how to find the best keys: give their number by"),
        (["--memory-directory", "absent"], "--memory-directory absent is no folder. Make it first."),
        (["--memory-device", "cpu"], "--memory-device cpu changes nothing for a model on the CPU. Leave it out."),
        (
            ["--memory-device", "cpu", "--memory-directory", "."],
            "--memory-directory keeps the memory on the CPU already",
        ),
        (["--sequence", "2"], "--sequence 2 needs as many processes"),
        (["--sequence", "2", "--memory-top-k", "3"], "--memory-top-k cannot be used with a memory that --sequence"),
        (["--sequence", "2", "--memory-capacity", "3"], "--memory-capacity cannot be used with a memory that"),
        (
            ["--sequence", "2", "--save-memory", "m"],
            "--save-memory cannot be used with a memory that --sequence shares",
        ),
        (["--memory", "absent"], "--memory absent is no file. Make it with --save-memory."),
        (["--save-memory", "setup.py"], "--save-memory setup.py exists. Delete it, or give another name."),
        (["--save-memory", "absent/m"], "absent is no folder, so m cannot be written there. Make it first."),
        (["--save-memory", "m", "--top-k", "3"], "--top-k is about new text, and --save-memory writes none"),
        (["--save-memory", "m", "--stop", "x"], "--stop is about new text, and --save-memory writes none"),
    ],
)
def test_flags_that_do_nothing_are_refused(main, capsys, flags, told):
    assert main("--prompt", "x", *flags) == 2
    refused(capsys, told)


def test_flags_that_this_model_or_prompt_has_no_use_for(main, saved, capsys):
    assert main("--chat", "--save-memory", "m") == 2
    refused(capsys, "--save-memory reads a text: give it by --prompt or --prompt-file, a chat is not saved.")
    for flags in (["--memory-top-k", 3], ["--memory-directory", "."], ["--memory-device", "cpu"]):
        assert main("--prompt", "x", *flags, model="retention") == 2
        refused(capsys, f"{flags[0]} is about memory layers, and the model has none. Leave it out.")
    assert main("--prompt", "", "--memory", saved[0]) == 2
    refused(capsys, "an empty prompt has no token to go on from behind --memory. Give it a character.")
