"""Answers judged by a vision-language model: behind an OpenAI-compatible address, or of this process.

The judge sees image, prompt and two answers, twice with their positions swapped. An answer wins if it wins in both; all
else is a tie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.chat_server import ChatServer, image_part
from orpo_ray.evaluation.statistics import Estimate, mean_estimate
from orpo_ray.tracking.generations import Generation

OPTION, MODEL_OPTION = "--judge", "--judge-model"
QUESTION = (
    "You compare two answers to a question about the image. Judge which is more correct and helpful; do not prefer an "
    "answer for its length or position.\n\nQuestion: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Reply with one word: A, B or TIE."
)
_ARTICLE = re.compile(r"(?:\A|(?<=[.!?:\n]))\s*A(?=\s+(?!is\b|was\b|wins\b|has\b|gives\b)[a-z])")
"""An "A" that begins a sentence and goes with a noun."""
TAKES_QUESTIONS = "give an instruction-tuned model that takes as many images and tokens as a pair has"
Verdict = Literal["win", "loss", "tie"]
Choice = Literal["A", "B", "TIE"]
POINTS: dict[Verdict, float] = {"win": 1.0, "loss": 0.0, "tie": 0.5}


class Judge(Protocol):
    """Compares two answers."""

    @property
    def field(self) -> str:
        """The option or recipe field that names the judge, for messages."""

    def check(self) -> None:
        """Check what can be checked before any model is loaded. Raises UserError."""

    def better(self, prompt: str, images: tuple[bytes, ...], first: str, second: str) -> Choice:
        """Say which answer is better.

        Args:
            prompt: the text of the prompt.
            images: its images, as JPEG or PNG files.
            first: answer A.
            second: answer B.

        Raises:
            RowError: the judge refuses this question.
            UserError: the judge does not answer.
        """


def question(prompt: str, first: str, second: str) -> str:
    """Return what a judge is asked."""
    return QUESTION.format(prompt=prompt, first=first or "(nothing)", second=second or "(nothing)")


@dataclass(frozen=True)
class ServerJudge:
    """A `Judge` behind an address."""

    url: str
    """Up to and including the version, such as `http://localhost:8000/v1`."""
    model: str
    field: str = OPTION
    """The option or recipe field that gives the address, for messages."""

    def check(self) -> None:
        """Check the address, and that a key would not travel in the clear. Raises UserError."""
        self._server.check()

    def better(self, prompt: str, images: tuple[bytes, ...], first: str, second: str) -> Choice:
        """Ask which answer is better. Raises RowError if the server refuses the question, UserError if it is silent."""
        shown = [image_part(image) for image in images]
        message = {"role": "user", "content": [*shown, {"type": "text", "text": question(prompt, first, second)}]}
        return verdict_of(self._server.reply([message], max_tokens=256, temperature=0).text)

    @property
    def _server(self) -> ChatServer:
        return ChatServer(self.url, self.model, self.field, "judge")


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


def compare_twice(
    judge: Judge, prompt: str, images: tuple[bytes, ...], answer: str, other: str
) -> tuple[Verdict, bool]:
    """Have an answer compared with another in both positions; equal answers are a tie that needs no judge.

    Args:
        judge: the judge.
        prompt: the text of the prompt.
        images: its images, as JPEG or PNG files.
        answer: the answer that wins or loses.
        other: the other one.

    Returns:
        The verdict, and whether the judge preferred the same position twice.

    Raises:
        RowError: the judge refuses a question.
        UserError: the judge does not answer.
    """
    if answer == other:
        return "tie", False
    one, two = judge.better(prompt, images, answer, other), judge.better(prompt, images, other, answer)
    if (one, two) == ("A", "B"):
        return "win", False
    return ("loss", False) if (one, two) == ("B", "A") else ("tie", one == two != "TIE")


def judge_answers(judge: Judge, answers: Sequence[Generation], others: Sequence[str], against: str) -> Judged:
    """Judge the greedy answers of a model against others to the same prompts.

    Args:
        judge: the judge.
        answers: of the model.
        others: an answer for each.
        against: whose answers the others are.

    Raises:
        UserError: the judge does not answer, or refuses a question.
    """
    verdicts: list[Verdict] = []
    swapped = 0
    for answer, other in zip(answers, others, strict=True):
        try:
            verdict, same_position = compare_twice(judge, answer.prompt, answer.images, answer.greedy, other)
        except RowError as error:
            raise UserError(
                f"the judge cannot take the question about pair {answer.id}: {error.detail}",
                field=judge.field,
                fix=TAKES_QUESTIONS,
            ) from None
        verdicts.append(verdict)
        swapped += same_position
    points = np.array([POINTS[each] for each in verdicts])
    return Judged(against, verdicts, mean_estimate(points), swapped)


def verdict_of(reply: str) -> Choice:
    """Read the judge's reply: its last A, B or TIE that stands alone and is no article; without one, it is a tie."""
    text = re.sub(r"<think>.*?(</think>|\Z)", "", reply, flags=re.DOTALL).strip()  # also if it was cut off
    if whole := re.fullmatch(r"\W*(a|b|tie)\W*", text, re.IGNORECASE):
        return whole[1].upper()  # type: ignore[return-value]
    found = re.findall(r"\b(A|B|TIE)\b", _ARTICLE.sub("", re.sub(r"\b[Tt]ie\b", "TIE", text)))
    return found[-1] if found else "TIE"
