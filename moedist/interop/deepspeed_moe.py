"""Checkpoints that DeepSpeed's engine writes of models with its own MoE layer, without DeepSpeed.

Such a folder has a file per MoE layer and expert, and one for all other weights:

    <folder>/latest                                             the name of the newest tag
    <folder>/<tag>/layer_0_expert_10_mp_rank_00_model_states.pt
    <folder>/<tag>/mp_rank_00_model_states.pt

An expert's file holds ``<layer>.deepspeed_moe.experts.deepspeed_experts.10.<parameter>``, the id being the global one
whatever rank wrote it. Here the experts of a layer are stacked along a new first dim in the order of their ids. Files
are read by ``torch.load(weights_only=True)`` and never otherwise. What the optimizer knows is left behind.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedist.train.checkpoint.errors import CheckpointError
from moedist.train.checkpoint.folder import new_folder
from moedist.train.checkpoint.safetensors import DTYPES, Entry, write_set
from moedist.train.checkpoint.saved import natural

EXPERT_FILE = re.compile(r"(?:layer_\d+_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
EXPERT_KEY = re.compile(r"(.*\bdeepspeed_moe\.experts)\.deepspeed_experts\.(\d+)\.(.+)")
GATE = ".deepspeed_moe.gate.wg.weight"

GATED_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate", "up", "down"))
"""What the matrices of a gated expert are called: Llama and Qwen, Mixtral, here."""


@dataclasses.dataclass(frozen=True)
class MoELayerFiles:
    """One MoE layer of such a checkpoint.

    Attributes:
        name: of the layer in its model: ``blocks.0.ffn``.
        experts: its experts' files by global id, 0 to E - 1.
        parameters: of one expert, in the order of the module: name -> shape and dtype, on the meta device.
        width: D, of the vectors that its gate sees.
        plain: whether it is a gate and experts and nothing else (no residual MLP, no coefficient).
    """

    name: str
    experts: tuple[Path, ...]
    parameters: Mapping[str, Tensor]
    width: int
    plain: bool


@dataclasses.dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """The weights of a model with DeepSpeed's MoE layers.

    Attributes:
        path: the folder of the tag.
        dense: all that is in no expert, the gates too, by name.
        layers: its MoE layers, in the order of their names.
    """

    path: Path
    dense: Mapping[str, Tensor]
    layers: tuple[MoELayerFiles, ...]


def open_checkpoint(path: Path) -> DeepSpeedCheckpoint:
    """Finds and checks the files.

    Args:
        path: a tag's folder, or one whose file ``latest`` names a tag.

    Raises:
        CheckpointError: it is no such checkpoint, experts are missing or unlike each other, it was cut over
            model-parallel ranks, or a file holds anything but tensors and plain values.
    """
    path = path.expanduser().absolute()
    if (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8").strip()
        if Path(tag).name != tag:
            raise CheckpointError(f"{path / 'latest'} names {tag!r}, which is no folder beside it")
        path = path / tag
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    model_files = [name for name in names if MODEL_FILE.fullmatch(name)]
    expert_files = {name: match for name in names if (match := EXPERT_FILE.fullmatch(name))}
    if not model_files or not expert_files:
        raise CheckpointError(f"{path} holds no checkpoint of DeepSpeed's MoE layer: see its file names")
    if len(model_files) > 1 or any(int(match[2]) > 0 for match in expert_files.values()):
        raise CheckpointError(f"{path} was written by {len(model_files)} model-parallel ranks; one is read here")
    dense = _load(path / model_files[0]).get("module")
    if not isinstance(dense, Mapping) or not all(isinstance(value, Tensor) for value in dense.values()):
        raise CheckpointError(f"{path / model_files[0]} holds no weights under 'module'")
    of_layer: dict[str, dict[int, Path]] = {}
    for name, match in expert_files.items():
        for layer in {_split(key, path / name, int(match[1]))[0] for key in _load(path / name)}:
            of_layer.setdefault(layer, {})[int(match[1])] = path / name
    layers = [_describe(layer, of_layer[layer], dense) for layer in sorted(of_layer, key=natural)]
    return DeepSpeedCheckpoint(path, dense, tuple(layers))


def read_state(checkpoint: DeepSpeedCheckpoint, *, rename: bool = True) -> dict[str, Tensor]:
    """Every weight by name, the experts of a layer stacked [E, ...] by global id.

    Args:
        rename: whether MoE layers that `convert_layer` can express get this project's names and shapes.
    """
    return {entry.name: entry.read() for entry in _entries(checkpoint, rename)}


def import_deepspeed(
    source: Path, target: Path, max_bytes: int, *, rename: bool = True
) -> tuple[list[Path], list[str]]:
    """Writes the same as one set of safetensors files, one stack of experts in memory at a time.

    Returns:
        the files; and the names of the MoE layers that kept DeepSpeed's names.

    Raises:
        CheckpointError: see `open_checkpoint`.
        ConfigError: the target exists.
        DiskError: the disk refuses.
    """
    checkpoint = open_checkpoint(source)
    entries = _entries(checkpoint, rename)
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{entry.name} is of {entry.dtype}, which safetensors cannot hold")
    with new_folder(target) as folder:
        files = write_set(folder, entries, max_bytes, {"format": "pt", "source": "deepspeed"})
    kept = [layer.name for layer in checkpoint.layers if not rename or convert_layer(layer) is None]
    return [target / file.name for file in files], kept


@dataclasses.dataclass(frozen=True)
class Converted:
    """One stacked parameter of `moedist.moe.ffn.StackedFFN` and where it comes from.

    Attributes:
        name: ours: ``up``, ``down_bias``, ...
        source: the expert's parameter.
        transposed: whether it is a matrix that torch's linear layers keep the other way round.
    """

    name: str
    source: str
    transposed: bool


def convert_layer(layer: MoELayerFiles) -> list[Converted] | None:
    """How a layer's experts are said in this project's terms; None where they cannot be.

    They can where an expert is two linear layers D -> F -> D (``up``, ``down``), or three under the names of gated ones
    (``gate``, ``up``, ``down``; see `GATED_NAMES`), all with biases or none. Weights do not tell an activation: a model
    for two matrices must set ``moe.experts.activation`` to ``relu`` or ``gelu`` as the original had it, and for three
    ``swiglu`` is meant. A residual layer (`use_residual`) weighs experts against an MLP token by token, which no layer
    here does.
    """
    weights = [name for name, value in layer.parameters.items() if name.endswith("weight") and value.ndim == 2]
    modules = [name.removesuffix("weight") for name in weights]
    biases = [f"{module}bias" for module in modules if f"{module}bias" in layer.parameters]
    if not layer.plain or len(layer.parameters) != len(weights) + len(biases) or len(biases) not in (0, len(weights)):
        return None
    if len(modules) == 2:
        ours = dict(zip(("up", "down"), modules, strict=True))
    else:
        last = {module.strip(".").rpartition(".")[2]: module for module in modules}
        known = [names for names in GATED_NAMES if set(names) == set(last)]
        if len(modules) != 3 or not known:
            return None
        ours = {name: last[theirs] for name, theirs in zip(("gate", "up", "down"), known[0], strict=True)}
    hidden = layer.parameters[f"{ours['up']}weight"].shape[0]
    for name, module in ours.items():
        expected = (layer.width, hidden) if name == "down" else (hidden, layer.width)
        if tuple(layer.parameters[f"{module}weight"].shape) != expected:
            return None
    converted = [Converted(name, f"{module}weight", True) for name, module in ours.items()]
    return converted + [Converted(f"{name}_bias", f"{module}bias", False) for name, module in ours.items() if biases]


def _entries(checkpoint: DeepSpeedCheckpoint, rename: bool) -> list[Entry]:
    renamed: dict[str, str] = {}
    entries = []
    for layer in checkpoint.layers:
        count, converted = len(layer.experts), convert_layer(layer) if rename else None
        if converted is None:
            for name, value in layer.parameters.items():
                read = functools.partial(_stack, layer, name, False)
                stacked = f"{layer.name}.deepspeed_moe.experts.{name}"
                entries.append(Entry(stacked, (count, *value.shape), value.dtype, read))
            continue
        renamed[f"{layer.name}{GATE}"] = f"{layer.name}.moe.router.weight"
        for one in converted:
            value = layer.parameters[one.source]
            shape = tuple(reversed(value.shape)) if one.transposed else tuple(value.shape)
            read = functools.partial(_stack, layer, one.source, one.transposed)
            entries.append(Entry(f"{layer.name}.moe.bank.experts.{one.name}", (count, *shape), value.dtype, read))
    for name, tensor in checkpoint.dense.items():
        entries.append(Entry(renamed.get(name, name), tuple(tensor.shape), tensor.dtype, _giver(tensor)))
    return sorted(entries, key=lambda entry: natural(entry.name))


def _giver(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _stack(layer: MoELayerFiles, name: str, transposed: bool) -> Tensor:
    """[E, ...]: one parameter of every expert, by global id."""
    experts = []
    for number, path in enumerate(layer.experts):
        value = _load(path)[f"{layer.name}.deepspeed_moe.experts.deepspeed_experts.{number}.{name}"]
        experts.append(value.T if transposed else value)
    return torch.stack(experts)


def _describe(name: str, files: Mapping[int, Path], dense: Mapping[str, Tensor]) -> MoELayerFiles:
    layer, count = name.removesuffix(".deepspeed_moe.experts"), len(files)
    gate = dense.get(f"{layer}{GATE}")
    expected = count if gate is None else gate.shape[0]
    missing = sorted(set(range(max(expected, max(files) + 1))) - files.keys())
    if missing:
        raise CheckpointError(f"the MoE layer {layer} has {expected} experts, and there is no file of {missing}")
    if count != expected:
        raise CheckpointError(
            f"the gate of the MoE layer {layer} knows {expected} experts, and there are {count} files"
        )
    ordered = tuple(files[number] for number in range(count))
    parameters: dict[str, Tensor] | None = None
    for number, path in enumerate(ordered):
        found = {}
        for key, value in _load(path).items():
            of_layer, parameter = _split(key, path, number)
            if of_layer == name:
                found[parameter] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        described = {key: (value.shape, value.dtype) for key, value in found.items()}
        if parameters is None:
            parameters = found
        elif described != {key: (value.shape, value.dtype) for key, value in parameters.items()}:
            raise CheckpointError(f"{path} holds an expert of another make than {ordered[0]}")
    assert parameters is not None, "a layer has experts"
    others = [key for key in dense if key.startswith(f"{layer}.") and key != f"{layer}{GATE}"]
    width = 0 if gate is None else gate.shape[1]
    return MoELayerFiles(layer, ordered, parameters, width, plain=gate is not None and not others)


def _split(key: str, path: Path, expert: int) -> tuple[str, str]:
    """The layer and the parameter that a key of an expert's file speaks of."""
    match = EXPERT_KEY.fullmatch(key)
    if match is None or int(match[2]) != expert:
        raise CheckpointError(f"{path} holds {key!r}, which is no parameter of expert {expert}")
    return match[1], match[3]


def _load(path: Path) -> Mapping[str, Any]:
    """A file of tensors and plain values; its elements stay on the disk until they are used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # crafted bytes can make the loader raise anything
        raise CheckpointError(f"{path} cannot be read as tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no mapping of names to tensors")
    return content
