"""Holds conf/, the modules and the keys of the configuration together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import moedist
from moedist.config import to_mapping
from moedist.launch.choices import list_choices
from moedist.launch.compose import compose, compose_yaml, conf_folder, find_groups
from moedist.launch.validate import validate
from moedist.model.size import model_size

CONF = conf_folder()
GROUPS = {group.name: group for group in find_groups()}
RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def composed() -> dict[str, dict]:
    """What stands in the configuration for each choice, by ``group/kind``; a composition has a kind of every group."""
    kinds = {name: sorted(list_choices(group.base)) for name, group in GROUPS.items()}
    values: dict[str, dict] = {}
    for turn in range(max(map(len, kinds.values()))):
        overrides = [
            f"{name}=[{','.join(those)}]" if GROUPS[name].many else f"{name}={those[turn % len(those)]}"
            for name, those in kinds.items()
        ]
        # Not decoded: some of these choices do not go together.
        mapping = OmegaConf.to_container(compose_yaml(["experiment=null", *overrides]))
        for name, group in GROUPS.items():
            value = mapping
            for part in group.key.split("."):
                value = value[part]
            values |= {f"{name}/{one['kind']}": one for one in (value.values() if group.many else [value])}
    return values


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_each_choice_has_a_module_a_yaml_and_a_key(name: str, composed: dict[str, dict]):
    group = GROUPS[name]
    kinds = set(list_choices(group.base))
    files = {path.stem for path in (CONF / name).glob("*.yaml")}
    assert kinds == files, f"conf/{name}/*.yaml and moedist/{name}/*.py differ"
    assert group.key == group.base.path or group.many
    for kind in kinds:
        assert (Path(moedist.__file__).parent / name / f"{kind}.py").is_file()
        text = (CONF / name / f"{kind}.yaml").read_text()
        assert f"{kind}_defaults" in str(yaml.safe_load(text)["defaults"][0])
        if group.many:
            assert text.startswith(f"# @package {group.key}.{kind}\n")
        fields = {field.name for field in dataclasses.fields(list_choices(group.base)[kind])}
        assert set(composed[f"{name}/{kind}"]) == {"kind", *fields}


def test_no_yaml_is_outside_a_group():
    folders = {str(path.parent.relative_to(CONF)) for path in CONF.rglob("*.yaml")}
    assert folders == {".", "experiment", "moe", *GROUPS}


def test_nothing_in_conf_names_code_to_run():
    for path in CONF.rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path


def test_the_recipes_are_there():
    assert {"tiny_cpu", "olmoe_1b_7b", "qwen3_30b_a3b", "mixtral_8x7b", "deepseek_v3"} <= set(RECIPES)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse file of token id 0, long enough for a step of the largest recipe and an evaluation."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    with open(path, "wb") as file:
        file.truncate(600_000_000)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_decodes_and_validates(recipe: str, tokens: Path, tmp_path: Path):
    data = [f"data.files=[{tokens}]", "data.format=raw"]
    cluster = ["launch.rendezvous=node:29400", f"run.dir={tmp_path / 'run'}", *data]
    composed = compose([f"experiment={recipe}", *([] if recipe == "tiny_cpu" else cluster)])
    launch = composed.config.launch
    validate(composed.config, composed.mapping, launch.nproc * launch.nnodes)
    assert to_mapping(composed.config) == composed.mapping


@pytest.mark.parametrize(
    ("recipe", "total", "active"),
    [("olmoe_1b_7b", 6.92e9, 1.28e9), ("qwen3_30b_a3b", 30.53e9, 3.35e9), ("mixtral_8x7b", 46.70e9, 12.88e9)],
)
def test_recipes_have_the_published_sizes(recipe: str, total: float, active: float):
    config = compose([f"experiment={recipe}", "launch.rendezvous=node:29400"]).config
    size = model_size(config.model.build(config.data.vocab_size, config.moe, device="meta"))
    assert size.total == pytest.approx(total, rel=2e-3)
    assert size.active == pytest.approx(active, rel=5e-3)
