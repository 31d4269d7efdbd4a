"""The run's config: what is read, what is refused and with which words, and that a saved one is read back equal."""

import dataclasses
import json
import re

import pytest
from pydantic import ValidationError

from megayoco.config import (
    CrossBatchConfig,
    DataConfig,
    DataSource,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    load_config,
    model_config_from_dict,
    model_config_to_dict,
    save_config,
)
from megayoco.config.loader import _leaves, _section
from megayoco.errors import UserError

RUN = """\
model:
  preset: yoco-tiny
data:
  train: data/corpus
phases:
  - sequence_length: 256
    steps: 100
    batch_size: 8
    learning_rate: 1e-3
output_dir: runs/first
"""


@pytest.fixture
def run_yaml(tmp_path):
    def write(text=RUN):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def phase(**changes):
    return PhaseConfig(**{"sequence_length": 64, "steps": 10, "batch_size": 4, "learning_rate": 1e-3, **changes})


def test_overrides_reach_into_lists_and_absent_sections_and_apply_in_order(run_yaml):
    run = load_config(
        run_yaml(),
        [
            "parallel.tensor=2",
            "phases.0.steps=20",
            "phases.0.steps=30",
            "phases.0.data.train=[0.3, a, 0.7, b]",
            "seed=5",
        ],
    )
    assert (run.parallel.tensor, run.phases[0].steps, run.seed) == (2, 30, 5)
    assert run.phase_data(0).train == [0.3, "a", 0.7, "b"]
    assert run.data.train == "data/corpus"


