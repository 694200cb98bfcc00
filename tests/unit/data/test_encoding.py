"""Encoding gives the same tokens and pixels as the model's own processor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orpo_ray.data.encoded_columns import from_arrow, to_arrow
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.formats import to_pair
from orpo_ray.data.pairs import OtherImages, PreferencePair
from orpo_ray.errors import RowError
from orpo_ray.processing.pixel_norm import PixelNorm, normalize_pixels
from orpo_ray.processing.processor import load_processor
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.families import with_processor
from support.paths import SHARED

TINY = "orpo-ray/tiny-smolvlm"


def png(folder: Path, name: str, size: tuple[int, int], seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return name


def pair(images: list[str], prompt: Any = "what is it?", chosen: str = "red", rejected: str = "teal") -> PreferencePair:
    row = {"id": "1", "images": images, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return to_pair(row, "trl", {}, "1")


def encode(encoder: PairEncoder, root: Path, *pairs: PreferencePair) -> list[EncodedPair | RowError]:
    return encoder.encode_many(pairs, [root] * len(pairs))


@pytest.fixture(scope="module")
def tiny() -> PairEncoder:
    return PairEncoder(load_processor(TINY, None), max_length=256)


def tiled_processor(folder: Path) -> Any:
    """The tiny model's processor, set to divide large images into tiles of 64 pixels (real models: 364)."""
    processor = load_processor(TINY, None)
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    tiles = {"do_image_splitting": True, "size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}
    path.write_text(json.dumps(config | {"image_processor": config["image_processor"] | tiles}))
    return load_processor(str(folder), None)


def idefics3_processor() -> Any:
    folder = SHARED / "processors" / "idefics3"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: it has the real Idefics3 processor, with tiles")
    return load_processor(str(folder), None)


def check_against_processor(processor: Any, encoded: EncodedPair, source: PreferencePair, root: Path) -> None:
    """Token ids and normalized pixels must equal those of a plain processor call on prompt + answer."""
    images = [Image.open(root / image["path"]).convert("RGB") for image in source.images]
    for answer, ids in ((source.chosen, encoded.chosen_ids), (source.rejected, encoded.rejected_ids)):
        messages = [*source.prompt, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        text = processor.apply_chat_template(messages, tokenize=False)
        plain = processor(
            text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
        )
        assert plain["input_ids"][0].tolist() == [*encoded.prompt_ids, *ids]
    if images:
        pixels = normalize_pixels(torch.from_numpy(encoded.images["pixel_values"]), PixelNorm.of(processor))
        reference = plain["pixel_values"].flatten(0, -4)
        torch.testing.assert_close(pixels, reference, rtol=0, atol=1e-6)
    is_image = encoded.prompt_ids == processor.image_token_id
    assert (encoded.prompt_is_text == ~is_image).all()


@pytest.mark.parametrize("sizes", [[], [(64, 64)], [(100, 40)], [(64, 64), (20, 90)]])
def test_tiny_smolvlm_is_exact(tiny: PairEncoder, tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    source = pair([png(tmp_path, f"{i}.png", size, i) for i, size in enumerate(sizes)])
    (encoded,) = encode(tiny, tmp_path, source)
    assert isinstance(encoded, EncodedPair)
    check_against_processor(tiny.processor, encoded, source, tmp_path)
    assert (~encoded.prompt_is_text).sum() == 16 * len(sizes)


@pytest.mark.parametrize("family", ["smolvlm", "gemma3", "llava", "mllama"])
def test_closing_tokens_are_those_after_the_text_of_an_answer(family: str, tmp_path: Path) -> None:
    encoder = PairEncoder(load_processor(f"orpo-ray/tiny-{family}", None), max_length=256)
    for answer in ("a", "円", "مثلث"):
        (encoded,) = encode(encoder, tmp_path, replace(pair([]), chosen=answer))
        assert isinstance(encoded, EncodedPair)
        text = f" {answer}" if family == "smolvlm" else answer  # its template writes "Assistant: ..."
        alone = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(encoded.chosen_ids) - encoder.closing_tokens == len(alone)
        assert encoder.closing_tokens > 0


# These processors add padding images or tiles, which are removed; see tests/unit/model/test_families.py.
PADDING = ("idefics", "idefics2", "mllama", "llava_next", "llava_onevision", "pixtral", "mistral3")


@pytest.mark.parametrize("sizes", [[(100, 40)], [(64, 64), (20, 90)]])
@pytest.mark.parametrize("family", with_processor(family for family in TINY_FAMILIES if family not in PADDING))
def test_every_family_gives_the_processors_tokens_and_pixels(
    family: str, tmp_path: Path, sizes: list[tuple[int, int]]
) -> None:
    encoder = PairEncoder(load_processor(f"orpo-ray/tiny-{family}", None), max_length=4096)
    source = pair([png(tmp_path, f"{i}.png", size, i) for i, size in enumerate(sizes)])
    (encoded,) = encode(encoder, tmp_path, source)
    assert isinstance(encoded, EncodedPair)
    processor, images = encoder.processor, [Image.open(tmp_path / f"{i}.png") for i in range(len(sizes))]
    prompt = processor.apply_chat_template(source.prompt, add_generation_prompt=True, tokenize=False)
    plain = processor(text=[prompt], images=[images], add_special_tokens=False, return_tensors="pt")
    assert plain["input_ids"][0].tolist() == encoded.prompt_ids.tolist()
    assert encoded.images["pixel_values"].dtype == np.uint8
    pixels = normalize_pixels(torch.from_numpy(encoded.images["pixel_values"]), PixelNorm.of(processor))
    torch.testing.assert_close(pixels, plain["pixel_values"].view_as(pixels), rtol=0, atol=1e-6)
    # The answer's tokens decode to the text that the template adds after the prompt.
    turn = {"role": "assistant", "content": [{"type": "text", "text": source.chosen}]}
    whole = processor.apply_chat_template([*source.prompt, turn], tokenize=False)
    assert processor.tokenizer.decode(encoded.chosen_ids).strip() == whole.removeprefix(prompt).strip()


@pytest.mark.parametrize(("sizes", "tiles"), [([(300, 200)], 13), ([(64, 64), (90, 200)], 17 + 9)])
def test_tiles_are_exact(tmp_path: Path, sizes: list[tuple[int, int]], tiles: int) -> None:
    """An image in tiles also has a thumbnail."""
    encoder = PairEncoder(tiled_processor(tmp_path / "processor"), max_length=8192)
    source = pair([png(tmp_path, f"{i}.png", size, i) for i, size in enumerate(sizes)])
    (encoded,) = encode(encoder, tmp_path, source)
    assert isinstance(encoded, EncodedPair)
    check_against_processor(encoder.processor, encoded, source, tmp_path)
    assert len(encoded.images["pixel_values"]) == tiles
    assert (~encoded.prompt_is_text).sum() == 16 * tiles


@pytest.mark.parametrize("sizes", [[(300, 200)], [(700, 500), (400, 900)]])
def test_real_idefics3_with_tiles_is_exact(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    encoder = PairEncoder(idefics3_processor(), max_length=8192)
    source = pair([png(tmp_path, f"{i}.png", size, i) for i, size in enumerate(sizes)])
    (encoded,) = encode(encoder, tmp_path, source)
    assert isinstance(encoded, EncodedPair)
    check_against_processor(encoder.processor, encoded, source, tmp_path)
    assert encoded.images["pixel_values"].dtype == np.uint8


def test_a_batch_is_encoded_like_its_single_pairs(tiny: PairEncoder, tmp_path: Path) -> None:
    files = [png(tmp_path, f"{i}.png", (64, 64) if i % 2 else (50, 80), i) for i in range(5)]
    pairs = [pair([name], prompt=f"question {i}?", chosen="x" * (i + 1)) for i, name in enumerate(files)]
    pairs.insert(2, pair([]))
    pairs.insert(3, pair(["none.png"]))
    together = encode(tiny, tmp_path, *pairs)
    for got, source in zip(together, pairs, strict=True):
        (alone,) = encode(tiny, tmp_path, source)
        if isinstance(got, RowError):
            assert str(got) == str(alone)
            continue
        assert isinstance(alone, EncodedPair)
        assert to_arrow([0], [got]) == to_arrow([0], [alone])


def test_answers_do_not_change_the_prompts_tokens(tiny: PairEncoder, tmp_path: Path) -> None:
    name = png(tmp_path, "a.png", (64, 64))
    results = encode(tiny, tmp_path, *(pair([name], chosen=text) for text in ("red", ":)", "  x", "é", "\nred")))
    prompts = {tuple(result.prompt_ids) for result in results if isinstance(result, EncodedPair)}
    assert len(prompts) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "long " * 300}, "too_long"),
        ({"chosen": "an <image> here"}, "placeholder_in_text"),
        ({"prompt": "see <image>"}, "placeholder_in_text"),
    ],
)
def test_bad_rows(tiny: PairEncoder, tmp_path: Path, change: dict[str, str], reason: str) -> None:
    (result,) = encode(tiny, tmp_path, pair([png(tmp_path, "a.png", (64, 64))], **change))
    assert isinstance(result, RowError)
    assert result.reason == reason


