"""Upload a model folder to the Hugging Face hub.

The token comes from HF_TOKEN or `hf auth login`, and is never printed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from orpo_ray.errors import UserError


def check_can_push(repository: str) -> None:
    """Check repository name, token and connection before any work is done. Raises UserError."""
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise UserError("invalid repository name", field="--push", value=repository, fix="give OWNER/NAME")
    if get_token() is None:
        fix = "set HF_TOKEN, or run: hf auth login"
        raise UserError("no token for the hub", field="--push", value=repository, fix=fix)
    with _hub_errors_as_user_errors(repository):
        HfApi().whoami()


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload a folder as a model repository.

    Args:
        folder: the model folder.
        repository: OWNER/NAME. In an existing repository, the files of an older model are deleted.
        public: whether a new repository is public. An existing one keeps its visibility.

    Returns:
        URL of the repository.

    Raises:
        UserError: the upload failed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors_as_user_errors(repository):
        url = api.create_repo(repository, private=not public, exist_ok=True)
        # An older upload can be of another kind (adapters, a merged model), and its files would be loaded too.
        stale = ["*.safetensors", "*.safetensors.index.json", "adapter_*", "config.json", "generation_config.json"]
        api.upload_folder(
            repo_id=repository, folder_path=folder, delete_patterns=stale, commit_message="Upload with orpo-ray"
        )
    return str(url)


@contextlib.contextmanager
def _hub_errors_as_user_errors(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        yield
    except OfflineModeIsEnabled:
        fix = "unset HF_HUB_OFFLINE"
        raise UserError("the hub client is in offline mode", field="--push", value=repository, fix=fix) from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        fix = _FIXES.get(code, "try again later")
        raise UserError(f"the hub returned HTTP {code}", field="--push", value=repository, fix=fix) from None
    except (OSError, HTTPError) as error:
        raise UserError(
            f"cannot reach the hub ({type(error).__name__})",
            field="--push",
            value=repository,
            fix="check the network connection, and HF_ENDPOINT if it is set",
        ) from None


_FIXES = {
    401: "the token is invalid; set HF_TOKEN, or run: hf auth login",
    403: "the token has no write access; give your own name as OWNER, or use a token with write access",
    404: "check the owner's name, and that the token has access",
    413: "a file is too large; give --max-shard-size",
}
