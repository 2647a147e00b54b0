"""Whether a model that is spread over ranks is all there: every weight exactly once among the ranks of its pieces."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moedist.model.attention.bank import GatheredBank
from moedist.moe.layer import MoE
from moedist.train.build import SpreadModel

Shape = tuple[int, ...]
Piece = tuple[tuple[int, int], ...]
"""Where a part of a tensor begins and how long it is, along each dim."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one parameter lies over the ranks.

    Attributes:
        whole: its shape in the whole model.
        pieces: into how many it is cut; 1 for one that is held whole.
        copies: ranks that hold the same piece.
    """

    whole: Shape
    pieces: int
    copies: int


def check_whole(spread: SpreadModel, whole: Mapping[str, Shape], world_size: int) -> dict[str, Layout]:
    """Asserts, of a model spread on some rank, that each parameter is covered exactly once by the pieces that all
    ranks hold, by arithmetic, and that this rank holds the piece that is its own."""
    parameters, own = dict(spread.model.named_parameters()), own_experts(spread.model)
    elsewhere = {name for names in own.values() for name in names if name not in parameters}
    wrong = parameters.keys() ^ (whole.keys() - elsewhere)
    assert not wrong, f"spreading has renamed parameters: {wrong}"
    assert sum(math.prod(shape) for shape in whole.values()) == spread.size.total
    layouts = {}
    for name, parameter in parameters.items():
        assert tuple(parameter.shape) == whole[name], f"{name} is {tuple(parameter.shape)}, and whole {whole[name]}"
        layouts[name] = layout = layout_of(parameter, world_size)
        if ranks := next((len(mixture.ep.ranks) for mixture, names in own.items() if name in names), 0):
            layouts[name] = Layout(layout.whole, 1, world_size // ranks)  # whole, on the ranks that hold the expert
            layout = Layout(layout.whole, ranks, world_size // ranks)
        if parameter.requires_grad:
            said = spread.gradients.spread_of[name]
            told = (1 if said.pieces is None else said.pieces.size, said.copies.size)
            assert told == (layout.pieces, layout.copies), (
                f"{name} lies as {layout}, and its gradient is summed as {told}"
            )
    check_experts(spread.model)
    return layouts


def own_experts(model: nn.Module) -> dict[GatheredBank, set[str]]:
    """The names of all attention experts of each bank whose ranks hold some of them whole."""
    found: dict[GatheredBank, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GatheredBank):
            found[module] = {
                f"{name}.experts.{expert}.{parameter}"
                for expert, config in enumerate(module.configs)
                for parameter, _ in config.build(dataclasses.replace(module.site, device="meta")).named_parameters()
            }
    return found


def layout_of(parameter: nn.Parameter, world_size: int) -> Layout:
    """How a parameter lies, from its placements alone; asserts that its pieces cover it exactly once."""
    whole = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Layout(whole, 1, world_size)
    grid, placements = tuple(parameter.device_mesh.shape), tuple(parameter.placements)
    check_cover(whole, frozenset(cut(whole, grid, placements).values()))
    mine = tuple(length for _, length in own_piece(parameter))
    assert mine == tuple(parameter.to_local().shape), f"{mine} should lie here, not {tuple(parameter.to_local().shape)}"
    pieces = math.prod(size for size, placement in zip(grid, placements, strict=True) if not placement.is_replicate())
    return Layout(whole, pieces, world_size // pieces)


def own_piece(parameter: DTensor) -> Piece:
    """The piece that should lie on this rank."""
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the parameter's mesh"
    return cut(tuple(parameter.shape), tuple(mesh.shape), tuple(parameter.placements))[tuple(coordinate)]


@functools.lru_cache
def cut(whole: Shape, grid: Shape, placements: tuple[Placement, ...]) -> dict[Shape, Piece]:
    """The piece at each coordinate of a mesh: its dims cut one after the other, each into the pieces of
    ``torch.chunk``. A strided one (FSDP2's, of what was cut along that dim before) comes last.

    >>> cut((5, 2), (2,), (Shard(0),))
    {(0,): ((0, 3), (0, 2)), (1,): ((3, 2), (0, 2))}
    """
    pieces = {}
    for coordinate in itertools.product(*map(range, grid)):
        piece = [(0, length) for length in whole]
        cuts = sorted(zip(grid, coordinate, placements, strict=True), key=lambda cut: isinstance(cut[2], _StridedShard))
        for size, place, placement in cuts:
            if isinstance(placement, Replicate):
                continue
            assert isinstance(placement, Shard | _StridedShard), f"no parameter is placed as {placement}"
            begin, length = piece[placement.dim]
            each = -(-length // size)
            skipped = min(place * each, length)
            piece[placement.dim] = (begin + skipped, min(each, length - skipped))
        pieces[coordinate] = tuple(piece)
    return pieces


@functools.lru_cache
def check_cover(whole: Shape, pieces: frozenset[Piece]) -> None:
    """Asserts that the pieces that hold anything tile the whole: along each dim their spans follow one another from
    end to end, and there is one piece for each combination of spans."""
    full = {piece for piece in pieces if all(length > 0 for _, length in piece)}
    spans = [sorted({piece[dim] for piece in full}) for dim in range(len(whole))]
    for length, line in zip(whole, spans, strict=True):
        ends = [begin + part for begin, part in line]
        assert [begin for begin, _ in line] == [0, *ends[:-1]] and ends[-1] == length, f"{line} does not tile {length}"
    assert full == set(itertools.product(*spans)), "pieces are missing"


def check_experts(model: nn.Module) -> None:
    """Asserts that this rank's experts are those whose weights, or parts of them, lie here."""
    for layer in model.modules():
        if not isinstance(layer, MoE):
            continue
        ids = layer.bank.experts.expert_ids
        for weight in layer.bank.experts.parameters():
            if isinstance(weight, DTensor):
                (begin, length), *_ = own_piece(weight)
                assert set(range(begin, begin + length)) <= set(ids), (
                    f"experts {ids} are not {begin} to {begin + length}"
                )