def test_saved_config_is_read_back_equal_and_needs_no_preset(run_yaml, tmp_path):
    text = RUN + "optimizer: {eps: 1e-8, betas: [0.9, 0.98]}\nseed: 0\n"
    overrides = [
        "model.self_mixer=window",
        "data.train=[{prefix: a, weight: 1}, {prefix: b, weight: 2}]",
        "data.valid=[{prefix: a}]",
        "data.tokenizer_options={eod_token: x}",
        "phases.0.name='1e3'",
    ]
    run = load_config(run_yaml(text), overrides)
    saved = tmp_path / "config.yaml"
    save_config(run, saved)
    assert load_config(saved) == run
    assert run.phases[0].name == "1e3"
    assert "dim: 256" in saved.read_text()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_save_where_nothing_can_be_written_says_so(run_yaml, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        save_config(load_config(run_yaml()), tmp_path / "absent" / "config.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1", 1.0), ("2.", 2.0), ("1_000.5", 1000.5), ("010", 10.0), ("-.5e1", None), (".inf", None)],
)
def test_numbers_are_those_of_yaml_1_2(run_yaml, text, value):
    if value is None:
        assert "model.norm_eps must be" in refusal(run_yaml(), f"model.norm_eps={text}")
    else:
        assert load_config(run_yaml(), [f"model.norm_eps={text}"]).model.norm_eps == value


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2024-01-01", "'12'"])
def test_words_and_dates_stay_text(run_yaml, text):
    assert load_config(run_yaml(), [f"output_dir={text}"]).output_dir == text.strip("'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((" yoco-tiny", " yoco-tiny\n  windw: 5"), "line 3: unknown key model.windw. Did you mean model.window?"),
        (("steps: 100", "stps: 100"), "line 7: unknown key phases.0.stps. Did you mean phases.0.steps?"),
        (("output_dir", "min_learning_rate: 1\noutput_dir"), "Did you mean phases.0.min_learning_rate?"),
        (("preset: yoco-tiny", "dim: abc"), "line 2: model.dim must be an integer, got 'abc'."),
        (("steps: 100", "steps: 1e2"), "line 7: phases.0.steps must be an integer, got 100.0 (write 100)."),
        (("steps: 100", "steps: 0"), "line 7: phases.0.steps must be greater than 0, got 0."),
        (("steps: 100", "steps: true"), "line 7: phases.0.steps must be an integer, got True."),
        (("learning_rate: 1e-3", "learning_rate: '1'"), "line 9: phases.0.learning_rate must be a finite number"),
        (("    learning_rate: 1e-3\n", ""), "line 6: phases.0.learning_rate is required."),
        (("preset: yoco-tiny", "dim: 8"), "line 1: model.layers is required, unless model.preset names a shape."),
        (("yoco-tiny", "yoco-4b"), "line 2: model.preset must be one of yoco-tiny, "),
        (("steps: 100", "steps: 100\n    steps: 10"), "line 8: phases.0.steps is given twice, first in line 7."),
        (("steps: 100", "steps: 100\n    tokens: 10"), "line 7: phases.0.steps or tokens says how long the phase is"),
        (("data/corpus", "[1, a, b]"), "line 4: data.train must be a dataset prefix, a list of prefixes"),
        (("data/corpus", "[{prefix: a, weight: 1}, {prefix: b}]"), "line 4: data.train must give a weight to each"),
        (("data/corpus", "a\n  temperature: 0"), "line 5: data.temperature must be greater than 0.0, got 0."),
        (("data/corpus", "a\n  long_document_weight: -1"), "line 5: data.long_document_weight must be at least 0"),
        (("data/corpus", "[{prefix: a, wight: 1}]"), "got the entry {'prefix': 'a', 'wight': 1}"),
        (("output_dir: runs/first", "output_dir: [a"), ": not valid YAML"),
        (("output_dir: runs/first", "output_dir: !!python/name:os.system x"), "line 10: 'x' is not a value of kind"),
        (("output_dir: runs/first", 'output_dir: "a\\0b"'), "line 10: the text 'a\\x00b' holds a NUL character."),
        (("output_dir: runs/first", "output_dir: " + "[" * 5000), ", or an override of it, is nested too deeply"),
        (("output_dir: runs/first", "output_dir: a\nseed: 4294967296"), "line 11: seed must be less than 4294967296"),
        (("steps: 100", "steps: 1" + "0" * 30), "line 7: phases.0.steps must be less than 9007199254740992"),
        ((" yoco-tiny", " yoco-tiny\n  layers: 100000"), "line 3: model.layers must be less than 65536, got 100000."),
        (("output_dir: runs/first", "output_dir: &a [*a]"), "line 10: output_dir.0 contains itself."),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_line_key_and_remedy(run_yaml, change, message):
    assert change[0] in RUN
    path = run_yaml(RUN.replace(*change))
    got = refusal(path)
    assert got.startswith(str(path))
    assert message in got


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tenser=2", "unknown key parallel.tenser. Did you mean parallel.tensor?"),
        ("phases.0.steps=many", "phases.0.steps must be an integer, got 'many'."),
        ("parallel.bands=many", "parallel.bands must be an integer or 'auto', got 'many'."),
        ("phases.0.bands=0", "phases.0.bands must be greater than 0 or 'auto', got 0."),
        ("phases.1.steps=20", "phases is a list of 1, its entries are 0 to 0."),
        ("phases.first.steps=20", "phases is a list of 1, its entries are 0 to 0."),
        ("data.train.prefix=x", "data.train holds a value, not keys."),
        ("parallel=2", "parallel must hold keys and values, got 2."),
        ("parallel.tensor", "must look like section.key=value"),
        ("parallel..tensor=2", "must look like section.key=value"),
        ("output_dir=", "output_dir must be text, got nothing."),
        ("output_dir={a", "the value is not valid YAML"),
        ("model.self_mixer=mamba", "model.self_mixer must be one of 'retention' or 'window', got 'mamba'."),
        ("phases=[]", "phases must have at least 1 entry, got []."),
        ("output_dir=''", "output_dir must not be empty, got ''."),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1 must be less than 1.0, got 1."),
        ("data.split=half", "data.split must be three parts for training, validation and test such as 99,1,0"),
    ],
)
def test_a_wrong_override_is_named(run_yaml, override, message):
    got = refusal(run_yaml(), override)
    assert got.startswith(f"override '{override}': ")
    assert message in got


def test_a_file_that_is_absent_or_no_mapping_is_refused(run_yaml, tmp_path):
    assert "cannot be read: No such file" in refusal(tmp_path / "absent.yaml")
    assert "must hold keys and values" in refusal(run_yaml("- 1"))
    assert "model is required" in refusal(run_yaml(""))


def test_a_section_without_keys_is_the_default(run_yaml):
    assert load_config(run_yaml(RUN + "parallel:\n  # tensor: 2\n")).parallel == ParallelConfig()


def test_every_field_of_every_section_is_documented():
    sections, seen = [RunConfig], []
    while sections:
        section = sections.pop()
        seen.append(section)
        for name, field in section.__pydantic_fields__.items():
            # pydantic does not pass the documentation of an inherited field on
            bases = [base.__pydantic_fields__ for base in section.__mro__ if "__pydantic_fields__" in vars(base)]
            described = [fields[name].description for fields in bases if name in fields]
            assert any([field.description, *described]), f"{section.__name__}.{name} has no documentation string"
            inner = _section(section, (name,))
            if inner is not None:
                sections.append(inner)
    assert {DataSource, PhaseConfig, DataConfig, ModelConfig} <= {*seen}
    assert _leaves(list[int] | None) == [int, type(None)]


