"""Memory and arithmetic of one forward and backward, from a dry run of the real `PairModel` on a packed batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import Layout, PairBatch, build_batch
from orpo_ray.model.loading import PixelNorm, own_attention, ready_to_train
from orpo_ray.model.shared_prefix import PrefixLayout, by_segment, by_varlen, varlen_shape
from orpo_ray.model.shared_prefix import NAME as SHARED_PREFIX
from orpo_ray.model.shared_prefix import register as register_shared_prefix
from orpo_ray.objective.forward import PIXELS_AT_ONCE, PairModel
from orpo_ray.objective.logps import count_chunks
from orpo_ray.objective.orpo import Normaliser, orpo_loss
from orpo_ray.planning.dry_run import DryRun, dry_run
from orpo_ray.sections import ModelSection

AS_ON_CUDA = "orpo_ray_planned_for_cuda"
_NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class PairShape:
    """A pair as far as memory goes. prompt: tokens of it that are text. images: of the prompt; image_tokens: of each.

    vision: what the vision part is given for one image, as shapes of its tensors.
    """

    prompt: int
    chosen: int
    rejected: int
    images: int
    image_tokens: int
    vision: Mapping[str, np.ndarray]

    def tokens(self, layout: Layout) -> int:
        """That the pair takes of `optim.tokens_per_microbatch`."""
        prompt = self.prompt + self.images * self.image_tokens
        if layout == "shared_prefix":
            return prompt + self.chosen + self.rejected
        return 2 * (prompt + max(self.chosen, self.rejected))

    def pair(self, image_token: int, slot: int) -> EncodedPair:
        """Such a pair, of no meaning."""
        image = [1] + [image_token] * self.image_tokens if self.images else []
        ids = np.asarray([1] * max(0, self.prompt - self.images) + image * self.images, np.int32)
        answers = [np.ones(length, np.int32) for length in (self.chosen, self.rejected)]
        images = {name: np.concatenate([value] * self.images) for name, value in self.vision.items()}
        return EncodedPair(str(slot), ids, *answers, ids != image_token, images if self.images else {}, slot)


@dataclass(frozen=True)
class Activations:
    """Of one micro-batch on one worker. saved: bytes that wait for backward as the output head begins. peak: most bytes
    over weights and gradients at any time. flops: of matrix products, recomputation included. pairs, tokens: in it.
    """

    saved: int
    peak: int
    flops: int
    pairs: int
    tokens: int


def unloaded_model(
    section: ModelSection, config: Any, dtype: torch.dtype, layout: Layout, device: str = "cuda"
) -> torch.nn.Module:
    """The model without its weights, ready to train, as `load_model` would have it on `device` (cpu or cuda)."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    language = own_attention(config)
    if layout == "shared_prefix":
        register_shared_prefix()
        _register_as_on_cuda()
        language = AS_ON_CUDA if device == "cuda" else SHARED_PREFIX
    with no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation={"text_config": language, "vision_config": "sdpa"}
        )
    return ready_to_train(model, section, seed=0)


def batch_of(shape: PairShape, pairs: int, config: Any, nll: str, layout: Layout) -> PairBatch:
    """A micro-batch of so many such pairs."""
    vocabulary = config.get_text_config().vocab_size
    batch = build_batch([shape.pair(config.image_token_id, slot) for slot in range(pairs)], nll, layout)
    chunks = count_chunks(len(batch.target_ids), vocabulary)
    return PairBatch(**{**{name: getattr(batch, name) for name in batch.__dataclass_fields__}, "head_chunks": chunks})


def measure(
    section: ModelSection, config: Any, dtype: torch.dtype, layout: Layout, batch: PairBatch, bounded: bool, device: str
) -> Activations:
    """Forward and backward of a batch, dry. bounded: the vision part takes `PIXELS_AT_ONCE` (not under ZeRO-3)."""
    with dry_run() as dry:
        model = unloaded_model(section, config, dtype, layout, device)
        for parameter in model.parameters():
            if parameter.requires_grad:  # as after an earlier micro-batch
                parameter.grad = torch.empty_like(parameter)
        portion = PIXELS_AT_ONCE[device] if bounded and section.gradient_checkpointing else None
        pair_model = PairModel(model, _NORM, portion)
        pair_model.layout = layout
        return step(pair_model, batch, dry)


def step(pair_model: PairModel, batch: PairBatch, dry: DryRun) -> Activations:
    """Run it; what was alive before counts for nothing."""
    before, flops = dry.now, dry.flops
    dry.peak = before
    saved: list[int] = []
    head = pair_model.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda *_: saved.append(dry.now - before))
    logps = pair_model(batch)
    loss, _ = orpo_loss(logps, batch.weights, 0.1, Normaliser(float(batch.num_pairs)))
    loss.backward()
    handle.remove()
    return Activations(saved[0], dry.peak - before, dry.flops - flops, batch.num_pairs, batch.input_ids.numel())


def _register_as_on_cuda() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(AS_ON_CUDA, _attention_as_on_cuda)
    AttentionMaskInterface.register(AS_ON_CUDA, lambda *_, **__: None)


def _attention_as_on_cuda(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prefix: PrefixLayout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What `shared_prefix_attention` runs on a GPU, without one."""
    assert shared_prefix is not None
    if softcap is None and dropout == 0.0 and shared_prefix.bidirectional is None and varlen_shape(query):
        return by_varlen(query, key, value, scaling, sliding_window, shared_prefix.sequences), None
    return by_segment(query, key, value, dropout, scaling, sliding_window, softcap, shared_prefix), None
