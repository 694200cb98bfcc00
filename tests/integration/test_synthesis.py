"""`orpo-ray data synthesize` on a real Ray: the same set for any number of workers and after kills, and training."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from rich.console import Console

from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import all_data, run_data
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, read_pairs
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.ahead import draw_ahead
from orpo_ray.synthesis.distribute import PartFailed
from orpo_ray.synthesis.engines.vllm_engine import OWN
from orpo_ray.synthesis.identity import check_identity, identity_of
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.synthesis.part import Job, PartMaker
from orpo_ray.synthesis.part_files import read_facts
from orpo_ray.synthesis.rounds import recipe_of_round
from orpo_ray.synthesis.run import synthesize
from orpo_ray.synthesis.source import source_rows
from orpo_ray.training.launch import launch_training
from support.chat_servers import answers_of, serving, text_of
from support.commands import on_this_cluster, orpo_ray_here
from support.runs import wait_until
from support.synthesis import lines_of, pairs_of, set_of, synthesis_recipe, write_questions
from support.tiny_runs import losses, tiny_recipe, write_pairs

pytestmark = pytest.mark.usefixtures("ray_cluster")

QUIET = Console(file=io.StringIO())


def say_a_color(body: dict[str, Any]) -> str:
    """A candidate that depends on the seed alone, so that it is the same whenever it is asked for."""
    return ("red", "blue", "circle")[body["seed"] % 3]


def served_recipe(storage: Path, name: str, source: Path, url: str, **fields: Any) -> Recipe:
    served = {"engine": "server", "server": {"url": url, "model": "m"}, "label": "reference", "candidates": 6}
    return synthesis_recipe(storage, name, source, **(served | fields))


def test_a_set_for_training_with_every_row_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = write_questions(tmp_path / "rows", 48)
    held_out = write_pairs(tmp_path / "held", 3)  # of the same images
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], "{", *lines[20:]]) + "\n")
    with serving(say_a_color) as server:
        recipe = served_recipe(tmp_path / "runs", "made", path, server.url, min_margin=0.9)
        recipe = Recipe.model_validate(recipe.model_dump(mode="json") | {
            "data": {"train": {str(path): 1.0}, "eval": {str(held_out): 1.0}, "max_length": 128},
        })  # fmt: skip
        made = synthesize(recipe, QUIET)
        again = synthesize(recipe, QUIET)
    folder = tmp_path / "runs" / "made"
    assert again.was_finished
    assert again.as_json() == made.as_json()
    results = lines_of(folder)
    assert len(results) == made.rows == 49
    outcomes = [line["outcome"] for line in results]
    assert made.pairs + sum(made.thrown_away.values()) + len(made.bad) == 49
    assert made.pairs == outcomes.count("pair") == len(pairs_of(folder)) > 5
    images = {json.loads(line)["image"] for line in lines[:3]}
    assert made.thrown_away["held_out"] == outcomes.count("held_out") >= len(images)
    assert outcomes.count("malformed_row") == 1
    assert [row["reason"] for row in map(json.loads, (folder / "bad_rows.jsonl").read_text().splitlines())] == [
        "malformed_row"
    ]
    answers = {json.loads(line)["id"]: json.loads(line)["answer"] for line in lines}
    for row in pairs_of(folder):
        assert row["chosen"] == answers[row["id"]] != row["rejected"]
        assert (row["chosen_score"], row["rejected_score"], row["chosen_origin"]) == (1.0, 0.0, "model")
        assert row["images"][0]["bytes"][:4] == b"\x89PNG"
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["rows"] == made.pairs
    assert sum(manifest["splits"]["train"]["shards"].values()) == made.pairs
    assert manifest["synthesis"]["thrown_away"] == made.thrown_away
    assert manifest["synthesis"]["thrown_away_fraction"] == pytest.approx(sum(made.thrown_away.values()) / 48)
    assert manifest["synthesis"]["synthesize.seed"] == 0
    # `train` reads the set like any other.
    trained = tiny_recipe(tmp_path / "runs", "trained", data={"train": made.uri}, optim={"max_steps": 3})
    assert all_data(trained)[0].order.num_rows == made.pairs
    launch_training(trained, QUIET)
    assert len(losses(tmp_path / "runs" / "trained")) == 3
    with pytest.raises(UserError, match=r"another synthetic set; the two differ in data\.eval, synthesize\.seed"):
        synthesize(served_recipe(tmp_path / "runs", "made", path, server.url, min_margin=0.9, seed=1), QUIET)


def test_the_set_is_the_same_for_one_and_two_workers_and_after_a_loss_of_parts(tmp_path: Path) -> None:
    """With a model of its own: candidates are drawn and scored in the workers' processes."""
    path = write_questions(tmp_path / "rows", 30)

    def recipe(name: str, workers: int) -> Recipe:
        fields = {"label": "grounding", "include_answer": True, "other_images": 3, "num_workers": workers}
        return synthesis_recipe(tmp_path / "runs", name, path, model=str(ending_model(tmp_path)), **fields)

    one = synthesize(recipe("one", 1), QUIET)
    two = synthesize(recipe("two", 2), QUIET)
    sets = [set_of(tmp_path / "runs" / name) for name in ("one", "two")]
    assert one.pairs > 10
    assert one.as_json() | {"uri": ""} == two.as_json() | {"uri": ""}
    assert sets[0] == sets[1]
    folder = tmp_path / "runs" / "two"
    for lost in ("manifest.json", "train/00001.parquet", "candidates/00001.jsonl"):
        (folder / "data" / lost).unlink()
    synthesize(recipe("two", 1), QUIET)
    assert set_of(folder) == sets[0]
    (folder / "data" / "synthesis.json").unlink()
    with pytest.raises(UserError, match="holds pairs of `data prepare`"):
        synthesize(recipe("two", 1), QUIET)


