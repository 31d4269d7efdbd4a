"""LongLLaMA folders: the released layout comes in and ours goes out bit for bit, and transformers computes the same."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megayoco.convert.formats import read_weights, recognise, write_weights
from megayoco.convert.longllama import MEM_DTYPES, with_memory
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.errors import UserError
from megayoco.hf import LONGLLAMA_CODE_FILES
from megayoco.hf.configuration_longllama import MEMORY_DTYPES
from tests.convert.models import LONGLLAMA, PLAIN_LLAMA, assert_same, listing, random_weights
from tests.longllama_reference import Reference, greedy, random_state_dict

RELEASED = dict(
    architectures=["LongLlamaForCausalLM"],
    auto_map={"AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM"},
    model_type="longllama",
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=16,
    rope_theta=5e4,
    rope_scaling=None,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    initializer_range=0.01,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    use_cache=True,
    last_context_length=8,
    mem_layers=[1, 3],
    mem_positionals=True,
    mem_dtype="float32",
    mem_attention_grouping=[2, 8],
    torch_attention=True,
    gradient_checkpoint_every_ith=2,
)


@pytest.fixture
def released(tmp_path):
    """A folder as the hub has them: torch's file, with the tables that old versions stored, and no code of ours."""
    folder = tmp_path / "released"
    folder.mkdir()
    state = random_state_dict(RELEASED, dtype=torch.float32)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}
    torch.save(state | tables, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(RELEASED))
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_in_and_out_is_exact(released, tmp_path):
    assert recognise(released) == "longllama"
    weights = read_weights(released)
    assert (weights.model.memory_layers, weights.model.memory_window) == ((1, 3), 16)
    assert (weights.model.pattern, weights.model.rope_theta, weights.model.norm_eps) == ("llama", 5e4, 1e-6)
    assert weights.tokenizer is None and "sequence_length" not in weights.facts
    write_weights(tmp_path / "ours", "megayoco", weights)
    write_weights(tmp_path / "back", "longllama", read_weights(tmp_path / "ours"), shard_bytes=40_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert_same(read_weights(tmp_path / "back"), weights)
    before = torch.load(released / "pytorch_model.bin", weights_only=True)
    found = {}
    for file in (tmp_path / "back").glob("model-*.safetensors"):
        found |= load_file(file)
    assert found.keys() == {name for name in before if "inv_freq" not in name}
    assert all(torch.equal(value, before[name]) for name, value in found.items())
    changes = {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "training_facts": {},
        "auto_map": RELEASED["auto_map"]
        | {
            "AutoConfig": "configuration_longllama.LongLlamaConfig",
            "AutoModel": "modeling_longllama.LongLlamaModel",
        },
    }
    assert config_of(tmp_path / "back") == RELEASED | changes


def test_what_a_folder_holds(tmp_path):
    weights = random_weights(LONGLLAMA)
    write_weights(tmp_path / "f", "hf", weights)  # for transformers it is this format
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer", "tokenizer.json"}
    assert listing(tmp_path / "f") == files | {"tokenizer_config.json", *(file.name for file in LONGLLAMA_CODE_FILES)}
    config = config_of(tmp_path / "f")
    # the window, whatever length it was trained for; half of it is room for new tokens
    assert (config["max_position_embeddings"], config["last_context_length"]) == (6, 3)
    assert (config["mem_layers"], config["mem_dtype"]) == ([1, 2], "float32")
    assert (config["eos_token_id"], config["num_key_value_heads"], config["head_dim"]) == (256, 4, 8)
    for name in ("hf", "longllama", None):
        found = read_weights(tmp_path / "f", name)
        assert_same(found, weights)
        assert found.facts.items() >= weights.facts.items()
        assert found.tokenizer.identity() == weights.tokenizer.identity()
    card = (tmp_path / "f" / "README.md").read_text()
    assert "custom_code" in card and "4,096 tokens" in card
    assert "memory, per token | 512 (2 layers)" in card  # 2 x 4 heads x 8 x 4 bytes x 2 layers
    assert "windows, per sequence | 6,144" in card  # 256 bytes x 4 layers x 6 tokens
    write_weights(tmp_path / "narrow", "longllama", weights, dtype=torch.bfloat16)
    assert config_of(tmp_path / "narrow")["mem_dtype"] == "bfloat16"


def test_a_llama_becomes_one_and_comes_back(tmp_path):
    llama = random_weights(PLAIN_LLAMA)
    write_weights(tmp_path / "llama", "llama", llama)
    read = read_weights(tmp_path / "llama")
    write_weights(tmp_path / "plain", "longllama", read)
    config = config_of(tmp_path / "plain")
    # no layer would remember what is cut off, so nothing is, up to the length that it was trained for
    assert (config["mem_layers"], config["max_position_embeddings"], config["last_context_length"]) == ([], 4096, 4096)
    again = read_weights(tmp_path / "plain")
    assert_same(again, llama)
    assert again.model.memory_window is None and again.facts["sequence_length"] == 4096

    write_weights(tmp_path / "memory", "longllama", with_memory(again, [1, 2], 6))
    assert config_of(tmp_path / "memory")["mem_layers"] == [1, 2]
    assert_same(read_weights(tmp_path / "memory"), random_weights(LONGLLAMA))
    write_weights(tmp_path / "back", "llama", with_memory(read_weights(tmp_path / "memory"), [], None))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("llama", "plain", "memory", "back")]
    assert len(set(files)) == 1
    with pytest.raises(UserError, match="memory layers can be added to a LLaMA, not to the weights of a yoco model"):
        with_memory(random_weights("retention"), [1], 6)
    with pytest.raises(UserError, match="names layer 9, but the layers are 0 to 3"):
        with_memory(llama, [9], 6)
    with pytest.raises(UserError, match="memory_window is required by memory_layers"):
        with_memory(llama, [1], None)


