"""Cuts a token stream into rows of S positions."""

from __future__ import annotations

import numpy as np
import torch

from moedist.config import ConfigError
from moedist.data.contract import Documents
from moedist.model.batch import IGNORE, TokenBatch


class PackedStream:
    """The samples of one split: sample ``i`` reads tokens ``i * S`` to ``(i + 1) * S`` inclusive.

    The S tokens from ``i * S`` on are inputs, and each one's target is the token after it; so every token of the stream
    but the first is a target exactly once, and every one but the last an input once. The last sample may be short: it
    is padded at its end.

    With ``cross_documents`` the stream is one text: positions count from the row's start, and every target counts.
    Without it, each row's documents stand alone: positions begin again at 0 with each document (and with the row: a
    document that began in an earlier row goes on at position 0), and the last token of a document has no target, since
    nothing in the document says how the next one begins. Such a position still passes through the model (it is valid).

    Args:
        documents: the stream.
        sequence_length: S.
        vocab_size: ids are checked against it as they are read.
        cross_documents: see above.
    """

    def __init__(self, documents: Documents, sequence_length: int, vocab_size: int, cross_documents: bool):
        self.sequence_length, self.vocab_size, self.cross_documents = sequence_length, vocab_size, cross_documents
        self.documents = documents
        self._num_tokens = documents.num_tokens
        # A plain view of a memory map: slicing np.memmap itself costs microseconds each time.
        self._parts = [part.view(np.ndarray) for part in documents.parts if len(part)]
        self._part_end = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    @property
    def num_full(self) -> int:
        """Samples without padding."""
        return max(0, self._num_tokens - 1) // self.sequence_length

    @property
    def num_samples(self) -> int:
        """Samples with at least one position."""
        return -(-max(0, self._num_tokens - 1) // self.sequence_length)

    def batch(self, sample_B: np.ndarray, order_B: np.ndarray) -> TokenBatch:
        """The rows of some samples; a sample at or past `num_samples` is all padding.

        Args:
            sample_B: int64 numbers of samples in the stream.
            order_B: int64 their places in the order of the run.

        Raises:
            ConfigError: an id outside the vocabulary, with its place in the stream.
        """
        S = self.sequence_length
        start_B = np.asarray(sample_B, np.int64) * S
        token_BX, length_B = self._read(start_B, S + 1)
        place_S = np.arange(S)
        valid_BS = place_S < np.maximum(length_B - 1, 0)[:, None]
        target_BS = np.where(valid_BS, token_BX[:, 1:], IGNORE)
        document_BS, position_BS = None, np.broadcast_to(place_S, valid_BS.shape).copy()
        if not self.cross_documents:
            begins_BX = self._begins(token_BX, start_B, length_B)
            target_BS[begins_BX[:, 1:]] = IGNORE
            begins_BS = begins_BX[:, :-1]
            if begins_BS.any():
                document_BS = np.cumsum(begins_BS, axis=1, dtype=np.int64)
                position_BS -= np.maximum.accumulate(np.where(begins_BS, place_S, 0), axis=1)
        return TokenBatch(
            token_BS=torch.from_numpy(np.ascontiguousarray(token_BX[:, :-1])),
            target_BS=torch.from_numpy(target_BS),
            position_BS=torch.from_numpy(position_BS),
            document_BS=None if document_BS is None else torch.from_numpy(document_BS),
            valid_BS=torch.from_numpy(valid_BS),
            sample_B=torch.from_numpy(np.array(order_B, np.int64)),
        )

    def _read(self, start_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 tokens ``[B, length]``, 0 past the end of the stream, and how many of each row are real."""
        length_B = np.clip(self._num_tokens - start_B, 0, length)
        token_BX = np.zeros((len(start_B), length), np.int64)
        for row_X, start, count in zip(token_BX, start_B.tolist(), length_B.tolist(), strict=True):
            self._copy(row_X[:count], start)
        outside_BX = (token_BX < 0) | (token_BX >= self.vocab_size)
        if outside_BX.any():
            row, column = np.argwhere(outside_BX)[0]
            problem = (
                f"does not hold token id {token_BX[row, column]}, at position {start_B[row] + column} of the stream"
            )
            remedy = "Set data.vocab_size above the tokenizer's largest id, or make the token files again."
            raise ConfigError("data.vocab_size", self.vocab_size, problem, remedy)
        return token_BX, length_B

    def _copy(self, row_X: np.ndarray, start: int) -> None:
        done = 0
        while done < len(row_X):
            number = int(np.searchsorted(self._part_end, start + done, side="right"))
            part = self._parts[number]
            offset = start + done - (int(self._part_end[number]) - len(part))
            piece = part[offset : offset + len(row_X) - done]
            row_X[done : done + len(piece)] = piece
            done += len(piece)

    def _begins(self, token_BX: np.ndarray, start_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """Where in a row, past its first position, a document begins; never in padding."""
        begins_BX = np.zeros(token_BX.shape, bool)
        if self.documents.start_G is not None:
            start_G = self.documents.start_G
            # Few documents begin in a row, and finding them costs two searches per row.
            low_B = np.searchsorted(start_G, start_B, side="right")
            high_B = np.searchsorted(start_G, start_B + length_B, side="left")
            for row, (low, high) in enumerate(zip(low_B.tolist(), high_B.tolist(), strict=True)):
                begins_BX[row, start_G[low:high] - start_B[row]] = True
        elif self.documents.end_id is not None:
            begins_BX[:, 1:] = token_BX[:, :-1] == self.documents.end_id
            begins_BX &= np.arange(token_BX.shape[1]) < length_B[:, None]
        return begins_BX
