from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from moedist.bench.floor import Ceilings
from moedist.bench.layer import measure_case, saved_bytes, step_of
from moedist.bench.ours import ours, twins
from moedist.bench.peer.contract import Peer
from moedist.bench.peer.find import choose_peers, find_peers
from moedist.bench.products import bare_products
from moedist.bench.rounds import QUOTABLE, ratio, sample, take_turns
from moedist.bench.shapes import SHAPES, LayerShape, choose_shapes
from moedist.bench.trial import PATTERNS, make_trial
from moedist.cli.main import main
from moedist.config import ConfigError
from moedist.mesh import Mesh

TINY = LayerShape("tiny", tokens=24, dim=16, hidden_dim=32, num_experts=4, top_k=2, dtype=torch.float32)
ALONE = Mesh.alone()
CEILINGS = Ceilings(flops=1e9, bytes=1e9)


def torch_only() -> list[Peer]:
    """Peers that need no package."""
    return [peer for peer in find_peers() if peer.package is None]


def test_all_contenders_compute_the_same_pairs():
    """By the gradient: with experts of one value, a token's output tells how much of its pairs came through."""
    for pattern in PATTERNS:
        trial = make_trial(TINY, pattern, None, ALONE)
        assert trial.asked_E.sum() == TINY.pairs
        expected = [trial.asked_E[-1] == 0] if pattern == "one_empty" else []
        assert all(expected)
        for peer in [ours(), *twins(), *torch_only()]:
            assert peer.why_not(trial) is None
            layer = peer.build(trial)
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    if "router" not in name:
                        parameter.fill_(0.05)
            out_TD = layer(trial.x_TD)[0]
            x_sum_T1 = trial.x_TD.detach().sum(1, keepdim=True)
            hidden_T1 = 0.05 * x_sum_T1
            wanted_TD = (torch.nn.functional.silu(hidden_T1) * hidden_T1 * 0.05 * TINY.hidden_dim).expand_as(out_TD)
            torch.testing.assert_close(out_TD, wanted_TD, msg=f"{peer.name}, {pattern}")


def test_the_limit_drops_for_those_who_know_it_and_others_are_skipped():
    trial = make_trial(TINY, "zipf", 1.0, ALONE)
    assert trial.drops and trial.kept_E.max() == 12 and trial.local_sizes == trial.kept_E.tolist()
    layer = ours().build(trial)
    assert torch.equal(layer.layer(trial.x_TD, layer.ctx).report.kept_E, trial.kept_E)
    assert all("capacity" in (peer.why_not(trial) or "") for peer in torch_only())
    assert not make_trial(TINY, "balanced", 1.0, ALONE).drops


def test_a_step_leaves_fresh_gradients():
    trial = make_trial(TINY, "balanced", 1.0, ALONE)
    for peer in [ours(), *torch_only()]:
        layer = peer.build(trial)
        step = step_of(layer, trial)
        step()
        first = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
        step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, first[name], msg=f"{peer.name}: {name}")
            assert parameter.grad.abs().sum() > 0, f"{peer.name}: {name}"


@pytest.mark.requirement("R2-62")
def test_a_case_says_all_that_it_owes():
    trial = make_trial(TINY, "balanced", 1.0, ALONE)
    case = measure_case(trial, [*twins(), *torch_only(), Missing()], 4, CEILINGS)
    assert case["routing"] == "forced balanced" and case["rows_per_expert_max_over_mean"] == 1
    assert case["skipped"] == {"missing": "is not installed"}
    names = [entry["name"] for entry in case["contenders"]]
    assert names == ["moedist", "moedist_loop", "moedist_padded", "grouped_mm", "torchtitan_like"]
    assert (
        case["ratio_to_grouped_mm"]
        == next(e for e in case["contenders"] if e["name"] == "grouped_mm")["ours_over_this"]
    )
    for entry in case["contenders"]:
        assert entry["share_of_f2"] == pytest.approx(case["floor"]["f2_ms"] / entry["ms"])
        assert entry["tflops"] == pytest.approx(case["floor"]["gemm_tflop"] / entry["ms"] * 1e3)
        assert entry["saved_over_least"] > 1
    json.dumps(case)


class Missing(Peer):
    name = package = "missing"


def test_products_are_the_experts_own(monkeypatch):
    """As many FLOPs as the floor counts for the experts."""
    from torch.utils.flop_counter import FlopCounterMode

    for shape in (TINY, dataclasses.replace(TINY, gated=False)):
        multiply = bare_products(make_trial(shape, "balanced", 1.0, ALONE))
        with FlopCounterMode(display=False) as counter:
            multiply()
        assert counter.get_total_flops() == 6 * shape.pairs * shape.num_matrices * shape.dim * shape.hidden_dim


def test_saved_bytes_are_counted_once_and_without_weights():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, x_TD):
            y_TD = x_TD * self.weight  # keeps x and the weight
            return (y_TD.exp().sin() + y_TD.sin(),)  # keeps exp(y) for both of its uses, and y

    trial = make_trial(TINY, "balanced", 1.0, ALONE)
    assert saved_bytes(Twice(), trial) == 3 * 24 * 16 * 4