READER = """
import json, sys
from pathlib import Path

sys.modules["megayoco"] = None  # importing it fails, as where it is not installed
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

folder = Path(sys.argv[1])
expected = load_file("expected.safetensors")
ids = expected["ids"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert model.dtype == torch.float32 and "transformers_modules" in type(model).__module__
for name, value in load_file(folder / "model.safetensors").items():
    assert torch.equal(model.get_parameter(name), value), name
with torch.no_grad():
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=2e-4, atol=2e-4 * float(logits.abs().max()))
    narrow = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert (narrow(ids).logits.float() - logits).norm() < 5e-2 * logits.norm()
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden), logits)
    llama = LlamaForCausalLM.from_pretrained(folder)
    short = ids[:, : model.config.last_context_length]
    torch.testing.assert_close(llama(short).logits, model(short).logits, rtol=2e-5, atol=1e-4)
    assert (llama(ids).logits - logits).abs().max() > 0.1
answer = model.generate(ids, max_new_tokens=20, do_sample=False)
assert torch.equal(answer, expected["answer"])

again = folder.with_suffix(".again")
model.save_pretrained(again)
for part in ("configuration", "cache", "modeling"):
    name = f"{part}_longllama.py"
    assert (again / name).read_bytes() == (folder / name).read_bytes(), name
before, after = (load_file(place / "model.safetensors") for place in (folder, again))
assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
old, new = (json.loads((place / "config.json").read_text()) for place in (folder, again))
assert old.items() <= (new | {"rope_scaling": None, "attention_bias": False, "mlp_bias": False}).items(), (old, new)
assert type(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)).__name__ == "LongLlamaForCausalLM"
print("equal")
"""


