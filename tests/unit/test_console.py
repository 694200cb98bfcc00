"""Output of the commands: on stderr, with texts of users and data unchanged."""

from __future__ import annotations

import pytest

from orpo_ray.console import print_check, print_error, print_sweep, print_trained
from orpo_ray.errors import UserError
from orpo_ray.training.launch import RunSummary
from orpo_ray.training.sweep import Sweep, Trial
from support.data_reports import a_report


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_report_has_a_column_for_each_split(capsys: pytest.CaptureFixture[str]) -> None:
    report = a_report() | {"images_on_both_sides": 3}
    report["eval"]["text_only"] = None
    print_check(report)
    text = printed(capsys)
    lines = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert lines["usable pairs"] == ["1,960", "198"]
    assert lines["bad: missing_image"] == ["40", "2"]
    assert lines["text-only accuracy"] == ["55%", "-"]
    assert "3 image(s) are in both" in text


def test_brackets_in_errors_and_results_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("error", UserError("no [red]such[/red] thing", field="a.b", value="[x]", fix="do [this]"))
    assert printed(capsys) == "error: a.b: no [red]such[/red] thing (found '[x]')\n  fix: do [this]\n"
    trials = [Trial("one", {"orpo.beta": 0.25}, None, 0, "failed: [Errno 2]")]
    print_sweep(Sweep(trials, "one", "runs/[a]/best_recipe.yaml"), ["orpo.beta"], "eval/nll_loss")
    text = printed(capsys)
    assert "failed: [Errno 2]" in text
    assert "runs/[a]/best_recipe.yaml" in text


def test_a_run_ends_with_a_command_that_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    print_trained(RunSummary("/my runs/x", {"train/loss": 1.0, "eval/grounding_gap": 0.25}), "/my runs/x/report.html")
    text = printed(capsys)
    assert "orpo-ray export '/my runs/x'" in text
    assert "orpo-ray evaluate '/my runs/x'   intervals" in text
    assert "report      /my runs/x/report.html" in text
    assert [line.split()[1] for line in text.splitlines() if "eval/grounding_gap" in line] == ["0.2500"]
    print_trained(RunSummary("x", {"train/loss": 1.0}), "x/report.html")
    assert "orpo-ray evaluate x data.eval=FILE" in printed(capsys)  # a run without held-out pairs
