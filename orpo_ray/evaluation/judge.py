"""Answers judged by a vision-language model: behind an OpenAI-compatible address, or of this process.

The judge sees image, prompt and two answers, twice with their positions swapped. An answer wins if it wins in both; all
else is a tie.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
import requests
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from orpo_ray.errors import UserError, preview
from orpo_ray.evaluation.statistics import Estimate, mean_estimate
from orpo_ray.tracking.generations import Generation

KEY = "OPENAI_API_KEY"
OPTION, MODEL_OPTION = "--judge", "--judge-model"
TIMEOUT = 120.0  # seconds for one verdict
ATTEMPTS = 4
RETRIED = {408, 429, 500, 502, 503, 504}
QUESTION = (
    "You compare two answers to a question about the image. Judge which is more correct and helpful; do not prefer an "
    "answer for its length or position.\n\nQuestion: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Reply with one word: A, B or TIE."
)
_ARTICLE = re.compile(r"(?:\A|(?<=[.!?:\n]))\s*A(?=\s+(?!is\b|was\b|wins\b|has\b|gives\b)[a-z])")
"""An "A" that begins a sentence and goes with a noun."""
Verdict = Literal["win", "loss", "tie"]
Choice = Literal["A", "B", "TIE"]


class Judge(Protocol):
    """Compares two answers."""

    def check(self) -> None:
        """Check what can be checked before any model is loaded. Raises UserError."""

    def better(self, prompt: str, images: tuple[bytes, ...], first: str, second: str) -> Choice:
        """Say which answer is better.

        Args:
            prompt: the text of the prompt.
            images: its images, as JPEG files.
            first: answer A.
            second: answer B.

        Raises:
            UserError: the judge does not answer.
        """


def question(prompt: str, first: str, second: str) -> str:
    """Return what a judge is asked."""
    return QUESTION.format(prompt=prompt, first=first or "(nothing)", second=second or "(nothing)")


class _Busy(Exception):
    """The judge should be asked again."""


@dataclass(frozen=True)
class ServerJudge:
    """A `Judge` behind an address."""

    url: str
    """Up to and including the version, such as `http://localhost:8000/v1`."""
    model: str

    def check(self) -> None:
        """Check the address, and that a key would not travel in the clear. Raises UserError."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("not an address", field=OPTION, value=self.url, fix="give http(s)://HOST[:PORT]/v1")
        if parts.username or parts.password or parts.query:
            raise UserError("an address with a key in it", field=OPTION, fix=f"set {KEY} in the environment instead")
        if parts.scheme == "http" and os.environ.get(KEY) and not _is_own_machine(parts.hostname):
            raise UserError(
                f"{KEY} would be sent to another machine without encryption",
                field=OPTION,
                value=self.url,
                fix=f"use https, or unset {KEY}",
            )

    def better(self, prompt: str, images: tuple[bytes, ...], first: str, second: str) -> Choice:
        """Ask which answer is better. Raises UserError."""
        shown = [
            {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(image).decode()}}
            for image in images
        ]
        message = {"role": "user", "content": [*shown, {"type": "text", "text": question(prompt, first, second)}]}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": 256}
        try:
            for attempt in Retrying(
                retry=retry_if_exception_type(_Busy), stop=stop_after_attempt(ATTEMPTS),
                wait=wait_exponential(max=30), reraise=True,
            ):  # fmt: skip
                with attempt:
                    reply = self._post(body)
        except _Busy as error:
            raise self._failed(str(error)) from None
        return verdict_of(reply)

    def _post(self, body: dict[str, Any]) -> str:
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = self.url.rstrip("/") + "/chat/completions"
        try:
            # A redirect could lead the key elsewhere.
            found = requests.post(address, json=body, headers=headers, timeout=TIMEOUT, allow_redirects=False)
        except requests.RequestException as error:
            raise _Busy(type(error).__name__) from None
        if found.status_code in RETRIED:
            raise _Busy(f"status {found.status_code}")
        if found.status_code != 200:
            raise self._failed(f"status {found.status_code}: {preview(found.text)}")
        try:
            return str(found.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError):
            raise self._failed(f"not a chat completion: {preview(found.text)}") from None

    def _failed(self, why: str) -> UserError:
        return UserError(f"the judge does not answer: {why}", field=OPTION, value=self.url,
                         fix="check address, model and key; the server must offer /chat/completions")  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """What a judge found."""

    against: str
    """Whose answers the model's were compared with."""
    verdicts: list[Verdict]
    """By pair."""
    win_rate: Estimate
    """Wins, with a tie as half of one."""
    swapped: int
    """Pairs of which the judge preferred the same position twice."""

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        counts = {f"{name}": self.verdicts.count(name) for name in ("win", "loss", "tie")}
        return {"against": self.against, **counts, "swapped": self.swapped, "win_rate": self.win_rate.as_json()}


def judge_answers(judge: Judge, answers: Sequence[Generation], others: Sequence[str], against: str) -> Judged:
    """Judge the greedy answers of a model against others to the same prompts.

    Args:
        judge: the judge.
        answers: of the model.
        others: an answer for each.
        against: whose answers the others are.

    Raises:
        UserError: the judge does not answer.
    """
    verdicts: list[Verdict] = []
    swapped = 0
    for answer, other in zip(answers, others, strict=True):
        if answer.greedy == other:
            verdicts.append("tie")
            continue
        one = judge.better(answer.prompt, answer.images, answer.greedy, other)
        two = judge.better(answer.prompt, answer.images, other, answer.greedy)
        swapped += one == two != "TIE"
        verdicts.append("win" if (one, two) == ("A", "B") else "loss" if (one, two) == ("B", "A") else "tie")
    points = np.array([{"win": 1.0, "loss": 0.0, "tie": 0.5}[each] for each in verdicts])
    return Judged(against, verdicts, mean_estimate(points), swapped)


def verdict_of(reply: str) -> Choice:
    """Read the judge's reply: its last A, B or TIE that stands alone and is no article; without one, it is a tie."""
    text = re.sub(r"<think>.*?(</think>|\Z)", "", reply, flags=re.DOTALL).strip()  # also if it was cut off
    if whole := re.fullmatch(r"\W*(a|b|tie)\W*", text, re.IGNORECASE):
        return whole[1].upper()  # type: ignore[return-value]
    found = re.findall(r"\b(A|B|TIE)\b", _ARTICLE.sub("", re.sub(r"\b[Tt]ie\b", "TIE", text)))
    return found[-1] if found else "TIE"


def _is_own_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
