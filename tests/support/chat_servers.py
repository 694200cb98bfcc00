"""A server on loopback that speaks OpenAI's chat completions, for judges and for candidates."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reply = str | int | tuple[str, str]


class ChatServer(ThreadingHTTPServer):
    """Replies by a function of the request; `statuses` come first. It gives a text, (text, end) or a status."""

    def __init__(self, reply: Callable[[Body], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.statuses, self.seen = reply, list[int](), list[Body]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        found = self.server.reply(body) if status == 200 else status
        status, found = (found, "") if isinstance(found, int) else (200, found)
        text, reason = (found, "stop") if isinstance(found, str) else found
        reply = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
        data = json.dumps(reply if status == 200 else {"error": {"message": f"no: {status}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(reply: Callable[[Body], Reply]) -> Iterator[ChatServer]:
    """Serve in a thread."""
    server = ChatServer(reply)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def text_of(body: Body) -> str:
    """The last text of a request."""
    text: str = body["messages"][-1]["content"][-1]["text"]
    return text


def answers_of(body: Body) -> tuple[str, str]:
    """The two answers that a judge is asked about."""
    first, _, second = text_of(body).partition("Answer A: ")[2].partition("\n\nAnswer B: ")
    return first, second.partition("\n\nReply with")[0]
