"""Time of a step: products and traffic by hand, and orders that an expert expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.schema import LoraConfig, ModelConfig, QuantizationConfig
from orpo_ray.errors import UserError
from orpo_ray.planning.activations import PairShape, batch_of, measure, unloaded_model
from orpo_ray.planning.dry_run import dry_run
from orpo_ray.planning.gpus import GPUS, Gpu
from orpo_ray.planning.images import image_shape
from orpo_ray.planning.known_shapes import KNOWN_SHAPES
from orpo_ray.planning.plan import Options, plan
from orpo_ray.planning.states import Weight, Weights
from orpo_ray.planning.step_time import Load, Rates, parse_rates, step_time
from orpo_ray.planning.traffic import collectives
from orpo_ray.planning.work import Matmul, Work

GPU = Gpu("GPU", 80, 100e12, 1e12, 100, 1.0, 100e9, 10e9, 1.0)
RATES = Rates(attention=0.5, memory=1.0, dequantization=0.5, kernel_us=0.0, link=1.0, overlap=0.5, imbalance=0.0)
FROZEN = Weights((Weight(10**6, 2 * 10**6, False, True),), 2, 8)


def seconds(work: Work, pairs: int = 1, weights: Weights = FROZEN, load: Load | None = None, **rates: Any) -> Any:
    given = Rates(**{**RATES.__dict__, **rates})
    return step_time(work, weights, "adamw", load or Load(0, 1, pairs, pairs), GPU, given)


def test_a_product_by_hand() -> None:
    """100 processors and tiles of 128 x 128: 1,280 x 1,280 fills each once, 1,281 rows need a second round."""
    full = Matmul(1, 1280, 1280, 4096, "m")
    assert seconds(Work({full: 1})).matmul == pytest.approx(full.flops / 100e12)
    more = Matmul(1, 1281, 1280, 4096, "m")
    assert seconds(Work({more: 1})).matmul == pytest.approx(2 * full.flops / 100e12)
    # 640 rows: two processors share each of 50 tiles, unless the inner size is too small to be shared. Then 200 small
    # tiles use all processors, at 0.55 of the speed.
    for inner, speed in ((4096, 1.0), (512, 0.55)):
        half = Matmul(1, 640, 1280, inner, "m")
        assert seconds(Work({half: 1})).matmul == pytest.approx(half.flops / (100e12 * speed))
    # One row: its time is that of reading the weight.
    assert seconds(Work({Matmul(1, 1, 4096, 4096, "m"): 1})).matmul == pytest.approx(2 * (4096**2 + 2 * 4096) / 1e12)


def test_products_grow_where_the_pairs_are() -> None:
    assert Matmul(1, 10, 20, 30, "m").with_pairs(3) == Matmul(1, 30, 20, 30, "m")
    assert Matmul(1, 10, 20, 30, "k").with_pairs(3) == Matmul(1, 10, 20, 90, "k")
    assert Matmul(4, 10, 20, 30, "batch").with_pairs(3) == Matmul(12, 10, 20, 30, "batch")


def test_other_parts_by_hand() -> None:
    work = Work({}, attention_flops=10**12, moved=10**9, moved_once=10**9, kernels=1000)
    found = seconds(work, pairs=4)
    assert found.attention == pytest.approx(4 * 10**12 / 50e12)
    assert found.memory == pytest.approx((4 + 1) * 1e-3)
    assert found.launch == 0
    # 1,000 kernels of 100 us take 100 ms, of which the GPU computes 80 + 5.
    assert seconds(work, pairs=4, kernel_us=100.0).launch == pytest.approx(0.1 - found.attention - found.memory)
    # Three micro-batches of 2, 2 and 1 pairs.
    found = seconds(work, load=Load(0, 1, 5, 2))
    assert (found.memory, found.attention) == (pytest.approx((5 + 3) * 1e-3), pytest.approx(5 * 10**12 / 50e12))


def test_4_bit_weights_are_unpacked_whenever_they_are_used() -> None:
    packed = Weights((Weight(4096**2, 4096**2 // 2, False, True, quantized=True),), 2, 8)
    work = Work({Matmul(1, 100, 4096, 4096, "m"): 3, Matmul(1, 100, 16, 4096, "m"): 3})
    assert seconds(work, weights=packed).dequantization == pytest.approx(3 * 4096**2 * 2.5 / 0.5e12)
    assert seconds(work).dequantization == 0


def test_traffic_by_hand() -> None:
    """1,000,000 trained weights of 2 bytes on 4 workers, at 100 GB/s within a node and 10 GB/s between two."""
    weights = Weights((Weight(10**6, 2 * 10**6, True, True),), 2, 8)
    work = Work({}, moved=10**9)
    reduced = 2 * 3 / 4 * 4e6 / 100e9
    assert seconds(work, weights=weights, load=Load(0, 4, 1, 1)).communication == pytest.approx(reduced)
    assert seconds(work, weights=weights, load=Load(0, 1, 1, 1)).communication == 0
    sharded = seconds(work, weights=weights, load=Load(2, 4, 1, 1))
    assert seconds(work, weights=weights, load=Load(2, 4, 1, 1), overlap=1.0).communication == 0
    assert sharded.communication == pytest.approx(
        seconds(work, weights=weights, load=Load(1, 4, 1, 1)).communication / 2
    )
    between = seconds(work, weights=weights, load=Load(0, 16, 1, 1)).communication
    assert between == pytest.approx(2 * 15 / 16 * 4e6 / 10e9)
    assert seconds(work, weights=weights, load=Load(0, 16, 1, 1), network_gbit=8.0).communication > 9 * between


def test_zero_3_gathers_large_models_twice_per_microbatch() -> None:
    """Small weights are gathered once a step; a model of at most a billion weights stays gathered until backward."""
    for elements, times in ((10**9 - 8, 1), (2 * 10**9, 2)):
        weights = Weights((Weight(elements, 2 * elements, True, True), Weight(8, 16, True, False)), 2, 8)
        gathered, reduced = collectives(weights, 3, microbatches=3)
        assert (gathered.kind, gathered.payload) == ("all-gather", times * 3 * 2 * elements + 16)
        assert (reduced.kind, reduced.payload) == ("reduce-scatter", 3 * 4 * (elements + 8))


def test_attention_is_counted_although_it_runs_on_a_cpu() -> None:
    """Two heads of 8 tokens, head size 4. Forward has two products of 2 x 8 x 8 x 4 FLOPs per head, backward five."""
    with dry_run() as dry:
        query, key, value = (torch.empty(1, 2, 8, 4, requires_grad=True) for _ in range(3))
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
        work = dry.work.total()
    assert work.attention_flops == 2 * (2 + 5) * 2 * 8 * 8 * 4


def test_the_dry_run_finds_products_and_memory_traffic() -> None:
    """A linear layer of 32 x 16 on 8 rows, forward and backward, and an addition."""
    with dry_run() as dry:
        layer = torch.nn.Linear(16, 32, bias=False)
        dry.work.watch(layer)
        rows = torch.empty(8, 16, requires_grad=True)
        before = dry.work.total()
        (layer(rows) + 1.0).sum().backward()
        work = dry.work.total().plus(before, -1)
    assert work.matmuls == {
        Matmul(1, 8, 32, 16, "m"): 1,
        Matmul(1, 8, 16, 32, "m"): 1,
        Matmul(1, 32, 16, 8, "k"): 1,
    }
    assert work.flops == 3 * 2 * 8 * 16 * 32
    # The addition, the sum, and their gradients read and write 8 x 32 float32 at most three times each.
    assert 3 * 4 * 8 * 32 <= work.moved <= 12 * 4 * 8 * 32
    assert 5 <= work.kernels <= 8


@pytest.fixture(scope="module")
def llava() -> dict[str, tuple[Work, Weights]]:
    """Work of a pair, and weights, of LLaVA-1.6-Mistral 7B tuned in three ways, without checkpointing."""
    config = KNOWN_SHAPES["llava-hf/llava-v1.6-mistral-7b-hf"].config()
    image = image_shape(config)
    pair = batch_of(PairShape(60, 120, 120, 1, image.tokens, image.vision), 1, config, "response", "shared_prefix")
    lora = LoraConfig(r=16)
    ways = {
        "full": ModelConfig(id="x", gradient_checkpointing="none"),
        "lora": ModelConfig(id="x", lora=lora, gradient_checkpointing="none"),
        "qlora": ModelConfig(id="x", lora=lora, quantization=QuantizationConfig(), gradient_checkpointing="none"),
    }
    found: dict[str, tuple[Work, Weights]] = {}
    for name, section in ways.items():
        model = unloaded_model(section, config, torch.bfloat16, "shared_prefix")
        weights = Weights.of(model, section, torch.bfloat16, config.get_text_config().hidden_size)
        # 4 bits change the time of a step, not its work.
        known = found["lora"][0] if name == "qlora" else None
        found[name] = (
            known or measure(section, config, torch.bfloat16, "shared_prefix", pair, True, "cuda").work,
            weights,
        )
    return found


def estimated(case: tuple[Work, Weights], load: Load) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step, and MFU, by GPU type."""
    times = {gpu.name: step_time(*case, "adamw", load, gpu, Rates()).total for gpu in GPUS}
    return times, {gpu.name: case[0].flops * load.pairs / (times[gpu.name] * gpu.flops) for gpu in GPUS}


