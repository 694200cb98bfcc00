"""What cannot fit is refused before it costs anything; what fits is never refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from orpo_ray.data import encoding, pairs
from orpo_ray.data.encoding import EncodedPair, EncoderSpec, PairEncoder
from orpo_ray.data.formats import to_pair
from orpo_ray.data.input_bounds import SHORTEST_LONGEST_TOKEN, InputBounds
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import BYTES_PER_TASK_BATCH, read_windows
from orpo_ray.errors import RowError
from orpo_ray.processing.processor import load_processor
from support.paths import SHARED
from support.sources import read_all, rows, spec_of, write_jsonl

LENGTH = 64
LIMIT = LENGTH * SHORTEST_LONGEST_TOKEN


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.tokenizer(texts, **options)


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor("orpo-ray/tiny-smolvlm", None)


def pair(**changes: Any) -> PreferencePair:
    return to_pair({"id": "1", "prompt": "q", "chosen": "a", "rejected": "b"} | changes, "trl", {}, "1")


def counting_encoder(processor: Any, **options: Any) -> tuple[PairEncoder, Counting]:
    encoder = PairEncoder(processor, LENGTH, **options)
    encoder.prompts.tokenizer = Counting(processor.tokenizer)
    return encoder, encoder.prompts.tokenizer


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_text_that_cannot_fit_is_not_tokenized(processor: Any, name: str, truncate: bool) -> None:
    encoder, tokenizer = counting_encoder(processor, truncate=truncate)
    (bad,) = encoder.encode_many([pair(**{name: "x" * (LIMIT + 1)})], [None])
    assert isinstance(bad, RowError)
    assert bad.reason == "too_long"
    assert f"{name} has {LIMIT + 1 + 4 * (name == 'prompt')} characters" in bad.detail
    assert f"data.max_length ({LENGTH} tokens)" in bad.detail
    assert tokenizer.characters == 0


def test_a_text_below_the_bound_is_judged_by_its_tokens(processor: Any) -> None:
    encoder, tokenizer = counting_encoder(processor)
    (bad,) = encoder.encode_many([pair(chosen="x" * LIMIT)], [None])
    assert isinstance(bad, RowError)
    assert "answers of" in bad.detail
    assert tokenizer.characters > LIMIT
    cutting, _ = counting_encoder(processor, truncate=True)
    (cut,) = cutting.encode_many([pair(chosen="x" * LIMIT)], [None])
    assert isinstance(cut, EncodedPair)
    assert cut.row_length == LENGTH


def test_a_data_check_measures_what_training_tokenizes() -> None:
    encoder = EncoderSpec("orpo-ray/tiny-smolvlm", None, 10**9, bound_length=LENGTH).build()
    fits, too_long = encoder.encode_many([pair(chosen="x" * LIMIT), pair(chosen="x" * (LIMIT + 1))], [None, None])
    assert isinstance(fits, EncodedPair)
    assert fits.row_length > LENGTH
    assert isinstance(too_long, RowError)


TEXTS = st.text() | st.tuples(st.text(min_size=1, max_size=4), st.integers(1, 300)).map(
    lambda drawn: drawn[0] * drawn[1]
)


@pytest.mark.parametrize("name", ["orpo-ray/tiny-smolvlm", "qwen2_5_vl", "idefics3"])
def test_no_text_has_more_characters_per_token(name: str) -> None:
    from transformers import AutoTokenizer

    folder = SHARED / "processors" / name
    if "/" not in name and not folder.is_dir():
        pytest.skip(f"{folder} is absent: it has the real tokenizer")
    tokenizer = load_processor(name, None).tokenizer if "/" in name else AutoTokenizer.from_pretrained(folder)
    bounds = InputBounds.of(tokenizer, 1)
    assert bounds.characters_per_token == (SHORTEST_LONGEST_TOKEN if "/" in name else 128)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(text) <= len(tokens) * bounds.characters_per_token

    check()
    longest = " " * 128 if "/" not in name else "x"
    assert len(tokenizer(longest * 10, add_special_tokens=False)["input_ids"]) <= 10


def test_messages_parts_and_images_are_counted(processor: Any) -> None:
    encoder = PairEncoder(processor, LENGTH)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * LENGTH
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}] * (LENGTH + 1)}]
    for changes, said in (
        ({"prompt": turns}, f"{2 * LENGTH} messages"),
        ({"prompt": parts}, f"{LENGTH + 1} texts and images"),
        ({"images": ["none.png"] * (LENGTH + 1)}, f"{LENGTH + 2} texts and images"),
    ):
        (bad,) = encoder.encode_many([pair(**changes)], [None])
        assert isinstance(bad, RowError)
        assert (bad.reason, bad.detail.startswith(said)) == ("too_long", True)


def test_the_pixels_of_one_answer_are_bounded(processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    encoder = PairEncoder(processor, 256)
    for limit, reason in ((30_000, None), (29_999, "image_too_large")):
        monkeypatch.setattr(encoding, "MAX_PIXELS_OF_ANSWER", limit)
        (found,) = encoder.encode_many([pair(images=["a.png"] * 3)], [tmp_path])
        assert (found.reason if isinstance(found, RowError) else None) == reason


def test_a_pair_has_a_largest_size_for_any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_CHARACTERS", 100)
    assert pair(prompt="x" * 98)
    with pytest.raises(RowError, match="too_long: the texts have 101 characters"):
        pair(prompt="x" * 99)


def test_long_texts_make_small_task_batches(tmp_path: Path) -> None:
    items = [row | {"prompt": "x" * (BYTES_PER_TASK_BATCH // 2)} for row in rows(6)]
    spec = spec_of([str(write_jsonl(tmp_path / "a.jsonl", items))])
    windows = [(0, number) for number in range(spec.order.windows_per_epoch)]
    assert [table.num_rows for table in read_windows(spec, windows)] == [2, 2, 2]
    assert len(read_all(spec)) == 6
