"""Memory and arithmetic of one forward and backward, from a dry run of the real `PairModel` on a packed batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import Layout, PairBatch, build_batch
from orpo_ray.model.attention_kernel import PLANNED_GPU
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.loading import own_attention, ready_to_train, without_adapters
from orpo_ray.model.shared_prefix import NAME as SHARED_PREFIX
from orpo_ray.model.shared_prefix import no_mask, shared_prefix_attention
from orpo_ray.model.shared_prefix import register as register_shared_prefix
from orpo_ray.objective.forward import PIXELS_AT_ONCE, PairModel
from orpo_ray.objective.logps import count_chunks
from orpo_ray.objective.orpo import Normaliser, orpo_loss
from orpo_ray.planning.dry_run import Live, dry_run
from orpo_ray.processing.pixel_norm import PixelNorm

AS_ON_CUDA = "orpo_ray_planned_for_cuda"
# Layers of each part that are run of a deep model. Two, so that one is neither first nor last.
FEW = 2
NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


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

    def pair(self, image_token: int, sample_index: int) -> EncodedPair:
        """Such a pair, of no meaning."""
        image = [1] + [image_token] * self.image_tokens if self.images else []
        ids = np.asarray([1] * max(0, self.prompt - self.images) + image * self.images, np.int32)
        chosen, rejected = np.ones(self.chosen, np.int32), np.ones(self.rejected, np.int32)
        images = {name: np.concatenate([value] * self.images) for name, value in self.vision.items()}
        return EncodedPair(
            str(sample_index), ids, chosen, rejected, ids != image_token, images if self.images else {}, sample_index
        )


# Where a forward and backward may need the most, in their order; the output head belongs to the third.
PHASES = ("vision forward", "language forward", "language backward", "vision backward")


@dataclass(frozen=True)
class Activations:
    """Of one micro-batch on one worker, over weights and gradients.

    saved: bytes that wait for backward as the output head begins. peaks: most bytes at any time of each of `PHASES`.
    flops: of matrix products, recomputation included. pairs, tokens: in it.
    """

    saved: int
    peaks: tuple[int, ...]
    flops: int
    pairs: int
    tokens: int

    @property
    def peak(self) -> int:
        """Most bytes at any time."""
        return max(self.peaks)

    def per_layer(self, deeper: Activations) -> tuple[int, ...]:
        """What a layer adds, from the same with one layer more."""
        mine, theirs = ((each.saved, *each.peaks, each.flops) for each in (self, deeper))
        return tuple(b - a for a, b in zip(mine, theirs, strict=True))

    def deepened(self, layer: tuple[int, ...], layers: int) -> Activations:
        """The same with so many layers more."""
        saved, *peaks, flops = (
            a + layers * b for a, b in zip((self.saved, *self.peaks, self.flops), layer, strict=True)
        )
        return Activations(saved, tuple(peaks), flops, self.pairs, self.tokens)

    def widened(self, pairs: int, in_portions: bool) -> Activations:
        """The same with so many pairs: what waits grows with them, the chunk of logits at a time does not.

        in_portions: neither does what the vision part computes anew (`PIXELS_AT_ONCE`).
        """
        ratio = pairs / self.pairs
        saved = round(self.saved * ratio)
        peaks = [round(peak * ratio) for peak in self.peaks]
        for phase in ("language backward", "vision backward") if in_portions else ("language backward",):
            place = PHASES.index(phase)
            peaks[place] = saved + max(0, self.peaks[place] - self.saved)
        return Activations(saved, tuple(peaks), round(self.flops * ratio), pairs, round(self.tokens * ratio))


def unloaded_model(
    section: ModelConfig, config: Any, dtype: torch.dtype, layout: Layout, device: str = "cuda"
) -> torch.nn.Module:
    """The model on `meta`, ready to train, as `load_model` would have it on `device` (cpu or cuda)."""
    from transformers import AutoModelForImageTextToText

    if section.lora is not None:
        import peft  # noqa: F401 - not first below, where constants of modules would be made on meta

    language = own_attention(config)
    if layout == "shared_prefix":
        register_shared_prefix()
        _register_as_on_cuda()
        language = AS_ON_CUDA if device == "cuda" else SHARED_PREFIX
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation={"text_config": language, "vision_config": "sdpa"}
        )
        return ready_to_train(model, section, seed=0)


def batch_of(shape: PairShape, pairs: int, config: Any, nll: str, layout: Layout) -> PairBatch:
    """A micro-batch of so many such pairs."""
    vocabulary = config.get_text_config().vocab_size
    shaped = [shape.pair(config.image_token_id, sample_index) for sample_index in range(pairs)]
    batch = build_batch(shaped, nll, layout, collate=family_of(config).collate)
    return replace(batch, head_chunks=count_chunks(len(batch.target_ids), vocabulary))


def measure(
    section: ModelConfig, config: Any, dtype: torch.dtype, layout: Layout, batch: PairBatch, bounded: bool, device: str
) -> Activations:
    """Forward and backward of a batch, dry. bounded: the vision part takes `PIXELS_AT_ONCE` (not under ZeRO-3).

    A deep model is run with few layers and what one more adds: layers are alike, so that each phase's peak grows by as
    much with every one of them.
    """
    depth = _depths(config)
    if min(depth) <= FEW + 1:
        return _measure(section, config, dtype, layout, batch, bounded, device)

    def cut(language: int, vision: int) -> Activations:
        return _measure(section, _cut(config, language, vision), dtype, layout, batch, bounded, device)

    few, language, vision = cut(FEW, FEW), cut(FEW + 1, FEW), cut(FEW, FEW + 1)
    deep = few.deepened(few.per_layer(language), depth[0] - FEW)
    return deep.deepened(few.per_layer(vision), depth[1] - FEW)


def _measure(
    section: ModelConfig, config: Any, dtype: torch.dtype, layout: Layout, batch: PairBatch, bounded: bool, device: str
) -> Activations:
    model = unloaded_model(section, config, dtype, layout, device)
    with dry_run() as dry:
        without_numbers(model)
        for parameter in model.parameters():
            if parameter.requires_grad:  # as after an earlier micro-batch
                parameter.grad = torch.empty_like(parameter)
        portion = PIXELS_AT_ONCE[device] if bounded and section.gradient_checkpointing else None
        pair_model = PairModel(model, NORM, portion)
        pair_model.layout = layout
        return step(pair_model, batch, dry)


def step(pair_model: PairModel, batch: PairBatch, live: Live) -> Activations:
    """Forward and backward, dry or real; what `live` knew before counts for nothing."""
    before, flops = live.now, live.flops
    live.peak = before
    peaks: list[int] = []
    saved: list[int] = []

    def next_phase(*_: Any) -> None:
        peaks.append(live.peak - before)
        live.peak = live.now

    def language_begins(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        next_phase()
        if kwargs["inputs_embeds"].requires_grad:
            kwargs["inputs_embeds"].register_hook(next_phase)

    def head_begins(*_: Any) -> None:
        if not saved:
            saved.append(live.now - before)
            next_phase()

    base = without_adapters(pair_model.model)
    handles = [
        base.get_decoder().register_forward_pre_hook(language_begins, with_kwargs=True),
        base.get_output_embeddings().register_forward_pre_hook(head_begins),
    ]
    logps = pair_model(batch)
    loss, _ = orpo_loss(logps, batch.weights, 0.1, Normaliser(float(batch.num_pairs)))
    loss.backward()
    next_phase()
    for handle in handles:
        handle.remove()
    peaks += [0] * (len(PHASES) - len(peaks))
    return Activations(saved[0], tuple(peaks), live.flops - flops, batch.num_pairs, batch.input_ids.numel())


def _depths(config: Any) -> tuple[int, int]:
    """Layers of the language model, and of the vision part."""
    vision = config.vision_config
    return config.get_text_config().num_hidden_layers, getattr(vision, "num_hidden_layers", getattr(vision, "depth", 0))


def _cut(config: Any, language: int, vision: int) -> Any:
    """The config of a model with so many layers of each part."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = language
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:language]
    for name in ("num_hidden_layers", "depth"):
        if hasattr(config.vision_config, name):
            setattr(config.vision_config, name, vision)
    return config


def without_numbers(model: torch.nn.Module) -> None:
    """Put what is on `meta` where the dry run is; tied weights stay tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in moved:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                moved[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def _register_as_on_cuda() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(AS_ON_CUDA, _attention_as_on_cuda)
    AttentionMaskInterface.register(AS_ON_CUDA, no_mask)


def _attention_as_on_cuda(*states: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Run the kernel that training would choose on a GPU."""
    return shared_prefix_attention(*states, **(options | {"hardware": PLANNED_GPU}))
