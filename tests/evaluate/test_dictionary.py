"""Dictionary lookup: what documents hold, who gets which score, lengths in one table, every mistake in one line."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import torch

from megayoco.config.evaluation import DictionaryOptions
from megayoco.data.command import run_command
from megayoco.data.tokenizer import ByteTokenizer, TiktokenTokenizer, write_rank_file
from megayoco.errors import UserError
from megayoco.evaluate.dictionary import Shape, dictionary, run
from megayoco.model.inference import InferenceModel
from tests.evaluate.oracle import Oracle
from tests.generate.models import build

BYTES = ByteTokenizer()
ROOT = Path(__file__).parents[2]


class Reader(Oracle):
    """Knows the definitions among the last `reach` tokens, and which values are asked for."""

    def __init__(self, reach=10**9, **options):
        super().__init__(**options)
        self.reach = reach

    def losses(self, tokens, targets, context):
        greedy = []
        for token in tokens[0].tolist():
            context = self.absorb(torch.tensor([[token]]), context)
            text = bytes(context.layers[0][-self.reach :]).decode()
            asked = re.search(r"\?(\w+)=(\w*)\Z", text)
            value = asked and re.search(rf":{asked[1]}=(\w+)", text)
            greedy.append(ord(value[1][len(asked[2])]) if value and len(asked[2]) < len(value[1]) else 0)
        self.questions += 1
        hits = torch.tensor([greedy]) == targets
        return torch.zeros(targets.shape), hits, context


@pytest.mark.parametrize(("tokens", "questions", "key", "value"), [(512, 256, 3, 3), (100, 37, 4, 2), (64, 48, 1, 1)])
def test_a_document_defines_distinct_keys_and_asks_for_all_alike(tokens, questions, key, value):
    shape = Shape(key, value)
    text = dictionary(random.Random(3), tokens, questions, shape)
    assert len(text) == tokens and dictionary(random.Random(3), tokens, questions, shape) == text
    record = rf"(\w{{{key}}})=(\w{{{value}}})"
    defined = re.findall(f":{record}", text[: tokens - questions])
    asked = re.findall(rf"\?{record}", text[tokens - questions :])
    assert len(defined) == (tokens - questions) // shape.record and len(asked) == questions // shape.record
    assert len(dict(defined)) == len(defined) and set(asked) <= set(defined)
    counts = [asked.count(entry) for entry in defined]
    assert max(counts) - min(counts) <= 1
    assert not re.sub(rf"[:?]{record}", "", text).strip()


def test_few_keys_are_defined_again():
    text = dictionary(random.Random(3), 256, 128, Shape(3, 3), keys=5)
    defined, asked = (re.findall(rf"{mark}(\w{{3}})=(\w{{3}})", text) for mark in (":", r"\?"))
    assert len(defined) == len(asked) == 16 and len(set(defined)) == 5 and set(asked) == set(defined)
    assert {defined.count(entry) for entry in defined} == {3, 4}


def test_scores_are_of_what_a_model_can_see(tmp_path):
    options = DictionaryOptions(lengths=[128, 1024], question_tokens=64, trials=2, prefill_chunk=50)
    assert run(Reader(), BYTES, options) == {
        "dictionary/accuracy": 1.0,
        "dictionary/accuracy/128": 1.0,
        "dictionary/accuracy/1024": 1.0,
    }
    # only the last 128 tokens are seen: most of a short document, little of a long one
    summary = run(Reader(reach=128), BYTES, options, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["table"]
    assert [(row["length"], row["documents"], row["questions"]) for row in rows] == [(128, 2, 16), (1024, 2, 16)]
    assert rows[0]["accuracy"] > 0.5 > rows[1]["accuracy"] == summary["dictionary/accuracy/1024"] < 0.3
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), BYTES, options, tmp_path / "cut")
    again = Reader()
    assert run(again, BYTES, options, tmp_path / "cut")["dictionary/accuracy"] == 1.0
    assert len((tmp_path / "cut" / "samples.jsonl").read_text().splitlines()) == 4 and again.tokens_read < 3 * 1024


class Interrupted(Reader):
    def losses(self, tokens, targets, context):
        if self.questions == 3:
            raise KeyboardInterrupt
        return super().losses(tokens, targets, context)


def test_a_symbol_counts_if_it_is_the_most_likely_one():
    """A random model against its own plain forward."""
    options = DictionaryOptions(lengths=[96], question_tokens=40, trials=3, prefill_chunk=17, seed=5)
    decoder = build("longllama", torch.float64)
    model = InferenceModel.of(decoder)
    likely = []
    for trial in range(3):
        text = dictionary(random.Random(f"5/96/{trial}"), 96, 40, Shape(3, 3))
        tokens = torch.tensor([list(text.encode())])
        logits, _ = model.advance(tokens, model.empty_context(1), last_only=False)
        hits = logits[0, :-1].argmax(-1) == tokens[0, 1:]
        for begin in range(56, 96, 8):
            likely += hits[begin + 4 : begin + 7].tolist()
    table = []
    run(model, BYTES, options, progress=lambda done, total, text: table.append(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megayoco.evaluate.dictionary.table", lambda records: table.append(records) or [ROW])
        run(model, BYTES, options)
    assert sum(record["likely"] for record in table[-1]) == sum(likely)
    assert sum(record["symbols"] for record in table[-1]) == len(likely) == 45


ROW = {"length": 96, "accuracy": 0.0, "symbol_accuracy": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lengths=[60], question_tokens=56), "60 tokens with 56 of questions have no room"),
        (dict(lengths=[600], question_tokens=7), "600 tokens with 7 of questions have no room"),
        (dict(lengths=[600], question_tokens=64, key_tokens=1), "89 definitions need keys of more than 1 symbols"),
        (dict(lengths=[96, 600], question_tokens=64, key_tokens=1), "Give longer keys, or shorter lengths."),
        (dict(), "nothing tells the length that the model was trained for. Give --lengths."),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(Reader(), BYTES, DictionaryOptions(**options))


def test_a_tokenizer_that_joins_symbols_is_refused(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in b"abcdef" for j in range(48, 123)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    write_rank_file(tmp_path / "ranks", ranks, r"\w+|.", {"<|endoftext|>": len(tokens)})
    with pytest.raises(UserError, match="needs one that makes a token of each, such as ByteTokenizer"):
        run(Reader(), TiktokenTokenizer(str(tmp_path / "ranks")), DictionaryOptions(lengths=[512]))


def test_a_tokenizer_that_joins_one_rare_pair_is_refused_before_the_first_document(tmp_path):
    ranks = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), b"Q7"])}
    write_rank_file(tmp_path / "ranks", ranks, r"\w+|.", {"<|endoftext|>": len(ranks)})
    reader = Reader()
    with pytest.raises(UserError, match="needs one that makes a token of each"):
        run(reader, TiktokenTokenizer(str(tmp_path / "ranks")), DictionaryOptions(lengths=[32], question_tokens=16))
    assert reader.questions == 0


def test_the_tool_writes_documents_of_training(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("make_dictionary", ROOT / "tools" / "make_dictionary.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    output = tmp_path / "new" / "dictionary.jsonl"
    arguments = ["--output", str(output), "--documents", "5", "--tokens", "96", "--seed", "9"]
    assert run_command(tool.main, arguments) == 0
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert [len(text) for text in texts] == [96] * 5 and len(set(texts)) == 5
    assert all(text.count(":") == text.count("?") == 6 and text[48] == "?" for text in texts)
    few = [*arguments, "--overwrite", "--keys", "1", "3"]
    assert run_command(tool.main, few) == 0
    counts = {len(set(re.findall(r"\w{3}=", json.loads(line)["text"]))) for line in output.read_text().splitlines()}
    assert max(counts) <= 3 and len(counts) > 1
    assert run_command(tool.main, arguments) == 2
    assert "exists. Choose another --output, or give --overwrite" in capsys.readouterr().err
    for wrong in (["--tokens", "8"], ["--keys", "3", "2"]):
        assert run_command(tool.main, [*arguments, "--overwrite", *wrong]) == 2
    assert len(output.read_text().splitlines()) == 5 and [path.name for path in output.parent.iterdir()] == [
        output.name
    ]
