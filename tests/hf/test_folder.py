"""A saved folder, loaded where megayoco does not exist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megayoco.hf import CODE_FILES
from tests.hf.models import build, tokens

READER = """
import json, sys
from pathlib import Path

sys.modules["megayoco"] = None  # importing it fails, as where it is not installed
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

for folder in map(Path, sys.argv[1:]):
    expected = load_file(folder.with_suffix(".expected"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.dtype == torch.float32 and "transformers_modules" in type(model).__module__
    tied = AutoConfig.from_pretrained(folder, trust_remote_code=True).tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), value), name
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"])
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(expected["ids"]).last_hidden_state
        assert torch.equal(model.lm_head(hidden), expected["logits"])
    answer = model.generate(expected["ids"], max_new_tokens=5, do_sample=False)
    assert torch.equal(answer, expected["answer"])

    again = folder.with_suffix(".again")
    model.save_pretrained(again)
    for name in ("model.safetensors", "configuration_megayoco.py", "modeling_megayoco.py"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, again)]
    assert configs[0] == configs[1]
print("equal")
"""


def test_a_folder_needs_nothing_but_transformers(tmp_path):
    folders = [tmp_path / name for name in ("tied", "window")]
    for folder in folders:
        _, model = build(folder.name, torch.float32)
        model.save_pretrained(folder)
        ids = tokens(2, 15)
        with torch.no_grad():
            logits = model(ids).logits
        answer = model.generate(ids, max_new_tokens=5, do_sample=False)
        save_file({"ids": ids, "logits": logits, "answer": answer}, folder.with_suffix(".expected"))
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "configuration_megayoco.py",
            "generation_config.json",
            "model.safetensors",
            "modeling_megayoco.py",
        ]
        for file in CODE_FILES:
            assert (folder / file.name).read_bytes() == file.read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert sorted(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    (tmp_path / "read.py").write_text(READER)
    run = subprocess.run(
        [sys.executable, "-I", "read.py", *map(str, folders)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["equal"]


def test_the_code_files_import_nothing_of_this_package():
    for file in CODE_FILES:
        assert isinstance(file, Path)
        lines = [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        roots = {line.split()[1].split(".")[0] or line.split()[1] for line in lines}
        assert roots <= {"typing", "torch", "transformers", ".configuration_megayoco"}
