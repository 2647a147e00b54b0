"""The example of docs/adding.md works as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moedist.launch.compose import compose
from moedist.moe.context import TokenContext
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "adding.md"


def test_a_router_in_a_package_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = blocks(PAGE, "python")
    yaml = next(block for block in blocks(PAGE, "yaml") if "modulo_defaults" in block)
    for path, text in {"moe/router/modulo.py": code, "conf/moe/router/modulo.yaml": yaml}.items():
        (file := tmp_path / "my_parts" / path).parent.mkdir(parents=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    config = compose(["plugins=[my_parts]", "moe/router=modulo", "moe.router.multiplier=7"]).config
    assert (config.moe.router.kind, config.moe.router.multiplier) == ("modulo", 7)
    layer = config.moe.build(dim=8)
    ids_T = torch.arange(6)
    output = layer(torch.randn(6, 8), TokenContext.of_rows(2, 3, id_T=ids_T))
    assert output.report.asked_E.tolist() == torch.bincount(7 * ids_T % 8, minlength=8).tolist()
    output.out_TD.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
