"""A web address -> bytes, safely: nothing inside the own network, no more than a size, no longer than a time.

A data set names its addresses, and this machine would ask for them: without these checks a row could read what only
this machine may (a cloud's metadata service, a router, a database). Names are therefore resolved once, every address
is checked, and the checked address itself is what is connected to; redirects pass the same checks.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import ssl
import string
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

from orpo_ray.errors import RowError

Address = IPv4Address | IPv6Address
MAX_REDIRECTS = 3
_HEADERS = "User-Agent: orpo-ray\r\nAccept: image/*\r\nAccept-Encoding: identity\r\nConnection: close\r\n"
_PORTS = {"http": 80, "https": 443}
# What the standard library calls public and is not: protocol assignments, relays, tunnels that carry any IPv4 address
# in an IPv6 one, and a cloud's metadata service that has a public address.
_NOT_PUBLIC = [
    ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2001:db8::/32", "2002::/16")
]
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_TRANSLATED = IPv6Network("64:ff9b::/96")  # what a network without IPv4 makes of an IPv4 address, in its last bits


@dataclass(frozen=True)
class Limits:
    """What one download may cost.

    size: bytes of the answer. seconds: for everything together but the resolver, which has its own time limit. timeout:
    seconds for one connection or one wait. attempts: tries, with pauses of `pause`, 2 x `pause`, 4 x ... between them.
    """

    size: int = 32 * 2**20
    seconds: float = 60
    timeout: float = 10
    attempts: int = 4
    pause: float = 0.5


LIMITS = Limits()


@dataclass(frozen=True)
class _Target:
    """One checked address of the web: what to connect to, and what to ask there."""

    host: str
    tls: bool
    addresses: list[tuple[socket.AddressFamily, Any]]
    request: bytes


def is_public(address: Address) -> bool:
    """True for an address that anybody on the internet could ask; False for every kind of inside, and for tunnels."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None or address in _TRANSLATED:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_UNICAST:
            return False
    inside = address.is_private or address.is_loopback or address.is_link_local or address.is_reserved
    special = address.is_multicast or address.is_unspecified or not address.is_global
    return not (inside or special or any(address in network for network in _NOT_PUBLIC))


def fetch(url: str, is_allowed: Callable[[Address], bool] = is_public, limits: Limits = LIMITS) -> bytes:
    """Download what an http or https address gives. Raises RowError.

    is_allowed: says of an IP address whether it may be connected to.
    """
    end = time.monotonic() + limits.seconds
    problem = ""
    for attempt in range(limits.attempts):
        if attempt:
            pause = limits.pause * 2 ** (attempt - 1)
            if time.monotonic() + pause >= end:
                break
            time.sleep(pause)
        try:
            return _follow(url, is_allowed, limits, end)
        except ssl.SSLCertVerificationError as error:
            raise RowError("download_failed", f"{shown(url)}: {error.verify_message}") from None
        except OSError as error:
            problem = str(error)
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
                break
        except (http.client.HTTPException, ValueError) as error:  # ValueError: of a broken chunk
            problem = type(error).__name__  # without its text, which may repeat what was asked for
    raise RowError("download_failed", f"{shown(url)}: {problem}")


