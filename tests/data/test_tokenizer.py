"""Tokenizers: every text comes back, special strings stay text, a saved one is the same, broken files are explained."""

import argparse
import base64
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from megayoco.data.tokenizer import (
    CL100K_PATTERN,
    ByteTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    YocoTiktokenTokenizer,
    add_tokenizer_arguments,
    build_described,
    build_tokenizer,
    describe_tokenizer,
    load_ranks,
    tokenizer_from_arguments,
    write_rank_file,
)
from megayoco.data.tokenizer.base import EncodingError
from megayoco.data.tokenizer.yoco import CODE_SPECIALS
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


@pytest.fixture(params=["TiktokenTokenizer", "YocoTiktokenTokenizer", "ByteTokenizer"])
def tokenizer(request, rank_file):
    return build_tokenizer(request.param, rank_file)


def test_importing_and_bytes_need_no_tokenizer_library():
    code = (
        "import sys; from megayoco.data import tokenizer; tokenizer.build_tokenizer('ByteTokenizer').encode('a')\n"
        "assert not {'torch', 'tiktoken', 'tokenizers', 'sentencepiece', 'regex'} & sys.modules.keys()"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": root}, check=True)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_comes_back_and_ids_are_below_the_vocabulary(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert ids == tokenizer.encode_array(text).tolist()


@pytest.mark.parametrize("append_eod", [False, True])
def test_documents_are_those_of_separate_calls(tokenizer, append_eod):
    texts = ["", *TEXTS, "\ud800", "", "x"]
    tokens, lengths = tokenizer.encode_documents(texts, append_eod=append_eod)
    expected = [tokenizer.encode(text) + ([tokenizer.eod] if append_eod and text else []) for text in texts]
    assert lengths.dtype == np.int64 and lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [i for ids in expected for i in ids]
    for nothing in ([], ["", ""]):
        tokens, lengths = tokenizer.encode_documents(nothing, append_eod=append_eod)
        assert (tokens.tolist(), lengths.tolist()) == ([], [0] * len(nothing))


def test_ids_of_text_are_in_the_vocabulary_and_partial_characters_are_fallback(tokenizer):
    vocabulary, fallback = tokenizer.vocabulary(), tokenizer.fallback_ids()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(vocabulary[i] for i in ids).decode() == text
    assert fallback == {i for i in vocabulary if tokenizer.decode([i]) == "\ufffd"}
    assert len(fallback) == 128 and tokenizer.encode("é")[0] in fallback


def test_an_encoding_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(EncodingError("too long", 3)))
    assert (str(error), error.document) == ("too long", 3)


def test_special_tokens_are_text_unless_allowed(rank_file):
    for tokenizer in (TiktokenTokenizer(rank_file), YocoTiktokenTokenizer(rank_file)):
        text = "a<|endoftext|>b"
        assert len(tokenizer.encode(text)) > 3
        tokens, lengths = tokenizer.encode_documents([text, text], allow_special=True)
        assert lengths.tolist() == [3, 3]
        assert tokenizer.decode(tokens) == text * 2


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


def test_special_tokens_and_the_end_of_documents_can_be_chosen(rank_file, tmp_path):
    plain = TiktokenTokenizer(rank_file)
    options = {"special_tokens": ["<end>", "<sep>"], "eod_token": "<end>"}
    tokenizer = build_tokenizer("TikTokenizer", rank_file, options)
    assert (tokenizer.type, tokenizer.options) == ("TiktokenTokenizer", options)
    assert (tokenizer.vocab_size, tokenizer.eod) == (plain.vocab_size + 2, plain.vocab_size)
    assert tokenizer.encode_documents(["<sep>"], allow_special=True)[0].tolist() == [plain.vocab_size + 1]
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_dir(tmp_path / "saved").identity() == tokenizer.identity()
    other_end = build_tokenizer("TiktokenTokenizer", rank_file, options | {"eod_token": "<sep>"})
    assert len({one.identity()["sha256"] for one in (plain, tokenizer, other_end)}) == 3
    for wrong, message in [
        ({"eod_token": "<none>"}, r"no special token <none>.*--eod-token"),
        ({"special_tokens": ["<|endoftext|>"]}, "exists already"),
        ({"vocab_file": "x"}, "takes no --vocab-file"),
        ({"colour": "x"}, "takes no --colour"),
        ({"special_tokens": [1]}, "special_tokens has the value"),
        ({"special_tokens": "<x>"}, "special_tokens has the value"),
        ({"eod_token": ["a"]}, "eod_token has the value"),
    ]:
        with pytest.raises(UserError, match=message):
            build_tokenizer("TiktokenTokenizer", rank_file, wrong)


