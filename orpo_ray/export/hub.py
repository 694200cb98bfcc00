"""A folder to the Hugging Face hub. The token comes from HF_TOKEN or `hf auth login` and is never shown."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from orpo_ray.errors import UserError


def check_can_push(repository: str) -> None:
    """Before any work is done: a valid name, a token, a hub that knows it. Raises UserError."""
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise UserError("is not a repository's name", field="--push", value=repository, fix="give OWNER/NAME")
    if get_token() is None:
        fix = "set HF_TOKEN, or log in: hf auth login"
        raise UserError("there is no token for the hub", field="--push", value=repository, fix=fix)
    with _one_message(repository):
        HfApi().whoami()


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload a folder as a model; returns its address. Raises UserError.

    public: who may see a repository that is new. One that is there keeps its visibility, and loses an older model.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _one_message(repository):
        url = api.create_repo(repository, private=not public, exist_ok=True)
        # What an earlier push left may be of another kind, and would be read along.
        stale = ["*.safetensors", "*.safetensors.index.json", "adapter_*", "config.json", "generation_config.json"]
        api.upload_folder(
            repo_id=repository, folder_path=folder, delete_patterns=stale, commit_message="Upload with orpo-ray"
        )
    return str(url)


@contextlib.contextmanager
def _one_message(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        yield
    except OfflineModeIsEnabled:
        fix = "unset HF_HUB_OFFLINE"
        raise UserError("the hub's client is told to be offline", field="--push", value=repository, fix=fix) from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        fix = _FIXES.get(code, "try again later")
        raise UserError(f"the hub answers {code}", field="--push", value=repository, fix=fix) from None
    except (OSError, HTTPError) as error:
        raise UserError(
            f"the hub cannot be reached ({type(error).__name__})",
            field="--push",
            value=repository,
            fix="check the network, and HF_ENDPOINT if that is set",
        ) from None


_FIXES = {
    401: "the token is not valid: set HF_TOKEN, or log in: hf auth login",
    403: "the token may not write there: give your own name as OWNER, or a token with write access",
    404: "there is no such owner, or the token may not see it",
    413: "a file is too large: give --max-shard-size",
}
