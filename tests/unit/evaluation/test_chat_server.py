"""A server that speaks chat completions. `test_judge.py` has its errors, its retries and the way of the key."""

from __future__ import annotations

import pytest

from orpo_ray.evaluation.chat_server import ChatServer, image_part
from support.chat_servers import serving


def test_a_reply_has_its_text_and_whether_it_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: ("cut", "length") if body["max_tokens"] == 1 else "whole") as server:
        model = ChatServer(server.url, "m", "here")
        message = {"role": "user", "content": [image_part(b"x", "image/png"), {"type": "text", "text": "?"}]}
        replies = [model.reply([message], tokens, 0.5, seed=7) for tokens in (1, 2)]
    assert [(each.text, each.finished) for each in replies] == [("cut", False), ("whole", True)]
    sent = server.seen[0]
    assert (sent["model"], sent["temperature"], sent["max_tokens"], sent["seed"]) == ("m", 0.5, 1, 7)
    assert sent["messages"][0]["content"][0]["image_url"]["url"] == "data:image/png;base64,eA=="
