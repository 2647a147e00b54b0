from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moedist.config import ConfigError
from moedist.data import tokenize
from moedist.data.contract import Documents
from moedist.data.text import TextConfig
from moedist.data.tokenize import WriteFormat, Written, tokenize_files
from moedist.data.tokens import TokensConfig

FORMATS = get_args(WriteFormat)
LINES = ["one two", "", "three", "two two one", "one"]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    return str(path)


def save_words(path: Path, largest_id: int) -> str:
    vocabulary = {"<unk>": 0, "one": 1, "two": 2, "three": largest_id, "</s>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return str(path)


def mapped(written: Written, file_format: str) -> Documents:
    settings = {"format": "raw", "dtype": written.dtype} if file_format == "raw" else {}
    config = TokensConfig(
        files=str(written.paths[0]),
        vocab_size=written.vocab_size,
        eod_id=written.end_id,
        holdout_every=None,
        **settings,  # type: ignore[arg-type]
    )
    return config.open().documents("train")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("largest_id", [None, 5, 65_600])
def test_round_trip(tmp_path: Path, corpus: str, file_format: WriteFormat, largest_id: int | None) -> None:
    """What data=tokens maps is what data=text reads."""
    tokenizer = None if largest_id is None else save_words(tmp_path / "words.json", largest_id)
    if largest_id == 65_600 and file_format == "nanogpt":
        with pytest.raises(ConfigError, match="format = 'nanogpt' has uint16 ids only, and the tokenizer has 65601"):
            tokenize_files((corpus,), str(tmp_path / "out.bin"), file_format, tokenizer=tokenizer)
        return
    written = tokenize_files((corpus,), str(tmp_path / "out.bin"), file_format, tokenizer=tokenizer)
    found = mapped(written, file_format)
    wanted = TextConfig(files=corpus, tokenizer=tokenizer, holdout_every=None).open().documents("train")
    assert wanted.start_G is not None
    assert np.concatenate(found.parts).tolist() == wanted.parts[0].tolist()
    assert written.num_documents == len(wanted.start_G) == 4 and written.num_tokens == wanted.num_tokens
    if file_format == "megatron":
        assert found.start_G is not None and found.start_G.tolist() == wanted.start_G.tolist()
    else:
        ends = np.flatnonzero(found.parts[0] == found.end_id) + 1
        assert ends[:-1].tolist() == wanted.start_G[1:].tolist()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_bytes_on_disk(tmp_path: Path) -> None:
    """As the formats' own documents have them."""
    (tmp_path / "a.txt").write_bytes(b"AB")
    (tmp_path / "b.txt").write_bytes(b"C")
    files = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    bare = np.array([65, 66, 256, 67, 256], "<u2").tobytes()
    for file_format in FORMATS:
        tokenize_files(files, str(tmp_path / file_format), file_format)
    assert (tmp_path / "nanogpt").read_bytes() == (tmp_path / "raw").read_bytes() == bare
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 5
    assert (tmp_path / "llmc").read_bytes() == header.tobytes() + bare
    assert (tmp_path / "megatron.bin").read_bytes() == bare
    index = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    index += np.array([3, 2], "<i4").tobytes() + np.array([0, 6], "<i8").tobytes()
    assert (tmp_path / "megatron.idx").read_bytes() == index + np.array([0, 1, 2], "<i8").tobytes()


@pytest.mark.parametrize(
    ("file_format", "existing"), [("nanogpt", "out.bin"), ("megatron", "out.bin"), ("megatron", "out.idx")]
)
def test_existing_files_stay_without_force(
    tmp_path: Path, corpus: str, file_format: WriteFormat, existing: str
) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match=f"output = .*{existing}' exists. Name another output, or .*--force"):
        tokenize_files((corpus,), str(tmp_path / "out.bin"), file_format)
    assert (tmp_path / existing).read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {existing, "corpus.jsonl"}
    tokenize_files((corpus,), str(tmp_path / "out.bin"), file_format, force=True)
    assert (tmp_path / existing).read_bytes() != b"precious"


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_that_comes_meanwhile_stays(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    def come(path: Path) -> None:
        (tmp_path / "out.idx").write_text("precious")

    def refuse(*args: object) -> None:
        raise OSError(1, "no hard links here")

    monkeypatch.setattr(tokenize, "_flush_to_disk", come)
    if not linked:
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConfigError, match="out.idx' (came into being meanwhile|exists)"):
        tokenize_files((corpus,), str(tmp_path / "out"), "megatron")
    assert (tmp_path / "out.idx").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"out.idx", "corpus.jsonl"}


@pytest.mark.parametrize("force", [True, False])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    if force:
        (tmp_path / "out.bin").write_text("precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fill_up(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenize, "_flush_to_disk", fill_up)
    with pytest.raises(OSError, match="No space left"):
        tokenize_files((corpus,), str(tmp_path / "out.bin"), "nanogpt", force=force)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_input_late_leaves_nothing(tmp_path: Path, corpus: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 2000 + "{")
    with pytest.raises(ConfigError, match="has no JSON on line 2001"):
        tokenize_files((corpus, str(tmp_path / "bad.jsonl")), str(tmp_path / "out.bin"), "nanogpt")
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "bad.jsonl"}


def test_input_is_never_replaced(tmp_path: Path, corpus: str) -> None:
    before = Path(corpus).read_bytes()
    (tmp_path / "link").symlink_to(corpus)
    for output in (corpus, str(tmp_path / "link")):
        with pytest.raises(ConfigError, match="is one of the files to read. Name another output."):
            tokenize_files((corpus,), output, "nanogpt", force=True)
    words = save_words(tmp_path / "words.json", 5)
    with pytest.raises(ConfigError, match="is one of the files to read"):
        tokenize_files((corpus,), words, "nanogpt", tokenizer=words, force=True)
    assert Path(corpus).read_bytes() == before


def test_nothing_to_write(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="hold no text"):
        tokenize_files((str(tmp_path / "a.txt"),), str(tmp_path / "out.bin"), "nanogpt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt"}


def test_output_is_a_folder(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(ConfigError, match="is a folder. Name a file in it."):
        tokenize_files((corpus,), str(tmp_path), "nanogpt", force=True)


def test_folders_of_the_output_are_made(tmp_path: Path, corpus: str) -> None:
    assert tokenize_files((corpus,), str(tmp_path / "a/b/out.bin"), "raw").paths[0].exists()
