"""Every family against its own processor and forward pass; freezing of parts; unknown families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.packing import build_batch
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.errors import UserError
from orpo_ray.model import shared_prefix
from orpo_ray.model.families.derived import DerivedFamily
from orpo_ray.model.families.registry import FAMILIES, family_of
from orpo_ray.model.loading import _freeze
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.processing.pixel_norm import PixelNorm, normalize_pixels
from orpo_ray.processing.processor import load_processor
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.cover import cover
from support.families import tiny_unknown, with_processor
from support.pairs_by_hand import (
    NORM,
    assert_equal,
    image_token_of,
    layouts_of,
    make_pair,
    run,
    run_as,
    tiny_pair_model,
)


def processor_of(family: str) -> Any:
    return load_processor(f"orpo-ray/tiny-{family}", None)


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Return a noise image: with a single color, the gradient of attention would consist of rounding errors."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def png(image: Image.Image) -> dict[str, Any]:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


IMAGES = {
    "one": [noise(40, 30, 0)],
    "wide": [noise(64, 30, 1)],
    "two": [noise(40, 30, 2), noise(30, 60, 3)],
    "none": [],
}


def pair_of(name: str) -> PreferencePair:
    content = [{"type": "image"}] * len(IMAGES[name]) + [{"type": "text", "text": "what color is the shape?"}]
    prompt = [{"role": "user", "content": content}]
    return PreferencePair(name, [png(image) for image in IMAGES[name]], prompt, "teal", "a red shape")


def own_inputs(family: str, processor: Any, pair: PreferencePair, encoded: EncodedPair, answer: str) -> dict[str, Any]:
    """Return the inputs of the family's own forward pass for prompt + answer, from its own processor, normalized."""
    text = processor.apply_chat_template(pair.prompt, add_generation_prompt=True, tokenize=False)
    images = IMAGES[pair.id]
    answer_ids = torch.from_numpy(getattr(encoded, f"{answer}_ids").astype(np.int64)).unsqueeze(0)
    if family == "idefics":
        # Idefics takes texts and images in turn, and adds bos and the tokens around images itself.
        plain = text.removeprefix("<s>").replace("<fake_token_around_image>", "").split("<image>")
        pieces = [plain[0], *(part for pair in zip(images, plain[1:], strict=True) for part in pair if part != "")]
        inputs = processor(text=[pieces], add_end_of_utterance_token=False, return_tensors="pt")
    elif images:
        inputs = processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
    else:  # some processors require images
        inputs = processor.tokenizer([text], add_special_tokens=False, return_tensors="pt")
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        if family != "paligemma":
            inputs.pop("token_type_ids")
    inputs = {name: value for name, value in inputs.items() if name not in ("attention_mask", "num_crops", "labels")}
    torch.testing.assert_close(inputs["input_ids"], torch.from_numpy(encoded.prompt_ids.astype(np.int64)).unsqueeze(0))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_ids], dim=1)
    length = answer_ids.shape[1]
    for name in ("cross_attention_mask", "image_attention_mask"):
        if name in inputs:
            last = inputs[name][:, -1:]
            inputs[name] = torch.cat([inputs[name], last.expand(-1, length, *last.shape[2:])], dim=1)
    for name, value in (("token_type_ids", int(family == "paligemma")), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full((1, length), value)], dim=1)
    return inputs


@pytest.mark.parametrize("family", with_processor())
def test_the_reference_is_the_family_s_own_processor_and_forward(family: str) -> None:
    """Both layouts, with pairs of one, two and no images in a batch, against a plain forward pass of each answer."""
    processor = processor_of(family)
    encoder = PairEncoder(processor, max_length=512)
    pairs = [pair_of(name) for name in IMAGES]
    encoded = encoder.encode_many(pairs, [None] * len(pairs))
    assert all(isinstance(pair, EncodedPair) for pair in encoded), encoded
    assert all((~pair.prompt_is_text).any() == bool(IMAGES[pair.id]) for pair in encoded)
    model = PairModel(TINY_FAMILIES[family]().model().eval(), PixelNorm.of(processor))
    shared_prefix.register()
    for layout in layouts_of(family):
        with torch.no_grad():
            run_as(model, layout)
            got = model(build_batch(encoded, "response", layout, collate=model.family.collate))
            run_as(model, "concatenated")
            model.model.set_attn_implementation({"vision_config": "sdpa"})  # the library's own
            for index, (pair, own) in enumerate(zip(pairs, encoded, strict=True)):
                for answer in ("chosen", "rejected"):
                    inputs = own_inputs(family, processor, pair, own, answer)
                    logps = model.model(**inputs).logits[0, :-1].float().log_softmax(-1)
                    ids = inputs["input_ids"][0, 1:, None]
                    expected = logps.gather(1, ids)[len(own.prompt_ids) - 1 :, 0].sum()
                    found = getattr(got, answer)[index]
                    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, msg=f"{layout} {pair.id}")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_row_of_many_is_each_pair_alone(family: str) -> None:
    """Without a processor: images of all sizes that the family supports, text-only pairs between them, both layouts."""
    model = tiny_pair_model(family)
    rng = np.random.default_rng(0)
    lengths = [(1, 5, 7, 3), (0, 6, 5, 4), (3, 2, 1, 9), (2, 8, 4, 4)]
    pairs = [make_pair(family, rng, *each, sample_index) for sample_index, each in enumerate(lengths)]
    for layout in layouts_of(family):
        whole = run(model, pairs, layout)[0]
        for index, pair in enumerate(pairs):
            alone = run(model, [pair], "concatenated")[0]
            for answer in ("chosen", "rejected"):
                torch.testing.assert_close(
                    getattr(whole, answer)[index], getattr(alone, answer)[0], rtol=2e-5, atol=2e-5,
                    msg=f"{layout} {answer} {index}",
                )  # fmt: skip


