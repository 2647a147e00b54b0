"""What a rank holds at the worst moment of a step: a walk through forward, backward and update, unit by unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from moedist.estimate.activations import Held, Moment, Rows, attention_held, ffn_held
from moedist.estimate.shape import Count, Layout, ModelShape
from moedist.model.loss import CHUNK_SIZE
from moedist.parallel.gradients import BUCKET_BYTES


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a rank, the parts of the worst moment.

    Attributes:
        weights, gradients, optimizer: of what lies on the device. Gradients as far as they are there at that moment.
        activations: kept for backward, logits included.
        exchange: rows in the buffers of an all-to-all.
        temporary: gathered weights, what is computed again, what one operation needs.
        peak: all of them.
        moment: which it is.
        host: bytes that lie on the host instead (``engine.offload``).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    exchange: int
    temporary: int
    moment: str
    host: int = 0

    @property
    def peak(self) -> int:
        """All that lives at that moment on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.exchange + self.temporary


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Half a block, or the embedding.

    Attributes:
        cached: kept to the end of the forward pass only.
        gathered: weights that FSDP holds whole while it runs.
    """

    name: str
    count: Count
    held: Held
    cached: int = 0
    gathered: int = 0


def memory(shape: ModelShape, layout: Layout, rows: Mapping[int, Rows]) -> Memory:
    """The worst moment of a step in the steady state, when the optimizer has its moments.

    Args:
        shape: the model.
        layout: its cut.
        rows: by the index of the block, of every block with a MoE layer.
    """
    size = layout.weight_size
    held, updated = layout.held(shape.count) * size, layout.updated(shape.count) * size
    matrices = layout.updated(shape.matrices) * size
    # ZeRO keeps a copy of the part of the weights that a rank updates.
    optimizer = layout.optimizer.state_numbers(matrices, updated - matrices) + (updated if layout.zero_stage else 0)
    state = Memory(held, 0, optimizer, 0, 0, 0, "start")
    host = 0
    if layout.offload:
        host, state = 2 * held + optimizer, dataclasses.replace(state, weights=0, optimizer=0)
    moments = [*_forward_and_backward(shape, layout, rows, state), _update(shape, layout, state)]
    return dataclasses.replace(max(moments, key=lambda moment: moment.peak), host=host)


def _forward_and_backward(
    shape: ModelShape, layout: Layout, rows: Mapping[int, Rows], state: Memory
) -> Iterator[Memory]:
    """The moments of a step's last micro-step that may be the worst."""
    units, root = _units(shape, layout, rows), _root(shape, layout)
    # Under accumulation the gradients of the micro-steps before are there from the beginning.
    accumulates = layout.accumulation > 1
    gradients = _gradient_bytes(shape.count, layout) if accumulates else 0
    kept = cached = 0

    def at(name: str, activations: int, temporary: int, exchange: int = 0, own: float = 0) -> Memory:
        return dataclasses.replace(
            state,
            gradients=gradients + (0 if accumulates else round(own)),
            activations=activations,
            temporary=temporary + root.gathered,
            exchange=exchange,
            moment=name,
        )

    for unit in units:
        # What is computed again in backward is made once in forward and forgotten.
        once = unit.held.again(layout.checkpointing)
        kept += unit.held.saved(layout.checkpointing)
        for moment in unit.held.forward:
            yield at(f"forward, {unit.name}", kept, once + moment.temporary + cached + unit.gathered, moment.exchange)
        cached += unit.cached
    yield at("loss", kept + root.saved, root.loss)
    own = _gradient_bytes(shape.head, layout)
    yield at("backward, head", kept, root.head + _reduced(shape.head, layout), own=own)
    gradients += 0 if accumulates else own
    for unit in reversed(units):
        again, own = unit.held.again(layout.checkpointing), _gradient_bytes(unit.count, layout)
        narrow = _gathered(unit.count, layout)  # gradients of gathered weights, before they are summed and cut
        for moment in unit.held.backward:
            made = 0 if layout.fsdp is not None else moment.gradients * own
            temporary = again + moment.temporary + unit.gathered + round(moment.gradients * narrow)
            yield at(f"backward, {unit.name}", kept, temporary, moment.exchange, made)
        kept -= unit.held.saved(layout.checkpointing)
        yield at(f"gradients, {unit.name}", kept, _reduced(unit.count, layout), own=own)
        gradients += 0 if accumulates else own


