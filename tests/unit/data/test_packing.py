"""The tensors of a micro-batch, in both layouts."""

from __future__ import annotations

from dataclasses import replace

import torch

from orpo_ray.data.balance import Packing, PairSize, StepTotals
from orpo_ray.data.packing import PairSpan, build_batch
from support.encoded_pairs import IMAGE, make


def test_layout() -> None:
    """Two pairs and a dummy pair: the hidden state before each target predicts it."""
    pairs = [make([5, IMAGE, 6], [7, 8], [9], 0), make([1, 2], [3], [4, 5, 6], 1)]
    batch = build_batch(pairs, "response", "concatenated", dummy_pairs=[make([5, IMAGE], [1], [2], -1)])
    assert batch.input_ids.tolist() == [
        [5, IMAGE, 6, 7, 8], [1, 2, 3, 0, 0], [5, IMAGE, 1, 0, 0],
        [5, IMAGE, 6, 9, 0], [1, 2, 4, 5, 6], [5, IMAGE, 2, 0, 0],
    ]  # fmt: skip
    assert batch.target_ids.tolist() == [7, 8, 3, 1, 9, 4, 5, 6, 2]
    assert batch.target_answer.tolist() == [0, 0, 1, 2, 3, 4, 4, 4, 5]
    assert batch.target_position.tolist() == [2, 3, 6, 11, 17, 21, 22, 23, 26]
    assert batch.target_in_response.all()
    assert batch.weights.tolist() == [1, 1, 0]
    assert batch.images["pixel_values"][:, 0, 0, 0].tolist() == [0, 255]


def test_prompt_tokens_as_targets_leave_out_placeholders_and_the_first() -> None:
    pair = make([5, IMAGE, 6], [7, 8], [9])
    batch = build_batch([pair], "prompt+response", "concatenated")
    assert batch.target_ids.tolist() == [6, 7, 8, 9]
    assert batch.target_in_response.tolist() == [False, True, True, True]
    totals = StepTotals.of([PairSize.of(pair)])
    assert (totals.nll_tokens("prompt+response"), totals.nll_tokens("response")) == (3, 2)
    torch.testing.assert_close(batch.target_ids, batch.input_ids.flatten()[batch.target_position + 1])


def test_packed_layout() -> None:
    """A pair, a text-only pair and a dummy pair in a row: the first token of both answers follows the prompt."""
    pairs = [make([5, IMAGE, 6], [7, 8], [9], 0), make([1, 2], [3], [4, 5, 6], 1)]
    batch = build_batch(pairs, "response", "shared_prefix", dummy_pairs=[make([5, IMAGE], [1], [2], -1)])
    assert batch.input_ids.tolist() == [[5, IMAGE, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 5, IMAGE, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3, 4, 0, 1, 2, 2]]
    assert batch.token_kind.tolist() == [[0, 1, 0, 2, 2, 2, 0, 0, 2, 2, 2, 2, 0, 1, 2, 2]]
    assert batch.spans == (PairSpan(0, 3, 5, 6), PairSpan(6, 8, 9, 12), PairSpan(12, 14, 15, 16))
    assert batch.target_ids.tolist() == [7, 8, 9, 3, 4, 5, 6, 1, 2]
    assert batch.target_answer.tolist() == [0, 0, 3, 1, 4, 4, 4, 2, 5]
    assert batch.target_position.tolist() == [2, 3, 2, 7, 7, 9, 10, 13, 13]
    assert batch.weights.tolist() == [1, 1, 0]
    assert batch.images["pixel_values"][:, 0, 0, 0].tolist() == [0, 255]


def test_packed_prompt_targets_belong_to_the_chosen_answer() -> None:
    batch = build_batch([make([5, IMAGE, 6, 4], [7], [9])], "prompt+response", "shared_prefix")
    assert batch.target_ids.tolist() == [6, 4, 7, 9]
    assert batch.target_position.tolist() == [1, 2, 3, 3]
    assert batch.target_answer.tolist() == [0, 0, 0, 1]
    assert batch.target_in_response.tolist() == [False, False, True, True]


