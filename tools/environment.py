"""Brings the running Python environment up to what MegaYOCO needs; called through tools/environment.sh.

An environment of our own gets exactly the versions of constraints.txt, once: a stamp then says so, and later calls
touch neither pip nor the network. An environment that the user brought gets only what is missing from it, and keeps
every version it has. Uses nothing beyond the standard library and pip, since it runs before anything is installed.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(sys.prefix)
LOG = VENV / "megayoco-install.log"
# An environment with a later extra of this list has the earlier ones too.
LEVELS = ("", "test", "dev")
OPTIONAL = [  # distribution, module, what this release uses it for
    ("flash-attn", "flash_attn", "attention on GPUs"),
    ("mpi4py", "mpi4py", None),  # mpirun works without it; extra for those whose DeepSpeed setup asks for it
    ("flash-linear-attention", "fla", None),
    ("liger-kernel", "liger_kernel", None),
    ("faiss-cpu", "faiss", "search in the memory of memory layers"),
    ("lm-eval", "lm_eval", "evaluation on its tasks"),
]


class InstallError(Exception):
    """pip did not do what it was asked: the message says what, why and where the whole output is."""


def requirements(extra: str) -> list[Requirement]:
    """What setup.py asks for on this Python and system."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="requirements")
    lines = [*setup["REQUIRES"], *(setup["EXTRAS"][extra] if extra else [])]
    return _holding(Requirement(line) for line in lines)


