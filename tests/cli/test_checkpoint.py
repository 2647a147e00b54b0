"""``moedist checkpoint``: looks, verifies, rewrites; one process, whatever layout wrote the checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from moedist.cli import checkpoint as command
from moedist.cli.main import main
from moedist.config import to_mapping
from moedist.launch.folder import claim_folder
from moedist.mesh import Axis, Mesh
from moedist.train.checkpoint import CheckpointStore, verify
from moedist.train.checkpoint.manifest import folder_name, read_manifest
from moedist.train.checkpoint.safetensors import DTYPES, Entry, write_set
from moedist.train.checkpoint.saved import SavedState
from moedist.train.checkpoint.summary import fold
from moedist.train.run import run_rank
from tests.ranks import Here
from tests.train.tiny import CONFIG, changed, digest_of, in_folder, leaves, make_trainer, no_measuring, rows_of

SMALL = changed(CONFIG, train={"precision": "fp32", "steps": 8, "checkpoint_every": 4})
Output = pytest.CaptureFixture[str]


def train(here: Here, folder: Path, ep: int, resume: str = "never") -> int:
    config = in_folder(SMALL, folder, ep, resume)
    with no_measuring():
        return run_rank(config, folder, here.mesh_of(ep))


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, each with half of the experts; checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("run")
    claim_folder(in_folder(SMALL, folder, 2).run, to_mapping(in_folder(SMALL, folder, 2))).release()
    assert ranks(2).run(train, folder, 2, limit_s=300) == [0, 0]
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def checkpoint(run: Path, step: int = 8) -> Path:
    return run / "checkpoints" / folder_name(step)


def said(capsys: Output, *argv: object, code: int = 0) -> Any:
    """Standard output; of ``--json`` what it says."""
    assert main(["checkpoint", *map(str, argv)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return json.loads(captured.out) if "--json" in argv else captured.out + captured.err


def model_of(path: Path) -> dict[str, torch.Tensor]:
    trainer = make_trainer(SMALL, SMALL.data.open(), Mesh.alone())
    CheckpointStore(path.parent, Axis("dp")).load(path, {"model": trainer.model.state_dict()})
    return trainer.model.state_dict()


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# inspect


def test_inspect_tells_what_a_checkpoint_is(run: Path, capsys: Output):
    text = said(capsys, "inspect", run)
    lines = {line.partition("  ")[0]: line for line in text.splitlines()}
    meta = read_manifest(checkpoint(run)).meta
    assert lines["checkpoint"].endswith(str(checkpoint(run))) and lines["step"].endswith(" 8")
    assert lines["run id"].endswith(meta["run_id"]) and lines["next sample"].endswith(f" {meta['next_sample']}")
    assert "2 ranks" in lines["written by"] and "ep 2" in lines["written by"] and "engine native" in lines["written by"]
    assert "model.blocks.1-2.ffn.moe.bank.experts.up" in text and "[8, 16, 12]  float32" in text and "x 2" in text
    assert f"{meta['tokens']:,}" in lines["tokens"]
    whole = said(capsys, "inspect", checkpoint(run, 4), "--tensors")
    assert "optimizer.blocks.2.ffn.moe.bank.experts.up.exp_avg_sq" in whole and "rank_00001.rng_cpu" in whole


def test_inspect_counts_every_tensor(run: Path, capsys: Output):
    told = said(capsys, "inspect", run, "--json")
    state = dict(leaves(make_trainer(SMALL, SMALL.data.open(), Mesh.alone()).state()))
    listed = {tensor["name"]: tensor for tensor in told["tensors"]}
    assert {name for name in listed if not name.startswith("rank_")} == set(state)
    for name, tensor in state.items():
        assert listed[name]["num_bytes"] == tensor.numel() * tensor.element_size()
        assert listed[name]["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert listed[name]["pieces"] == (2 if ".experts." in name and not name.endswith(".step") else 1)
    parts = {part["name"]: part for part in told["parts"]}
    model = [tensor for name, tensor in state.items() if name.startswith("model.")]
    assert parts["model"]["num_tensors"] == len(model)
    assert parts["model"]["num_elements"] == sum(tensor.numel() for tensor in model)
    assert parts["rank_*"]["num_tensors"] == 2
    files = [path for path in checkpoint(run).iterdir() if path.name != "manifest.json"]
    assert (told["num_files"], told["num_bytes"]) == (len(files) + 1, sum(path.stat().st_size for path in files))
    assert told["meta"]["layout"] == {"world": 2, "ep": 2, "fsdp": None, "device": "cpu", "engine": "native"}
    assert told["meta"]["config"]["seed"] == SMALL.seed


def test_inspect_compares_configurations(run: Path, tmp_path: Path, capsys: Output):
    mapping = to_mapping(dataclasses.replace(in_folder(SMALL, run, 2), seed=77))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(mapping))
    text = said(capsys, "inspect", run, "--compare", tmp_path / "other.yaml")
    assert "1 keys differ" in text and f"seed: {SMALL.seed} here, 77 there" in text
    assert said(capsys, "inspect", run, "--compare", checkpoint(run, 4), "--json")["differences"] == {}


def test_folding_keeps_unlike_tensors_apart(run: Path):
    state = SavedState(checkpoint(run), read_manifest(checkpoint(run)))
    folded = fold(state.tensors.values())
    assert sum(len(group) for _, group in folded) == len(state.tensors)
    for _, group in folded:
        assert len({(tensor.shape, tensor.dtype) for tensor in group}) == 1


# verify


def test_verify_names_every_bad_file(copy: Path, capsys: Output):
    text = said(capsys, "verify", copy)
    assert text.count("sound ") == 2 and folder_name(4) in text and folder_name(8) in text
    first, second = checkpoint(copy) / "__0_0.distcp", checkpoint(copy) / "__1_0.distcp"
    size, half = second.stat().st_size, second.stat().st_size // 2
    expected = read_manifest(checkpoint(copy)).files[first.name].sha256
    flip(first)
    second.write_bytes(second.read_bytes()[:half])
    actual = hashlib.sha256(first.read_bytes()).hexdigest()
    text = said(capsys, "verify", copy, code=2)
    assert f"{first} has SHA-256 {actual} instead of {expected}" in text
    assert f"{second} has {half} bytes instead of {size}" in text
    assert "sound " in text and "1 of 2 checkpoints damaged" in text
    told = said(capsys, "verify", checkpoint(copy), "--json", code=2)
    assert told["exit_code"] == 2 and len(told["checkpoints"][0]["damage"]) == 2
    (checkpoint(copy) / "manifest.json").unlink()
    assert "is incomplete: it has no manifest.json" in said(capsys, "verify", copy, code=2)
    assert "is no checkpoint" in said(capsys, "verify", copy / "nowhere", code=2)


# reshard


@pytest.mark.parametrize("files", [1, 3, 4])
def test_a_resharded_checkpoint_is_the_same(run: Path, tmp_path: Path, capsys: Output, files: int):
    source, target = checkpoint(run), tmp_path / "out" / "other"
    assert f"{files + 1} files" in said(capsys, "reshard", run, target, "--files", files)
    before, after = verify(source), verify(target)
    assert dataclasses.replace(after, files={}) == dataclasses.replace(before, files={})
    assert sorted(after.files) == [".metadata", *(f"__{number}_0.distcp" for number in range(files))]
    assert digest_of(SMALL, target) == digest_of(SMALL, source)
    old, new = SavedState(source, before), SavedState(target, after)
    assert old.tensors.keys() == new.tensors.keys()
    for name, tensor in old.tensors.items():
        assert torch.equal(old.read(name), new.read(name))
        cut = len(tensor.shape) >= 2 and tensor.shape[0] % files == 0
        assert new.tensors[name].pieces == (files if cut else 1)
    sizes = [seal.size for name, seal in after.files.items() if name != ".metadata"]
    assert max(sizes) < 1.5 * min(sizes)
    assert [path.name for path in target.parent.iterdir()] == ["other"]


def test_a_run_goes_on_from_a_resharded_checkpoint(ranks, run: Path, tmp_path: Path, capsys: Output):
    """At two ranks, bit for bit: their own random state is there too."""
    said(capsys, "reshard", checkpoint(run, 4), tmp_path / "four", "--files", 3)
    found = {}
    for name, source in (("kept", checkpoint(run, 4)), ("resharded", tmp_path / "four")):
        folder = tmp_path / name
        config = in_folder(SMALL, folder, 2, resume=str(source))
        claim_folder(config.run, to_mapping(config)).release()
        assert ranks(2).run(train, folder, 2, str(source), limit_s=300) == [0, 0]
        found[name] = rows_of(folder), digest_of(SMALL, checkpoint(folder))
    assert found["kept"] == found["resharded"] and sorted(found["kept"][0]) == [5, 6, 7, 8]
    assert found["kept"][1] == digest_of(SMALL, checkpoint(run))


# consolidate


@pytest.mark.parametrize("limit", ["5GB", "4KB", "2000"])
def test_the_exported_model_is_read_back_by_the_library(run: Path, tmp_path: Path, capsys: Output, limit: str):
    target = tmp_path / "exported"
    told = said(capsys, "consolidate", run, target, "--max-shard-size", limit, "--json")
    files = sorted(target.glob("*.safetensors"))
    assert told["files"] == len(files) and told["num_bytes"] == sum(path.stat().st_size for path in files)
    expected, found, placed = model_of(checkpoint(run)), {}, {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {
                "format": "pt",
                "step": "8",
                "run_id": read_manifest(checkpoint(run)).meta["run_id"],
            }
            of_file = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        size = sum(tensor.numel() * tensor.element_size() for tensor in of_file.values())
        assert size <= command.parse_size("", limit) or len(of_file) == 1
        found |= of_file
        placed |= dict.fromkeys(of_file, path.name)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    if limit == "5GB":
        assert [path.name for path in files] == ["model.safetensors"]
    else:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == placed
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert yaml.safe_load((target / "config.yaml").read_text())["seed"] == SMALL.seed


def test_every_dtype_and_shape_comes_back(tmp_path: Path):
    tensors = {f"{dtype} é".replace("torch.", ""): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "turned": torch.randn(3, 2).T}
    entries = [Entry(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]  # type: ignore[misc]
    (path,) = write_set(tmp_path, entries, 10**9, {"format": "pt"})
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


@pytest.mark.parametrize("action", [("reshard", "--files", "1"), ("consolidate",)])
def test_one_tensor_at_a_time_is_in_memory(
    run: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, action: tuple[str, ...]
):
    read, alive = SavedState.read, []

    def watched(self: SavedState, *args: Any) -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= 1, "earlier tensors are kept"
        tensor = read(self, *args)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SavedState, "read", watched)
    said(capsys, action[0], run, tmp_path / "out", *action[1:])
    assert len(alive) > 20


# Refusals


@pytest.mark.parametrize("action", [("reshard", "--files", "2"), ("consolidate",)])
def test_nothing_is_overwritten_and_nothing_half_written_stays(
    copy: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, action: tuple[str, ...]
):
    outputs = tmp_path / "outputs"
    (outputs / "there").mkdir(parents=True)
    (outputs / "link").symlink_to(outputs / "nowhere")
    for name in ("there", "link"):
        text = said(capsys, action[0], copy, outputs / name, *action[1:], code=2)
        assert f"OUTPUT = '{outputs / name}' exists already" in text and "nothing is overwritten" in text
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("moedist.train.checkpoint.safetensors.write_file", fail)
        patch.setattr("moedist.train.checkpoint.reshard.write_manifest", fail)
        text = said(capsys, action[0], copy, outputs / "full", *action[1:], code=4)
        assert "OUTPUT = " in text and f"no room for a checkpoint in {outputs}" in text
    shard = checkpoint(copy) / "__0_0.distcp"
    flip(shard)
    text = said(capsys, action[0], checkpoint(copy), outputs / "bad", *action[1:], code=2)
    assert "CHECKPOINT = " in text and f"{shard} has SHA-256" in text
    assert sorted(path.name for path in outputs.iterdir()) == ["link", "there"]


def test_values_that_make_no_sense(run: Path, tmp_path: Path, capsys: Output):
    for value in ("0", "-3"):
        assert "--files = " in said(capsys, "reshard", run, tmp_path / "out", f"--files={value}", code=2)
    for value in ("many", "0GB", "5XB"):
        text = said(capsys, "consolidate", run, tmp_path / "out", f"--max-shard-size={value}", code=2)
        assert f"--max-shard-size = '{value}' is no size" in text and "500MB" in text
    assert not (tmp_path / "out").exists()
