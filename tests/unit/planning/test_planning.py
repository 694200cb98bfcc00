"""Plans: configs of well-known models, the dry run against a real run, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from orpo_ray.cli import app
from orpo_ray.config.field_types import Checkpointing
from orpo_ray.config.load import parse_recipe
from orpo_ray.data.balance import Layout, Packing, PairSize
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.errors import UserError
from orpo_ray.planning import activations
from orpo_ray.planning.activations import PairShape
from orpo_ray.planning.dry_run import Live, dry_run
from orpo_ray.planning.gpus import gpus_with_prices
from orpo_ray.planning.known_shapes import KNOWN_SHAPES
from orpo_ray.planning.plan import Options, plan
from orpo_ray.planning.states import Offload, Weight, Weights, reduce_bucket, states
from support.cover import cover
from support.pairs_by_hand import make_pair, run_as, tiny_pair_model


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    from transformers import AutoModelForImageTextToText

    known = KNOWN_SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(known.config(), dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(known.parameters, rel=0.01)


def some_pairs(family: str) -> PairBatch:
    rng = np.random.default_rng(0)
    return build_batch(
        [make_pair(family, rng, 1, 60, 50, 40, sample_index) for sample_index in range(4)], "response", "shared_prefix"
    )


@pytest.mark.parametrize(
    ("checkpointing", "lora", "family"), cover(["none", "selective", "full"], [False, True], ["smolvlm", "gemma3"])
)
def test_a_dry_run_needs_what_a_real_one_does(checkpointing: Checkpointing, lora: bool, family: str) -> None:
    batch = some_pairs(family)

    def prepared() -> Any:
        model = tiny_pair_model(family, lora=lora, checkpointing=checkpointing)
        run_as(model, "shared_prefix")
        return model

    real_model = prepared()
    with Live() as live:
        for parameter in real_model.parameters():
            live.add(parameter)
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        real = activations.step(real_model, batch, live)
    dry_model = prepared()
    with dry_run() as dry:
        activations.move_from_meta(dry_model)
        for parameter in dry_model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        planned = activations.step(dry_model, batch, dry)
    assert planned.peak == pytest.approx(real.peak, rel=0.05)
    assert planned.saved == pytest.approx(real.saved, rel=0.05)
    assert planned.work.flops > 0


def test_logits_grow_until_a_chunk_is_full() -> None:
    """Qwen2.5's vocabulary in bf16: a chunk of 1 GiB in float32 has 1,765 targets of 304,128 bytes."""
    config = KNOWN_SHAPES["Qwen/Qwen2.5-VL-7B-Instruct"].config()
    assert config.get_text_config().vocab_size == 152_064
    grown = [activations.more_logits(240, pairs, config, torch.bfloat16) for pairs in (1, 2, 100)]
    assert grown == [0, 240 * 304_128, (1765 - 240) * 304_128]
    one = activations.Activations(100, (10, 110, 150, 120), 1000, 1, 50)
    two = one.with_pairs(2, chunked_vision=False, more_logits=7)
    assert (two.saved, two.peaks) == (200, (20, 220, 257, 240))


def test_states_by_hand() -> None:
    """1,000,000 trained and 2,000,000 frozen elements in bf16, on 4 workers."""
    weights = Weights((Weight(10**6, 2 * 10**6, True, True), Weight(2 * 10**6, 4 * 10**6, False, True)), 2, 8)
    plain = states(weights, 0, 4, "adamw")
    assert (plain.weights, plain.gradients, plain.optimizer) == (6 * 10**6, 4 * 10**6, 12 * 10**6)
    assert (plain.buffers, plain.step) == (0, 0)
    assert states(weights, 1, 4, "adamw").optimizer == 3 * 10**6
    assert states(weights, 1, 4, "adamw").gradients == 4 * 10**6
    halved = states(weights, 2, 4, "adamw")
    assert halved.gradients == 10**6  # a quarter, in float32
    assert halved.buffers == (3 * 2 + 4) * 10**6  # two buckets of all that is trained, one flattened, one in float32
    sharded = states(weights, 3, 4, "adamw")
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (1.5 * 10**6, 10**6, 3 * 10**6)
    assert sharded.buffers == (2 + 4 + 4) * 10**6 + 6 * 10**6  # and all weights gathered
    assert sharded.start == 1.5 * 10**6 + 4 * 10**6  # while the largest weight is loaded
    packed = Weights((*weights.each, Weight(10**6, 10**6, False, True, quantized=True)), 2, 8)
    assert states(packed, 3, 4, "adamw").start == 7 * 10**6
    assert states(weights, 0, 1, "adamw_8bit").optimizer == 4 * 10**6 + 2 * (10**6 + 4 * 3907)
    assert states(weights, 0, 1, "paged_adamw_8bit").optimizer == 4 * 10**6


def test_offloaded_states_count_in_main_memory() -> None:
    """All bytes are somewhere, and a recipe's offloading excludes the stages that refuse it."""
    weights = Weights((Weight(10**6, 2 * 10**6, True, True), Weight(2 * 10**6, 4 * 10**6, False, True)), 2, 8)
    plain = states(weights, 3, 4, "adamw")
    both = states(weights, 3, 4, "adamw", Offload(optimizer=True, weights=True))
    assert (both.weights, both.gradients, both.optimizer, both.step) == (0, 0, 0, 0)
    assert both.host == plain.weights + plain.gradients + plain.optimizer
    assert both.start == plain.start - plain.weights
    assert both.buffers == plain.buffers
    second = states(weights, 2, 4, "adamw", Offload(optimizer=True))
    assert (second.gradients, second.optimizer, second.host) == (10**6, 0, 3 * 10**6)
    assert states(weights, 0, 4, "adamw", Offload(optimizer=True)) == states(weights, 0, 4, "adamw")
    assert [Offload(*each).stages[0] for each in ((False, False), (True, False), (True, True))] == [0, 1, 3]


