from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moedist.config import ConfigError
from moedist.data.contract import Source
from moedist.data.text import TextConfig


def decoded(source: Source, split: str = "train") -> list[bytes]:
    """The documents of a byte-level source, their ends taken off."""
    documents = source.documents(split)  # type: ignore[arg-type]
    token_N = np.concatenate(documents.parts)
    assert documents.start_G is not None
    texts = np.split(token_N, documents.start_G[1:]) if len(token_N) else []
    assert all(text[-1] == 256 for text in texts)
    return [text[:-1].astype(np.uint8).tobytes() for text in texts]


@pytest.fixture
def words_file(tmp_path: Path) -> str:
    """A tokenizer of five words, with a hole in its ids, that would cut, fill and frame texts if it were let."""
    vocabulary = {"<unk>": 0, "one": 1, "two": 2, "three": 3, "<|endoftext|>": 4, "far": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_bytes_of_plain_files(tmp_path: Path) -> None:
    files = tuple(write(tmp_path / f"{i:02d}.txt", f"text {i}\r\n\xff".encode("latin-1")) for i in range(40))
    source = TextConfig(files=files).open()
    assert source.vocab_size == 257 and source.byte_level
    assert decoded(source, "valid") == [b"text 19\r\n\xff", b"text 39\r\n\xff"]
    assert decoded(source) == [b"text %d\r\n\xff" % i for i in range(40) if i not in (19, 39)]


def test_one_name_needs_no_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abc")
    assert TextConfig(files=path).open().fingerprint == TextConfig(files=(path,)).open().fingerprint


def test_one_file_holds_out_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", bytes(range(200)))
    source = TextConfig(files=path, holdout_every=10).open()
    assert source.documents("train").num_tokens == 181 and source.documents("valid").num_tokens == 20
    assert source.documents("valid").parts[0].tolist() == [*range(181, 200), 256]
    assert "1/10 held out" in source.describe()


def test_valid_files(tmp_path: Path) -> None:
    files = tuple(write(tmp_path / f"{i}.txt", f"text {i}") for i in range(30))
    source = TextConfig(files=files, valid_files=write(tmp_path / "v.txt", "held out")).open()
    assert len(decoded(source)) == 30 and decoded(source, "valid") == [b"held out"]


def test_nothing_held_out(tmp_path: Path) -> None:
    source = TextConfig(files=write(tmp_path / "a.txt", "abc"), holdout_every=None).open()
    assert decoded(source) == [b"abc"] and decoded(source, "valid") == []


def test_json_lines(tmp_path: Path) -> None:
    lines = [{"text": "né"}, {"text": "", "id": 3}, {"id": 4, "text": "two\nlines"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    source = TextConfig(files=path, holdout_every=None).open()
    assert decoded(source) == ["né".encode(), b"two\nlines"]


def test_tokenizer_file(tmp_path: Path, words_file: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one two three two one far"}\n{"text": "two <|endoftext|> one"}')
    source = TextConfig(files=path, tokenizer=words_file, holdout_every=None).open()
    (token_N,) = source.documents("train").parts
    # Neither cut at 2 nor filled to 8; the end that stands in the text is text: < | endoftext | > is unknown words.
    assert token_N.dtype == np.uint32
    assert token_N[:7].tolist() == [1, 2, 3, 2, 1, 70_000, 4]
    assert token_N[7] == 2 and token_N[-2:].tolist() == [1, 4] and (token_N[8:-2] == 0).all()
    assert source.vocab_size == 70_001 and not source.byte_level


def test_own_end_of_document(tmp_path: Path, words_file: str) -> None:
    path = write(tmp_path / "a.txt", "one")
    source = TextConfig(files=path, tokenizer=words_file, eod_id=3, holdout_every=None).open()
    assert source.documents("train").parts[0].tolist() == [1, 3]


def test_fingerprint_follows_the_tokens_and_the_cut(tmp_path: Path) -> None:
    one = write(tmp_path / "one.txt", "ab" * 50)
    two = write(tmp_path / "two.txt", "ab" * 49 + "ba")
    prints = [TextConfig(files=one, holdout_every=every).open().fingerprint for every in (4, 5, None)]
    prints += [TextConfig(files=two).open().fingerprint, TextConfig(files=one, valid_files=two).open().fingerprint]
    assert len(set(prints)) == 5


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"text": "a"}\n{"text": ', {}, "files = .*a.jsonl' has no JSON on line 2 .*Write one JSON object per line"),
        ('{"body": "a"}', {}, "text_key = 'text' finds no text on line 1 of .*keys are body.*Set text_key"),
        ('{"text": 3}', {}, "text_key = 'text' finds no text on line 1"),
        ('["a"]', {}, "text_key = 'text' finds no text on line 1"),
        ("[" * 100_000, {}, "has no JSON on line 1"),
        (r'{"text": "\ud800"}', {}, "has half a character on line 1"),
        ("\n\n", {}, "files = .* hold no text. Name files that are not empty."),
        ('{"text": "a"}', {"eod_id": 0}, "eod_id = 0 is a byte .*Leave it out with bytes."),
        ('{"text": "a"}', {"tokenizer": "none.json"}, "tokenizer = 'none.json' does not exist"),
        ('{"text": "a"}', {"tokenizer": __file__}, "tokenizer = .* is not a tokenizer file .*Name a tokenizer.json"),
        ('{"text": "a"}', {"valid_files": "none"}, "valid_files = 'none' does not exist"),
    ],
)
def test_bad_input(tmp_path: Path, content: str, settings: dict[str, object], message: str) -> None:
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(ConfigError, match=message):
        TextConfig(files=path, **settings).open()  # type: ignore[arg-type]


def test_no_files_named() -> None:
    with pytest.raises(ConfigError, match="files = .* names no files. Set files to"):
        TextConfig().open()


def test_not_utf8_with_a_tokenizer(tmp_path: Path, words_file: str) -> None:
    path = write(tmp_path / "a.txt", b"one \xff")
    with pytest.raises(ConfigError, match="a.txt' is not UTF-8 at byte 4. Convert the file"):
        TextConfig(files=path, tokenizer=words_file).open()


def test_end_of_document_must_be_known_and_fit(tmp_path: Path, words_file: str) -> None:
    path = write(tmp_path / "a.txt", "one")
    with pytest.raises(ConfigError, match="eod_id = 70001 is no id of .* Set eod_id to one of 0 to 70000"):
        TextConfig(files=path, tokenizer=words_file, eod_id=70_001).open()
    bare = tmp_path / "bare.json"
    Tokenizer(models.WordLevel({"one": 0}, unk_token="one")).save(str(bare))
    with pytest.raises(ConfigError, match="eod_id = None is not set, and .* Set eod_id to the id"):
        TextConfig(files=path, tokenizer=str(bare)).open()


def test_holdout_every() -> None:
    with pytest.raises(ConfigError, match="holdout_every = 1 leaves nothing to train on. Set 2 or more, or null."):
        TextConfig(holdout_every=1)
