"""Which images a pair is contrasted with: the same from any position, and what each kind means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orpo_ray.config.field_types import OtherImage
from orpo_ray.data.image_changes import CROP_AREA, changed
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import pair_of
from support.sources import read_all, rows, spec_of, write_jsonl

KINDS: list[OtherImage] = ["exchange", "exchange_other_answer", "crop", "noise", "blank", "column"]


def questions(count: int) -> list[dict[str, Any]]:
    """Rows about half as many images, with two prompts and three answers."""
    return [
        row | {"images": [f"{i // 2}.png"], "prompt": f"q{i % 2}", "chosen": f"a{i % 3}", "rejected": "wrong"}
        for i, row in enumerate(rows(count))
    ]


def read(path: Path, kind: OtherImage | None, epoch: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """Read an epoch, which is one window."""
    spec = spec_of([str(path)], other_image=kind, window=16, **changes)
    found = read_all(replace(spec, end_sample=2 * spec.order.num_rows), epoch)
    assert len(found) == spec.order.num_rows
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_is_the_same_from_any_position(tmp_path: Path, kind: OtherImage) -> None:
    """A resumed run starts within a window. Two files, so that a window has rows of several shards."""
    items = questions(30)
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", items[15 * i : 15 * i + 15]) for i in range(2)]
    sources = [str(path) for path in paths]
    whole = read_all(spec_of(sources, other_image=kind, window=16))
    assert read_all(spec_of(sources, other_image=kind, window=16, first_sample=21)) == whole[21:]
    assert read_all(spec_of(sources, other_image=kind, window=16, end_sample=21)) == whole[:21]


def test_exchange_takes_the_next_pair_with_another_image(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(16))
    found = read(path, "exchange")
    for place, row in enumerate(found):
        following = [*found[place + 1 :], *found[:place]]
        partner = next(each for each in following if each["images"] != row["images"])
        assert row["other"]["images"] == partner["images"]
        assert row["other"]["image_root"] == str(tmp_path)
        assert row["bad"] is None
    plain = read(path, None)
    assert [row | {"other": None} for row in found] == plain, "the pair itself stays as it is"


def test_exchange_differs_between_epochs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(16))
    one, two = ({row["id"]: row["other"] for row in read(path, "exchange", epoch)} for epoch in (0, 1))
    assert one != two


def test_another_answer_to_the_same_prompt(tmp_path: Path) -> None:
    items = [*questions(15), rows(1)[0] | {"id": "alone", "images": ["0.png"], "prompt": "unlike the others"}]
    found = read(write_jsonl(tmp_path / "a.jsonl", items), "exchange_other_answer")
    answers = {(row["prompt"][0]["content"][1]["text"], row["images"][0]["path"]): row["chosen"] for row in found}
    for row in found:
        if row["id"] == "alone":
            assert row["other"] is None
            assert row["bad"] is None, "the pair trains without the term"
            continue
        path = row["other"]["images"][0]["path"]
        assert path != row["images"][0]["path"]
        assert answers[row["prompt"][0]["content"][1]["text"], path] != row["chosen"]


def test_partners_have_as_many_images_and_text_has_none(tmp_path: Path) -> None:
    items = questions(6)
    items[4]["images"], items[5]["images"] = ["0.png", "1.png"], ["1.png", "2.png"]
    items.append(rows(1)[0] | {"id": "text"})
    by_id = {row["id"]: row for row in read(write_jsonl(tmp_path / "a.jsonl", items), "exchange")}
    assert by_id["text"]["other"] is None
    assert [image["path"] for image in by_id["r4"]["other"]["images"]] == ["1.png", "2.png"]
    assert all(len(row["other"]["images"]) == len(row["images"]) for row in by_id.values() if row["images"])


def test_the_column_of_the_row(tmp_path: Path) -> None:
    """Both answers are then to the first image. One text for both answers is an image preference already."""
    items = [row | {"rejected_images": ["x.png"]} for row in questions(2)] + questions(3)[2:]
    items[1]["rejected"] = items[1]["chosen"]
    found = [pair_of(row) for row in read(write_jsonl(tmp_path / "a.jsonl", items), "column", seed=None)]
    first, same, without = found
    assert isinstance(first, PreferencePair)
    assert isinstance(same, PreferencePair)
    assert isinstance(without, PreferencePair)
    assert first.rejected_images is None
    assert first.other is not None
    assert first.other.images == [{"bytes": None, "path": "x.png"}]
    assert same.other is None
    assert same.rejected_images == [{"bytes": None, "path": "x.png"}]
    assert without.other is None


@pytest.mark.parametrize("kind", KINDS)
def test_exchanged_pairs_are_contrasted_with_nothing(tmp_path: Path, kind: OtherImage) -> None:
    """Otherwise as without the exchange: with `column`, both answers are to the same image."""
    path = write_jsonl(tmp_path / "a.jsonl", [row | {"rejected_images": ["x.png"]} for row in questions(16)])
    for row in read(path, kind, exchange_images=True):
        assert row["other"] is None
        assert (row["rejected_images"] is None) is (kind == "column")


def test_changes_are_seeded_by_pair_and_epoch(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(16))
    rows_of_both = [row for epoch in (0, 1) for row in read(path, "crop", epoch)]
    assert len({row["other"]["seed"] for row in rows_of_both}) == 32
    assert all(row["other"]["images"] is None for row in rows_of_both)


@pytest.fixture
def photo() -> Image.Image:
    """Every pixel tells where it is: red grows to the right, green downwards."""
    row, column = np.indices((60, 80))
    return Image.fromarray(np.stack([3 * column, 4 * row, 0 * row], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("change", ["crop", "noise", "blank"])
def test_a_change_keeps_the_size_and_depends_on_the_seed_only(photo: Image.Image, change: str) -> None:
    first = np.asarray(changed(photo, change, 7, 0))
    assert first.shape == (60, 80, 3)
    np.testing.assert_array_equal(first, np.asarray(changed(photo, change, 7, 0)))
    others = [np.asarray(changed(photo, change, *seed)) for seed in ((8, 0), (7, 1))]
    assert all(np.array_equal(first, other) for other in others) is (change == "blank")


def test_a_crop_shows_a_part_of_the_image(photo: Image.Image) -> None:
    for seed in range(20):
        pixels = np.asarray(changed(photo, "crop", seed, 0)).astype(float)
        width, height = np.ptp(pixels[..., 0]) / 3 + 1, np.ptp(pixels[..., 1]) / 4 + 1
        assert CROP_AREA[0] * 0.7 < width * height / (60 * 80) < CROP_AREA[1] * 1.3
    assert changed(Image.new("RGB", (1, 1)), "crop", 0, 0).size == (1, 1)


def test_noise_leaves_little_of_the_image(photo: Image.Image) -> None:
    """The correlation with the image is that of 0.28 signal to 0.96 noise, or less where values are clipped."""
    noisy = np.asarray(changed(photo, "noise", 0, 0))[..., 0].astype(float)
    correlation = np.corrcoef(noisy.flatten(), np.asarray(photo)[..., 0].astype(float).flatten())[0, 1]
    assert 0.05 < correlation < 0.35
