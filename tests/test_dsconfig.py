"""DeepSpeed configs: every shipped file loads, every mistake DeepSpeed would overlook is refused."""

import types
from pathlib import Path

import hjson
import pytest

from megayoco.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, PhaseConfig, RunConfig
from megayoco.dsconfig import load_deepspeed_config, precision
from megayoco.errors import UserError
from megayoco.train.memory import estimate_memory

SHIPPED = {
    "cpu": ("fp32", 0),
    "zero1_bf16": ("bf16", 1),
    "zero2_bf16": ("bf16", 2),
    "zero2_offload": ("bf16", 2),
    "zero3_bf16": ("bf16", 3),
    "zero3_offload": ("bf16", 3),
    "pipeline_zero1_bf16": ("bf16", 1),
}
FOLDER = Path(__file__).parents[1] / "ds_configs"


def make_run(**parallel):
    phases = [
        PhaseConfig(sequence_length=64, steps=1, batch_size=24, micro_batch_size=2, learning_rate=1e-3),
        PhaseConfig(sequence_length=128, steps=1, batch_size=6, learning_rate=1e-3),
    ]
    return RunConfig(
        model=ModelConfig(preset="yoco-tiny"),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(train="corpus"),
        optimizer=OptimizerConfig(gradient_clipping=0.0),
        phases=phases,
        output_dir="run",
    )


@pytest.fixture
def load(tmp_path):
    def load(text, run=None, data_parallel=3, device="cpu", phase=0):
        path = tmp_path / "ds.json"
        path.write_text(text)
        return load_deepspeed_config(path, run or make_run(), data_parallel, device, phase=phase)

    return load


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files(name):
    config = load_deepspeed_config(FOLDER / f"{name}.json", make_run(), 3, "cpu")
    assert (precision(config), config["zero_optimization"]["stage"]) == SHIPPED[name]
    filled_in = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    assert not hjson.loads((FOLDER / f"{name}.json").read_text()).keys() & {*filled_in, "gradient_clipping"}


def test_no_file_is_left_out():
    assert {path.stem for path in FOLDER.iterdir()} == {*SHIPPED}


