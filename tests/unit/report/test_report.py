"""The report: what it says of runs that are finished, running, or without scores; hostile texts stay texts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.errors import UserError
from orpo_ray.evaluation.token_scores import read_tokens, write_tokens
from orpo_ray.report.charts import margins_of
from orpo_ray.report.generations import compared_generations, shown_generations
from orpo_ray.report.page import render_report, write_report
from orpo_ray.report.pairs import shown_pairs
from orpo_ray.report.run_data import read_run
from orpo_ray.storage.run_folder import RunFolder
from support.commands import orpo_ray_here
from support.planted_runs import planted_run


def verdict(page: str) -> str:
    found = re.search(r'<p class="verdict[^>]*><bdi>(.*?)</bdi>', page)
    assert found
    return found[1]


def test_the_verdict_of_a_run(tmp_path: Path) -> None:
    better = read_run(RunFolder(str(planted_run(tmp_path / "a"))))
    assert verdict(render_report([better])) == "Better than the model before training. The model uses its images."
    alone = read_run(RunFolder(str(planted_run(tmp_path / "b", on_start=False))))
    assert verdict(render_report([alone])) == "The model prefers the chosen answers. The model uses its images."
    stopped = read_run(RunFolder(str(planted_run(tmp_path / "c", finished=False))))
    assert verdict(render_report([stopped])).startswith("The run stopped after step 120. ")


def test_several_runs_are_ranked_only_if_the_intervals_say_so(tmp_path: Path) -> None:
    far = [read_run(RunFolder(str(planted_run(tmp_path / name, name, at)))) for name, at in (("a", 0.95), ("b", 0.55))]
    assert verdict(render_report(far)) == "a is the most accurate."
    near = [far[0], read_run(RunFolder(str(planted_run(tmp_path / "c", "c", 0.93, seed=5))))]
    assert verdict(render_report(near)) == "No run is clearly the most accurate."


def test_languages_have_curves_and_groups(tmp_path: Path) -> None:
    run = planted_run(tmp_path)
    lines = [
        {"step": step, f"eval/pairs/language/{name}": 40, f"eval/rewards/accuracies/language/{name}": 0.5 + step / 300}
        for step in (30, 60)
        for name in ("العربية", "ja")
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    scores = pq.read_table(run / "eval_pairs.parquet")
    names = pa.array(["العربية" if place % 2 else "ja" for place in range(scores.num_rows)])
    pq.write_table(scores.append_column("language", names), run / "eval_pairs.parquet")
    page = render_report([read_run(RunFolder(str(run)))])
    assert "Accuracy by language" in page
    assert "Accuracy by domain" not in page
    assert "<h3>By language</h3>" in page
    assert "<bdi>العربية</bdi></th><td>40</td>" in page


def test_metrics_that_some_pairs_lack_leave_the_report_as_it_is(tmp_path: Path) -> None:
    """The count of pairs is shown where it is another one."""
    run = planted_run(tmp_path)
    before = render_report([read_run(RunFolder(str(run)))])
    scores = pq.read_table(run / "eval_pairs.parquet")
    margins = pa.array([None if place < 3 else place / 9 for place in range(scores.num_rows)])
    pq.write_table(scores.append_column("rewards/image_margins", margins), run / "eval_pairs.parquet")
    assert render_report([read_run(RunFolder(str(run)))]) == before
    assert not re.search(r", over \d+ pairs", before)
    exchanged = pa.array([None if place < 5 else each for place, each in enumerate(scores["exchanged/correct"])])
    place = scores.column_names.index("exchanged/correct")
    pq.write_table(scores.set_column(place, "exchanged/correct", exchanged), run / "eval_pairs.parquet")
    assert ", over 75 pairs" in render_report([read_run(RunFolder(str(run)))])


def test_pairs_that_improved_most_come_first(tmp_path: Path) -> None:
    run = read_run(RunFolder(str(planted_run(tmp_path))))
    pairs, problem = shown_pairs(run)
    assert problem is None
    changes = [pair["margin"] - pair["start"] for pair in pairs]
    assert changes == sorted(changes[:6], reverse=True) + sorted(changes[6:])
    assert min(changes[:6]) > max(changes[6:])
    everything = run.pairs["rewards/margins"].to_numpy() - run.start_pairs["rewards/margins"].to_numpy()  # type: ignore[union-attr]
    assert changes[0] == everything.max()
    assert changes[6] == everything.min()
    assert all(pair["images"][0].startswith("data:image/jpeg;base64,") for pair in pairs)


def test_tokens_are_shaded_by_their_log_probs(tmp_path: Path) -> None:
    run = read_run(RunFolder(str(planted_run(tmp_path))))
    pairs, _ = shown_pairs(run)
    assert {bool(pair["pieces"]) for pair in pairs} == {True, False}
    found = next(pair["pieces"] for pair in pairs if pair["pieces"])
    assert [shade for _, shade, _ in found["chosen"]] == [0, 1, 2, 3]
    page = render_report([run])
    assert '<span class="t2" title="log-prob -3.00"> &lt;b&gt;it&lt;/b&gt;</span>' in page
    assert "The darker a token" in page
    write_tokens(run.folder, read_tokens(run.folder)[1], "of other data")
    assert not any(pair["pieces"] for pair in shown_pairs(read_run(run.folder))[0])


def test_answers_stand_side_by_side_over_the_steps(tmp_path: Path) -> None:
    run = read_run(RunFolder(str(planted_run(tmp_path))))
    shown = shown_generations(run)
    assert [pair["id"] for pair in shown] == ["answered 0", "answered 3"]
    assert [each["by"] for each in shown[0]["answers"]] == ["0", "40", "60", "80", "120"]
    assert shown[0]["answers"][-1]["greedy"] == "greedy at 120"
    assert shown[0]["images"][0].startswith("data:image/jpeg;base64,")
    page = render_report([run])
    assert page.count('class="exchange"') == 2
    assert "&lt;b&gt;sampled&lt;/b&gt; at 120" in page
    (tmp_path / "data" / "test.jsonl").unlink()
    assert shown_generations(run)[0]["images"] == []


def test_answers_of_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    """The latest ones, after those of the model before training; only to pairs that two runs answered."""
    runs = [read_run(RunFolder(str(planted_run(tmp_path / name, name)))) for name in ("one", "two")]
    shown = compared_generations(runs)
    assert [each["by"] for each in shown[0]["answers"]] == ["before training", "one", "two"]
    assert [each["greedy"] for each in shown[0]["answers"]] == ["greedy at 0", "greedy at 120", "greedy at 120"]
    assert shown[0]["images"][0].startswith("data:image/jpeg;base64,")
    page = render_report(runs)
    assert page.count('class="exchange"') == len(shown) == 2
    assert '<th scope="col"><bdi>two</bdi></th>' in page
    index = next(iter(runs[1].generations))
    for line in runs[1].generations[index].values():
        line["data"] = "of other pairs"
    assert len(compared_generations(runs)) == 1
    assert compared_generations(runs[:1]) == []
    same = [read_run(RunFolder(str(run.folder.path))) for run in (runs[0], runs[0])]
    assert f"<bdi>{same[0].folder.uri}</bdi>" in render_report(same)


def test_data_that_changed_or_is_gone_is_said(tmp_path: Path) -> None:
    run = planted_run(tmp_path)
    data = tmp_path / "data" / "test.jsonl"
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    assert "has changed" in str(shown_pairs(read_run(RunFolder(str(run))))[1])
    data.unlink()
    pairs, problem = shown_pairs(read_run(RunFolder(str(run))))
    assert pairs == []
    assert "cannot be read any longer" in str(problem)
    assert "cannot be read any longer" in render_report([read_run(RunFolder(str(run)))])


def test_no_bar_holds_margins_of_both_signs(tmp_path: Path) -> None:
    run = read_run(RunFolder(str(planted_run(tmp_path))))
    chart = margins_of(run)
    assert chart is not None
    assert run.pairs is not None
    margins = run.pairs["rewards/margins"].to_numpy()
    assert chart.right == (margins > 0).sum()
    ends = [x + width for x, width, *_ in chart.bars]
    assert min(abs(end - chart.zero) for end in ends) < 0.01
    for x, _, _, _, kind in chart.bars:
        assert kind == ("chosen" if x >= chart.zero - 0.01 else "rejected")


def test_one_margin_of_all_pairs_is_drawn(tmp_path: Path) -> None:
    run = planted_run(tmp_path, on_start=False)
    path = run / "eval_pairs.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("rewards/margins")
    table = table.set_column(place, "rewards/margins", [[0.0] * table.num_rows])
    pq.write_table(table.drop_columns(["exchanged/correct", "exchanged/rewards/margins"]), path)
    assert margins_of(read_run(RunFolder(str(run)))) is not None


def test_the_command_writes_into_the_run_or_here(tmp_path: Path) -> None:
    runs = [planted_run(tmp_path / name, name) for name in ("a", "b")]
    one = orpo_ray_here("report", str(runs[0]), cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert (runs[0] / "report.html").is_file()
    both = orpo_ray_here("report", *map(str, runs), cwd=tmp_path)
    assert "page  report.html" in both.stderr
    assert "<title>a, b: report</title>" in (tmp_path / "report.html").read_text()
    assert orpo_ray_here("report", str(tmp_path / "a"), cwd=tmp_path).returncode == 2
    with pytest.raises(UserError, match="cannot write the report"):
        write_report([str(runs[0])], str(tmp_path / "no" / "such" / "folder.html"))


def test_a_sweep_is_no_run_and_has_a_page_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"this is a sweep, not a run(.|\n)*open its sweep.html"):
        read_run(RunFolder(str(tmp_path)))


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    page = render_report([read_run(RunFolder(str(planted_run(tmp_path))))])
    references = re.findall(r'(?:src|href|srcset|action)="([^"]*)"', page)
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert "url(" not in page
    assert " style=" not in page


def test_margins_that_are_not_finite_do_not_stop_the_report(tmp_path: Path) -> None:
    run = planted_run(tmp_path)
    for name in ("eval_pairs.parquet", "eval_pairs_start.parquet"):
        table = pq.read_table(run / name)
        place = table.column_names.index("rewards/margins")
        values = [float("nan"), float("inf"), *table["rewards/margins"].to_pylist()[2:]]
        pq.write_table(table.set_column(place, "rewards/margins", [values]), run / name)
    read = read_run(RunFolder(str(run)))
    chart = margins_of(read)
    assert chart is not None
    assert chart.pairs == 78
    assert "Better than the model before training" in render_report([read])


def test_a_table_of_held_out_figures_has_no_training_loss(tmp_path: Path) -> None:
    run = planted_run(tmp_path / "a", "a")
    bare = planted_run(tmp_path / "b", "b")
    lines = [json.loads(line) for line in (bare / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "eval/loss" not in line]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (bare / "eval_pairs.parquet").unlink()
    page = render_report([read_run(RunFolder(str(each))) for each in (run, bare)])
    (row,) = re.findall(r"<bdi>b</bdi></th>((?:<td>[^<]*</td>)+)</tr>", page)
    assert re.findall(r"<td>([^<]*)</td>", row)[:4] == ["\u2013"] * 4


def test_fields_of_a_search_are_no_difference_between_runs(tmp_path: Path) -> None:
    sections = ({"tune": {"num_trials": 3}, "optim": {"seed": 1}}, {"tune": {"num_trials": 5}, "optim": {"seed": 2}})
    runs = [
        read_run(RunFolder(str(planted_run(tmp_path / name, name, **each))))
        for name, each in zip("ab", sections, strict=True)
    ]
    page = render_report(runs)
    assert '<th scope="row" class="mono">optim.seed</th>' in page
    assert "tune." not in page