def ending_model(folder: Path) -> Path:
    """A tiny model of random weights that ends its answers: each third token is an end."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from orpo_ray.tiny_models.build import resolve

    target = folder / "ending"
    if not target.is_dir():
        source = resolve("orpo-ray/tiny-smolvlm")
        model = AutoModelForImageTextToText.from_pretrained(source)
        model.generation_config.eos_token_id = list(range(0, model.config.get_text_config().vocab_size, 3))
        model.save_pretrained(target)
        AutoProcessor.from_pretrained(source).save_pretrained(target)
    return target


def test_a_killed_command_goes_on_to_the_same_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL to the driver while the server holds back an answer of a later part."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = write_questions(tmp_path / "rows", 50)
    asked: list[int] = []
    released = False

    def reply(body: dict[str, Any]) -> str:
        asked.append(body["seed"])
        wait_until(lambda: released or len(asked) < 150, "the kill", 60)
        return say_a_color(body)

    with serving(reply) as server:
        recipe = served_recipe(tmp_path / "runs", "killed", path, server.url, num_workers=1)
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        command = [sys.executable, "-m", "orpo_ray", "data", "synthesize", str(tmp_path / "recipe.yaml")]
        process = subprocess.Popen(command, env=on_this_cluster(), stderr=subprocess.DEVNULL)
        folder = RunFolder(recipe.run_uri)
        try:
            wait_until(lambda: len(asked) >= 150, "a third part", 240)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            released = True
        done = [part for part in range(5) if read_facts(folder, part) is not None]
        assert 0 < len(done) < 5
        assert not folder.has("data/manifest.json")
        before = {part: os.stat(folder.path / f"data/train/{part:05d}.parquet").st_mtime_ns for part in done}
        synthesize(recipe, QUIET)
        after = {part: os.stat(folder.path / f"data/train/{part:05d}.parquet").st_mtime_ns for part in done}
        assert after == before, "complete parts are not made again"
        uninterrupted = served_recipe(tmp_path / "runs", "whole", path, server.url)
        synthesize(uninterrupted, QUIET)
    assert set_of(folder.path) == set_of(tmp_path / "runs" / "whole")


def test_a_part_that_ends_its_workers_again_and_again_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker is killed when it asks the server."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = write_questions(tmp_path / "rows", 5)
    killed: set[psutil.Process] = set()

    def reply(body: dict[str, Any]) -> str:
        port = int(server.server_address[1])
        for process in set(psutil.Process().children(recursive=True)) - killed:
            with suppress(psutil.Error):
                if any(link.raddr and link.raddr.port == port for link in process.net_connections("tcp4")):
                    process.kill()
                    killed.add(process)
        return say_a_color(body)

    with serving(reply) as server:
        recipe = served_recipe(tmp_path / "runs", "fatal", path, server.url, num_workers=1)
        recipe = recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update={"max_failures": 1})})
        with pytest.raises(PartFailed, match=r"part 0 ended its worker 2 times") as failed:
            synthesize(recipe, QUIET)
        assert len(killed) == 2
        # What the message says to lower can be: the same command then goes on with the set.
        advice = str(failed.value).partition("fix: lower ")[2].partition(", and run the command again")[0]
        raw = recipe.model_dump(mode="json")
        for field in advice.split(" or "):
            section, name = field.split(".")
            raw[section][name] = 1
        lowered = Recipe.model_validate(raw)
        identity = identity_of(lowered, source_rows(lowered), LocalModel(lowered).target)
        check_identity(RunFolder(lowered.run_uri), identity)
        assert advice.count(" or ") == 1


def test_one_server_gives_candidates_and_judges_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = write_questions(tmp_path / "rows", 20)

    def reply(body: dict[str, Any]) -> str:
        if "Answer A: " not in text_of(body):
            return say_a_color(body)
        first, second = answers_of(body)
        return "A" if first > second else "B"  # red before circle before blue

    with serving(reply) as server:
        (tmp_path / "recipe.yaml").write_text(served_recipe(tmp_path / "runs", "judged", path, server.url).to_yaml())
        judge = f"{{url: '{server.url}', model: m}}"
        fields = ["synthesize.label=judge", f"synthesize.judge={judge}"]
        ran = orpo_ray_here("data", "synthesize", str(tmp_path / "recipe.yaml"), *fields, "--json")
    assert ran.returncode == 0, ran.stderr
    made = json.loads(ran.stdout)
    assert made["pairs"] == len(pairs_of(tmp_path / "runs" / "judged")) > 10
    assert {row["chosen"] for row in pairs_of(tmp_path / "runs" / "judged")} == {"red", "circle"}
    assert all(row["chosen"] > row["rejected"] for row in pairs_of(tmp_path / "runs" / "judged"))
    assert f"data.train={made['uri']}" in ran.stderr
    shutil.rmtree(tmp_path / "runs")
    with serving(reply) as server:
        server.statuses = [401] * 99
        failed = orpo_ray_here(
            "data", "synthesize", str(tmp_path / "recipe.yaml"), f"synthesize.server.url={server.url}"
        )
    assert failed.returncode == 2
    assert "synthesize.server.url: the server does not answer: status 401" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_answers_drawn_ahead_come_in_any_order_and_make_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of vLLM's answers, with the processor of `ray.data.llm` that asks a server instead."""
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = write_questions(tmp_path / "rows", 30)
    with serving(say_a_color) as server:

        def request(row: dict[str, Any]) -> dict[str, Any]:
            message = {"role": "user", "content": [{"type": "text", "text": row["prompt"]}]}
            own = {name: row[name] for name in OWN}
            return own | {"payload": {"seed": row["seed"], "max_tokens": 3, "messages": [message]}}

        def answer(row: dict[str, Any]) -> dict[str, Any]:
            text = row["http_response"]["choices"][0]["message"]["content"]
            return {name: row[name] for name in OWN} | {"text": text, "finished": True}

        config = HttpRequestProcessorConfig(url=f"{server.url}/chat/completions", batch_size=4, concurrency=1)
        drawn = served_recipe(tmp_path / "runs", "drawn", path, server.url)
        synthesize(drawn, QUIET)
        ahead = served_recipe(tmp_path / "runs", "ahead", path, server.url, engine="vllm")
        folder, job = RunFolder(ahead.run_uri), Job(ahead.model_dump(mode="json"), source_rows(ahead), frozenset())
        folder.make()
        for parts in ([1], [0, 1, 2]):  # as if interrupted after the first
            draw_ahead(folder, job, parts, build_processor(config, preprocess=request, postprocess=answer))
        asked = len(server.seen)
        made = [PartMaker(job).make(part) for part in range(3)]
    assert len(server.seen) == asked == 2 * 30 * 6, "each answer was asked for once"
    assert sum(part.pairs for part in made) > 5
    for kind in ("train", "candidates"):
        files = [sorted((tmp_path / "runs" / name / "data" / kind).iterdir()) for name in ("drawn", "ahead")]
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


