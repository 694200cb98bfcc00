"""Workers meet on the network of their nodes, whatever the name of the host stands for."""

from __future__ import annotations

import os

import psutil
import pytest
import ray

from orpo_ray.ray_cluster.network import LOOPBACK, connect_by_address_of_node

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("address", [LOOPBACK, "another"])
def test_the_interface_is_that_of_the_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = {
        name: each.address for name, found in psutil.net_if_addrs().items() for each in found if each.family == 2
    }
    wanted = next((name for name, own in interfaces.items() if (own == LOOPBACK) == (address == LOOPBACK)), None)
    if wanted is None:
        pytest.skip("this machine has only a loopback interface")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: interfaces[wanted])
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that the test's own changes are undone
        monkeypatch.delenv(variable)
    connect_by_address_of_node()
    set_by_it = [variable for variable in VARIABLES if os.environ.get(variable) == wanted]
    assert set_by_it == list(VARIABLES if address == LOOPBACK else VARIABLES[:1])


def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    connect_by_address_of_node()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == "eth7"