def test_turns_go_round():
    called = []
    seconds = take_turns({name: lambda name=name: called.append(name) for name in "abc"}, 3, ALONE, warm_up=1)
    assert "".join(called) == "abc" + "bca" + "cab" + "abc"
    assert [len(seconds[name]) for name in "abc"] == [3, 3, 3]


def test_ratios_are_of_rounds():
    assert ratio([1, 20, 3, 4], [2, 40, 6, 8]).median == 0.5
    assert sample([1.0] * 5).quotable and not sample([1.0, 1.0, 2.0, 3.0, 3.0]).quotable
    assert sample([1.0, 1 + QUOTABLE]).spread > QUOTABLE


def test_bad_names_are_refused():
    for names, words in (("cpu,none", "is not known"), ("nope", "olmoe")):
        with pytest.raises(ConfigError, match=words):
            choose_shapes(names, "cpu")
    with pytest.raises(ConfigError, match="9"):
        choose_shapes("cpu", "cpu", top_k=9)
    with pytest.raises(ConfigError, match="megablocks"):
        choose_peers(["nobody"])
    assert [peer.name for peer in choose_peers(["transformers"])] == [
        "transformers_eager",
        "transformers_batched_mm",
        "transformers_grouped_mm",
    ]
    assert [shape.name for shape in choose_shapes("all", "cpu")] == ["cpu", "cpu_many"]
    assert len(choose_shapes("all", "cuda")) == 5


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--config", "none"], "--config"),
        (["--routing", "none"], "--routing"),
        (["--peer", "none"], "--peer"),
        (["--capacity-factor", "much"], "--capacity-factor"),
        (["--capacity-factor", "0"], "--capacity-factor"),
        (["--rounds", "2"], "--rounds"),
        (["--nproc", "3"], "--nproc"),
    ],
)
def test_bad_input_costs_two(arguments, key, capsys):
    assert main(["bench", "layer", *arguments]) == 2
    assert f"moedist bench: {key} = " in capsys.readouterr().err


def test_the_command_prints_and_draws(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SHAPES, "cpu", dataclasses.replace(TINY, name="cpu"))
    monkeypatch.setattr("moedist.bench.ceilings.MEASURE_S", 0.01)
    arguments = ["bench", "layer", "--config", "cpu", "--peer", "grouped_mm,megablocks", "--rounds", "4"]
    arguments += ["--routing", "zipf,one_empty", "--capacity-factor", "none"]
    picture = tmp_path / "layer.html"
    assert main([*arguments, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "cpu, forced zipf, dropless, 4 rounds" in out and "cpu, forced one_empty" in out
    assert "skipped: megablocks is not installed" in out and "grouped_mm" in out and "bare products" in out
    assert "forced one_empty" in picture.read_text()
    assert main([*arguments, "--plot", str(picture)]) == 2
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["routing"] == "forced zipf" and found["ratio_to_grouped_mm"] > 0 and len(found["cases"]) == 2
    assert found["versions"]["torch"] == torch.__version__ and {"load_before", "ranks", "threads", "date"} <= set(found)


@pytest.mark.slow
def test_a_layer_is_measured_with_torch_and_numpy_alone():
    """In a process that has nothing else to import."""
    program = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in set(sys.argv[1].split(",")):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
from moedist.bench import ceilings, shapes
import dataclasses
ceilings.MEASURE_S = 0.01
shapes.SHAPES["cpu"] = dataclasses.replace(shapes.SHAPES["cpu"], tokens=32, dim=16, hidden_dim=16)
from moedist.cli.main import main
sys.exit(main(["bench", "layer", "--config", "cpu", "--rounds", "4", "--json", "--peer", "grouped_mm"]))
"""
    missing = "hydra,omegaconf,pydantic,yaml,rich,wandb,tokenizers,deepspeed,transformers,plotly"
    done = subprocess.run([sys.executable, "-c", program, missing], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratio_to_grouped_mm"] > 0


@pytest.mark.slow
def test_deepspeed_on_two_ranks(capfd):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    arguments = ["bench", "layer", "--config", "cpu", "--peer", "deepspeed", "--nproc", "2", "--rounds", "4", "--json"]
    assert main(arguments) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["ratio_to_deepspeed"] > 0 and found["ranks"] == 2
    assert [entry["name"] for entry in found["cases"][0]["contenders"]] == ["moedist", "deepspeed"]


@pytest.mark.slow
def test_transformers_and_deepspeed_compute_the_same_pairs():
    for package in ("deepspeed", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    trial = make_trial(TINY, "zipf", None, ALONE)
    for peer in choose_peers(["deepspeed", "transformers"]):
        layer = peer.build(trial)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "router" not in name and "wg" not in name:
                    parameter.fill_(0.05)
        out_TD = layer(trial.x_TD)[0]
        hidden_T1 = 0.05 * trial.x_TD.detach().sum(1, keepdim=True)
        wanted_TD = (torch.nn.functional.silu(hidden_T1) * hidden_T1 * 0.05 * TINY.hidden_dim).expand_as(out_TD)
        torch.testing.assert_close(out_TD, wanted_TD, msg=f"{peer.name}")