MODEL = {"dim": 64, "layers": 6, "hidden_dim": 128, "heads": 8, "vocab_size": 128}


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({}, ["retention"] * 3 + ["shared_kv"] + ["cross"] * 3),
        ({"self_layers": 5}, ["retention"] * 5 + ["shared_kv", "cross"]),
        ({"self_mixer": "window", "window": 8, "layers": 3}, ["window", "shared_kv", "cross", "cross"]),
        ({"pattern": "llama"}, ["full"] * 6),
        (
            {"pattern": "llama", "memory_layers": [5, 1], "memory_window": 4},
            ["block", "memory"] + ["block"] * 3 + ["memory"],
        ),
        ({"memory_layers": [1], "memory_window": 4}, ["retention", "memory", "retention", "shared_kv"] + ["cross"] * 3),
    ],
)
def test_layer_pattern(changes, pattern):
    assert ModelConfig(**{**MODEL, **changes}).layer_pattern() == pattern


def test_what_follows_from_the_shape():
    yoco = ModelConfig(**MODEL, self_heads=2, kv_heads=4)
    assert (yoco.head_dim, yoco.self_head_dim, yoco.num_kv_heads, yoco.num_self_heads) == (8, 32, 4, 2)
    assert (yoco.rotary_layout, yoco.scale_embeddings, yoco.num_self_layers) == ("interleaved", True, 3)
    llama = ModelConfig(**MODEL, pattern="llama")
    assert (llama.num_kv_heads, llama.num_self_layers) == (8, 0)
    assert (llama.rotary_layout, llama.scale_embeddings) == ("half_split", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads must divide dim: 64 / 5 leaves 4"),
        ({"self_heads": 64}, "self_heads must leave an even head dim"),
        ({"kv_heads": 3}, "kv_heads must divide heads: 8 / 3 leaves 2"),
        ({"self_layers": 6}, "self_layers must leave a layer for each half, got 6 of 6"),
        ({"layers": 1}, "layers must leave a layer for each half, got 0 of 1"),
        ({"self_mixer": "window"}, "window is required by self_mixer window"),
        ({"window": 4}, "window is used only by self_mixer window"),
        ({"init_std": 0.1}, "init_std is used only by pattern llama"),
        ({"pattern": "llama", "self_heads": 2}, "self_heads is used only by pattern yoco"),
        ({"pattern": "llama", "self_mixer": "window", "window": 3}, "self_mixer is used only by pattern yoco"),
        ({"memory_layers": [1]}, "memory_window is required by memory_layers"),
        ({"memory_window": 4}, "memory_window is used only with memory_layers"),
        ({"memory_layers": [1, 0, 1], "memory_window": 4}, "memory_layers names layer 1 more than once"),
        ({"memory_layers": [1, 3], "memory_window": 4}, "memory_layers names layer 3 of the cross-decoder"),
        ({"memory_layers": [6], "memory_window": 4}, "memory_layers names layer 6, but the layers are 0 to 2"),
        (
            {"pattern": "llama", "memory_layers": [0, 6], "memory_window": 4},
            "memory_layers names layer 6, but the layers are 0 to 5",
        ),
        ({"memory_layers": [-1], "memory_window": 4}, "greater than or equal to 0"),
        ({"dim": "64"}, "valid integer"),
        ({"dime": 64}, "dime"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        ModelConfig(**{**MODEL, **changes})


def test_model_config_as_a_dictionary():
    model = ModelConfig(**MODEL, tie_embeddings=True)
    assert model_config_from_dict(model_config_to_dict(model)) == model
    memory = ModelConfig(**MODEL, memory_layers=[0, 2], memory_window=4)
    assert model_config_from_dict(json.loads(json.dumps(model_config_to_dict(memory)))) == memory
    assert hash(memory) != hash(model)
    with pytest.raises(UserError, match=re.escape("config.json: unknown key windw. Did you mean window?")):
        model_config_from_dict({**MODEL, "windw": 3}, "config.json")


def test_data_parallel_size_is_what_is_left_over():
    assert ParallelConfig(tensor=2, pipeline=2).data(12) == 3
    with pytest.raises(UserError, match="6 processes cannot be split into pipeline 1 x sequence 1 x tensor 4 = 4"):
        ParallelConfig(tensor=4).data(6)


MEMORY = {"memory_layers": [0], "memory_window": 64}


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        ({"tensor": 4}, {"heads": 2}, "model.heads 2 cannot be split over parallel.tensor 4: 2 / 4 leaves 2."),
        ({"tensor": 4}, {"self_heads": 2}, "model.self_heads 2 cannot be split"),
        ({"tensor": 4}, {"hidden_dim": 130}, "model.hidden_dim 130 cannot be split"),
        ({"tensor": 4}, {"vocab_size": 130}, "model.vocab_size 130 cannot be split"),
        ({"tensor": 4}, {"heads": 24, "dim": 192, "kv_heads": 6}, "model.kv_heads 6 can be neither split"),
        ({"pipeline": 4}, {"layers": 3}, "parallel.pipeline 4 needs a layer for each stage"),
        ({"sequence": 8}, {}, "4 processes cannot be split into pipeline 1 x sequence 8 x tensor 1 = 8"),
        ({"bands": 2}, {"pattern": "llama"}, "parallel.bands is 2, but in the llama pattern"),
        ({"tensor": 8}, {}, "4 processes cannot be split"),
        (
            {"bands": 2},
            MEMORY,
            "parallel.bands is 2, but layers with memory (model.memory_layers) cannot be trained in",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_the_arithmetic(parallel, model, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ParallelConfig(**parallel).validate(ModelConfig(**{**MODEL, **model}), 4)


def test_a_sequence_that_cannot_be_cut_into_equal_chunks_names_phase_numbers_and_remedy(run_yaml):
    load_config(run_yaml(), ["parallel.sequence=4", "parallel.bands=8"])
    assert refusal(run_yaml(), "parallel.sequence=6").endswith(
        "phases.0.sequence_length 256 cannot be cut into equal chunks for parallel.sequence 6: it leaves 4 tokens. Use "
        "252, or change one of the others."
    )
    assert "for parallel.sequence 4 x phases.0.bands 3 = 12: it leaves 4 tokens" in refusal(
        run_yaml(), "parallel.sequence=4", "phases.0.bands=3"
    )


def test_what_memory_layers_cannot_train_is_refused(run_yaml):
    memory = ["model.memory_layers=[0]", "model.memory_window=64"]
    run = load_config(run_yaml(), [*memory, "phases.0.cross_batch.range=3"])
    assert run.phases[0].cross_batch == CrossBatchConfig(range=3, stepping=True)
    load_config(run_yaml(), [*memory, "phases.0.sequence_length=100"])  # windows may leave a rest
    assert (
        "phases.0.sequence_length 100 is no multiple of model.memory_window 64, which cross_batch needs: use 128"
        in (refusal(run_yaml(), *memory, "phases.0.cross_batch.range=3", "phases.0.sequence_length=100"))
    )
    shared = ["parallel.sequence=2", "phases.0.sequence_length=192"]
    load_config(run_yaml(), [*memory, *shared[:1]])
    assert (
        "phases.0.sequence_length 192 leaves no whole windows of model.memory_window 64 to each of parallel.sequence 2"
        " ranks: use 256" in refusal(run_yaml(), *memory, *shared)
    )
    rows = ["phases.0.loss=row_mean", "phases.0.sequence_length=192"]
    assert "memory_window 64, which loss row_mean needs: use 64" in refusal(
        run_yaml(), *memory, rows[0], "phases.0.sequence_length=40"
    )
    assert (load_config(run_yaml(), [*memory, *rows]).row_length(0), load_config(run_yaml(), rows).row_length(0)) == (
        64,
        192,
    )
    assert load_config(run_yaml(), memory).row_length(0) is None
    assert "negatives" in refusal(run_yaml(), *memory, "phases.0.cross_batch={range: 3, negatives: far}")
    assert "negatives neighbour gives windows that range 0 does not see" in refusal(
        run_yaml(), *memory, "phases.0.cross_batch={range: 0, negatives: neighbour}"
    )
    assert "phases.0.cross_batch trains memory layers" in refusal(run_yaml(), "phases.0.cross_batch.range=3")
    assert "range" in refusal(run_yaml(), *memory, "phases.0.cross_batch.range=-1")
    documents = refusal(run_yaml(), *memory, "data.document_mask=true")
    assert "data.document_mask hides documents from one another, which model.memory_layers cannot" in documents
    assert "phases.0.data.document_mask hides" in refusal(run_yaml(), *memory, "phases.0.data.document_mask=true")
    load_config(run_yaml(), [*memory, "data.document_mask=true", "phases.0.data.document_mask=false"])


@pytest.mark.parametrize(
    "option",
    ["split='90,10,0'", "temperature=2.0", "pipeline=linear", "min_document_length=3", "long_document_weight=2.0"],
)
def test_what_is_said_of_documents_is_refused_where_examples_are_read(run_yaml, option):
    tuning = "tuning={sources: [{files: x.jsonl, instructions: {}}]}"
    name = option.partition("=")[0]
    assert f"data.{name} is about documents" in refusal(
        run_yaml(), "data.train=null", f"data.{tuning}", f"data.{option}"
    )
    # of the run's documents it says nothing to a phase of examples
    run = load_config(run_yaml(), [f"data.{option}", f"phases.0.data.{tuning}"])
    assert run.phase_data(0) == DataConfig(tuning=run.phases[0].data.tuning)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_kv_heads_are_split_or_replicated(kv_heads):
    ParallelConfig(tensor=4).validate(ModelConfig(**MODEL, kv_heads=kv_heads), 4)


@pytest.mark.parametrize(
    "train",
    [
        "a",
        ["a", "b"],
        [3, "a", 0.5, "b"],
        [{"prefix": "a", "weight": 1}, {"prefix": "b", "weight": 2}],
        [{"prefix": "a"}],
    ],
)
def test_blends_in_every_grammar(train):
    """data/blend.py reads them (tests/data/test_blend.py); the config only refuses what has no meaning."""
    data = DataConfig(train=train, valid=train)
    assert data.train == data.valid


@pytest.mark.parametrize(
    "train", ["", [], [1], ["a", 1], [True, "a"], [-1, "a"], [{"prefix": 1}], ["a", {"prefix": "b"}], 3]
)
def test_other_blends_are_refused(train):
    with pytest.raises(ValidationError, match="must be a dataset prefix, a list of prefixes"):
        DataConfig(train=train)


def test_split_is_three_parts():
    assert DataConfig(train="a", split="6,3,1").split == "6,3,1"
    for wrong in ("1,1", "0,1,1", "1,-1,1", "1,x,1", "inf,1,1", "1,nan,1"):
        with pytest.raises(ValidationError, match="three parts"):
            DataConfig(train="a", split=wrong)


def test_lengths_in_tokens_are_rounded_up_to_steps():
    per_step = 4 * 64
    wsd = phase(
        steps=None, tokens=10 * per_step + 1, warmup_tokens=2 * per_step, schedule="wsd", decay_tokens=3 * per_step - 1
    )
    assert (wsd.num_steps, wsd.num_warmup_steps, wsd.num_decay_steps) == (11, 2, 3)
    assert (phase().num_steps, phase(warmup_steps=3).num_warmup_steps, phase().num_decay_steps) == (10, 3, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "steps or tokens says how long"),
        ({"warmup_steps": 1, "warmup_tokens": 1}, "warmup_tokens and warmup_steps say the same"),
        ({"schedule": "wsd"}, "decay_steps or decay_tokens is required by schedule wsd"),
        ({"schedule": "wsd", "warmup_steps": 6, "decay_steps": 5}, "decay_steps is too large"),
        ({"decay_steps": 5}, "decay_steps is used only by schedule wsd"),
        ({"min_learning_rate": 1.0}, "min_learning_rate must not exceed learning_rate"),
        ({"micro_batch_size": 3}, "batch_size 4 must be a multiple of micro_batch_size 3"),
        ({"learning_rate": float("nan")}, "finite"),
    ],
)
def test_contradictory_phases_are_refused(changes, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        phase(**changes)


def test_micro_batches_per_replica():
    assert phase(batch_size=24, micro_batch_size=2).micro_batches(3) == 4
    with pytest.raises(UserError, match="batch_size 4 cannot be split into micro_batch_size 1 x 3 data-parallel"):
        phase().micro_batches(3)


def test_a_phase_replaces_only_what_it_gives(run_yaml):
    text = RUN + "    # end\n"
    changes = {"train": ["x", "y"], "temperature": 2.0, "long_document_weight": 0.0, "split": "9,1,0"}
    overrides = [f"phases.0.data={json.dumps(changes)}", "data.valid=v", "phases.0.rope_theta=640e3"]
    run = load_config(run_yaml(text), overrides)
    assert run.phase_data(0) == dataclasses.replace(run.data, **changes)
    assert run.phase_rope_theta(0) == 640_000
    plain = load_config(run_yaml())
    assert (plain.phase_data(0), plain.phase_rope_theta(0)) == (plain.data, 10_000)


def test_sections_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelConfig().tensor = 2
