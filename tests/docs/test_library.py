"""The recipes of docs/library.md run as they stand there, and n ranks give the gradients of one device."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import moedist.mesh
import moedist.moe
import moedist.parallel
from moedist.mesh import adopt_mesh
from moedist.moe import MoEConfig, TokenContext, routed
from moedist.moe.balance.bias import BiasConfig
from moedist.parallel import spread_as_guest
from tests.docs.pages import ROOT, blocks, prose
from tests.ranks import Here

PAGE = ROOT / "docs" / "library.md"
WORLD = 4
RATE = 1024.0
"""Of SGD: a weight then moves by its gradient alone, to all of its digits."""


def recipe(name: str) -> SimpleNamespace:
    """The names that a script of the page defines; its `main` is not run."""
    (code,) = [block for block in blocks(PAGE, "python") if block.startswith(f'"""{name}.')]
    names: dict[str, Any] = {"__name__": name}
    exec(compile(code, f"{PAGE}: {name}", "exec"), names)
    return SimpleNamespace(**names)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class OneDevice:
    """One process that runs the capacity groups of all ranks one after the other and adds up their gradients; what the
    balance loss counts over all ranks is counted in a first pass."""

    def __init__(self, model: nn.Module, num_tokens: Tensor):
        self.model, self.num_tokens = model, num_tokens

    def backward(self, script: SimpleNamespace, batches: list[tuple[Tensor, ...]]) -> None:
        counts: list[list[Tensor]] = []

        def forward(at: int, count: Any) -> Tensor:
            with (
                mock.patch.object(routed, "all_sum", count),
                mock.patch.object(script.dist, "all_reduce", lambda tensor: tensor.copy_(self.num_tokens)),
                mock.patch.object(script.dist, "get_world_size", lambda: 1),
            ):
                return script.rank_loss(self.model, *batches[at])

        for at in range(len(batches)):
            seen: list[Tensor] = []
            forward(at, lambda asked_E, axis, seen=seen: (seen.append(asked_E.clone()), asked_E)[1])
            counts.append(seen)
        for at in range(len(batches)):
            totals = iter(sum(layer) for layer in zip(*counts, strict=True))
            forward(at, lambda asked_E, axis, totals=totals: next(totals)).backward()


def one_device(script: SimpleNamespace) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = script.Model().double()
    batches = [script.batch(0, rank) for rank in range(WORLD)]
    OneDevice(model, sum(valid_BS.sum() for _, valid_BS in batches)).backward(script, batches)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients(here: Here, name: str) -> list[Any]:
    """By EP size: whole gradients by name, the norm, and the number of dropped pairs."""
    script = recipe(name)
    found = []
    for ep in (1, 2, 4):
        model, ddp, _ = script.build(ep, torch.float64)
        script.rank_loss(ddp, *script.batch(0, here.rank)).backward()
        grads = {key: whole(parameter.grad).clone() for key, parameter in model.named_parameters()}
        norm = script.clip_gradients(model, 0.01).item()
        clipped = script.clip_gradients(model, None).item()
        found.append((grads, norm, clipped))
    return found


