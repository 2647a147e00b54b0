"""From text to ids: bytes as they are, or a tokenizer file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from moedist.config import ConfigError, require
from moedist.data.corpus import BYTE_END_ID, BYTE_VOCAB_SIZE, encode_bytes
from moedist.data.paths import as_path, read_bytes
from moedist.data.texts import Text

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names under which tokenizers keep the token that ends a document, in the order in which they are looked for."""

BATCH = 512
"""Texts that a tokenizer file encodes at once, on all cores."""


class Tokenizer(Protocol):
    """Encodes texts; every document that is not empty ends with ``end_id``."""

    name: str
    vocab_size: int
    end_id: int
    byte_level: bool

    def encode(self, texts: Iterable[Text]) -> Iterator[np.ndarray]:
        """The ids of each text, in order; lazily."""
        ...

    def text_of(self, token: int) -> str:
        """What an id says, for people: part of a letter is the replacement character, an unused id is empty."""
        ...


def open_tokenizer(path: str | None, end_id: int | None) -> Tokenizer:
    """Bytes for None, else a Hugging Face ``tokenizers`` file (``tokenizer.json``).

    Args:
        path: the file.
        end_id: the id that ends a document; None for 256 (bytes) or the first of `END_TOKENS` that the file knows.

    Raises:
        ConfigError: the file is missing or no tokenizer, or the id that ends a document is unknown or unfit.
    """
    return ByteTokenizer(end_id) if path is None else FileTokenizer(path, end_id)


class ByteTokenizer:
    """Ids are bytes; 256 ends a document."""

    name = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    byte_level = True

    def __init__(self, end_id: int | None = None):
        require(end_id in (None, BYTE_END_ID), "eod_id", end_id, "is a byte or past 256", "Leave it out with bytes.")
        self.end_id = BYTE_END_ID

    def encode(self, texts: Iterable[Text]) -> Iterator[np.ndarray]:
        """uint16 ids of each text."""
        return (encode_bytes(text.content) for text in texts)

    def text_of(self, token: int) -> str:
        """The byte as UTF-8."""
        return bytes([token]).decode("utf-8", "replace") if token < BYTE_END_ID else ""


class FileTokenizer:
    """A ``tokenizer.json``, without what it may add, cut or fill: no special tokens, truncation or padding.

    Special tokens that stand in a text are read as plain text, so that a document cannot end itself.
    """

    byte_level = False

    def __init__(self, path: str, end_id: int | None):
        self.name = path
        self._tokenizer = _load(path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        require(len(vocabulary) > 0, "tokenizer", path, "knows no tokens", "Name a trained tokenizer file.")
        # Ids may have holes, so that the number of tokens is no bound on them.
        self.vocab_size = max(vocabulary.values()) + 1
        known = next((vocabulary[name] for name in END_TOKENS if name in vocabulary), None)
        found = known if end_id is None else end_id
        if found is None:
            problem = f"is not set, and {path} has none of the tokens {', '.join(END_TOKENS)}"
            raise ConfigError("eod_id", None, problem, "Set eod_id to the id of the token that ends a document.")
        require(
            0 <= found < self.vocab_size,
            "eod_id",
            found,
            f"is no id of {path}",
            f"Set eod_id to one of 0 to {self.vocab_size - 1}.",
        )
        self.end_id = found

    def encode(self, texts: Iterable[Text]) -> Iterator[np.ndarray]:
        """uint16 or uint32 ids of each text."""
        dtype = smallest_dtype(self.vocab_size)
        texts = iter(texts)
        while batch := list(itertools.islice(texts, BATCH)):
            decoded = [text.decode() for text in batch]
            for encoding in self._tokenizer.encode_batch(decoded, add_special_tokens=False):
                yield np.array([*encoding.ids, self.end_id] if encoding.ids else [], dtype)

    def text_of(self, token: int) -> str:
        """As the file's own decoder says it after another token: many take a space off the first one of a text."""
        once, twice = (str(self._tokenizer.decode(count * [token], skip_special_tokens=False)) for count in (1, 2))
        return twice[len(once) :]


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _load(path: str) -> Any:
    content = read_bytes("tokenizer", as_path(path))
    try:
        import tokenizers
    except ImportError:
        remedy = "Install the package 'tokenizers', or leave the key out to train on bytes."
        raise ConfigError("tokenizer", path, "needs a package that is not installed", remedy) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        remedy = "Name a tokenizer.json as the tokenizers library saves it."
        raise ConfigError("tokenizer", path, f"is not a tokenizer file ({error})", remedy) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
