"""The report of a data check, worked by hand; the text-only accuracy."""

from __future__ import annotations

import io
import random
import sys

import numpy as np
import pytest
from rich.console import Console

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data_report import progress
from orpo_ray.data_report.facts import PairFacts, facts_from_json, facts_of
from orpo_ray.data_report.report import SplitCheck, images_on_both_sides, warnings_of
from orpo_ray.data_report.text_only_baseline import TextOnlyPair, text_only_accuracy


def facts(
    sample_index: int, question: str = "q", chosen: str = "yes", rejected: str = "no", images: int = 1
) -> PairFacts:
    """Make facts of a pair: one token per character of the answers, 10 for the prompt and 5 per image."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    pair = PreferencePair(
        str(sample_index), [], [{"role": "user", "content": content}], chosen, rejected, f"a:{sample_index}"
    )
    is_text = np.array([True] * 10 + [False] * 5 * images)
    ids = [np.zeros(length, np.int32) for length in (len(is_text), len(chosen), len(rejected))]
    encoded = EncodedPair(str(sample_index), *ids, is_text, {}, sample_index)
    return facts_of(pair, encoded, [f"{question}-{image}" for image in range(images)], [(64, 48)] * images)


def check(*found: PairFacts | BadRow, max_length: int = 100, policy: str = "skip") -> SplitCheck:
    split = SplitCheck(max_length, policy, {"trl": len(found)})
    for each in found:
        split.add(each)
    split.sort()
    return split


def test_counts_lengths_and_bad_rows() -> None:
    bad = BadRow(3, "3", "a:3", "missing_image", "no such file")
    split = check(facts(2, chosen="x" * 40, images=0), bad, facts(0), facts(1, chosen="y" * 90, images=2))
    report = split.report()
    assert (report["rows"], report["pairs"]) == (4, 2)
    assert report["bad"]["by_reason"] == {"missing_image": 1}
    assert report["bad"]["fraction"] == 0.25
    assert report["bad"]["examples"][0] == {
        "id": "3",
        "source": "a:3",
        "reason": "missing_image",
        "detail": "no such file",
    }
    assert report["images_per_pair"] == {"0": 1, "1": 1, "2": 1}
    assert report["image_sizes"]["width"]["max"] == 64
    assert (report["tokens"]["prompt"]["min"], report["tokens"]["prompt"]["max"]) == (10, 20)
    assert report["tokens"]["image"]["p50"] == 5
    assert report["tokens"]["sequence"]["max"] == 110
    assert report["too_long"] == {"count": 1, "fraction": 0.25, "policy": "skip"}
    assert check(facts(1, chosen="y" * 90), policy="truncate_response").report()["pairs"] == 1
    assert sum(report["histograms"]["chosen"]["counts"]) == 3


def test_duplicates_and_contradictions() -> None:
    split = check(
        facts(0), facts(1), facts(2, chosen="no", rejected="yes"), facts(3, "other"), facts(4, chosen="maybe")
    )  # fmt: skip
    assert split.report()["duplicates"] == {"pairs": 1, "prompts": 3, "contradictions": 1}


def test_equal_answers_to_different_images_are_no_contradiction() -> None:
    split = check(
        *(facts(sample_index, f"q{sample_index}", chosen="same", rejected="same") for sample_index in range(4))
    )
    assert split.report()["duplicates"]["contradictions"] == 0


def test_length_bias() -> None:
    split = check(facts(0, chosen="long answer"), facts(1, chosen="a", rejected="b"), facts(2), facts(3))
    bias = split.report()["length_bias"]
    assert bias == {"chosen_longer": 0.75, "equal": 0.25, "median_difference": 1.0}


def test_a_split_without_usable_rows() -> None:
    report = check(BadRow(0, "0", "a:0", "malformed_row", "x")).report()
    assert (report["tokens"], report["text_only"], report["length_bias"], report["image_sizes"]) == (None,) * 4
    assert check(BadRow(0, "0", "a:0", "malformed_row", "x")).gallery() == {}


def test_images_on_both_sides() -> None:
    assert images_on_both_sides(check(facts(0, "a"), facts(1, "b")), check(facts(0, "b", images=2))) == 1
    assert images_on_both_sides(check(facts(0)), None) == 0


def test_the_gallery_has_samples_and_extremes() -> None:
    found = [facts(sample_index, f"q{sample_index}", chosen="x" * (sample_index + 1)) for sample_index in range(60)]
    gallery = check(*found, facts(60, "q0", chosen="x"), max_length=60).gallery()
    assert len(gallery["sample"]) == 36
    assert gallery["longest"][0] == 59
    assert gallery["too long"][0] == 45
    assert set(gallery["duplicate"]) == {0, 60}


def test_warnings() -> None:
    assert warnings_of(facts(0, chosen="x" * 90, images=0), 50) == [
        "too long: 100 tokens", "very different answer lengths", "no image",
    ]  # fmt: skip
    assert warnings_of(facts(0), 50) == []


def test_facts_round_trip_through_json() -> None:
    import json
    from dataclasses import asdict

    for each in (facts(0, images=2), PairFacts(3, "3", "a:3", (1, 0, 1, 1), answers=(7, 2), language="ar")):
        assert facts_from_json(json.loads(json.dumps(asdict(each)))) == each


COLORS = ["red", "green", "blue", "teal", "brown"]


def texts(count: int, seed: int, leak: str) -> list[TextOnlyPair]:
    """Questions about colors. `leak` reveals the chosen answer: `length`, a `word`, `agreement` with the prompt."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        chosen, rejected = rng.sample(COLORS, 2)
        prompt = "what color is it?"
        if leak == "length":
            chosen += " as far as one can see in this picture"
        elif leak == "word":
            chosen = f"certainly {chosen}"
        elif leak == "agreement":
            prompt = f"is it {chosen}?"
            chosen, rejected = f"it is {chosen}", f"it is {rejected}"
        found.append(TextOnlyPair(str(number), prompt, chosen, rejected))
    return found


