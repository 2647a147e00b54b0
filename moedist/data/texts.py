"""Documents of text files: a plain file is one document, a line of a ``.jsonl`` file is one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from moedist.config import ConfigError
from moedist.data.paths import read_bytes, reading


@dataclasses.dataclass(frozen=True)
class Text:
    """One document as it was read.

    Attributes:
        content: its bytes.
        key: the config's key that named its file.
        path: its file.
        line: its line in a ``.jsonl`` file, from 1; None for a plain file.
    """

    content: bytes
    key: str
    path: Path
    line: int | None = None

    def decode(self) -> str:
        """The text.

        Raises:
            ConfigError: it is not UTF-8, with the place.
        """
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            remedy = "Convert the file to UTF-8, or train on bytes (no tokenizer)."
            raise ConfigError(self.key, str(self.path), f"is not UTF-8 at byte {error.start}", remedy) from None


def read_texts(key: str, paths: Iterable[Path], text_key: str) -> Iterator[Text]:
    """The documents of some files, one after the other; ``.jsonl`` files line by line.

    Args:
        key: the config's key that named the files, for errors.
        paths: the files.
        text_key: where a line of a ``.jsonl`` file keeps its text.

    Raises:
        ConfigError: a file cannot be read, or a line holds no such text.
    """
    for path in paths:
        if path.suffix == ".jsonl":
            yield from _read_lines(key, path, text_key)
        else:
            yield Text(read_bytes(key, path), key, path)


def _read_lines(key: str, path: Path, text_key: str) -> Iterator[Text]:
    with reading(key, path):
        file = path.open("rb")
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Text(_text_of(line, number, key, path, text_key), key, path, number)


def _text_of(line: bytes, number: int, key: str, path: Path, text_key: str) -> bytes:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        remedy = "Write one JSON object per line, or remove the line."
        raise ConfigError(key, str(path), f"has no JSON on line {number} ({error})", remedy) from None
    text = value.get(text_key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        known = f" (its keys are {', '.join(map(str, list(value)[:8]))})" if isinstance(value, dict) else ""
        problem = f"finds no text on line {number} of {path}{known}"
        raise ConfigError("text_key", text_key, problem, "Set text_key to the key that holds the text.")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        remedy = "Write whole characters: both halves of a surrogate pair, or neither."
        raise ConfigError(key, str(path), f"has half a character on line {number}", remedy) from None
