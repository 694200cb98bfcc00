"""A worker's shares of the steps, from the feed of its run.

All workers share one feed in an actor on the node of rank 0: each row is read and encoded once, and Ray Data runs in
none of the training processes, where its threads would compete with training for the interpreter lock. An evaluation in
one process has the feed in that process, which saves the start of another one for each pass over the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orpo_ray.data.balance import Packing, StepShare
from orpo_ray.data.encoded_columns import from_arrow
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.reading import ReadSpec
from orpo_ray.streaming.feed import Portion, StepFeed
from orpo_ray.streaming.pipeline import own_errors, rows_of_blocks

Take = Callable[[int, Packing], Portion]
"""Step, and how to pack it -> this worker's portion of it."""


def from_rank_zero_of_ray_train(own: Any) -> Any:
    """Give every worker of a Ray Train run what rank 0 has. A collective."""
    from ray.train.collective import broadcast_from_rank_zero

    return broadcast_from_rank_zero(own)


def open_feed(
    read: ReadSpec,
    encoder: EncoderSpec,
    max_encoders: int,
    rank: int = 0,
    num_workers: int = 1,
    together: int = 1,
    in_process: bool = False,
    from_rank_zero: Callable[[Any], Any] = from_rank_zero_of_ray_train,
) -> Take:
    """Start to read and encode for all workers of a run. A collective if there are several.

    Args:
        read: which rows; its `first_sample` is the first of a step.
        encoder: how pairs are encoded.
        max_encoders: encoding tasks at a time, for all workers together.
        rank: this worker.
        num_workers: workers, each of which must take every step once.
        together: workers, of consecutive ranks, that take the same pairs.
        in_process: whether a worker that is alone reads in its own process.
        from_rank_zero: gives every worker what rank 0 has.
    """
    if num_workers == 1 and in_process:
        return partial(StepFeed(read, encoder, 1, max_encoders).take, 0)
    # Rank 0 keeps its own handle: the actor ends with that or with the process. A restarted run starts another actor.
    own = feed_actor(read, encoder, num_workers, max_encoders, together) if rank == 0 else None
    shared = from_rank_zero(own) if num_workers > 1 else own
    return partial(take_from, shared if own is None else own, rank)


def iter_shares(take: Take, packing: Packing, first_step: int, num_steps: int) -> Iterator[StepShare]:
    """Yield a worker's shares of steps first_step to num_steps - 1."""
    for step in range(first_step, num_steps):
        yield _share(take(step, packing))  # nothing of it stays here while the step trains


def _share(portion: Portion) -> StepShare:
    """Fetch a portion's pairs. Their arrays are views of the object store."""
    tables: list[Any] = ray.get(portion.blocks)
    blocks = [from_arrow(rows) for table in tables for rows in rows_of_blocks(table)]
    microbatches = [[blocks[block][place] for block, place in each] for each in portion.places]
    return StepShare(portion.step, portion.totals, microbatches, portion.bad)


def feed_actor(read: ReadSpec, encoder: EncoderSpec, num_workers: int, max_encoders: int, together: int = 1) -> Any:
    """Start the feed of several workers, on this node; see `StepFeed`."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # A call waits until a step is encoded, and must not hold up workers that ask for an earlier one.
    actor = ray.remote(num_cpus=0, max_concurrency=num_workers)(StepFeed)
    return actor.options(scheduling_strategy=here).remote(read, encoder, num_workers, max_encoders, together)


def take_from(actor: Any, rank: int, step: int, packing: Packing) -> Portion:
    """Take a worker's portion of a step from an actor. An error of the user arrives as in the actor's process."""
    with own_errors():
        found: Portion = ray.get(actor.take.remote(rank, step, packing))
    return found
