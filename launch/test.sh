#!/usr/bin/env bash
# Sets up a virtual environment and passes the tests: style, import rules, types, then every test that is neither slow
# nor needs a GPU.
#
#   launch/test.sh [argument ...]      arguments of pytest, such as tests/moe or -k padded
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"

prepare_venv test
export PATH="$VENV/bin:$PATH"
# Tests start ranks of their own, up to one per core: threads on top of them would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# They start hundreds of processes: each would compile the package anew.
unset PYTHONDONTWRITEBYTECODE

ruff check .
ruff format --check .
lint-imports
mypy
# Two workers, each file on one of them: a test of several ranks waits more than it computes.
exec pytest -n 2 --dist loadfile -m "not slow and not gpu" "$@"
