from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moedist.config import ConfigError, ConfigErrors, to_mapping
from moedist.launch.compose import compose, compose_onto, compose_yaml, conf_folder, find_groups
from moedist.launch.saved import decode_saved, read_mapping, write_config
from moedist.train.config import RunConfig
from tests.launch.plugin import write_plugin


def errors_of(*overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    errors = caught.value.errors if isinstance(caught.value, ConfigErrors) else (caught.value,)
    return {error.key: str(error) for error in errors}


def test_without_a_recipe_all_defaults_are_the_dataclasses():
    composed = compose(["experiment=null"])
    assert composed.config == RunConfig()
    assert composed.mapping == to_mapping(RunConfig())


def test_the_default_recipe_is_tiny_cpu():
    assert compose([]).config == compose(["experiment=tiny_cpu"]).config != RunConfig()


def test_values_and_choices_are_overridden_without_a_plus():
    config = compose(["moe/experts=loop", "moe.experts.hidden_dim=32", "mesh.ep=4", "train.clip_norm=null"]).config
    assert (config.moe.experts.kind, config.moe.experts.hidden_dim) == ("loop", 32)
    assert (config.mesh.ep, config.train.clip_norm) == (4, None)


def test_named_choices_are_picked_and_removed():
    assert set(compose(["moe/balance=[z_loss]"]).config.moe.balance) == {"z_loss"}
    assert set(compose(["~moe.balance.z_loss"]).config.moe.balance) == {"switch"}
    assert set(compose(["log/sink=[jsonl]"]).config.log.sinks) == {"jsonl"}
    added = compose(["+moe.balance.second={kind: switch, coefficient: 0.5}"]).config.moe.balance["second"]
    assert (added.kind, added.coefficient) == ("switch", 0.5)


def test_every_misspelt_key_is_named_with_the_nearest():
    errors = errors_of("moe.router.topk=3", "mesh.epp=2", "train.optimizer.beta3=0.1")
    assert set(errors) == {"moe.router.topk", "mesh.epp", "train.optimizer.beta3"}
    assert "moe.router.topk = 3 is not a known key. Did you mean moe.router.top_k?" in errors["moe.router.topk"]
    assert "Did you mean mesh.ep?" in errors["mesh.epp"]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["moe/router=topkk"], "moe/router", "'topkk' is no choice of moe/router. Did you mean topk?"),
        (["moe/balance=[switch,zloss]"], "moe/balance", "Did you mean z_loss?"),
        (
            ["experiment=tiny"],
            "experiment",
            "Choose one of: deepseek_v3, mixtral_8x7b, olmoe_1b_7b, qwen3_30b_a3b, tiny_cpu",
        ),
        (["moe.router=topk"], "moe.router", "Choose with a slash: moe/router=topk."),
        (["moe.router.kind=nope"], "moe.router.kind", "Choose one of: "),
        (["seed=1.5"], "seed", "has the wrong type. Set it to a whole number."),
        (["seed=1,2"], "seed", "names several values, and this command makes one run"),
        (["seed=[1"], "seed", "cannot be read"),
        (["nonsense"], "nonsense", "cannot be read"),
        (["~moe.nothing"], "moe.nothing", "is not a known key"),
        (["+moe.nothing=1"], "moe.nothing", "is not a known key"),
        (["mesh.ep=0"], "mesh.ep", "is not a number of ranks"),
        (["moe.capacity.factor=-1"], "moe.capacity.factor", "Set it above 0"),
        (["run.name=${nowhere}"], "run.name", "cannot be resolved"),
        (["plugins=[no_such_package]"], "plugins", "cannot be imported. Install the package"),
        (["plugins=no_such_package"], "plugins", "Write plugins=[no_such_package]."),
    ],
)
def test_what_cannot_be_composed(overrides: list[str], key: str, words: str):
    assert words in errors_of(*overrides)[key]


