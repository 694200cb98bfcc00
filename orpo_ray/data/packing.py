"""EncodedPairs -> `PairBatch`: the tensors of one forward.

Legend: B pairs in a micro-batch, T tokens of a row, M target tokens (those whose log-prob is wanted).

Two layouts. `shared_prefix`: one row that holds all pairs without padding, `[prompt | chosen | rejected]` after
`[prompt | chosen | rejected]`. `concatenated`: two rows per pair, padded to the longest; the reference, and the layout
of families whose layers cannot share a prefix. A pair with other images has a further branch, or a third row: the
prompt with those images, and the chosen answer again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from orpo_ray.data.balance import Layout, PairSize
from orpo_ray.data.collate_images import ON_HOST, Collate, TokenRows, concatenate_images
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.spans import PairSpan
from orpo_ray.data.transfer import to_device
from orpo_ray.data.varlen_index import VarlenIndex
from orpo_ray.processing.prompts import EncodedPrompt

# PairBatch.token_kind
TEXT, IMAGE, RESPONSE, PADDING = range(4)


@dataclass(frozen=True)
class PairBatch:
    """The tensors of one forward. Answer i < B is the chosen one of pair i, answer B + i its rejected one, and answer
    2B + i the chosen one again, to the other images."""

    input_ids: torch.Tensor
    """int64 [1, T] in the shared-prefix layout. In the concatenated one [2B, T], with answer i in row i, and a further
    row for each pair with other images; padding on the right. Under a causal mask no real token sees the padding behind
    it, so there is no attention mask."""
    token_kind: torch.Tensor
    """int64, like input_ids: TEXT or IMAGE (a placeholder) in a prompt, RESPONSE, PADDING."""
    position_ids: torch.Tensor
    """int64, like input_ids: a token's index in its own sequence, prompt + answer."""
    spans: tuple[PairSpan, ...]
    """Positions of the pairs in the packed row, in order; empty in the concatenated layout."""
    target_position: torch.Tensor
    """int64 [M], into the flattened hidden states: the token before each target."""
    target_ids: torch.Tensor
    """int64 [M]: the target tokens."""
    target_answer: torch.Tensor
    """int64 [M]: the answer that each target belongs to."""
    target_in_response: torch.Tensor
    """bool [M]: False for targets in a prompt."""
    weights: torch.Tensor
    """float32 [B]: 1 for a pair, 0 for a dummy pair."""
    images: dict[str, torch.Tensor]
    """The image tensors of all pairs, in the order of the rows; empty if no pair has an image. Those with `ON_HOST` in
    their names are never moved to a device."""
    sample_indices: tuple[int, ...]
    """The sample index of each pair, [B]."""
    trains_on_images: bool
    """Whether a pair has an image, rather than only a dummy pair."""
    images_shared: bool = True
    """Whether all rows of every pair take the same images, which are stored once. Always true of a packed row."""
    answers_per_pair: int = 2
    """3 if a pair has other images, else 2."""
    varlen: VarlenIndex | None = None
    """The sequences of a packed row as attention kernels take them."""

    @property
    def num_pairs(self) -> int:
        """B, dummy pairs included."""
        return len(self.weights)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PairBatch:
        """The same batch with every tensor changed that belongs on the model's device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {k: change(value) for k, value in values.items() if isinstance(value, torch.Tensor)}
        images = {n: value if n.startswith(ON_HOST) else change(value) for n, value in self.images.items()}
        varlen = None if self.varlen is None else self.varlen.map(change)
        return replace(self, **changed, images=images, varlen=varlen)

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on a device."""
        return self.map(partial(to_device, device=device))

    def repeated(self, copies: int, images: dict[str, torch.Tensor]) -> PairBatch:
        """A packed row of several copies of this one, behind each other. Pair b of copy k is pair k * B + b.

        Args:
            copies: how many.
            images: the image tensors of the new row, as the model's family makes them (`Family.repeated_images`).
        """
        tokens, pairs = self.input_ids.shape[1], self.num_pairs
        copy = torch.arange(copies, device=self.input_ids.device).unsqueeze(1)
        answer = self.target_answer // pairs * (copies * pairs) + self.target_answer % pairs
        return replace(
            self,
            input_ids=self.input_ids.repeat(1, copies),
            token_kind=self.token_kind.repeat(1, copies),
            position_ids=self.position_ids.repeat(1, copies),
            spans=tuple(span.moved(number * tokens) for number in range(copies) for span in self.spans),
            target_position=(self.target_position + copy * tokens).flatten(),
            target_ids=self.target_ids.repeat(copies),
            target_answer=(answer + copy * pairs).flatten(),
            target_in_response=self.target_in_response.repeat(copies),
            weights=self.weights.repeat(copies),
            images=images,
            sample_indices=self.sample_indices * copies,
            varlen=None if self.varlen is None else self.varlen.repeated(copies, tokens),
        )


