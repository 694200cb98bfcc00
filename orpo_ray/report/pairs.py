"""The held-out pairs that a report shows: those that improved most and least, or the clearest and the worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_at
from orpo_ray.errors import OrpoRayError
from orpo_ray.evaluation.pair_scores import CORRECT, facts_of_table
from orpo_ray.evaluation.summary import MARGINS
from orpo_ray.evaluation.token_scores import Tokens, pairs_to_show
from orpo_ray.pages.thumbnails import thumbnail
from orpo_ray.report.run_data import RunData

# Log-probs below which the shading of a token becomes stronger: probabilities of 50, 14 and 2 %.
SHADES = (-0.7, -2.0, -4.0)


def shown_pairs(run: RunData) -> tuple[list[dict[str, Any]], str | None]:
    """Choose pairs and read their texts and images.

    Returns:
        The pairs as the page's template takes them, and why there are none or only a part of them; None if all is well.
    """
    if run.pairs is None or MARGINS not in run.pairs.column_names:
        return [], "The run kept no scores of single pairs. orpo-ray evaluate RUN writes them."
    rows = list(pairs_to_show(run.pairs, run.start_pairs))
    try:
        read = held_out_data(run.recipe)
    except (OrpoRayError, OSError) as error:
        return [], f"The held-out data cannot be read any longer: {error}"
    if read is None or read.digest != facts_of_table(run.pairs).get("data"):
        return [], "The held-out data has changed since the pairs were scored."
    digest, tokens = run.tokens
    if digest != read.digest:
        tokens = {}
    return [entry for row in rows if (entry := _entry(run, read, row, tokens)) is not None], None


def _entry(
    run: RunData, read: ReadSpec, row: dict[str, Any], tokens: Mapping[int, Mapping[str, Tokens]]
) -> dict[str, Any] | None:
    """Return a pair for the page's template; None if its row cannot be read."""
    shard, pair = pair_at(read, row["sample_index"])
    if not isinstance(pair, PreferencePair):
        return None
    root, allow_http = read.root_of(shard), run.recipe.data.allow_http
    logps = {side: row.get(f"logps/{side}") for side in ("chosen", "rejected")}
    return {
        "id": pair.id,
        "source": pair.source,
        "why": row["why"],
        "kinds": ["right" if row[CORRECT] else "wrong"],
        "images": [thumbnail(image, root, allow_http) for image in pair.images],
        "rejected_images": [thumbnail(image, root, allow_http) for image in pair.rejected_images or ()],
        "prompt": [
            {"role": turn["role"], "text": "\n".join(p["text"] for p in turn["content"] if p["type"] == "text")}
            for turn in pair.prompt
        ],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "pieces": {side: _shaded(found) for side, found in tokens.get(row["sample_index"], {}).items()},
        "tokens": {"chosen": row["chosen_tokens"], "rejected": row["rejected_tokens"]},
        "logps": logps,
        "margin": row[MARGINS],
        "start": row["start"],
        "exchanged": row.get(f"exchanged/{MARGINS}"),
    }


def _shaded(tokens: Tokens) -> list[tuple[str, int, str]]:
    """Return the text of each token, how strong its shading is (0 to 3), and its log-prob as text."""
    return [(text, sum(logp < shade for shade in SHADES), f"{logp:.2f}") for text, logp in tokens if text]
