"""Files wherever they are: a local path or a URI -> a filesystem and a path on it. Errors are retried, waits bounded.

Credentials, region and endpoint come from the environment (`AWS_*`, `GOOGLE_APPLICATION_CREDENTIALS`, `HF_TOKEN`),
as every client of those stores reads them; never from a recipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

from orpo_ray.errors import UserError

SCHEMES = ("s3", "gs", "hf")
ATTEMPTS = 6  # of a whole file, on top of those that a client makes of each request
PATIENCE_SECONDS = 30.0  # after which no further attempt is begun
REQUEST_ATTEMPTS = 3
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 60.0
P = ParamSpec("P")
T = TypeVar("T")


def is_remote(uri: str) -> bool:
    """Whether this is an address and not a path on this machine."""
    return "://" in uri


def locate(uri: str, field: str = "path") -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path on it. Raises UserError for a kind that is not supported."""
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    scheme, _, path = uri.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError("this kind of storage is not supported", field=field, value=uri, fix=f"a path, or {known}")
    return _remote(scheme), path.rstrip("/")


def beside(uri: str, path: str) -> str:
    """The URI of a path on the filesystem of `uri`."""
    return f"{uri.partition('://')[0]}://{path}" if is_remote(uri) else path


def parent(uri: str) -> str:
    """The folder that holds a file."""
    scheme, separator, path = uri.rpartition("://")
    return f"{scheme}{separator}{PurePosixPath(path).parent}"


def with_retries(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do it again where a store fails for the moment: a lost connection, a 5xx, an answer cut short."""
    attempts = Retrying(
        retry=retry_if_exception(_passes),
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(PATIENCE_SECONDS),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        reraise=True,
    )
    return attempts(action, *args, **kwargs)


class TooLarge(OSError):
    """A file is larger than what the caller would read."""


def read_bytes(uri: str, offset: int = 0, length: int | None = None, at_most: int | None = None) -> bytes:
    """A file, or `length` bytes of it from `offset`. Raises FileNotFoundError, TooLarge and OSError."""
    filesystem, path = locate(uri)

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            if at_most is not None and file.size() > at_most:
                raise TooLarge(f"{file.size()} bytes; at most {at_most} are read")
            data: bytes = file.read_at(file.size() - offset if length is None else length, offset)
            return data

    return with_retries(read) if is_remote(uri) else read()


class RemoteFolder:
    """A folder in an object store that image paths are relative to."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def read(self, path: str, at_most: int) -> bytes:
        """The file at a path below the folder. Raises FileNotFoundError, TooLarge and OSError."""
        return read_bytes(f"{self.uri}/{path}", at_most=at_most)


def folder_of(root: str | None) -> Path | RemoteFolder | None:
    """A folder by its path or URI."""
    if root is None:
        return None
    return RemoteFolder(root) if is_remote(root) else Path(root)


def list_files(uri: str, field: str) -> list[str]:
    """The files that a path, folder or glob stands for, sorted, each as a path or URI; none that is hidden in them.

    Raises UserError where there is nothing of that name.
    """
    filesystem, path = locate(uri, field)
    literal = not is_remote(uri) and os.path.lexists(path)  # a file may be named like a glob
    fixed = path if literal else _without_glob(path)
    try:
        found = with_retries(lambda: list(_walk(filesystem, fixed)))
    except OSError as error:
        raise UserError(f"cannot be listed: {_one_line(error)}", field=field, value=uri) from None
    try:
        matches = re.compile(_glob_pattern(path)).fullmatch if fixed != path else None
    except re.error as error:
        raise UserError(f"is not a valid glob: {error}", field=field, value=uri) from None
    visible = (name for name in found if not re.search(r"/\.", name[len(fixed) :]))
    files = sorted(name for name in visible if matches is None or matches(name))
    if not files and filesystem.get_file_info(fixed).type == pafs.FileType.NotFound:
        raise UserError("no such file or folder", field=field, value=uri)
    return [beside(uri, name) for name in files]


@lru_cache(maxsize=8)
def _remote(scheme: str) -> pafs.FileSystem:
    if scheme == "s3":
        return pafs.S3FileSystem(
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=REQUEST_ATTEMPTS),
            connect_timeout=CONNECT_SECONDS,
            request_timeout=REQUEST_SECONDS,
            **_s3_endpoint(),
        )
    if scheme == "gs":
        return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=REQUEST_SECONDS))
    from huggingface_hub import HfFileSystem

    return pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem()))


def _s3_endpoint() -> dict[str, Any]:
    """Where S3 is, for stores that speak its language (MinIO, R2, ...): what the other AWS tools read."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"region": region} if region else {}
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    return options


def _walk(filesystem: pafs.FileSystem, path: str) -> Iterator[str]:
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.File:
        yield path
        return
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    for found in filesystem.get_file_info(selector):
        if found.type == pafs.FileType.File:
            yield found.path


def _without_glob(path: str) -> str:
    """The part of a path before the first component with a wildcard."""
    parts = path.split("/")
    wild = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return "/".join(parts[:wild])


def _glob_pattern(path: str) -> str:
    """A glob as a regular expression: `**` any folders, `*` and `?` within one."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", path)
    classes = (piece.replace("[!", "[^", 1) if piece.startswith("[") else re.escape(piece) for piece in pieces)
    return "".join(tokens.get(piece) or text for piece, text in zip(pieces, classes, strict=True))


def _passes(error: BaseException) -> bool:
    """Whether trying again may help. What is not there, or not allowed, stays so."""
    lasting = (TooLarge, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, pa.ArrowInvalid)
    return isinstance(error, OSError) and not isinstance(error, lasting) and not _REFUSED.search(str(error))


_REFUSED = re.compile(r"ACCESS_DENIED|HTTP status 40[134]|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
