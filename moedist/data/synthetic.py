"""Made-up tokens, for benchmarks: no files, any vocabulary, the same on every machine."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from moedist.config import require
from moedist.data.contract import DataConfig, Documents, Source
from moedist.data.corpus import MemorySource
from moedist.data.order import mix
from moedist.data.tokenizer import smallest_dtype


@dataclasses.dataclass(frozen=True)
class SyntheticConfig(DataConfig):
    """Documents that count: the next id is the last one plus ``stride``, except that every so often it jumps.

    A model can learn the rule and not the jumps, so losses fall to about
    ``H(jump_rate) + jump_rate * ln(vocab_size)`` nats. The last id ends a document.

    Attributes:
        vocab_size: number of ids.
        num_tokens: length of the training part; a twentieth of it more is held out.
        document_length: mean length of a document; lengths vary geometrically.
        jump_rate: probability that an id is drawn afresh, uniformly.
        stride: the step of the rule, modulo the ids that are not the last.
        seed: of the jumps and lengths.
    """

    vocab_size: int = 1024
    num_tokens: int = 1 << 20
    document_length: int = 512
    jump_rate: float = 0.1
    stride: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.vocab_size >= 3, "vocab_size", self.vocab_size, "is too small", "Set it to 3 or more.")
        require(self.num_tokens >= 40, "num_tokens", self.num_tokens, "is too small", "Set it to 40 or more.")
        length, rate = self.document_length, self.jump_rate
        require(length >= 2, "document_length", length, "is too short", "Set it to 2 or more.")
        require(0.0 <= rate <= 1.0, "jump_rate", rate, "is no probability", "Set it to 0.0 to 1.0.")

    def open(self) -> Source:
        """Makes the tokens in memory."""
        fingerprint = hashlib.sha256(repr(self).encode()).hexdigest()
        train = self._documents("train", self.num_tokens)
        valid = self._documents("valid", self.num_tokens // 20)
        description = (
            f"synthetic: {train.num_tokens} tokens to train on, {valid.num_tokens} held out, {self.vocab_size} ids, "
            f"sha256 {fingerprint[:16]}"
        )
        return MemorySource(self.vocab_size, fingerprint, False, description, train, valid)

    def _documents(self, split: str, length: int) -> Documents:
        place_N = np.arange(length, dtype=np.int64)
        ends_N = self._uniform(f"{split} ends", place_N) < 1.0 / self.document_length
        ends_N[-1] = True
        start_G = np.append(np.int64(0), np.flatnonzero(ends_N)[:-1] + 1)
        jumps_N = self._uniform(f"{split} jumps", place_N) < self.jump_rate
        jumps_N[start_G] = True
        from_N = np.maximum.accumulate(np.where(jumps_N, place_N, 0))
        num_counted = self.vocab_size - 1
        drawn_N = (self._uniform(f"{split} ids", from_N) * num_counted).astype(np.int64)
        token_N = (drawn_N + (place_N - from_N) * self.stride) % num_counted
        token_N[ends_N] = num_counted
        return Documents((token_N.astype(smallest_dtype(self.vocab_size)),), start_G=start_G)

    def _uniform(self, name: str, place_N: np.ndarray) -> np.ndarray:
        """float64 in [0, 1) at each place, a pure function of (seed, name, place)."""
        key = int.from_bytes(hashlib.blake2b(f"moedist synthetic {self.seed} {name}".encode(), digest_size=8).digest())
        # Two rounds: one alone leaves places that differ in few bits alike.
        random_N = mix(mix(place_N.astype(np.uint64) + np.uint64(key >> 1)) ^ np.uint64(key))
        return (random_N >> np.uint64(11)) * 2.0**-53
