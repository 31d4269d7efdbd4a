# Sourced by the scripts of examples/, tests/run.sh and .ci/run: `megayoco_environment [EXTRA]` puts a Python environment
# that holds MegaYOCO, its dependencies and those of the extra first on PATH.
#
# MEGAYOCO_VENV    folder of the environment. Unset: the active virtual environment, else .venv at the repository root.
# MEGAYOCO_TORCH   replaces the torch requirement of constraints.txt, pip options included, for example
#                  "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130".
# MEGAYOCO_PYTHON  the Python that makes a new environment (default python3).
#
# shellcheck shell=bash

megayoco_environment() {
    local extra="${1:-}" python="${MEGAYOCO_PYTHON:-python3}" root venv owned=no
    root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="${MEGAYOCO_VENV:-${VIRTUAL_ENV:-$root/.venv}}"
    if [ ! -x "$venv/bin/python" ]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "error: $python is not Python 3.10 or newer. Name one that is: MEGAYOCO_PYTHON=python3.12." >&2
            return 1
        fi
        echo "environment: making $venv"
        if ! "$python" -m venv "$venv" >&2; then
            echo "error: $python -m venv $venv failed. Install the venv module (Debian: apt install python3-venv)." >&2
            return 1
        fi
        # Ours from now on: it gets the versions of constraints.txt. One that was there before keeps what it has.
        touch "$venv/megayoco-owned"
    fi
    venv="$(cd -P -- "$venv" && pwd)"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "error: $venv has no pip (was making it interrupted?). Delete it and start again." >&2
        return 1
    fi
    if [ -e "$venv/megayoco-owned" ]; then
        owned=yes
        # The scripts of an environment hold its path: one that was moved or copied would run another's Python.
        if ! "$venv/bin/pip" --version 2>/dev/null | grep -qF "from $venv/"; then
            echo "error: $venv was moved or copied from elsewhere. Delete it and start again." >&2
            return 1
        fi
    fi
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    unset PYTHONHOME
    python "$root/tools/environment.py" --extra "$extra" --owned "$owned"
}
