"""Bad input to the real command: a message with key, value and remedy, an exit code, and nothing touched."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from moedist.cli.main import main
from moedist.launch import start

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
