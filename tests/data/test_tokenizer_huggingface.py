"""HuggingFaceTokenizer: the ids of the tokenizers library, also where tiktoken makes them; SentencePiece."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import regex
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from megayoco.data.tokenizer import Tokenizer, build_tokenizer
from megayoco.data.tokenizer import byte_level as module
from megayoco.data.tokenizer.byte_level import NotEqual, byte_of_character, tiktoken_engine
from megayoco.data.tokenizer.merges import last_merge, last_merges
from megayoco.data.tokenizer.patterns import GPT2_PATTERN, means_the_same
from megayoco.errors import UserError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOD = "<|endoftext|>"
GPT2_JSON = {"type": "ByteLevel", "add_prefix_space": False}


def split(pattern):
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


KINDS = {
    "gpt2": ([pre_tokenizers.ByteLevel(add_prefix_space=False)], None),
    "llama3": (split(LLAMA3), None),
    "qwen": (split(QWEN), normalizers.NFC()),
    "o200k": (split(O200K), None),
    "starcoder": ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], None),
}
WORDS = (
    "the def return self Hello we'll I'D it's don't Größe été 日本語 データ 12 345 6789 x1 naïve кот \u0301e ⅷ".split()
)


def training_text(lines: int = 400) -> list[str]:
    rng = random.Random(0)
    blanks = [" ", " ", " ", "  ", "\n", "\n\n    ", "\t", "\r\n", ", ", "...", "!? "]
    return ["".join(rng.choice(WORDS) + rng.choice(blanks) for _ in range(30)) for _ in range(lines)]


def train(steps, normalizer=None, added=()):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=[EOD], show_progress=False)
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """KIND.json for every kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, (steps, normalizer) in KINDS.items():
        train(steps, normalizer).save(str(folder / f"{kind}.json"))
    return folder


def load(path, **options) -> Tokenizer:
    return build_tokenizer("HuggingFaceTokenizer", str(path), {"eod_token": EOD, **options})


any_texts = st.lists(
    st.one_of(
        st.text(max_size=30),
        st.text("abeilorstv'SILKſ019 \n\r\t\u3000\u00a0!.,éе́漢ﬀß\u200d", max_size=40),
        st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", EOD]), max_size=12).map("".join),
        st.just("a\ud800"),
    ),
    max_size=4,
)


@pytest.mark.parametrize("kind", KINDS)
def test_tiktoken_gives_the_ids_of_tokenizers(folder, kind):
    tokenizer, reference = load(folder / f"{kind}.json"), tokenizers.Tokenizer.from_file(str(folder / f"{kind}.json"))
    assert tokenizer.slow_because is None
    reference.encode_special_tokens = True

    @settings(max_examples=100, deadline=None)
    @given(any_texts)
    def check(texts):
        tokens, lengths = tokenizer.encode_documents(texts)
        clean = [text.replace("\ud800", "\ufffd") for text in texts]
        expected = [reference.encode(text, add_special_tokens=False).ids for text in clean]
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.tolist() == [i for ids in expected for i in ids]
        assert tokens.tolist() == [i for text in texts for i in tokenizer.encode(text)]

    check()
    for text in training_text(20):
        assert tokenizer.encode(text) == reference.encode(text).ids
        if kind != "qwen":
            assert tokenizer.decode(tokenizer.encode(text)) == text


