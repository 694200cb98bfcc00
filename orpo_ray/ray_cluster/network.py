"""The network by which the processes of a cluster reach each other."""

from __future__ import annotations

import os

import psutil
import ray

LOOPBACK = "127.0.0.1"  # address of the node of a Ray that a command starts


def connect_by_address_of_node() -> None:
    """Let gloo and NCCL listen where Ray's other nodes reach this one, unless the user chose another interface.

    gloo would listen at the address of the host's name, which is a loopback address on many machines (`127.0.1.1` in
    /etc/hosts). NCCL finds the networks between hosts itself, but leaves out the loopback interface.
    """
    address = ray.util.get_node_ip_address()
    variables = ["GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if address == LOOPBACK else [])]
    for interface, found in psutil.net_if_addrs().items():
        if any(each.address == address for each in found):
            for variable in variables:
                os.environ.setdefault(variable, interface)
