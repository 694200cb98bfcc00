"""Videos as frames: which rows are accepted, which frames are taken, and their places in the prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.from_recipe import all_data, encoder_of
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import pair_of as read_pair_of
from orpo_ray.data.videos import read_videos, with_frames
from orpo_ray.errors import RowError
from orpo_ray.storage.files import RemoteFolder
from orpo_ray.streaming.pipeline import encode_rows
from support.format_rows import ALPACA, MMPR, PLAIN, SHAREGPT, SWIFT, bad, pair_of, text, turn
from support.row_images import write_frames
from support.sources import read_all, write_jsonl
from support.tiny_runs import tiny_recipe

FRAMES = [f"{name}.jpg" for name in "abcde"]
VIDEO = {"type": "video"}
IMAGE = {"type": "image"}
TRL = {"prompt": "what happens?", "chosen": "a cat jumps", "rejected": "a dog sleeps"}


def paths(pair: PreferencePair) -> list[str]:
    return [image["path"] for image in pair.images]


def frames_of(row: dict[str, Any], format_name: str = "trl", most: int = 8) -> PreferencePair:
    return with_frames(pair_of(row, format_name), most, None)


def error_of(row: dict[str, Any]) -> RowError:
    with pytest.raises(RowError) as error:
        frames_of(row)
    return error.value


@pytest.mark.parametrize(
    "columns",
    [{"videos": [FRAMES]}, {"videos": FRAMES}, {"videos": [[{"path": each} for each in FRAMES]]}],
)
def test_a_list_of_frames_is_a_video(columns: dict[str, Any]) -> None:
    pair = frames_of(TRL | columns)
    assert paths(pair) == FRAMES
    assert pair.prompt == [turn("user", *[IMAGE] * 5, "what happens?")]
    assert pair.videos == []
    assert frames_of(TRL | {"videos": []}) == pair_of(TRL)


@pytest.mark.parametrize(("most", "kept"), [(1, "a"), (2, "ae"), (3, "ace"), (4, "abde"), (5, "abcde"), (8, "abcde")])
def test_frames_are_taken_evenly_with_the_first_and_the_last(most: int, kept: str) -> None:
    pair = frames_of(TRL | {"videos": [FRAMES]}, most=most)
    assert paths(pair) == [f"{name}.jpg" for name in kept]
    assert len(pair.prompt[0]["content"]) == len(kept) + 1


def test_every_video_is_shortened_alone_and_stands_at_its_mark() -> None:
    content = [text("first"), VIDEO, text("then"), IMAGE, VIDEO, text("what?")]
    row = TRL | {"prompt": [{"role": "user", "content": content}], "images": ["x.png"]}
    pair = frames_of(row | {"videos": [FRAMES, ["y.png", "z.png"]]}, most=2)
    assert paths(pair) == ["a.jpg", "e.jpg", "x.png", "y.png", "z.png"]
    assert pair.prompt == [turn("user", "first", IMAGE, IMAGE, "then", IMAGE, IMAGE, IMAGE, "what?")]
    # The same with the videos inside the message.
    own = [text("first"), VIDEO | {"video": FRAMES}, text("then"), IMAGE, VIDEO | {"video": ["y.png", "z.png"]},
           text("what?")]  # fmt: skip
    assert frames_of(row | {"prompt": [{"role": "user", "content": own}]}, most=2) == pair


@pytest.mark.parametrize(
    ("format_name", "row", "column"),
    [
        ("plain", PLAIN | {"image": None}, "prompt"),
        ("alpaca", ALPACA | {"images": None, "input": None, "history": None}, "instruction"),
        ("mmpr", MMPR | {"image": None}, "question"),
    ],
)
def test_marks_in_texts(format_name: str, row: dict[str, Any], column: str) -> None:
    pair = frames_of(row | {column: "see <video> and <video>", "videos": [["a.png"], ["b.png", "c.png"]]}, format_name)
    contents = [part for each in pair.prompt for part in each["content"]][-5:]
    assert [part.get("text", part["type"]) for part in contents] == ["see ", "image", " and ", "image", "image"]
    # Without videos the mark is text, as before.
    plain = pair_of(row | {column: "the tag <video>"}, format_name)
    assert any("the tag <video>" in part["text"] for each in plain.prompt for part in each["content"])


def test_videos_of_other_formats() -> None:
    for format_name, row in (("sharegpt", SHAREGPT), ("swift", SWIFT)):
        own = pair_of(row, format_name)
        pair = frames_of(row | {"videos": [FRAMES]}, format_name, most=2)
        assert len(pair.images) == len(own.images) + 2
        marks = [part["type"] for each in pair.prompt for part in each["content"]]
        assert marks.count("image") == len(pair.images)


def test_the_rejected_side_has_the_same_frames() -> None:
    row = TRL | {"images": ["x.png"], "rejected_images": ["y.png"], "videos": [["a.png"]]}
    pair = frames_of(row)
    assert paths(pair) == ["x.png", "a.png"]
    assert pair.rejected_images is not None
    assert [image["path"] for image in pair.rejected_images] == ["y.png", "a.png"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"videos": ["clips/7.MP4"]}, "unsupported_media"),
        ({"videos": "https://a.example/b.webm?x=1"}, "unsupported_media"),
        ({"videos": [["a.jpg", "b.mp4"]]}, "unsupported_media"),
        ({"videos": [{"bytes": b"x", "path": "b.mov"}]}, "unsupported_media"),
        ({"audios": ["a.wav"]}, "unsupported_media"),
        ({"videos": [[]]}, "missing_image"),
        ({"videos": [["a.jpg", None]]}, "missing_image"),
        ({"videos": 7}, "malformed_row"),
        ({"videos": "a.jpg"}, "malformed_row"),
        ({"videos": [FRAMES, 7]}, "malformed_row"),
        ({"videos": [["\ud800.jpg"]]}, "malformed_row"),
        ({"videos": ["\ud800"]}, "malformed_row"),
        ({"prompt": [{"role": "user", "content": [VIDEO, VIDEO]}], "videos": [FRAMES]}, "video_count_mismatch"),
        ({"prompt": [{"role": "user", "content": [VIDEO | {"video": "a.mp4"}]}]}, "unsupported_media"),
        ({"chosen": [{"role": "assistant", "content": [VIDEO]}]}, "malformed_row"),
    ],
)
def test_what_cannot_be_used_is_a_bad_row(change: dict[str, Any], reason: str) -> None:
    assert bad(TRL | change) == reason


def test_a_video_file_is_refused_with_the_command_that_extracts_frames() -> None:
    detail = error_of(TRL | {"videos": ["clips/7.mp4"]}).detail
    assert "mkdir 7; ffmpeg -i 7.mp4 -vf fps=1 7/%04d.jpg" in detail


def test_a_folder_of_frames_is_read_in_the_order_of_numbers(tmp_path: Path) -> None:
    write_frames(tmp_path / "clips" / "7", 12)
    pair = pair_of(TRL | {"videos": ["clips/7/"]})
    assert paths(with_frames(pair, 20, tmp_path)) == [f"clips/7/frame{number}.png" for number in range(1, 13)]
    assert paths(with_frames(pair, 3, tmp_path)) == [f"clips/7/frame{number}.png" for number in (1, 7, 12)]
    remote = with_frames(pair, 3, RemoteFolder(str(tmp_path)))
    assert paths(remote) == paths(with_frames(pair, 3, tmp_path))


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("none", "missing_image"), ("empty", "missing_image"), ("empty/x.txt", "missing_image"), ("../out", "unsafe_path"),
     ("link", "unsafe_path"), ("/etc", "unsafe_path"), ("a\0b", "unreadable_image")],
)  # fmt: skip
def test_folders_that_cannot_be_used(tmp_path: Path, folder: str, reason: str) -> None:
    root = tmp_path / "root"
    (root / "empty").mkdir(parents=True)
    (root / "empty" / "x.txt").write_text("x")
    write_frames(tmp_path / "out", 2)
    (root / "link").symlink_to(tmp_path / "out")
    pair = pair_of(TRL | {"videos": [folder]})
    with pytest.raises(RowError) as error:
        with_frames(pair, 8, root)
    assert error.value.reason == reason
    if folder not in ("link", "a\0b"):  # a store has no links, and refuses more names
        with pytest.raises(RowError) as error:
            with_frames(pair, 8, RemoteFolder(str(root)))
        assert error.value.reason == reason
    with pytest.raises(RowError) as error:
        with_frames(pair, 8, None)
    assert error.value.reason == "unsafe_path"


def test_rows_with_videos_are_read_and_encoded_as_their_frames(tmp_path: Path) -> None:
    """The encoded pair is that of the same frames given as images."""
    write_frames(tmp_path / "clips" / "7", 5)
    shown = [f"clips/7/frame{number}.png" for number in (1, 3, 5)]
    rows = [TRL | {"videos": ["clips/7"]}, TRL | {"images": shown}, TRL | {"videos": ["clips/8"]}]
    data = {"train": str(write_jsonl(tmp_path / "a.jsonl", rows)), "max_frames": 3, "max_length": 512}
    recipe = tiny_recipe(tmp_path, "run", data=data)
    read, _ = all_data(recipe)
    found = read_all(read)
    one, other, missing = map(read_pair_of, found)
    assert isinstance(one, PreferencePair)
    assert isinstance(other, PreferencePair)
    assert replace(one, id="", source="") == replace(other, id="", source="")
    assert isinstance(missing, BadRow)
    assert missing.reason == "missing_image"
    items = encode_rows(found[:2], encoder_of(recipe).build())
    assert all(isinstance(item, EncodedPair) for item in items), items
    first, second = items
    assert isinstance(first, EncodedPair)
    assert isinstance(second, EncodedPair)
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist()
    assert (first.images["pixel_values"] == second.images["pixel_values"]).all()
    assert (~first.prompt_is_text).sum() == 3 * 16


def test_the_same_rows_are_held_out_for_any_number_of_frames(tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        write_frames(tmp_path / "clips" / str(number), 6)
        rows.append(
            TRL | {"id": str(number), "videos": [[f"clips/{number}/frame{frame}.png" for frame in range(1, 7)]]}
        )
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    held_out = []
    for most in (1, 2, 6):
        data = {"train": path, "max_frames": most, "eval_fraction": 0.3, "max_length": 512}
        _, read = all_data(tiny_recipe(tmp_path, "run", data=data))
        assert read is not None
        held_out.append({row["id"] for row in read_all(read)})
    assert held_out[0] == held_out[1] == held_out[2]
    assert len(held_out[0]) in range(4, 9)


def test_a_row_without_videos_has_none() -> None:
    assert read_videos({"videos": None, "video": "the name of a film"}) == read_videos({"videos": ""}) == []
    urls = ["https://a.example/1.jpg?x=1", "https://a.example/2.jpg"]
    (frames,) = read_videos({"videos": urls})
    assert [frame["path"] for frame in frames if isinstance(frame, dict)] == urls