def test_values_from_the_environment_are_used_and_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CANARY", "secret-canary")
    overrides = ["run.name=${oc.env:CANARY}", "run.dir=/runs/${run.name}", "data.holdout_every=${seed}", "seed=7"]
    composed = compose(overrides)
    assert (composed.config.run.name, composed.config.run.dir) == ("secret-canary", "/runs/secret-canary")
    write_config(tmp_path / "config.yaml", composed.mapping)
    assert "canary" not in (tmp_path / "config.yaml").read_text()
    assert composed.mapping["run"]["dir"] == "/runs/${run.name}"
    assert decode_saved(read_mapping(tmp_path / "config.yaml")) == composed.config


def test_errors_do_not_show_values_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CANARY", "secret-canary")
    assert "canary" not in errors_of("seed=${oc.env:CANARY}")["seed"]


def test_a_secret_in_the_open_is_refused_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only a part of one's own can have such a key; no key of moedist's is taken for one."""
    write_plugin(tmp_path, "keyed")
    router = tmp_path / "keyed" / "moe" / "router" / "eager.py"
    router.write_text(router.read_text() + "    api_key: str | None = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CANARY", "secret-canary")
    chosen = ["plugins=[keyed]", "moe/router=eager"]
    (error,) = errors_of(*chosen, "moe.router.api_key=secret-canary").values()
    assert "moe.router.api_key = '<hidden>' is a secret in the open" in error and "${oc.env:NAME}" in error
    assert "canary" not in "".join(errors_of("log.sinks.wandb.api_key=secret-canary").values())
    composed = compose([*chosen, "moe.router.api_key=${oc.env:CANARY}"])
    assert to_mapping(composed.config.moe.router)["api_key"] == "secret-canary"
    assert "canary" not in str(composed.mapping)
    for overrides in (["data=synthetic", "train.global_batch_tokens=64"], ["data=text", "data.tokenizer=a.json"]):
        compose([*overrides, "experiment=null"])


def test_interpolations_within_the_configuration_are_resolved():
    composed = compose(["train.eval_every=${train.log_every}", "train.log_every=3", r"run.name=\${kept}"])
    assert composed.mapping["train"]["eval_every"] == 3
    assert composed.config.run.name == "${kept}"
    assert decode_saved(composed.mapping) == composed.config


@pytest.mark.parametrize("how", ["override", "environment"])
def test_a_plugin_with_one_module_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    name = f"outside_{how}"
    write_plugin(tmp_path, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = [f"plugins=[{name}]"] if how == "override" else []
    if how == "environment":
        monkeypatch.setenv("MOEDIST_PLUGINS", name)
    composed = compose([*named, "moe/router=eager", "moe.router.noise_std=0.5"])
    router = to_mapping(composed.config.moe.router)
    expected = {"kind": "eager", "top_k": 3, "noise_std": 0.5, "renormalize": None, "zeal": 1e-20}
    assert router | expected == router
    assert composed.config.plugins == (name,)
    assert decode_saved(yaml.safe_load(yaml.safe_dump(composed.mapping))) == composed.config


def test_cfg_job_shows_every_key():
    job = compose_yaml(["experiment=null"])
    assert set(job) == set(to_mapping(RunConfig()))
    assert job.train.optimizer.eps == 1e-8


def test_overrides_of_a_saved_configuration():
    saved = compose(["experiment=null", "seed=5", "moe.num_experts=4"]).mapping
    changed = compose_onto(
        saved, ["moe/experts=loop", "moe.experts.hidden_dim=16", "data=synthetic", "~log.sinks.wandb"]
    )
    config = changed.config
    assert (config.seed, config.moe.num_experts, config.moe.experts.kind) == (5, 4, "loop")
    assert (config.moe.experts.hidden_dim, config.data.kind, set(config.log.sinks)) == (
        16,
        "synthetic",
        {"console", "jsonl"},
    )
    assert compose_onto(saved).mapping == saved
    with pytest.raises(ConfigErrors, match="moe.num_expert = 3 is not a known key. Did you mean moe.num_experts"):
        compose_onto(saved, ["moe.num_expert=3"])


def test_groups_are_found_inside_choices():
    groups = {group.name: (group.key, group.many) for group in find_groups()}
    assert groups["moe/balance"] == ("moe.balance", True)
    assert groups["log/sink"] == ("log.sinks", True)
    assert groups["model/attention"] == ("model.attention", False)
    assert conf_folder() == Path(__file__).parents[2] / "conf"
