"""Candidates from a server on loopback."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest

from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.draws import Draw, Drawn
from orpo_ray.synthesis.engines.server_engine import ServerEngine, chat_messages
from support.chat_servers import serving
from support.synthesis import picture, row_of
from support.tiny_runs import tiny_recipe


def engine(tmp_path: Path, url: str) -> ServerEngine:
    section = {"engine": "server", "server": {"url": url, "model": "m", "concurrency": 3}, "max_new_tokens": 9}
    return ServerEngine(tiny_recipe(tmp_path, "x", synthesize=section).synthesize)


def test_answers_come_in_the_order_of_rows_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows = [row_of(0), row_of(1, question="And this?")]
    broken = replace(row_of(2), images=[{"bytes": b"no image", "path": None}])
    draws = [[Draw(0.5, 7), Draw(1.0, 8)], [Draw(0.0, 9)]]
    with serving(lambda body: (f" {body['seed']} ", "length" if body["seed"] == 8 else "stop")) as server:
        asked = engine(tmp_path, server.url)
        asked.check()
        found = asked.answers([*rows, broken], [*draws, draws[0]])
    assert found[:2] == [[Drawn("7", True), Drawn("8", False)], [Drawn("9", True)]]
    assert isinstance(found[2], RowError)
    assert found[2].reason == "unreadable_image"
    bodies = {body["seed"]: body for body in server.seen}
    assert (bodies[7]["temperature"], bodies[7]["max_tokens"], bodies[7]["model"]) == (0.5, 9, "m")
    image, text = bodies[9]["messages"][0]["content"]
    assert text == {"type": "text", "text": "And this?"}
    assert base64.b64decode(image["image_url"]["url"].partition(",")[2]) == picture("green")


def test_an_image_that_servers_do_not_decode_is_sent_as_png() -> None:
    for kind, sent in (("JPEG", "image/jpeg"), ("PNG", "image/png"), ("BMP", "image/png")):
        row = replace(row_of(0), images=[{"bytes": picture("red", kind), "path": None}])
        url = chat_messages(row)[0]["content"][0]["image_url"]["url"]
        assert url.startswith(f"data:{sent};base64,")
        same = base64.b64decode(url.partition(",")[2]) == row.images[0]["bytes"]
        assert same == (kind != "BMP")


def test_a_server_that_does_not_answer_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: "x") as server:
        server.statuses = [401] * 9
        with pytest.raises(UserError, match=r"synthesize\.server\.url: the server does not answer: status 401"):
            engine(tmp_path, server.url).answers([row_of(0)] * 5, [[Draw(0.0, 1)]] * 5)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with pytest.raises(UserError, match="without encryption"):
        engine(tmp_path, "http://elsewhere.example/v1").check()


def test_a_refused_request_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses one row, of five, and of another row one draw."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows, draws = (
        [row_of(number) for number in range(5)],
        [[Draw(0.5, 10 * n), Draw(0.5, 10 * n + 1)] for n in range(5)],
    )

    def reply(body: dict) -> str | int:
        return 413 if body["seed"] in (10, 11) else 400 if body["seed"] == 31 else "yes"

    with serving(reply) as server:
        found = engine(tmp_path, server.url).answers(rows, draws)
    refused = {place: str(each) for place, each in enumerate(found) if isinstance(each, RowError)}
    assert refused == {
        1: "refused_by_server: status 413: 'no: 413'", 3: "refused_by_server: status 400: 'no: 400'",
    }  # fmt: skip
    assert found[0] == found[2] == found[4] == [Drawn("yes", True)] * 2


def test_a_server_that_refuses_all_rows_of_a_part_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a temperature or a model that the server does not know. A few rows at the end of a set may be refused."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    draws = [Draw(0.5, 1), Draw(1.0, 2)]
    broken = replace(row_of(0), images=[{"bytes": b"no image", "path": None}])
    with serving(lambda body: 400 if body["seed"] == 2 else "x") as server:
        asked = engine(tmp_path, server.url)
        with pytest.raises(
            UserError, match=r"server\.url: the server refuses all 4 rows of a part.*status 400: .*no: 400"
        ):
            asked.answers([broken, *(row_of(number) for number in range(4))], [draws] * 5)
        few = asked.answers([row_of(number) for number in range(3)], [draws] * 3)
    assert all(isinstance(each, RowError) for each in few)