def test_what_the_run_says_is_filled_in(load):
    config = load('{"train_batch_size": "auto", "gradient_clipping": "auto"}')
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.0
    assert config["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    assert load("{}", phase=1)["gradient_accumulation_steps"] == 2
    assert load_deepspeed_config(None, make_run(), 3, "cpu") == load("{}")


def test_comments_and_numbers_that_agree_are_accepted(load):
    text = """{
      # the run's own numbers
      "train_batch_size": 24, "gradient_accumulation_steps": 4, // repeated
      "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "stage3_max_live_parameters": 5}
    }"""
    assert load(text)["zero_optimization"]["stage"] == 2


def test_null_takes_offloading_back(load):
    config = load('{"zero_optimization": {"stage": 2, "offload_optimizer": null}}')
    topology = types.SimpleNamespace(tensor=1, sequence=1, data=3, pipeline=1)
    assert estimate_memory(make_run(), config, topology).host == 0


@pytest.fixture
def no_wandb(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.usefixtures("no_wandb")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gradient_cliping": 1.0}', "unknown key gradient_cliping. Did you mean gradient_clipping?"),
        ('{"zero_optimisation": {}}', "Did you mean zero_optimization?"),
        ('{"zero_optimization": {"overlap_com": true}}', "Did you mean zero_optimization.overlap_comm?"),
        (
            '{"zero_optimization": {"offload_param": {"devise": "cpu"}}}',
            "unknown key zero_optimization.offload_param.devise. Did you mean zero_optimization.offload_param.device?",
        ),
        ('{"activation_checkpointing": {"profil": true}}', "Did you mean activation_checkpointing.profile?"),
        ('{"timers": {"throughput": {"enable": true}}}', "Did you mean timers.throughput.enabled?"),
        ('{"fp16": {"xyz": 1}}', "Valid keys here: auto_cast, "),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage: Input should be 0, 1, 2, 3"),
        ('{"zero_optimization": {"offload_param": {"device": "gpu"}}}', "zero_optimization.offload_param.device: "),
        ('{"bf16": true}', "bf16 must hold an object of keys and values, got True."),
        ('{"bf16": {"enabled": true}, "bf16": {}}', "bf16 is given twice in one section."),
        ('{"zero_optimization": {"stage": 1', "not valid JSON"),
        ("[1]", "must hold an object"),
        ('{"optimizer": {"type": "Adam"}}', "optimizer cannot be set here."),
        ('{"scheduler": {}}', "section phases"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "Set parallel.tensor in the run's config"),
        ('{"amp": {"enabled": true}}', "Apex AMP integration has been removed"),
        ('{"zero_optimization": {"mics_shard_size": 2}}', "MiCS"),
        ('{"train_batch_size": 25}', "batch_size 24 = micro_batch_size 2 x 4 micro-batches x 3 data-parallel"),
        ('{"gradient_accumulation_steps": 3}', "gradient_accumulation_steps is 3, but the run's config says 4"),
        ('{"gradient_clipping": 0.5}', "gradient_clipping is 0.5, but the run's config says 0.0"),
        ('{"pipeline": {"pipe_partitioned": true}}', "pipeline.pipe_partitioned must be false"),
        ('{"pipeline": {"grad_partitioned": true}}', "pipeline.grad_partitioned must be false"),
        ('{"pipeline": {"stages": 4}}', "pipeline.stages is 4, but parallel.pipeline of the run's config is 1."),
        ('{"fp16": {"enabled": true}}', "fp16 cannot be used on device cpu."),
        ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "exclude each other"),
        ('{"bf16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp32"}}', "only with ZeRO"),
        ("[" * 20000, "nested too deeply"),
        ('{"steps_per_print": 0}', "steps_per_print must be a number above 0, got 0."),
        ('{"gradient_predivide_factor": "x"}', "gradient_predivide_factor must be a number above 0, got 'x'."),
        ('{"dump_state": "no"}', "dump_state must be true or false, got 'no'."),
        ('{"gradient_allreduce_op": "max"}', "gradient_allreduce_op must be one of mean, sum, got 'max'."),
        ('{"communication_data_type": "fp8"}', "communication_data_type must be one of fp32, bf16, fp16, null"),
        ('{"data_types": {"grad_accum_dtype": "x"}}', "data_types.grad_accum_dtype must be one of fp32"),
        ('{"data_types": {"param_dtype": "bf16"}}', "data_types.param_dtype cannot be set here. Precision"),
        ('{"torch_autocast": {"enabled": true}}', "torch_autocast cannot be set here. Precision"),
        ('{"managed_gradient_accumulation": false}', "managed_gradient_accumulation cannot be set here."),
        ('{"checkpoint": {"load_universal": true}}', "checkpoint.load_universal cannot be set here."),
        ('{"checkpoint": {"tag_validation": "x"}}', "DeepSpeed refuses it: Checkpoint config contains invalid"),
        ('{"zero_optimization": {"cpu_offload": true}}', "Set zero_optimization.offload_optimizer.device"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}}', "ZeRO Stage 3."),
        ('{"wandb": {"enabled": true}}', "wandb.enabled needs the package wandb."),
        (
            '{"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}}',
            "gradient_allreduce_op sum does not go with ZeRO 3",
        ),
    ],
)
def test_mistakes_are_refused(load, text, message):
    with pytest.raises(UserError) as caught:
        load(text)
    assert "ds.json" in str(caught.value)
    assert message in str(caught.value)


def test_a_batch_that_does_not_divide_is_refused(load):
    with pytest.raises(UserError, match="batch_size 24 cannot be split into micro_batch_size 2 x 5"):
        load("{}", data_parallel=5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_pipeline_goes_with_zero_0_and_1_only(load, stage):
    text = f'{{"zero_optimization": {{"stage": {stage}}}}}'
    if stage < 2:
        assert load(text, make_run(pipeline=2))["zero_optimization"]["stage"] == stage
    else:
        with pytest.raises(UserError, match=f"zero_optimization.stage {stage} cuts gradients"):
            load(text, make_run(pipeline=2))


def test_a_bf16_pipeline_adds_gradients_to_their_fp32_sums_at_once(load):
    text = '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}'
    assert load(text, make_run(pipeline=2))["bf16"]["immediate_grad_update"] is True
    assert "immediate_grad_update" not in load(text, make_run(tensor=1))["bf16"]
    with pytest.raises(UserError, match=r"immediate_grad_update must be true with parallel\.pipeline 2"):
        load(text.replace('"enabled": true', '"enabled": true, "immediate_grad_update": false'), make_run(pipeline=2))


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_deepspeed_config(tmp_path / "absent.json", make_run(), 1, "cpu")


def test_precision():
    assert precision({}) == precision({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}) == "fp32"
    assert precision({"bf16": {"enabled": True}}) == "bf16"
    assert precision({"fp16": {"enabled": True}}) == "fp16"
