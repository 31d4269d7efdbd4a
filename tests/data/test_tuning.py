"""Examples for instruction and chat tuning, token for token against LongLLaMA's rules written out once more; and the
samples made of them."""

import gzip
import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megayoco.config import DataConfig
from megayoco.config.tuning import ChatFields, FilterRule, InstructionFields, Replacement, TuningConfig, TuningSource
from megayoco.data.batches import IGNORE, Batches, ValidationBatches, collate
from megayoco.data.datasets import build_datasets
from megayoco.data.order import drawn
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.data.tuning_cache import open_examples
from megayoco.errors import UserError

BOS, EOS, PIECE = 257, 256, 258


class Pieces(ByteTokenizer):
    """Bytes behind a mark at the beginning of each text, as SentencePiece puts a blank there: so the ids say what was
    tokenised alone. With a beginning of text."""

    vocab_size, bos = 259, BOS

    def _encode_batch(self, texts, allow_special):
        parts = [np.array([PIECE, *text.encode()], np.uint16) for text in texts]
        return np.concatenate(parts), np.array([len(part) for part in parts], np.int64)


def enc(text):
    return [PIECE, *text.encode()]


def instruction(record, f, length):
    """(tokens, labels) by the rules of the specification; no padding."""
    text = "" if f.prompt_field is None else f.pre_prompt + record[f.prompt_field] + f.post_prompt
    x = [BOS, *enc(text + f.pre_question + record[f.question_field] + f.post_question)]
    y = [*enc(f.pre_response + record[f.response_field] + f.post_response), EOS]
    x, y = x[: f.max_input_length or length], y[: f.max_output_length or length]
    return (x + y)[:length], ([-100] * len(x) + y)[:length]


def conversation(record, f, length):
    tokens, labels = [BOS, *enc(f.initial_prompt)], []
    labels += [-100] * len(tokens)
    for turn in record[f.conversations_field]:
        by_model = turn[f.role_field] == f.model_role
        prefix, text = enc(f.model_prefix if by_model else f.human_prefix), enc(turn[f.text_field])
        text += [EOS] if by_model else []
        tokens += prefix + text
        labels += [-100] * len(prefix) + (text if by_model else [-100] * len(text))
    return tokens[:length], labels[:length]


QUESTIONS = [
    {"system": "Be brief.", "question": f"What is {i}?" * (i % 5 + 1), "response": "It is " + "so " * (i % 7) + f"{i}."}
    for i in range(23)
]
TALKS = [
    {
        "conversations": [
            turn
            for j in range(i % 3 + 1)
            for turn in ({"from": "human", "value": f"Tell {i}.{j}"}, {"from": "gpt", "value": "Told." * (j + 1)})
        ]
    }
    for i in range(11)
]


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def questions(tmp_path, records=QUESTIONS, **kwargs):
    return TuningSource(files=lines(tmp_path / "questions.jsonl", records), instructions=InstructionFields(), **kwargs)


def talks(tmp_path, records=TALKS, **kwargs):
    return TuningSource(files=lines(tmp_path / "talks.jsonl", records), chat=ChatFields(), **kwargs)


