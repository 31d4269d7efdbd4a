"""tools/environment.sh and .py: what they install, when they leave pip alone, what a failure leaves. pip is a fake."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools  # noqa: F401 (before pip, which keeps a later one from replacing distutils, as megatron-core needs)
from packaging.requirements import Requirement

import pip  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
FAKE_PIP = """
import os, sys
from pathlib import Path
place = Path(__file__).resolve().parent.parent
with open(os.environ["PIP_CALLS"], "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1:] == ["--version"]:
    print(f"pip 0 from {place}/pip")
elif os.environ.get("PIP_FAILS") in sys.argv:
    sys.exit("ERROR: No matching distribution found for torch==2.13.0\\nERROR: ResolutionImpossible: see the manual")
else:
    for name, version in (("torch", "2.13.0"), ("deepspeed", "0.19.8"), ("megatron_core", "0.16.1")):
        folder = place / f"{name}-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
"""


class Sandbox:
    """An environment without packages whose pip only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.venv, self.calls_file = folder / "env", folder / "calls"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.venv], check=True)
        packages = next((self.venv / "lib").glob("python*")) / "site-packages"
        (packages / "pip").mkdir()
        (packages / "pip" / "__init__.py").touch()
        (packages / "pip" / "__main__.py").write_text(FAKE_PIP)
        (packages / "pip" / "_vendor").symlink_to(Path(pip.__file__).parent / "_vendor")
        script = self.venv / "bin" / "pip"
        script.write_text(f'#!/bin/sh\nexec {self.venv}/bin/python -m pip "$@"\n')
        script.chmod(0o755)
        (self.venv / "megayoco-owned").touch()

    def bring_up(self, extra: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("MEGAYOCO_", "PYTHON")) and k != "VIRTUAL_ENV"
        }
        environment = {**clean, "MEGAYOCO_VENV": str(self.venv), "PIP_CALLS": str(self.calls_file), **variables}
        command = f'source "{ROOT}/tools/environment.sh" && megayoco_environment "{extra}" && command -v python'
        return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)

    def pip_calls(self) -> list[str]:
        """What pip was asked for since the last time, without questions for its version."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [call for call in calls if "--version" not in call]

    def stamps(self) -> set[str]:
        return {path.name.removeprefix("megayoco-stamp-") for path in self.venv.glob("megayoco-stamp-*")}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_second_call_leaves_pip_alone_and_an_extra_covers_those_before_it(sandbox: Sandbox) -> None:
    done = sandbox.bring_up("test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(sandbox.venv / "bin" / "python")
    torch, rest = sandbox.pip_calls()
    assert torch.endswith("torch setuptools wheel")
    assert rest.endswith(f"--no-build-isolation -e {ROOT}[test]")
    for extra in ("test", ""):
        assert sandbox.bring_up(extra).returncode == 0
        assert sandbox.pip_calls() == []
    assert sandbox.bring_up("dev").returncode == 0
    assert sandbox.pip_calls()[-1].endswith("[dev]")
    assert sandbox.stamps() == {"base", "test", "dev"}


def test_another_torch_replaces_the_first(sandbox: Sandbox) -> None:
    assert sandbox.bring_up().returncode == 0
    sandbox.pip_calls()
    assert sandbox.bring_up(MEGAYOCO_TORCH="torch==2.13.0 --index-url https://example.org/cu130").returncode == 0
    calls = sandbox.pip_calls()
    assert calls[0].startswith("uninstall") and calls[0].endswith("torch")
    assert calls[1].endswith("torch==2.13.0 --index-url https://example.org/cu130")
    assert calls[2].endswith("setuptools wheel") and "torch" not in calls[2].split()


@pytest.mark.parametrize("fails", ["torch", "-e"])
def test_failure_is_one_line_and_leaves_no_stamp(sandbox: Sandbox, fails: str) -> None:
    failed = sandbox.bring_up("test", PIP_FAILS=fails)
    assert failed.returncode == 1
    assert re.fullmatch(r"error: installing .* failed: No matching distribution .*\n", failed.stderr)
    assert sandbox.stamps() == set()
    assert sandbox.bring_up("test").returncode == 0
    failed = sandbox.bring_up("dev", PIP_FAILS=fails)
    assert failed.returncode == 1
    assert sandbox.stamps() == {"base", "test"}, "what was complete before is still complete"


def test_borrowed_environment_keeps_its_versions(sandbox: Sandbox) -> None:
    (sandbox.venv / "megayoco-owned").unlink()
    packages = next(sandbox.venv.glob("lib/python*/site-packages"))
    for name, version in (("torch", "2.12.1+cu130"), ("rich", "1.0")):
        (packages / f"{name}-{version}.dist-info").mkdir()
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    done = sandbox.bring_up()
    assert done.returncode == 0, done.stderr
    assert "deepspeed" in done.stdout and "rich>=" in done.stdout
    pins = (sandbox.venv / "megayoco-constraints.txt").read_text().splitlines()
    assert "torch==2.12.1+cu130" in pins
    assert not {"rich==1.0", "torch==2.13.0"} & set(pins)
    assert sandbox.stamps() == set()


def test_moved_environment_and_old_python_are_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    sandbox.venv.rename(moved)
    refused = sandbox.bring_up(MEGAYOCO_VENV=str(moved))
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and "moved" in refused.stderr
    refused = sandbox.bring_up(MEGAYOCO_VENV=str(tmp_path / "new"), MEGAYOCO_PYTHON="false")
    assert refused.returncode == 1 and "MEGAYOCO_PYTHON" in refused.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_one_tested_version(python: str) -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"))
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins: dict[str, Requirement] = {}
    for pin in map(Requirement, filter(None, lines)):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name.lower() not in pins, f"{pin.name} is pinned twice"
            pins[pin.name.lower()] = pin
    for line in [*setup["REQUIRES"], *setup["EXTRAS"]["dev"], *setup["EXTRAS"]["mpi"]]:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"python_version": python}):
            continue
        (pinned,) = pins[wanted.name.lower()].specifier
        assert pinned.operator == "==" and wanted.specifier.contains(pinned.version), line


SOURCED = ("tools/environment.sh", "examples/workspace.sh")
EXAMPLES = sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.sh") if path.name != "workspace.sh")


@pytest.mark.parametrize("script", [*EXAMPLES, "tests/run.sh", ".ci/run", *SOURCED])
def test_shell_scripts_parse_and_those_to_run_are_executable(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK) == (script not in SOURCED)
