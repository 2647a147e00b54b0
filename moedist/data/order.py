"""The order of samples as a pure function: nothing is stored, shuffled or drawn, so that any place can be resumed."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8
"""Rounds of the Feistel network: twice the four that make a pseudo-random permutation (Luby and Rackoff, 1988),
because the halves are narrow where samples are few."""


def shuffled(index_B: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Which sample stands at each place of the endless shuffled sequence.

    Index ``i`` lies in epoch ``i // num_samples``; each epoch is a permutation of all samples of its own, keyed by
    (seed, epoch). Memory and time per index don't grow with ``num_samples``.

    Args:
        index_B: int64 places in the endless sequence, 0 or more.
        num_samples: samples per epoch, 1 or more.
        seed: any integer.

    Returns:
        int64, the samples' numbers, 0 to ``num_samples - 1``.
    """
    epoch_B, place_B = np.divmod(np.asarray(index_B, np.int64), num_samples)
    sample_B = np.empty_like(place_B)
    for epoch in np.unique(epoch_B):
        chosen = epoch_B == epoch
        sample_B[chosen] = permute(place_B[chosen], num_samples, _round_keys(seed, int(epoch)))
    return sample_B


def permute(place_B: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of ``range(size)``: a Feistel network over the next power of four, walked until it falls inside
    (cycle walking, Black and Rogaway 2002), so that it is a bijection for every size.

    Args:
        place_B: int64 numbers below ``size``.
        size: how many there are.
        keys: uint64, one per round.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    value_B = _feistel(np.asarray(place_B).astype(np.uint64), half_bits, keys)
    while (outside := value_B >= size).any():
        value_B[outside] = _feistel(value_B[outside], half_bits, keys)
    return value_B.astype(np.int64)


def _feistel(value_B: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left_B, right_B = value_B >> half_bits, value_B & mask
    for key in keys:
        left_B, right_B = right_B, left_B ^ (mix(right_B ^ key) & mask)
    return (left_B << half_bits) | right_B


def mix(value_B: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), modulo 2^64."""
    value_B = (value_B ^ (value_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_B = (value_B ^ (value_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_B ^ (value_B >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"moedist order {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
