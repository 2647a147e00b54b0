"""What a vocabulary id says, and the class of text that it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moedist.data.contract import DataConfig, Source
from moedist.data.corpus import BYTE_END_ID
from moedist.data.text import TextConfig
from moedist.data.tokenizer import open_tokenizer

CLASSES = (
    "lower case",
    "upper case",
    "digits",
    "space",
    "line break",
    "brackets",
    "other punctuation",
    "beyond ASCII",
    "control",
    "end of document",
    "ids",
)
"""Classes of tokens; one of several letters belongs to that of its first that is no space."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a run.

    Attributes:
        texts: what each id says; for people.
        class_V: int64, the place in `CLASSES` of each id.
    """

    texts: Sequence[str]
    class_V: np.ndarray

    def by_class(self, pair_VE: np.ndarray) -> np.ndarray:
        """[C, E]: pairs of ids added up by their classes."""
        pair_CE = np.zeros((len(CLASSES), pair_VE.shape[1]), np.int64)
        np.add.at(pair_CE, self.class_V, pair_VE)
        return pair_CE


def read_vocabulary(config: DataConfig, source: Source) -> Vocabulary:
    """The tokens of an opened corpus: bytes, a tokenizer's, or numbers where nothing says what ids mean."""
    if source.byte_level:
        pairs = [_of_byte(value) for value in range(source.vocab_size)]
    elif isinstance(config, TextConfig) and config.tokenizer is not None:
        tokenizer = open_tokenizer(config.tokenizer, config.eod_id)
        texts = [tokenizer.text_of(value) for value in range(source.vocab_size)]
        pairs = [(text, _class_of(text)) for text in texts]
        pairs[tokenizer.end_id] = (texts[tokenizer.end_id], "end of document")
    else:
        pairs = [(f"{value} ", "ids") for value in range(source.vocab_size)]
    return Vocabulary([text for text, _ in pairs], np.array([CLASSES.index(name) for _, name in pairs], np.int64))


def _of_byte(value: int) -> tuple[str, str]:
    """Bytes beyond ASCII are parts of letters and stand in hexadecimal."""
    if value >= BYTE_END_ID:
        return "", "end of document"
    if value >= 128:
        return f"{value:02x}", "beyond ASCII"
    return chr(value), _class_of(chr(value))


def _class_of(text: str) -> str:
    if "\n" in text or "\r" in text:
        return "line break"
    letter = text.strip(" \t")[:1]
    if not letter:
        return "space" if text else "control"
    if not letter.isascii():
        return "beyond ASCII"
    if letter.isalpha():
        return "lower case" if letter.islower() else "upper case"
    if letter.isdigit():
        return "digits"
    if letter in "()[]{}<>":
        return "brackets"
    return "other punctuation" if letter.isprintable() else "control"
