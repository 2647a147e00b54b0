"""The weights of a checkpoint as one set of safetensors files."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml

from moedist.train.checkpoint.errors import CheckpointError
from moedist.train.checkpoint.folder import new_folder
from moedist.train.checkpoint.manifest import verify
from moedist.train.checkpoint.safetensors import DTYPES, Entry, write_set
from moedist.train.checkpoint.saved import SavedState

MODEL = "model."


def consolidate(source: Path, target: Path, max_bytes: int) -> list[Path]:
    """Writes a checkpoint's model, and nothing else of it, as safetensors files of at most ``max_bytes``.

    Names are the model's own (`state_dict`), weights whole whatever layout wrote them. An MoE layer's experts are
    stacked: ``blocks.<n>.ffn.moe.bank.experts.{gate,up,down}`` have the experts along their first dim, in the order of
    their global ids. Beside them lies the run's ``config.yaml``, if the checkpoint has it. One tensor is in memory at a
    time.

    Returns:
        the files with weights.

    Raises:
        CheckpointError: the source is damaged, or holds what safetensors cannot; nothing is written then.
        ConfigError: the target exists.
        DiskError: the disk refuses.
    """
    manifest = verify(source)
    saved = SavedState(source, manifest)
    model = [tensor for name, tensor in saved.tensors.items() if name.startswith(MODEL)]
    for tensor in model:
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{tensor.name} of {source} is of {tensor.dtype}, which safetensors cannot hold")
    entries = [
        Entry(tensor.name.removeprefix(MODEL), tensor.shape, tensor.dtype, functools.partial(saved.read, tensor.name))
        for tensor in model
    ]
    if not entries:
        raise CheckpointError(f"checkpoint {source} holds no model")
    about = {"format": "pt", "step": str(manifest.step), "run_id": str(manifest.meta.get("run_id", ""))}
    with new_folder(target) as folder:
        if "config" in manifest.meta:
            text = yaml.safe_dump(dict(manifest.meta["config"]), sort_keys=False, allow_unicode=True)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        files = write_set(folder, entries, max_bytes, about)
    return [target / file.name for file in files]