def build_batch(
    pairs: Sequence[EncodedPair],
    nll: str,
    layout: Layout,
    dummy_pairs: Sequence[EncodedPair] = (),
    collate: Collate = concatenate_images,
) -> PairBatch:
    """Make the tensors of one forward.

    Args:
        pairs: the pairs to train on.
        nll: which tokens the NLL covers, `response` or `prompt+response`.
        layout: see the module.
        dummy_pairs: pairs of weight 0, behind the others.
        collate: how image tensors are joined; the model family's own (`Family.collate`).
    """
    everything = [*pairs, *dummy_pairs]
    rows = _Rows(everything, nll)
    contrasted = any(pair.other_prompt for pair in everything)
    shared = layout == "shared_prefix" or not (contrasted or any(pair.rejected_prompt for pair in everything))
    if layout == "shared_prefix":
        rows.pack()
    else:
        rows.pad()
    images = _images_in_order(everything, layout, shared)
    return PairBatch(
        input_ids=torch.from_numpy(rows.input_ids),
        token_kind=torch.from_numpy(rows.token_kind),
        position_ids=torch.from_numpy(rows.position_ids),
        spans=tuple(rows.spans),
        target_position=torch.from_numpy(np.concatenate(rows.target_position)),
        target_ids=torch.from_numpy(np.concatenate(rows.target_ids)),
        target_answer=torch.from_numpy(np.concatenate(rows.target_answer)),
        target_in_response=torch.from_numpy(np.concatenate(rows.target_in_response)),
        weights=torch.tensor([1.0] * len(pairs) + [0.0] * len(dummy_pairs)),
        images=_tensors(collate(images, rows.tokens())) if any(images) else {},
        sample_indices=tuple(pair.sample_index for pair in everything),
        trains_on_images=any(pair.images for pair in pairs),
        images_shared=shared,
        answers_per_pair=3 if contrasted else 2,
        varlen=VarlenIndex.of(rows.spans) if rows.spans else None,
    )


