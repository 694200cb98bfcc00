"""Whether a node answers, asked of real sockets."""

from __future__ import annotations

import socket

from orpo_ray.training.elastic import answers


def test_a_node_answers_while_something_listens_on_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, port = server.getsockname()
        assert answers(address, port)
    assert not answers(address, port)
