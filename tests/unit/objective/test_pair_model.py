"""The forward against the plainest one there is: each answer alone, full logits, the processor's own pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.balance import Packing
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.order import Order
from orpo_ray.data.packing import build_batch
from orpo_ray.data.reading import ReadSpec, pair_of, read_windows
from orpo_ray.data.shards import list_file_shards
from orpo_ray.errors import UserError
from orpo_ray.model.loading import is_adapted, load_model, without_adapters
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import ImageNotUsed, PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm, normalize_pixels
from orpo_ray.processing.processor import load_processor
from support.tiny_runs import write_pairs

TINY = "orpo-ray/tiny-smolvlm"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> PairEncoder:
    return PairEncoder(load_processor(TINY, None), max_length=256)


@pytest.fixture(scope="module")
def pairs(encoder: PairEncoder, tmp_path_factory: pytest.TempPathFactory) -> list[EncodedPair]:
    folder = tmp_path_factory.mktemp("pairs")
    segments = list_file_shards(str(write_pairs(folder, 6)), "data.train")
    spec = ReadSpec(tuple(segments), ("trl",), Order((6,), None, 10), 6, 0, 6)
    rows = [pair_of(row) for table in read_windows(spec, [(0, 0)]) for row in table.to_pylist()]
    encoded = encoder.encode_many(rows, [folder] * len(rows))  # type: ignore[arg-type]
    assert all(isinstance(pair, EncodedPair) for pair in encoded)
    return encoded  # type: ignore[return-value]


def model_of(encoder: PairEncoder, **section: object) -> PairModel:
    model = load_model(ModelConfig(**{"id": TINY, **section}), CPU, seed=0)  # type: ignore[arg-type]
    return PairModel(model, PixelNorm.of(encoder.processor))


def plain_logps(model: PairModel, pair: EncodedPair, answer: str) -> torch.Tensor:
    """Log-probs of an answer's tokens, by the transformers model as anyone would call it."""
    base = without_adapters(model.model)
    base.set_attn_implementation("sdpa")  # and stays: gradient checkpointing calls it again in backward
    ids = torch.tensor([[*pair.prompt_ids, *getattr(pair, f"{answer}_ids")]], dtype=torch.long)
    pixels = {}
    if pair.images:
        norm = normalize_pixels(torch.from_numpy(pair.images["pixel_values"]), model.pixel_norm)
        pixels = {"pixel_values": norm.unsqueeze(0)}
    logps = base(input_ids=ids, **pixels).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(pair.prompt_ids) - 1 :, 0]


