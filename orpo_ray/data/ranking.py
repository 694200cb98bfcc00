"""Rows with several rated answers: which of the answers form pairs (`data.pairs_from_ranking`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import pyarrow as pa

from orpo_ray.config.field_types import PairsFromRanking
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.pairs import Ranking, check_answers, check_texts
from orpo_ray.data.row_values import read_answer, read_records
from orpo_ray.errors import RowError, preview

Rated = list[tuple[float, Any]]
"""Score and answer; a higher score is better."""
RANKING_TYPE = pa.struct(
    [("answers", pa.list_(pa.string())), ("better", pa.list_(pa.int32())), ("worse", pa.list_(pa.int32()))]
)


def rank_answers(rated: Rated, kind: PairsFromRanking) -> Ranking | None:
    """Form pairs of the answers of a row, of which at least two have different scores. Equal scores form none.

    Args:
        rated: the answers.
        kind: `all` pairs, or those of the best answer with each worse one (`best_rest`).

    Returns:
        The pairs, the best answer's first; None for `best_worst`, which is the row's own pair.

    Raises:
        RowError: an answer is no text.
    """
    if kind == "best_worst":
        return None
    scores = [score for score, _ in rated]
    order = sorted(range(len(rated)), key=lambda place: -scores[place])
    pairs = [
        (better, worse)
        for better, worse in combinations(order, 2)
        if scores[better] > scores[worse] and (kind == "all" or better == order[0])
    ]
    answers = [read_answer(answer, "an answer") for _, answer in rated]
    check_texts(answers)
    return Ranking(answers, [better for better, _ in pairs], [worse for _, worse in pairs])


def split_ranking(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row of `reading.SCHEMA` for each pair of its ranking, maybe a bad row; the row itself without a ranking.

    Ids are those of the row with the places of both answers, from 1: `ROW#1-3`. The rows hold the same objects, so that
    what they share is encoded once.
    """
    ranking = row["ranking"]
    if ranking is None:
        yield dict(row)
        return
    for better, worse in zip(ranking["better"], ranking["worse"], strict=True):
        chosen, rejected = ranking["answers"][better], ranking["answers"][worse]
        pair = {**row, "id": f"{row['id']}#{better + 1}-{worse + 1}", "ranking": None}
        if chosen != row["chosen"] and (row["other"] or {}).get("images") is not None:
            # The images of another row were chosen for the best answer of this one. Another one may be right there.
            pair["other"] = None
        try:
            check_answers(chosen, rejected)
            yield pair | {"chosen": chosen, "rejected": rejected}
        except RowError as error:
            bad = BadRow.of(error, pair["sample_index"], pair["id"], pair["source"])
            yield pair | {"bad": asdict(replace(bad, language=row["language"], domain=row["domain"]))}


def best_and_worst(rated: Rated) -> tuple[Any, Any]:
    """Return the answers with the highest and with the lowest score; of equal scores, the first."""
    if len(rated) < 2:
        raise RowError("no_preference", f"a pair needs two rated answers, found {len(rated)}")
    best, worst = max(rated, key=lambda item: item[0]), min(rated, key=lambda item: item[0])
    if best[0] == worst[0]:
        raise RowError("no_preference", f"all {len(rated)} answers have the same rating")
    return best[1], worst[1]


def rated_in_vlfeedback(row: Mapping[str, Any]) -> Rated:
    """Read the answers of a row of VLFeedback that have ratings, with the mean of these."""
    rated: Rated = []
    for completion in read_records(row.get("completions"), "completions"):
        if not isinstance(completion, Mapping):
            raise RowError("malformed_row", f"a completion must be a mapping, found {preview(completion)}")
        mean = _mean_rating(completion.get("annotations"))
        if mean is not None and completion.get("response") not in (None, ""):
            rated.append((mean, completion["response"]))
    return rated


def rated_in_nemo_rl(row: Mapping[str, Any]) -> Rated:
    """Read the answers of a row of NeMo-RL; a lower rank is better."""
    rated: Rated = []
    for completion in read_records(row.get("completions"), "completions"):
        rank = completion.get("rank") if isinstance(completion, Mapping) else None
        if isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank:  # NaN
            raise RowError("malformed_row", f"the rank of a completion must be a number, found {preview(completion)}")
        rated.append((-rank, completion.get("completion")))
    return rated


def _mean_rating(annotations: Any) -> float | None:
    """Average the numeric ratings over all aspects; None if there are none."""
    if annotations is None:
        return None
    if not isinstance(annotations, Mapping):
        raise RowError("malformed_row", f"annotations must be a mapping of aspects, found {preview(annotations)}")
    ratings = []
    for aspect in annotations.values():
        rating = aspect.get("Rating") if isinstance(aspect, Mapping) else aspect
        try:
            ratings.append(float(rating))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):  # "N/A", missing, or too large for a float
            continue
    ratings = [rating for rating in ratings if math.isfinite(rating)]
    return sum(ratings) / len(ratings) if ratings else None
