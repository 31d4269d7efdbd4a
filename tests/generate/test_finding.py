"""Which weights of a run `--model` means."""

import json

import pytest

from megayoco.convert.checkpoints import FORMAT, LATEST, NOTE
from megayoco.convert.export import write_export
from megayoco.generate.finding import find_model
from tests.generate.models import MODELS, build, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory that exported after step 7."""
    folder = tmp_path_factory.mktemp("run")
    write_export(folder / "export", MODELS["llama"], weights(build("llama")), None, facts={"step": 7})
    return folder


def save(run, step):
    """A checkpoint of this step that is complete by its note, the newest of the run."""
    folder = run / "checkpoints" / f"global_step{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTE).write_text(json.dumps({"format": FORMAT, "step": step, "files": {}, "identity": {}}))
    (run / "checkpoints" / LATEST).write_text(folder.name)


def test_the_export_unless_a_later_checkpoint_is_there(run):
    assert find_model(run) == run / "export"
    for step, found in ((5, run / "export"), (7, run / "export"), (9, run)):
        save(run, step)
        assert find_model(run) == found, step
    # said outright, it is the export
    assert find_model(run / "export") == run / "export"
    # a later checkpoint that is not whole is none
    (run / "checkpoints" / "global_step9" / NOTE).unlink()
    assert find_model(run) == run / "export"
