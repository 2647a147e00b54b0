#!/usr/bin/env bash
# Like test.sh, with the slow tests, those against other libraries among them, and, where there is a GPU, those that
# need one. A test that is skipped fails it.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

prepare_venv test,reference
selected="gpu or not gpu"
if ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No GPU here: the tests marked gpu are left out."
    selected="not gpu"
fi

report="$(mktemp)"
trap 'rm -f "$report"' EXIT
"$ROOT/launch/test.sh" -m "$selected" --junit-xml="$report" "$@"
"$VENV/bin/python" - "$report" <<'END'
import sys
from xml.etree import ElementTree

skipped = [case for case in ElementTree.parse(sys.argv[1]).iter("testcase") if case.find("skipped") is not None]
for case in skipped:
    print(f"skipped: {case.get('classname')}::{case.get('name')}: {case.find('skipped').get('message')}")
sys.exit(f"{len(skipped)} skipped: mend what is skipped, or install what it needs." if skipped else 0)
END