@pytest.mark.parametrize("held_out", ["fraction", "file"])
def test_the_command_that_it_prints_trains_from_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: str
) -> None:
    """With columns of their own, languages and domains, and an evaluation during training."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def renamed_pairs(folder: Path, count: int, split: str) -> Path:
        path = write_pairs(folder, count, split)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for place, row in enumerate(rows):
            row["good"], row["bad"] = row.pop("chosen"), row.pop("rejected")
            row["lang"], row["topic"] = ("de", "fr")[place % 2], "shapes"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        return path

    data: dict[str, Any] = {
        "train": str(renamed_pairs(tmp_path / "rows", 60, "train")),
        "columns": {"chosen": "good", "rejected": "bad"},
        "language": "lang",
        "domain": "topic",
        "weights": {"language": {"de": 2}},
    }
    if held_out == "fraction":
        data["eval_fraction"] = 0.3
    else:
        data["eval"] = str(renamed_pairs(tmp_path / "held", 9, "test"))
    with serving(say_a_color) as server:
        section = {"engine": "server", "server": {"url": server.url, "model": "m"}, "label": "reference"}
        recipe = tiny_recipe(
            tmp_path / "runs", "own", data=data, eval={"every_steps": 5}, synthesize=section | {"candidates": 6}
        )
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        ran = orpo_ray_here("data", "synthesize", str(tmp_path / "recipe.yaml"), "data.max_length=120")
        again = orpo_ray_here("data", "synthesize", str(tmp_path / "recipe.yaml"), "data.max_length=120")
    assert (ran.returncode, again.returncode) == (0, 0), ran.stderr + again.stderr
    line = ran.stderr.splitlines()[-1]
    assert line == again.stderr.splitlines()[-1]
    shutil.rmtree(tmp_path / "rows")
    shutil.rmtree(tmp_path / "held", ignore_errors=True)
    command, train, path, *overrides = shlex.split(line.removeprefix("next").strip())
    assert (command, train) == ("orpo-ray", "train")
    rows, evaluated = run_data(load_recipe(path, overrides))
    assert evaluated is not None
    synthetic = pairs_in(rows)
    held = pairs_in(evaluated)
    assert {pair.language for pair in synthetic} == {pair.language for pair in held} == {"de", "fr"}
    assert {pair.domain for pair in synthetic} == {"shapes"}
    if held_out == "file":
        assert len(held) == 9
    kept_out = {bytes(pair.images[0]["bytes"]) for pair in held}
    assert kept_out.isdisjoint(bytes(pair.images[0]["bytes"]) for pair in synthetic)
    manifest = json.loads((tmp_path / "runs" / "own" / "data" / "manifest.json").read_text())
    assert manifest["splits"]["eval"]["rows"] == len({pair.id for pair in held})


def pairs_in(read: ReadSpec) -> list[PreferencePair]:
    """All pairs of a run's rows."""
    found = [read_pairs(read, shard, np.arange(each.num_rows)) for shard, each in enumerate(read.shards)]
    return [pair for pairs in found for pair in pairs if isinstance(pair, PreferencePair)]


