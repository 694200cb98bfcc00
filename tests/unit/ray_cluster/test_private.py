"""The token and the folder of a Ray that starts here are for its user alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_ray.ray_cluster.private import make_session_parent, make_token, session_parent, token_file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "scratch"))
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_token_is_made_once_and_only_its_user_can_read_it(home: Path) -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    make_token()
    assert token_file() == _get_default_token_path()  # where Ray looks for it
    token = token_file().read_text()
    assert len(token) >= 32
    assert mode(token_file()) == 0o600
    token_file().chmod(0o644)  # as Ray makes it
    make_token()
    assert token_file().read_text() == token
    assert mode(token_file()) == 0o600
    assert os.listdir(home / ".ray") == ["auth_token"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "t"), ("RAY_AUTH_TOKEN_PATH", "/else")],
)
def test_no_token_is_made_where_none_or_another_one_is_used(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    make_token()
    assert not token_file().exists()


def test_sessions_are_in_a_folder_of_their_user(home: Path) -> None:
    folder = make_session_parent()
    assert folder == home / "scratch" / f"orpo-ray-{os.getuid()}"
    folder.chmod(0o755)
    assert mode(make_session_parent()) == 0o700


def test_a_folder_that_somebody_else_put_there_is_refused(home: Path) -> None:
    (home / "scratch").mkdir()
    (home / "theirs").mkdir()
    session_parent().symlink_to(home / "theirs")
    with pytest.raises(PermissionError, match="is a link, or belongs to another user"):
        make_session_parent()
