"""Twenty steps of the real trainer: the same at every layout, the same twice, the same after a stop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moedist.config import to_mapping
from moedist.data.loader import Loader
from moedist.launch.folder import claim_folder
from moedist.model.batch import TokenBatch
from moedist.train.checkpoint import read_meta
from moedist.train.checkpoint.manifest import folder_name
from moedist.train.config import RunConfig
from moedist.train.run import run_rank
from moedist.train.status import read_status
from moedist.train.trainer import Totals, Trainer
from tests.ranks import Here
from tests.train.tiny import CONFIG, ROWS, changed, digest_of, in_folder, no_measuring, rows_of

STEPS = 20


def train(here: Here, config: RunConfig, stop_at: int | None = None) -> tuple[int, list[list[int]]]:
    """A run as a rank sees it; rank 1 alone is told to stop after step ``stop_at``.

    Returns:
        The exit code, and the samples that this rank took in each step.
    """
    taken: list[list[int]] = []
    with told_to_stop(stop_at if here.rank == 1 else None), noted(taken), no_measuring():
        exit_code = run_rank(config, Path(config.run.dir or ""), here.mesh_of(config.mesh.ep))
    return exit_code, taken


@contextlib.contextmanager
def told_to_stop(at: int | None) -> Iterator[None]:
    """SIGTERM to this process before the step after ``at``."""
    real = Trainer.step

    def step(self: Trainer, loader: Loader) -> bool:
        if self.progress.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, loader)

    with mock.patch.object(Trainer, "step", step):
        yield


@contextlib.contextmanager
def noted(taken: list[list[int]]) -> Iterator[None]:
    """Notes the samples of every step that is taken."""
    real = Trainer.agree

    def agree(self: Trainer, micro_batches: list[TokenBatch]) -> Totals:
        totals = real(self, micro_batches)
        if not totals.stop:
            taken.append([sample for batch in micro_batches for sample in batch.sample_B.tolist()])
        return totals

    with mock.patch.object(Trainer, "agree", agree):
        yield


def run(ranks: Any, world: int, config: RunConfig, stop_at: int | None = None) -> list[list[int]]:
    """Runs on ``world`` ranks; returns the samples of each step, in order."""
    claim = claim_folder(config.run, to_mapping(config))
    try:
        results = ranks(world).run(train, config, stop_at)
    finally:
        claim.release()
    assert {exit_code for exit_code, _ in results} == {0 if stop_at is None else 75}, read_status(claim.path)
    return [sorted(sum(parts, [])) for parts in zip(*(taken for _, taken in results), strict=True)]


def values(folder: Path, key: str) -> list[float]:
    rows = rows_of(folder)
    return [rows[step][key] for step in sorted(rows)]


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The uninterrupted runs of 4 ranks by (precision, ep): folder, and samples of each step."""
    runs = {}
    for precision in ("fp64", "fp32"):
        for ep in (1, 2, 4):
            folder = tmp_path_factory.mktemp(f"{precision}-{ep}")
            config = in_folder(changed(CONFIG, train={"precision": precision}), folder, ep)
            runs[precision, ep] = (folder, run(ranks, 4, config))
    return runs


FP32 = changed(CONFIG, train={"precision": "fp32"})


