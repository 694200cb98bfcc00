"""EncodedPairs -> `PairBatch`: the tensors of one forward.

Legend: B pairs in a micro-batch, T tokens of a row, M target tokens (those whose log-prob is wanted).

Two layouts. `shared_prefix`: one row that holds all pairs without padding, `[prompt | chosen | rejected]` after
`[prompt | chosen | rejected]`; pairs that share an image or a prompt are one tree, with each answer once.
`concatenated`: two rows per pair, padded to the longest; the reference, and the layout of families whose layers cannot
share a prefix. A pair with other images has a further branch, or a third row: the prompt with those images, and the
chosen answer again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from orpo_ray.data.balance import Layout, PairSize
from orpo_ray.data.branches import Branch
from orpo_ray.data.collate_images import ON_HOST, Collate, TokenRows, concatenate_images
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.forest import Forest, Node
from orpo_ray.data.pair_index import PairIndex
from orpo_ray.data.sharing import Shares
from orpo_ray.data.transfer import to_device
from orpo_ray.data.varlen_index import VarlenIndex

# PairBatch.token_kind
TEXT, IMAGE, RESPONSE, PADDING = range(4)


@dataclass(frozen=True)
class PairBatch:
    """The tensors of one forward."""

    input_ids: torch.Tensor
    """int64 [1, T] in the shared-prefix layout. In the concatenated one [2B, T], all chosen answers before all rejected
    ones, and a further row for each pair with other images; padding on the right. Under a causal mask no real token
    sees the padding behind it, so there is no attention mask."""
    token_kind: torch.Tensor
    """int64, like input_ids: TEXT or IMAGE (a placeholder) in a prompt, RESPONSE, PADDING."""
    position_ids: torch.Tensor
    """int64, like input_ids: a token's index in its own sequence, prompt + answer."""
    branches: tuple[Branch, ...]
    """The sequences of the packed row, in order; empty in the concatenated layout."""
    target_position: torch.Tensor
    """int64 [M], into the flattened hidden states: the token before each target."""
    target_ids: torch.Tensor
    """int64 [M]: the target tokens."""
    target_sum: torch.Tensor
    """int64 [M]: the sum that each target counts for."""
    target_in_response: torch.Tensor
    """bool [M]: False for targets in a prompt."""
    pairs: PairIndex
    """The sums of each pair."""
    weights: torch.Tensor
    """float32 [B]: 1 for a pair, 0 for a dummy pair."""
    images: dict[str, torch.Tensor]
    """The image tensors of all pairs, in the order of the rows, and once for each tree; empty if no pair has an image.
    Those with `ON_HOST` in their names are never moved to a device."""
    sample_indices: tuple[int, ...]
    """The sample index of each pair, [B]."""
    trains_on_images: bool
    """Whether a pair has an image, rather than only a dummy pair."""
    images_shared: bool = True
    """Whether all rows of every pair take the same images, which are stored once. Always true of a packed row."""
    varlen: VarlenIndex | None = None
    """The sequences of a packed row as attention kernels take them."""
    workers: int = 1
    """How many workers compute the row together. Above 1, the targets are those of one worker, and their positions are
    among its tokens (`SequenceGroup.with_own_targets`)."""

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
        return replace(self, **changed, pairs=self.pairs.map(change), images=images, varlen=varlen)

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on a device."""
        return self.map(partial(to_device, device=device))

    def repeated(self, copies: int, images: dict[str, torch.Tensor]) -> PairBatch:
        """A packed row of several copies of this one, behind each other. Pair b of copy k is pair k * B + b.

        Args:
            copies: how many.
            images: the image tensors of the new row, as the model's family makes them (`Family.repeated_images`).
        """
        tokens = self.input_ids.shape[1]
        copy = torch.arange(copies, device=self.input_ids.device).unsqueeze(1)
        return replace(
            self,
            input_ids=self.input_ids.repeat(1, copies),
            token_kind=self.token_kind.repeat(1, copies),
            position_ids=self.position_ids.repeat(1, copies),
            branches=tuple(branch.moved(number * tokens) for number in range(copies) for branch in self.branches),
            target_position=(self.target_position + copy * tokens).flatten(),
            target_ids=self.target_ids.repeat(copies),
            target_sum=(self.target_sum + copy * self.pairs.num_sums).flatten(),
            target_in_response=self.target_in_response.repeat(copies),
            pairs=self.pairs.repeated(copies),
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
    shares: Shares = "nothing",
) -> PairBatch:
    """Make the tensors of one forward.

    Args:
        pairs: the pairs to train on.
        nll: which tokens the NLL covers, `response` or `prompt+response`.
        layout: see the module.
        dummy_pairs: pairs of weight 0, behind the others.
        collate: how image tensors are joined; the model family's own (`Family.collate`).
        shares: what different pairs of a packed row share, as far as the model's family can (`Family.shares`).
    """
    everything = [*pairs, *dummy_pairs]
    rows = _Rows(everything, nll)
    if layout == "shared_prefix":
        rows.pack(shares)
    else:
        rows.pad()
    return PairBatch(
        input_ids=torch.from_numpy(rows.input_ids),
        token_kind=torch.from_numpy(rows.token_kind),
        position_ids=torch.from_numpy(rows.position_ids),
        branches=tuple(rows.branches),
        target_position=torch.from_numpy(np.concatenate(rows.target_position)),
        target_ids=torch.from_numpy(np.concatenate(rows.target_ids)),
        target_sum=torch.from_numpy(np.concatenate(rows.target_sum)),
        target_in_response=torch.from_numpy(np.concatenate(rows.target_in_response)),
        pairs=rows.index,
        weights=torch.tensor([1.0] * len(pairs) + [0.0] * len(dummy_pairs)),
        images=_tensors(collate(rows.images, rows.tokens())) if any(rows.images) else {},
        sample_indices=tuple(pair.sample_index for pair in everything),
        trains_on_images=any(pair.images for pair in pairs),
        images_shared=rows.images_shared,
        varlen=VarlenIndex.of(rows.branches) if rows.branches else None,
    )


class _Rows:
    """The rows of a batch while they are filled."""

    def __init__(self, pairs: Sequence[EncodedPair], nll: str) -> None:
        self.pairs = pairs
        self.prompt_targets = nll == "prompt+response"
        self.branches: list[Branch] = []
        self.images: list[dict[str, np.ndarray]] = []  # of each prompt, in the order in which the rows need them
        self.images_shared = True
        self.target_position: list[np.ndarray] = []
        self.target_ids: list[np.ndarray] = []
        self.target_sum: list[np.ndarray] = []
        self.target_in_response: list[np.ndarray] = []

    def pack(self, shares: Shares) -> None:
        """Put the trees of all pairs one after another in one row."""
        forest = Forest.of(self.pairs, shares)
        self.index = PairIndex.of(forest, self.prompt_targets)
        self._allocate(1, sum(root.total_tokens for root in forest.roots))
        start = 0
        for root in forest.roots:
            self.images.append(root.images)
            start = self._place_tree(root, start, Branch(start, start, start), position=0, before=None)

    def pad(self) -> None:
        """Give each answer a row: the chosen ones, the rejected ones, then the chosen ones to other images."""
        count = len(self.pairs)
        contrasted = [index for index, pair in enumerate(self.pairs) if pair.other_prompt is not None]
        self.images_shared = not contrasted and all(pair.rejected_prompt is None for pair in self.pairs)
        self.index = PairIndex.separate(count, 3 if contrasted else 2)
        answers = [(index, pair.prompt, pair.chosen_ids) for index, pair in enumerate(self.pairs)]
        answers += [
            (count + index, pair.rejected_prompt or pair.prompt, pair.rejected_ids)
            for index, pair in enumerate(self.pairs)
        ]
        others = [(index, self.pairs[index].other_prompt, self.pairs[index].chosen_ids) for index in contrasted]
        answers += [(2 * count + index, prompt, ids) for index, prompt, ids in others if prompt is not None]
        self.images = [prompt.images for _, prompt, _ in answers[: count if self.images_shared else None]]
        self._allocate(len(answers), max(PairSize.of(pair).row for pair in self.pairs))
        for row, (number, prompt, answer) in enumerate(answers):
            start, length = row * self.width, len(prompt.ids)
            is_target = self.prompt_targets and row < count
            self._place(prompt.ids, _kinds(prompt.is_text), start, 0, None, number if is_target else None)
            self._place(answer, RESPONSE, start + length, length, start + length - 1, number)

    def tokens(self) -> TokenRows:
        """The rows as families place images in them."""
        return TokenRows(self.input_ids, self.token_kind == IMAGE, self.branches)

    def _allocate(self, count: int, width: int) -> None:
        self.width = width
        self.input_ids = np.zeros((count, width), np.int64)
        self.token_kind = np.full((count, width), PADDING, np.int64)
        self.position_ids = np.tile(np.arange(width), (count, 1))

    def _place_tree(self, node: Node, start: int, branch: Branch, position: int, before: int | None) -> int:
        """Place a node and what follows it.

        Args:
            node: the node.
            start: where it begins in the row.
            branch: the branch that it belongs to, of which start and context are known.
            position: see `_place`.
            before: see `_place`.

        Returns:
            Where the row goes on.
        """
        end = start + len(node.ids)
        if node.is_text is None:
            self._place(node.ids, RESPONSE, start, position, before, node.sum)
            self.branches.append(replace(branch, answer=start, end=end))
            return end
        is_target = self.prompt_targets and node.pairs
        self._place(node.ids, _kinds(node.is_text), start, position, before, node.sum if is_target else None)
        following = end
        for child in node.children.values():
            # The first child continues the branch.
            own = (
                branch if following == end else Branch(following, following, following, replace(branch, end=end).ranges)
            )
            following = self._place_tree(child, following, own, position + len(node.ids), end - 1)
        return following

    def _place(
        self,
        ids: np.ndarray,
        kinds: np.ndarray | int,
        start: int,
        position: int,
        before: int | None,
        counts_for: int | None,
    ) -> None:
        """Place tokens that follow each other.

        Args:
            ids: the tokens.
            kinds: see `PairBatch.token_kind`.
            start: where they begin in the flattened rows.
            position: index of the first one in its own sequence.
            before: where the token before the first one is; None if nothing predicts the first one.
            counts_for: the sum that they count for as targets, except image placeholders; None if they are no targets.
        """
        end = start + len(ids)
        self.input_ids.reshape(-1)[start:end] = ids
        self.token_kind.reshape(-1)[start:end] = kinds
        self.position_ids.reshape(-1)[start:end] = position + np.arange(len(ids))
        if counts_for is None:
            return
        placed = self.token_kind.reshape(-1)[start:end]
        targets = np.flatnonzero(placed != IMAGE)
        if before is None:
            targets = targets[targets > 0]
        self.target_position.append(np.where(targets > 0, start + targets - 1, before or 0))
        self.target_ids.append(ids[targets].astype(np.int64))
        self.target_sum.append(np.full(len(targets), counts_for))
        self.target_in_response.append(placed[targets] == RESPONSE)


def _kinds(is_text: np.ndarray) -> np.ndarray:
    return np.where(is_text, TEXT, IMAGE)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
