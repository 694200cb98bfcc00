"""Download a URL safely: only from public addresses, with limits on size and time.

URLs come from datasets. Without these checks, a row could make this machine read from its private network: a cloud's
metadata service, a router, a database. Host names are therefore resolved once, every resulting address is checked, and
the connection goes to the checked address. Redirects pass the same checks.
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
# Networks that `ipaddress` calls public although they are not: protocol assignments, relays, tunnels that embed any
# IPv4 address in an IPv6 address, and a cloud metadata service with a public address.
_NOT_PUBLIC = [
    ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2001:db8::/32", "2002::/16")
]
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_TRANSLATED = IPv6Network("64:ff9b::/96")  # NAT64: an IPv4 address in the last 32 bits


@dataclass(frozen=True)
class Limits:
    """Limits of one download."""

    size: int = 32 * 2**20
    """Maximum size of the response in bytes."""
    seconds: float = 60
    """Maximum total time, without name resolution, which has its own timeout."""
    timeout: float = 10
    """Maximum seconds to wait for a connection or for data."""
    attempts: int = 4
    """Maximum number of attempts."""
    pause: float = 0.5
    """Seconds before the second attempt; doubled before each further one."""


LIMITS = Limits()


@dataclass(frozen=True)
class _Target:
    """A checked URL: the addresses to connect to, and the request to send."""

    host: str
    tls: bool
    addresses: list[tuple[socket.AddressFamily, Any]]
    request: bytes


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet. False for private and special addresses, and for tunnels."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None or address in _TRANSLATED:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_UNICAST:
            return False
    private = address.is_private or address.is_loopback or address.is_link_local or address.is_reserved
    special = address.is_multicast or address.is_unspecified or not address.is_global
    return not (private or special or any(address in network for network in _NOT_PUBLIC))


def fetch(url: str, is_allowed: Callable[[Address], bool] = is_public, limits: Limits = LIMITS) -> bytes:
    """Download an http or https URL.

    Args:
        url: the URL.
        is_allowed: whether to connect to an IP address.
        limits: limits on size, time and attempts.

    Raises:
        RowError: the URL is refused, or the download failed.
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
            raise RowError("download_failed", f"{redact_url(url)}: {error.verify_message}") from None
        except OSError as error:
            problem = str(error)
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
                break
        except (http.client.HTTPException, ValueError) as error:  # ValueError: malformed chunk
            problem = type(error).__name__  # without its text, which can contain parts of the URL
    raise RowError("download_failed", f"{redact_url(url)}: {problem}")


def redact_url(url: str) -> str:
    """Remove query, fragment and credentials, which can contain secrets, from a URL for messages."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])


def _follow(url: str, is_allowed: Callable[[Address], bool], limits: Limits, end: float) -> bytes:
    """Make one attempt, following redirects. After an OSError or HTTPException, another attempt may succeed."""
    name = redact_url(url)
    for _ in range(MAX_REDIRECTS + 1):
        target = _check_url(url, is_allowed)
        with closing(_connect(target, limits, end)) as connection:
            connection.sendall(target.request)
            response = http.client.HTTPResponse(
                cast("socket.socket", _LimitedConnection(connection, limits, end)), method="GET"
            )
            response.begin()
            location = response.headers.get("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                url = _redirect_target(url, location)
                continue
            if response.status in (404, 410):
                raise RowError("missing_image", f"{name}: HTTP {response.status}")
            if response.status == 429 or response.status >= 500:
                raise OSError(f"HTTP {response.status}")
            if response.status != 200:
                raise RowError("download_failed", f"{name}: HTTP {response.status}")
            return _read_body(response, name, limits)
    raise RowError("download_failed", f"{name}: more than {MAX_REDIRECTS} redirects")


def _read_body(response: http.client.HTTPResponse, name: str, limits: Limits) -> bytes:
    data = b"" if (response.length or 0) > limits.size else response.read(limits.size + 1)
    if (response.length or 0) > limits.size or len(data) > limits.size:
        raise RowError("image_too_large", f"{name}: more than {limits.size} bytes")
    if response.length:  # the body is shorter than announced, which read() does not report
        raise http.client.IncompleteRead(data, response.length)
    return data


def _redirect_target(url: str, location: str) -> str:
    try:
        # http.client decodes all headers as latin-1.
        return urljoin(url, quote(location, safe=string.punctuation, encoding="latin-1"))
    except ValueError:
        raise RowError("unsafe_url", f"{redact_url(url)} redirects to an invalid URL") from None


def _check_url(url: str, is_allowed: Callable[[Address], bool]) -> _Target:
    """Parse a URL, resolve its host, and check all resulting addresses."""
    # `urlsplit` drops line breaks, and some programs treat a backslash as a slash.
    if len(url) > 8192 or re.search(r"[\x00-\x1f\x7f\\]", url):
        raise RowError("unsafe_url", f"{redact_url(url)} is not a valid URL")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii")
        path = quote(parts.path or "/", safe=string.punctuation)
        query = "?" + quote(parts.query, safe=string.punctuation) if parts.query else ""
    except ValueError:  # includes UnicodeError
        raise RowError("unsafe_url", f"{redact_url(url)} is not a valid URL") from None
    if parts.scheme not in _PORTS:
        raise RowError("unsafe_url", f"{redact_url(url)}: only http and https URLs are supported")
    if "@" in parts.netloc:
        raise RowError("unsafe_url", f"{redact_url(url)}: a URL must not contain credentials")
    if not re.fullmatch(r"[a-z0-9_-][a-z0-9._-]*|[0-9a-f:.]*:[0-9a-f:.]*", host):
        raise RowError("unsafe_url", f"{redact_url(url)} is not a valid URL")
    host_header = f"[{host}]" if ":" in host else host
    host_header += "" if port is None else f":{port}"
    request = f"GET {path}{query} HTTP/1.1\r\nHost: {host_header}\r\n{_HEADERS}\r\n".encode("ascii")
    addresses = _resolve(host, _PORTS[parts.scheme] if port is None else port)
    for _, address in addresses:
        if not is_allowed(ip_address(address[0])):
            raise RowError("unsafe_url", f"{redact_url(url)} resolves to {address[0]}, which is not a public address")
    return _Target(host, parts.scheme == "https", addresses, request)


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    # Resolves all spellings (2130706433, 0x7f.1, localhost) to the address that is then checked.
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found if family in (socket.AF_INET, socket.AF_INET6)]


def _connect(target: _Target, limits: Limits, end: float) -> socket.socket:
    """Connect to the first address that accepts. TLS verifies the host name, not the address."""
    problem = OSError("the host has no address")
    for family, address in target.addresses:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(_next_timeout(limits, end))
            connection.connect(address)
            return _tls().wrap_socket(connection, server_hostname=target.host) if target.tls else connection
        except OSError as error:
            connection.close()
            problem = error
    raise problem


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _next_timeout(limits: Limits, end: float) -> float:
    """Return the timeout of the next operation: the configured one, or the remaining total time if less."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"not complete after {limits.seconds:g} seconds")
    return min(left, limits.timeout)


class _LimitedConnection(io.RawIOBase):
    """A connection for `HTTPResponse` to read from, with limits on total time and size.

    A socket timeout restarts with each byte, and `HTTPResponse` does not limit headers or chunks with a wrong length.
    """

    def __init__(self, connection: socket.socket, limits: Limits, end: float) -> None:
        self._connection, self._limits, self._end = connection, limits, end
        self._left = 2 * limits.size + 2**16

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_next_timeout(self._limits, self._end))
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise RowError("image_too_large", f"the response has more than {self._limits.size} bytes")
        return count