def test_a_pair_with_two_prompts_has_two_spans() -> None:
    pairs = [
        replace(make([5, IMAGE, 6], [7, 8], [9, 4], 1), rejected_prompt=make([5, IMAGE, IMAGE], [1], [1], 2).prompt)
    ]
    pairs.append(make([1, 2], [3], [4], 3))
    batch = build_batch(pairs, "prompt+response", "shared_prefix")
    assert batch.input_ids.tolist() == [[5, IMAGE, 6, 7, 8, 5, IMAGE, IMAGE, 9, 4, 1, 2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 2]]
    assert batch.spans == (PairSpan(0, 3, 5, 5), PairSpan(5, 8, 10, 10), PairSpan(10, 12, 13, 14))
    assert [span.is_single for span in batch.spans] == [True, True, False]
    assert batch.target_ids.tolist() == [6, 7, 8, 9, 4, 2, 3, 4]
    assert batch.target_answer.tolist() == [0, 0, 0, 2, 2, 1, 1, 3]
    assert batch.target_position.tolist() == [1, 2, 3, 7, 8, 10, 11, 11]
    assert batch.images["pixel_values"][:, 0, 0, 0].tolist() == [1, 2]
    size = PairSize.of(pairs[0])
    assert (size.packed, size.row, size.image_values) == (10, 5, 24)
    # In the padded layout, every row has its own images, even if the pair shares them.
    padded = build_batch([*pairs, make([IMAGE], [3], [4], 9)], "response", "concatenated")
    assert padded.images["pixel_values"][:, 0, 0, 0].tolist() == [1, 9, 2, 9]
    assert not padded.images_shared
    assert padded.input_ids[3].tolist() == [5, IMAGE, IMAGE, 9, 4]


def test_a_pair_with_other_images_has_a_further_span() -> None:
    """[prompt | chosen | rejected], then [prompt with the other image | chosen]; and a third row where padded."""
    other = make([5, IMAGE, IMAGE], [1], [1], 2).prompt
    pairs = [make([1, 2], [3], [4], 3), replace(make([5, IMAGE, 6], [7, 8], [9], 1), other_prompt=other)]
    batch = build_batch(pairs, "prompt+response", "shared_prefix")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, IMAGE, 6, 7, 8, 9, 5, IMAGE, IMAGE, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4]]
    assert batch.spans == (PairSpan(0, 2, 3, 4), PairSpan(4, 7, 9, 10), PairSpan(10, 13, 15, 15))
    assert batch.target_ids.tolist() == [2, 3, 4, 6, 7, 8, 9, 7, 8]
    assert batch.target_answer.tolist() == [0, 0, 2, 1, 1, 1, 3, 5, 5]
    assert batch.target_position.tolist() == [0, 1, 1, 5, 6, 7, 6, 12, 13]
    assert batch.images["pixel_values"][:, 0, 0, 0].tolist() == [1, 2]
    assert batch.answers_per_pair == 3
    size = PairSize.of(pairs[1])
    assert (size.packed, size.rows, size.row, size.image_values) == (11, 3, 5, 24)
    padded = build_batch(pairs, "response", "concatenated")
    assert padded.input_ids.tolist() == [
        [1, 2, 3, 0, 0], [5, IMAGE, 6, 7, 8], [1, 2, 4, 0, 0], [5, IMAGE, 6, 9, 0], [5, IMAGE, IMAGE, 7, 8]
    ]  # fmt: skip
    assert padded.target_answer.tolist() == [0, 1, 1, 2, 3, 5, 5]
    assert padded.images["pixel_values"][:, 0, 0, 0].tolist() == [1, 1, 2]
    assert Packing(1 << 20, "concatenated").tokens([PairSize.of(pair) for pair in pairs]) == padded.input_ids.numel()
    assert build_batch(pairs[:1], "response", "shared_prefix").answers_per_pair == 2