def test_equals_each_answer_alone(encoder: PairEncoder, pairs: list[EncodedPair]) -> None:
    model = model_of(encoder)
    got = model(build_batch(pairs, "response", model.layout))
    for index, pair in enumerate(pairs):
        torch.testing.assert_close(got.chosen[index], plain_logps(model, pair, "chosen").sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            got.rejected[index], plain_logps(model, pair, "rejected").sum(), rtol=1e-5, atol=1e-5
        )
    assert got.chosen_tokens.tolist() == [len(pair.chosen_ids) for pair in pairs]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_gradients_equal_the_plain_ones(
    encoder: PairEncoder, pairs: list[EncodedPair], checkpointing: bool, lora: dict[str, int] | None
) -> None:
    model = model_of(encoder, gradient_checkpointing=checkpointing, lora=lora)
    logps = model(build_batch(pairs, "response", model.layout))
    loss, _ = ORPO(0.5).loss(logps, torch.ones(len(pairs)), Normaliser(len(pairs)))
    loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got
    model.zero_grad()
    chosen = [plain_logps(model, pair, "chosen") for pair in pairs]
    rejected = [plain_logps(model, pair, "rejected") for pair in pairs]
    sums = [torch.stack([value.sum() for value in values]) for values in (chosen, rejected)]
    counts = [torch.tensor([float(len(value)) for value in values]) for values in (chosen, rejected)]
    logps = PairLogps(sums[0], sums[1], -sums[0], counts[0], counts[1], counts[0])
    expected, _ = ORPO(0.5).loss(logps, torch.ones(len(pairs)), Normaliser(len(pairs)))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_micro_batches_and_fillers_give_the_same_gradient(encoder: PairEncoder, pairs: list[EncodedPair]) -> None:
    def gradients(budget: int, dummy_pairs: list[EncodedPair]) -> dict[str, torch.Tensor]:
        model = model_of(encoder)
        fillers_of = (encoder.dummy_pair(image) for image in (False, True))
        planner = StepPlanner(ORPO(nll="prompt+response"), Packing(budget, model.layout), *fillers_of, CPU)
        plan = planner.plan(planner.share(pairs))
        batches = [
            *plan.batches,
            *(build_batch([], "prompt+response", model.layout, [dummy_pair]) for dummy_pair in dummy_pairs),
        ]
        for batch in batches:
            ORPO(0.5).loss(model(batch), batch.weights, plan.normaliser)[0].backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]

    whole = gradients(1 << 20, [])
    split = gradients(1, [encoder.dummy_pair(True), encoder.dummy_pair(False)])
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gradients_of_three_workers_add_up_to_those_of_one(encoder: PairEncoder, pairs: list[EncodedPair]) -> None:
    """Two of the pairs have other images, so one of the workers has none of them."""
    objective = ORPO(image_beta=0.5, anchor=1.0)
    contrasted = [replace(pairs[i], other_prompt=pairs[i + 1].prompt) if i < 2 else pairs[i] for i in range(6)]

    def gradients(workers: int) -> dict[str, torch.Tensor]:
        model = model_of(encoder)
        planner = StepPlanner.of(objective, 1 << 20, encoder, model, CPU)
        for rank in range(workers):
            plan = planner.plan(planner.share(contrasted, rank=rank, workers=workers))
            for batch in plan.batches:
                objective.loss(model(batch), batch.weights, plan.normaliser)[0].backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]

    one, three = gradients(1), gradients(3)
    for name, gradient in one.items():
        torch.testing.assert_close(three[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_vision_work_is_estimated_from_the_weights(encoder: PairEncoder) -> None:
    """Tiles of 3 x 8 x 8 values become a token of the vision encoder; frozen, it has no backward pass."""
    model = model_of(encoder)
    base = without_adapters(model.model).model
    patches = base.vision_model.embeddings.patch_embedding.weight
    vision, language = (
        sum(weight.numel() for weight in part.parameters() if weight.ndim > 1)
        for part in (base.vision_model, base.text_model.layers)
    )
    assert model.tokens_per_image_value == pytest.approx(vision / patches[0].numel() / language)
    frozen = model_of(encoder, freeze=["vision"])
    assert frozen.tokens_per_image_value == pytest.approx(model.tokens_per_image_value / 3)
    in_16_bits, in_4_bits = (model_of(encoder, lora={"r": 4}, **more) for more in ({}, {"quantization": {}}))
    assert in_4_bits.tokens_per_image_value == in_16_bits.tokens_per_image_value


def test_a_class_token_is_not_taken_for_a_patch(encoder: PairEncoder, folders: dict[str, str]) -> None:
    model = model_of(encoder, id=folders["internvl"])
    base = without_adapters(model.model).model
    vision, language = (
        sum(weight.numel() for weight in part.parameters() if weight.ndim > 1)
        for part in (base.vision_tower, base.language_model.layers)
    )
    assert model.tokens_per_image_value == pytest.approx(vision / (3 * 8 * 8) / language)


def test_an_image_is_encoded_once_per_pair(encoder: PairEncoder, pairs: list[EncodedPair]) -> None:
    model = model_of(encoder)
    seen: list[int] = []
    vision = without_adapters(model.model).model.vision_model
    vision.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state.shape[0]))
    model(build_batch(pairs, "response", model.layout))
    assert seen == [len(pairs)]


