"""Keep secrets out of what Ray stores of a job and shows on its dashboard: the command, and the runtime environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from orpo_ray.errors import UserError

HOW = (
    "give it to the cluster's nodes, not to the job: as a variable of the process that starts Ray, as a Kubernetes "
    "secret, or as the role of the machine (docs/clusters.md)"
)
# Of the working directory, these files are never uploaded. Patterns as in .gitignore.
SECRET_FILES = (
    ".env", ".env.*", ".netrc", ".pypirc", ".aws/", ".ssh/", ".kube/", ".ray/", "*.pem", "*.key", "id_rsa*",
    "id_ed25519*", "auth_token", "credentials.json", "service-account*.json",
)  # fmt: skip
MIN_SECRET = 8  # characters; shorter values of variables occur in commands by chance

_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|(?:^|_)AUTH$", re.IGNORECASE
)
_PLACES = re.compile(r"_(PATH|FILE|DIR|URL|URI|MODE)$", re.IGNORECASE)
_FORMS = {
    "a password in an address": re.compile(r"\w://[^/\s:@]+:[^/\s@]+@"),
    "a signed address": re.compile(r"[?&](sig|signature|x-amz-signature|x-goog-signature|access_token|token)=", re.I),
    "a key of AWS": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of the Hugging Face hub": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a token of GitHub": re.compile(r"\b(gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"),
    "a private key": re.compile(r"BEGIN [A-Z ]*PRIVATE KEY"),
}  # fmt: skip


def check_text(text: str, field: str) -> None:
    """Check that a text holds no secret of a known form, and no value of a secret variable of this process.

    Args:
        text: what Ray would store.
        field: where the text is from, for the message. The secret itself is shown nowhere.

    Raises:
        UserError: it does.
    """
    for name, pattern in _FORMS.items():
        if pattern.search(text):
            raise UserError(f"holds {name}, which Ray would store and show on its dashboard", field=field, fix=HOW)
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET and _is_secret(name) and value in text:
            problem = f"holds the value of {name}, which Ray would store and show on its dashboard"
            raise UserError(problem, field=field, fix=HOW)


def check_variables(variables: Mapping[str, Any], field: str) -> None:
    """Check that no variable of a runtime environment is a secret. `${NAME}`, which each node fills in, is allowed.

    Raises:
        UserError: one is.
    """
    for name, value in variables.items():
        if _is_secret(name) and not re.fullmatch(r"\$\{\w+\}", str(value)):
            problem = "is a secret by its name, and Ray would store its value and show it on its dashboard"
            raise UserError(problem, field=f"{field}.{name}", fix=HOW)


def texts(value: Any) -> Iterator[str]:
    """Yield all texts in a nested value, keys included."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts(each)
    elif value is not None:
        yield str(value)


def _is_secret(name: str) -> bool:
    return bool(_NAME.search(name)) and not _PLACES.search(name)
