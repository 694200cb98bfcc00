"""The tensors of a micro-batch, in both layouts."""

from __future__ import annotations

from dataclasses import replace

import torch

from orpo_ray.data.balance import Packing, PairSize, StepTotals
from orpo_ray.data.branches import Branch
from orpo_ray.data.packing import build_batch
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
    assert batch.target_sum.tolist() == [0, 0, 1, 2, 3, 4, 4, 4, 5]
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
    assert batch.branches == (
        Branch(0, 3, 5),
        Branch(5, 5, 6, ((0, 3),)),
        Branch(6, 8, 9),
        Branch(9, 9, 12, ((6, 8),)),
        Branch(12, 14, 15),
        Branch(15, 15, 16, ((12, 14),)),
    )
    assert batch.target_ids.tolist() == [7, 8, 9, 3, 4, 5, 6, 1, 2]
    assert batch.target_sum.tolist() == [0, 0, 3, 1, 4, 4, 4, 2, 5]
    assert batch.target_position.tolist() == [2, 3, 2, 7, 7, 9, 10, 13, 13]
    assert batch.weights.tolist() == [1, 1, 0]
    assert batch.images["pixel_values"][:, 0, 0, 0].tolist() == [0, 255]


def test_packed_prompt_targets_belong_to_the_chosen_answer() -> None:
    batch = build_batch([make([5, IMAGE, 6, 4], [7], [9])], "prompt+response", "shared_prefix")
    assert batch.target_ids.tolist() == [6, 4, 7, 9]
    assert batch.target_position.tolist() == [1, 2, 3, 3]
    assert batch.target_sum.tolist() == [0, 0, 0, 1]
    assert batch.target_in_response.tolist() == [False, False, True, True]


def test_a_pair_with_two_prompts_has_two_spans() -> None:
    pairs = [
        replace(make([5, IMAGE, 6], [7, 8], [9, 4], 1), rejected_prompt=make([5, IMAGE, IMAGE], [1], [1], 2).prompt)
    ]
    pairs.append(make([1, 2], [3], [4], 3))
    batch = build_batch(pairs, "prompt+response", "shared_prefix")
    assert batch.input_ids.tolist() == [[5, IMAGE, 6, 7, 8, 5, IMAGE, IMAGE, 9, 4, 1, 2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 2]]
    assert batch.branches == (Branch(0, 3, 5), Branch(5, 8, 10), Branch(10, 12, 13), Branch(13, 13, 14, ((10, 12),)))
    assert batch.target_ids.tolist() == [6, 7, 8, 9, 4, 2, 3, 4]
    assert batch.target_sum.tolist() == [0, 0, 0, 2, 2, 1, 1, 3]
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
    assert batch.branches == (
        Branch(0, 2, 3),
        Branch(3, 3, 4, ((0, 2),)),
        Branch(4, 7, 9),
        Branch(9, 9, 10, ((4, 7),)),
        Branch(10, 13, 15),
    )
    assert batch.target_ids.tolist() == [2, 3, 4, 6, 7, 8, 9, 7, 8]
    assert batch.target_sum.tolist() == [0, 0, 2, 1, 1, 1, 3, 5, 5]
    assert batch.target_position.tolist() == [0, 1, 1, 5, 6, 7, 6, 12, 13]
    assert batch.images["pixel_values"][:, 0, 0, 0].tolist() == [1, 2]
    assert batch.pairs.other is not None
    assert batch.pairs.other.tolist() == [4, 5]
    size = PairSize.of(pairs[1])
    assert (size.packed, size.rows, size.row, size.image_values) == (11, 3, 5, 24)
    padded = build_batch(pairs, "response", "concatenated")
    assert padded.input_ids.tolist() == [
        [1, 2, 3, 0, 0], [5, IMAGE, 6, 7, 8], [1, 2, 4, 0, 0], [5, IMAGE, 6, 9, 0], [5, IMAGE, IMAGE, 7, 8]
    ]  # fmt: skip
    assert padded.target_sum.tolist() == [0, 1, 1, 2, 3, 5, 5]
    assert padded.images["pixel_values"][:, 0, 0, 0].tolist() == [1, 1, 2]
    assert Packing(1 << 20, "concatenated").tokens([PairSize.of(pair) for pair in pairs]) == padded.input_ids.numel()
    assert build_batch(pairs[:1], "response", "shared_prefix").pairs.other is None


def test_pairs_that_share_a_prompt_are_a_tree() -> None:
    """Answers 7 8 > 9 > 4 to one prompt, each there once, and a question on the same image with answers of its own."""
    prompt = [5, IMAGE, 6, 3]
    pairs = [make(prompt, [7, 8], [9]), make([1, 2], [3], [4]), make(prompt, [9], [4]), make(prompt, [7, 8], [4])]
    pairs.append(make([5, IMAGE, 11], [9], [7]))
    batch = build_batch(pairs, "prompt+response", "shared_prefix", shares="images")
    assert batch.input_ids.tolist() == [[5, IMAGE, 6, 3, 7, 8, 9, 4, 11, 9, 7, 1, 2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 4, 2, 3, 3, 0, 1, 2, 2]]
    assert batch.branches == (
        Branch(0, 4, 6), Branch(6, 6, 7, ((0, 4),)), Branch(7, 7, 8, ((0, 4),)),
        Branch(8, 9, 10, ((0, 2),)), Branch(10, 10, 11, ((0, 2), (8, 9))),
        Branch(11, 13, 14), Branch(14, 14, 15, ((11, 13),)),
    )  # fmt: skip
    # The first three pairs with this prompt share sum 11, of its tokens 6 and 3; all four share sum 10, of the image.
    assert batch.target_ids.tolist() == [6, 3, 7, 8, 9, 4, 11, 9, 7, 2, 3, 4]
    assert batch.target_position.tolist() == [1, 2, 3, 4, 3, 3, 1, 8, 8, 11, 12, 12]
    assert batch.target_sum.tolist() == [11, 11, 0, 0, 5, 7, 4, 4, 9, 1, 1, 6]
    assert batch.pairs.chosen.tolist() == [0, 1, 5, 0, 4]
    assert batch.pairs.rejected.tolist() == [5, 6, 7, 7, 9]
    assert batch.pairs.prompts is not None
    assert batch.pairs.prompts.tolist() == [[10, 11], [12, 12], [10, 11], [10, 11], [10, 12]]
    assert batch.pairs.num_sums == 13
    assert batch.images["pixel_values"].shape[0] == 1
    assert batch.num_pairs == 5
    whole = build_batch(pairs, "response", "shared_prefix", shares="prompts")
    assert whole.input_ids.tolist() == [[5, IMAGE, 6, 3, 7, 8, 9, 4, 1, 2, 3, 4, 5, IMAGE, 11, 9, 7]]
    assert whole.pairs.prompts is None
    for found, shares in ((batch, "images"), (whole, "prompts")):
        sizes = [PairSize.of(pair) for pair in pairs]
        assert Packing(1 << 20, "shared_prefix", shares=shares).tokens(sizes) == found.input_ids.numel()  # type: ignore[arg-type]


def test_equal_prompts_with_different_images_are_apart() -> None:
    pairs = [make([5, IMAGE, 6], [7], [8], index) for index in range(2)]
    batch = build_batch(pairs, "response", "shared_prefix", shares="images")
    assert batch.input_ids.tolist() == [[5, IMAGE, 6, 7, 8, 5, IMAGE, 6, 7, 8]]
    assert batch.images["pixel_values"][:, 0, 0, 0].tolist() == [0, 1]