def random_model(rng: random.Random) -> dict:
    """A BPE over three letters: merges of one token in several ways, in any order, tokens that nothing makes."""
    letters, tokens, merges = "abc", ["a", "b", "c"], []
    for _ in range(rng.randint(1, 12)):
        pair = (rng.choice(tokens), rng.choice(tokens))
        if pair not in merges and len("".join(pair)) < 9:
            merges.append(pair)
            tokens.append("".join(pair))
    ways = [(t[:i], t[i:]) for t in set(tokens) for i in range(1, len(t)) if t[:i] in tokens and t[i:] in tokens]
    if rng.random() < 0.5:  # as converters of rank files do: every way to make a token, token by token
        order = list(dict.fromkeys(a + b for a, b in merges))
        merges = sorted(ways, key=lambda pair: (order.index("".join(pair)), tokens.index(pair[0])))
    elif rng.random() < 0.3:
        merges += [way for way in ways if way not in merges and rng.random() < 0.5]
    if rng.random() < 0.2:
        rng.shuffle(merges)
    if rng.random() < 0.3:
        tokens.append("".join(rng.choices(letters, k=rng.randint(2, 5))))
    rest = [c for c in byte_of_character() if c not in letters]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*rest, *tokens]))}
    return {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": rng.random() < 0.5}


def test_whatever_vocabulary_is_accepted_gives_equal_ids():
    rng = random.Random(0)
    accepted = 0
    for _ in range(250):
        model = random_model(rng)
        content = {"model": model, "pre_tokenizer": GPT2_JSON}
        try:
            engine, ids = tiktoken_engine(content, "x")
        except NotEqual:
            continue
        accepted += 1
        bpe = models.BPE(vocab=model["vocab"], merges=model["merges"], ignore_merges=model["ignore_merges"])
        reference = tokenizers.Tokenizer(bpe)
        for _ in range(25):
            text = "".join(rng.choices("abc", k=rng.randint(1, 24)))
            found = ids[engine.encode([text], False)[0]].tolist()
            assert found == reference.encode(text).ids, (model["merges"], text)
    assert accepted > 90


def test_a_token_that_merging_never_makes():
    merges = [("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd")]  # bc is first, so that ab and cd never meet
    tokens = [*byte_of_character(), *(a + b for a, b in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for ignore_merges in (False, True):
        model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": ignore_merges}
        engine, ids = tiktoken_engine({"model": model, "pre_tokenizer": GPT2_JSON}, "x")
        reference = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
        reference.pre_tokenizer = KINDS["gpt2"][0][0]
        for text in ("abcd", "xabcd", "abcdx", "abcd abcd", "abd cd"):
            assert ids[engine.encode([text], False)[0]].tolist() == reference.encode(text).ids


def test_the_last_merge_is_that_of_merging_step_by_step():
    rng = random.Random(1)
    found_any = 0
    for _ in range(300):
        tokens = [bytes([i]) for i in range(3)]
        while len(tokens) < 12:
            token = rng.choice(tokens) + rng.choice(tokens)
            if token not in tokens:
                tokens.append(token)
        if rng.random() < 0.3:
            tokens[3:] = rng.sample(tokens[3:], len(tokens) - 3)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        ways = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in ranks and t[i:] in ranks]
        found = last_merges(
            tokens, np.array([(ranks[a], ranks[b]) for a, b in ways]), np.array([ranks[a + b] for a, b in ways])
        )
        for token, row in zip(tokens, found, strict=True):
            if row >= 0:
                assert list(ways[row]) == last_merge(token, ranks)
                found_any += 1
    assert found_any > 1000


@pytest.mark.parametrize("category", [r"\p{L}", r"[\p{N}\s]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"'(?i:[sdmt])"])
def test_both_engines_know_the_same_characters(category):
    prefix = category[: category.startswith("'")]
    characters = [prefix + chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    ours = tiktoken.Encoding(
        "x", pat_str=category, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    everything = "".join(characters)
    kept = ours.decode_bytes(ours.encode_ordinary(everything)).decode()
    theirs = pre_tokenizers.Split(Regex(category), "removed").pre_tokenize_str(everything)
    assert len(kept) + sum(len(piece) for piece, _ in theirs) == len(everything)
    assert not set(kept) & set("".join(piece for piece, _ in theirs)) - {"'"}


def test_other_unicode_tables_are_noticed(folder, monkeypatch):
    assert all(regex.fullmatch(r"\p{L}", c) for c in module._NEW_LETTERS)
    assert all(regex.fullmatch(r"[\p{N}\p{L}]", c) for c in module._NEW_NUMBERS)
    monkeypatch.setattr(module, "_NEW_LETTERS", module._NEW_LETTERS + "!")
    monkeypatch.setattr(module, "Regex", lambda pattern: Regex(pattern.replace(r"\p{L}", r"[\p{L}!]")))
    assert "versions of Unicode" in load(folder / "gpt2.json").slow_because


@pytest.mark.parametrize(
    "pattern", [GPT2_PATTERN, LLAMA3, QWEN, O200K, r"[一-龥぀-ゟ゠-ヿ]+|\S|\s", r"(?>\p{N}{1,3})|a\z"]
)
def test_expressions_that_mean_the_same_are_accepted(pattern):
    assert means_the_same(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"\p{N}{1,3}+", r"\s+$", r"\w+", r"\S|.", r"^a", r"[a&&b]", r"[a[b]]", r"(?i:ss|a)", r"(?<=a)b", r"\bx", "[^"],
)
def test_expressions_that_may_differ_are_not(pattern):
    assert not means_the_same(pattern)


def changed(folder, **changes) -> dict:
    return json.loads((folder / "gpt2.json").read_text()) | changes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["model"].update(type="Unigram"), "model is Unigram"),
        (lambda c: c["model"].update(dropout=0.1), "dropout"),
        (lambda c: c["model"]["vocab"].pop("a"), "single bytes are missing"),
        (lambda c: c["model"]["merges"].append(c["model"]["merges"][0]), "a merge occurs twice"),
        (lambda c: c["model"]["merges"].reverse(), "not in the order|of two that the list"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizer, Lowercase"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "puts a space"),
        (lambda c: c.update(pre_tokenizer=None), "not byte-level"),
        (
            lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [c["pre_tokenizer"]] * 2}),
            "no single",
        ),
    ],
)
def test_what_is_not_proven_is_left_to_tokenizers(folder, change, reason):
    content = changed(folder)
    change(content)
    with pytest.raises(NotEqual, match=reason):
        tiktoken_engine(content, "x")


def test_a_difference_at_run_time_stops(folder, monkeypatch):
    tokenizer = load(folder / "gpt2.json")
    tokenizer._fast[1][:] = 0  # ids
    with pytest.raises(RuntimeError, match=r"different ids.*--tokenizer-engine tokenizers"):
        tokenizer.encode("Hello")


def test_identity_depends_on_what_decides_ids_and_on_nothing_else(folder, tmp_path):
    content = changed(folder)
    same = [
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}},
        {
            "model": content["model"]
            | {"merges": [" ".join(pair) for pair in content["model"]["merges"]], "dropout": 0.0}
        },
        {"pre_tokenizer": content["pre_tokenizer"] | {"trim_offsets": False}},
    ]
    other = [
        {"normalizer": {"type": "NFC"}},
        {"model": content["model"] | {"merges": content["model"]["merges"][:-1]}},
        {"added_tokens": content["added_tokens"] + [content["added_tokens"][0] | {"id": 500, "content": "<x>"}]},
    ]
    identity = load(folder / "gpt2.json").identity()
    assert load(folder / "gpt2.json", engine="tokenizers").identity() == identity
    for number, change in enumerate(same + other):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content | change))
        assert (load(path).identity() == identity) == (number < len(same)), number


