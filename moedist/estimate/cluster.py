"""Devices and links by name: a table that comes with moedist, and tables of users."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import yaml

from moedist.config import Config, ConfigError, ConfigErrors, require

TABLE = Path(__file__).with_name("clusters.yaml")


@dataclasses.dataclass(frozen=True)
class Cluster(Config):
    """What one rank has, and how ranks are linked.

    Attributes:
        device: ``cuda`` or ``cpu``.
        memory_gib: of a rank's device.
        bf16_tflops, fp32_tflops, fp64_tflops: 10^12 FLOP/s that a large matrix product reaches (P).
        memory_gb_per_s: 10^9 bytes per second that a large copy reads and writes together (B).
        ranks_per_node: devices of a node.
        node_gb_per_s: 10^9 bytes per second that a rank sends inside its node.
        network_gb_per_s: the same to other nodes.
        reserved_gib: of the memory, for the driver, the libraries and what the allocator cannot use.
        latency_us: microseconds that a collective takes whatever its size.
        share_of_floor: how much of the floor (each fused kernel at P or B) the kernels of a step reach together.
        price_per_hour: of one device, in any currency; None for not known.
    """

    __pydantic_config__: ClassVar[Any] = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    device: Literal["cuda", "cpu"]
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    fp64_tflops: float
    memory_gb_per_s: float
    ranks_per_node: int
    node_gb_per_s: float
    network_gb_per_s: float
    reserved_gib: float = 4.0
    latency_us: float = 20.0
    share_of_floor: float = 0.5
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        may_be_zero = ("reserved_gib", "latency_us", "price_per_hour")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)):
                good = value >= 0 if field.name in may_be_zero else value > 0
                require(good, field.name, value, "is too small", "Set it above 0.")
        require(self.share_of_floor <= 1, "share_of_floor", self.share_of_floor, "is above the floor", "Set 1 or less.")
        room = self.memory_gib - self.reserved_gib
        require(room > 0, "reserved_gib", self.reserved_gib, "leaves nothing", "Set it below memory_gib.")

    def flops(self, precision: str) -> float:
        """FLOP/s of matrix products."""
        tflops: float = getattr(self, f"{precision}_tflops")
        return tflops * 1e12

    @property
    def usable_bytes(self) -> int:
        """Of a rank's memory."""
        return int((self.memory_gib - self.reserved_gib) * 2**30)


def read_clusters(path: Path | None = None) -> dict[str, Cluster]:
    """The table that comes with moedist, with a user's on top: an entry of a known name may give some keys only.

    Raises:
        ConfigErrors: the file cannot be read, or entries are wrong: all that is.
    """
    table: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    for name, entry in ({} if path is None else _read(path)).items():
        table[name] = {**table.get(name, {}), **entry}
    clusters, errors = {}, []
    for name, entry in table.items():
        try:
            clusters[name] = pydantic.TypeAdapter(Cluster).validate_python(entry)
        except ConfigError as error:
            errors.append(error.under(name))
        except pydantic.ValidationError as found:
            errors += [_error(name, one) for one in found.errors()]
    if errors:
        raise ConfigErrors(errors)
    return clusters


def _read(path: Path) -> dict[str, dict[str, Any]]:
    remedy = "Name a YAML file that maps names to entries such as {memory_gib: 141, ...}."
    try:
        table = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("--clusters", str(path), f"cannot be read ({error.strerror})", remedy) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("--clusters", str(path), f"is no YAML ({error})", remedy) from error
    good = isinstance(table, dict) and all(isinstance(entry, dict) for entry in table.values())
    require(good, "--clusters", str(path), "maps no names to entries", remedy)
    assert isinstance(table, dict)
    return table


def _error(name: str, found: Any) -> ConfigError:
    key = ".".join([name, *map(str, found["loc"])])
    known = ", ".join(field.name for field in dataclasses.fields(Cluster))
    remedies = {"missing": "Give it.", "unexpected_keyword_argument": f"Known keys: {known}."}
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.under(name)
    value = None if found["type"] == "missing" else found["input"]
    return ConfigError(key, value, f"is wrong ({found['msg']})", remedies.get(found["type"], "Correct it."))


def choose_cluster(clusters: dict[str, Cluster], name: str) -> Cluster:
    """An entry by name.

    Raises:
        ConfigError: there is none.
    """
    require(
        name in clusters, "--cluster", name, "is not in the table", f"Choose one of: {', '.join(sorted(clusters))}."
    )
    return clusters[name]