@pytest.mark.parametrize("leak", ["length", "word", "agreement"])
def test_leaks_are_found(leak: str) -> None:
    found = text_only_accuracy(texts(600, 0, leak))
    assert found is not None
    assert found["accuracy"] > 0.95
    assert found["low"] <= found["accuracy"] <= found["high"]


def test_without_a_leak_accuracy_is_chance() -> None:
    found = text_only_accuracy(texts(2000, 1, ""))
    assert found is not None
    assert abs(found["accuracy"] - 0.5) < 0.05
    assert found["pairs"] == 2000


def test_repeated_pairs_stay_in_one_fold() -> None:
    """Each question occurs ten times. If its copies were in several folds, the classifier could memorize the answer."""
    few = texts(60, 2, "")
    found = text_only_accuracy(
        [TextOnlyPair(text.group, f"picture {text.group}", *(text.chosen, text.rejected)) for text in few] * 10
    )
    assert found is not None
    assert abs(found["accuracy"] - 0.5) < 0.2


def test_too_few_pairs_give_no_estimate() -> None:
    assert text_only_accuracy(texts(50, 0, "word")) is None


def test_without_scikit_learn_the_report_lacks_only_the_text_only_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # what Python does when a package is absent
    report = check(*(facts(number, question=f"q{number}") for number in range(200))).report()
    assert report["text_only"] is None
    assert report["pairs"] == 200


def test_sentences_that_stand_with_either_answer_are_at_chance() -> None:
    """As in nlvr: each sentence is true of one picture and false of another. Divided between folds, it gives 27 %."""
    pairs = []
    for n in range(300):
        for picture, (chosen, rejected) in enumerate((("true", "false"), ("false", "true"))):
            words = " ".join(random.Random(n).choices(["box", "circle", "yellow", "touching", "edge", "three"], k=6))
            pairs.append(TextOnlyPair(f"{n}-{picture}", f"Is this true? {words} {n}", chosen, rejected))
    random.Random(0).shuffle(pairs)
    found = text_only_accuracy(pairs)
    assert found is not None
    assert abs(found["accuracy"] - 0.5) < 0.05


def test_prepared_progress_prints_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    out = io.StringIO()
    with progress.RowProgress(Console(file=out), "reading train", 1200) as rows:
        rows.advance(1000)
        rows.advance(200)
    assert out.getvalue() == "reading train  0/1,200 rows\nreading train  1,000/1,200 rows\n"
    terminal = io.StringIO()
    with progress.RowProgress(Console(file=terminal, force_terminal=True, width=100), "reading", 10) as rows:
        rows.advance(5)
    assert "reading" in terminal.getvalue()
