from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moedist.data.contract import Documents
from moedist.data.loader import Loader
from moedist.model.batch import IGNORE, TokenBatch
from tests.data.corpora import counting, source_of

S = 4


def train(num_tokens: int = 4 * 41 + 1, **settings: int) -> Loader:
    return Loader(counting(num_tokens), "train", sequence_length=S, seed=11, **settings)


def rows(batches: list[TokenBatch]) -> list[list[list[int]]]:
    return [batch.token_BS.tolist() for batch in batches]


def micro_batches(num_steps: int, world_size: int, accumulation: int, start_sample: int = 0) -> list[list[list[int]]]:
    """Micro-batches of all ranks, in the order of their numbers."""
    loaders = [
        train(micro_batch=2, rank=r, world_size=world_size, accumulation=accumulation, start_sample=start_sample)
        for r in range(world_size)
    ]
    found = []
    for _ in range(num_steps):
        by_rank = [next(loader) for loader in loaders]
        found += [by_rank[c % world_size][c // world_size] for c in range(world_size * accumulation)]
    return rows(found)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_same_micro_batches_at_any_number_of_ranks(world_size: int, accumulation: int) -> None:
    assert micro_batches(15, world_size, accumulation) == micro_batches(60, 1, 1)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("stop_after", [1, 4, 5, 6, 23])
def test_resume_is_exact_at_another_number_of_ranks(world_size: int, accumulation: int, stop_after: int) -> None:
    """41 samples per epoch and 8 per step: a stop inside, at and past the end of an epoch."""
    first = train(micro_batch=2, world_size=1, accumulation=4)
    for _ in range(stop_after):
        next(first)
    resumed = micro_batches(7, world_size, accumulation, start_sample=first.next_sample)
    assert resumed == micro_batches(stop_after + 7, 1, 4)[4 * stop_after :]


def test_state_is_what_was_taken_not_what_was_built() -> None:
    loader = train(micro_batch=2, accumulation=3)
    assert loader.next_sample == 0
    next(loader)
    assert loader.next_sample == loader.step_samples == 6


def test_an_epoch_has_every_full_sample_once_and_the_next_another_order() -> None:
    loader = train(num_tokens=4 * 41 + 3, micro_batch=1)
    starts = [next(loader)[0].token_BS[0, 0].item() for _ in range(82)]
    assert sorted(starts[:41]) == sorted(starts[41:]) == list(range(0, 4 * 41, 4))
    assert starts[:41] != starts[41:]


def test_targets_are_the_next_tokens() -> None:
    (batch,) = next(train(micro_batch=8))
    assert torch.equal(batch.target_BS, batch.token_BS + 1)
    assert batch.valid_BS.all() and batch.document_BS is None


def test_sample_numbers_do_not_depend_on_the_ranks() -> None:
    by_rank = [next(train(micro_batch=2, rank=r, world_size=2, start_sample=100)) for r in range(2)]
    assert [batch.sample_B.tolist() for (batch,) in by_rank] == [[100, 101], [102, 103]]


def test_length_of_an_epoch_in_whole_steps() -> None:
    assert len(train(micro_batch=2, world_size=2)) == 41 // 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_tokens", [2, 5, 6, 33, 34, 50])
def test_evaluation_counts_every_target_once_on_equal_numbers_of_steps(world_size: int, num_tokens: int) -> None:
    taken = []
    for rank in range(world_size):
        loader = Loader(
            counting(num_tokens), "valid", sequence_length=S, micro_batch=2, rank=rank, world_size=world_size
        )
        taken.append(list(itertools.chain.from_iterable(loader)))
        assert len(taken[-1]) == len(loader)
    assert len({len(batches) for batches in taken}) == 1
    target_N = torch.cat([batch.target_BS[batch.target_BS != IGNORE] for batches in taken for batch in batches])
    assert sorted(target_N.tolist()) == list(range(1, num_tokens))
    assert sum(int(batch.num_tokens()) for batches in taken for batch in batches) == num_tokens - 1


def test_evaluation_ends_and_stays_ended() -> None:
    loader = Loader(counting(9), "valid", sequence_length=S, micro_batch=2)
    assert len(list(loader)) == 1 and list(loader) == []


def test_nothing_held_out_is_no_steps() -> None:
    assert list(Loader(source_of(counting(9).train), "valid", sequence_length=S, micro_batch=2)) == []


def test_too_short_to_train_on_ends_at_once_rather_than_spin() -> None:
    assert list(train(num_tokens=S, micro_batch=1)) == []


def test_an_error_in_the_thread_reaches_the_reader() -> None:
    bad = source_of(Documents((np.full(100, 5000, np.uint16),)), vocab_size=1000)
    with pytest.raises(ValueError, match="5000"):
        next(Loader(bad, "train", sequence_length=S, micro_batch=2))


def test_documents_are_kept_apart_or_not() -> None:
    stream = Documents((np.arange(100, dtype=np.uint16),), start_G=np.arange(0, 100, 3))
    options = {"sequence_length": S, "micro_batch": 2}
    (apart,) = next(Loader(source_of(stream), "train", **options))
    (crossing,) = next(Loader(source_of(stream), "train", cross_documents=True, **options))
    assert apart.document_BS is not None and (apart.target_BS == IGNORE).any()
    assert crossing.document_BS is None and not (crossing.target_BS == IGNORE).any()


def test_first_steps_of_an_evaluation_stand_for_the_whole_and_are_always_the_same() -> None:
    def first_samples() -> list[int]:
        loader = Loader(counting(2000), "valid", sequence_length=S, micro_batch=8)
        return [int(token) // S for token in next(loader)[0].token_BS[:, 0]]

    samples = first_samples()
    assert samples == first_samples()
    assert max(samples) - min(samples) > 2000 // S // 2, "a run of neighbours says little of the rest"
