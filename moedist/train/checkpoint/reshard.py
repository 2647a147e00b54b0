"""A checkpoint written anew over another number of files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from moedist.train.checkpoint.folder import new_folder
from moedist.train.checkpoint.manifest import FileSeal, Manifest, verify, write_manifest
from moedist.train.checkpoint.saved import SavedState, SavedTensor
from moedist.train.checkpoint.shards import RoomPlanner, SealingWriter


def reshard(source: Path, target: Path, num_files: int) -> Manifest:
    """Writes a checkpoint anew as ``num_files`` files of about one size, as that many ranks would have.

    A tensor of two or more dims is cut along its first dim where ``num_files`` divides it, a piece for each file; so a
    rank of as many finds its experts in one file. All else stays whole. Any layout reads either: what changes is which
    files a rank must open, and how much of them it reads. One piece of a tensor is in memory at a time, and one piece
    of the source.

    Returns:
        the new manifest: that of the source but for its files. It resumes as the source does.

    Raises:
        CheckpointError: the source is damaged; nothing is written then.
        ConfigError: the target exists.
        DiskError: the disk refuses.
    """
    manifest = verify(source)
    saved = SavedState(source, manifest)
    written: list[Manifest] = []
    with new_folder(target) as folder:

        def publish(files: dict[str, FileSeal]) -> None:
            written.append(dataclasses.replace(manifest, files=files))
            write_manifest(folder, written[0])

        plans = plan_pieces(list(saved.tensors.values()), num_files)
        planner, writer = _CopyPlanner(folder, saved), SealingWriter(folder, publish)
        planner.set_up_planner({}, is_coordinator=True)
        plans, index = planner.create_global_plan([writer.prepare_local_plan(plan) for plan in plans])
        for plan in plans:
            planner.note_pieces(plan)
        results = [writer.write_data(plan, planner).value() for plan in writer.prepare_global_plan(plans)]
        writer.finish(index, results)
    return written[0]


def plan_pieces(tensors: list[SavedTensor], num_files: int) -> list[SavePlan]:
    """Which piece of which tensor goes to which file."""
    items: list[list[WriteItem]] = [[] for _ in range(num_files)]
    sizes = [0] * num_files
    whole = []
    for tensor in tensors:
        if len(tensor.shape) >= 2 and tensor.shape[0] > 0 and tensor.shape[0] % num_files == 0:
            rows = tensor.shape[0] // num_files
            for number in range(num_files):
                items[number].append(_piece(tensor, number * rows, rows))
                sizes[number] += tensor.num_bytes // num_files
        else:
            whole.append(tensor)
    for tensor in sorted(whole, key=lambda tensor: -tensor.num_bytes):
        number = sizes.index(min(sizes))
        items[number].append(_piece(tensor))
        sizes[number] += tensor.num_bytes
    return [SavePlan(of_file) for of_file in items]


def _piece(tensor: SavedTensor, first_row: int | None = None, rows: int = 0) -> WriteItem:
    offsets, sizes = [0] * len(tensor.shape), list(tensor.shape)
    if first_row is not None:
        offsets[0], sizes[0] = first_row, rows
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, tensor.properties, torch.Size(tensor.shape))
    return WriteItem(MetadataIndex(tensor.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _CopyPlanner(RoomPlanner):
    """Hands out pieces of another checkpoint, each read when it is written."""

    def __init__(self, folder: Path, saved: SavedState):
        super().__init__(folder)
        self.saved = saved
        self.shapes: dict[MetadataIndex, torch.Size] = {}

    def note_pieces(self, plan: SavePlan) -> None:
        """Remembers the shapes of a plan's pieces: the writer asks for them by place alone."""
        for item in plan.items:
            assert item.tensor_data is not None
            self.shapes[item.index] = item.tensor_data.chunk.sizes

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The piece at ``index``."""
        assert index.offset is not None
        return self.saved.read(index.fqn, index.offset, self.shapes[index])
