"""Images are read only from the image root and, if the recipe allows it, from URLs."""

from __future__ import annotations

import io
import os
import socket
import threading
from pathlib import Path

import pytest
from PIL import Image

from orpo_ray.data import images
from orpo_ray.data.images import ImageRoot, load_image
from orpo_ray.errors import RowError


def png(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, "PNG")
    return buffer.getvalue()


def load_path(path: str, root: Path | ImageRoot | None) -> Image.Image:
    return load_image({"bytes": None, "path": path}, root)


def failure(path: str, root: Path | ImageRoot | None, allow_http: bool = False) -> RowError:
    with pytest.raises(RowError) as error:
        load_image({"bytes": None, "path": path}, root, allow_http)
    assert error.value.detail.isprintable()
    assert len(error.value.detail) <= 200
    return error.value


def reason(path: str, root: Path | ImageRoot | None) -> str:
    return failure(path, root).reason


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder, with another image outside."""
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(png(9))
    (folder / "inside.png").write_bytes(png(3))
    return folder


def test_paths_stay_inside_their_root(root: Path) -> None:
    outside = root.parent / "outside.png"
    (root / "link.png").symlink_to(outside)
    (root / "up").symlink_to(root.parent)
    (root / "round").symlink_to(root / "round")
    (root / "sub" / "fine.png").symlink_to(root / "inside.png")
    for path in ("inside.png", "sub/../inside.png", "./inside.png", str(root / "inside.png"), "sub/fine.png"):
        assert load_path(path, root).size == (3, 3)
    links = ("link.png", "up/outside.png", "sub/../link.png")
    for path in ("../outside.png", str(outside), "sub/../../outside.png", "/etc/passwd", "../root2/a", *links):
        assert reason(path, root) == "unsafe_path"
    for path in ("a\x00b", "inside.png\x00", "\ud800.png"):
        assert reason(path, root) == "unsafe_path"
    assert reason("round", root) in ("unsafe_path", "unreadable_image")
    assert reason("inside.png", None) == "unsafe_path"
    for path in ("none.png", "inside.png/none.png", "x" * 300, "x/" * 5000, "none/../none.png"):
        assert reason(path, root) == "missing_image"


def test_a_root_that_is_a_link(root: Path) -> None:
    (root.parent / "link").symlink_to(root)
    assert load_path("inside.png", root.parent / "link").size == (3, 3)
    assert reason("../outside.png", root.parent / "link") == "unsafe_path"


def test_a_file_that_becomes_a_link_is_not_followed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "link.png").symlink_to(root.parent / "outside.png")
    monkeypatch.setattr(images, "inside", lambda path, root: root / path)
    assert reason("link.png", root) == "unreadable_image"


def test_only_regular_files_are_read(root: Path) -> None:
    os.mkfifo(root / "pipe")
    for path in ("pipe", "sub", "", "."):
        assert reason(path, root) == "unreadable_image"
    with socket.socket(socket.AF_UNIX) as listening:
        short = os.path.relpath(root / "socket")  # socket paths are limited to about 100 bytes
        if len(short) < 100:
            listening.bind(short)
            assert reason("socket", root) == "unreadable_image"


def test_a_pipe_with_a_writer_does_not_block(root: Path) -> None:
    os.mkfifo(root / "pipe")
    writer = os.open(root / "pipe", os.O_RDWR)
    done = threading.Event()

    def read() -> None:
        assert reason("pipe", root) == "unreadable_image"
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(10)
    os.close(writer)


def test_unreadable_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert failure("inside.png", root).detail == "inside.png: Permission denied"


def test_large_files_are_not_read(root: Path) -> None:
    with open(root / "large.png", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    assert reason("large.png", root) == "image_too_large"


class Store:
    """A folder in an object store that records which paths are read."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer, self.asked = answer, list[str]()

    def read(self, path: str, at_most: int) -> bytes:
        self.asked.append(path)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_remote_roots() -> None:
    store = Store(png(3))
    for path in ("a.png", "sub/folder/b c.png", "\u00e9..\u3000.png", "..a/b..", "12:30.png"):
        assert load_path(path, store).size == (3, 3)
        assert store.asked[-1] == path


@pytest.mark.parametrize(
    "path",
    [
        *("/a.png", "..", "../a.png", "a/../../b.png", "a/..", "a\\..\\b", "\\a", "", "a\x00b", "a\nb", "\ud800"),
        *("a/s3://other/b", "zip::a", "./..", "a//../b"),
    ],
)
def test_remote_paths_that_are_not_plain(path: str) -> None:
    store = Store(b"")
    assert reason(path, store) == "unsafe_path"
    assert not store.asked


def test_remote_failures() -> None:
    errors = {
        FileNotFoundError("a"): "missing_image",
        PermissionError("a"): "download_failed",
        KeyError("a"): "download_failed",
    }
    for error, expected in errors.items():
        assert reason("a.png", Store(error)) == expected
    assert reason("a.png", Store(RowError("own", "reason"))) == "own"


@pytest.mark.parametrize("path", ["file:///etc/passwd", "s3://bucket/a", "ftp://a/b", "data:image/png;base64,AAAA"])
def test_unsupported_url_schemes(path: str, root: Path) -> None:
    for allow_http in (False, True):
        assert failure(path, root, allow_http).reason == "unsupported_url"


@pytest.mark.parametrize("path", ["http://a.example/b?token=s3cret", "HTTPS://user:s3cret@a.example/b"])
def test_downloads_require_allow_http(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = []

    def fetch(url: str) -> bytes:
        downloaded.append(url)
        return png(3)

    monkeypatch.setattr(images, "fetch", fetch)
    bad = failure(path, None)
    assert (bad.reason, "data.allow_http" in bad.detail, "s3cret" in str(bad)) == ("unsupported_url", True, False)
    assert not downloaded
    assert load_image({"bytes": None, "path": path}, None, allow_http=True).size == (3, 3)
    assert downloaded == [path]


def test_downloads_are_checked() -> None:
    assert failure("http://127.0.0.1/a", None, allow_http=True).reason == "unsafe_url"
