"""The schedule is a function of the step alone; every corner of it is checked against numbers written out by hand."""

import pytest

from megayoco.config import CrossBatchConfig, DataConfig, ModelConfig, PhaseConfig, PhaseDataConfig, RunConfig
from megayoco.train.phases import Timeline, learning_rate, phase_notes


def phase(**values):
    length = {} if "tokens" in values else {"steps": 8}
    return PhaseConfig(**{"sequence_length": 8, "batch_size": 4, "learning_rate": 1.0, **length, **values})


def rates(config):
    return [round(learning_rate(config, step), 4) for step in range(config.num_steps)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (dict(schedule="constant"), [1.0] * 8),
        (dict(schedule="constant", warmup_steps=3), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (dict(schedule="linear"), [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (dict(schedule="linear", warmup_steps=4, min_learning_rate=0.2), [0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4]),
        (dict(schedule="cosine", warmup_steps=4), [0.2, 0.4, 0.6, 0.8, 1, 0.8536, 0.5, 0.1464]),
        (dict(schedule="wsd", warmup_steps=1, decay_steps=4), [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        (dict(schedule="wsd", warmup_tokens=33, decay_tokens=33, steps=5), [0.3333, 0.6667, 1, 1, 0.5]),
        (dict(schedule="cosine", warmup_steps=99), [round((s + 1) / 100, 4) for s in range(8)]),
    ],
)
def test_learning_rates(values, expected):
    assert rates(phase(**values)) == pytest.approx(expected)


def test_phases_are_laid_end_to_end():
    timeline = Timeline([phase(steps=3), phase(tokens=65, batch_size=2, sequence_length=16), phase(steps=1)])
    assert timeline.total_steps == 3 + 3 + 1
    assert timeline.total_tokens == 3 * 32 + 3 * 32 + 32
    places = [timeline.position(step) for step in range(8)]
    assert [p.phase for p in places] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [p.phase_step for p in places] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [p.consumed_samples for p in places] == [0, 4, 8, 0, 2, 4, 12, 16]
    assert [p.tokens for p in places] == [32 * step for step in range(8)]
    assert [timeline.is_end_of_phase(step) for step in range(8)] == [False] * 3 + [True, False, False, True, True]
    with pytest.raises(ValueError, match="outside"):
        timeline.position(8)


def test_phases_that_read_the_same_samples_go_on_where_the_last_one_ended():
    phases = [phase(steps=3), phase(steps=2, batch_size=2), phase(steps=1, sequence_length=16), phase(steps=2)]
    timeline = Timeline(phases, ["books", "books", "books", "code"])
    first = [timeline.position(step).consumed_samples for step in (0, 3, 5, 6)]
    assert first == [0, 12, 0, 0]  # another length or other data begins anew
    assert [timeline.samples_until_end(number) for number in range(4)] == [12, 16, 4, 8]


@pytest.mark.parametrize(
    ("own", "goes_on"),
    [
        (None, True),
        ({"train": "books"}, True),
        ({"document_mask": True}, True),
        ({"train": "code"}, False),
        ({"temperature": 2.0}, False),
        ({"long_document_weight": 3.0}, False),
        ({"split": "90,10,0"}, False),
        ({"valid": "v"}, False),  # then the split no longer cuts the training data
        ({"valid": "v", "split": "90,10,0"}, False),
    ],
)
def test_a_phase_goes_on_in_the_samples_if_nothing_that_orders_them_differs(own, goes_on):
    data = None if own is None else PhaseDataConfig(**own)
    run = RunConfig(
        model=ModelConfig(pattern="llama", dim=16, layers=2, hidden_dim=32, heads=2, vocab_size=64),
        data=DataConfig(train="books"),
        phases=[phase(steps=3), phase(steps=2, data=data)],
        output_dir="out",
    )
    assert Timeline.of(run).position(3).consumed_samples == (12 if goes_on else 0)


def test_unusual_courses_of_length_and_rotary_base_are_told():
    def notes(*phases, **model):
        shape = dict(dim=32, layers=2, hidden_dim=64, heads=2, vocab_size=64) | model
        phases = [phase(sequence_length=length, rope_theta=theta) for length, theta in phases]
        return phase_notes(
            RunConfig(model=ModelConfig(**shape), data=DataConfig(train="x"), phases=phases, output_dir="x")
        )

    assert notes((64, None), (128, 5e4)) == []
    assert notes((128, None), (64, None)) == ["phase 1: 64 tokens, after a phase of 128; the context shrinks"]
    assert notes((64, None), (64, 5e4)) == ["phase 1: rope_theta changes from 10000 to 50000 at the same length"]
    assert notes((64, 5e4), (128, None)) == ["phase 1: rope_theta falls from 50000 to 10000 while the context grows"]
    first = phase_notes(
        RunConfig(
            model=ModelConfig(dim=32, layers=2, hidden_dim=64, heads=2, vocab_size=64),
            data=DataConfig(train="x"),
            phases=[phase(optimizer_state="reset")],
            output_dir="x",
        )
    )
    assert first == ["phase 0: optimizer_state reset means nothing in the first phase"]
    window = notes((64, None), self_mixer="window", window=64)
    assert window == ["phase 0: the window of 64 tokens covers sequences of 64"]
    memory = notes((64, None), (128, 5e4), memory_layers=(0,), memory_window=64)
    assert len(memory) == 1 and "phase 0: the memory window of 64 tokens covers sequences of 64" in memory[0]


def test_cross_batch_without_other_samples_is_told():
    def notes(**options):
        model = dict(dim=32, layers=2, hidden_dim=64, heads=2, vocab_size=64, memory_layers=(0,), memory_window=32)
        return phase_notes(
            RunConfig(model=ModelConfig(**model), data=DataConfig(train="x"), phases=[phase(**options)], output_dir="x")
        )

    alone = dict(sequence_length=64, cross_batch=CrossBatchConfig(range=3))
    told = ["phase 0: cross_batch finds no other sample in a micro_batch_size of 1; there are no distractors"]
    assert notes(**alone) == told
    assert notes(**alone, batch_size=2, micro_batch_size=2) == []
    assert notes(**alone | {"cross_batch": CrossBatchConfig(range=3, negatives="neighbour")}) == []
