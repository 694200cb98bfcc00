"""Read and list files by local path or URI. Requests to object stores are retried and have time limits.

Credentials, region and endpoint come from the environment (`AWS_*`, `GOOGLE_APPLICATION_CREDENTIALS`, `HF_TOKEN`),
never from a recipe.
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
ATTEMPTS = 6  # per operation, in addition to the attempts that the client makes per request
RETRY_SECONDS = 30.0  # no further attempt starts after this time
REQUEST_ATTEMPTS = 3
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 60.0
P = ParamSpec("P")
T = TypeVar("T")


def is_remote(uri: str) -> bool:
    """Whether this is a URI and not a local path."""
    return "://" in uri


def locate(uri: str, field: str = "path") -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a local path or URI, and the path on that filesystem.

    Args:
        uri: a local path or a URI.
        field: recipe key or file name, for error messages.

    Raises:
        UserError: the URI's scheme is not supported.
    """
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(Path(os.path.expanduser(uri)).absolute())
    scheme, _, path = uri.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"unsupported storage: {scheme}://", field=field, value=uri, fix=f"use a local path, or {known}"
        )
    return _remote(scheme), path.rstrip("/")


def with_scheme_of(uri: str, path: str) -> str:
    """Return a path on the filesystem of `uri` as a URI, or unchanged if that filesystem is local."""
    return f"{uri.partition('://')[0]}://{path}" if is_remote(uri) else path


def parent_folder(uri: str) -> str:
    """Return the folder that contains a file, as a path or URI."""
    scheme, separator, path = uri.rpartition("://")
    return f"{scheme}{separator}{PurePosixPath(path).parent}"


def with_retries(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `action` and retry after temporary failures of a store: a lost connection, a 5xx, an incomplete response."""
    attempts = Retrying(
        retry=retry_if_exception(_is_temporary),
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(RETRY_SECONDS),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        reraise=True,
    )
    return attempts(action, *args, **kwargs)


class TooLarge(OSError):
    """The file is larger than the caller's limit."""


def read_bytes(uri: str, offset: int = 0, length: int | None = None, at_most: int | None = None) -> bytes:
    """Read a file, or a range of its bytes.

    Args:
        uri: a local path or a URI.
        offset: first byte to read.
        length: number of bytes; by default, all from `offset` to the end.
        at_most: size limit of the file in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        TooLarge: the file has more than `at_most` bytes.
        OSError: the file cannot be read.
    """
    filesystem, path = locate(uri)

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            if at_most is not None and file.size() > at_most:
                raise TooLarge(f"{file.size()} bytes exceed the limit of {at_most}")
            data: bytes = file.read_at(file.size() - offset if length is None else length, offset)
            return data

    return with_retries(read) if is_remote(uri) else read()


class RemoteFolder:
    """An image folder in an object store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def read(self, path: str, at_most: int) -> bytes:
        """Read the file at a relative path. Raises FileNotFoundError, TooLarge or OSError."""
        return read_bytes(f"{self.uri}/{path}", at_most=at_most)

    def names(self, path: str, at_most: int) -> list[str]:
        """Return the names of the files in a folder. Raises FileNotFoundError, TooLarge or OSError."""
        filesystem, folder = locate(f"{self.uri}/{path}")
        found = with_retries(lambda: filesystem.get_file_info(pafs.FileSelector(folder)))
        if len(found) > at_most:
            raise TooLarge(f"{len(found)} files exceed the limit of {at_most}")
        return [info.base_name for info in found if info.type == pafs.FileType.File]


def image_folder(root: str | None) -> Path | RemoteFolder | None:
    """Return the folder that image paths are relative to, from its path or URI."""
    if root is None:
        return None
    return RemoteFolder(root) if is_remote(root) else Path(root)


def list_files(uri: str, field: str) -> list[str]:
    """List the files that a path, folder or glob matches, sorted, each as a path or URI. Hidden files are left out.

    Raises:
        UserError: nothing matches, or the folder cannot be listed.
    """
    filesystem, path = locate(uri, field)
    is_literal = not is_remote(uri) and os.path.lexists(path)  # file names may contain `*` or `[`
    root = path if is_literal else _folder_before_wildcard(path)
    try:
        found = with_retries(lambda: list(_walk(filesystem, root)))
    except OSError as error:
        raise UserError(
            f"cannot list files: {one_line(error)}",
            field=field,
            value=uri,
            fix="check the path and your access to it",
        ) from None
    try:
        matches = re.compile(_glob_pattern(path)).fullmatch if root != path else None
    except re.error as error:
        raise UserError(
            f"not a valid glob: {error}", field=field, value=uri, fix="use *, **, ? and [...] as wildcards"
        ) from None
    visible = (name for name in found if not re.search(r"/\.", name[len(root) :]))
    files = sorted(name for name in visible if matches is None or matches(name))
    if not files and filesystem.get_file_info(root).type == pafs.FileType.NotFound:
        raise UserError("no such file or folder", field=field, value=uri, fix="check the path")
    return [with_scheme_of(uri, name) for name in files]


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
    """Return endpoint and region from the variables that AWS tools read, for S3-compatible stores (MinIO, R2, ...)."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"region": region} if region else {}
    if endpoint:
        address = urlsplit(endpoint)
        options |= {"endpoint_override": address.netloc, "scheme": address.scheme}
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


def _folder_before_wildcard(path: str) -> str:
    """Return the path up to the first component with a wildcard."""
    names = path.split("/")
    first_wildcard = next((i for i, name in enumerate(names) if re.search(r"[*?\[]", name)), len(names))
    return "/".join(names[:first_wildcard])


def _glob_pattern(path: str) -> str:
    """Translate a glob to a regular expression. `**` matches any folders; `*` and `?` match within a name."""
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", path)
    literals = (token.replace("[!", "[^", 1) if token.startswith("[") else re.escape(token) for token in tokens)
    return "".join(wildcards.get(token) or text for token, text in zip(tokens, literals, strict=True))


def _is_temporary(error: BaseException) -> bool:
    """Whether a retry may help. A missing file or a refused access will not change."""
    permanent = (TooLarge, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, pa.ArrowInvalid)
    return isinstance(error, OSError) and not isinstance(error, permanent) and not _REFUSED.search(str(error))


_REFUSED = re.compile(r"ACCESS_DENIED|HTTP status 40[134]|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH")


# How Arrow marks what a store said, in errors of the same class as those of damaged files.
_STORE_SAYS = re.compile(r"AWS Error|google::cloud")


def is_permanent(error: BaseException) -> bool:
    """Whether an error of reading a file is about its content, or about a file that is not there or not ours.

    All other errors are failures of a disk, a network or a store, after which a run can go on from its checkpoint.
    """
    if not isinstance(error, OSError) or isinstance(error, pa.ArrowException):
        return True
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return True
    return type(error) is OSError and error.errno is None and not _STORE_SAYS.search(str(error))


def one_line(error: BaseException) -> str:
    """Return the text of an error, without line breaks and shortened."""
    return " ".join(str(error).split())[:300]