@pytest.fixture(scope="module")
def pair(ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """The uninterrupted run of 2 ranks in fp32, which those that stop and go on are held to."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, run(ranks, 2, in_folder(FP32, folder, 2))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_expert_parallelism_changes_nothing(whole, precision: str, tolerance: float):
    folder, samples = whole[precision, 1]
    losses, norms = values(folder, "train/loss"), values(folder, "train/grad_norm")
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert sum(norm > CONFIG.train.clip_norm for norm in norms) >= 5, "the clip must be active"
    assert min(values(folder, "moe/drop_rate")) > 0, "the runs must drop pairs"
    for ep in (2, 4):
        other, other_samples = whole[precision, ep]
        assert other_samples == samples
        assert values(other, "train/loss") == pytest.approx(losses, rel=0, abs=tolerance)
        assert values(other, "train/grad_norm") == pytest.approx(norms, rel=tolerance, abs=tolerance)
        assert values(other, "moe/balance_loss") == pytest.approx(
            values(folder, "moe/balance_loss"), rel=0, abs=tolerance
        )


def test_every_sample_once_an_epoch(whole):
    _, samples = whole["fp64", 2]
    per_epoch = (CONFIG.data.num_tokens - 1) // CONFIG.train.sequence_length
    taken = [sample for step in samples for sample in step]
    assert all(len(step) == 4 * ROWS for step in samples) and len(taken) > per_epoch
    assert sorted(taken[:per_epoch]) == list(range(per_epoch)), "an epoch must hold every sample once"


def test_the_same_run_twice_is_bitwise_equal(ranks, whole, pair, tmp_path: Path):
    last = Path("checkpoints", folder_name(STEPS))
    folder, _ = pair
    run(ranks, 2, in_folder(FP32, tmp_path, 2))
    assert rows_of(tmp_path) == rows_of(folder)
    assert digest_of(FP32, tmp_path / last) == digest_of(FP32, folder / last)
    assert digest_of(FP32, whole["fp32", 1][0] / last) != digest_of(FP32, whole["fp32", 2][0] / last), "it sees bits"


@pytest.mark.parametrize("stop_at", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 12))])
def test_a_stop_and_a_resume_are_bitwise_equal(ranks, pair, tmp_path: Path, stop_at: int):
    """Log every 6 steps: the log says what it would have said, and no record stands for the step of the stop."""
    folder, samples = pair
    config = changed(FP32, train={"log_every": 6})
    first = run(ranks, 2, in_folder(config, tmp_path, 2), stop_at)
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == folder_name(stop_at)
    meta = read_meta(tmp_path / "checkpoints" / folder_name(stop_at))
    assert (meta["step"], meta["next_sample"]) == (stop_at, stop_at * 2 * ROWS)
    second = run(ranks, 2, in_folder(config, tmp_path, 2, resume="auto"))
    assert [*first, *second] == samples
    expected = {step: row for step, row in rows_of(folder).items() if step in (6, 12, 18, 20)}
    assert rows_of(tmp_path) == expected
    last = Path("checkpoints", folder_name(STEPS))
    assert digest_of(config, tmp_path / last) == digest_of(config, folder / last)
    assert read_meta(tmp_path / last)["run_id"] == meta["run_id"]


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp64", 1e-12), pytest.param("fp32", 1e-5, marks=pytest.mark.slow)]
)
def test_a_resume_at_other_layouts(ranks, whole, tmp_path: Path, precision: str, tolerance: float):
    """EP 4 -> 2 -> 1, then two ranks with twice the accumulation, which keeps the cut into capacity groups."""
    config = changed(CONFIG, train={"precision": precision, "global_batch_tokens": 128})
    samples = run(ranks, 4, in_folder(config, tmp_path, 4), stop_at=4)
    samples += run(ranks, 4, in_folder(config, tmp_path, 2, "auto"), stop_at=9)
    samples += run(ranks, 4, in_folder(config, tmp_path, 1, "auto"), stop_at=13)
    samples += run(ranks, 2, in_folder(config, tmp_path, 2, "auto"))
    folder, expected = whole[precision, 4]
    assert samples == expected
    for key in ("train/loss", "moe/balance_loss", "train/grad_norm"):
        assert values(tmp_path, key) == pytest.approx(values(folder, key), rel=tolerance, abs=tolerance)
    assert values(tmp_path, "moe/layer_01/kept") == values(folder, "moe/layer_01/kept")


def test_a_branch_of_another_run_gets_a_name_of_its_own(ranks, pair, tmp_path: Path):
    """run.resume=PATH: goes on from the checkpoint in a folder of its own, and leaves the other run as it is."""
    source, branch = tmp_path / "source", tmp_path / "branch"
    run(ranks, 2, in_folder(FP32, source, 2), stop_at=12)
    before = sorted(path.name for path in source.rglob("*"))
    run(ranks, 2, in_folder(FP32, branch, 2, resume=str(source)))
    folder, _ = pair
    assert rows_of(branch) == {step: row for step, row in rows_of(folder).items() if step > 12}
    assert sorted(path.name for path in source.rglob("*")) == before
    ends = (source / "checkpoints" / folder_name(12), branch / "checkpoints" / folder_name(STEPS))
    assert len({read_meta(path)["run_id"] for path in ends}) == 2
