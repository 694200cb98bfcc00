"""Downloads never reach private addresses and stay within their limits, for any host name, redirect and server."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orpo_ray.data import fetch as fetch_module
from orpo_ray.data.fetch import Address, Limits, fetch, is_public, redact_url
from orpo_ray.errors import RowError

QUICK = Limits(size=10_000, seconds=5, timeout=2, attempts=3, pause=0.01)


def anywhere(address: Address) -> bool:
    return True


def only_loopback(address: Address) -> bool:
    return address == IPv4Address("127.0.0.1")


class Site(BaseHTTPRequestHandler):
    """Handlers of the test server, by path; `asked` records the paths, `hosts` the Host headers."""

    asked: list[str]
    hosts: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.hosts.append(self.headers["Host"])
        path, _, query = self.path.partition("?")
        if path == "/to":
            self.answer(302, {"Location": query})
        elif path == "/status":
            self.answer(int(query), {})
        elif path == "/busy":
            self.answer(503, {}) if len(self.asked) < 3 else self.answer(200, {}, b"at last")
        elif path == "/long":
            self.answer(200, {"Content-Length": query}, b"x" * int(query))
        elif path == "/endless":
            self.answer(200, {}, b"x" * 200_000)
        elif path == "/cut":
            self.answer(200, {"Content-Length": "100"}, b"x" * 50)
        elif path == "/drip":
            self.answer(200, {})
            self.drip()
        elif path == "/drip-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self.drip()
        else:
            self.answer(200, {}, b"content of " + self.path.encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Do not log clients that close the connection, as most of these tests do."""

    def handle_error(self, *args: Any) -> None:
        pass


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Any]:
    """Start a server on loopback; returns a function that makes the URL of a path."""
    handler = type("Handler", (Site,), {"asked": [], "hosts": []})
    with Server(("127.0.0.1", 0), handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()

        def url(path: str, host: str = "127.0.0.1") -> str:
            return f"http{'s' if context else ''}://{host}:{server.server_port}{path}"

        url.handler = handler  # type: ignore[attr-defined]
        try:
            yield url
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site() -> Iterator[Any]:
    with serving() as url:
        yield url


def asked(site: Any) -> list[str]:
    return site.handler.asked


def failure(url: str, is_allowed: Callable[[Address], bool] = anywhere, limits: Limits = QUICK) -> RowError:
    with pytest.raises(RowError) as error:
        fetch(url, is_allowed, limits)
    return error.value


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Make host names resolve to the given answers in turn; returns the list of names that were resolved."""
    looked_up: list[str] = []

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        looked_up.append(host)
        answer = answers[min(len(looked_up), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answer]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return looked_up


@pytest.mark.parametrize("text", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "0.0.0.0", "0.1.2.3"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("192.0.0.192", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "168.63.129.16"),
        *("::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b:1::1"),
        *("2001::1", "2001:db8::1", "2002:7f00:1::", "2002:a00:1::1", "100::1", "4000::1"),
    ],
)
def test_all_other_addresses_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "LOCALHOST", "2130706433", "0x7f000001", "017700000001", "127.1", "0", "10.0.0.1"),
        *("169.254.169.254", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:169.254.169.254]"),
        "\uff11\uff12\uff17.0.0.1",  # full-width digits, which resolvers accept
    ],
)
def test_no_spelling_of_a_private_address_is_requested(host: str, site: Any) -> None:
    assert failure(site("/image.png", host), is_public).reason == "unsafe_url"
    assert not asked(site)


def test_the_default_refuses_loopback(site: Any) -> None:
    with pytest.raises(RowError, match="unsafe_url"):
        fetch(site("/image.png"))
    assert not asked(site)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://example.com/a", "gopher://example.com", "//example.com/a", "example.com", ""),
        *("http://", "http:///a", "http://user@example.com/a", "http://user:word@example.com/a", "http://@example.com"),
        *("http://example.com:99999/", "http://example.com:x/", "http://[::1/", "http://a..b/"),
        *("http://exa mple.com/", "http://example.com\\@127.0.0.1/", "http://exa\nmple.com/", "http://a\x00b/"),
        *("http://a/\r\nHost: b", "http://\ud800/", "http://a/\ud800", "http://-\u2100/", "http://a,b/", "http://*/"),
        *("http://%31%32%37.0.0.1/", "http://.example.com/", "http://a/" + "a" * 9000, "http://" + "a" * 70 + ".com"),
    ],
)
def test_invalid_urls(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("a look-up"))
    assert failure(url).reason == "unsafe_url"


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, ["93.184.216.34", "10.0.0.1"])
    monkeypatch.setattr(socket, "socket", lambda *args: pytest.fail("a connection"))
    error = failure("http://images.example/a.png", is_public)
    assert (error.reason, "10.0.0.1" in error.detail) == ("unsafe_url", True)


def test_a_name_is_resolved_once(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against DNS rebinding: the name is not resolved again after the check."""
    looked_up = resolve_to(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    url = site("/a", "images.example")
    assert fetch(url, anywhere, QUICK) == b"content of /a"
    assert (looked_up, site.handler.hosts) == (["images.example"], [url.split("/")[2]])


def test_each_redirect_is_checked(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = resolve_to(monkeypatch, ["127.0.0.1"], ["10.0.0.1"])
    error = failure(site("/to?/again", "images.example"), only_loopback)
    assert (error.reason, len(looked_up), len(asked(site))) == ("unsafe_url", 2, 1)


@pytest.mark.parametrize(
    "target",
    [
        *("http://127.0.0.2/a", "http://10.0.0.1/a", "//192.168.1.1/", "http://2886729729/", "http://169.254.169.254/"),
        *("file:///etc/passwd", "http://user:word@127.0.0.1/", "http://[/", "ftp://127.0.0.1/"),
    ],
)
def test_a_redirect_to_a_private_address_is_refused(site: Any, target: str) -> None:
    error = failure(site(f"/to?{target}"), only_loopback)
    assert (error.reason, len(asked(site))) == ("unsafe_url", 1)


def test_redirects_are_followed_three_times(site: Any) -> None:
    assert fetch(site("/to?/to?/to?/end"), anywhere, QUICK) == b"content of /end"
    assert fetch(site(f"/to?{site('/elsewhere')}"), anywhere, QUICK) == b"content of /elsewhere"
    error = failure(site("/to?/to?/to?/to?/end"))
    assert (error.reason, "redirects" in error.detail) == ("download_failed", True)


def test_paths_arrive_as_browsers_send_them(site: Any) -> None:
    assert fetch(site("/a b/\u00e9%20.png?q=\u00e9 1&r=%2F#part"), anywhere, QUICK)
    assert asked(site) == ["/a%20b/%C3%A9%20.png?q=%C3%A9%201&r=%2F"]


def test_proxies_of_the_environment_are_ignored(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(site("/a"), anywhere, QUICK) == b"content of /a"


def test_size_limit(site: Any) -> None:
    assert len(fetch(site("/long?10000"), anywhere, QUICK)) == 10_000
    for path in ("/long?10001", "/long?50000", "/endless"):
        assert failure(site(path)).reason == "image_too_large"
    assert len(asked(site)) == 4  # no retries


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_total_time_limit(site: Any, path: str) -> None:
    start = time.monotonic()
    limits = Limits(size=10_000, seconds=0.5, timeout=5, attempts=3, pause=0.01)
    assert failure(site(path), limits=limits).reason == "download_failed"
    assert time.monotonic() - start < 8


def test_a_silent_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        limits = Limits(seconds=5, timeout=0.1, attempts=2, pause=0.01)
        start = time.monotonic()
        for scheme in ("http", "https"):
            error = failure(f"{scheme}://127.0.0.1:{server.getsockname()[1]}/", limits=limits)
            assert error.reason == "download_failed"
        assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    ("statuses", "reason", "times"),
    [
        ((404, 410), "missing_image", 1),
        ((204, 304, 403), "download_failed", 1),
        ((429, 500, 503), "download_failed", 3),
    ],
)
def test_which_statuses_are_retried(site: Any, statuses: tuple[int, ...], reason: str, times: int) -> None:
    for status in statuses:
        asked(site).clear()
        error = failure(site(f"/status?{status}"))
        assert (error.reason, len(asked(site)), str(status) in error.detail) == (reason, times, True)


def test_a_busy_server_is_retried(site: Any) -> None:
    assert fetch(site("/busy"), anywhere, QUICK) == b"at last"
    assert len(asked(site)) == 3


def test_an_incomplete_response_is_an_error(site: Any) -> None:
    assert failure(site("/cut")).reason == "download_failed"
    assert len(asked(site)) == 3


def test_a_refused_connection_and_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert failure(f"http://127.0.0.1:{port}/").reason == "download_failed"
    tried = []

    def unknown(*args: Any, **options: Any) -> None:
        tried.append(args)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert failure("http://nowhere.example/").reason == "download_failed"
    assert len(tried) == 1


def test_messages_contain_no_secrets(site: Any) -> None:
    secret = "token=s3cret"
    for path in ("/status?404&", "/status?403&", "/to?http://10.0.0.1/?", "/to?http://user:s3cret@10.0.0.1/?", "/cut?"):
        assert "s3cret" not in str(failure(site(path + secret), only_loopback))
    for url in (f"http://user:s3cret@a/b?{secret}", f"ftp://a/?{secret}#{secret}", f"http://a\n/?{secret}"):
        assert "s3cret" not in str(failure(url))
    assert redact_url("https://user:word@a.example/b/c.png?d=e#f") == "https://a.example/b/c.png"


def serve_raw(answer: bytes) -> tuple[int, threading.Thread]:
    """Start a server that sends this response to one client and closes the connection; returns its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server:
            client, _ = server.accept()
        with client:
            client.recv(65536)
            with suppress(OSError):  # the client may close first
                client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                client.recv(65536)

    thread = threading.Thread(target=run)
    thread.start()
    return server.getsockname()[1], thread


OK = b"HTTP/1.1 200 OK\r\n"


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            b"".join, st.tuples(st.just(OK), st.binary(max_size=200), st.just(b"\r\n\r\n"), st.binary(max_size=99))
        ),
        st.builds(b"".join, st.tuples(st.just(OK + b"Transfer-Encoding: chunked\r\n\r\n"), st.binary(max_size=200))),
        st.builds(b"".join, st.tuples(st.just(b"HTTP/1.1 302 Found\r\nLocation: "), st.binary(max_size=200))),
    )
)
@example(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + b"x" * 300_000)  # reads on to the end, says http.client
@example(OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc")
@example(OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\nabc")
@example(OK + b"Content-Length: -1\r\n\r\n" + b"x" * 300_000)
@example(OK + b"X: " + b"x" * 70_000 + b"\r\n\r\n")
@example(OK + b"X: x\r\n" * 1000 + b"\r\n")
@example(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)
def test_arbitrary_responses(answer: bytes) -> None:
    port, thread = serve_raw(answer)
    limits = Limits(size=10_000, seconds=5, timeout=2, attempts=1)
    with suppress(RowError):
        assert len(fetch(f"http://127.0.0.1:{port}/", only_loopback, limits)) <= limits.size
    thread.join()


def test_tls_verifies_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = write_certificate(tmp_path, "images.example")
    resolve_to(monkeypatch, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context) as url:
        error = failure(url("/a", "images.example"))
        assert (error.reason, "certificate" in error.detail) == ("download_failed", True)
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr(fetch_module, "_tls", lambda: trusting)
        assert fetch(url("/a", "images.example"), anywhere, QUICK) == b"content of /a"
        other = failure(url("/a", "other.example"))
        assert (other.reason, "ostname" in other.detail) == ("download_failed", True)


def write_certificate(folder: Path, name: str) -> Path:
    """Write a key and a self-signed certificate to one file."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    built = built.serial_number(1).add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    now = datetime.now() - timedelta(days=2)
    signed = built.not_valid_before(now).not_valid_after(now + timedelta(days=9)).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(secret + signed.public_bytes(pem))
    return path
