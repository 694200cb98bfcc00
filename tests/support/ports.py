"""What the processes of a run listen on."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

import psutil


def listening(parent: psutil.Process) -> dict[tuple[str, int], str]:
    """Return address and port -> command, for everything that a process and its descendants listen on."""
    found = {}
    for process in (parent, *parent.children(recursive=True)):
        try:
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN:
                    found[each.laddr.ip, each.laddr.port] = " ".join(process.cmdline())[:150]
        except psutil.Error:
            continue  # it has ended
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address, which may be an IPv4 address written as IPv6, as gRPC does."""
    address = ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
