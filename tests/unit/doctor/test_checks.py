"""How the doctor judges what nodes say. The real nodes are in tests/integration/test_doctor.py."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.doctor import checks
from orpo_ray.doctor.checks import Dashboard, Node
from orpo_ray.doctor.examine import checkpoint_bytes, lists_jobs_without_token, own_versions
from orpo_ray.doctor.meeting import with_free_gpu
from orpo_ray.doctor.probe import NodeProbe
from support.tiny_runs import tiny_recipe


def node(name: str = "a", skew: float = 0.0, resources: dict[str, float] | None = None, **facts: Any) -> Node:
    own = own_versions()
    versions = {key: value for key, value in own.items() if key != "orpo-ray"}
    known = {
        "orpo_ray": own["orpo-ray"],
        "versions": versions,
        "gpus": None,
        "torch_cuda": "13.0",
        "shared_memory": 1e12,
    }
    resources = {"CPU": 4.0, "object_store_memory": 1e9} | (resources or {})
    return Node(name, resources, known | facts, skew, node_id=f"id of {name}")


def test_a_probe_of_this_machine_says_what_this_process_has() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        facts = NodeProbe().facts(1)
        assert facts["listening"][listener.getsockname()[1]] == ["127.0.0.1"]
    own = own_versions()
    assert facts["orpo_ray"] == own.pop("orpo-ray")
    assert facts["versions"] == own
    assert facts["autoscaler"] is None
    import torch

    assert facts["torch_cuda"] == torch.version.cuda


def test_other_versions_and_a_node_without_the_package() -> None:
    own = own_versions()
    nodes = [node("a"), node("b", orpo_ray="0.0.1"), node("c", orpo_ray=None)]
    found = {each.check: each for each in checks.check_versions(nodes, own)}
    assert found["version of orpo-ray"].status == "fix"
    assert found["version of orpo-ray"].value == f"{own['orpo-ray']} here, 0.0.1 on b, missing on c"
    assert {each.status for name, each in found.items() if name != "version of orpo-ray"} == {"ok"}


def test_gpus_without_a_driver_and_two_drivers() -> None:
    gpu = {"name": "H200", "driver": "570.1", "memory": "141 GiB"}
    with_gpu = {"GPU": 1.0}
    good, blind = node("a", 0, with_gpu, gpus=[gpu]), node("b", 0, with_gpu)
    other = node("c", 0, with_gpu, gpus=[gpu | {"driver": "580.2"}])
    assert [each.status for each in checks.check_gpus([good])] == ["ok", "ok"]
    assert checks.check_gpus([good, blind])[0].value == "Ray has GPUs on b, and nvidia-smi shows none"
    assert checks.check_gpus([good, other])[1].value == "570.1 on a, 580.2 on c"


@pytest.mark.parametrize(
    ("cuda", "driver", "status", "said"),
    [
        ("13.0", "580.65.06", "ok", "13.0, for which the drivers are new enough"),
        ("13.0", "570.172.08", "fix", "CUDA 13.0 needs driver 580 or newer, and a has 570.172.08"),
        ("12.8", "525.60.13", "ok", "12.8, for which the drivers are new enough"),
        ("12.8", "520.61.05", "fix", "CUDA 12.8 needs driver 525 or newer, and a has 520.61.05"),
        ("14.1", "620.10", "warning", "not compared: CUDA 14.1 with driver 620.10 on a"),
        (None, "580.65.06", "fix", "torch is built without CUDA on a"),
    ],
)
def test_a_driver_that_is_too_old_for_the_cuda_of_torch(cuda: str | None, driver: str, status: str, said: str) -> None:
    gpu = {"name": "H200", "driver": driver, "memory": "141 GiB"}
    (found,) = checks.check_cuda([node("a", 0, {"GPU": 1.0}, gpus=[gpu], torch_cuda=cuda), node("b")])
    assert (found.status, found.value) == (status, said)
    assert (found.fix is None) == (status == "ok")
    assert not checks.check_cuda([node("b", torch_cuda=None)])  # no GPU


def test_nodes_whose_gpus_are_taken_do_not_meet_over_nccl() -> None:
    gpu = {"name": "H200", "driver": "580.2", "memory": "141 GiB"}
    nodes = [node(name, 0, {"GPU": 1.0}, gpus=[gpu]) for name in "abc"] + [node("d", 0, {"GPU": 1.0}), node("e")]
    free, taken = with_free_gpu(nodes, {"id of a": {"GPU": 1.0}, "id of b": {"GPU": 0.0}, "id of d": {"GPU": 1.0}})
    assert ([each.name for each in free], [each.name for each in taken]) == (["a"], ["b", "c"])
    found = checks.nccl_not_tried(taken)
    assert (found.status, found.value) == ("warning", "not tried with b, c, where no GPU is free")


def test_nodes_that_an_autoscaler_may_start_are_said_to_be_unchecked() -> None:
    (found,) = checks.check_pools([node()])
    assert (found.status, found.fix) == ("warning", "check again while a run holds nodes of these pools")
    assert found.value == "an autoscaler is active: 1 node(s) looked at; pools without nodes are not checked"


def test_clocks_stores_and_disks() -> None:
    assert checks.check_clocks([node(), node("b", 7.0)])[0].value == "+7.0 s on b"
    assert checks.check_clocks([node(), node("b", 1.0)])[0].status == "ok"
    store, shared = checks.check_object_stores([node(shared_memory=64 << 20)], None)
    assert (store.status, shared.status) == ("ok", "fix")
    assert checks.check_object_stores([node()], 10_000)[0].status == "fix"
    assert checks.check_disk("/runs", {"a": 10 << 30, "b": None}, 20 << 30)[0].status == "fix"
    assert checks.check_disk("/runs", {"a": 10 << 30}, 1 << 30)[0].status == "ok"


def test_a_storage_that_is_another_folder_on_each_node() -> None:
    (found,) = checks.check_storage("/runs", {"a": None, "b": None}, {"a": ["a"], "b": ["b"]})
    assert found.value == "/runs is another folder on each node: a does not see the files of b"


def test_who_can_reach_the_dashboard() -> None:
    def statuses(listens_on: list[str], is_open: bool | None) -> list[str]:
        return [each.status for each in checks.check_dashboard(Dashboard("x:1", listens_on, is_open))]

    assert statuses(["127.0.0.1"], False) == ["ok", "ok"]
    assert statuses(["127.0.0.1"], True) == ["ok", "warning"]
    assert statuses(["0.0.0.0"], True) == ["fix", "fix"]
    assert statuses(["10.0.0.1"], False) == ["warning", "ok"]


def test_a_dashboard_that_could_not_be_looked_at_or_asked_is_not_called_fine() -> None:
    address, token = checks.check_dashboard(Dashboard("10.0.0.1:8265", [], None))
    assert (address.status, token.status) == ("warning", "warning")
    assert address.value == "10.0.0.1:8265; the head node does not show on which addresses it listens"
    assert token.value == "not checked: the dashboard at 10.0.0.1:8265 does not answer here"
    assert checks.check_dashboard(Dashboard("10.0.0.1:8265", [], True))[1].status == "fix"


def test_in_a_pod_the_dashboard_is_guarded_by_a_network_policy() -> None:
    address, _ = checks.check_dashboard(Dashboard("10.0.0.1:8265", ["0.0.0.0"], False, in_pod=True))
    assert address.status == "warning"
    assert "network policy" in str(address.fix)
    assert "127.0.0.1" not in str(address.fix)


@pytest.mark.parametrize(("answer", "is_open"), [((200, "[]"), True), ((401, ""), False), ((403, ""), False),
                                                 ((500, ""), None), ((200, "<html>"), None), (None, None)])  # fmt: skip
def test_whether_the_dashboard_asks_for_a_token(answer: tuple[int, str] | None, is_open: bool | None) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert answer is not None
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1].encode())

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        address = f"127.0.0.1:{server.server_port}"
        if answer is None:
            server.server_close()  # nothing listens there any longer
            assert lists_jobs_without_token(address) is None
            return
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert lists_jobs_without_token(address) is is_open
        thread.join()


def test_a_torch_that_cannot_be_imported_and_nodes_that_cannot_meet() -> None:
    (torch,) = checks.check_torch({"b": "libcudart.so.12: cannot open shared object file"})
    assert torch.value == "cannot be imported: b: libcudart.so.12: cannot open shared object file"
    (gloo,) = checks.check_meeting("gloo", {"a": None, "b": "connection refused"})
    assert (gloo.status, gloo.value) == ("fix", "b: connection refused")
    assert checks.check_meeting("NCCL", {"a": None, "b": None})[0].status == "ok"


@pytest.mark.parametrize(
    ("stage", "optimizer", "per_weight"),
    [(0, "adamw", 12), (1, "adamw", 14), (2, "adamw", 14), (3, "adamw", 12), (2, "adamw_8bit", 8)],
)
def test_the_room_for_a_checkpoint_by_zero_stage(tmp_path: Path, stage: int, optimizer: str, per_weight: int) -> None:
    recipe = tiny_recipe(tmp_path, "sized", deepspeed={"zero_stage": stage}, optim={"optimizer": optimizer})
    assert checkpoint_bytes(recipe) == per_weight * 1_388_544
