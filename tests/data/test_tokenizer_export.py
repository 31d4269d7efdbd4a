"""tokenizer.json of a rank file: transformers loads it without network, and it gives the same ids."""

import json
import random

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megayoco.data.tokenizer import CL100K_PATTERN, ByteTokenizer, Tokenizer, build_tokenizer, write_rank_file
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.data.tokenizer.patterns import for_oniguruma, means_the_same
from megayoco.data.tokenizer.yoco import SYMBOLS
from megayoco.errors import UserError
from tests.data.test_tokenizer_huggingface import EOD, KINDS, LLAMA3, WORDS, train, training_text

TEXTS = [
    "1234567 and 12 345678901234567890",
    "mixed \t blanks \n\n\n  \r\n at the end   ",
    "日本語のテキスト、中文",
    "we'll DON'T it's you'RE ſ'ſ",
    "names in text: <|endoftext|> </s> <filename>",
    "a" * 200 + " " * 200,
    "",
]


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory):
    """Ranks in order, some never made by merging (abcd: bc comes first), and a gap before the special tokens."""
    path = tmp_path_factory.mktemp("ranks") / "ranks.tiktoken"
    tokens = [
        b"bc",
        b"ab",
        b"cd",
        b"abcd",
        b"in",
        b" t",
        b" th",
        b"  ",
        b"    ",
        b"er",
        "é".encode(),
        b"\n\n",
        b"123",
        b"12",
        b"67",
    ]
    ranks = {bytes([i]): (i + 7) % 256 for i in range(256)} | {token: 256 + 2 * i for i, token in enumerate(tokens)}
    write_rank_file(path, ranks, CL100K_PATTERN, {EOD: 300, "<|fim|>": 305})
    return str(path)


def tokenizers_of(rank_file, folder):
    train(*KINDS["llama3"]).save(str(folder / "t.json"))
    return {
        "tiktoken": build_tokenizer("TiktokenTokenizer", rank_file),
        "yoco": build_tokenizer("YocoTiktokenTokenizer", rank_file),
        "bytes": ByteTokenizer(),
        "huggingface": build_tokenizer("HuggingFaceTokenizer", str(folder / "t.json"), {"eod_token": EOD}),
    }


@pytest.mark.parametrize("kind", ["tiktoken", "yoco", "bytes", "huggingface"])
def test_transformers_loads_it_and_encodes_alike(rank_file, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = tokenizers_of(rank_file, tmp_path)[kind]
    write_for_transformers(tokenizer, tmp_path / ".")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token_id == tokenizer.eod and loaded.bos_token_id == tokenizer.bos

    def ids(text):
        return loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids

    for text in [*TEXTS, *training_text(20)]:
        assert ids(text) == tokenizer.encode(text)
        assert loaded.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))

    @settings(max_examples=150, deadline=None)
    @given(st.one_of(st.text(max_size=40), st.text("abcd123 \n\r\té'", max_size=40)))
    def check(text):
        assert ids(text) == tokenizer.encode(text)

    check()
    again = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    assert again.slow_because is None  # it comes back through tiktoken
    assert again.encode("abcd 123 the") == tokenizer.encode("abcd 123 the")


def test_special_tokens_are_found_where_transformers_is_not_told_otherwise(rank_file, tmp_path):
    yoco = build_tokenizer("YocoTiktokenTokenizer", rank_file)
    write_for_transformers(yoco, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    assert loaded.convert_tokens_to_ids(names) == [0, 1, 2, 3] == [SYMBOLS.index(name) for name in names]
    assert (loaded.pad_token_id, loaded.unk_token_id) == (1, 3)
    text = "a<filename>b"
    assert (
        loaded(text, add_special_tokens=False).input_ids
        == yoco.encode_documents([text], allow_special=True)[0].tolist()
    )


def test_a_pattern_without_an_equal_is_refused(rank_file, tmp_path):
    ranks = build_tokenizer("TiktokenTokenizer", rank_file).engine.ranks
    write_rank_file(tmp_path / "r", ranks, r"\b\w+|\W", {EOD: 300})
    with pytest.raises(UserError, match="may understand otherwise"):
        write_for_transformers(build_tokenizer("TiktokenTokenizer", str(tmp_path / "r")), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_difference_is_found_before_anything_is_written(rank_file, tmp_path, monkeypatch):
    # as if nobody had noticed that Oniguruma repeats {1,3}+
    monkeypatch.setattr("megayoco.data.tokenizer.export.for_oniguruma", lambda pattern: pattern)
    with pytest.raises(UserError, match=r"would encode '1234567.*otherwise; it was not written"):
        write_for_transformers(build_tokenizer("TiktokenTokenizer", rank_file), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_possessive_counts_and_the_end_of_text_are_rewritten():
    assert for_oniguruma(r"\p{N}{1,3}+|\s++$") == r"(?>\p{N}{1,3})|\s++\z"
    assert for_oniguruma(r"[^\s\p{L}]{2}+") == r"(?>[^\s\p{L}]{2})"
    assert for_oniguruma(r"(?:ab){1,2}+") is None
    assert for_oniguruma(r"^a") is None
    assert for_oniguruma(LLAMA3) == LLAMA3
    assert means_the_same(for_oniguruma(CL100K_PATTERN))


def test_random_vocabularies_are_exported(tmp_path):
    rng = random.Random(0)
    bytes_alone = {bytes([i]): i for i in range(256)}
    for number in range(8):
        tokens = dict.fromkeys(bytes(rng.choices(b"abc ", k=rng.randint(2, 5))) for _ in range(rng.randint(1, 40)))
        path = tmp_path / f"{number}.tiktoken"
        write_rank_file(path, bytes_alone | {t: 256 + i for i, t in enumerate(tokens)}, CL100K_PATTERN, {EOD: 400})
        tokenizer = build_tokenizer("TiktokenTokenizer", str(path))
        write_for_transformers(tokenizer, tmp_path / str(number))
        loaded = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / str(number)), {"engine": "tokenizers"})
        for _ in range(100):
            text = "".join(rng.choices("abc ", k=rng.randint(1, 20)))
            assert loaded.encode(text) == tokenizer.encode(text), (tokens, text)


def test_a_folder_that_was_saved_holds_both(rank_file, tmp_path):
    tokenizer = build_tokenizer("TiktokenTokenizer", rank_file)
    tokenizer.save(tmp_path)
    write_for_transformers(tokenizer, tmp_path)
    assert Tokenizer.from_dir(tmp_path).identity() == tokenizer.identity()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token == EOD


def test_of_sentencepiece_the_model_itself_is_written(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    write_for_transformers(build_tokenizer("SentencePieceTokenizer", str(tmp_path / "m.model")), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (1, 2, 330)