def test_rounds_synthesize_train_and_evaluate(tmp_path: Path) -> None:
    """Two rounds; the same command then finds all of them, and makes nothing again."""
    path, held_out = write_questions(tmp_path / "rows", 30), write_pairs(tmp_path / "held", 12, "test")
    fields = {"label": "grounding", "include_answer": True, "other_images": 3, "rounds": 2, "max_rows": 20}
    raw = synthesis_recipe(tmp_path / "runs", "rounds", path, **fields).model_dump(mode="json")
    raw["model"]["id"] = str(ending_model(tmp_path))
    raw["data"]["eval"] = {str(held_out): 1.0}
    raw["optim"] |= {"max_steps": 4, "learning_rate": 0.01}
    recipe = Recipe.model_validate(raw)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    ran = orpo_ray_here("iterate", str(tmp_path / "recipe.yaml"), "--json")
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "runs" / "rounds"
    table = (folder / "rounds.json").read_bytes()
    (folder / "rounds.json").unlink()
    made = [(folder / f"round-{number}" / "data" / "manifest.json").stat().st_mtime_ns for number in (1, 2)]
    again = orpo_ray_here("iterate", str(tmp_path / "recipe.yaml"), "--json")
    assert again.returncode == 0, again.stderr
    kept = [(folder / f"round-{number}" / "data" / "manifest.json").stat().st_mtime_ns for number in (1, 2)]
    assert kept == made, "the pairs of both rounds are kept"
    assert (folder / "rounds.json").read_bytes() == table
    found = json.loads(ran.stdout)
    assert found == json.loads(again.stdout) == json.loads(table)
    assert [each["round"] for each in found["rounds"]] == [1, 2]
    assert all(each["accuracy"]["pairs"] == 12 for each in found["rounds"])
    assert "change: against the start" in ran.stderr
    assert (folder / "report.html").is_file()
    # Each round trains the model of the round before, on pairs of its own.
    second = yaml.safe_load((folder / "round-2" / "recipe.yaml").read_text())
    assert second["model"]["id"] == str(folder / "round-1" / "final")
    assert list(second["data"]["train"]) == [str(folder / "round-2" / "data" / "train")]
    ids = [{row["id"] for row in pairs_of(folder / f"round-{number}")} for number in (1, 2)]
    assert ids[0] != ids[1]
    # The second round's candidates are those of the first round's model: another one gives other answers and scores.
    one = recipe_of_round(recipe.with_absolute_paths(), 2, str(folder / "round-1" / "final"))
    rows = source_rows(one)
    drawn: dict[str, list[dict[str, Any]]] = {}
    for name, model in (("same", one.model.id), ("start", recipe.model.id)):
        raw = one.model_dump(mode="json") | {"name": name}
        raw["model"]["id"] = model
        maker = PartMaker(Job(Recipe.model_validate(raw).model_dump(mode="json"), rows, frozenset()))
        for part in range(rows.num_parts):
            maker.make(part)
        drawn[name] = lines_of(tmp_path / "runs" / name)
    found = lines_of(folder / "round-2")
    texts = {name: [[each["text"] for each in line["candidates"]] for line in lines] for name, lines in drawn.items()}
    assert [line["candidates"] for line in found] == [line["candidates"] for line in drawn["same"]]
    assert texts["same"] != texts["start"]
