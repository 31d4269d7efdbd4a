"""Loss by position against the plain forward, bin by bin; which documents are read."""

import json
import math

import numpy as np
import pytest
import torch

from megayoco.config.evaluation import PerplexityOptions
from megayoco.data.indexed_writer import IndexedWriter
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError
from megayoco.evaluate.documents import long_documents
from megayoco.evaluate.perplexity import bin_edges, is_repeated_pair, run
from megayoco.evaluate.subject import Subject
from megayoco.model.inference import InferenceModel
from tests.generate.models import MODELS, build

BYTES = ByteTokenizer()
TEXTS = [
    "short",
    "to be or not to be, that is the question; " * 3,
    "another short one",
    "the sun also rises, and the sun goes down. " * 3,
    "x" * 100,
]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return str(path)


def plain_losses(decoder, tokens):
    """-log p of every token but the first, by one call without a cache."""
    model = InferenceModel.of(decoder)
    logits, _ = model.advance(torch.tensor([tokens[:-1]]), model.empty_context(1), last_only=False)
    return torch.nn.functional.cross_entropy(logits[0].double(), torch.tensor(tokens[1:]), reduction="none").numpy()


@pytest.mark.parametrize("name", MODELS)
def test_bins_and_pairs_equal_those_of_the_plain_forward(name, texts, tmp_path):
    decoder = build(name, torch.float64)
    options = PerplexityOptions(text=texts, length=75, bin_width=20, prefill_chunk=13)
    summary = run(InferenceModel.of(decoder), BYTES, options, tmp_path / "out")
    documents = [[256, *text.encode()][:76] for text in (TEXTS[1], TEXTS[3], TEXTS[4])]
    losses = np.stack([plain_losses(decoder, tokens) for tokens in documents])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = [(begin, min(begin + 20, 75)) for begin in range(0, 75, 20)]
    assert [(row["first_position"] - 1, row["last_position"]) for row in results["table"]] == expected
    for row, (begin, end) in zip(results["table"], expected, strict=True):
        assert row["nll"] == pytest.approx(losses[:, begin:end].mean(), abs=2e-6)
        assert row["cumulative_nll"] == pytest.approx(losses[:, :end].mean(), abs=2e-6)
        assert row["tokens"] == 3 * (end - begin)
    hits = np.zeros_like(losses, bool)
    for row, tokens in enumerate(documents):
        for place in range(75):
            pair = tokens[place : place + 2]
            hits[row, place] = any(tokens[i : i + 2] == pair for i in range(place))
    assert summary["perplexity/nll"] == pytest.approx(losses.mean(), abs=2e-6)
    assert summary["perplexity/perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert summary["perplexity/ar-hit"] == pytest.approx(losses[hits].mean(), abs=2e-6)
    assert summary["perplexity/first-occurrence"] == pytest.approx(losses[~hits].mean(), abs=2e-6)
    assert summary["perplexity/nll-last-bin"] == results["table"][-1]["nll"]
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_context_ablation_scores_the_same_tokens_with_less_before_them(texts):
    decoder = build("retention", torch.float64)
    options = PerplexityOptions(text=texts, length=90, documents=2, contexts=[8, 40], ablation_tokens=30)
    summary = run(InferenceModel.of(decoder), BYTES, options)
    documents = [[256, *text.encode()][:91] for text in (TEXTS[1], TEXTS[3])]
    for context in (8, 40, 61):
        parts = [tokens[-30 - context :] for tokens in documents]
        expected = np.mean([plain_losses(decoder, part)[-30:].mean() for part in parts])
        assert summary[f"perplexity/context-{context}"] == pytest.approx(expected, abs=1e-5)
    assert len([name for name in summary if "context" in name]) == 3


def test_without_a_start_token_the_first_token_is_not_predicted(texts):
    decoder = build("window", torch.float64)
    options = PerplexityOptions(text=texts, length=50, documents=1, start_token="none")
    summary = run(InferenceModel.of(decoder), BYTES, options)
    assert summary["perplexity/nll"] == pytest.approx(plain_losses(decoder, [*TEXTS[1].encode()][:51]).mean(), abs=2e-6)


def test_an_interrupted_evaluation_goes_on_where_it_was(texts, tmp_path, monkeypatch):
    from megayoco.evaluate import perplexity

    model = InferenceModel.of(build("retention"))
    options = PerplexityOptions(text=texts, length=60)
    expected = run(model, BYTES, options, tmp_path / "whole")
    measured, measure = [], perplexity.measure

    def interrupted(*arguments):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(perplexity, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, BYTES, options, tmp_path / "out")
    measured.clear()
    assert run(model, BYTES, options, tmp_path / "out") == expected
    assert len(measured) == 1
    with pytest.raises(UserError, match=r"options\.length is 60 there and 61 here"):
        run(model, BYTES, PerplexityOptions(text=texts, length=61), tmp_path / "out")


def test_documents_that_are_too_short_are_left_out_and_counted(texts, tmp_path, caplog):
    model = InferenceModel.of(build("retention"))
    run(model, BYTES, PerplexityOptions(text=texts, length=120), tmp_path / "a", subject=Subject(trained_length=100))
    notes = json.loads((tmp_path / "a" / "results.json").read_text())["notes"]
    assert (
        notes
        == caplog.messages
        == [
            "3 documents have fewer than 120 tokens and are left out",
            "2 documents are long enough, 16 were asked for",
            "120 tokens are read; the model was trained on sequences of up to 100",
        ]
    )
    with pytest.raises(
        UserError, match=r"none of its 5 documents has 1,000 tokens, the longest about 129\. Give a smaller"
    ):
        run(model, BYTES, PerplexityOptions(text=texts, length=1000))
    with pytest.raises(UserError, match="nothing tells the length"):
        run(model, BYTES, PerplexityOptions(text=texts))
    options = PerplexityOptions(text=texts, contexts=[80], ablation_tokens=30)
    with pytest.raises(UserError, match="--contexts 80 and --ablation-tokens 30 need 110 tokens, 100 are read"):
        run(model, BYTES, options, subject=Subject(trained_length=100))
    with pytest.raises(UserError, match="--text /nowhere/x: no such file"):
        run(model, BYTES, PerplexityOptions(text="/nowhere/x", length=9))


def write_dataset(prefix, documents, tokenizer):
    """Each document ends with the end-of-document token, as preparation with --append-eod writes it."""
    with IndexedWriter(str(prefix), 257) as writer:
        tokens, lengths = BYTES.encode_documents(documents, append_eod=True)
        writer.add(tokens.astype(np.uint16), lengths.astype(np.int32))
        writer.finish({"tokenizer": tokenizer.identity()})


def test_an_indexed_dataset_gives_what_its_texts_give(texts, tmp_path):
    model = InferenceModel.of(build("llama"))
    write_dataset(tmp_path / "set", TEXTS, BYTES)
    options = {"length": 60, "documents": 2}
    by_text = run(model, BYTES, PerplexityOptions(text=texts, **options))
    assert run(model, BYTES, PerplexityOptions(data=str(tmp_path / "set"), **options)) == by_text
    found = long_documents(BYTES, 100, 9, text=None, data=str(tmp_path / "set"), vocab_size=264)
    assert [BYTES.decode(tokens) for tokens in found.tokens] == [TEXTS[i][:100] for i in (1, 3, 4)]
    assert found.excluded == 2
    # the end of a document is a token of it
    assert long_documents(BYTES, 130, 9, text=None, data=str(tmp_path / "set"), vocab_size=264).tokens[0][-1] == 256


def test_a_dataset_of_another_tokenizer_is_refused(tmp_path):
    class Other(ByteTokenizer):
        def _fingerprint(self):
            return [b"another"]

    write_dataset(tmp_path / "set", TEXTS, Other())
    with pytest.raises(UserError, match="was made with another tokenizer than the model's"):
        run(InferenceModel.of(build("llama")), BYTES, PerplexityOptions(data=str(tmp_path / "set"), length=60))
    with pytest.raises(UserError, match=r"nothing\.idx does not exist"):
        run(InferenceModel.of(build("llama")), BYTES, PerplexityOptions(data=str(tmp_path / "nothing"), length=60))


def test_bin_edges():
    assert bin_edges(16, None) == [1, 2, 3, 4, 5, 7, 9, 12, 17]
    assert bin_edges(17, None) == [1, 2, 3, 4, 5, 7, 9, 12, 17, 18]
    assert bin_edges(1, None) == [1, 2]
    assert bin_edges(10, 4) == [1, 5, 9, 11]
    assert bin_edges(3, 100) == [1, 4]
    for length in range(1, 300):
        edges = bin_edges(length, None)
        assert edges[0] == 1 and edges[-1] == length + 1 and sorted(set(edges)) == edges


def test_repeated_pairs():
    #         pairs: 12 23 31 12 22 22 23
    assert is_repeated_pair(np.array([1, 2, 3, 1, 2, 2, 2, 3])).tolist() == [0, 0, 0, 1, 0, 1, 1]
