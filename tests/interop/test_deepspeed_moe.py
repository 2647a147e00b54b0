"""DeepSpeed's per-expert files, made by hand as its engine makes them (tests/reference has real ones)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from moedist.cli.main import main
from moedist.interop.deepspeed_moe import open_checkpoint, read_state
from moedist.moe.experts.contract import Rows
from moedist.moe.experts.loop import LoopConfig
from moedist.train.checkpoint import CheckpointError
from tests.train.test_checkpoint_damage import Payload

DIM, HIDDEN, EXPERTS = 4, 6, 12
Output = pytest.CaptureFixture[str]


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))


def gated(*names: str) -> nn.Module:
    """Gate, up, down under the given names, defined in another order."""
    gate, up, down = names
    sizes = {up: (DIM, HIDDEN), down: (HIDDEN, DIM), gate: (DIM, HIDDEN)}
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


def write(folder: Path, layers: dict[str, list[nn.Module]], dense: dict[str, Tensor] | None = None) -> Path:
    """``<folder>/saved/step7`` and ``latest``, as the engine writes them."""
    path = folder / "saved" / "step7"
    path.mkdir(parents=True)
    (path.parent / "latest").write_text("step7")
    module = dict(dense or {})
    for number, (layer, experts) in enumerate(layers.items()):
        module[f"{layer}.deepspeed_moe.gate.wg.weight"] = torch.randn(len(experts), DIM)
        for expert, content in enumerate(experts):
            prefix = f"{layer}.deepspeed_moe.experts.deepspeed_experts.{expert}."
            state = {prefix + name: value for name, value in content.state_dict().items()}
            torch.save(state, path / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt")
    state = {"module": module, "ds_config": {"lr": 0.1}, "num_experts": [EXPERTS], "global_steps": 7, "optimizer": None}
    torch.save(state, path / "mp_rank_00_model_states.pt")
    return path.parent


@pytest.mark.pitfall("30")
def test_experts_are_stacked_by_number(tmp_path: Path):
    """Pitfall 30: with twelve, "10" comes before "2" where ids are sorted as text."""
    experts = [two() for _ in range(EXPERTS)]
    for number, expert in enumerate(experts):
        nn.init.constant_(expert[0].bias, number)  # type: ignore[index]
    saved = write(tmp_path, {"h.2.ffn": experts}, {"norm.weight": torch.ones(DIM)})
    for path in (saved, saved / "step7"):
        state = read_state(open_checkpoint(path), rename=False)
        assert state["h.2.ffn.deepspeed_moe.experts.0.bias"][:, 0].tolist() == list(range(EXPERTS))
        for name in ("0.weight", "2.weight", "2.bias"):
            expected = torch.stack([expert.state_dict()[name] for expert in experts])
            assert torch.equal(state[f"h.2.ffn.deepspeed_moe.experts.{name}"], expected)
        assert torch.equal(state["norm.weight"], torch.ones(DIM))
        assert len(state) == 6


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), None])
def test_renamed_they_are_the_same_functions(tmp_path: Path, names: tuple[str, str, str] | None):
    """By our own experts, row for row."""
    experts = [two() if names is None else gated(*names) for _ in range(EXPERTS)]
    state = read_state(open_checkpoint(write(tmp_path, {"blocks.0.ffn": experts})))
    prefix = "blocks.0.ffn.moe."
    assert state[f"{prefix}router.weight"].shape == (EXPERTS, DIM)
    config = LoopConfig(hidden_dim=HIDDEN, activation="gelu" if names is None else "swiglu", bias=names is None)
    ours = config.build(DIM, EXPERTS)
    of_bank = f"{prefix}bank.experts."
    ours.load_state_dict({name.removeprefix(of_bank): value for name, value in state.items() if of_bank in name})
    x_RD = torch.randn(2 * EXPERTS, DIM)
    ends_e = torch.arange(2, 2 * EXPERTS + 1, 2, dtype=torch.int32)
    got = ours(Rows(x_RD, torch.ones(2 * EXPERTS), (2,) * EXPERTS, ends_e))
    for number, (expert, rows) in enumerate(zip(experts, x_RD.split(2), strict=True)):
        if names is None:
            expected = expert(rows)
        else:
            gate, up, down = (expert[name] for name in names)  # type: ignore[index]
            expected = down(nn.functional.silu(gate(rows)) * up(rows))
        torch.testing.assert_close(got[2 * number : 2 * number + 2], expected)


def three() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(DIM, DIM, bias=False) for name in ("a", "b", "c")})


@pytest.mark.parametrize(
    ("make", "dense"),
    [
        (three, {}),
        (lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM)), {}),
        (lambda: nn.Sequential(nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(HIDDEN, DIM)), {}),
        (lambda: nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, HIDDEN)), {}),
        (two, {"f.coefficient.weight": torch.zeros(2, DIM)}),
    ],
    ids=["names", "norm", "one bias", "width", "residual"],
)
def test_what_our_layer_is_not_keeps_its_names(tmp_path: Path, capsys: Output, make: Any, dense: dict[str, Tensor]):
    saved = write(tmp_path, {"f": [make() for _ in range(2)], "g": [two() for _ in range(3)]}, dense)
    target = tmp_path / "imported"
    assert main(["checkpoint", "import-deepspeed", str(saved), str(target)]) == 0
    assert "DeepSpeed's names kept: f." in capsys.readouterr().out
    with safe_open(target / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "f.deepspeed_moe.gate.wg.weight" in names and any("f.deepspeed_moe.experts." in name for name in names)
    assert "g.moe.router.weight" in names and "g.moe.bank.experts.up" in names


def test_the_command_writes_what_is_read(tmp_path: Path, capsys: Output):
    saved = write(tmp_path, {"b.0": [two() for _ in range(EXPERTS)], "b.1": [gated("w1", "w3", "w2")] * 3})
    for flags, rename in (([], True), (["--keep-names"], False)):
        target = tmp_path / f"imported_{rename}"
        argv = ["checkpoint", "import-deepspeed", str(saved), str(target), "--max-shard-size", "1KB", "--json", *flags]
        assert main(argv) == 0
        told, found = json.loads(capsys.readouterr().out), {}
        for path in sorted(target.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        expected = read_state(open_checkpoint(saved), rename=rename)
        assert told["files"] > 1 and found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert main(argv) == 2
    assert "exists already" in json.loads(capsys.readouterr().out)["errors"][0]["problem"]


# Bad files


def expert_file(saved: Path, number: int) -> Path:
    return saved / "step7" / f"layer_0_expert_{number}_mp_rank_00_model_states.pt"


def give_another_id(saved: Path) -> None:
    expert_file(saved, 3).write_bytes(expert_file(saved, 4).read_bytes())


def widen(saved: Path) -> None:
    state = torch.load(expert_file(saved, 5), weights_only=True)
    torch.save({name: torch.cat([value, value]) for name, value in state.items()}, expert_file(saved, 5))


BAD = {
    "a missing expert": (
        lambda saved: expert_file(saved, 10).unlink(),
        r"layer f has 12 experts, .* no file of \[10\]",
    ),
    "the last one missing": (lambda saved: expert_file(saved, 11).unlink(), r"has 12 experts, .* no file of \[11\]"),
    "an expert twice": (give_another_id, r"experts\.4\..*', which is no parameter of expert 3"),
    "another make": (widen, "layer_0_expert_5_.* holds an expert of another make than .*expert_0_"),
    "a cut file": (
        lambda saved: expert_file(saved, 2).write_bytes(expert_file(saved, 2).read_bytes()[:-100]),
        "layer_0_expert_2_mp_rank_00_model_states.pt cannot be read as tensors",
    ),
    "no model": (lambda saved: (saved / "step7" / "mp_rank_00_model_states.pt").unlink(), "holds no checkpoint"),
    "two model-parallel ranks": (
        lambda saved: (saved / "step7" / "mp_rank_01_model_states.pt").touch(),
        "written by 2 model-parallel ranks",
    ),
    "a tag elsewhere": (
        lambda saved: (saved / "latest").write_text("../other"),
        "names '../other', which is no folder",
    ),
    "nothing": (lambda saved: (saved / "latest").write_text("step8"), "step8 holds no checkpoint of DeepSpeed's MoE"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(tmp_path: Path, capsys: Output, what: str):
    saved = write(tmp_path, {"f": [two() for _ in range(EXPERTS)]})
    apply, message = BAD[what]
    apply(saved)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved)
    assert main(["checkpoint", "import-deepspeed", str(saved), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"CHECKPOINT = '{saved}' cannot be used" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"])
def test_a_crafted_file_runs_nothing(tmp_path: Path, name: str):
    saved, marker = write(tmp_path, {"f": [two() for _ in range(3)]}), tmp_path / "marker"
    torch.save({"module": Payload(marker), "x": Payload(marker)}, saved / "step7" / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as tensors: Weights only load failed"):
        open_checkpoint(saved)
    assert not marker.exists()
    torch.load(saved / "step7" / name, weights_only=False)
    assert marker.exists(), "the payload is harmless, and this test empty"
