"""To be filled in the next commit."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moedist.log.sink.contract import SinkConfig


@dataclasses.dataclass(frozen=True)
class WandbConfig(SinkConfig):
    project: str = "moedist"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
