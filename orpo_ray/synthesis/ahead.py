"""Draw the answers of all missing parts ahead, by a pipeline of Ray Data, for engines that are costly to start.

A request is a row of a dataset: part, of (answers of the part), key, prompt (rendered), tokens (of it), images (bytes),
temperature, seed. The pipeline returns an answer for each, in any order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data

from orpo_ray.evaluation.draws import Drawn
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.streaming.pipeline import own_errors, quiet
from orpo_ray.synthesis.engines.drafts import DRAFTS, DraftsIncomplete, drafts_file, write_drafts
from orpo_ray.synthesis.engines.vllm_engine import Processor
from orpo_ray.synthesis.part import Job, PartMaker

READ_CPUS = 0.5


class _RequestMaker:
    """Makes the requests of parts in a process of its own."""

    def __init__(self, job: Job) -> None:
        self._maker = PartMaker(job)

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        return self._maker.requests(row["part"])


def draw_ahead(folder: RunFolder, job: Job, parts: Sequence[int], processor: Processor) -> None:
    """Draw the answers of parts that have no file of answers, and write a file for each as soon as it is complete.

    Args:
        folder: the run folder.
        job: what the parts are made of.
        parts: their numbers.
        processor: requests -> rows of part, of, key, text, finished.

    Raises:
        DraftsIncomplete: the pipeline ended without some answers.
    """
    missing = [part for part in parts if not folder.has(drafts_file(part))]
    if not missing:
        return
    dataset = ray.data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing)).flat_map(
        _RequestMaker, fn_constructor_args=(job,), num_cpus=READ_CPUS, compute=ray.data.ActorPoolStrategy(size=1)
    )
    waiting: dict[int, dict[str, Drawn]] = defaultdict(dict)
    done: set[int] = set()
    with own_errors():
        for row in _rows(processor(dataset)):
            answers = waiting[row["part"]]
            answers[row["key"]] = Drawn(row["text"], row["finished"])
            if len(answers) == row["of"]:
                write_drafts(folder, row["part"], waiting.pop(row["part"]))
                done.add(row["part"])
    if waiting:
        raise DraftsIncomplete(
            f"some answers of part(s) {sorted(waiting)} did not come\n"
            f"  fix: run the same command again; complete parts are kept in {folder.uri}/{DRAFTS}"
        )
    for part in set(missing) - done:  # no row of it can be asked
        write_drafts(folder, part, {})


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    quiet(dataset, ordered=False)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from batch.to_pylist()
