"""A real S3 server on loopback, with faults: refused requests, slow responses, incomplete responses."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "bucket"
SLOW_SECONDS = 0.3


class Faults:
    """WSGI middleware: of so many requests, one is refused, one is slow and one gets an incomplete response.

    Attributes:
        active: whether it does.
        period: number of these requests, 10 or more. A client waits before it tries again, up to seconds.
        refuses_writes: whether all writes are refused.
        takes_writes: writes wait for this event,
        held: if their path contains this.
        written: paths of the objects that were written, in order.
        read: paths of the objects of which bytes were read, in order.
    """

    def __init__(self, server: Any) -> None:
        self.server = server
        self.active = False
        self.period = 10
        self.refuses_writes = False
        self.takes_writes = threading.Event()
        self.takes_writes.set()
        self.held = ""
        self.written: list[str] = []
        self.read: list[str] = []
        self.injected: dict[str, int] = {"refused": 0, "slow": 0, "cut": 0}
        self._count = itertools.count()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.refuses_writes and environ["REQUEST_METHOD"] in ("PUT", "POST"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        if environ["REQUEST_METHOD"] == "PUT":
            if self.held in environ["PATH_INFO"]:
                self.takes_writes.wait()
            self.written.append(environ["PATH_INFO"])
        elif environ["REQUEST_METHOD"] == "GET" and "/" in environ["PATH_INFO"].strip("/"):
            self.read.append(environ["PATH_INFO"])
        turn = next(self._count) % self.period if self.active else -1
        if turn == 3:
            self.injected["refused"] += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        if turn == 6:
            self.injected["slow"] += 1
            time.sleep(SLOW_SECONDS)
        body = b"".join(self.server(environ, start_response))
        if turn == 9 and environ["REQUEST_METHOD"] == "GET" and len(body) > 1:
            self.injected["cut"] += 1
            return [body[: len(body) // 2]]  # fewer bytes than Content-Length promised; the connection ends
        return [body]


@contextmanager
def s3_server(environment: pytest.MonkeyPatch, host: str = "127.0.0.1") -> Iterator[Faults]:
    """Start the server with one bucket at this address, and set `AWS_*` for this process and its children."""
    pytest.importorskip("moto", reason="moto's server is not installed")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server(host, 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{server.port}")
    environment.setenv("AWS_ACCESS_KEY_ID", "test")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-never-written")
    environment.setenv("AWS_REGION", "us-east-1")
    environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
    try:
        from pyarrow.fs import S3FileSystem

        S3FileSystem(endpoint_override=f"{host}:{server.port}", scheme="http", allow_bucket_creation=True).create_dir(
            BUCKET
        )
        yield faults
    finally:
        from orpo_ray.storage import files as storage

        storage._remote.cache_clear()  # the next server has another port
        server.shutdown()
        thread.join()
