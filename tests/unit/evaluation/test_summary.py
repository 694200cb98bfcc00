"""What is said about scores: verdicts, groups and comparisons, on planted scores."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.reading import pair_at
from orpo_ray.errors import UserError
from orpo_ray.evaluation.categories import column_values
from orpo_ray.evaluation.evaluate_run import Evaluation
from orpo_ray.evaluation.pair_scores import (
    facts_of_table,
    join_pass,
    join_workers,
    read_pair_scores,
    write_pair_scores,
)
from orpo_ray.evaluation.statistics import mean_estimate
from orpo_ray.evaluation.summary import Summary, doubt_between, summarize
from orpo_ray.evaluation.table import print_evaluation
from orpo_ray.storage.run_folder import RunFolder
from support.planted_scores import planted
from support.sources import spec_of


def levels(summary: Summary) -> list[str]:
    return [verdict.level for verdict in summary.verdicts]


def test_a_model_that_looks_is_said_to_look() -> None:
    summary = summarize(planted(400, accuracy=0.9, exchanged=0.5))
    assert levels(summary) == ["good", "good"]
    assert "the chosen answer is the more likely one in 87.5 % of 400 pairs" in summary.verdicts[0].text
    assert summary.verdicts[1].text.startswith("The model uses its images: exchanging them between pairs costs")
    gap = summary.figures["grounding_gap"]
    assert gap.value == pytest.approx(
        summary.figures["rewards/accuracies"].value - summary.figures["rewards/accuracies_exchanged"].value
    )
    assert gap.low < 0.4 < gap.high


def test_a_blind_model_is_named_blind() -> None:
    """Its answers are the same with other images."""
    pairs = planted(400, accuracy=0.8, exchanged=None)
    blind = join_pass(pairs, pairs.select(["sample_index", "correct"]), "exchanged")
    summary = summarize(blind)
    assert summary.verdicts[1].level == "problem"
    assert "does not use its images: exchanging them between pairs costs 0.0 points" in summary.verdicts[1].text


def test_an_untrained_model_is_at_chance_and_few_pairs_decide_nothing() -> None:
    pairs = planted(40, accuracy=0.5, exchanged=0.5, seed=5)
    verdicts = summarize(pairs).verdicts
    assert verdicts[0].headline == "Not distinguishable from chance"
    assert verdicts[1].level == "warning"
    assert verdicts[1].text.startswith("Too few pairs to say")


def test_a_model_that_reads_mostly_the_text_is_said_to() -> None:
    verdict = summarize(planted(2000, accuracy=0.9, exchanged=0.8)).verdicts[1]
    assert verdict.level == "warning"
    assert verdict.text.startswith("The model uses its images little")


@pytest.mark.parametrize(("base", "word"), [(0.6, "Better than"), (0.95, "Worse than"), (0.8, "No difference to")])
def test_a_comparison_says_which_is_better(base: float, word: str) -> None:
    ours, theirs = planted(1000, accuracy=0.8, seed=1), planted(1000, accuracy=base, seed=2)
    shuffled = theirs.take(pa.array(np.random.default_rng(0).permutation(900)))  # 100 pairs were bad rows there
    summary = summarize(ours, base=("their/model", shuffled))
    assert summary.verdicts[0].headline.startswith(f"{word} their/model")
    assert "on the same 900 pairs" in summary.verdicts[0].detail
    found = summary.comparison
    assert found is not None
    same = dict(zip(theirs["sample_index"].to_pylist(), theirs["correct"].to_pylist(), strict=True))
    kept = set(shuffled["sample_index"].to_pylist())
    rows = [row for row in ours.to_pylist() if row["sample_index"] in kept]
    assert found.better == sum(row["correct"] and not same[row["sample_index"]] for row in rows)


def test_groups_cover_all_pairs() -> None:
    pairs = planted(300, accuracy=0.8, exchanged=0.5)
    kinds = {each: f"kind {each % 20}" for each in range(299)}  # the last pair has none
    summary = summarize(pairs, {"kind": kinds})
    assert set(summary.breakdowns) == {"length of the answers", "the longer answer", "kind"}
    for groups in summary.breakdowns.values():
        assert sum(group.accuracy.pairs for group in groups) == 300
    assert len(summary.breakdowns["kind"]) == 12
    assert summary.breakdowns["kind"][-1].name == "other"
    lengths = [group.name for group in summary.breakdowns["length of the answers"]]
    assert lengths == sorted(lengths, key=lambda name: int(name.split()[0]))
    as_json: Any = summary.as_json()
    assert as_json["breakdowns"]["kind"][0]["accuracy"]["pairs"] > 0
    assert as_json["intervals"]["eval/grounding_gap"][0] <= summary.figures["grounding_gap"].value


def partly(pairs: pa.Table, count: int, value: float = 1.0) -> pa.Table:
    """Add the image preference, which the first `count` pairs do not have."""
    rows = pairs.to_pylist()
    margins = np.random.default_rng(3).normal(size=len(rows)).tolist()
    image = [{"rewards/image_margins": margin, "rewards/image_accuracies": value} for margin in margins]
    return join_workers([rows[:count], [row | more for row, more in zip(rows, image, strict=True)][count:]])


def test_figures_of_a_part_of_the_pairs_have_intervals_and_say_how_many_pairs() -> None:
    plain = planted(200, accuracy=0.9, exchanged=0.5)
    pairs = partly(plain, 3)
    summary, expected = summarize(pairs, {"kind": {each: "ab"[each % 2] for each in range(200)}}), summarize(plain)
    margin = summary.figures["rewards/image_margins"]
    assert margin == mean_estimate(pairs["rewards/image_margins"].drop_null().to_numpy())
    assert margin.pairs == 197
    assert {name: each for name, each in summary.figures.items() if "image_" not in name} == expected.figures
    assert summary.breakdowns["length of the answers"] == expected.breakdowns["length of the answers"]
    assert summary.partial == ["rewards/image_margins", "rewards/image_accuracies"]
    assert summary.as_json()["interval_pairs"] == dict.fromkeys(
        ("eval/rewards/image_margins", "eval/rewards/image_accuracies"), 197
    )
    for each, counted in ((summary, True), (expected, False)):
        out = io.StringIO()
        print_evaluation(Evaluation({"eval/pairs": 200.0}, each), Console(file=out, width=120))
        lines = {line.split()[0]: line.split() for line in out.getvalue().splitlines() if line.strip()}
        assert lines["eval/rewards/margins"][-2] == "to"
        assert not counted or lines["eval/rewards/image_margins"][-1] == "197"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_interval_of_a_fraction_that_is_always_the_same_ends_at_0_and_1(value: float) -> None:
    figure = summarize(partly(planted(40, accuracy=0.9), 1, value)).figures["rewards/image_accuracies"]
    assert (figure.value, figure.pairs) == (value, 39)
    assert value in (figure.low, figure.high)
    assert 0 <= figure.low < figure.high <= 1


def test_a_figure_with_values_that_are_not_finite_is_left_out() -> None:
    """Its average is not finite either; a pair that lacks the figure is another matter."""
    rows = planted(20, accuracy=0.8).to_pylist()
    rows[4]["nll_loss"], rows[5]["log_odds_chosen"] = float("nan"), None
    figures = summarize(join_workers([rows])).figures
    assert "nll_loss" not in figures
    assert figures["log_odds_chosen"].pairs == 19


def test_equal_lengths_make_one_group() -> None:
    rows = [row | {"chosen_tokens": 3, "rejected_tokens": 3} for row in planted(30, accuracy=0.8).to_pylist()]
    summary = summarize(join_workers([rows[20:], rows[:20]]))
    assert [group.name for group in summary.breakdowns["length of the answers"]] == ["3 to 3 tokens"]


def test_the_table_is_readable_and_hostile_names_are_text() -> None:
    pairs = planted(200, accuracy=0.9, exchanged=0.5)
    names = {each: "[red]not markup[/]" if each % 2 else "plain" for each in range(200)}
    summary = summarize(pairs, {"[bold]kind": names}, ("[/]base", planted(200, accuracy=0.6, seed=9)))
    out = io.StringIO()
    print_evaluation(Evaluation({"eval/pairs": 200.0}, summary), Console(file=out, width=120))
    text = out.getvalue()
    for part in ("200 held-out pairs", "eval/grounding_gap", " to ", "[red]not markup[/]", "by [bold]kind", "[/]base"):
        assert part in text


def test_scores_are_kept_and_read_again(tmp_path: Path) -> None:
    folder, pairs = RunFolder(str(tmp_path)), planted(20, accuracy=0.8, exchanged=0.5)
    write_pair_scores(folder, "pairs.parquet", pairs, data="abc")
    read = read_pair_scores(folder, "pairs.parquet")
    assert read is not None
    assert read.to_pylist() == pairs.to_pylist()
    assert facts_of_table(read) == {"data": "abc"}
    assert read_pair_scores(folder, "none.parquet") is None
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]


def test_the_values_of_a_column_follow_the_shuffled_order(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [f'{{"prompt": "{n}", "chosen": "a", "rejected": "b", "kind": "k{n % 3}"}}\n' for n in range(40)]
    path.write_text("".join(rows))
    read = spec_of([str(path)], window=8)
    found = column_values(read, "kind")
    assert set(found) == set(range(40))
    for sample_index, kind in found.items():
        _, pair = pair_at(read, sample_index)
        assert not isinstance(pair, BadRow)
        assert kind == f"k{int(pair.prompt[0]['content'][0]['text']) % 3}"
    with pytest.raises(UserError, match=r"(?s)no held-out row .*one of: prompt, chosen, rejected, kind"):
        column_values(read, "colour")


def test_a_winner_chosen_on_few_pairs_is_called_noise() -> None:
    few = [planted(16, accuracy=0.6, seed=seed) for seed in (1, 2)]
    doubt = doubt_between(("one", few[0]), ("two", few[1]), "eval/rewards/margins")
    assert doubt is not None
    assert doubt.startswith("one cannot be told from two on 16 held-out pairs")
    many = [planted(2000, accuracy=accuracy, seed=3) for accuracy in (0.9, 0.6)]
    assert doubt_between(("one", many[0]), ("two", many[1]), "eval/rewards/margins") is None
    assert doubt_between(("one", many[0]), ("two", many[1]), "eval/runtime") is None


def test_models_are_told_apart_on_the_pairs_that_have_the_metric() -> None:
    one, two = (partly(planted(16, accuracy=0.6, seed=seed), count) for seed, count in ((1, 2), (2, 3)))
    doubt = doubt_between(("one", one), ("two", two), "eval/rewards/image_margins")
    assert doubt is not None
    assert "on 13 held-out pairs: their eval/rewards/image_margins differs by +0.0000" in doubt
    only_first, only_last = (
        one.set_column(one.num_columns - 2, "rewards/image_margins", pa.array([*values], pa.float64()))
        for values in ([1.0] * 8 + [None] * 8, [None] * 8 + [1.0] * 8)
    )
    assert doubt_between(("one", only_first), ("two", only_last), "eval/rewards/image_margins") is None
