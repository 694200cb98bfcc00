"""How the doctor judges what nodes say. The real nodes are in tests/integration/test_doctor.py."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.doctor import checks
from orpo_ray.doctor.checks import Dashboard, Node
from orpo_ray.doctor.examine import checkpoint_bytes, own_versions
from orpo_ray.doctor.probe import NodeProbe
from support.tiny_runs import tiny_recipe


def node(name: str = "a", skew: float = 0.0, resources: dict[str, float] | None = None, **facts: Any) -> Node:
    own = own_versions()
    versions = {key: value for key, value in own.items() if key != "orpo-ray"}
    known = {"orpo_ray": own["orpo-ray"], "versions": versions, "gpus": None, "shared_memory": 1e12}
    return Node(name, {"CPU": 4.0, "object_store_memory": 1e9} | (resources or {}), known | facts, skew)


def test_a_probe_of_this_machine_says_what_this_process_has() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        facts = NodeProbe().facts()
        assert facts["listening"][listener.getsockname()[1]] == ["127.0.0.1"]
    own = own_versions()
    assert facts["orpo_ray"] == own.pop("orpo-ray")
    assert facts["versions"] == own


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
    def statuses(listens_on: list[str], is_open: bool) -> list[str]:
        return [each.status for each in checks.check_dashboard(Dashboard("x:1", listens_on, is_open))]

    assert statuses(["127.0.0.1"], False) == ["ok", "ok"]
    assert statuses(["127.0.0.1"], True) == ["ok", "warning"]
    assert statuses(["0.0.0.0"], True) == ["fix", "fix"]
    assert statuses(["10.0.0.1"], False) == ["warning", "ok"]


def test_a_torch_that_cannot_be_imported_and_nodes_that_cannot_meet() -> None:
    (torch,) = checks.check_torch({"b": "libcudart.so.12: cannot open shared object file"})
    assert torch.value == "cannot be imported: b: libcudart.so.12: cannot open shared object file"
    (gloo,) = checks.check_gloo({"a": None, "b": "connection refused"})
    assert (gloo.status, gloo.value) == ("fix", "b: connection refused")
    assert checks.check_gloo({"a": None, "b": None})[0].status == "ok"


@pytest.mark.parametrize(
    ("stage", "optimizer", "per_weight"),
    [(0, "adamw", 12), (1, "adamw", 14), (2, "adamw", 14), (3, "adamw", 12), (2, "adamw_8bit", 8)],
)
def test_the_room_for_a_checkpoint_by_zero_stage(tmp_path: Path, stage: int, optimizer: str, per_weight: int) -> None:
    recipe = tiny_recipe(tmp_path, "sized", deepspeed={"zero_stage": stage}, optim={"optimizer": optimizer})
    assert checkpoint_bytes(recipe) == per_weight * 1_388_544
