"""Every recipe is estimated, by the command as users give it."""

from __future__ import annotations

import json

import pytest

from moedist.cli.main import main
from moedist.launch.compose import conf_folder

RECIPES = sorted(path.stem for path in (conf_folder() / "experiment").glob("*.yaml"))
PUBLISHED = {
    # name: total of the published weights, and that without the experts a token does not go to: of so many layers, so
    # many idle experts of three matrices
    "deepseek_v3": (671_026_404_352, 58 * 248 * 3 * 7168 * 2048),
    "mixtral_8x7b": (46_702_792_704, 32 * 6 * 3 * 4096 * 14336),
    "olmoe_1b_7b": (6_919_161_856, 16 * 56 * 3 * 2048 * 1024),
    "qwen3_30b_a3b": (30_532_122_624, 48 * 120 * 3 * 2048 * 768),
}


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict:
    assert main(["estimate", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_the_ranks_that_it_asks_for(recipe: str, capsys: pytest.CaptureFixture[str]):
    found = told(capsys, f"experiment={recipe}")
    assert found["fits"] and 0 < found["memory_per_rank"] <= found["memory"]["usable"]
    assert found["memory_per_rank"] == sum(
        found["memory"][part] for part in ("weights", "gradients", "optimizer", "activations", "exchange", "temporary")
    )
    assert found["tokens_per_second"] > 0 and 0 < found["exposed_communication"] < 1 and 0 < found["mfu"] < 1
    if recipe in PUBLISHED:
        total, idle = PUBLISHED[recipe]
        assert found["parameters_total"] == total
        assert found["parameters_active"] == total - idle


def test_all_to_all_bytes_are_the_formula(capsys: pytest.CaptureFixture[str]):
    found = told(capsys, "experiment=olmoe_1b_7b")
    tokens, top_k, dim, ep = 2 * 4096, 8, 2048, 8
    rows = 8 * tokens * top_k * dim * (ep - 1) // ep  # bf16: dispatch, combine and their gradients
    gates = 8 * tokens * top_k * (ep - 1) // ep
    assert found["all_to_all_bytes_per_layer"] == rows + gates
    per_rank = found["all_to_all"]["bytes_per_layer_one_copy_per_rank"]
    assert per_rank / rows == pytest.approx(0.68, abs=0.01)  # a third less at K = 8
    # 16 layers, 16 micro-steps; dispatch and combine once more where all is computed again
    assert found["all_to_all"]["bytes_per_step"] == (rows + gates) * 3 // 2 * 16 * 16


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]):
    found = told(capsys, "experiment=mixtral_8x7b", "mesh.fsdp=null", code=3)
    assert not found["fits"]
    assert found["change"] == ["mesh.fsdp=64"]
    assert told(capsys, "experiment=mixtral_8x7b", *found["change"])["fits"]


def test_no_change_is_named_for_nothing(capsys: pytest.CaptureFixture[str]):
    layout = ("experiment=olmoe_1b_7b", "launch.nnodes=1", "model.layers.num_layers=12", "train.micro_batch=1")
    plain = "train.activation_checkpointing=none"
    found = told(capsys, *layout, plain, "mesh.ep=1", code=3)
    assert found["change"] == ["mesh.fsdp=8"]
    assert told(capsys, *layout, plain, "mesh.ep=1", *found["change"])["fits"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--top", "0"),
        ("--tokens", "0"),
        ("--price", "nan"),
        ("--search", "--trace", "runs/first"),
        ("--search", "--fake-run"),
        ("--search", "--tokens", "1e12"),
    ],
)
def test_flags_that_mean_nothing_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "experiment=tiny_cpu", *arguments]) == 2
    assert f"{arguments[-1] if arguments[-1].startswith('--f') else arguments[-2]} = " in capsys.readouterr().err


def test_what_fits_nowhere_says_so(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "experiment=deepseek_v3", "--ranks", "8", "mesh.ep=8", "mesh.fsdp=8"]) == 3
    assert "take more ranks" in capsys.readouterr().err


def test_a_layout_that_train_refuses_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "experiment=mixtral_8x7b", "mesh.ep=16"]) == 2
    assert "cannot be cut into 16 equal parts" in capsys.readouterr().err


def test_a_budget_has_a_time_and_a_price(capsys: pytest.CaptureFixture[str]):
    found = told(capsys, "experiment=olmoe_1b_7b", "--tokens", "1e12", "--price", "2")
    spent = found["budget"]
    assert spent["seconds"] == pytest.approx(1e12 / found["tokens_per_second"])
    assert spent["cost"] == pytest.approx(2 * spent["seconds"] / 3600 * 32)
