"""Checkpoints: written by all ranks, whole or not at all; verified byte by byte; loaded into any layout."""

from moedist.train.checkpoint.background import BackgroundSave
from moedist.train.checkpoint.errors import CheckpointError, DiskError, NoRoomError
from moedist.train.checkpoint.manifest import Manifest, read_meta, verify
from moedist.train.checkpoint.store import CheckpointStore

__all__ = [
    "BackgroundSave",
    "CheckpointError",
    "CheckpointStore",
    "DiskError",
    "Manifest",
    "NoRoomError",
    "read_meta",
    "verify",
]