def test_dummy_pairs(tiny: PairEncoder) -> None:
    assert tiny.dummy_pair(with_image=True).images["pixel_values"].shape == (1, 3, 64, 64)
    assert tiny.dummy_pair(with_image=False).images == {}


def test_an_empty_prompt_is_a_bad_row() -> None:
    """A template without any text around the prompt: in a packed row, the pair before would predict this answer."""
    processor = load_processor("orpo-ray/tiny-smolvlm", None)
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    )
    pair = PreferencePair("1", [], [{"role": "user", "content": [{"type": "text", "text": ""}]}], "a", "b")
    (bad,) = PairEncoder(processor, max_length=64).encode_many([pair], [None])
    assert isinstance(bad, RowError)
    assert bad.reason == "empty_prompt"


def test_only_answers_are_truncated(tmp_path: Path) -> None:
    name = png(tmp_path, "a.png", (64, 64))
    long = pair([name], chosen="red blue green brown teal", rejected="red gray black yellow blue")
    processor = load_processor(TINY, None)
    (whole,) = encode(PairEncoder(processor, 256), tmp_path, long)
    prompt = len(whole.prompt_ids)
    cutting = PairEncoder(processor, prompt + 3, truncate=True)
    (cut,) = encode(cutting, tmp_path, long)
    assert isinstance(cut, EncodedPair)
    assert cut.prompt_ids.tolist() == whole.prompt_ids.tolist()
    assert cut.chosen_ids.tolist() == whole.chosen_ids[:3].tolist()
    assert cut.rejected_ids.tolist() == whole.rejected_ids[:3].tolist()
    assert cut.truncated == len(whole.chosen_ids) + len(whole.rejected_ids) - 6
    assert from_arrow(to_arrow([5], [cut]))[0].truncated == cut.truncated
    assert encode(PairEncoder(processor, prompt + 3), tmp_path, long)[0].reason == "too_long"
    # The truncated answers are equal, or empty.
    assert encode(PairEncoder(processor, prompt + 1, truncate=True), tmp_path, long)[0].reason == "identical_responses"
    assert encode(PairEncoder(processor, prompt, truncate=True), tmp_path, long)[0].reason == "too_long"


