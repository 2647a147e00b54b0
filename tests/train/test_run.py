"""What a rank says of its run."""

from __future__ import annotations

from moedist.train.run import batch_note
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed


def test_another_number_of_ranks_is_another_batch():
    free, held = CONFIG.train, changed(CONFIG, train={"global_batch_tokens": 4 * ROWS * LENGTH}).train
    assert batch_note(free, 2, 2) is None and batch_note(held, 4, 2) is None
    said = batch_note(free, 4, 2)
    assert said is not None and said.startswith(f"{2 * ROWS * LENGTH} tokens per step, and {4 * ROWS * LENGTH} on")
    assert f"train.global_batch_tokens={4 * ROWS * LENGTH} with" in said
