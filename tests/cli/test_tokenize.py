from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from moedist.cli.tokenize import add_parser
from moedist.data.tokens import TokensConfig


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser("moedist")
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["tokenize", *arguments])
    return args.main(args)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("some text")
    return str(tmp_path / "a.txt")


def test_writes_and_says_how_to_train(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(text, "--output", str(tmp_path / "out.bin")) == 0
    printed = capsys.readouterr().out
    assert "1 documents, 10 tokens, uint16" in printed
    vocab_size, eod_id = re.search(r"data.vocab_size=(\d+) data.eod_id=(\d+)", printed).groups()  # type: ignore[union-attr]
    config = TokensConfig(files=str(tmp_path / "out.bin"), vocab_size=int(vocab_size), eod_id=int(eod_id))
    assert config.open().documents("train").num_tokens == 10


def test_bad_input_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "none.txt"), "-o", str(tmp_path / "out.bin")) == 2
    assert "none.txt' does not exist" in capsys.readouterr().err


def test_existing_output_is_2_and_force_replaces(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out.bin"
    out.write_text("precious")
    assert run(text, "-o", str(out)) == 2
    assert out.read_text() == "precious"
    assert run(text, "-o", str(out), "--force") == 0


def test_disk_or_environment_is_4(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(text, "-o", f"{text}/out.bin") == 4
    assert re.search("cannot write .*Nothing was replaced. Make room", capsys.readouterr().err)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    assert "moedist tokenize corpus/ --output corpus.bin" in capsys.readouterr().out
