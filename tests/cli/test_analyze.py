from __future__ import annotations

import json
from pathlib import Path

import pytest

from moedist.cli.main import main
from moedist.data.text import TextConfig
from moedist.launch.analysis import decode_corpora, plan_analysis
from moedist.launch.compose import compose
from moedist.train.checkpoint.manifest import FileSeal, Manifest, folder_name, write_manifest
from moedist.train.status import Status

Output = pytest.CaptureFixture[str]


def saved_run(folder: Path, *overrides: str) -> Path:
    """A run folder with three checkpoints, the second one cut short."""
    fixed = ["experiment=null", "launch.nproc=2", "mesh.ep=2", "mesh.device=cpu", f"run.dir={folder}"]
    config = compose([*fixed, *overrides]).mapping
    for step in (3, 6, 9):
        path = folder / "checkpoints" / folder_name(step)
        path.mkdir(parents=True)
        (path / "shard").write_bytes(b"weights")
        write_manifest(path, Manifest(step, 2, {"shard": FileSeal.of(path / "shard")}, {"config": config}))
    (folder / "checkpoints" / folder_name(6) / "shard").write_bytes(b"we")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "own.txt").write_text("words and words " * 400)
    (tmp_path / "text" / "other.py").write_text("x = (1)\n" * 400)
    return saved_run(tmp_path / "run", "data=text", f"data.files={tmp_path / 'text' / 'own.txt'}")


def test_the_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output):
    calls = []

    def run_ranks(ranks, launch, run_dir, target, *, lock=None, terminal=None) -> Status:
        calls.append((run_dir, target))
        return Status("done", 0, "analyzed")

    monkeypatch.setattr("moedist.launch.start.run_ranks", run_ranks)
    corpora = ["--corpus", f"code={run.parent / 'text'}/*.py", "--corpus", f"words={run.parent / 'text' / 'own.txt'}"]
    assert main(["analyze", str(run), *corpora, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checkpoint"].endswith(folder_name(9)) and facts["compared with"] == folder_name(3)
    assert facts["corpora"] == "code, words" and not (run / "analysis").exists()
    assert main(["analyze", str(run / "checkpoints" / folder_name(3)), *corpora, "--json"]) == 0
    ((folder, target),) = calls
    assert folder.parent == run / "analysis" and folder.name.endswith(folder_name(3))
    assert target == ["moedist.train", str(folder / "config.yaml"), "--analyze", str(folder / "request.json")]
    request = json.loads((folder / "request.json").read_text())
    assert request["others"] == [str(run / "checkpoints" / folder_name(9))]
    assert list(request["corpora"]) == ["code", "words"]


def test_a_corpus_is_read_whole_and_as_the_run_was(run: Path):
    analysis = plan_analysis(run, [f"code={run.parent / 'text' / 'other.py'}"])
    assert analysis.composed.config.moe.capacity.dropless
    (corpus,) = decode_corpora(analysis.composed.mapping, analysis.corpora).values()
    assert isinstance(corpus, TextConfig) and corpus.tokenizer is None
    assert corpus.open().documents("valid").num_tokens == 8 * 400 + 1


def test_what_cannot_be_analyzed(run: Path, tmp_path: Path, capsys: Output):
    assert main(["analyze", str(run), "--corpus", "code"]) == 2
    assert "--corpus = 'code' is no name=files" in capsys.readouterr().err
    assert main(["analyze", str(run), "--corpus", "code=missing/*.py"]) == 2
    assert "--corpus code = 'missing/*.py' matches no files" in capsys.readouterr().err
    other = saved_run(tmp_path / "numbers", "data=synthetic", "data.num_tokens=5000")
    assert main(["analyze", str(other), "--corpus", "code=text"]) == 2
    assert "data=synthetic does not say how its text became tokens" in capsys.readouterr().err
    dense = ["model/ffn=dense", "model/layers=listed", "model.layers.blocks=[{}]"]
    other = saved_run(tmp_path / "dense", "data=synthetic", "data.num_tokens=5000", *dense)
    assert main(["analyze", str(other)]) == 2
    assert "is of a model without MoE layers, in which nothing is routed" in capsys.readouterr().err