def test_answers_to_different_images_have_separate_prompts(tiny: PairEncoder, tmp_path: Path) -> None:
    names = [png(tmp_path, f"{i}.png", (64, 64 + i), i) for i in range(3)]
    plain, other = pair(names[:1]), pair(names[1:2])
    both = replace(plain, rejected_images=other.images)
    alone = encode(tiny, tmp_path, plain, other)
    together = encode(tiny, tmp_path, pair(names[2:]), both, plain)[1]
    assert isinstance(together, EncodedPair)
    np.testing.assert_array_equal(together.images["pixel_values"], alone[0].images["pixel_values"])
    assert together.rejected_prompt is not None
    np.testing.assert_array_equal(together.rejected_prompt.images["pixel_values"], alone[1].images["pixel_values"])
    assert together.rejected_prompt.ids.tolist() == alone[1].prompt_ids.tolist()
    again = from_arrow(to_arrow([3], [together]))[0]
    assert again.rejected_prompt is not None
    np.testing.assert_array_equal(again.rejected_prompt.is_text, together.rejected_prompt.is_text)


def test_other_images_have_a_prompt_of_their_own(tiny: PairEncoder, tmp_path: Path) -> None:
    """The prompt of the pair, with the images of another one or the own ones changed."""
    names = [png(tmp_path, f"{i}.png", (64, 64 + i), i) for i in range(2)]
    plain, partner = pair(names[:1]), pair(names[1:], prompt="another question")
    exchanged = replace(plain, other=OtherImages(partner.images, str(tmp_path)))
    blank = replace(plain, other=OtherImages(None, change="blank", seed=3))
    expected = encode(tiny, tmp_path, pair(names[1:]), plain)
    found = encode(tiny, tmp_path, exchanged, blank, plain)
    for item in found:
        assert isinstance(item, EncodedPair)
        assert item.prompt_ids.tolist() == expected[1].prompt_ids.tolist()
        np.testing.assert_array_equal(item.images["pixel_values"], expected[1].images["pixel_values"])
    assert found[0].other_prompt.ids.tolist() == expected[0].prompt_ids.tolist()
    np.testing.assert_array_equal(found[0].other_prompt.images["pixel_values"], expected[0].images["pixel_values"])
    assert found[1].other_prompt.ids.tolist() == found[1].prompt_ids.tolist()
    assert set(found[1].other_prompt.images["pixel_values"].flatten()) == {127}
    assert found[2].other_prompt is None