def test_full_training_on_eight_gpus(llava: dict[str, tuple[Work, Weights]]) -> None:
    times, mfu = estimated(llava["full"], Load(3, 8, 8, 4))
    # An L40S has more FLOP/s on paper than an A100, but half the bandwidth, a third of the power, and no NVLink.
    assert times["A100-80GB"] < times["L40S"]
    assert mfu["L40S"] < mfu["A100-80GB"]
    assert 1.7 < times["A100-80GB"] / times["H100-80GB"] < 989 / 312
    assert times["H200-141GB"] < times["H100-80GB"]
    assert 0.3 < mfu["H100-80GB"] < mfu["A100-80GB"] < 0.6


def test_4_bits_cost_time_and_more_so_with_few_pairs(llava: dict[str, tuple[Work, Weights]]) -> None:
    few, many = (
        {name: estimated(llava[name], Load(0, 1, pairs, pairs))[0] for name in ("lora", "qlora")} for pairs in (1, 8)
    )
    for gpu in GPUS:
        slower = [each["qlora"][gpu.name] / each["lora"][gpu.name] for each in (few, many)]
        assert 2 > slower[0] > slower[1] > 1, gpu.name


def test_microbatches_of_one_pair_are_less_efficient_than_of_eight(llava: dict[str, tuple[Work, Weights]]) -> None:
    for name in ("lora", "qlora"):
        one, eight = (estimated(llava[name], Load(0, 1, 8, pairs))[1] for pairs in (1, 8))
        assert all(one[gpu.name] < eight[gpu.name] for gpu in GPUS), name


