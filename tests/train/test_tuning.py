"""A run that trains with distractors on streams of documents and is then tuned on instructions and conversations: from
its command line, to the end and from its middle on."""

import json
import shutil

import numpy as np
import pytest
import yaml

from megayoco.config import load_config
from megayoco.data.indexed_writer import IndexedWriter
from megayoco.data.tokenizer import build_tokenizer
from megayoco.errors import UserError
from tests.train.test_train import go_back, metrics, quick_measurement, quick_starts, train  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents, instructions and conversations."""
    folder = tmp_path_factory.mktemp("tuning")
    tokenizer = build_tokenizer("ByteTokenizer")
    with IndexedWriter(str(folder / "bytes"), tokenizer.vocab_size) as writer:
        for n in range(6):
            ids = np.array([*tokenizer.encode(f"Document {n} says {n}{n}. " * (n + 2)), tokenizer.eod], writer.dtype)
            writer.add(ids, np.array([len(ids)]))
        writer.finish({"tokenizer": {**tokenizer.identity(), "eod": tokenizer.eod, "model": None}})
    questions = [{"question": f"Say {n}", "response": f"{n} is said."} for n in range(12)]
    talks = [{"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "Yes!"}]} for n in "abc"]
    for name, records in (("questions", questions), ("talks", talks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    chat = {"initial_prompt": "Chat."}
    tuning = {
        "sources": [
            {"files": str(folder / "questions.jsonl"), "weight": 0.8, "instructions": {}},
            {"files": str(folder / "talks.jsonl"), "weight": 0.2, "chat": chat},
        ],
        "valid": [{"files": str(folder / "talks.jsonl"), "chat": chat}],
    }
    model = dict(pattern="llama", dim=32, layers=2, hidden_dim=64, heads=2, vocab_size=264)
    common = dict(steps=4, batch_size=4, micro_batch_size=2, learning_rate=1e-2)
    values = {
        "model": {**model, "memory_layers": [1], "memory_window": 16},
        "data": {"train": str(folder / "bytes"), "split": "1,0,0", "pipeline": "doc_aware"},
        "phases": [
            {**common, "sequence_length": 32, "cross_batch": {"range": 2}},
            {**common, "name": "tune", "sequence_length": 64, "data": {"tuning": tuning}},
        ],
        "logging": {"interval": 100, "tensorboard": False},
        "checkpoint": {"interval": 3, "export": "never"},
        "output_dir": "not-used",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_is_tuned_and_goes_on_exactly(train, folder, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    result = train(output)
    assert result.code == 0, result.err
    assert "phase tune: 80 % of the samples from" in result.out
    assert "questions.jsonl: 12 examples of" in result.out and "talks.jsonl: 3 examples of" in result.out
    rows = metrics(output)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 8 and losses[7] < losses[4] - 0.2
    assert [row["phase"] for row in rows if "validation_loss" in row] == ["tune"]
    again = tmp_path / "again"
    shutil.copytree(output, again)
    for step in (6, 3):  # in the middle of each phase
        go_back(again, step)
        result = train(again, "--resume")
        assert f"resumed at step {step}" in result.out, result.err
        assert metrics(again) == rows
    go_back(again, 6)
    changed = folder / "talks.jsonl"
    before = changed.read_text()
    try:
        changed.write_text(before.replace("Yes!", "Nay!"))
        result = train(again, "--resume")
    finally:
        changed.write_text(before)
    assert result.code == 2 and "gives other examples to phase 1 than when the run began" in result.err


def test_samples_are_shown_as_they_are_trained_on(config, tmp_path, capsys):
    from tools.inspect_samples import main

    main(["--config", str(config), "--phase", "1", "--samples", "3", f"output_dir={tmp_path}"])
    text = capsys.readouterr().out
    assert text.count("sample ") == 3 and text.count("-- window 3 --") == 3
    assert "learned: 'Yes!" in text or " is said." in text
    main(["--config", str(config), "--samples", "24", f"output_dir={tmp_path}"])
    shown = capsys.readouterr().out
    assert "sample 4 (batch 1, row 0): 32 tokens, 32 learned" in shown and "document, learned: 'Document" in shown
    with pytest.raises(UserError, match="--phase 2: the run has the phases 0 to 1"):
        main(["--config", str(config), "--phase", "2"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["phases.1.cross_batch={range: 1}"], "phases.1.cross_batch mixes samples, and those of data.tuning"),
        (["phases.1.data.train=bytes"], "phases.1.data.tuning and train both say what is trained on"),
        (["phases.1.data.document_mask=true"], "phases.1.data.document_mask is about documents"),
        (["data.train=null"], "data.train is required, unless data.tuning gives examples"),
        (["phases.1.data.tuning.sources=[]"], "phases.1.data.tuning.sources must have at least 1 entry"),
        (["phases.1.data.tuning.sources.0.chat={}"], "tuning.sources.0.instructions or chat says what the records are"),
        (
            ["phases.1.data.tuning.sources.0.weight=null"],
            "phases.1.data.tuning.sources must all have a weight, or none",
        ),
        (["phases.1.data.tuning.sources.0.instructions.question=q"], "Did you mean phases.1.data.tuning.sources.0"),
        (["phases.1.data.tuning.sources.0.filters=[{path: a}]"], "filters.0.matches or another condition is needed"),
        (
            ["phases.1.data.tuning.sources.0.filters=[{path: [a, '*'], matches: b}]"],
            "filters.0.over says how the texts behind a * in path count",
        ),
        (["phases.1.data.tuning.sources.0.filters=[{path: a, matches: '('}]"], "is no regular expression"),
        (
            ["phases.1.data.tuning.sources.1.chat.replacements=[{pattern: a, replacement: '\\1'}]"],
            "does not fit pattern",
        ),
        (["data.pipeline=doc"], "data.pipeline must be one of 'shuffled', 'linear' or 'doc_aware'"),
        (["parallel.sequence=2"], "parallel.sequence 2 cannot hide the padding of data.tuning"),
    ],
)
def test_what_cannot_be_is_refused_with_the_config(config, overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(config, overrides)
    assert message in str(caught.value)


def test_a_run_on_examples_alone_needs_a_tokenizer(train, folder, tmp_path):  # noqa: F811
    source = f"{{files: {folder}/questions.jsonl, instructions: {{}}}}"
    alone = (
        "data={tokenizer_type: null}", f"data.tuning={{sources: [{source}]}}", "phases.0.cross_batch=null",
        "phases.0.steps=1", "phases.1.steps=1", "phases.0.sequence_length=64",
    )  # fmt: skip
    result = train(tmp_path / "out", *alone)
    assert result.code == 2 and "Set data.tokenizer_type and data.tokenizer_model" in result.err
    assert not (tmp_path / "out" / "config.yaml").exists()
    result = train(tmp_path / "out", *alone, "data.tokenizer_type=ByteTokenizer", "data.tuning.random_padding=false")
    assert result.code == 0, result.err
