"""A server that speaks chat completions. `test_judge.py` has its errors, its retries and the way of the key."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.chat_server import ChatServer, image_part, sent_image
from support.chat_servers import serving
from support.synthesis import picture


def test_a_reply_has_its_text_and_whether_it_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: ("cut", "length") if body["max_tokens"] == 1 else "whole") as server:
        model = ChatServer(server.url, "m", "here")
        message = {"role": "user", "content": [image_part(b"\x89PNG"), {"type": "text", "text": "?"}]}
        replies = [model.reply([message], tokens, 0.5, seed=7) for tokens in (1, 2)]
    assert [(each.text, each.finished) for each in replies] == [("cut", False), ("whole", True)]
    sent = server.seen[0]
    assert (sent["model"], sent["temperature"], sent["max_tokens"], sent["seed"]) == ("m", 0.5, 1, 7)
    assert sent["messages"][0]["content"][0]["image_url"]["url"] == "data:image/png;base64,iVBORw=="


@pytest.mark.parametrize("status", [400, 413, 415, 422, 451])
def test_a_refused_request_has_the_reason_of_the_server(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: status) as server, pytest.raises(RowError) as refused:
        ChatServer(server.url, "m", "here", "judge").reply([], 1, 0.0)
    assert str(refused.value) == f"refused_by_judge: status {status}: 'no: {status}'"


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_meets_every_request_is_an_error_of_the_recipe(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: status) as server, pytest.raises(UserError, match=f"does not answer: status {status}"):
        ChatServer(server.url, "m", "here").reply([], 1, 0.0)


def test_images_are_sent_whole_and_in_a_format_that_every_server_decodes() -> None:
    for kind, sent in (("JPEG", "image/jpeg"), ("PNG", "image/png"), ("BMP", "image/png"), ("WEBP", "image/png")):
        file = sent_image({"bytes": picture("red", kind), "path": None})
        assert (file == picture("red", kind)) == (kind in ("JPEG", "PNG"))
        url = image_part(file)["image_url"]["url"]
        assert url.startswith(f"data:{sent};base64,")
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as opened:
            assert opened.size == (32, 32)
    with pytest.raises(RowError, match="unreadable_image"):
        sent_image({"bytes": b"no image", "path": None})
