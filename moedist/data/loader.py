"""Which rank reads which rows, and when. Its whole state is (seed, next sample)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from torch import Tensor

from moedist.data.contract import Source, Split
from moedist.data.order import shuffled
from moedist.data.packing import PackedStream
from moedist.model.batch import TokenBatch

VALID_SEED = 0


class Loader(Iterator[list[TokenBatch]]):
    """This rank's micro-batches, one list of ``accumulation`` per step.

    A step takes the next G = ``world_size * accumulation * micro_batch`` samples of the run's order. Micro-batch
    number ``c = a * world_size + rank`` (``a`` = place in the list) takes rows ``c * micro_batch`` to
    ``(c + 1) * micro_batch`` of them. So fewer ranks with more accumulation see the very same micro-batches, and a run
    that stops at sample n and goes on at ``start_sample=n`` sees what it would have seen, at any number of ranks.

    ``train`` never ends: each epoch is a shuffle of all full samples by (seed, epoch); the last tokens of the stream,
    fewer than S + 1, are left out. ``valid`` runs once through the held-out part, the last short sample included: every
    target counts exactly once, and every rank gets the same number of steps, those past the end being padding. Its
    order is one fixed shuffle, so that its first steps stand for the whole.

    The next step is built in a thread while this one is used; `next_sample` counts what was taken, not what was built.

    Args:
        source: the opened corpus.
        split: ``train`` or ``valid``.
        sequence_length: S, positions per row.
        micro_batch: B, rows per micro-batch.
        seed: of the order; no effect on ``valid``.
        rank: this rank's place among those that read different data.
        world_size: how many there are.
        accumulation: micro-batches per rank and step.
        cross_documents: see `moedist.data.packing.PackedStream`.
        start_sample: samples of the order that were already taken.
        pin_memory: whether batches lie in pinned memory, so that copies to CUDA run beside the host.
    """

    def __init__(
        self,
        source: Source,
        split: Split,
        *,
        sequence_length: int,
        micro_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        cross_documents: bool = False,
        start_sample: int = 0,
        pin_memory: bool = False,
    ):
        assert 0 <= rank < world_size and micro_batch >= 1 and accumulation >= 1 and start_sample >= 0
        self.split, self.seed, self.next_sample = split, seed, start_sample
        self._stream = PackedStream(source.documents(split), sequence_length, source.vocab_size, cross_documents)
        self._micro_batch, self._pin_memory = micro_batch, pin_memory
        self._chunks = [a * world_size + rank for a in range(accumulation)]
        self.step_samples = world_size * accumulation * micro_batch
        """G: samples that one step takes over all ranks."""
        # The executor's thread ends with the loader: it holds no reference to it, only to the step being built.
        self._builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"data-{split}")
        self._ahead: Future[list[TokenBatch]] | None = None

    @property
    def num_samples(self) -> int:
        """Samples per epoch: full ones in training, all in validation."""
        return self._stream.num_full if self.split == "train" else self._stream.num_samples

    def __len__(self) -> int:
        """Steps of one pass from the start: whole ones in training, all in validation."""
        steps, rest = divmod(self.num_samples, self.step_samples)
        return steps + (1 if rest and self.split == "valid" else 0)

    def __next__(self) -> list[TokenBatch]:
        """The next step's micro-batches, in the order in which they are to be used."""
        if self.num_samples == 0 or (self.split == "valid" and self.next_sample >= self.num_samples):
            raise StopIteration
        building = self._ahead or self._builder.submit(self._build, self.next_sample)
        self._ahead = None
        batches = building.result()
        self.next_sample += self.step_samples
        self._ahead = self._builder.submit(self._build, self.next_sample)
        return batches

    def _build(self, first_sample: int) -> list[TokenBatch]:
        return [self._micro_batch_of(first_sample + chunk * self._micro_batch) for chunk in self._chunks]

    def _micro_batch_of(self, first: int) -> TokenBatch:
        order_B = np.arange(first, first + self._micro_batch, dtype=np.int64)
        if self.split == "train":
            sample_B = shuffled(order_B, self.num_samples, self.seed)
        else:  # places past the end stay there: they are padding
            inside_B = np.minimum(order_B, self.num_samples - 1)
            sample_B = np.where(order_B == inside_B, shuffled(inside_B, self.num_samples, VALID_SEED), order_B)
        batch = self._stream.batch(sample_B, order_B)
        return _pinned(batch) if self._pin_memory else batch


def _pinned(batch: TokenBatch) -> TokenBatch:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return TokenBatch(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in fields.items()})
