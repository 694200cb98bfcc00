"""Workers for the tests of rows that several workers compute together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.data.packing import build_batch
from orpo_ray.errors import UserError
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.objective.pair_model import ImageNotUsed
from support.counting import Counter
from support.device_waits import reads_of_values
from support.engines_by_hand import CPU, two_pairs
from support.pairs_by_hand import make_row, run, run_as, tiny_pair_model
from support.tiny_runs import tiny_recipe
from support.trees_by_hand import all_kinds
from support.worker_alone import make_worker, train_step

# Images, and tokens of prompt, chosen and rejected answer, of each pair. The second row has no image, and fewer targets
# than some groups have workers. A third row has pairs of every kind, some of them in trees.
ROWS = [[(1, 5, 7, 4), (2, 6, 3, 9)], [(0, 4, 1, 1)]]


def in_group(rank: int, size: int, family: str, lora: bool, checkpointing: Checkpointing) -> list[Any]:
    """Return log-probs, loss and gradients of each row, the gradients added up over all workers."""
    found = []
    for pairs in (*(make_row(family, row) for row in ROWS), all_kinds(family)):
        torch.manual_seed(0)  # adapters begin at random
        model = tiny_pair_model(family, lora, checkpointing)
        model.group = SequenceGroup.join(size, 60.0) if size > 1 else None
        logps, loss, gradients = run(model, pairs, "shared_prefix", "prompt+response", shares=model.family.shares)
        if size > 1:
            trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
            gradients = {name: gradients.get(name, torch.zeros_like(weight)) for name, weight in trained}
            for gradient in gradients.values():
                dist.all_reduce(gradient)
        values = SimpleNamespace(**{name: value.detach() for name, value in vars(logps).items() if value is not None})
        found.append((values, loss, {name: each for name, each in gradients.items() if each.any()}))
    return found


def attended(rank: int, size: int, keys: int, tokens: int) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Attention of a group over a row with `keys` key heads and 4 query heads: this worker's part of the result, and of
    the gradients of queries, keys and values; and the bytes that it hands to all-to-alls in the forward pass."""
    group = SequenceGroup.join(size, 60.0)
    own = [group.own(states, 2).detach().requires_grad_() for states in states_of(keys, tokens)]
    with Counter() as counter:
        out = group.attend(plain_attention, *own, tokens)
    # What goes in and what comes out has the same size.
    exchanged = sum(call.bytes for call in counter.collectives if call.name == "alltoall_base_") // 2
    (out * group.own(torch.arange(tokens * 4 * 8).view(1, tokens, 4, 8).float().sin(), 1)).sum().backward()
    return out.detach(), [each.grad for each in own if each.grad is not None], exchanged


def step_reads(rank: int, size: int, storage: str) -> tuple[list[str], float]:
    """What a step of the training program reads from the device, and its loss, if all workers form one group."""
    scaling = {"num_workers": size, "sequence_parallel": size}
    worker = make_worker(tiny_recipe(Path(storage), f"w{size}", scaling=scaling), CPU, rank, size)
    plans = [worker._prepared(worker.planner.share(two_pairs(), step=step)) for step in range(2)]
    train_step(worker, plans[0])  # also checks that images are used
    with reads_of_values() as found:
        metrics = train_step(worker, plans[1])
    return found, metrics["loss"]


def check_images(rank: int, size: int, gradients: int) -> bool:
    """Whether a group says that its bfloat16 model uses images, if only the first workers have a gradient of them."""
    model = tiny_pair_model("smolvlm")
    run_as(model, "shared_prefix")
    model.to(torch.bfloat16).watch_images = True
    logps = model(build_batch(make_row("smolvlm", ROWS[0]), "response", "shared_prefix", collate=model.family.collate))
    if rank < gradients:
        logps.chosen.sum().backward()
    model.group = SequenceGroup.join(size, 60.0)
    try:
        model.check_images_used()
    except ImageNotUsed:
        return False
    return True


def joined_by_two(rank: int, size: int) -> str:
    """What is said if these workers cannot form groups of two."""
    try:
        SequenceGroup.join(2, 60.0)
    except UserError as error:
        return str(error)
    return ""


def states_of(keys: int, tokens: int) -> list[torch.Tensor]:
    """Queries [1, 4, T, 8], keys and values [1, keys, T, 8]."""
    random = torch.Generator().manual_seed(keys)
    return [torch.randn(1, heads, tokens, 8, generator=random) for heads in (4, keys, keys)]


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention, [1, T, H, D]."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)
