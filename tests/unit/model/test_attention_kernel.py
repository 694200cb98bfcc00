"""Choice of the attention kernel by case; training and plan choose the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orpo_ray.data.branches import Branch
from orpo_ray.model import shared_prefix
from orpo_ray.model.attention_kernel import PLANNED_GPU, AttentionKernel, Hardware, choose_kernel
from orpo_ray.model.prefix_layout import Bidirectional, PrefixLayout
from orpo_ray.planning.activations import _attention_as_on_cuda
from orpo_ray.planning.gpus import GPUS

CPU = Hardware("cpu")
A100, L40S, H100, RTX_5090 = (Hardware("cuda", each, True) for each in ((8, 0), (8, 9), (9, 0), (12, 0)))
T4, WITHOUT_FLASH = Hardware("cuda", (7, 5), True), Hardware("cuda", (9, 0), False)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

TABLE: list[tuple[Hardware, torch.dtype, int, dict[str, Any], AttentionKernel]] = [
    (CPU, FP32, 64, {}, "cpu_flash"),
    (CPU, BF16, 80, {}, "cpu_flash"),
    (CPU, FP32, 64, {"bidirectional": True}, "cpu_flash"),
    (CPU, FP32, 64, {"softcap": 50.0}, "sdpa_per_sequence"),
    (CPU, FP32, 64, {"dropout": 0.1}, "sdpa_per_sequence"),
    (A100, BF16, 64, {}, "varlen"),
    (H100, FP16, 256, {}, "varlen"),
    (H100, BF16, 80, {}, "varlen"),
    (H100, FP32, 64, {}, "sdpa_per_sequence"),
    (H100, BF16, 68, {}, "sdpa_per_sequence"),
    (H100, BF16, 264, {}, "sdpa_per_sequence"),
    (H100, BF16, 64, {"bidirectional": True}, "sdpa_per_sequence"),
    (H100, BF16, 64, {"softcap": 50.0}, "sdpa_per_sequence"),
    (H100, BF16, 64, {"dropout": 0.1}, "sdpa_per_sequence"),
    (T4, FP16, 64, {}, "sdpa_per_sequence"),
    (WITHOUT_FLASH, BF16, 64, {}, "sdpa_per_sequence"),
    # The backward pass of torch's flash attention raises for these heads on sm86 to sm89 and on sm120.
    (L40S, BF16, 224, {}, "sdpa_per_sequence"),
    (RTX_5090, BF16, 200, {}, "sdpa_per_sequence"),
    (L40S, BF16, 192, {}, "varlen"),
    (L40S, BF16, 256, {}, "varlen"),
    (A100, BF16, 224, {}, "varlen"),
    (Hardware("mps"), BF16, 64, {}, "sdpa_per_sequence"),
]


@pytest.mark.parametrize(("hardware", "dtype", "head_dim", "options", "kernel"), TABLE)
def test_choice(
    hardware: Hardware, dtype: torch.dtype, head_dim: int, options: dict[str, Any], kernel: AttentionKernel
) -> None:
    assert choose_kernel(hardware, dtype, head_dim, **options) == kernel


def test_this_machine_s_cpu() -> None:
    assert Hardware.of(torch.device("cpu")) == CPU


def test_every_planned_gpu_has_what_the_plan_assumes() -> None:
    """All GPU types of the plan are Ampere or later."""
    assert PLANNED_GPU == A100
    assert {gpu.name.split("-")[0] for gpu in GPUS} <= {"L4", "A10G", "RTX", "A100", "L40S", "H100", "H200"}


def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the kernels that attention runs. Results are unchanged if the machine has the kernel."""
    kernels: list[str] = []
    real = shared_prefix.attend

    def recorded(kernel: Any, *arguments: Any) -> torch.Tensor:
        kernels.append(kernel)
        return real("sdpa_per_sequence" if kernel == "varlen" else kernel, *arguments)

    monkeypatch.setattr(shared_prefix, "attend", recorded)
    return kernels


@pytest.mark.parametrize("bidirectional", [None, Bidirectional("images", within_window=True)])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_plan_runs_the_kernel_that_training_would(
    dtype: torch.dtype, softcap: float | None, bidirectional: Bidirectional | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = attention_calls(monkeypatch)
    layout = PrefixLayout(
        [Branch(0, 4, 6), Branch(6, 6, 9, ((0, 4),))], torch.tensor([[0, 1, 1, 0, 2, 2, 2, 2, 2]]), bidirectional
    )
    states = [torch.randn(1, heads, 9, 8, dtype=dtype) for heads in (4, 2, 2)]
    options = {"softcap": softcap, "shared_prefix": layout}
    planned, _ = _attention_as_on_cuda(torch.nn.Module(), *states, None, **options)
    trained, _ = shared_prefix.shared_prefix_attention(torch.nn.Module(), *states, None, **options)
    masked = bidirectional is not None
    expected = [choose_kernel(each, dtype, 8, bidirectional=masked, softcap=softcap) for each in (PLANNED_GPU, CPU)]
    assert kernels == expected
    torch.testing.assert_close(planned, trained)
