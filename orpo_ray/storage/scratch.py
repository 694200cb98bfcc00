"""Scratch folders on a node's own disk, and removal of those that killed processes left."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

import psutil

MIN_AGE_S = 3600.0  # a process identifier that was just given away may not be visible yet


def make_scratch(parent: str | None = None) -> Path:
    """Create an empty folder whose name tells which process of which machine it belongs to.

    Args:
        parent: an existing folder; by default, the system's folder for temporary files.
    """
    return Path(tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=parent))


def clear_dead_scratch(parent: str | None = None, min_age_s: float = MIN_AGE_S) -> list[Path]:
    """Remove the scratch folders of processes of this machine that no longer exist.

    Containers may share a folder for temporary files, but neither processes nor host names.

    Args:
        parent: the argument of `make_scratch`.
        min_age_s: seconds since a folder's last change that it must be old.

    Returns:
        The folders removed.
    """
    removed = []
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{_prefix()}*"):
        owner = re.fullmatch(r"(\d+)-\w+", folder.name.removeprefix(_prefix()))
        if owner is None or psutil.pid_exists(int(owner[1])):
            continue
        try:
            age = time.time() - folder.stat().st_mtime
        except FileNotFoundError:  # another worker was faster
            continue
        if age >= min_age_s:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _prefix() -> str:
    return f"orpo-ray-{re.sub(r'[^A-Za-z0-9]', '_', socket.gethostname())}-"