def _units(shape: ModelShape, layout: Layout, rows: Mapping[int, Rows]) -> list[_Unit]:
    """The embedding, and both halves of every block."""
    units = []
    if shape.embedding.other:
        nothing = Held(8 * layout.tokens, 0, 0, 0, 0, (Moment(),), (Moment(),))
        units.append(_Unit("embedding", shape.embedding, nothing, gathered=_gathered(shape.embedding, layout)))
    for index, block in enumerate(shape.blocks):
        attention = attention_held(block.attention, shape.dim, layout, block.attention_count.other)
        ffn = ffn_held(block, shape.dim, layout, rows.get(index))
        # Autocast keeps its copies of dense weights to the end of forward, though no backward asks for them.
        cached = attention.casts if layout.checkpointing != "none" else 0
        # Both halves' dense weights are a unit of FSDP, and the one before it is gathered ahead.
        dense = _gathered(block.attention_count, layout)
        units += [
            _Unit(f"attention of block {index}", block.attention_count, attention, cached, 2 * dense),
            _Unit(
                f"feed-forward of block {index}",
                block.ffn_count,
                ffn,
                gathered=dense + _gathered(block.ffn_count, layout),
            ),
        ]
    return units


@dataclasses.dataclass(frozen=True)
class _Root:
    """The last norm, the head and the loss."""

    saved: int
    loss: int
    head: int
    gathered: int


def _root(shape: ModelShape, layout: Layout) -> _Root:
    size, wide = layout.compute_size, max(layout.compute_size, 4)
    positions, logits = layout.tokens * shape.dim, layout.tokens * shape.vocab_size
    table = shape.head.largest
    saved = 2 * positions * wide + positions * size + logits * size + (table * size if layout.casts else 0)
    if logits <= CHUNK_SIZE:
        # Log-probabilities are kept; their gradient, and the narrow one where logits are narrow.
        saved += logits * wide
        loss = logits * wide + (logits * size if size < wide else 0)
    else:
        # The gradients of all chunks; of the last its log-probabilities and their gradient, made wide and narrowed.
        loss = logits * size + CHUNK_SIZE * (2 * wide + (size if size < wide else 0))
    head = logits * size + table * (size if layout.casts else 0) + positions * size
    gathered = table * size if layout.fsdp is not None else 0
    return _Root(saved, loss, head, gathered)


def _gathered(count: Count, layout: Layout) -> int:
    """A unit's weights as FSDP gathers them."""
    if layout.fsdp is None:
        return 0
    dense = count.other + count.experts // layout.ep
    return dense * layout.compute_size + count.router * layout.weight_size


def _reduced(count: Count, layout: Layout) -> int:
    """A unit's whole gradients, and the wide row of them that FSDP sums and cuts."""
    if layout.fsdp is None:
        return 0
    return layout.gathered(count) * (layout.compute_size + layout.weight_size)


def _gradient_bytes(count: Count, layout: Layout) -> int:
    """On the device, when a backward has made them all."""
    if layout.offload:
        return 0
    numbers = layout.updated(count) if layout.zero_stage == 2 else layout.held(count)
    return numbers * layout.weight_size


def _update(shape: ModelShape, layout: Layout, state: Memory) -> Memory:
    """Gradients are summed in buckets; then what the update of the largest parameter holds besides."""
    size, count = layout.weight_size, shape.count
    cut = 1 if layout.fsdp is None or not layout.optimizer.element_by_element else layout.fsdp
    largest = max(count.largest // cut, count.largest_experts // max(layout.ep, cut))
    moment = layout.optimizer.update_numbers(largest) * size
    bucket = 0
    if layout.fsdp is None and layout.world > 1:
        summed = count.other + count.router + (count.experts // layout.ep if layout.edp > 1 else 0)
        largest_summed = max(count.largest, count.largest_experts // layout.ep if layout.edp > 1 else 0)
        bucket = min(BUCKET_BYTES + largest_summed * size, summed * size)
    gradients = _gradient_bytes(count, layout)
    return dataclasses.replace(
        state, gradients=gradients, temporary=0 if layout.offload else max(moment, bucket), moment="update"
    )
