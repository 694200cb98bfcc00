"""Output of the commands: on stderr, with texts of users and data unchanged."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace

import pytest
from rich.console import Console

import orpo_ray.console as console_module
from orpo_ray.console import print_check, print_error, print_prepared, print_sweep, print_synthesized, print_trained
from orpo_ray.data_report.prepare import Prepared
from orpo_ray.errors import UserError
from orpo_ray.sweep.outcome import Row, Sweep
from orpo_ray.synthesis.outcome import Synthesized
from orpo_ray.training.launch import RunSummary
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
    trials = [Row("one", {"orpo.beta": "0.25"}, None, 0, "failed: [Errno 2]")]
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


def test_the_command_after_prepare_names_each_field_once(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["name=x", "data.train=old.jsonl", "data.columns.chosen=good", "data.format=trl", "data.max_length=64"]
    print_prepared({"train": Prepared("/runs/x/data/train")}, "r.yaml", overrides)
    command = shlex.split(printed(capsys).splitlines()[-1])[1:]
    names = [option.partition("=")[0] for option in command[3:]]
    assert len(names) == len(set(names))
    assert "data.train=/runs/x/data/train" in command
    assert {"name=x", "data.max_length=64", "data.format=auto", "data.columns={}"} <= set(command)
    assert "data.columns.chosen=good" not in command


def test_the_command_after_synthesize_reads_the_held_out_pairs_that_were_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = Synthesized("/runs/x/data/train", 1, 1, {}, [], 2, 0, 1.0, eval_uri="/runs/x/data/eval")
    print_synthesized(made, "r.yaml", ["data.eval_fraction=0.1", "data.columns.chosen=good"])
    command = shlex.split(printed(capsys).splitlines()[-1])[1:]
    assert {"data.train=/runs/x/data/train", "data.eval=/runs/x/data/eval", "data.eval_fraction=0"} <= set(command)
    print_synthesized(replace(made, eval_uri=None), "r.yaml", ["data.eval=held.jsonl"])
    assert "data.eval=held.jsonl" in printed(capsys).splitlines()[-1]


def test_headers_of_a_narrow_table_of_trials_are_whole_and_doubt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console_module, "console", Console(file=out, width=60))
    trials = [Row("abc12_00000", {"optim.learning_rate": "0.0001", "optim.weight_decay": "0.1"}, 0.5, 10, "finished")]
    doubt = "abc12_00000 cannot be told from def"
    print_sweep(
        Sweep(trials, "one", "best.yaml", doubt), ["optim.learning_rate", "optim.weight_decay"], "eval/nll_loss"
    )
    text = out.getvalue()
    assert "\u2026" not in text
    for word in ("learning_", "rate", "weight_", "decay", "steps", "status", "nll_", "abc12_00000"):
        assert word in text
    assert "warning: abc12_00000 cannot be told from def" in text
