#!/usr/bin/env bash
# Makes the pictures in docs/pictures from a run of the recipe tiny_cpu. Needs chromium.
#
#   launch/screenshots.sh [FOLDER]      FOLDER keeps the run, and a later call with it takes that run
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

prepare_venv test
folder="${1:-}"
if [[ -z $folder ]]; then
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
if [[ ! -f $folder/runs/first/status.json ]]; then
    "$VENV/bin/moedist" train experiment=tiny_cpu "run.dir=$folder/runs/first" | tee "$folder/terminal.txt"
fi
cd "$ROOT"
"$VENV/bin/python" -m tests.docs.screenshots "$folder"
