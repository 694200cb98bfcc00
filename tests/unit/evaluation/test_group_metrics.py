"""Metrics of each language and each domain, worked by hand."""

from __future__ import annotations

import pyarrow as pa
import pytest

from orpo_ray.evaluation.group_metrics import MOST_GROUPS, group_metrics, most_common
from orpo_ray.evaluation.pair_scores import join_workers
from orpo_ray.evaluation.summary import summarize
from support.planted_scores import planted


def table(languages: list[str | None], **columns: list[object]) -> pa.Table:
    count = len(languages)
    base = {"sample_index": list(range(count)), "correct": [True] * count, "rewards/margins": [0.5] * count}
    return pa.table(base | {"language": languages, "domain": pa.array([None] * count, pa.string())} | columns)


def test_accuracy_margin_and_gap_of_each_language() -> None:
    pairs = table(
        ["ar", "ja", "ar", "ja", None],
        correct=[True, False, False, True, True],
        **{"rewards/margins": [1.0, -1.0, -2.0, 3.0, 9.0], "exchanged/correct": [False, None, False, True, False]},
    )
    assert group_metrics(pairs) == pytest.approx(
        {
            "pairs/language/ar": 2, "rewards/accuracies/language/ar": 0.5, "rewards/margins/language/ar": -0.5,
            "grounding_gap/language/ar": 0.5,
            "pairs/language/ja": 2, "rewards/accuracies/language/ja": 0.5, "rewards/margins/language/ja": 1.0,
            "grounding_gap/language/ja": 0.0,
        }
    )  # fmt: skip


def test_a_single_language_and_tables_without_languages_add_nothing() -> None:
    assert group_metrics(table(["ar", None, "ar"])) == {}
    assert group_metrics(planted(20, accuracy=0.5)) == {}


def test_languages_and_domains_are_told_apart_and_names_are_plain() -> None:
    pairs = table(["a/b", "c"], domain=["c", "x:y\n"])
    found = {name.removeprefix("pairs/") for name in group_metrics(pairs) if name.startswith("pairs/")}
    assert found == {"language/a_b", "language/c", "domain/c", "domain/x_y_"}


def test_there_are_boundedly_many() -> None:
    pairs = table([f"l{place // 2:02}" for place in range(100)] + ["l00"])
    found = [name for name in group_metrics(pairs) if name.startswith("pairs/")]
    assert len(found) == MOST_GROUPS
    assert group_metrics(pairs)["pairs/language/other"] == 101 - 2 * (MOST_GROUPS - 1) - 1
    assert most_common(["a", "b", "b", "c", None], 2) == ["other", "b", "b", "other", None]


def test_summaries_have_languages_and_domains_by_default() -> None:
    pairs = planted(60, accuracy=0.8, exchanged=0.5)
    pairs = pairs.append_column("language", pa.array([("ar", "ja", None)[place % 3] for place in range(60)]))
    pairs = pairs.append_column("domain", pa.array([None] * 60, pa.string()))
    summary = summarize(pairs)
    assert [(group.name, group.accuracy.pairs) for group in summary.breakdowns["language"]] == [
        ("(none)", 20), ("ar", 20), ("ja", 20),
    ]  # fmt: skip
    assert "domain" not in summary.breakdowns
    assert "language" not in summary.figures


def test_workers_without_a_language_join_those_with_one() -> None:
    rows = [{"sample_index": place, "language": None, "domain": None} for place in range(3)]
    alone = join_workers([rows])
    assert alone.schema.field("language").type == pa.string()
    both = join_workers([rows, [{"sample_index": 3, "language": "ar", "domain": None}]])
    assert both["language"].to_pylist() == [None, None, None, "ar"]
