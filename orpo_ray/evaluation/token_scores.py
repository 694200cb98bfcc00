"""The log-prob of each token of both answers, for the held-out pairs that a report shows: `eval_tokens.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.packing import PairBatch
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_at
from orpo_ray.errors import UserError
from orpo_ray.evaluation.summary import MARGINS, common
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.storage.files import image_folder
from orpo_ray.storage.run_folder import EVAL_TOKENS_FILE, RunFolder

SHOWN = 6
"""Pairs of each kind in a report."""
Tokens = list[tuple[str, float]]
"""Text and log-prob of each token of an answer."""


def pairs_to_show(pairs: pa.Table, start: pa.Table | None) -> Iterator[dict[str, Any]]:
    """Yield the rows whose margins grew most and least since `start`, or without it the highest and the lowest margins.

    Each has `why`, and the margin before as `start`.
    """
    if MARGINS not in pairs.column_names:
        return
    if start is not None and MARGINS in start.column_names:
        pairs, before = common(pairs, start)
        change = pairs[MARGINS].to_numpy() - before[MARGINS].to_numpy()
        names = ("improved most", "improved least")
        start_margins = before[MARGINS].to_pylist()
    else:
        change, names = pairs[MARGINS].to_numpy(), ("clearest", "most wrong")
        start_margins = [None] * pairs.num_rows
    order = np.argsort(change)
    order = order[np.isfinite(change[order])]
    count = min(SHOWN, len(order) // 2)
    for name, places in ((names[0], order[::-1][:count]), (names[1], order[:count])):
        for place in places.tolist():
            (row,) = pairs.slice(place, 1).to_pylist()
            yield row | {"why": name, "start": start_margins[place]}


@torch.no_grad()
def score_tokens(
    model: PairModel,
    forward: Callable[[PairBatch], PairLogps],
    encoder: PairEncoder,
    planner: StepPlanner,
    held_out: ReadSpec,
    sample_indices: Sequence[int],
) -> dict[int, dict[str, Tokens]]:
    """Score the tokens of some pairs. Where weights are sharded, a collective, with the same pairs on all workers.

    Args:
        model: the model.
        forward: how to run it.
        encoder: encodes the pairs.
        planner: makes batches of them.
        held_out: the held-out rows.
        sample_indices: of the pairs.

    Returns:
        Sample index -> `chosen` and `rejected`. Nothing where workers compute each pair together.
    """
    if model.group is not None:
        return {}
    was_training = model.training
    model.eval()
    model.keeps_tokens = True
    found: dict[int, dict[str, Tokens]] = {}
    try:
        for index in sample_indices:
            shard, pair = pair_at(replace(held_out, other_image=None), index)
            if not isinstance(pair, PreferencePair):
                continue
            (encoded,) = encoder.encode_many([pair], [image_folder(held_out.root_of(shard))])
            if isinstance(encoded, EncodedPair):
                (batch,) = planner.plan(planner.share([encoded])).batches
                forward(batch.to(planner.device))
                found[index] = _tokens_of(model, batch, encoded, encoder.tokenizer)
    finally:
        model.keeps_tokens, model.token_logps = False, None
        model.train(was_training)
    return found


def write_tokens(folder: RunFolder, tokens: dict[int, dict[str, Tokens]], data: str) -> None:
    """Write the tokens to a run folder, with the digest of the data."""
    text = json.dumps({"data": data, "pairs": tokens}, ensure_ascii=False)
    (folder.path / EVAL_TOKENS_FILE).write_text(text, encoding="utf-8")
    folder.push(EVAL_TOKENS_FILE)


def read_tokens(folder: RunFolder) -> tuple[str, dict[int, dict[str, Tokens]]]:
    """Return the digest of the data, and sample index -> tokens; nothing if the file is not there.

    Raises:
        UserError: the file is damaged.
    """
    folder.pull(EVAL_TOKENS_FILE)
    path = folder.path / EVAL_TOKENS_FILE
    if not path.is_file():
        return "", {}
    try:
        raw = json.loads(path.read_text("utf-8"))
        return str(raw["data"]), {int(index): sides for index, sides in raw["pairs"].items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        fix = f"delete the file, or write it again: orpo-ray evaluate {folder.uri}"
        raise UserError("the file is damaged", field=f"{folder.uri}/{EVAL_TOKENS_FILE}", fix=fix) from None


def _tokens_of(model: PairModel, batch: PairBatch, pair: EncodedPair, tokenizer: Any) -> dict[str, Tokens]:
    assert model.token_logps is not None
    logps, response = model.token_logps.float().cpu(), batch.target_in_response.cpu()
    sums = batch.target_sum.cpu()
    sides = {
        "chosen": (batch.pairs.chosen[0], pair.chosen_ids),
        "rejected": (batch.pairs.rejected[0], pair.rejected_ids),
    }
    return {
        side: list(zip(pieces(ids.tolist(), tokenizer), logps[response & (sums == int(own))].tolist(), strict=True))
        for side, (own, ids) in sides.items()
    }


def pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """Return the text that each token adds; a character of several tokens belongs to the last of them."""
    found: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        text: str = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return found
