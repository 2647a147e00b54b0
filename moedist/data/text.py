"""A user's own text files."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from moedist.config import require
from moedist.data.contract import DataConfig, Documents, Source
from moedist.data.corpus import MemorySource, concatenate, hold_out, hold_out_tail
from moedist.data.paths import as_patterns, find_files
from moedist.data.texts import read_texts
from moedist.data.tokenizer import Tokenizer, open_tokenizer


@dataclasses.dataclass(frozen=True)
class TextConfig(DataConfig):
    """Text files: each is one document, and each line of a ``.jsonl`` file is one.

    Every rank reads and encodes them into memory when the run starts; for more than a few GB, or a slow tokenizer,
    write them once with ``moedist tokenize`` and use ``data=tokens``.

    Attributes:
        files: files, globs (quoted) and folders; or one of them.
        valid_files: likewise, to be held out; empty to hold out a part of ``files``.
        tokenizer: a Hugging Face ``tokenizers`` file (``tokenizer.json``); None for bytes.
        text_key: where a line of a ``.jsonl`` file keeps its text.
        eod_id: the id that ends each document; None for 256 with bytes, else the tokenizer's own.
        holdout_every: every n-th document is held out where ``valid_files`` is empty; with fewer than n documents,
            the last n-th of the text. None to hold out nothing.
    """

    files: str | tuple[str, ...] = ()
    valid_files: str | tuple[str, ...] = ()
    tokenizer: str | None = None
    text_key: str = "text"
    eod_id: int | None = None
    holdout_every: int | None = 20

    def __post_init__(self) -> None:
        every = self.holdout_every
        require(
            every is None or every >= 2, "holdout_every", every, "leaves nothing to train on", "Set 2 or more, or null."
        )

    def open(self) -> Source:
        """Reads and encodes the files."""
        tokenizer = open_tokenizer(self.tokenizer, self.eod_id)
        documents, num_files = self._encode("files", as_patterns(self.files), tokenizer)
        if patterns := as_patterns(self.valid_files):
            held_out, _ = self._encode("valid_files", patterns, tokenizer)
            train, valid, how = concatenate(documents), concatenate(held_out), "valid_files held out"
        elif self.holdout_every is None:
            train, valid, how = concatenate(documents), concatenate([]), "nothing held out"
        elif len(documents) < self.holdout_every:
            train, valid = hold_out_tail(concatenate(documents), self.holdout_every)
            how = f"the last 1/{self.holdout_every} held out"
        else:
            train, valid = (concatenate(part) for part in hold_out(documents, self.holdout_every))
            how = f"every {self.holdout_every}th document held out"
        fingerprint = _hash_tokens(train, valid)
        description = (
            f"text: {num_files} files, {len(documents)} documents as {tokenizer.name}, {train.num_tokens} tokens to "
            f"train on, {valid.num_tokens} held out ({how}), sha256 {fingerprint[:16]}"
        )
        return MemorySource(tokenizer.vocab_size, fingerprint, tokenizer.byte_level, description, train, valid)

    def _encode(self, key: str, patterns: tuple[str, ...], tokenizer: Tokenizer) -> tuple[list[np.ndarray], int]:
        paths = find_files(key, patterns)
        documents = [ids for ids in tokenizer.encode(read_texts(key, paths, self.text_key)) if len(ids)]
        require(len(documents) > 0, key, list(patterns), "hold no text", "Name files that are not empty.")
        return documents, len(paths)


def _hash_tokens(*splits: Documents) -> str:
    digest = hashlib.sha256()
    for documents in splits:
        assert documents.start_G is not None
        digest.update(documents.num_tokens.to_bytes(8, "little") + len(documents.start_G).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(documents.start_G, "<i8").data)
        for part in documents.parts:
            digest.update(np.ascontiguousarray(part, "<u4").data)
    return digest.hexdigest()