def examples(source, length=512, tokenizer=None, **kwargs):
    """All (tokens, labels) of a source."""
    found = open_examples(source, tokenizer or Pieces(), length, **kwargs)
    pairs = [found[i] for i in range(len(found))]
    return [(ids.tolist(), np.where(labelled, ids, -100).tolist()) for ids, labelled in pairs]


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 512),
        ({"prompt_field": "system"}, 512),
        ({"prompt_field": "system", "pre_prompt": "<", "post_prompt": ">", "pre_question": "Q ", "post_question": " ?",
          "pre_response": "A ", "post_response": "\n"}, 512),
        ({"prompt_field": "system", "max_input_length": 12, "max_output_length": 9}, 512),
        ({"prompt_field": "system"}, 40),
    ],
)  # fmt: skip
def test_instructions_equal_the_rules(tmp_path, fields, length):
    source = replace(questions(tmp_path), instructions=InstructionFields(**fields))
    expected = [instruction(record, source.instructions, length) for record in QUESTIONS]
    kept = [example for example in expected if any(label != -100 for label in example[1])]
    assert examples(source, length) == kept
    if length == 40:
        assert 0 < len(kept) < len(QUESTIONS)


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 512),
        ({"initial_prompt": "Chat.", "human_prefix": "U:", "model_prefix": "A:", "model_role": "human"}, 512),
        ({}, 70),
    ],
)
def test_conversations_equal_the_rules(tmp_path, fields, length):
    source = replace(talks(tmp_path), chat=ChatFields(**fields))
    expected = [conversation(record, source.chat, length) for record in TALKS]
    assert examples(source, length) == [one for one in expected if any(label != -100 for label in one[1])]


def test_texts_of_turns_are_replaced(tmp_path):
    rules = [Replacement(pattern="T.ll", replacement="Say"), Replacement(pattern=r"(\d)\.", replacement=r"\1-")]
    source = replace(talks(tmp_path), chat=ChatFields(replacements=rules))
    turns = [{**t, "value": t["value"].replace("Tell", "Say").replace("2.0", "2-0")} for t in TALKS[2]["conversations"]]
    turns[2]["value"], turns[4]["value"] = "Say 2-1", "Say 2-2"
    assert examples(source)[2] == conversation({"conversations": turns}, ChatFields(), 512)


def naive_filter(record):
    """Of the four rules below."""
    values = [turn["value"] for turn in record["conversations"]]
    return all("9" not in v for v in values) and len(values[-1]) < 15 and sum(len(enc(v)) for v in values) > 15


def test_filters_leave_records_out(tmp_path):
    every = ["conversations", "*", "value"]
    rules = [
        FilterRule(path=every, over="all", matches="(?!.*9)"),
        FilterRule(path=["conversations", -1, "value"], characters_below=15),
        FilterRule(path=every, over="sum", tokens_above=15),
    ]
    source = talks(tmp_path, filters=rules)
    kept = [record for record in TALKS if naive_filter(record)]
    assert 0 < len(kept) < len(TALKS) - 2
    assert examples(source) == [conversation(record, source.chat, 512) for record in kept]
    counts = open_examples(source, Pieces(), 512).counts
    assert (counts.records, counts.left_out) == (len(TALKS), len(TALKS) - len(kept))


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (dict(path="question", matches="What is 1"), "1 10 11 12 13 14 15 16 17 18 19"),
        (dict(path="question", matches="is 1"), ""),
        (dict(path=["question"], matches=".*\\?What.*22"), "22"),
        (dict(path="question", characters_below=11), "0 5"),
        (dict(path="question", characters_above=10, ), "1 2 3 4 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22"),
        (dict(path="question", tokens_below=12), "0 5"),
        (dict(path="question", tokens_above=52), "14 19"),
        (dict(path=["list", "*"], over="any", matches="b"), "3"),
        (dict(path=["list", "*"], over="any", characters_above=1), "3 4"),
        (dict(path=["list", 1], matches="b"), "3"),
    ],
)  # fmt: skip
def test_each_rule_of_filters(tmp_path, rule, kept):
    records = [{**record, "list": []} for record in QUESTIONS]
    records[3]["list"], records[4]["list"] = ["a", "bb"], ["ccc"]
    source = questions(
        tmp_path, [{**r, "response": str(i)} for i, r in enumerate(records)], filters=[FilterRule(**rule)]
    )
    if not kept:
        with pytest.raises(UserError, match=r"none of the 23 records .* filters leave out 23, and 0 have no answer"):
            examples(source)
    else:
        found = [bytes(label for label in labels if 0 <= label < 256).decode() for _, labels in examples(source)]
        assert " ".join(found) == kept