def test_a_reduce_bucket_holds_a_matrix_or_all_that_is_trained() -> None:
    assert reduce_bucket(8192, 10**10) == 8192**2
    assert reduce_bucket(2048, 10**10) == 2**24
    assert reduce_bucket(8192, 10**6) == 10**6


RECIPE = """
name: planned
model: {id: orpo-ray/tiny-smolvlm, lora: {r: 4}}
data: {train: pairs.jsonl, max_length: 2048}
"""


def test_the_command_plans_from_the_data_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    point = {"mean": 30.0, "max": 80.0}
    train = {
        "pairs": 3200,
        "images_per_pair": {"1": 3200},
        "tokens": {"prompt": point, "image": {"mean": 16.0}, "chosen": point, "rejected": point, "sequence": point},
    }
    folder = tmp_path / "runs" / "planned"
    folder.mkdir(parents=True)
    (folder / "data_check.json").write_text(json.dumps({"model": "orpo-ray/tiny-smolvlm", "train": train}))
    result = CliRunner().invoke(app, ["plan", "recipe.yaml", "--json", "--price-per-hour", "L4=0.5", "--mfu", "0.1"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["step"]["source"] == "data check"
    assert (report["step"]["steps"], report["step"]["pair"]["tokens"]) == (100, 90)
    assert 0 < report["model"]["trained"] < report["model"]["parameters"]
    l4 = report["gpus"][0]
    hours = report["step"]["flops_per_step"] * 100 / (121e12 * 0.1) / 3600
    assert (l4["gpu"], l4["fits"]["0"]) == ("L4", True)
    assert l4["recipe"]["cost"] == pytest.approx(hours * 0.5)
    for stage, memory in report["memory"].items():
        parts = sum(size for name, size in memory.items() if name != "total")
        assert parts == pytest.approx(memory["total"]), stage


def test_a_changing_number_of_workers_is_planned_for_the_fewest(tmp_path: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load(RECIPE) | {"checkpoint": {"storage": str(tmp_path)}}
    raw |= {"model": {"id": "orpo-ray/tiny-smolvlm"}}
    one, changing = (plan(parse_recipe(raw | {"scaling": {"num_workers": n}}), Options()) for n in (1, [1, 4]))
    first, *others = changing.pop("assumptions")
    assert first.startswith("scaling.num_workers is 4 at most; the tables are for 1, which needs the most memory")
    assert others == one.pop("assumptions")
    assert changing == one


@pytest.mark.nightly
def test_the_objective_decides_how_many_targets_are_planned_for(tmp_path: Path) -> None:
    """Prompt tokens under the NLL cost the output head something; objectives over the response cost what ORPO does."""
    raw: dict[str, Any] = yaml.safe_load(RECIPE) | {"checkpoint": {"storage": str(tmp_path)}}
    response, prompt, *others = (
        plan(parse_recipe(raw | sections), Options())
        for sections in ({}, {"orpo": {"nll": "prompt+response"}}, {"objective": "cpo"}, {"objective": "simpo"})
    )
    assert prompt["step"]["flops_per_step"] > response["step"]["flops_per_step"]
    for other in others:
        assert other["memory"] == response["memory"]
        assert other["step"]["flops_per_step"] == response["step"]["flops_per_step"]


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
@pytest.mark.parametrize("has_other", [False, True])
def test_a_planned_pair_has_the_tokens_of_a_real_one(layout: Layout, has_other: bool) -> None:
    shape = PairShape(30, 20, 10, 2, 16, {"pixel_values": np.zeros((1, 3, 8, 8), np.uint8)}, has_other)
    size = PairSize.of(shape.pair(99, 0))
    assert shape.tokens(layout) == Packing(1, layout).tokens([size])
    assert size.image_values == (4 if has_other else 2) * 3 * 8 * 8


@pytest.mark.nightly
def test_an_image_preference_is_planned_for(tmp_path: Path) -> None:
    """Another image of the same size, its prompt, and the chosen answer again."""
    raw: dict[str, Any] = yaml.safe_load(RECIPE) | {"checkpoint": {"storage": str(tmp_path)}}
    plain, contrasted = (
        plan(parse_recipe(raw | {"orpo": {"image_beta": beta}}), Options())["step"] for beta in (0.0, 0.1)
    )
    pair = plain["pair"]
    assert contrasted["pair"]["tokens"] == pair["tokens"] + pair["prompt"] + pair["image"] + pair["chosen"]
    assert 1.3 < contrasted["flops_per_step"] / plain["flops_per_step"] < 2


def test_wrong_prices_are_one_message() -> None:
    assert next(gpu for gpu in gpus_with_prices(["h100=2.5"]) if gpu.name == "H100-80GB").price == 2.5
    for wrong in ("A100=2", "T4=1", "H100", "H100=cheap", "=1"):
        with pytest.raises(UserError):
            gpus_with_prices([wrong])