def by_gpu(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["gpu"]: each for each in report["gpus"]}


TINY = {
    "name": "planned",
    "model": {"id": "orpo-ray/tiny-smolvlm"},
    "data": {"train": "pairs.jsonl", "max_length": 2048},
}


def test_checkpointing_costs_time_and_not_model_flops(tmp_path: Path) -> None:
    found = {}
    for checkpointing in ("none", "full"):
        model = TINY["model"] | {"gradient_checkpointing": checkpointing}
        raw = TINY | {"model": model, "checkpoint": {"storage": str(tmp_path)}}
        found[checkpointing] = plan(parse_recipe(raw), Options(assume=["kernel_us=0"]))
    steps = [each["step"] for each in found.values()]
    assert steps[0]["flops_per_step"] == steps[1]["flops_per_step"]
    assert steps[0]["recomputed_flops_per_step"] == 0 < steps[1]["recomputed_flops_per_step"]
    assert by_gpu(found["full"])["L4"]["mfu"] < by_gpu(found["none"])["L4"]["mfu"]


def test_rates_are_printed_and_can_be_given(tmp_path: Path) -> None:
    raw = TINY | {"checkpoint": {"storage": str(tmp_path)}}
    report = plan(parse_recipe(raw), Options(assume=["matmul=0.1", "kernel_us=0"]))
    assert (report["rates"]["matmul"]["L4"], report["rates"]["kernel_us"], report["rates"]["overlap"]) == (0.1, 0, 0.5)
    slow, usual = by_gpu(report), by_gpu(plan(parse_recipe(raw), Options(assume=["kernel_us=0"])))
    assert slow["L4"]["step_seconds"]["matmul"] > usual["L4"]["step_seconds"]["matmul"]
    assert all(each["step_seconds"]["launch"] == 0 for each in slow.values())


@pytest.mark.parametrize("given", ["matmul=2", "overlap=-1", "link", "speed=1", "memory=0", "kernel_us=fast"])
def test_wrong_rates_are_one_message(given: str) -> None:
    with pytest.raises(UserError, match="--assume"):
        parse_rates([given])