def test_a_folder_needs_nothing_but_transformers(tmp_path):
    weights = random_weights(LONGLLAMA)._replace(tokenizer=None)
    write_weights(tmp_path / "f", "longllama", weights)
    reference = Reference(load_file(tmp_path / "f" / "model.safetensors"), config_of(tmp_path / "f"))
    ids = torch.randint(264, (2, 21), generator=torch.Generator().manual_seed(1))
    logits, _ = reference.forward(ids)
    answer, _ = greedy(reference, ids, 20)
    save_file({"ids": ids, "logits": logits.float(), "answer": answer}, tmp_path / "expected.safetensors")
    (tmp_path / "read.py").write_text(READER)
    run = subprocess.run(
        [sys.executable, "-I", "read.py", "f"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["equal"]


def test_the_code_files_import_nothing_of_this_package():
    for file in LONGLLAMA_CODE_FILES:
        lines = [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        roots = {line.split()[1].split(".")[0] or line.split()[1] for line in lines}
        beside = {".configuration_longllama", ".cache_longllama"}
        assert roots <= {"typing", "collections", "torch", "transformers"} | beside


def test_a_tokenizer_beside_the_weights(released):
    write_for_transformers(ByteTokenizer(), released)
    assert read_weights(released).tokenizer.encode("ä") == ByteTokenizer().encode("ä")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LongLlamaForSequenceClassification"]}, "LongLlamaForSequenceClassification"),
        ({"last_context_length": 0}, "last_context_length must be a positive number, got 0"),
        ({"last_context_length": 17}, "last_context_length is 17, more than a window, max_position_embeddings 16"),
        ({"mem_layers": [4]}, "mem_layers names layer 4, but the layers are 0 to 3"),
        ({"mem_layers": [-1]}, "mem_layers names layer -1"),
        ({"mem_layers": [1, 1]}, "names layer 1 more than once"),
        ({"mem_layers": "1"}, "mem_layers must be a list of numbers of layers, got '1'"),
        ({"mem_positionals": False}, "mem_positionals is false; our memory layers have rotary positions"),
        ({"mem_dtype": "int8"}, "mem_dtype is 'int8', which stores no floating-point numbers"),
        ({"mem_dtype": "float8_e8m0fnu"}, "mem_dtype is 'float8_e8m0fnu'"),
        ({"mem_attention_grouping": "x"}, "mem_attention_grouping is 'x'. Set it to two positive numbers"),
        ({"mem_attention_grouping": [0, 5]}, "mem_attention_grouping is [0, 5]"),
        ({"gradient_checkpoint_every_ith": 0}, "gradient_checkpoint_every_ith must be a positive number, got 0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2 of 4; a LongLLaMA has as many as heads"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling scales"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"quantization_config": {"bits": 8}}, "quantised weights cannot be converted"),
        ({"vocab_size": 256}, "embed_tokens.weight has shape (264, 32), config.json asks for (256, 32)"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_read(released, changes, message):
    (released / "config.json").write_text(json.dumps(RELEASED | changes))
    with pytest.raises(UserError) as caught:
        read_weights(released, "longllama")
    assert message in str(caught.value) and str(released) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_memory_can_be_stored_in_is_what_the_written_model_knows():
    assert MEM_DTYPES == MEMORY_DTYPES


def test_code_in_a_file_of_weights_does_not_run(released, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"model.norm.weight": Evil()}, released / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds code besides tensors"):
        read_weights(released)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["hf", "longllama", "easylm"])
def test_grouped_heads_are_refused(tmp_path, name):
    with pytest.raises(UserError) as caught:
        write_weights(tmp_path / "f", name, random_weights("longllama"))
    assert "this model has model.kv_heads 2 for 4 heads. Write it by --to megayoco, or train with" in str(caught.value)
    assert not (tmp_path / "f").exists()
    if name != "hf":  # a LLaMA as such
        with pytest.raises(UserError, match="Write it by --to megayoco or --to llama"):
            write_weights(tmp_path / "f", name, random_weights("llama"))


@pytest.mark.parametrize(("model", "remedy"), [("retention", "hf"), ("memory", "megayoco")])
def test_a_yoco_is_none(tmp_path, model, remedy):
    with pytest.raises(UserError, match=f"pattern yoco is no LongLLaMA. Write it by --to {remedy}"):
        write_weights(tmp_path / "f", "longllama", random_weights(model))


def test_an_incomplete_copy(released):
    shutil.copy(released / "config.json", released.parent / "config.json")
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(released.parent)