def constraints() -> list[Requirement]:
    """The lines of constraints.txt that hold for this Python."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return _holding(Requirement(line) for line in lines if line)


def _holding(items: Iterable[Requirement]) -> list[Requirement]:
    return [item for item in items if item.marker is None or item.marker.evaluate()]


def installed() -> dict[str, str]:
    """Version of every distribution in the environment by canonical name."""
    found = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
    return {canonicalize_name(name): version for name, version in found if name}


def missing(wanted: list[Requirement]) -> list[Requirement]:
    have = installed()
    return [r for r in wanted if not r.specifier.contains(have.get(canonicalize_name(r.name), ""), prereleases=True)]


def package_is_ours() -> bool:
    """Whether `import megayoco` finds this working tree, from whatever folder it is done."""
    code = "import importlib.util as u; s = u.find_spec('megayoco'); print(s.origin if s else '')"
    command = [sys.executable, "-I", "-c", code]
    found = subprocess.run(command, cwd=VENV, capture_output=True, text=True, check=False).stdout.strip()
    return bool(found) and Path(found).resolve() == ROOT / "megayoco" / "__init__.py"


def torch_replacement() -> list[str]:
    """The words of MEGAYOCO_TORCH, empty if torch comes from constraints.txt."""
    return os.environ.get("MEGAYOCO_TORCH", "").split()


def pip_run(doing: str, verb: str, *arguments: str) -> None:
    """Runs pip with its output in LOG; raises InstallError with its last error line."""
    print(f"environment: {doing} (progress: {LOG})", flush=True)
    command = [sys.executable, "-m", "pip", verb, "--no-input", "--disable-pip-version-check", *arguments]
    # DeepSpeed is built from source: compile none of its kernels, they are built on first use where one is needed.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        # The working tree must not be the folder: pip would look at what lies there.
        code = subprocess.run(command, cwd=VENV, env=environment, stdout=log, stderr=log, check=False).returncode
    if code:
        errors = [line for line in LOG.read_text(errors="replace").splitlines() if line.startswith("ERROR:")]
        told = [line for line in errors if "ResolutionImpossible" not in line]
        reason = told[-1].removeprefix("ERROR:").strip() if told else f"pip ended with code {code}"
        raise InstallError(f"{doing} failed: {reason} (whole output: {LOG})")


def install(extra: str, *, keep: dict[str, str]) -> None:
    """Installs the requirements, torch first.

    Args:
        keep: distributions whose present version may not be touched.
    """
    LOG.unlink(missing_ok=True)
    torch, done = torch_replacement(), VENV / "megayoco-torch"
    if "torch" not in keep:
        if "torch" in installed() and (done.read_text() if done.is_file() else "") != " ".join(torch):
            # Two builds of one version (CPU, CUDA) satisfy the same requirement: pip would keep the first.
            pip_run("removing the present torch", "uninstall", "--yes", "torch")
        done.unlink(missing_ok=True)
        if torch:
            pip_run("installing torch", "install", *torch)
            done.write_text(" ".join(torch))
            # a CUDA build brings the one triton it works with
            keep = {**keep, **{name: installed()[name] for name in ("torch", "triton") if name in installed()}}
    pins = {canonicalize_name(pin.name): pin for pin in constraints()} | {
        name: Requirement(f"{name}=={version}") for name, version in keep.items()
    }
    file = VENV / "megayoco-constraints.txt"
    file.write_text("".join(f"{pin}\n" for pin in pins.values()))
    pinned = ("-c", str(file))
    # DeepSpeed and megayoco are built without isolation: in an isolated build pip would fetch build tools of its own
    # choice, and DeepSpeed's setup looks for torch. So torch and the build tools come first.
    first = [name for name in ("torch", "setuptools", "wheel") if name not in keep]
    if first:
        pip_run(f"installing {', '.join(first)}", "install", *pinned, *first)
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    pip_run("installing all other packages", "install", *pinned, "--no-build-isolation", "-e", target)


def stamp(extra: str) -> Path:
    return VENV / f"megayoco-stamp-{extra or 'base'}"


def digest(extra: str) -> str:
    """Changes whenever an installation of `extra` would give something else."""
    files = [(ROOT / name).read_bytes() for name in ("setup.py", "constraints.txt")]
    rest = repr((extra, torch_replacement(), str(ROOT), sys.version)).encode()
    return hashlib.sha256(b"\0".join([*files, rest])).hexdigest()


def bring_up_owned(extra: str) -> None:
    mark = stamp(extra)
    if mark.is_file() and mark.read_text() == digest(extra):
        return
    # An extra that was asked for earlier stays, with the versions of today.
    present = [level for level in LEVELS if stamp(level).is_file()]
    extra = max([extra, *present], key=LEVELS.index)
    for level in LEVELS:  # those that still hold stay, so that a failure (no network) takes nothing away
        if stamp(level).is_file() and stamp(level).read_text() != digest(level):
            stamp(level).unlink()
    install(extra, keep={})
    for level in LEVELS[: LEVELS.index(extra) + 1]:
        temporary = stamp(level).with_suffix(".new")
        temporary.write_text(digest(level))
        temporary.replace(stamp(level))


def bring_up_borrowed(extra: str) -> None:
    lacking = missing(requirements(extra))
    if not lacking and package_is_ours():
        return
    names = ", ".join(str(requirement) for requirement in lacking) or "megayoco itself"
    print(f"environment: {VENV} lacks {names}")
    replaced = {canonicalize_name(requirement.name) for requirement in lacking} | {"megayoco"}
    install(extra, keep={name: version for name, version in installed().items() if name not in replaced})


def report() -> None:
    have = installed()
    print(
        f"environment: {VENV}, Python {sys.version.split()[0]}, torch {have['torch']}, deepspeed {have['deepspeed']},"
        f" megatron-core {have['megatron-core']}"
    )
    present = [(name, use) for name, module, use in OPTIONAL if importlib.util.find_spec(module)]
    groups = {
        "used": [f"{name} for {use}" for name, use in present if use],
        "present, not used by this release": [name for name, use in present if not use],
        "absent": [name for name, _, _ in OPTIONAL if name not in dict(present)],
    }
    told = "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items() if names)
    print(f"optional packages {told}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extra", choices=LEVELS, default="", help="extra of setup.py to install too")
    parser.add_argument("--owned", choices=("yes", "no"), required=True, help="no: install only what is missing")
    arguments = parser.parse_args()
    try:
        (bring_up_owned if arguments.owned == "yes" else bring_up_borrowed)(arguments.extra)
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