@pytest.mark.parametrize("name", ["train_ddp", "train_fsdp2"])
def test_n_ranks_equal_one_device(ranks, name):
    reference = one_device(recipe(name))
    total = torch.stack([grad.square().sum() for grad in reference.values()]).sum().sqrt().item()
    for found in ranks(WORLD).run(gradients, name):
        for grads, norm, clipped in found:
            assert grads.keys() == reference.keys()
            for key, grad in grads.items():
                torch.testing.assert_close(grad, reference[key], atol=1e-12, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
            assert norm == pytest.approx(total, rel=1e-12) and clipped == pytest.approx(0.01, rel=1e-12)


def equal_batches(here: Here) -> float:
    """Largest difference between the short form, for ranks that have equally many tokens, and the exact one."""
    script = recipe("train_ddp")
    model, ddp, _ = script.build(2, torch.float64)
    token_BS, valid_BS = script.batch(0, here.rank)[0], torch.ones(4, 16, dtype=torch.bool)
    grads = []
    for short in (False, True):
        model.zero_grad()
        if short:
            logits_TV, balance = ddp(token_BS, valid_BS, None)
            loss = script.F.cross_entropy(logits_TV, (token_BS.flatten() + 1) % 64) + balance
        else:
            loss = script.rank_loss(ddp, token_BS, valid_BS)
        loss.backward()
        grads.append([whole(parameter.grad).clone() for parameter in model.parameters()])
    return max((one - other).abs().max().item() for one, other in zip(*grads, strict=True))


def test_the_short_form_of_the_loss(ranks):
    assert max(ranks(WORLD).run(equal_batches)) <= 1e-13


def saved_and_loaded(here: Here, folder: str) -> bool:
    """A model saved at EP 4 and loaded at EP 2."""
    from torch.distributed import checkpoint

    script = recipe("train_ddp")
    saved, loaded = (script.build(ep)[0] for ep in (4, 2))
    weights = {name: whole(weight).clone() for name, weight in saved.state_dict().items()}
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    checkpoint.save(saved.state_dict(), checkpoint_id=folder)
    state = loaded.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    return all(torch.equal(whole(weight), weights[name]) for name, weight in state.items())


def in_bf16(here: Here) -> tuple[torch.dtype, float]:
    """Under FSDP2's own mixed precision, the router a unit of its own as the page says: dtype of its weight in forward,
    and how far its gradient is from that in fp32, relative to its largest entry."""
    script = recipe("train_fsdp2")
    grads: list[Tensor] = []
    seen: list[torch.dtype] = []
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        torch.manual_seed(0)
        model = script.Model()
        ignored = set(spread_as_guest(model, adopt_mesh(2, "cpu")).values())
        for block in model.blocks:
            block.moe.router.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
            fully_shard(block.moe.router)
            fully_shard(block, mp_policy=policy, ignored_params=ignored)
        fully_shard(model, mp_policy=policy, ignored_params=ignored)
        script.rank_loss(model, *script.batch(0, here.rank)).backward()
        grads.append(whole(model.blocks[0].moe.router.weight.grad))
    return seen[-1], ((grads[1] - grads[0]).abs().max() / grads[0].abs().max()).item()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.pitfall("28")
def test_fsdp2_in_bf16_leaves_the_router_alone(ranks):
    for dtype, difference in ranks(WORLD).run(in_bf16):
        assert dtype == torch.float32 and 0 < difference < 0.3, difference


@pytest.mark.pitfall("29")
def test_a_checkpoint_at_another_ep(ranks, tmp_path):
    """Pitfall 29, in somebody else's own way to save."""
    assert all(ranks(WORLD).run(saved_and_loaded, str(tmp_path / "checkpoint")))


def test_the_bias_is_moved_as_shown():
    (code,) = [block for block in blocks(PAGE, "python") if "move_bias" in block]
    layer = MoEConfig(balance={"bias": BiasConfig(rate=0.5)}).build(8)
    reports = [layer(torch.randn(6, 8), TokenContext.of_rows(2, 3)).report for _ in range(2)]
    counted: list[Tensor] = []
    dist = SimpleNamespace(all_reduce=counted.append)
    exec(code, {"reports_of_the_step": reports, "layer": layer, "dist": dist})
    assert counted[0].tolist() == (reports[0].asked_E + reports[1].asked_E).tolist() and counted[0].sum() == 24
    expected_E = 0.5 * (3 - counted[0]).sign()
    assert torch.equal(layer.router.selection_bias, expected_E - expected_E.mean())


def test_what_is_used_is_public():
    """The names of the page's table come from the three rooms that it says."""
    public = {name for room in (moedist.mesh, moedist.moe, moedist.parallel) for name in room.__all__}
    table = prose(PAGE).partition("## What you use")[2].partition("##")[0]
    named = set(re.findall(r"^\| `([A-Za-z_]+)[.(]", table, re.MULTILINE)) - {"layer"}
    assert len(named) == 6 and named <= public


def with_deepspeed(here: Here, folder: str) -> dict[tuple[int, int], Any]:
    """By EP size and ZeRO stage: change of every weight by one step of SGD, clipped but for ZeRO 0, and the norm."""
    os.environ.setdefault("LOCAL_RANK", str(here.rank))
    from torch.distributed import checkpoint

    script = recipe("train_deepspeed")
    real = script.deepspeed.initialize

    def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
        """With SGD in the place of AdamW."""
        keys = ("params", "name", "moe")
        groups = [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]
        sgd = torch.optim.SGD(groups, lr=RATE)
        return real(model=model, optimizer=sgd, config={**config, "zero_allow_untested_optimizer": True})

    found = {}
    with mock.patch.object(script.deepspeed, "initialize", initialize):
        for ep, stage in itertools.product((1, 2, 4), (0, 1, 2)):
            lent, engine = script.build(ep, stage)
            before = {name: whole(weight).clone() for name, weight in lent.state_dict(engine.module).items()}
            engine.backward(script.rank_loss(engine, *script.batch(0, here.rank)))
            engine.step()
            after = {name: whole(weight) for name, weight in lent.state_dict(engine.module).items()}
            change = {name: (before[name] - weight) / RATE for name, weight in after.items()}
            found[ep, stage] = change, engine.get_global_grad_norm()
            with pytest.raises(RuntimeError, match="knows its own experts only"):
                engine.save_checkpoint(f"{folder}/theirs")
            checkpoint.save(lent.state_dict(engine.module), checkpoint_id=f"{folder}/{ep}_{stage}")
            loaded = {name: torch.zeros(weight.shape) for name, weight in after.items()}
            checkpoint.load(loaded, checkpoint_id=f"{folder}/{ep}_{stage}")
            assert all(torch.equal(loaded[name], weight) for name, weight in after.items())
            engine.destroy()
    return found


@pytest.mark.slow
@pytest.mark.pitfall("1", "2", "3", "29")
def test_deepspeed_equals_one_device(ranks, tmp_path):
    """ZeRO 0, 1 and 2 at EP 1, 2 and 4; saved by one rank's names for all."""
    reference = one_device(recipe("train_ddp"))
    total = torch.stack([grad.square().sum() for grad in reference.values()]).sum().sqrt().item()
    assert total > 1, "the clip must act"
    for found in ranks(WORLD).run(with_deepspeed, str(tmp_path), limit_s=300):
        for (ep, stage), (change, norm) in found.items():
            assert change.keys() == reference.keys()
            scale = 1.0 / total if stage > 0 else 1.0
            for name, grad in reference.items():
                difference = (change[name] - scale * grad).abs().max() / grad.abs().max()
                assert difference <= 1e-5, f"{name} at ep {ep}, ZeRO {stage}: {difference:.1e}"
            if stage > 0:
                assert norm == pytest.approx(total, rel=1e-5)


def hugging_face(family: str) -> nn.Module:
    """A model of two blocks with random weights."""
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    if family == "Mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=8)
    elif family == "Qwen3Moe":
        config = transformers.Qwen3MoeConfig(**sizes, num_experts=8, moe_intermediate_size=48, norm_topk_prob=True)
    else:
        config = transformers.OlmoeConfig(**sizes, num_experts=8)
    config._experts_implementation = "eager"  # theirs in other ways has no fp64
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def library_gradients(
    model: nn.Module, script: SimpleNamespace, world: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Hugging Face's own block on the rows of all ranks: gradients, logits of every position and of the router."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rows = [script.batch(0, rank) for rank in range(world)]
    token_BS, valid_BS = (torch.cat(part) for part in zip(*rows, strict=True))
    gate = model.model.layers[1].mlp.gate
    seen = []
    gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    logits_BSV = model(input_ids=token_BS, attention_mask=valid_BS.long()).logits
    is_target_BS = valid_BS[:, 1:] & valid_BS[:, :-1]
    logprobs_BSV = logits_BSV[:, :-1].log_softmax(-1)
    task = -logprobs_BSV.gather(2, token_BS[:, 1:, None])[..., 0][is_target_BS].mean()
    # Theirs counts each of the K choices in full, ours as shares that sum to 1.
    balance = load_balancing_loss_func((seen[0],), gate.num_experts, gate.top_k, valid_BS.long()) / gate.top_k
    (task + 0.01 * balance).backward()
    return {name: p.grad for name, p in model.named_parameters()}, logits_BSV.detach(), seen[0].detach()


def swapped(here: Here, family: str, ep: int, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference from Hugging Face's own block, relative to the largest entry, by what it is."""
    import copy

    script = recipe("train_mixtral")
    model = hugging_face(family).to(dtype)
    reference, logits_BSV, scores_TE = library_gradients(copy.deepcopy(model), script, here.world)
    block, ddp, _ = script.build(ep, model)
    seen: dict[str, Tensor] = {}
    block.moe.router.register_forward_hook(lambda module, args, output: seen.update(router=output.logits_TE))
    model.register_forward_hook(lambda module, args, output: seen.update(logits=output.logits))
    token_BS, valid_BS = script.batch(0, here.rank)
    script.rank_loss(ddp, block, token_BS, valid_BS).backward()

    def apart(ours: Tensor, theirs: Tensor) -> float:
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    rows = slice(here.rank * 4, here.rank * 4 + 4)
    own_T = torch.arange(scores_TE.shape[0]).view(-1, 16)[rows].flatten()[valid_BS.flatten()]
    found = {
        "logits": apart(seen["logits"][valid_BS], logits_BSV[rows][valid_BS]),
        "router": apart(seen["router"][valid_BS.flatten()], scores_TE[own_T]),
    }
    grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    place = "model.layers.1.mlp."
    ours = {name: grads.pop(f"{place}moe.bank.experts.{name}") for name in ("gate", "up", "down")}
    grads[f"{place}gate.weight"] = grads.pop(f"{place}moe.router.weight")
    grads[f"{place}experts.gate_up_proj"] = torch.cat([ours["gate"].mT, ours["up"].mT], dim=1)
    grads[f"{place}experts.down_proj"] = ours["down"].mT
    assert grads.keys() == reference.keys()
    return found | {name: apart(grad, reference[name]) for name, grad in grads.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_a_hugging_face_block_is_swapped(ranks, family):
    """Outputs, router logits and every gradient. fp64 is not nearer: Hugging Face takes its softmax in fp32."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 2e-6)):
        for ep in (1, 2):
            for found in ranks(2).run(swapped, family, ep, dtype):
                worst = max(found, key=found.__getitem__)
                assert found[worst] <= tolerance, f"{worst} at ep {ep}, {dtype}: {found[worst]:.1e}"
                print(family, dtype, ep, worst, found[worst])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_ddp", "train_fsdp2", "train_deepspeed", "train_mixtral"])
def test_scripts_run_by_torchrun(tmp_path, name):
    """As the first line of each says; the loss falls."""
    (code,) = [block for block in blocks(PAGE, "python") if block.startswith(f'"""{name}.')]
    (tmp_path / f"{name}.py").write_text(code)
    command = shlex.split(code.partition("Run: ")[2].partition('"""')[0])
    assert command == ["torchrun", "--nproc-per-node=4", f"{name}.py"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+ loss (\S+) norm", done.stdout, re.MULTILINE)]
    assert len(losses) == 20 and losses[-1] < losses[0] / 2
