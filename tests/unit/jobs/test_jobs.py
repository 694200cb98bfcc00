"""What a job is checked for before anything is uploaded."""

from __future__ import annotations

import io
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE
from rich.console import Console

from orpo_ray.config.load import load_recipe
from orpo_ray.errors import UserError
from orpo_ray.jobs.cost import cost_lines
from orpo_ray.jobs.runtime_env import read_runtime_env
from orpo_ray.jobs.submit import JobOptions, Prepared, connect, prepare_job
from orpo_ray.jobs.working_dir import list_upload
from support.commands import orpo_ray_here
from support.tiny_runs import tiny_recipe


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(Path("/shared/runs"), "job").to_yaml())
    return tmp_path


def prepare(project: Path, *overrides: str, **options: Any) -> Prepared:
    recipe = project / "recipe.yaml"
    console = Console(file=io.StringIO())
    options = {"working_dir": str(project), **options}
    return prepare_job(recipe, overrides, load_recipe(recipe, overrides), JobOptions(**options), console)


def test_a_job_is_a_command_that_any_shell_reads_as_given(project: Path) -> None:
    prepared = prepare(project, "data.train=a b.jsonl", command="data check")
    assert prepared.entrypoint.line == "python -m orpo_ray data check recipe.yaml 'data.train=a b.jsonl'"
    assert prepared.runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "660"}
    assert prepared.runtime_env["working_dir"] == str(project)