def test_special_tokens_are_text_unless_allowed(folder):
    for tokenizer in (load(folder / "llama3.json"), load(folder / "llama3.json", engine="tokenizers")):
        text = f"a{EOD}b"
        assert tokenizer.eod not in tokenizer.encode(text)
        tokens, lengths = tokenizer.encode_documents([text, "", EOD], allow_special=True, append_eod=True)
        assert lengths.tolist() == [4, 0, 2]
        assert (tokens == tokenizer.eod).tolist() == [False, True, False, True, True, True]
        assert tokenizer.decode(tokens) == text + EOD * 3


def test_tokens_that_are_not_special_are_found_in_every_text(tmp_path):
    train(KINDS["qwen"][0], normalizers.NFC(), added=["<tool>", "Hello"]).save(str(tmp_path / "t.json"))
    fast, slow = load(tmp_path / "t.json"), load(tmp_path / "t.json", engine="tokenizers")
    texts = ["plain text", "a <tool>b", "", "Hello", "e\u0301 data", "<tool>" * 3]
    assert fast.slow_because is None
    for found, expected in zip(fast.encode_documents(texts), slow.encode_documents(texts), strict=True):
        assert found.tolist() == expected.tolist()
    assert fast.vocab_size - 1 in fast.encode("a <tool>b")


def test_a_text_beyond_tiktokens_limits(folder):
    text = "a" + " " * 600_000 + "b"
    tokenizer = load(folder / "llama3.json")
    assert tokenizer.encode(text) == load(folder / "llama3.json", engine="tokenizers").encode(text)