def test_images_in_chunks_are_the_same(encoder: PairEncoder, pairs: list[EncodedPair]) -> None:
    """Two tiles of 64 x 64 at a time of six: three calls, the same log-probs and gradients."""
    found = []
    for at_once in (None, 2 * 64 * 64):
        model = model_of(encoder, gradient_checkpointing=True)
        model.pixels_at_once = at_once
        seen: list[int] = []
        vision = without_adapters(model.model).model.vision_model
        vision.register_forward_hook(lambda *args, seen=seen: seen.append(args[2].last_hidden_state.shape[0]))
        logps = model(build_batch(pairs, "response", model.layout))
        logps.chosen.sum().backward()
        found.append((seen, logps.chosen.detach(), vision.embeddings.patch_embedding.weight.grad))
    assert [seen for seen, _, _ in found] == [[6], [2, 2, 2]]
    torch.testing.assert_close(found[1][1:], found[0][1:])


def test_only_target_positions_reach_the_head(encoder: PairEncoder, pairs: list[EncodedPair]) -> None:
    model = model_of(encoder)
    shapes: list[tuple[int, ...]] = []
    without_adapters(model.model).lm_head.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    batch = build_batch(pairs, "response", model.layout)
    model(batch)
    assert [shape[0] for shape in shapes] == [sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)]


def test_the_image_matters(encoder: PairEncoder, pairs: list[EncodedPair]) -> None:
    model = model_of(encoder)
    batch = build_batch(pairs, "response", model.layout)
    before = model(batch).chosen
    batch.images["pixel_values"] = batch.images["pixel_values"].flip(0)
    assert not torch.allclose(before, model(batch).chosen)


@pytest.mark.parametrize("freeze", [[], ["vision"], ["vision", "connector"]])
def test_the_image_gradient_is_checked_frozen_or_not(
    encoder: PairEncoder, pairs: list[EncodedPair], freeze: list[str]
) -> None:
    model = model_of(encoder, freeze=freeze)
    model.watch_images = True
    model(build_batch(pairs, "response", model.layout)).chosen.sum().backward()
    model.check_images_used()
    for part, prefix in (("vision", "model.model.vision_model."), ("connector", "model.model.connector.")):
        trained = [p.grad is not None for name, p in model.named_parameters() if name.startswith(prefix)]
        assert trained
        assert all(trained) is (part not in freeze)


def test_a_loss_without_the_image_is_an_error(encoder: PairEncoder, pairs: list[EncodedPair]) -> None:
    model = model_of(encoder)
    model.watch_images = True
    (model(build_batch(pairs, "response", model.layout)).chosen.sum() * 0).backward()
    with pytest.raises(ImageNotUsed):
        model.check_images_used()


def test_lora_trains_adapters_of_the_language_model_only(encoder: PairEncoder) -> None:
    model = model_of(encoder, lora={"r": 2, "target_modules": []})
    assert is_adapted(model.model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("text_model" in name and "lora_" in name for name in trained)


@pytest.mark.parametrize(
    "section",
    [{"id": "no/such-model-anywhere"}, {"id": "orpo-ray/tiny-none"}, {"id": TINY, "lora": {"target_modules": ["zzz"]}}],
)
def test_what_cannot_be_loaded_is_one_clear_error(section: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"model\."):
        load_model(ModelConfig(**section), CPU, seed=0)  # type: ignore[arg-type]


def test_a_text_only_model_is_no_vlm(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=1)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="not known"):
        load_model(ModelConfig(id=str(tmp_path)), CPU, seed=0)


def test_qwen_s_flattened_patches_are_normalized_by_channel() -> None:
    """Its image processor lays an image out as [patches, channel x frame x height x width]."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.uint8))
    own = processor([image], return_tensors="pt")["pixel_values"]
    raw = processor([image], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    norm = PixelNorm(processor.rescale_factor, tuple(processor.image_mean), tuple(processor.image_std))
    torch.testing.assert_close(normalize_pixels(raw.to(torch.uint8), norm), own)
