#!/usr/bin/env bash
# Runs the whole test suite in the environment of tools/environment.sh. Arguments go to pytest: tests/run.sh -k retention
set -euo pipefail
root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
megayoco_environment test
cd "$root"
exec python -m pytest "$@"