def test_every_format_gives_the_same_examples(tmp_path):
    source = talks(tmp_path)
    expected = examples(source)
    packed, listed, table = (tmp_path / name for name in ("talks.jsonl.gz", "list.json", "talks.parquet"))
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"\n".join(json.dumps(r).encode() for r in TALKS)))
    listed.write_text(json.dumps(TALKS, indent=1))
    pq.write_table(pa.Table.from_pylist(TALKS), table, row_group_size=4)
    for path in (packed, listed, table):
        assert examples(replace(source, files=str(path))) == expected
    assert examples(replace(source, files=[str(table), str(listed)])) == expected * 2


def test_workers_make_the_same_examples(tmp_path, monkeypatch):
    monkeypatch.setattr("megayoco.data.tuning_records.PIECE_BYTES", 400)
    source = questions(tmp_path)
    one, two = (
        open_examples(source, ByteTokenizer(), 512, cache_dir=tmp_path / str(workers), workers=workers)
        for workers in (1, 2)
    )
    assert (one.content, one.counts) == (two.content, two.counts)
    assert len(one) == 23
    broken = questions(tmp_path, [*QUESTIONS, {"question": "?", "response": ""}])
    with pytest.raises(UserError, match=r"questions\.jsonl, line 24: the response"):
        open_examples(broken, ByteTokenizer(), 512, cache_dir=tmp_path / "2", workers=2)