def shown(url: str) -> str:
    """The address for messages: without query, fragment and credentials, which may be secrets."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])


def _follow(url: str, is_allowed: Callable[[Address], bool], limits: Limits, end: float) -> bytes:
    """One attempt, through redirects. OSError and HTTPException: worth another."""
    asked = shown(url)
    for _ in range(MAX_REDIRECTS + 1):
        target = _checked(url, is_allowed)
        with closing(_connect(target, limits, end)) as connection:
            connection.sendall(target.request)
            response = http.client.HTTPResponse(cast("socket.socket", _Wire(connection, limits, end)), method="GET")
            response.begin()
            location = response.headers.get("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                url = _redirected(url, location)
                continue
            if response.status in (404, 410):
                raise RowError("missing_image", f"{asked}: HTTP {response.status}")
            if response.status == 429 or response.status >= 500:
                raise OSError(f"HTTP {response.status}")
            if response.status != 200:
                raise RowError("download_failed", f"{asked}: HTTP {response.status}")
            return _body(response, asked, limits)
    raise RowError("download_failed", f"{asked}: more than {MAX_REDIRECTS} redirects")


def _body(response: http.client.HTTPResponse, asked: str, limits: Limits) -> bytes:
    data = b"" if (response.length or 0) > limits.size else response.read(limits.size + 1)
    if (response.length or 0) > limits.size or len(data) > limits.size:
        raise RowError("image_too_large", f"{asked}: more than {limits.size} bytes")
    if response.length:  # bytes that were announced and never came: read() says nothing about them
        raise http.client.IncompleteRead(data, response.length)
    return data


def _redirected(url: str, location: str) -> str:
    try:
        # Headers arrive as latin-1 whatever they hold.
        return urljoin(url, quote(location, safe=string.punctuation, encoding="latin-1"))
    except ValueError:
        raise RowError("unsafe_url", f"{shown(url)} redirects to something that is no address") from None


def _checked(url: str, is_allowed: Callable[[Address], bool]) -> _Target:
    """Take the address apart, resolve its host, and check all that it resolves to."""
    # `urlsplit` drops line breaks, and some programs take a backslash for a slash.
    if len(url) > 8192 or re.search(r"[\x00-\x1f\x7f\\]", url):
        raise RowError("unsafe_url", f"{shown(url)} is no address")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii")
        path = quote(parts.path or "/", safe=string.punctuation)
        query = "?" + quote(parts.query, safe=string.punctuation) if parts.query else ""
    except ValueError:  # UnicodeError is one, too
        raise RowError("unsafe_url", f"{shown(url)} is no address") from None
    if parts.scheme not in _PORTS:
        raise RowError("unsafe_url", f"{shown(url)}: only http and https are asked")
    if "@" in parts.netloc:
        raise RowError("unsafe_url", f"{shown(url)}: an address may not hold credentials")
    if not re.fullmatch(r"[a-z0-9_-][a-z0-9._-]*|[0-9a-f:.]*:[0-9a-f:.]*", host):
        raise RowError("unsafe_url", f"{shown(url)} is no address")
    name = f"[{host}]" if ":" in host else host
    name_and_port = name if port is None else f"{name}:{port}"
    request = f"GET {path}{query} HTTP/1.1\r\nHost: {name_and_port}\r\n{_HEADERS}\r\n".encode("ascii")
    addresses = _resolve(host, _PORTS[parts.scheme] if port is None else port)
    for _, address in addresses:
        if not is_allowed(ip_address(address[0])):
            raise RowError("unsafe_url", f"{shown(url)} leads to {address[0]}, which is not on the public internet")
    return _Target(host, parts.scheme == "https", addresses, request)


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    # All spellings end here (2130706433, 0x7f.1, localhost): what is checked is what they mean.
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found if family in (socket.AF_INET, socket.AF_INET6)]


def _connect(target: _Target, limits: Limits, end: float) -> socket.socket:
    """A connection to the first address that takes one. TLS verifies the host's name, not the address."""
    problem = OSError("the name has no address")
    for family, address in target.addresses:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(_wait(limits, end))
            connection.connect(address)
            return _tls().wrap_socket(connection, server_hostname=target.host) if target.tls else connection
        except OSError as error:
            connection.close()
            problem = error
    raise problem


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _wait(limits: Limits, end: float) -> float:
    """Seconds that the next step may wait."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"not done after {limits.seconds:g} seconds")
    return min(left, limits.timeout)


class _Wire(io.RawIOBase):
    """A connection as `HTTPResponse` reads it, up to the limits of time and size.

    A timeout alone starts anew with each byte; and headers, or chunks that lie about their length, have no size limit.
    """

    def __init__(self, connection: socket.socket, limits: Limits, end: float) -> None:
        self._connection, self._limits, self._end = connection, limits, end
        self._left = 2 * limits.size + 2**16

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_wait(self._limits, self._end))
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise RowError("image_too_large", f"an answer of much more than {self._limits.size} bytes")
        return count