def test_a_pair_whose_other_image_is_unusable_is_still_a_pair(tmp_path: Path) -> None:
    """The other image is missing, or makes the prompt too long."""
    processor = tiled_processor(tmp_path)
    wide, large = png(tmp_path, "a.png", (256, 64)), png(tmp_path, "b.png", (256, 256))
    plain = pair([wide])
    (alone,) = encode(PairEncoder(processor, max_length=1000), tmp_path, plain)
    assert isinstance(alone, EncodedPair)
    encoder = PairEncoder(processor, max_length=alone.row_length)
    for name in ("none.png", large):
        other = OtherImages(pair([name]).images, str(tmp_path))
        (found,) = encode(encoder, tmp_path, replace(plain, other=other))
        assert isinstance(found, EncodedPair)
        assert found.other_prompt is None
    (kept,) = encode(encoder, tmp_path, replace(plain, other=OtherImages(plain.images, str(tmp_path))))
    assert kept.other_prompt is not None
    assert isinstance(encode(encoder, tmp_path, pair([large]))[0], RowError)


@pytest.mark.parametrize("family", ["smolvlm", "idefics3", "llava", "gemma3", "paligemma"])
def test_images_of_any_size_are_encoded_or_bad_rows(family: str, tmp_path: Path) -> None:
    encoder = PairEncoder(load_processor(f"orpo-ray/tiny-{family}", None), 4096)
    sizes = [(1, 1), (2, 1), (1, 150), (150, 1), (3, 500), (64, 64), (64, 64), (999, 7)]
    pairs = [pair([png(tmp_path, f"{number}.png", size, number)]) for number, size in enumerate(sizes)]
    encoded = encode(encoder, tmp_path, *pairs)
    assert isinstance(encoded[5], EncodedPair)
    assert isinstance(encoded[6], EncodedPair)
    assert {each.reason for each in encoded if isinstance(each, RowError)} <= {"refused_by_processor"}


def test_an_image_that_the_processor_refuses_is_one_bad_row(tiny: PairEncoder, tmp_path: Path) -> None:
    """A processor that raises for some images: the other pairs of the batch are still encoded."""

    class Picky:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny.processor, name)

        def __call__(self, images: Any, **options: Any) -> Any:
            if any(image.getpixel((0, 0)) == (0, 0, 0) for each in images for image in each):
                raise ValueError("too dark")
            return tiny.processor(images=images, **options)

    Image.new("RGB", (64, 64)).save(tmp_path / "dark.png")
    names = [png(tmp_path, "a.png", (64, 64), 1), "dark.png", png(tmp_path, "b.png", (64, 64), 2)]
    found = encode(PairEncoder(Picky(), 256), tmp_path, *(pair([name]) for name in names))
    assert [type(each) for each in found] == [EncodedPair, RowError, EncodedPair]
    assert "64 x 64: ValueError: too dark" in found[1].detail
