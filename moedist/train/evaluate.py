"""The held-out loss, measured by all ranks together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from moedist.data.contract import Source
from moedist.data.loader import Loader
from moedist.mesh import Mesh
from moedist.mesh.collectives import all_sum
from moedist.model.batch import TokenBatch
from moedist.model.contract import LanguageModel, ModelOutput, StepContext
from moedist.model.loss import token_loss
from moedist.parallel import release
from moedist.train.build import autocast
from moedist.train.config import RunConfig


def evaluate(
    model: LanguageModel,
    source: Source,
    config: RunConfig,
    mesh: Mesh,
    step: int,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Mean next-token loss in nats over the held-out part, or over ``train.eval_batches`` micro-steps of it.

    Every rank takes the same number of micro-steps, so that their exchanges meet; past the end a rank's micro-batch is
    padding. Without noise and, unless ``moe.capacity.eval_factor`` says otherwise, under the training's capacity.

    Args:
        step: optimizer steps that the model has taken: schedules of its layers (a capacity factor, a temperature) stand
            where the next step of training would find them.
        beat: called before each micro-step: the whole may take long, one micro-step may not.
    """
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch, output in held_out(model, source, config, mesh, step, beat):
        total += torch.stack([token_loss(output, batch.target_BS).double(), batch.num_targets().double()])
    loss, count = all_sum(total, mesh.dp).tolist()
    return loss / max(count, 1.0)


def held_out(
    model: LanguageModel,
    source: Source,
    config: RunConfig,
    mesh: Mesh,
    step: int,
    beat: Callable[[], None] = lambda: None,
) -> Iterator[tuple[TokenBatch, ModelOutput]]:
    """This rank's micro-batches of the held-out part and what the model makes of them; see `evaluate`."""
    loader = Loader(
        source,
        "valid",
        sequence_length=config.train.sequence_length,
        micro_batch=config.train.micro_batch,
        rank=mesh.dp.rank,
        world_size=mesh.dp.size,
        cross_documents=config.data.cross_documents,
        pin_memory=mesh.device.type == "cuda",
    )
    was_training = model.training
    model.eval()
    for micro_batches in itertools.islice(loader, config.train.eval_batches):
        beat()
        for batch in micro_batches:
            batch = batch.to(mesh.device)
            context = StepContext(
                seed=config.seed,
                step=torch.tensor(step, device=mesh.device),
                num_tokens=batch.num_tokens(),
                training=False,
            )
            with torch.no_grad(), autocast(config, mesh):
                output = model(batch, context)
            yield batch, output
    release(model)
    model.train(was_training)
