"""A plug-in package on disk, for tests: a router of its own, outside moedist."""

from __future__ import annotations

from pathlib import Path

ROUTER = '''
from __future__ import annotations

import dataclasses

from moedist.moe.router.topk import TopKConfig


@dataclasses.dataclass(frozen=True)
class EagerConfig(TopKConfig):
    """Top-k with another default."""

    zeal: float = 1e-20
'''


def write_plugin(folder: Path, name: str) -> None:
    """Writes the package ``name`` below ``folder``: one module, one YAML."""
    router = folder / name / "moe" / "router"
    router.mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    (router / "eager.py").write_text(ROUTER)
    conf = folder / name / "conf" / "moe" / "router"
    conf.mkdir(parents=True)
    (conf / "eager.yaml").write_text("defaults: [eager_defaults, _self_]\ntop_k: 3\n")
