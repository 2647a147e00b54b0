"""A node finds its own address and the way to the others; nothing is guessed from its host name."""

from __future__ import annotations

import socket
import warnings

import pytest

from moedist.config import ConfigError
from moedist.config.exit_codes import ExitCode
from moedist.launch.environment import rank_environment, without_users
from moedist.launch.nodes import Node, RendezvousError, find_node, interface_of, join_nodes, split_endpoint
from moedist.launch.nodes import warn_of_exposure as warn_of
from moedist.train.config import LaunchConfig
from moedist.train.flight_recorder import dump_prefix


def launch(**options: object) -> LaunchConfig:
    return LaunchConfig(nnodes=2, **{"rendezvous": "127.0.0.1:29400", **options})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:launch.rendezvous")
def test_the_node_that_has_the_address_holds_the_rendezvous():
    assert find_node(launch()) == Node("127.0.0.1", "lo", holds_rendezvous=True)
    assert not find_node(launch(holds_rendezvous=False)).holds_rendezvous, "where nodes share a machine"
    assert find_node(launch(local_addr="127.0.0.2")).address == "127.0.0.2"
    assert interface_of("192.0.2.1") is None


@pytest.mark.filterwarnings("ignore:launch.rendezvous")
def test_addresses_that_cannot_be():
    with pytest.raises(ConfigError, match="launch.local_addr = '192.0.2.1' is no address of this machine"):
        find_node(launch(local_addr="192.0.2.1"))
    for endpoint in ("node0", "node0:", "node0:0", "node0:70000", ":29400"):
        with pytest.raises(ConfigError, match="is no host:port"):
            split_endpoint(endpoint)
    assert split_endpoint("[fd00::7]:29400") == ("fd00::7", 29400)


@pytest.mark.filterwarnings("ignore:launch.rendezvous")
def test_a_rendezvous_that_is_not_there_is_waited_for_and_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        assert join_nodes(launch(rendezvous=here, holds_rendezvous=False)).address == "127.0.0.1"
    with pytest.raises(RendezvousError, match="is not open") as caught:
        join_nodes(launch(rendezvous=here, holds_rendezvous=False, meet_within_s=1e-3))
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    with pytest.raises(RendezvousError, match="names a host that this machine does not know"):
        find_node(launch(rendezvous="no-such-host.invalid:29400"))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("8.8.8.8", "is the public address 8.8.8.8"),
        ("2a00:1450:4001::1", "is the public address"),
        ("127.0.0.1", "which no other machine reaches"),
        ("10.77.0.10", None),
        ("192.168.1.2", None),
        ("fd00::7", None),
    ],
)
def test_a_public_rendezvous_is_warned_of(address: str, said: str | None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of(f"{address}:29400", address)
    assert [said in str(warning.message) for warning in caught] == ([True] if said else [])


def test_few_variables_are_set_all_are_told_and_the_users_own_win(tmp_path):
    wanted = rank_environment(3, tmp_path, Node("10.0.0.1", "eth1", True))
    assert wanted == {
        "OMP_NUM_THREADS": "3",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(dump_prefix(tmp_path)),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "GLOO_SOCKET_IFNAME": "eth1",
    }
    assert "GLOO_SOCKET_IFNAME" not in rank_environment(3, tmp_path, None)
    chosen, (sets, keeps) = without_users(wanted, {"GLOO_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "64", "HOME": "/"})
    assert "GLOO_SOCKET_IFNAME" not in chosen and chosen["OMP_NUM_THREADS"] == "3"
    assert all(f"{name}={value}" in sets for name, value in chosen.items())
    assert keeps == "keeps  GLOO_SOCKET_IFNAME=ib0"
