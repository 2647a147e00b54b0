# shellcheck shell=bash
# The virtual environment of the scripts beside this file, which source it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${MOEDIST_VENV:-$ROOT/.venv}"
CONSTRAINTS="$ROOT/launch/constraints.txt"

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 4
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the first Python 3.11 or newer that can make virtual environments.
find_python() {
    local name without_venv=""
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        is_new_enough "$name" || continue
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$name"
            return
        fi
        without_venv="${without_venv:-$(command -v "$name")}"
    done
    [[ -z $without_venv ]] || fail "$without_venv has no venv module. On Debian and Ubuntu: apt-get install python3-venv"
    fail "no Python 3.11 or newer on PATH. Install one, with its venv module."
}

# Makes the environment where it is missing or broken. A folder that is something else is left alone.
make_venv() {
    local python
    if "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        is_new_enough "$VENV/bin/python" || fail "$VENV has a Python older than 3.11. Remove it, or set MOEDIST_VENV."
        return
    fi
    if [[ -e $VENV && ! -e $VENV/pyvenv.cfg && -n $(ls -A "$VENV") ]]; then
        fail "$VENV is no virtual environment. Set MOEDIST_VENV to another folder."
    fi
    python="$(find_python)"
    echo "Making $VENV with $("$python" --version)."
    "$python" -m venv --clear "$VENV" || fail "the virtual environment $VENV cannot be made. See above."
}

# prepare_venv [extra[,extra]]: installs moedist from this checkout, with the extras of these names, in the versions of
# constraints.txt. Does nothing where that has been done and neither they nor pyproject.toml have changed since.
prepare_venv() {
    local extra="${1:-}" wanted stamp
    make_venv
    stamp="$VENV/.moedist${extra:+-$extra}"
    wanted="$({ echo "$ROOT"; cat "$ROOT/pyproject.toml" "$CONSTRAINTS"; } | sha256sum)"
    [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]] || return 0
    echo "Installing moedist and what it needs into $VENV; the first time this takes a minute or more."
    # torch first and alone: with the tested build present, no other package's open range pulls another one.
    pip_install torch
    pip_install --editable "$ROOT${extra:+[$extra]}"
    printf '%s\n' "$wanted" >"$stamp"
}

pip_install() {
    "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --constraint "$CONSTRAINTS" "$@" ||
        fail "pip could not install $*. See above; run this again when that is mended."
}
