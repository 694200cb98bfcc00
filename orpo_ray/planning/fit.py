"""What fits where, how long it takes and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from orpo_ray.planning.activations import Activations
from orpo_ray.planning.gpus import GIB, Gpu
from orpo_ray.planning.states import STAGES, Stage, Weights, states

# CUDA's context with its libraries' workspaces, NCCL's buffers where there are several workers, and what the
# caching allocator cannot use, as a share of what comes and goes. Assumed, not measured here.
CONTEXT, NCCL, FRAGMENTATION = 1.0 * GIB, 0.5 * GIB, 0.1
# Of a GPU's peak, counting what is computed anew: what well-kept trainers reach with models of some billions.
MFU = 0.30
WORKERS = (1, 2, 4, 8, 16, 32, 64)
# Fuller than this is not advised: nothing here was compared with a GPU.
ROOM = 0.9


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. activations: what waits for backward. head: more at the peak: logits, what comes and goes."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    head: float
    overhead: float
    total: float


@dataclass(frozen=True)
class Setting:
    """A way to run a recipe. budget: `optim.tokens_per_microbatch`."""

    workers: int
    stage: Stage
    checkpointing: bool
    budget: int


@dataclass(frozen=True)
class Fitting:
    """A setting on a GPU type that holds it."""

    gpu: Gpu
    setting: Setting
    memory: Memory
    hours: float
    cost: float


@dataclass(frozen=True)
class Planner:
    """Everything that was counted, to be asked about any setting.

    weights: the model's. activations: of a full micro-batch of `budget` tokens, without and with checkpointing.
    row: tokens of the least micro-batch, one pair. steps, pairs_per_step: of the run. quantized: the base is in 4 bits.
    """

    weights: Weights
    optimizer: str
    activations: dict[bool, Activations]
    budget: int
    row: int
    steps: int
    pairs_per_step: int
    mfu: float
    quantized: bool

    def memory(self, setting: Setting) -> Memory:
        """Of each GPU in a setting."""
        held = states(self.weights, setting.stage, setting.workers, self.optimizer)
        full = self.activations[setting.checkpointing]
        # What waits grows with the tokens, and a row is never less than a pair; chunks of logits stay as they are.
        tokens = max(self.row, min(setting.budget, self.budget))
        share = tokens / max(full.tokens, self.row)
        saved = full.saved * share
        head: float = full.peak - full.saved + self.weights.largest_quantized
        moving: float = saved + head + held.buffers
        # The optimizer steps when activations are gone; ZeRO-3 never lets go of its bucket.
        moving = max(moving, held.step + (held.buffers if setting.stage == 3 else 0))
        overhead = CONTEXT + (NCCL if setting.workers > 1 else 0) + FRAGMENTATION * moving
        kept = held.weights + held.gradients + held.optimizer
        total = max(kept + moving, held.start) + overhead
        head = moving - saved - held.buffers if moving > saved + held.buffers else head
        return Memory(held.weights, held.gradients, held.optimizer, held.buffers, saved, head, overhead, total)

    def hours(self, gpu: Gpu, setting: Setting) -> float:
        """Of training, without loading and evaluation."""
        full = self.activations[setting.checkpointing]
        flops = full.flops / full.pairs * self.pairs_per_step * self.steps
        return flops / (setting.workers * gpu.flops * self.mfu) / 3600

    def fits(self, gpu: Gpu, setting: Setting, share: float = 1.0) -> bool:
        """Whether this share of a GPU holds it."""
        return self.memory(setting).total <= share * gpu.memory * GIB

    def fitting(self, gpu: Gpu, setting: Setting) -> Fitting:
        """With its time and price."""
        hours = self.hours(gpu, setting)
        return Fitting(gpu, setting, self.memory(setting), hours, hours * setting.workers * gpu.price)

    def cheapest(self, gpu: Gpu) -> Fitting | None:
        """The setting that costs least on this type; of equals the one with fewest workers, then most like no sharding.

        More workers cost the same and take less time, as far as this counts.
        """
        for checkpointing in sorted(self.activations):
            for workers in (n for n in WORKERS if n <= self.pairs_per_step):
                for budget in (self.budget, self.budget // 2, self.budget // 4):
                    for stage in STAGES if workers > 1 else STAGES[:1]:
                        setting = Setting(workers, stage, checkpointing, budget)
                        # 4-bit weights in parts train, but what they take was never compared with an engine's.
                        if not (self.quantized and stage == 3) and self.fits(gpu, setting, ROOM):
                            return self.fitting(gpu, setting)
        return None
