"""Damage and malice: nothing that differs from what was written is read, and nothing in a checkpoint is run."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata

from moedist.mesh import Axis
from moedist.train.checkpoint import CheckpointError, CheckpointStore, read_meta, verify
from moedist.train.checkpoint.manifest import FileSeal, Manifest, read_manifest

SHARD = "__0_0.distcp"


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, generator=generator)
    return {"model": {"head.weight": weight}, "optimizer": {"head.weight": {"step": torch.tensor(float(step))}}}


def three(directory: Path) -> list[Path]:
    """Checkpoints of steps 1, 2 and 3."""
    store = CheckpointStore(directory, Axis("slow"))
    return [store.save(step, state(step), {"run": "r", "tokens": step * 100, "name": "é"}) for step in (1, 2, 3)]


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = three(tmp_path)[1]
    manifest = verify(path)
    assert (manifest.step, manifest.num_ranks, set(manifest.files)) == (2, 1, {SHARD, ".metadata"})
    assert read_meta(path) == {"run": "r", "tokens": 200, "name": "é"}
    for name, seal in manifest.files.items():
        assert seal == FileSeal((path / name).stat().st_size, hashlib.sha256((path / name).read_bytes()).hexdigest())


@pytest.mark.parametrize("name", [SHARD, ".metadata", "manifest.json"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    """All bits of the manifest, where some would change the text and not its meaning; 300 elsewhere."""
    file = three(tmp_path)[0] / name
    good = file.read_bytes()
    bits = range(8 * len(good))
    for bit in bits if name == "manifest.json" else random.Random(0).sample(bits, 300):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            verify(file.parent)
    file.write_bytes(good)
    verify(file.parent)


def cut(size: Callable[[int], int], name: str = SHARD) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        os.truncate(path / name, size((path / name).stat().st_size))

    return damage


def zero(path: Path) -> None:
    with (path / SHARD).open("r+b") as file:
        file.seek(700)
        file.write(bytes(64))


def take_from_step_1(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.copy(path.parent / "step_00000001" / name, path / name)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard empty": (cut(lambda size: 0), r"__0_0\.distcp has 0 bytes instead of \d+"),
    "shard halved": (cut(lambda size: size // 2), r"__0_0\.distcp has \d+ bytes instead of \d+"),
    "shard one byte short": (cut(lambda size: size - 1), r"__0_0\.distcp has \d+ bytes instead of \d+"),
    "shard gone": (lambda path: (path / SHARD).unlink(), r"__0_0\.distcp cannot be read: No such file"),
    "shard zeroed": (zero, r"__0_0\.distcp has SHA-256 \w{64} instead of \w{64}"),
    "shard of another step": (take_from_step_1(SHARD), r"__0_0\.distcp has SHA-256 \w{64} instead of \w{64}"),
    "index empty": (cut(lambda size: 0, ".metadata"), r"\.metadata has 0 bytes instead of \d+"),
    "index gone": (lambda path: (path / ".metadata").unlink(), r"\.metadata cannot be read: No such file"),
    "manifest gone": (lambda path: (path / "manifest.json").unlink(), "is incomplete: it has no manifest.json"),
    "manifest empty": (cut(lambda size: 0, "manifest.json"), "has a damaged or foreign manifest.json"),
    "manifest garbage": (
        lambda path: (path / "manifest.json").write_bytes(b"\xff[]"),
        "has a damaged or foreign manifest.json",
    ),
    "manifest a list": (
        lambda path: (path / "manifest.json").write_text("[]"),
        "has a damaged or foreign manifest.json",
    ),
    "manifest of another step": (take_from_step_1("manifest.json"), "has the manifest of step 1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name_and_skipped(tmp_path: Path, damage: str) -> None:
    _, second, third = three(tmp_path)
    apply, message = DAMAGES[damage]
    apply(third)

    with pytest.raises(CheckpointError, match=message):
        verify(third)
    lines: list[str] = []
    store = CheckpointStore(tmp_path, Axis("slow"), report=lines.append)
    live = state(9)
    with pytest.raises(CheckpointError, match=message):
        store.load(third, live)
    assert torch.equal(live["model"]["head.weight"], state(9)["model"]["head.weight"]), "partly loaded"

    assert store.newest() == second
    assert len(lines) == 1 and lines[0].startswith("skipped: ") and str(third) in lines[0]
    assert store.load(second, live)["tokens"] == 200
    assert torch.equal(live["model"]["head.weight"], state(2)["model"]["head.weight"])


def test_only_damaged_checkpoints_are_no_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Axis("slow"), report=lambda line: None)
    assert store.newest() is None
    for path in three(tmp_path):
        cut(lambda size: size - 1)(path)
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint in .* can be used: .*step_00000003.*step_00000001.*Re"
    ):
        store.newest()


def test_damage_between_look_and_load_is_found(tmp_path: Path) -> None:
    """A store trusts a look of its own only for the load that follows it."""
    path = three(tmp_path)[2]
    store = CheckpointStore(tmp_path, Axis("slow"))
    index = (path / ".metadata").read_bytes()
    store.newest()
    (path / ".metadata").write_bytes(pickle.dumps(pickle.loads(index)) + b" ")
    with pytest.raises(CheckpointError, match=r"\.metadata is not the file that the manifest names"):
        store.load(path, state(3))
    (path / ".metadata").write_bytes(index)
    store.newest()
    store.load(path, state(3))
    zero(path)
    with pytest.raises(CheckpointError, match="SHA-256"):
        store.load(path, state(3))


class Payload:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def seal_again(path: Path) -> None:
    """What an attacker does who can write the folder."""
    manifest = read_manifest(path)
    files = {name: FileSeal.of(path / name) for name in manifest.files}
    (path / "manifest.json").write_text(Manifest(manifest.step, 1, files, manifest.meta).render())
    verify(path)


def refused(path: Path, message: str) -> None:
    live = state(9)
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(path.parent, Axis("slow")).load(path, live)
    assert torch.equal(live["model"]["head.weight"], state(9)["model"]["head.weight"])


def test_a_crafted_index_runs_nothing(tmp_path: Path) -> None:
    path, marker = three(tmp_path)[0], tmp_path / "marker"
    (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    refused(path, r"\.metadata has \d+ bytes instead")
    seal_again(path)
    refused(path, r"\.metadata is not an index of tensors: it asks for .*pathlib.*")
    assert not marker.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert marker.exists(), "the payload is harmless, and this test empty"


@pytest.mark.parametrize("name", ["eval", "load", "compiler", "Size.__new__", "hub"])
def test_the_index_reaches_nothing_but_dtypes_in_torch(tmp_path: Path, name: str) -> None:
    path = three(tmp_path)[0]
    module = "builtins" if name == "eval" else "torch"
    (path / ".metadata").write_bytes(b"\x80\x04" + _text(module) + _text(name) + b"\x93.")
    seal_again(path)
    refused(path, f"it asks for {module}.{name}")


def test_an_index_of_early_python_3_11_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 3.11.3 (Debian 12 has 3.11.2) a member of an enum is pickled as ``getattr(class, name)``."""
    path = three(tmp_path)[0]
    index = pickle.loads((path / ".metadata").read_bytes())
    with monkeypatch.context() as early:
        early.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name)))
        (path / ".metadata").write_bytes(pickle.dumps(index))
    assert b"getattr" in (path / ".metadata").read_bytes()
    seal_again(path)
    live = state(9)
    CheckpointStore(path.parent, Axis("slow")).load(path, live)
    assert torch.equal(live["model"]["head.weight"], state(1)["model"]["head.weight"])


