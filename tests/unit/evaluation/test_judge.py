"""A judge behind a server that speaks the protocol, and a model of this process."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.evaluate_run import EvaluateOptions
from orpo_ray.evaluation.generation import Answerer
from orpo_ray.evaluation.judge import ServerJudge, judge_answers, verdict_of
from orpo_ray.evaluation.local_judge import LocalJudge
from orpo_ray.tiny_models.build import resolve
from orpo_ray.tracking.generations import Generation
from support.chat_servers import ChatServer, answers_of, serving

KEY = "sk-test"


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, str], str]], ChatServer]]:
    with ExitStack() as started:
        yield lambda reply: started.enter_context(serving(lambda body: reply(*answers_of(body))))


def answer(index: int, greedy: str) -> Generation:
    return Generation(index, str(index), "", "What?", "chosen", "rejected", greedy, "", images=(b"jpeg",))


def test_positions_are_swapped_and_a_preference_for_one_is_a_tie(
    serve: Callable[..., ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(first: str, second: str) -> str:
        if "same" in first + second:
            return "A"  # whatever stands first
        if "equal" in first + second:
            return "Tie."
        return "A" if len(first) > len(second) else "The better one is: B"

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(reply)
    answers = [
        answer(0, "a long answer"),
        answer(1, "x"),
        answer(2, "same"),
        answer(3, "equal"),
        answer(4, "identical"),
    ]
    others = ["short", "longer", "other", "another", "identical"]
    judge = ServerJudge(server.url, "judge")
    judge.check()
    found = judge_answers(judge, answers, others, "the base")
    assert found.verdicts == ["win", "loss", "tie", "tie", "tie"]
    assert found.swapped == 1
    assert found.win_rate.value == pytest.approx(0.5)
    assert len(server.seen) == 8, "equal answers need no judge"
    assert {each["path"] for each in server.seen} == {"/v1/chat/completions"}
    assert {each["key"] for each in server.seen} == {f"Bearer {KEY}"}
    assert server.seen[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert found.as_json() | {"win_rate": None} == {
        "against": "the base", "win": 1, "loss": 1, "tie": 3, "swapped": 1, "win_rate": None,
    }  # fmt: skip


def test_a_busy_judge_is_asked_again_and_a_broken_one_is_one_message(
    serve: Callable[..., ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    server = serve(lambda first, second: "A")
    server.statuses = [429, 503]
    assert ServerJudge(server.url, "judge").better("What?", (b"jpeg",), "a", "b") == "A"
    assert {each["key"] for each in server.seen} == {None}
    for statuses, said in (([401], "status 401"), ([500] * 9, "status 500"), ([302], "status 302")):
        server.statuses = list(statuses)
        with pytest.raises(UserError, match=said):
            ServerJudge(server.url, "judge").better("What?", (b"jpeg",), "a", "b")
    with pytest.raises(UserError, match="ConnectionError"):
        ServerJudge("http://127.0.0.1:9/v1", "judge").better("What?", (b"jpeg",), "a", "b")


def test_the_key_does_not_travel_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for url in ("https://judge.example/v1", "http://127.0.0.1:8000/v1", "http://[::1]:8000/v1", "http://localhost/v1"):
        ServerJudge(url, "judge").check()
    with pytest.raises(UserError, match="without encryption"):
        ServerJudge("http://judge.example/v1", "judge").check()
    with pytest.raises(UserError, match="key in it"):
        ServerJudge("https://user:secret@judge.example/v1", "judge").check()
    with pytest.raises(UserError, match="not an address"):
        ServerJudge("judge.example", "judge").check()
    monkeypatch.delenv("OPENAI_API_KEY")
    ServerJudge("http://judge.example/v1", "judge").check()
    with pytest.raises(UserError, match="no answers to judge"):
        EvaluateOptions(judge=ServerJudge("http://judge.example/v1", "judge")).check()


def test_replies_are_read_by_their_last_verdict() -> None:
    for reply, verdict in {
        "B": "B", "Answer A is better, so: A": "A", "<think>A? B!</think>\ntie": "TIE", "I cannot say.": "TIE",
        "": "TIE", "**B**": "B", "b": "B", "Answer B is a better description.": "B", "<think>A, since": "TIE",
        "A better description is in B. A clear case.": "B", "A is better.": "A", "Neither is a good answer": "TIE",
    }.items():  # fmt: skip
        assert verdict_of(reply) == verdict, reply


def test_a_model_of_this_process_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees the question with both answers and as many images as the prompt has; a tiny one says nothing."""
    judge = LocalJudge(str(resolve("orpo-ray/tiny-smolvlm")))
    judge.check()
    asked: list[tuple[str, int]] = []
    answer_of = Answerer.answer

    def spy(self: Answerer, text: str, images: list[Image.Image], *more: Any) -> str:
        asked.append((text, len(images)))
        answer_of(self, text, images, *more)
        return "B" if "Answer A: worse" in text else "A"

    monkeypatch.setattr(Answerer, "answer", spy)
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "JPEG")
    generation = Generation(0, "0", "", "What colour?", "chosen", "rejected", "worse", "", images=(file.getvalue(),))
    found = judge_answers(judge, [generation], ["better"], "the base")
    assert found.verdicts == ["loss"]
    assert [count for _, count in asked] == [1, 1]
    assert "What colour?" in asked[0][0]
    assert "Answer B: better" in asked[0][0]
    assert asked[0][0].count("<image>") == 1


def test_a_question_that_the_model_cannot_take_is_an_error_of_its_row() -> None:
    judge = LocalJudge(str(resolve("orpo-ray/tiny-smolvlm")))
    with pytest.raises(RowError, match=r"refused_by_judge: .*unreadable_image"):
        judge.better("What?", (b"no image",), "a", "b")


def test_a_question_that_a_judge_refuses_ends_an_evaluation(
    serve: Callable[..., ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = serve(lambda first, second: 400)
    with pytest.raises(UserError, match=r"--judge: the judge cannot take the question about pair 7: status 400"):
        judge_answers(ServerJudge(server.url, "judge"), [answer(7, "a")], ["b"], "the base")


def test_a_judge_that_is_no_model_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--judge-model: the judge cannot be loaded: .*nothing-here"):
        LocalJudge(str(tmp_path / "nothing-here")).check()