def test_a_folder_says_what_ends_documents(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "gpt2.json").read_bytes())
    with pytest.raises(UserError, match=r"does not say which token ends documents.*--eod-token.*<\|endoftext\|>"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    with pytest.raises(UserError, match="has no token <end>"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path), {"eod_token": "<end>"})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "no", "bos_token": "a"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOD}, "bos_token": None}))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = build_tokenizer("HFTokenizer", str(path))
        assert (tokenizer.eod, tokenizer.bos) == (0, None)
        assert tokenizer.identity() == load(folder / "gpt2.json").identity()


def test_the_two_files_of_gpt2(folder, tmp_path):
    model = changed(folder)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n", "utf-8")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    text = training_text(1)[0]
    for tokenizer in (build_tokenizer("GPT2BPETokenizer", None, files), load(tmp_path)):
        assert tokenizer.slow_because is None
        assert tokenizer.encode(text) == load(folder / "gpt2.json").encode(text)
        assert tokenizer.eod == 0
        tokenizer.save(tmp_path / "saved")
        assert Tokenizer.from_dir(tmp_path / "saved").identity() == tokenizer.identity()
    with pytest.raises(UserError, match="both --vocab-file"):
        build_tokenizer("GPT2BPETokenizer", None, {"vocab_file": files["vocab_file"]})
    (tmp_path / "merges.txt").write_text("#version\na b c\n")
    with pytest.raises(UserError, match=r"merges\.txt, line 2: 'a b c' is no merge"):
        build_tokenizer("GPT2BPETokenizer", None, files)


def test_a_saved_tokenizer_moves(folder, tmp_path):
    tokenizer = load(folder / "qwen.json")
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    again = Tokenizer.from_dir(tmp_path / "b")
    assert again.identity() == tokenizer.identity()
    assert again.encode("e\u0301té") == tokenizer.encode("été")


def test_bytes_cut_inside_a_character(folder):
    tokenizer = load(folder / "gpt2.json")
    ids = tokenizer.encode("🙂")
    assert tokenizer.decode_bytes(ids[:2]) == "🙂".encode()[:2]
    assert tokenizer.decode([*ids, 10**6]) == "🙂\ufffd"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_file_is_explained(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"cannot read .*nothing"):
        load(tmp_path / "nothing")


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    """A SentencePiece model with the settings of LLaMA's."""
    prefix = tmp_path_factory.mktemp("pieces") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in training_text() for line in text.split("\n") if line.strip()),
        model_prefix=str(prefix),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return Path(f"{prefix}.model")


def test_sentencepiece_ids_are_those_of_the_library(piece_model):
    reference = sentencepiece.SentencePieceProcessor(str(piece_model))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(piece_model.parent))
    assert build_tokenizer("Llama2Tokenizer", str(piece_model)).identity() == tokenizer.identity()
    assert (tokenizer.type, tokenizer.bos, tokenizer.eod, tokenizer.vocab_size) == ("SentencePieceTokenizer", 1, 2, 420)

    @settings(max_examples=100, deadline=None)
    @given(any_texts)
    def check(texts):
        clean = [text.replace("\ud800", "\ufffd") for text in texts]
        tokens, lengths = tokenizer.encode_documents(texts, append_eod=True)
        expected = [[*reference.encode(text), 2] if text else [] for text in clean]
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.tolist() == [i for ids in expected for i in ids]
        for text in clean:
            assert not text or tokenizer.decode(tokenizer.encode(text)) == " " + text.replace("\u2581", " ")

    check()


def test_sentencepiece_is_saved_and_its_mistakes_explained(piece_model, tmp_path):
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(piece_model))
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_dir(tmp_path / "saved").identity() == tokenizer.identity()
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.decode([1, 2, 10**6]) == "\ufffd"
    for arguments, message in [
        ((str(tmp_path / "none.model"),), "cannot read the SentencePiece model"),
        ((__file__,), "no SentencePiece model"),
        ((str(piece_model), {"eod_token": "<nothing>"}), "no piece that ends documents"),
    ]:
        with pytest.raises(UserError, match=message):
            build_tokenizer("SentencePieceTokenizer", *arguments)
    with pytest.raises(UserError, match="leave out --allow-special"):
        tokenizer.encode_documents(["a"], allow_special=True)
