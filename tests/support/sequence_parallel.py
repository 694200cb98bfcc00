"""Workers for the tests of rows that several workers compute together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.errors import UserError
from orpo_ray.model.sequence_group import SequenceGroup
from support.counting import Counter
from support.pairs_by_hand import make_row, run, tiny_pair_model
from support.trees_by_hand import all_kinds

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