@pytest.mark.parametrize(
    ("command", "overrides", "line", "resources"),
    [
        ("evaluate", [], "evaluate /shared/runs/job", {"entrypoint_num_gpus": 0}),
        (
            "evaluate --generate 8 --by 'a b'", ["scaling.accelerator_type=L4", "scaling.labels.zone=a"],
            "evaluate /shared/runs/job --generate 8 --by 'a b'",
            {"entrypoint_num_gpus": 1, "entrypoint_resources": {"accelerator_type:L4": 0.001},
             "entrypoint_label_selector": {"zone": "a"}},
        ),
        ("evaluate data.eval=x", ["scaling.gpus_per_worker=1"], "evaluate /shared/runs/job data.eval=x",
         {"entrypoint_num_gpus": 1}),
        ("evaluate --workers 2", ["scaling.gpus_per_worker=1"], "evaluate /shared/runs/job --workers 2",
         {"entrypoint_num_gpus": 0}),
        ("evaluate --workers 2 --judge-model m", ["scaling.gpus_per_worker=1"],
         "evaluate /shared/runs/job --workers 2 --judge-model m", {"entrypoint_num_gpus": 1}),
        ("evaluate", ["checkpoint.storage=~/a/./b"], 'evaluate "$HOME"/a/b/job', {"entrypoint_num_gpus": 0}),
        ("export --adapter", ["checkpoint.storage=s3://b/runs"], "export s3://b/runs/job --adapter",
         {"entrypoint_num_gpus": 0}),
        ("export", ["checkpoint.storage=my runs"], "export \"$HOME\"/'my runs/job'", {"entrypoint_num_gpus": 0}),
    ],
)  # fmt: skip
def test_the_run_of_a_recipe_is_evaluated_and_exported_where_its_job_has_written_it(
    project: Path, command: str, overrides: list[str], line: str, resources: dict[str, Any]
) -> None:
    entrypoint = prepare(project, *overrides, command=command).entrypoint
    assert entrypoint.line == f"python -m orpo_ray {line}"
    assert entrypoint.resources == resources


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpoint.storage=runs", "scaling.gpus_per_worker=1"], "would run on another node"),
        (["checkpoint.storage=~somebody/runs"], "another user's folder"),
    ],
)
def test_an_evaluation_that_would_not_find_its_run_is_refused(project: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepare(project, *overrides, command="evaluate")


def test_a_folder_above_rays_limit_is_refused_with_what_is_large(project: Path) -> None:
    (project / "data").mkdir()
    with (project / "data" / "pairs.parquet").open("wb") as file:
        file.truncate(GCS_STORAGE_MAX_SIZE)  # without its blocks on the disk
    with pytest.raises(UserError, match=r"Ray takes less than 512 MiB; the largest: data/ 512 MiB, recipe.yaml"):
        prepare(project)
    (project / ".rayignore").write_text("data/\n")
    prepare(project)


def test_what_git_ignores_and_secret_files_are_not_uploaded(project: Path) -> None:
    for name in (".env", "runs/x/checkpoint", ".venv/bin/python", "keys/id_rsa", "code.py", ".aws/credentials"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    (project / ".gitignore").write_text("runs/\n")
    upload = list_upload(project, prepare(project).runtime_env["excludes"])
    assert set(upload.sizes) == {"recipe.yaml", "code.py", ".gitignore"}


@pytest.mark.parametrize(
    ("overrides", "environment", "said"),
    [
        (["data.train=s3://key:secret@bucket/x"], {}, "command line: holds a password in an address"),
        (["tracking.wandb.entity=0123456789abcdef"], {"WANDB_API_KEY": "0123456789abcdef"}, "of WANDB_API_KEY,"),
        (["data.train=https://x/y?X-Amz-Signature=0"], {}, "a signed address"),
        (["name=hf_abcdefghijklmnopqrstuv"], {}, "a token of the Hugging Face hub"),
    ],
)  # fmt: skip
def test_secrets_stay_out_of_what_ray_stores(
    project: Path, overrides: list[str], environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        prepare(project, *overrides)
    assert said in str(error.value)
    assert "0123456789abcdef" not in str(error.value)
    assert "give it to the cluster's nodes" in str(error.value)


@pytest.mark.parametrize(
    ("runtime_env", "said"),
    [
        ({"env_vars": {"HF_TOKEN": "hf"}}, "env_vars.HF_TOKEN: is a secret by its name"),
        ({"pipp": []}, "pipp: unknown field of a runtime environment"),
        ({"pip": {"packages": "none.txt"}}, "Ray does not take it"),
        ({"working_dir": "."}, "is set by --working-dir"),
        ([1], "must be a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_runtime_environment_is_checked(project: Path, runtime_env: Any, said: str) -> None:
    text = runtime_env if isinstance(runtime_env, str) else yaml.safe_dump(runtime_env)
    (project / "env.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        prepare(project, runtime_env=str(project / "env.yaml"))
    assert said in str(error.value)


def test_a_variable_that_each_node_fills_in_is_no_secret(project: Path) -> None:
    (project / "cluster").mkdir()
    (project / "cluster" / "runtime_env.yaml").write_text(yaml.safe_dump({"env_vars": {"HF_TOKEN": "${HF_TOKEN}"}}))
    recipe = load_recipe(project / "recipe.yaml")
    assert read_runtime_env(None, project, recipe)["env_vars"]["HF_TOKEN"] == "${HF_TOKEN}"
    assert "HF_TOKEN" not in read_runtime_env("none", project, recipe)["env_vars"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["submit", "none.yaml"], "no such recipe"),
        (["submit", "recipe.yaml", "--command", "evil"], "--command: cannot be submitted"),
        (["submit", "recipe.yaml", "--command", "train '"], "--command: cannot be submitted"),
        (["submit", "recipe.yaml", "--working-dir", "sub"], "the recipe is not among the files that are uploaded"),
        (["submit", "recipe.yaml", "--working-dir", "none"], "--working-dir: no such folder"),
        (["submit", "recipe.yaml", "--address", "ray://x:1"], "must be the URL of a Ray dashboard"),
        (["doctor", "none.yaml"], "no such recipe"),
    ],
)
def test_wrong_input_is_one_message(project: Path, arguments: list[str], said: str) -> None:
    (project / "sub").mkdir()
    result = orpo_ray_here(*arguments, cwd=project)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_an_address_where_nothing_answers_is_one_message() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"no Ray dashboard answers at this address.*\n.*ssh -N -L 8265"):
        connect(f"127.0.0.1:{port}", Console(file=io.StringIO()))


def test_the_cost_is_that_of_the_plan(project: Path) -> None:
    def lines(*overrides: str) -> list[str]:
        return cost_lines(load_recipe(project / "recipe.yaml", overrides), ["L4=0.5", "H100=9"])

    assert lines("scaling.gpus_per_worker=0") == ["not estimated: the recipe trains on CPUs"]
    (line,) = lines("scaling.accelerator_type=L4")
    assert line.endswith("on 1 x L4 ($0.50 per GPU and hour)")
    (line,) = lines("scaling.accelerator_type=A100-80G")
    assert "1 x A100-80GB" in line
    assert lines("scaling.accelerator_type=TPU-V4") == ["not estimated: `orpo-ray plan` knows no TPU-V4"]
    with pytest.raises(UserError, match="--price-per-hour"):
        cost_lines(load_recipe(project / "recipe.yaml"), ["L4=free"])


def test_the_cost_of_a_sweep_is_that_of_all_trials_and_of_an_iteration_that_of_all_rounds(project: Path) -> None:
    def cost(command: str, *overrides: str) -> list[str]:
        large = ["optim.max_steps=200000", "scaling.accelerator_type=L4", *overrides]
        (line,) = cost_lines(load_recipe(project / "recipe.yaml", large), ["L4=3"], command)
        return [*re.findall(r"\$(\d+\.\d\d)(?! per)", line), line]

    one, _ = cost("train")
    each, most, line = cost("tune", "tune.num_trials=16")
    assert each == one
    assert float(most) == pytest.approx(16 * float(one), abs=0.09)  # both are rounded
    assert line.startswith("16 trials, each about ")
    *_, most, line = cost("tune", "tune.searcher=grid", "tune.search={orpo.beta: {choices: [0.1, 0.2, 0.3]}}")
    assert float(most) == pytest.approx(3 * float(one), abs=0.02)
    *_, most, line = cost("tune", "tune.num_trials=16", "tune.max_cost=0.05")
    assert (most, line.partition(": ")[2]) == ("0.05", "at most $0.05, where tune.max_cost ends the search")
    _, most, line = cost("iterate", "synthesize.rounds=5")
    assert float(most) == pytest.approx(5 * float(one), abs=0.03)
    assert line.endswith("synthesis not included")
    with pytest.raises(UserError, match=r"tune\.search"):
        cost("tune", "tune.search={orpo.nothing: {choices: [1, 2]}}")