def test_an_image_of_one_token_is_encoded_alone_as_beside_another() -> None:
    """Transformers' Mistral3 drops a dimension of it."""
    model = TINY_FAMILIES["mistral3"]().model().eval()
    side = model.config.vision_config.patch_size * model.config.spatial_merge_size
    pixels = torch.rand(1, 3, side, side)
    sizes = torch.tensor([[side, side]])
    encode = family_of(model.config).encode_images
    with torch.no_grad():
        (alone,) = encode(model, {"pixel_values": pixels, "image_sizes": sizes}).pooler_output
        both = encode(
            model, {"pixel_values": pixels.repeat(2, 1, 1, 1), "image_sizes": sizes.repeat(2, 1)}
        ).pooler_output
    assert alone.shape[0] == 1
    torch.testing.assert_close(alone, both[1])


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_images_reach_the_loss_and_the_connector(family: str) -> None:
    """Exchanging two images changes the chosen answers' log-probs; the connector has a gradient."""
    model = tiny_pair_model(family)
    layout = layouts_of(family)[0]
    rng = np.random.default_rng(1)
    one = make_pair(family, rng, 1, 4, 6, 5)
    before = run(model, [one], layout)
    connector = [g for name, g in before[2].items() if name.startswith(connector_of(family))]
    assert connector
    assert any(gradient.abs().max() > 0 for gradient in connector)
    changed = dict(one.images)
    changed["pixel_values"] = 255 - changed["pixel_values"]
    after = run(model, [EncodedPair(**{**vars(one), "images": changed})], layout)
    assert (after[0].chosen - before[0].chosen).abs() > 1e-4


def connector_of(family: str) -> tuple[str, ...]:
    facts = family_of(TINY_FAMILIES[family]().config())
    return tuple(f"model.{prefix}" for prefix in facts.connector)


def test_placeholders_are_where_the_processor_put_images() -> None:
    assert image_token_of("idefics") == processor_of("idefics").image_token_id
    assert image_token_of("mllama") == processor_of("mllama").image_token_id


@pytest.mark.parametrize(("family", "part"), cover(list(TINY_FAMILIES), ["vision", "connector", "language"]))
def test_freezing_a_part_leaves_the_others(family: str, part: Any) -> None:
    model = TINY_FAMILIES[family]().model().requires_grad_(True)
    facts = family_of(model.config)
    _freeze(model, ModelConfig(id="x", freeze=[part]), facts)

    def part_of(name: str) -> str:  # the connector first, since it can be inside the vision encoder
        return next((p for p in ("connector", "vision") if name.startswith(facts.prefixes(p))), "language")

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part_of(name) != part), name


def test_an_unknown_family_is_derived_and_gives_what_its_own_forward_gives() -> None:
    """Aya Vision scales the logits of its head, which orpo-ray must find out by itself."""
    model = tiny_unknown("aya_vision")
    assert model.config.model_type not in FAMILIES
    facts = family_of(model.config)
    assert isinstance(facts, DerivedFamily)
    assert facts.vision == ("model.vision_tower.",)
    assert facts.connector == ("model.multi_modal_projector",)
    pair_model = PairModel(model.train(), NORM)
    assert pair_model.layout == "concatenated"
    pair = make_pair("llava", np.random.default_rng(0), 1, 6, 5, 4)
    tokens = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2 // 4
    ids = pair.prompt_ids.tolist()
    first = ids.index(model.config.image_token_id)
    short = np.asarray(ids[:first] + ids[first + 16 - tokens :], np.int32)
    pair = EncodedPair(**{**vars(pair), "prompt_ids": short, "prompt_is_text": short != model.config.image_token_id})
    got = run(pair_model, [pair], "concatenated")
    with torch.no_grad():
        pixels = normalize_pixels(torch.from_numpy(pair.images["pixel_values"]), NORM)
        for answer in ("chosen", "rejected"):
            row = torch.tensor([[*pair.prompt_ids, *getattr(pair, f"{answer}_ids")]], dtype=torch.long)
            logps = model(input_ids=row, pixel_values=pixels).logits[0, :-1].log_softmax(-1)
            expected = logps.gather(1, row[0, 1:, None])[len(short) - 1 :, 0].sum()
            torch.testing.assert_close(getattr(got[0], answer)[0], expected, rtol=1e-5, atol=1e-5)
    assert any(gradient.abs().max() > 0 for name, gradient in got[2].items() if "projector" in name)


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [("llama", "no image-text-to-text"), ("kosmos-2", "get_image_features|encoded before|cannot be told")],
)
def test_what_cannot_be_derived_says_what_is_missing(model_type: str, missing: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(UserError, match=missing):
        family_of(AutoConfig.for_model(model_type))


def test_two_results_that_differ_are_not_equal() -> None:
    """The comparison in this file and in test_shared_prefix can fail."""
    model = tiny_pair_model("llava")
    pair = make_pair("llava", np.random.default_rng(0), 1, 5, 4, 3)
    one = run(model, [pair], "shared_prefix")
    with torch.no_grad():
        model.model.lm_head.weight.mul_(1.001)
    with pytest.raises(AssertionError):
        assert_equal(run(model, [pair], "concatenated"), one)
