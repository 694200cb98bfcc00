"""Keep a Ray that starts on this machine to its user: its ports, its session folder and its token.

By itself, Ray listens on every interface, lets everyone write to its session folders, and writes a token that everyone
can read.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ray._private import ray_constants
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_SWITCH = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let the Ray that is started or joined in this context take 127.0.0.1 as an address.

    A Ray that starts opens all its ports there. Otherwise Ray replaces it by the machine's address, also in
    `ray.init(_node_ip_address="127.0.0.1")` and in RAY_ADDRESS. What decides is a switch for macOS and Windows, which
    Ray has read when it was imported; its other processes read it from the environment.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(_SWITCH)
    vars(ray_constants)["ENABLE_RAY_CLUSTER"] = False
    os.environ[_SWITCH] = "0"
    try:
        yield
    finally:
        vars(ray_constants)["ENABLE_RAY_CLUSTER"] = before[0]
        os.environ.pop(_SWITCH)
        if before[1] is not None:
            os.environ[_SWITCH] = before[1]


def session_parent() -> Path:
    """Return the folder, in RAY_TMPDIR or /tmp, that holds Ray's sessions and that only this user can open."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"orpo-ray-{os.getuid()}"


def make_session_parent() -> Path:
    """Make the folder of `session_parent`. Raises OSError if it cannot be made, or belongs to somebody else."""
    folder = session_parent()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is a link, or belongs to another user")
    folder.chmod(0o700)
    return folder


def make_token() -> None:
    """Make the token that a Ray asks for by default, in the file where Ray looks for it. Only this user can read it.

    Raises OSError.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token" or any(os.environ.get(name) for name in TOKEN_VARIABLES):
        return
    path = token_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with contextlib.suppress(PermissionError):  # of another user, who decides about it
            path.chmod(0o600)
        return
    descriptor, scratch = tempfile.mkstemp(dir=path.parent)  # readable by this user only
    with os.fdopen(descriptor, "w") as file:
        file.write(generate_new_authentication_token())
    # Another command may make one now: whoever is first wins, and nobody reads half a token.
    with contextlib.suppress(FileExistsError):
        os.link(scratch, path)
    os.unlink(scratch)


def token_file() -> Path:
    """Return the path where Ray looks for a token, unless a variable names another place."""
    return Path.home() / ".ray" / "auth_token"
