"""Tokenizers: every text comes back, special strings stay text, a saved one is the same, broken files are explained."""

import base64
import json
from pathlib import Path

import pytest
import tiktoken

from megayoco.data.tokenizer import (
    CL100K_PATTERN,
    ByteTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    build_tokenizer,
    load_ranks,
    write_rank_file,
)
from megayoco.errors import UserError

TEXTS = [
    "",
    "def f(x):\n    return x + 1\n",
    "naïve 北京 👩‍👩‍👧 \u0301 \x00\x7f\ufeff",
    "<|endoftext|> and <|endofprompt|>",
    " \t\r\n\n   ",
    "a" * 5000,
]


@pytest.fixture
def rank_file(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    merges = [b"in", b"de", b"def", b"  ", b"    ", b"et", b"return"]
    ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(merges)}
    write_rank_file(path, ranks, CL100K_PATTERN, {"<|endoftext|>": len(ranks)})
    return str(path)


@pytest.fixture(params=["TiktokenTokenizer", "ByteTokenizer"])
def tokenizer(request, rank_file):
    return build_tokenizer(request.param, rank_file)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_comes_back_and_ids_are_below_the_vocabulary(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert ids == tokenizer.encode_array(text).tolist()


def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_bytes_cut_inside_a_character_and_ids_without_a_token_decode(tokenizer):
    ids = tokenizer.encode("é")
    assert tokenizer.decode_bytes(ids[:1]) == "é".encode()[:1]
    assert tokenizer.decode([*tokenizer.encode("a"), 50_000]) == "a\ufffd"


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = Tokenizer.from_dir(tmp_path / "moved")
    assert again.identity() == tokenizer.identity()
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_a_changed_saved_tokenizer_is_refused(rank_file, tmp_path):
    TiktokenTokenizer(rank_file).save(tmp_path / "saved")
    path = tmp_path / "saved" / "ranks.tiktoken.json"
    path.write_text(json.dumps({"pattern": r"\S+|\s+", "special_tokens": {"<|endoftext|>": 263}}))
    with pytest.raises(UserError, match="describes another tokenizer"):
        Tokenizer.from_dir(tmp_path / "saved")
    path = tmp_path / "saved" / "megayoco_tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": 3}))
    with pytest.raises(UserError, match="neither a file nor an encoding"):
        Tokenizer.from_dir(tmp_path / "saved")


def test_the_sidecar_may_be_absent(rank_file):
    described = TiktokenTokenizer(rank_file).identity()
    Path(f"{rank_file}.json").unlink()
    assert TiktokenTokenizer(rank_file).identity() == described
    assert described["eod"] == 263 and described["vocab_size"] == 264


def test_a_rank_file_of_ours_loads_in_tiktoken(rank_file):
    ranks = tiktoken.load.load_tiktoken_bpe(rank_file)
    assert ranks == load_ranks(rank_file)


def test_the_identity_depends_on_pattern_specials_and_ranks(rank_file, tmp_path):
    ranks = load_ranks(rank_file)
    hashes = set()
    variants = [
        (ranks, CL100K_PATTERN, {"<|endoftext|>": 263}),
        (ranks, r"\S+|\s+", {"<|endoftext|>": 263}),
        (ranks, CL100K_PATTERN, {"<|endoftext|>": 300}),
        (ranks | {b"xy": 400}, CL100K_PATTERN, {"<|endoftext|>": 263}),
    ]
    for number, variant in enumerate(variants):
        write_rank_file(tmp_path / str(number), *variant)
        hashes.add(TiktokenTokenizer(str(tmp_path / str(number))).identity()["sha256"])
    assert len(hashes) == len(variants)


def lines_of_all_bytes() -> list[bytes]:
    return [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:200], "56 of the 256 single bytes have no rank"),
        (lambda lines: [*lines, b"hello"], "line 257: expected a token in base64"),
        (lambda lines: [*lines, b"YWI= x"], "line 257: expected a token in base64"),
        (lambda lines: [*lines, b"YWI= 17"], "two tokens share one rank"),
        (lambda lines: [*lines, lines[3]], "line 257: the token occurs twice"),
        (lambda lines: [*lines, b"YWI= 9999999999"], "too large for tiktoken"),
    ],
)
def test_a_broken_rank_file_is_explained(tmp_path, change, message):
    path = tmp_path / "ranks"
    path.write_bytes(b"\n".join(change(lines_of_all_bytes())))
    with pytest.raises(UserError, match=message):
        TiktokenTokenizer(str(path))


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"pattern": "("}', "refuses its pattern"),
        ('{"special_tokens": {"<|endoftext|>": 5}}', "must be a free integer"),
        ('{"special_tokens": {"<s>": 900}}', "no special token <|endoftext|>"),
    ],
)
def test_a_broken_sidecar_is_explained(rank_file, sidecar, message):
    with open(f"{rank_file}.json", "w") as file:
        file.write(sidecar)
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        TiktokenTokenizer(rank_file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("TikTok", None), "unknown tokenizer type"),
        (("TiktokenTokenizer", None), "needs a model"),
        (("TiktokenTokenizer", "no/such.file"), "neither a file nor an encoding"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(*arguments)


def test_the_byte_tokenizer_is_bytes():
    assert ByteTokenizer().encode("é") == [0xC3, 0xA9]
