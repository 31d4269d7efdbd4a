"""Documents that teach looking up: their length, what can be looked up in them, every mistake in one line."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest

from megayoco.data.command import run_command
from megayoco.data.tokenizer import ByteTokenizer, TiktokenTokenizer, write_rank_file
from megayoco.evaluate.needle import CITIES, INSTRUCTION

ROOT = Path(__file__).parents[2]
STATEMENT = re.compile(r"(What is the special magic [^?]+ number\? )?The special magic ([^\n]+?) number is (\d+) \. ")


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_retrieval = load_tool("make_retrieval")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    words = random.Random(0).choices("alpha beta gamma, delta 17 ſéЖ日本 return (x) # 🙂".split(), k=4000)
    lines = [f"    {' '.join(words[i : i + 8])}" for i in range(0, len(words), 8)]
    path = tmp_path_factory.mktemp("retrieval") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": "\n".join(lines[i : i + 50])}) + "\n" for i in range(0, 500, 50)))
    return path


def arguments(corpus, output, *more) -> list[str]:
    given = ["--input", corpus, "--output", output, "--documents", 40, "--tokenizer-type", "ByteTokenizer", *more]
    return [str(x) for x in given]


def made(corpus, output, *more) -> list[str]:
    assert run_command(make_retrieval.main, arguments(corpus, output, *more)) == 0
    return [json.loads(line)["text"] for line in output.read_text("utf-8").splitlines()]


def fails(corpus, output, capsys, *more) -> str:
    capsys.readouterr()
    assert run_command(make_retrieval.main, arguments(corpus, output, *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def rank_file(path: Path) -> TiktokenTokenizer:
    """Words of the needle test, and pairs of letters, as tokens."""
    tokens = [bytes([i]) for i in range(256)] + [b" ma", b" mag", b"is", b" is", b"12", b"al", b"ph", b"  ", b" ."]
    write_rank_file(path, {token: rank for rank, token in enumerate(tokens)}, r" ?\w+|\s+|.", {"<|endoftext|>": 265})
    return TiktokenTokenizer(str(path))


def test_documents_have_the_tokens_asked_for_and_no_question_without_its_fact(corpus, tmp_path):
    texts = made(corpus, tmp_path / "a", "--tokens", 1500, "--needles", 2, 5, "--filler", 0.2, 0.6)
    restated = asked = at_end = 0
    for text in texts:
        assert len(ByteTokenizer().encode(text)) == 1499  # and the end-of-document token
        found = [match.groups() for match in STATEMENT.finditer(text)]
        known: dict[str, str] = {}
        for question, city, number in found:
            assert city in CITIES and 1 <= int(number) <= 50_000
            if city in known:
                assert number == known[city]
                asked, restated = asked + bool(question), restated + (not question)
            else:
                assert not question
                known[city] = number
        assert 2 <= len(known) <= 5
        assert found[-1][0] and text.endswith(f"number is {found[-1][2]} . ")  # a question stands at the end
        at_end += text.count(" . \nWhat is") > 0
    assert asked > 1.3 * restated > 40
    assert at_end > 0
    assert 5 < sum(text.startswith(INSTRUCTION) for text in texts) < 35
    assert len(set(texts)) == len(texts)


def test_filler_is_text_of_the_input_in_the_share_asked_for(corpus, tmp_path):
    lines = [
        line.strip() for record in corpus.read_text().splitlines() for line in json.loads(record)["text"].split("\n")
    ]
    ring = " ".join(lines) * 2

    def shares(name, *filler):
        for text in made(corpus, tmp_path / name, "--tokens", 2000, "--filler", *filler):
            pieces = STATEMENT.sub("", text).removeprefix(INSTRUCTION).split("\n")
            pieces = [piece for piece in pieces if piece]
            assert all(piece in ring for piece in pieces)
            yield sum(len(piece.encode()) for piece in pieces) / 2000

    assert all(0.75 < share < 0.95 for share in shares("much", 0.9, 0.9))
    assert all(share < 0.25 for share in shares("little", 0.1, 0.1))


def test_the_length_is_exact_where_tokens_merge_across_pieces(corpus, tmp_path):
    tokenizer = rank_file(tmp_path / "ranks")
    model = ["--tokenizer-type", "TiktokenTokenizer", "--tokenizer-model", tmp_path / "ranks"]
    for tokens in (300, 301, 1024):
        texts = made(corpus, tmp_path / f"t{tokens}", "--tokens", tokens, *model)
        assert {len(tokenizer.encode(text)) for text in texts} == {tokens - 1}


def test_a_file_follows_from_its_seed(corpus, tmp_path):
    first, again = (made(corpus, tmp_path / name, "--tokens", 600, "--seed", 7) for name in "ab")
    assert first == again != made(corpus, tmp_path / "c", "--tokens", 600, "--seed", 8)


def test_restated_and_needles_are_kept(corpus, tmp_path):
    texts = made(corpus, tmp_path / "a", "--tokens", 900, "--needles", 1, 1, "--filler", 0, 0, "--restated", 0)
    for text in texts:
        kinds = [bool(match[1]) for match in STATEMENT.finditer(text)]
        assert kinds.count(False) == 1 and not kinds[0]


def test_mistakes_are_one_line_and_write_nothing(corpus, tmp_path, capsys):
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": "  "}\n')
    out = tmp_path / "out.jsonl"
    enough = ["--tokens", 600]
    for more, message in [
        (["--tokens", 90, "--needles", 3, 3], "--tokens 90 is too short"),
        ([*enough, "--needles", 5, 2], "must ascend"),
        ([*enough, "--needles", 1, 100], "number of cities"),
        ([*enough, "--filler", 0.9, 0.1], "ascending"),
        ([*enough, "--filler", 0, 1.5], "between 0 and 1"),
        ([*enough, "--restated", 2], "--restated 2.0"),
        ([*enough, "--input", blank], "no text under text"),
    ]:
        assert message in fails(corpus, out, capsys, *more)
        assert list(tmp_path.iterdir()) == [blank]
    out.write_text("mine")
    assert "exists" in fails(corpus, out, capsys, *enough)
    assert out.read_text() == "mine"
    assert "is a folder" in fails(corpus, tmp_path, capsys, *enough, "--overwrite")
    assert len(made(corpus, out, *enough, "--overwrite")) == 40
