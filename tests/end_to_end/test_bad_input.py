"""Bad input to the real command: a message with key, value and remedy, an exit code, and nothing touched."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from moedist.cli.main import main
from moedist.launch import start
from moedist.launch.compose import compose
from moedist.launch.folder import claim_folder
from moedist.launch.saved import decode_saved, read_mapping
from moedist.launch.validate import validate
from moedist.train.checkpoint.manifest import Manifest
from moedist.train.run import run_rank
from tests.ranks import Here
from tests.train.tiny import no_measuring

SMALL = (
    "experiment=null",
    "mesh.device=cpu",
    "launch.nproc=4",
    "train.sequence_length=16",
    "train.micro_batch=2",
    "model.dim=16",
)
SYNTHETIC = ("data=synthetic", "data.num_tokens=20000")

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this is known before a rank starts."""

    def run_ranks(*args: object, **kwargs: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr(start, "run_ranks", run_ranks)


def refused(capsys: Output, *argv: str) -> str:
    """What people are told; exit code 2."""
    data = [] if any(word.startswith("data=") for word in argv) else SYNTHETIC
    assert main(["train", *SMALL, *data, *argv]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.out == ""
    return said.err


@pytest.mark.parametrize(
    ("overrides", "value", "remedy"),
    [
        (["moe.num_experts=6", "mesh.ep=4"], "moe.num_experts = 6", "multiple of 4"),
        (["moe.router.top_k=9"], "moe.router.top_k = 9", "Set moe.router.top_k to 8 or less"),
        (["moe.capacity.factor=-1.25"], "moe.capacity.factor = -1.25", "Set it above 0"),
        (["moe.capcity.factor=1"], "moe.capcity", "Did you mean moe.capacity"),
        (["train.steps=many"], "train.steps = 'many'", "Set it to a whole number"),
        (["mesh.ep=3"], "mesh.ep = 3", "Set mesh.ep to 1, 2 or 4"),
        (["moe/router=topkk"], "topkk", "topk"),
        (["train.global_batch_tokens=100"], "train.global_batch_tokens = 100", "128"),
        (["model.attention.num_heads=3"], "model.attention.num_heads = 3", "1, 2, 4"),
        (["data=text", "data.files=/nowhere/*.txt"], "/nowhere/*.txt", "data.files"),
        (["data=text"], "data.files = []", "files, globs or folders"),
        (["data.num_tokens=50"], "train.sequence_length", "Set"),
        (["run.resume=/nowhere/run"], "run.resume = '/nowhere/run'", "Name"),
        (["plugins=[nowhere_at_all]"], "nowhere_at_all", "Install the package"),
    ],
)
def test_each_mistake_is_told_with_key_value_and_remedy(
    tmp_path: Path, capsys: Output, overrides: list[str], value: str, remedy: str
):
    said = refused(capsys, f"run.dir={tmp_path / 'run'}", *overrides)
    assert value in said and remedy in said
    assert not (tmp_path / "run").exists()


def test_an_empty_file_is_told_by_its_name(tmp_path: Path, capsys: Output):
    (tmp_path / "text.txt").touch()
    said = refused(capsys, "data=text", f"data.files={tmp_path / 'text.txt'}", f"run.dir={tmp_path / 'run'}")
    assert "text.txt" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "key"),
    [("model.dim=32", "model.dim"), ("moe.num_experts=16", "moe.num_experts"), ("data.num_tokens=30000", "data")],
)
def test_a_run_of_another_model_or_corpus_is_not_gone_on_with(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, override: str, key: str
):
    class Started(Exception):
        pass

    def run_ranks(*args: object, **kwargs: object) -> None:
        raise Started

    run = [*SMALL, *SYNTHETIC, f"run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(start, "run_ranks", run_ranks)
        with pytest.raises(Started):
            main(["train", *run])
    capsys.readouterr()
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir()
    (tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json").touch()
    before = hashes(tmp_path / "run")
    said = refused(capsys, *run, "run.resume=auto", override)
    assert key in said and override.partition("=")[2] in said and "run.allow_changes=" in said
    branch = tmp_path / "branch"
    assert key in refused(capsys, *SMALL, f"run.dir={branch}", f"run.resume={tmp_path / 'run'}", override)
    assert "run.resume=auto" in refused(capsys, *run, override), "an existing run folder is never reused silently"
    assert hashes(tmp_path / "run") == before and not branch.exists()


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Resuming from a checkpoint


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("finished")
    config = compose([*TINY_RUN, f"run.dir={folder}"])
    claim_folder(config.config.run, config.mapping).release()
    assert ranks(2).run(train, folder) == [0, 0]
    return folder


TINY_RUN = (*SMALL, *SYNTHETIC, "launch.nproc=2", "mesh.ep=2", "train.steps=2", "train.checkpoint_every=1")
TINY_RUN += ("model.layers.num_layers=2", "train.eval_every=null", "log/sink=[jsonl]")


def train(here: Here, folder: Path) -> int:
    config = decode_saved(read_mapping(folder / "config.yaml"))
    with no_measuring():
        return run_rank(config, folder, here.mesh_of(config.mesh.ep))


def damage(what: str) -> Callable[[Path], object]:
    def apply(step: Path) -> object:
        shard, manifest = step / "__1_0.distcp", step / "manifest.json"
        if what == "missing":
            return shard.unlink()
        if what == "truncated":
            return os.truncate(shard, 100)
        whole = Manifest.parse(manifest.read_text())
        with mock.patch("moedist.train.checkpoint.manifest.SCHEMA", 99):
            return manifest.write_text(whole.render())

    return apply


BAD = {
    "missing": "__1_0.distcp cannot be read: No such file",
    "truncated": "__1_0.distcp has 100 bytes instead of ",
    "newer": "schema 99 is not 1, the one that this version reads; a newer moedist wrote it",
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_told_before_a_rank_starts(finished: Path, tmp_path: Path, capsys: Output, what: str):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    older, newer = sorted((run / "checkpoints").glob("step_*"))
    damage(what)(newer)
    before = hashes(run)
    for resume in ([f"run.resume={newer}"], [f"run.resume={newer}", "train.steps=9"]):
        said = refused(capsys, *TINY_RUN, f"run.dir={tmp_path / 'branch'}", *resume)
        assert f"run.resume = '{newer}' cannot go on" in said and BAD[what] in said and "checkpoint verify" in said
    if what == "newer":  # a run that went on from the one before would replace it
        said = refused(capsys, *TINY_RUN, f"run.dir={tmp_path / 'branch'}", f"run.resume={run}")
        assert BAD[what] in said and str(newer) in said
    else:
        goes_on(*TINY_RUN, f"run.dir={run}", "run.resume=auto")  # from the one before
        damage(what)(older)
    said = refused(capsys, *TINY_RUN, f"run.dir={run}", "run.resume=auto")
    assert BAD[what] in said and str(newer) in said and (what == "newer" or str(older) in said)
    damaged = {str(step / name) for step in (older, newer) for name in ("__1_0.distcp", "manifest.json")}
    assert {key: value for key, value in hashes(run).items() if key not in damaged} == {
        key: value for key, value in before.items() if key not in damaged
    }
    assert not (tmp_path / "branch").exists()


def goes_on(*argv: str) -> None:
    composed = compose(argv)
    validate(composed.config, composed.mapping, 2)


def test_a_checkpoint_of_another_model_is_told_by_its_tensors(finished: Path, tmp_path: Path, capsys: Output):
    """The key is allowed to differ, or the checkpoint lies apart from its run: what remains is what it holds."""
    lone = tmp_path / "lone"
    shutil.copytree(sorted((finished / "checkpoints").glob("step_*"))[0], lone)
    before = hashes(lone)
    branch = f"run.dir={tmp_path / 'branch'}"
    said = refused(capsys, *TINY_RUN, branch, f"run.resume={lone}", "model.dim=32", "seed=9")
    assert f"model.dim = 32 differs from the run in {lone}, which has 16" in said and "seed = 9 differs" in said
    allowed = "run.allow_changes=[model.dim,moe.experts,train.precision]"
    for override, words in (
        ("model.dim=32", "model.blocks.0.attention.key.weight [16, 16] float32, here [32, 32] float32"),
        ("moe.experts.activation=gelu", "Only in the checkpoint: model.blocks.0.ffn.moe.bank.experts.gate"),
        ("train.precision=fp64", "[16, 16] float32, here [16, 16] float64"),
    ):
        said = refused(capsys, *TINY_RUN, branch, f"run.resume={lone}", allowed, override)
        assert f"run.resume = '{lone}' cannot go on" in said and "is of another model" in said and words in said
    goes_on(*TINY_RUN, branch, f"run.resume={lone}")
    assert hashes(lone) == before and not (tmp_path / "branch").exists()


@pytest.mark.parametrize("ep", [3, 16])
def test_ranks_that_cannot_hold_the_experts_are_told(finished: Path, tmp_path: Path, capsys: Output, ep: int):
    before = hashes(finished)
    layout = [f"mesh.ep={ep}", f"launch.nproc={ep}", f"run.dir={tmp_path / 'branch'}"]
    said = refused(capsys, *TINY_RUN, *layout, f"run.resume={finished}")
    assert "moe.num_experts = 8" in said and f"mesh.ep = {ep}" in said
    assert hashes(finished) == before and not (tmp_path / "branch").exists()