def test_examples_are_made_once_and_anew_for_other_records(tmp_path, monkeypatch):
    source = questions(tmp_path)
    first = examples(source)
    with monkeypatch.context() as patch:
        patch.setattr("megayoco.data.tuning_cache.read_pieces", None)  # nothing is read again
        assert examples(source) == first
    stamp = (tmp_path / "questions.jsonl").stat()
    changed = questions(tmp_path, [{**r, "response": r["response"].replace("It", "So")} for r in QUESTIONS])
    os.utime(tmp_path / "questions.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = examples(changed)
    assert after != first and len(after) == len(first)
    for folder in (tmp_path / ".megayoco-cache").glob("examples-*"):
        (folder / "ends.npy").write_bytes(b"damaged")
    assert examples(changed) == after


def build(sources, *, length=64, seed=3, valid=(), data=None, **kwargs):
    tuning = TuningConfig(sources=list(sources), valid=list(valid), **kwargs)
    return build_datasets(
        DataConfig(tuning=tuning, **(data or {})), sequence_length=length, seed=seed, vocab_size=260, tokenizer=Pieces()
    )


def unpadded(sample, length):
    """Tokens and labels of the example, after checking what fills the sample up."""
    p, (targets,) = sample["padding"], collate([sample], document_mask=False).targets.tolist()
    tokens = sample["tokens"].tolist()
    assert len(tokens) == length + 1 and not any(tokens[:p]) and (p == 0 or tokens[p] == BOS)
    end = max(i for i, token in enumerate(tokens) if token) + 1
    labels = [-100, *targets]  # of tokens[i]; each target is the token after its place
    assert all(label in (-100, token) for label, token in zip(labels, tokens, strict=True))
    assert set(labels[:p] + labels[end:]) <= {-100}
    return tokens[p:end], labels[p:end]


def test_a_sample_is_an_example_padded_at_random_on_both_sides(tmp_path):
    source, N = talks(tmp_path), 300
    train = build([source], length=N).train
    expected = [conversation(record, source.chat, N) for record in TALKS]
    paddings = []
    for epoch in range(40):
        found = []
        for n in range(epoch * 11, epoch * 11 + 11):
            example = unpadded(train[n], N)
            found.append(expected.index(example))
            paddings.append(train[n]["padding"] / (N - len(example[0])))
        assert sorted(found) == list(range(11))  # each once per round
    assert 0.45 < np.mean(paddings) < 0.55 and min(paddings) < 0.02 and max(paddings) > 0.98
    assert 0.26 < np.std(paddings) < 0.32  # uniform: 0.289
    plain = build([source], length=N, random_padding=False).train
    assert {plain[n]["padding"] for n in range(30)} == {0}
    assert [unpadded(plain[n], N) for n in range(30)] == [unpadded(train[n], N) for n in range(30)]


def test_samples_are_a_function_of_seed_and_number(tmp_path):
    sources = [questions(tmp_path, weight=0.7), talks(tmp_path, weight=0.3)]
    train = build(sources).train
    expected = [str(train[n]) for n in range(60)]
    assert [str(build(sources).train[n]) for n in reversed(range(60))] == expected[::-1]
    assert [str(build(sources, seed=4).train[n]) for n in range(60)] != expected


def test_sources_are_mixed_by_drawing_one_for_each_number(tmp_path):
    train = build([questions(tmp_path, weight=3), talks(tmp_path, weight=1)]).train
    drawn_sources = [train.source_of(n) for n in range(4000)]
    assert Counter(drawn_sources)[1] / 4000 == pytest.approx(0.25, abs=0.02)
    sizes = [23, 11]
    for source, size in enumerate(sizes):
        for round_ in range(20):  # item i mod E, in one order per round
            numbers = [n for n in range(round_ * size, (round_ + 1) * size) if drawn_sources[n] == source]
            assert len({train.example_of(n) for n in numbers}) == len(numbers)
    even = build([questions(tmp_path), talks(tmp_path)])
    assert [round(share.share, 6) for share in even.shares] == [round(23 / 34, 6), round(11 / 34, 6)]


def test_batches_are_the_same_on_any_ranks_and_after_a_stop(tmp_path):
    sources = [questions(tmp_path, weight=0.7), talks(tmp_path, weight=0.3)]

    def batches(rank, size, consumed):
        return Batches(
            build(sources).train, batch_size=4, micro_batch_size=2, data_rank=rank, data_size=size,
            consumed_samples=consumed, prefetch=0,
        )  # fmt: skip

    whole = batches(0, 1, 0)
    steps = [whole.next_step() for _ in range(6)]
    again = [batches(rank, 2, 12) for rank in range(2)]
    for step in steps[3:]:
        parts = [again[0].next_step()[0], again[1].next_step()[0]]
        for micro, part in zip(step, parts, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(micro, part, strict=True) if a is not None)


def test_collate_makes_padding_a_document_of_its_own(tmp_path):
    train = build([questions(tmp_path)]).train
    samples = [train[n] for n in range(4)]
    micro = collate(samples, document_mask=False)
    for sample, starts in zip(samples, micro.document_starts.tolist(), strict=True):
        assert starts == [0 if i < sample["padding"] else sample["padding"] for i in range(64)]
    assert collate([{**s, "padding": 0} for s in samples], document_mask=False).document_starts is None
    assert (micro.targets == IGNORE).any(1).all() and (micro.targets != IGNORE).any(1).all()


def test_validation_takes_every_example_once(tmp_path):
    source, other = talks(tmp_path), questions(tmp_path)
    built = build([other], valid=[source, replace(other, filters=[FilterRule(path="question", characters_below=11)])])
    assert built.valid.num_samples == 13
    found = Counter(str(unpadded(built.valid[n], 64)) for n in range(13))
    expected = [conversation(r, source.chat, 64) for r in TALKS]
    expected += [instruction(QUESTIONS[i], other.instructions, 64) for i in (0, 5)]
    assert found == Counter(map(str, expected))
    batches = ValidationBatches(built.valid, num_batches=9, batch_size=4, micro_batch_size=4, data_rank=0, data_size=1)
    labels = sum(int((micro.targets != IGNORE).sum()) for step in batches for micro in step)
    assert len(batches) == 4 and labels == sum(label != -100 for _, ls in expected for label in ls)
    assert build([other]).valid is None


def test_what_is_lost_is_counted_and_told(tmp_path):
    records = [*QUESTIONS, {"question": "long " * 30, "response": "Yes."}]
    source = questions(tmp_path, records, filters=[FilterRule(path="question", characters_above=10)])
    (note,) = build([source]).notes
    assert "questions.jsonl: 21 examples of " in note and "from 24 records; filters left out 2; " in note
    assert note.endswith("warning: 1 were dropped, because nothing of them would be learned")
    with pytest.raises(UserError, match=r"none of the 1 records .* and 1 have no answer within the limits"):
        build([questions(tmp_path, records[-1:])])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"question": "?"}', "line 2: no field 'response', only 'question'. Name the right one by"),
        ('{"question": null, "response": "a"}', "line 2: the value of 'question' is null, not text"),
        ('{"question": "?", "response": " "}', "line 2: the response .'response'. is empty"),
        ('{"question": "?", "resp', "line 2: not JSON"),
        ('["?", "a"]', "line 2: expected a JSON object, got list"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path, record, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + record + "\n")
    with pytest.raises(UserError, match=rf"broken\.jsonl, {message}"):
        examples(TuningSource(files=str(path), instructions=InstructionFields()))


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ({"talk": []}, "no field 'conversations', only 'talk'. Name the list of turns by chat.conversations_field"),
        ({"conversations": "hi"}, "'conversations' is no list"),
        ({"conversations": ["hi"]}, "turn 1: expected an object with fields, got str"),
        ({"conversations": [{"from": "gpt"}]}, "turn 1: no field 'value', only 'from'"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "turn 1: the answer .'value'. is empty"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named(tmp_path, talk, message):
    with pytest.raises(UserError, match=rf"talks\.jsonl, line 1(: |, ){message}"):
        examples(talks(tmp_path, [talk]))


def test_a_conversation_of_which_nothing_is_left_to_learn_is_named(tmp_path):
    path = lines(tmp_path / "talks.jsonl", [{"conversations": [{"from": "gpt", "value": "As an AI"}]}])
    fields = ChatFields(replacements=[Replacement(pattern="As an AI", replacement="")])
    with pytest.raises(
        UserError, match=r"line 1, turn 1: nothing of the answer .'value'. is left by chat.replacements"
    ):
        examples(TuningSource(files=path, chat=fields))
    lines(tmp_path / "talks.jsonl", [{"conversations": [{"from": "assistant", "value": "a"}]}])
    with pytest.raises(UserError, match=r"those whose 'from' is 'gpt' .chat\.model_role."):
        examples(TuningSource(files=path, chat=ChatFields()))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("quest", "no field 'quest' for the filter of quest, only 'system', 'question', 'response'"),
        (["question", "*"], "a filter wants a list at question, there is str"),
        (["question", 0], "a filter wants a list at question, there is str"),
    ],
)
def test_a_filter_that_leads_nowhere_is_named(tmp_path, path, message):
    rule = FilterRule(path=path, over="all" if "*" in path else None, matches="a")
    with pytest.raises(UserError, match=rf"questions\.jsonl, line 1: {message}"):
        examples(questions(tmp_path, filters=[rule]))


def test_files_that_are_not_there_or_no_records_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.tuning: nowhere\.jsonl: no such file"):
        examples(TuningSource(files="nowhere.jsonl", chat=ChatFields()))
    (tmp_path / "plain.txt").write_text("words")
    with pytest.raises(UserError, match=r"plain\.txt is plain text, not records"):
        examples(TuningSource(files=str(tmp_path / "plain.txt"), chat=ChatFields()))
    pq.write_table(pa.Table.from_pylist(TALKS), tmp_path / "cut.parquet")
    content = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.parquet: the parquet data are damaged after row 0"):
        examples(TuningSource(files=str(tmp_path / "cut.parquet"), chat=ChatFields()))


def test_keyed_numbers_are_spread_evenly():
    counts = Counter(drawn(7, "test", n) for n in range(7000))
    assert sorted(counts) == list(range(7)) and max(counts.values()) - min(counts.values()) < 200
    assert drawn(1, "test") == 0 and drawn(10**30, "a") != drawn(10**30, "b")