def test_the_official_layout_of_yoco(tmp_path):
    """Ids of the official models: cl100k's ranks, which are not here, replaced by as many others."""
    ranks = {bytes([i]): i for i in range(256)} | {b"%06d" % i: i for i in range(256, 100_256)}
    write_rank_file(tmp_path / "r", ranks, CL100K_PATTERN, {})
    tokenizer = YocoTiktokenTokenizer(str(tmp_path / "r"))
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (100_288, 0, 2)
    ids = {name: number + 4 for name, number in tokenizer.engine.special_tokens.items()}
    assert ids["<|endoftext|>"] == 100_261 and ids["<|fim_suffix|>"] == 100_264
    assert [ids[name] - 4 for name in CODE_SPECIALS] == list(range(100_264, 100_282))
    assert ids["<jupyter_code>"] == 100_280 and "<|endofprompt|>" not in ids
    assert tokenizer.encode("a") == [ord("a") + 4]
    assert tokenizer.decode([0, 1, 2, 3, ord("a") + 4, ids["<filename>"], ids["<jupyter_code>"]]) == (
        "a<filename><jupyter_code>"
    )
    for hole in (100_256, 100_261, 100_262, 100_263, 100_282, 100_283):
        assert tokenizer.decode([hole + 4]) == "\ufffd"
    everything = tokenizer.encode_documents(["<|endofprompt|><filename>"], allow_special=True)[0]
    assert everything[-1] == ids["<filename>"] and len(everything) == len("<|endofprompt|>") + 1


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
        (("TikTok", None), "unknown tokenizer type 'TikTok'.*YocoTiktokenTokenizer.*GPT2BPETokenizer"),
        (("HFTokenizer", None), "HuggingFaceTokenizer needs a model.*tokenizer.json"),
        (("Llama2Tokenizer", None), "SentencePieceTokenizer needs a model"),
        (("YocoTiktokenTokenizer", None), "needs a model"),
        (("ByteTokenizer", None, {"eod_token": "x"}), "ByteTokenizer takes no --eod-token"),
        (("TiktokenTokenizer", None), "needs a model"),
        (("TiktokenTokenizer", "no/such.file"), "neither a file nor an encoding"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(*arguments)


def test_the_byte_tokenizer_is_bytes():
    assert ByteTokenizer().encode("é") == [0xC3, 0xA9]


def parsed(*arguments: str):
    parser = argparse.ArgumentParser()
    add_tokenizer_arguments(parser)
    return tokenizer_from_arguments(parser.parse_args(["--tokenizer-type", *arguments]))


def test_flags_of_the_command_line():
    assert parsed("ByteTokenizer") == ("ByteTokenizer", None, {})
    assert parsed("TikTokenizer", "--tokenizer-model", "m", "--tokenizer-special-tokens", "<a>", "<b>") == (
        ("TiktokenTokenizer", "m", {"special_tokens": ["<a>", "<b>"]})
    )
    assert parsed("GPT2BPETokenizer", "--vocab-file", "v", "--merge-file", "m", "--eod-token", "e") == (
        ("HuggingFaceTokenizer", None, {"vocab_file": "v", "merge_file": "m", "eod_token": "e"})
    )
    assert parsed("HFTokenizer", "--vocab-file", "t.json") == ("HuggingFaceTokenizer", "t.json", {})
    with pytest.raises(UserError, match="unknown tokenizer type"):
        parsed("NullTokenizer")


def test_a_description_finds_its_files_from_where_it_lies(rank_file, tmp_path, monkeypatch):
    tokenizer = build_tokenizer("TiktokenTokenizer", rank_file, {"special_tokens": ["<x>"]})
    (tmp_path / "data").mkdir()
    description = json.loads(json.dumps(describe_tokenizer(tokenizer, tmp_path / "data")))
    assert description == {**tokenizer.identity(), "model": "../ranks.tiktoken", "options": {"special_tokens": ["<x>"]}}
    monkeypatch.chdir("/")
    assert build_described(description, tmp_path / "data").identity() == tokenizer.identity()
    assert build_described(description, "/", rank_file).identity() == tokenizer.identity()
    older = {key: value for key, value in description.items() if key != "options"}
    assert build_described(older, tmp_path / "data").vocab_size == tokenizer.vocab_size - 1
    assert build_described(describe_tokenizer(ByteTokenizer(), "/"), "/").type == "ByteTokenizer"


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_a_vocabulary_of_megatrons_tiktokenizer(tmp_path, pattern):
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    tokens = [bytes([i]) for i in range(256)] + [b"in", b" t", b" the", b"er", b"12", "é".encode(), b"never"]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("utf-8", "replace")}
        for rank, token in enumerate(tokens)
    ]
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(entries))
    reference = TikTokenTokenizer(str(path), num_special_tokens=20, pattern=pattern, vocab_size=20 + 262)
    options = {"pattern": pattern, "num_special_tokens": 20, "vocab_size": 20 + 262}
    tokenizer = build_tokenizer("TikTokenizer", str(path), options)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (282, reference.eos_id, reference.bos_id)
    for text in [*TEXTS, "in the 1212 winter, étage Never IN"]:
        assert tokenizer.encode(text) == reference.tokenizer.encode(text, disallowed_special=())
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_dir(tmp_path / "saved").identity() == tokenizer.identity()
    assert build_tokenizer("TikTokenizer", str(path)).eod == 2
    for wrong, message in [
        ({"special_tokens": ["<s>"]}, "must be at most 1000 different ones and hold <unk>"),
        ({"num_special_tokens": 3}, "--tiktoken-num-special-tokens"),
        ({"vocab_size": 1100}, "no room"),
        ({"pattern": "("}, "refuses its pattern"),
    ]:
        with pytest.raises(UserError, match=message):
            build_tokenizer("TikTokenizer", str(path), wrong)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"no vocabulary of Megatron's TikTokenizer.*HuggingFaceTokenizer"):
        build_tokenizer("TikTokenizer", str(path))


def test_megatrons_options_are_refused_for_a_rank_file(rank_file):
    with pytest.raises(UserError, match="the option pattern is for vocabularies of Megatron's"):
        build_tokenizer("TiktokenTokenizer", rank_file, {"pattern": "v1"})
