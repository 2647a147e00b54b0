from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from moedist.cli.main import main

ASK_BASH = """
source "$1"
compopt() { echo open; }
COMP_LINE="$2" COMP_POINT=${#2}
_moedist
printf '%s\\n' "${COMPREPLY[@]}"
"""
ASK_ZSH = """
typeset -A compstate
compdef() { : }
compadd() {
    [[ $1 != -S ]] || shift 2
    print -l -- "${(@M)@[2,-1]:#$words[CURRENT]*}"
}
_files() { echo files; }
source "$1"
words=(${=2}); [[ $2 != *' ' ]] || words+=('')
CURRENT=$#words
compstate[nmatches]=1
_moedist
"""
CASES = [
    ("moedist ch", {"checkpoint"}),
    ("moedist checkpoint ver", {"verify"}),
    ("moedist checkpoint inspect --comp", {"--compare"}),
    ("moedist tokenize --format l", {"llmc"}),
    ("moedist completion ", {"-h", "--help", "bash", "zsh"}),
    ("moedist doctor pa", {"parity"}),
    ("moedist train --dry-run moe/rou", {"moe/router=", "open"}),
    ("moedist eval runs/first train.eval_b", {"train.eval_batches=", "open"}),
    ("moedist checkpoint inspect moe/rou", set()),
]
VALUES = [
    ("moedist train experiment=ti", {"tiny_cpu"}),
    ("moedist train moe/router=top", {"topk"}),
    ("moedist train train.precision=", {"fp32", "bf16", "fp64"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    written = {}
    for shell in ("bash", "zsh"):
        written[shell] = folder / shell
        with open(written[shell], "w") as file, contextlib.redirect_stdout(file):
            assert main(["completion", shell]) == 0
    return written


def ask(command: list[str]) -> set[str]:
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    return set(ended.stdout.split())


@pytest.mark.parametrize(("line", "wanted"), [*CASES, *VALUES])
def test_bash(scripts: dict[str, Path], line: str, wanted: set[str]):
    """Behind =, readline wants what stands behind it only."""
    assert ask(["bash", "-c", ASK_BASH, "bash", str(scripts["bash"]), line]) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("line", "wanted"), [*CASES, *VALUES])
def test_zsh(scripts: dict[str, Path], line: str, wanted: set[str]):
    if (line, wanted) in VALUES:
        word = line.split()[-1].partition("=")[0]
        wanted = {f"{word}={value}" for value in wanted}
    assert ask(["zsh", "-f", "-c", ASK_ZSH, "zsh", str(scripts["zsh"]), line]) == wanted - {"open"}
