"""`hf://` with the hub's real client and a server on loopback that responds like the hub."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.paths import TESTS
from support.sources import rows

COMMIT = "a" * 40
REPOSITORY = "/api/datasets/owner/name"
MODEL_CONFIG = json.dumps({"model_type": "smolvlm"}).encode()


def parquet(count: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(count)), buffer)
    return buffer.getvalue()


FILES = {
    "data/train-00000-of-00002.parquet": parquet(3),
    "data/train-00001-of-00002.parquet": parquet(2),
    "data/test-00000-of-00001.parquet": parquet(4),
    "README.md": b"---\n{}\n---\n",
}


class Hub(BaseHTTPRequestHandler):
    """A dataset `owner/name`, and a model config `owner/model` whose `main` and `v1` are the same commit."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        resolve = "/datasets/owner/name/resolve/"
        if path == REPOSITORY or path.startswith(f"{REPOSITORY}/revision/"):
            self._json({"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        elif path.startswith(f"{REPOSITORY}/tree/"):
            folder = path.removeprefix(f"{REPOSITORY}/tree/").partition("/")[2]
            self._json(_tree(folder, parse_qs(url.query).get("recursive") == ["true"]))
        elif path.startswith(f"{REPOSITORY}/paths-info/"):
            self._json([_entry(name) for name in json.loads(body)["paths"] if name in FILES])
        elif path.startswith(resolve) and path.removeprefix(resolve).partition("/")[2] in FILES:
            self._file(FILES[path.removeprefix(resolve).partition("/")[2]])
        elif path in (f"/owner/model/resolve/{revision}/config.json" for revision in ("main", "v1", COMMIT)):
            self._file(MODEL_CONFIG)
        else:
            self._json({"error": "not found"}, 404)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _json(self, answer: Any, code: int = 200) -> None:
        self._send(code, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, data: bytes) -> None:
        asked = self.headers.get("Range", "").removeprefix("bytes=").split("-")
        headers = {"ETag": '"b"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked == [""]:
            self._send(200, data, headers)
            return
        first, last = int(asked[0]), int(asked[1] or len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], headers)

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(name: str) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": "b" * 40}


def _tree(folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    below = [name for name in FILES if name.startswith(prefix)]
    if recursive:
        return [_entry(name) for name in below]
    folders = sorted({name.removeprefix(prefix).split("/")[0] for name in below if "/" in name.removeprefix(prefix)})
    found = [_entry(name) for name in below if "/" not in name.removeprefix(prefix)]
    return found + [{"type": "directory", "path": prefix + name, "size": 0, "oid": "c" * 40} for name in folders]


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


LIST = """
import json, sys
from support.sources import ids_of
from orpo_ray.data.sources import list_sources
from orpo_ray.errors import UserError
answers = []
for uri in sys.argv[1:]:
    try:
        answers.append([ids_of(uri), list_sources({uri: 1.0}, "data.train")[0].shards[0].image_root])
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def with_hub(hub: str, home: Path, code: str, *arguments: str) -> Any:
    """Run a program in a new process and parse its output, since the client reads its settings on import."""
    own = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | own | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_datasets_of_the_hub(hub: str, tmp_path: Path) -> None:
    base = "hf://datasets/owner/name"
    uris = [base, f"{base}?split=test", f"{base}/data/train-*.parquet", f"{base}?split=dev", f"{base}/none.parquet"]
    found = with_hub(hub, tmp_path, LIST, *uris, "hf://datasets/owner/none")
    train, test, files, split, file, dataset = found
    assert train == [["r0", "r1", "r2", "r0", "r1"], f"{base}@{COMMIT}/data"]
    assert test[0] == ["r0", "r1", "r2", "r3"]
    assert files == [train[0], f"{base}/data"]
    assert "no split 'dev'" in split
    assert "the splits are: train, test" in split
    assert "no such file or folder" in file
    assert "owner/none" in dataset


COMMITS = """
import json, sys
from orpo_ray.model.loading import commit_of
from orpo_ray.config.schema import ModelConfig
revisions = [None if given == "none" else given for given in sys.argv[1:]]
print(json.dumps([commit_of(ModelConfig(id="owner/model", revision=revision)) for revision in revisions]))
"""


def test_revisions_resolve_to_a_commit(hub: str, tmp_path: Path) -> None:
    assert with_hub(hub, tmp_path, COMMITS, "none", "v1") == [COMMIT] * 2
