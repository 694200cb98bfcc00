"""How many workers a run with `scaling.num_workers: [min, max]` takes if groups of them compute pairs together.

Nothing heavy is imported at the top: Ray Train's controller imports this file.
"""

from __future__ import annotations

from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class GroupScaling(ElasticScalingPolicy):
    """Ray Train's elastic scaling in steps of whole groups. Workers that would fill a part of a group are not started.

    Args:
        scaling_config: Ray Train's, whose least and greatest numbers of workers are multiples of `together`.
        together: workers of a group (`scaling.sequence_parallel`).
    """

    def __init__(self, scaling_config: ScalingConfig, together: int) -> None:
        super().__init__(scaling_config)
        self._together = together

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        fitting: int = super()._count_possible_workers(reserved_resources)
        return fitting - fitting % self._together
