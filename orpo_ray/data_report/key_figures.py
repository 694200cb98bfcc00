"""Key figures on the page of a data check: what was found, how serious it is, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orpo_ray.data.groups import SCRIPT
from orpo_ray.extras import install_command, is_installed
from orpo_ray.pages.text_format import counted, number, percent

Split = Mapping[str, Any]
WARNINGS_SHOWN = 3
LEVELS = ("none", "good", "warning", "problem")  # in order of severity


@dataclass(frozen=True)
class Card:
    """A key figure."""

    value: str
    unit: str
    level: str
    """One of LEVELS."""
    text: str
    """What the figure means."""
    title: str = ""
    held_out: str = ""
    """The same figure for the held-out pairs."""


def make_cards(report: Mapping[str, Any]) -> list[Card]:
    """Make the key figures of a report, the most severe first."""
    cards = [_make_card(title, judge, report) for title, judge in _JUDGES]
    return sorted(cards, key=lambda card: -LEVELS.index(card.level))


Judge = Callable[[Split, Mapping[str, Any]], Card]


def _make_card(title: str, judge: Judge, report: Mapping[str, Any]) -> Card:
    """Judge the training pairs, and take level and text from the held-out pairs if they are worse."""
    card = replace(_judge_split(judge, report["train"], report), title=title)
    if not report["eval"] or judge is _held_out:
        return card
    other = _judge_split(judge, report["eval"], report)
    if other.level != "none":
        card = replace(card, held_out=f"{other.value} {other.unit}")
    if other.level in ("warning", "problem") and LEVELS.index(other.level) > LEVELS.index(card.level):
        card = replace(card, level=other.level, text=f"Held-out pairs: {other.text[0].lower()}{other.text[1:]}")
    return card


def _judge_split(judge: Judge, split: Split, report: Mapping[str, Any]) -> Card:
    if split["pairs"] or judge in (_bad_rows, _held_out) or split["too_long"]["count"]:
        return judge(split, report)
    return Card("\u2013", "", "none", "There are no usable pairs.")


def _of_rows(split: Split) -> str:
    return f"of {counted(split['rows'], 'row')}"


def _bad_rows(split: Split, report: Mapping[str, Any]) -> Card:
    total, fraction = split["bad"]["total"], split["bad"]["fraction"]
    if not split["rows"]:
        return Card("0", "rows", "problem", "The data sources have no rows.")
    level, text = "good", "All rows can be used."
    if total:
        level, text = "warning", f"{percent(fraction)} cannot be used. Training skips them. Reasons are listed below."
    if fraction > (limit := report["max_bad_fraction"]):
        level = "problem"
        text = f"{percent(fraction)} cannot be used. Training stops above {percent(limit)} (data.max_bad_fraction)."
    return Card(number(total), _of_rows(split), level, text)


def _too_long(split: Split, report: Mapping[str, Any]) -> Card:
    count, fraction, policy = (split["too_long"][key] for key in ("count", "fraction", "policy"))
    limit = f"data.max_length ({number(report['max_length'])} tokens)"
    if not count:
        return Card("0", _of_rows(split), "good", f"No pair exceeds {limit}.")
    consequence = {
        "skip": "Training skips them. Increase data.max_length to include them.",
        "truncate_response": "Training truncates their answers, but never prompts or images.",
        "error": "Training stops at the first one, because data.on_too_long is error.",
    }[policy]
    level = "problem" if policy == "error" or fraction > 0.05 else "warning"
    return Card(number(count), _of_rows(split), level, f"{percent(fraction)} exceed {limit}. {consequence}")


def _groups(split: Split, report: Mapping[str, Any]) -> Card:
    languages, domains, warnings = split["languages"], split["domains"], split["warnings"]
    unit = ("script" if report["language"] == SCRIPT else "language") + ("s" if len(languages) != 1 else "")
    if domains:
        unit += f", {counted(len(domains), 'domain')}"
    if warnings:
        text = " ".join(f"{each[0].upper()}{each[1:]}" for each in warnings[:WARNINGS_SHOWN])
        return Card(number(len(languages)), unit, "warning", text)
    if not languages and not domains:
        return Card("\u2013", "", "none", "No row has a language.")
    return Card(number(len(languages)), unit, "good", "No language loses most of its pairs to data.max_length.")


def _text_only(split: Split, report: Mapping[str, Any]) -> Card:
    found = split["text_only"]
    if found is None:
        reason = "There are too few pairs for an estimate."
        if not is_installed("sklearn"):
            reason = f"Not measured: scikit-learn is not installed. Install it with {install_command('sklearn')}"
        return Card("\u2013", "", "none", reason)
    level, text = "good", "The texts alone rarely reveal the chosen answer"
    if found["accuracy"] > 0.8:
        level, text = "problem", "Most chosen answers can be identified without the image"
    elif found["accuracy"] > 0.65:
        level, text = "warning", "Many chosen answers can be identified without the image"
    elif found["high"] < 0.5:
        level, text = "warning", "Below chance: similar texts have opposite answers, and the estimate says little"
    text += f" (95\u00a0% interval: {percent(found['low'])} to {percent(found['high'])}). Chance is 50\u00a0%."
    return Card(percent(found["accuracy"]), "without images", level, text)


def _length_bias(split: Split, report: Mapping[str, Any]) -> Card:
    """Judge by how often the longer answer, or always the shorter one, is the chosen one; equal lengths count half."""
    bias = split["length_bias"]
    longer = bias["chosen_longer"] + bias["equal"] / 2
    rule, gain = ("longer", longer) if longer >= 0.5 else ("shorter", 1 - longer)
    level = "problem" if gain > 0.8 else "warning" if gain > 0.65 else "good"
    text = "Length says little about which answer is chosen."
    if level != "good":
        text = (
            f"Always taking the {rule} answer is right in {percent(gain)}. The model may learn to write {rule} answers "
            "instead of better ones."
        )
    elif bias["equal"] > 0.5:
        text = "Most answers have the same length."
    text += f" Median difference: {number(bias['median_difference'], sign=True)} tokens."
    return Card(percent(gain), "by length alone", level, text)


def _repeated_rows(split: Split, report: Mapping[str, Any]) -> Card:
    count, prompts = split["duplicates"]["pairs"], split["duplicates"]["prompts"]
    fraction = count / split["rows"]
    text = f"{percent(fraction)} are identical to an earlier row." if count else "No row occurs twice."
    if prompts:
        text += f" {counted(prompts, 'row')} with the prompt and images of an earlier row."
    level = "problem" if fraction > 0.2 else "warning" if count else "good"
    return Card(number(count), _of_rows(split), level, text)


def _contradictions(split: Split, report: Mapping[str, Any]) -> Card:
    count = split["duplicates"]["contradictions"]
    level, text = "good", "No pair occurs again with its answers exchanged."
    if count:
        level = "problem" if count / split["rows"] > 0.01 else "warning"
        text = "The same pair occurs again with chosen and rejected exchanged. The two cancel each other out."
    return Card(number(count), "contradicting pairs", level, text)


def _images(split: Split, report: Mapping[str, Any]) -> Card:
    total, without = sum(split["images_per_pair"].values()), split["images_per_pair"].get("0", 0)
    level, text = "good", "Every pair has one image."
    if without == total:
        level, text = "warning", "No pair has an image, so the model cannot learn to use images."
    elif without:
        level = "warning" if without / total > 0.05 else "good"
        text = f"{counted(without, 'pair')} without an image."
    elif set(split["images_per_pair"]) != {"1"}:
        text = "Every pair has at least one image."
    return Card(percent((total - without) / total), "with images", level, text)


def _held_out(split: Split, report: Mapping[str, Any]) -> Card:
    pairs, shared = report["eval"]["pairs"] if report["eval"] else 0, report["images_on_both_sides"]
    level, text = "good", "Their images do not occur in the training pairs."
    if not pairs:
        level = "warning"
        text = "Without held-out pairs, overfitting cannot be detected. Set data.eval or data.eval_fraction."
    elif shared:
        level = "problem"
        text = (
            f"{counted(shared, 'image')} in both training and held-out pairs. Held-out metrics will be too optimistic."
        )
    return Card(number(pairs), "held-out pairs", level, text)


_JUDGES: tuple[tuple[str, Judge], ...] = (
    ("Bad rows", _bad_rows),
    ("Too long", _too_long),
    ("Languages", _groups),
    ("Text-only accuracy", _text_only),
    ("Length bias", _length_bias),
    ("Repeated rows", _repeated_rows),
    ("Contradictions", _contradictions),
    ("Images", _images),
    ("Held-out pairs", _held_out),
)
