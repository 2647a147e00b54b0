#!/usr/bin/env bash
# Installs what the slow tests need, then passes what test.sh passes, the slow tests, those against other libraries, and,
# where there is a GPU, those that need one. A test that is skipped fails it. Takes hours on a small machine.
#
#   launch/test_full.sh [argument ...]      arguments of pytest, such as tests/docker or -k namespaces
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Each program, and Debian's package that has it.
PROGRAMS=(
    g++:g++ git:git ip:iproute2 tc:iproute2 slurmctld:slurm-wlm sbatch:slurm-wlm munged:munge buildah:buildah
    debootstrap:debootstrap podman:podman runc:runc chromium:chromium zsh:zsh
)

install_programs() {
    local pair missing=()
    for pair in "${PROGRAMS[@]}"; do
        command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    ((${#missing[@]})) || return 0
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
        fail "install first, as root: ${missing[*]} (names of Debian's packages)"
    fi
    echo "Installing ${missing[*]}."
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -qq -y "${missing[@]}" >/dev/null ||
        fail "apt-get could not install ${missing[*]}. See above."
}

prepare_venv test,reference,slow,sweeps,kernels,torchao
export PATH="$PATH:/usr/sbin" # where Debian keeps those of administrators
install_programs
selected="gpu or not gpu"
if ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No GPU here: the tests marked gpu are left out."
    selected="not gpu"
fi

report="$(mktemp)"
trap 'rm -f "$report"' EXIT
code=0
"$ROOT/launch/test.sh" -m "$selected" --junit-xml="$report" "$@" || code=$?
[[ -s $report ]] || exit "$code" # style, imports or types
"$VENV/bin/python" - "$report" <<'END' || code=1
import sys
from xml.etree import ElementTree

skipped = [case for case in ElementTree.parse(sys.argv[1]).iter("testcase") if case.find("skipped") is not None]
for case in skipped:
    print(f"skipped: {case.get('classname')}::{case.get('name')}: {case.find('skipped').get('message')}")
sys.exit(f"{len(skipped)} skipped: mend what is skipped, or install what it needs." if skipped else 0)
END
exit "$code"