class _Rows:
    """The rows of a batch while they are filled."""

    def __init__(self, pairs: Sequence[EncodedPair], nll: str) -> None:
        self.pairs = pairs
        self.prompt_targets = nll == "prompt+response"
        self.spans: list[PairSpan] = []
        self.target_position: list[np.ndarray] = []
        self.target_ids: list[np.ndarray] = []
        self.target_answer: list[np.ndarray] = []
        self.target_in_response: list[np.ndarray] = []

    def pack(self) -> None:
        """Put all pairs one after another in one row."""
        self._allocate(1, sum(PairSize.of(pair).packed for pair in self.pairs))
        start = 0
        for index, pair in enumerate(self.pairs):
            chosen = start + len(pair.prompt_ids)
            rejected = chosen + len(pair.chosen_ids)
            self._place_prompt(pair.prompt, index, 0, start)
            self._place_answer(pair.chosen_ids, index, len(pair.prompt_ids), 0, chosen, before=chosen - 1)
            second = index + len(self.pairs)
            if pair.rejected_prompt is None:
                end = rejected + len(pair.rejected_ids)
                self.spans.append(PairSpan(start, chosen, rejected, end))
                # The last token of the prompt also predicts the first token of the rejected answer.
                self._place_answer(pair.rejected_ids, second, len(pair.prompt_ids), 0, rejected, before=chosen - 1)
            else:
                length = len(pair.rejected_prompt.ids)
                answer = rejected + length
                end = answer + len(pair.rejected_ids)
                self.spans += [PairSpan(start, chosen, rejected, rejected), PairSpan(rejected, answer, end, end)]
                self._place_prompt(pair.rejected_prompt, second, 0, rejected)
                self._place_answer(pair.rejected_ids, second, length, 0, answer, before=answer - 1)
            if pair.other_prompt is not None:
                first, length = end, len(pair.other_prompt.ids)
                end = first + length + len(pair.chosen_ids)
                self.spans.append(PairSpan(first, first + length, end, end))
                self._place_prompt(pair.other_prompt, third := second + len(self.pairs), 0, first)
                self._place_answer(pair.chosen_ids, third, length, 0, first + length, before=first + length - 1)
            start = end

    def pad(self) -> None:
        """Give each answer a row: the chosen ones, the rejected ones, then the chosen ones to other images."""
        count = len(self.pairs)
        answers = [(index, pair.prompt, pair.chosen_ids) for index, pair in enumerate(self.pairs)]
        answers += [
            (count + index, pair.rejected_prompt or pair.prompt, pair.rejected_ids)
            for index, pair in enumerate(self.pairs)
        ]
        answers += [
            (2 * count + index, pair.other_prompt, pair.chosen_ids)
            for index, pair in enumerate(self.pairs)
            if pair.other_prompt is not None
        ]
        self._allocate(len(answers), max(PairSize.of(pair).row for pair in self.pairs))
        for row, (number, prompt, answer) in enumerate(answers):
            start = len(prompt.ids)
            self._place_prompt(prompt, number, row, 0)
            self._place_answer(answer, number, start, row, start, before=start - 1)

    def tokens(self) -> TokenRows:
        """The rows as families place images in them."""
        spans = [(span.start, span.chosen, span.rejected, span.end) for span in self.spans]
        return TokenRows(self.input_ids, self.token_kind == IMAGE, spans)

    def _allocate(self, count: int, width: int) -> None:
        self.width = width
        self.input_ids = np.zeros((count, width), np.int64)
        self.token_kind = np.full((count, width), PADDING, np.int64)
        self.position_ids = np.tile(np.arange(width), (count, 1))

    def _place_prompt(self, prompt: EncodedPrompt, answer: int, row: int, column: int) -> None:
        end = column + len(prompt.ids)
        self.input_ids[row, column:end] = prompt.ids
        self.token_kind[row, column:end] = np.where(prompt.is_text, TEXT, IMAGE)
        self.position_ids[row, column:end] = np.arange(end - column)
        if self.prompt_targets and answer < len(self.pairs):
            # No token before the first one could predict it.
            columns = column + 1 + np.flatnonzero(prompt.is_text[1:])
            self._target(row * self.width + columns - 1, self.input_ids[row, columns], answer, in_response=False)

    def _place_answer(self, ids: np.ndarray, answer: int, position: int, row: int, column: int, before: int) -> None:
        """Place an answer at `column`; `before` is the column whose hidden state predicts its first token."""
        end = column + len(ids)
        self.input_ids[row, column:end] = ids
        self.token_kind[row, column:end] = RESPONSE
        self.position_ids[row, column:end] = position + np.arange(len(ids))
        columns = np.concatenate([[before], np.arange(column, end - 1)])
        self._target(row * self.width + columns, ids.astype(np.int64), answer, in_response=True)

    def _target(self, position: np.ndarray, ids: np.ndarray, answer: int, in_response: bool) -> None:
        self.target_position.append(position)
        self.target_ids.append(ids)
        self.target_answer.append(np.full(len(ids), answer))
        self.target_in_response.append(np.full(len(ids), in_response))


def _images_in_order(pairs: Sequence[EncodedPair], layout: Layout, shared: bool) -> list[dict[str, np.ndarray]]:
    """The image tensors of each prompt, in the order in which the rows need them."""
    if layout == "shared_prefix":
        prompts = [(pair.prompt, pair.rejected_prompt, pair.other_prompt) for pair in pairs]
        return [prompt.images for each in prompts for prompt in each if prompt is not None]
    chosen = [pair.images for pair in pairs]
    if shared:
        return chosen
    rejected = [(pair.rejected_prompt or pair.prompt).images for pair in pairs]
    return chosen + rejected + [pair.other_prompt.images for pair in pairs if pair.other_prompt is not None]


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
