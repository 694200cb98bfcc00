"""`orpo-ray export --push` with the hub's real client and a server on loopback that responds like the hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from safetensors.torch import load

from support.finished_runs import finished_run, trained
from support.tiny_runs import tiny_recipe

TOKEN = "hf_secret-never-shown"
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """The token can create and write models of `owner`, but not those of `other`."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes]
    repositories: dict[str, dict[str, Any]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._authorized():
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/whoami-v2":
            self._json({"name": "owner", "type": "user", "orgs": []})
        elif "/tree/" in path and (found := self.repositories.get(path.split("/tree/")[0][12:])):
            entries = found["files"].items()
            self._json([{"type": "file", "path": name, "size": len(data), "oid": "o"} for name, data in entries])
        else:
            self._json({"error": "Not found"}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        self.blobs[urlsplit(self.path).path.removeprefix("/blobs/")] = body
        self._send(200, b"")

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._authorized():
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"] != "owner":
                self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
                return
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.repositories.setdefault(name, {"private": private, "files": {}})
            self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            here = f"http://{self.headers['Host']}/blobs"
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{here}/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").split("/commit/")[0], body)
        else:
            self._json({"error": f"not known here: {path}"}, 404)

    def _commit(self, name: str, body: bytes) -> None:
        files = self.repositories[name]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, answer: Any, code: int = 200) -> None:
        self._send(code, json.dumps(answer).encode())

    def _send(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Start the server; yields its address and its repositories: name -> private, files."""
    handler = type("OwnHub", (Hub,), {"blobs": {}, "repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.repositories  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()


EXPORT = """
import io, json, os, sys
from rich.console import Console
from orpo_ray.errors import UserError
from orpo_ray.exporting.export import ExportOptions, export_run
run, *attempts = sys.argv[1:]
answers = []
for attempt in attempts:
    token, push, adapter = json.loads(attempt)
    os.environ["HF_TOKEN"] = token
    try:
        options = ExportOptions(push=push, adapter=adapter, overwrite=True)
        exported = export_run(run, options, Console(file=sys.stderr))
        answers.append([exported.url, exported.files])
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""
CHECK = """
import sys
from orpo_ray.errors import UserError
from orpo_ray.exporting.hub import check_can_push
try:
    check_can_push("owner/model")
except UserError as error:
    print(error)
"""


def answer_of(script: str, *arguments: str, **environment: str) -> str:
    """Run code in a new process and return its output, since the client reads its settings on import."""
    own = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | environment
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_push_makes_a_private_model_and_refusals_are_one_message(
    hub: tuple[str, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    address, repositories = hub
    # Files of an older model would be loaded together with the new ones.
    repositories["owner/old"] = {"private": False, "files": {"model-00001-of-00002.safetensors": b"old"}}
    recipe = tiny_recipe(tmp_path, "run", model={"lora": {"r": 4}})
    run = finished_run(recipe, trained(recipe))
    attempts = [
        (TOKEN, "owner/model", False), (TOKEN, "owner/old", False), (TOKEN, "other/model", False),
        ("hf_wrong", "owner/model", False), ("", "owner/model", False), (TOKEN, "model", False),
        (TOKEN, "owner/model", True),
    ]  # fmt: skip
    home = {"HF_HOME": str(tmp_path / "hf")}
    printed = answer_of(EXPORT, str(run), *map(json.dumps, attempts), HF_ENDPOINT=address, **home)
    new, old, refused, wrong, none, unnamed, local = json.loads(printed)
    for name, (url, files) in (("owner/model", new), ("owner/old", old)):
        assert url == f"{address}/{name}"
        assert sorted(repositories[name]["files"]) == files
        for file in set(files) - {"README.md"}:
            assert repositories[name]["files"][file] == (run / "export" / file).read_bytes()
        assert load(repositories[name]["files"]["model.safetensors"])
        assert f'from_pretrained("{name}"' in repositories[name]["files"]["README.md"].decode()
    assert repositories["owner/model"]["private"]
    assert "the hub returned HTTP 403; the export itself is complete" in refused
    assert (run / "export" / "model.safetensors").is_file()
    assert "the hub returned HTTP 401" in wrong
    assert "no token for the hub" in none
    assert "invalid repository name" in unnamed
    assert "base model of the adapters is not on the hub" in local
    assert sorted(repositories) == ["owner/model", "owner/old"]
    token = {"HF_TOKEN": TOKEN}
    assert "cannot reach the hub" in answer_of(CHECK, HF_ENDPOINT="http://127.0.0.1:9", **token, **home)
    assert "offline mode" in answer_of(CHECK, HF_ENDPOINT=address, **token, **home, HF_HUB_OFFLINE="1")
