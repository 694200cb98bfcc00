"""Log-probs in chunks against torch's own over the whole, value, gradient and memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_ray.objective import logps
from orpo_ray.objective.logps import count_chunks, target_logps


def test_by_hand() -> None:
    """Two words; logits 0 and ln 3: probabilities 1/4 and 3/4. d logp(second) / d logits = (-1/4, 1/4)."""
    logits = torch.tensor([[1.0, 3.0]]).log()
    logits.requires_grad_(True)
    got = target_logps(lambda hidden: 1.0 * hidden, logits, torch.tensor([1]), 1)
    torch.testing.assert_close(got.exp(), torch.tensor([0.75]))
    got.backward(torch.ones(1))
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.25]]))


@pytest.mark.parametrize("chunks", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_whole(chunks: int, dtype: torch.dtype) -> None:
    """More chunks than targets too: some are empty, and under ZeRO-3 the head must run for them all the same."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False, dtype=dtype)
    hidden = torch.randn(23, 16, dtype=dtype, requires_grad=True)
    ids, weights = torch.randint(0, 50, (23,)), torch.randn(23)
    expected = head(hidden).float().log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    (expected * weights).sum().backward()
    gradients = [hidden.grad.clone(), head.weight.grad.clone()]
    hidden.grad = head.weight.grad = None
    calls: list[int] = []
    head.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    got = target_logps(head, hidden, ids, chunks)
    (got * weights).sum().backward()
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip([hidden.grad, head.weight.grad], gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    assert len(calls) == chunks + (chunks - 1)  # backward computes all but the last chunk again
    assert sum(calls[:chunks]) == 23


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest floating-point tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return out


def test_the_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary = 512, 1000
    monkeypatch.setattr(logps, "CHUNK_BYTES", 64 * vocabulary * 4)
    head, hidden = torch.nn.Linear(8, vocabulary), torch.randn(tokens, 8, requires_grad=True)
    chunks = count_chunks(tokens, vocabulary)
    assert chunks == 8
    with _LargestTensor() as seen:
        target_logps(head, hidden, torch.randint(0, vocabulary, (tokens,)), chunks).sum().backward()
    assert seen.largest == 64 * vocabulary


def test_no_target_is_one_chunk() -> None:
    assert count_chunks(0, 1000) == 1
