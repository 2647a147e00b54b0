"""To be filled in the next commit."""

from __future__ import annotations

import dataclasses

from moedist.log.sink.contract import SinkConfig


@dataclasses.dataclass(frozen=True)
class ConsoleConfig(SinkConfig):
    pass