@pytest.mark.parametrize(("kind", "name"), [(torch.Size, "mro"), (torch.float32, "itemsize"), (Metadata, "__init__")])
def test_early_python_s_way_of_writing_reaches_nothing_else(tmp_path: Path, kind: object, name: str) -> None:
    class Attribute:
        def __reduce__(self) -> Any:
            return getattr, (kind, name)

    path = three(tmp_path)[0]
    (path / ".metadata").write_bytes(pickle.dumps(Attribute()))
    seal_again(path)
    refused(path, f"it asks for '{name}' of")


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def test_a_crafted_shard_runs_nothing(tmp_path: Path) -> None:
    path, marker = three(tmp_path)[0], tmp_path / "marker"
    torch.save(Payload(marker), path / SHARD)
    index = pickle.loads((path / ".metadata").read_bytes())
    size = (path / SHARD).stat().st_size
    index.storage_data = {
        key: dataclasses.replace(entry, offset=0, length=size) for key, entry in index.storage_data.items()
    }
    (path / ".metadata").write_bytes(pickle.dumps(index))
    seal_again(path)
    refused(path, "cannot read .*step_00000001: Weights only load failed")
    assert not marker.exists()
    torch.load(path / SHARD, weights_only=False)
    assert marker.exists(), "the payload is harmless, and this test empty"


def test_an_index_of_other_things_than_tensors_is_refused(tmp_path: Path) -> None:
    """DCP unpickles what is not a tensor without a check."""
    path = three(tmp_path)[0]
    index = pickle.loads((path / ".metadata").read_bytes())
    index.state_dict_metadata["model.head.weight"] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(index))
    seal_again(path)
    refused(path, "it asks for torch.distributed.checkpoint.metadata.BytesStorageMetadata")
    index.state_dict_metadata["model.head.weight"] = None
    (path / ".metadata").write_bytes(pickle.dumps(index))
    seal_again(path)
    refused(path, "'model.head.weight' is not a tensor")


@pytest.mark.parametrize("changes", [{"relative_path": "../step_00000002/" + SHARD}, {"offset": -1}, {"length": 10**9}])
def test_an_index_that_points_outside_is_refused(tmp_path: Path, changes: dict) -> None:
    path = three(tmp_path)[0]
    index = pickle.loads((path / ".metadata").read_bytes())
    index.storage_data = {key: dataclasses.replace(entry, **changes) for key, entry in index.storage_data.items()}
    (path / ".metadata").write_bytes(pickle.dumps(index))
    seal_again(path)
    refused(path, "outside the checkpoint")


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    path = three(tmp_path)[0]
    manifest = Manifest(1, 1, {"../" + SHARD: FileSeal(1, "0")}, {})
    (path / "manifest.json").write_text(manifest.render())
    with pytest.raises(CheckpointError, match=r"'\.\./__0_0\.distcp' is not the name of a file"):
        verify(path)


def test_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moedist.train.checkpoint.manifest.SCHEMA", 2)
    path = three(tmp_path)[0]
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match="schema 2 is not 1, the one that this version reads; a newer moedist wrote it"
    ):
        verify(path)
