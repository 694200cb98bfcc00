"""Log-probs in chunks against torch's own over the whole, value, gradient and memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_ray.model.hooked_call import call_with
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
    """More chunks than targets too: some are empty."""
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
    monkeypatch.setitem(logps.CHUNK_BYTES, "cpu", 64 * vocabulary * 4)
    head, hidden = torch.nn.Linear(8, vocabulary), torch.randn(tokens, 8, requires_grad=True)
    chunks = count_chunks(tokens, vocabulary, "cpu")
    assert chunks == 8
    with _LargestTensor() as seen:
        target_logps(head, hidden, torch.randint(0, vocabulary, (tokens,)), chunks).sum().backward()
    assert seen.largest == 64 * vocabulary


def test_no_target_is_one_chunk() -> None:
    assert count_chunks(0, 1000, "cpu") == 1


@pytest.mark.parametrize("rows", [1, 7, 100], ids=lambda rows: f"{rows} rows at once")
def test_a_gpu_converts_blocks_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 logits, as on a GPU: the same numbers as with whole chunks in float32, rounded once."""
    torch.manual_seed(0)
    logits, ids, weights = torch.randn(23, 50).bfloat16(), torch.randint(0, 50, (23,)), torch.randn(23)
    exact = logits.float().requires_grad_(True)
    expected = exact.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    (expected * weights).sum().backward()
    monkeypatch.setattr(logps, "CPU_ROWS", rows)
    leaf = logits.clone().requires_grad_(True)
    got = target_logps(lambda hidden: 1 * hidden, leaf, ids, 1)
    (got * weights).sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(leaf.grad, exact.grad.bfloat16())


def test_a_gpu_takes_more_targets_at_once() -> None:
    """With Qwen2.5's vocabulary, 1,024 targets are 5 chunks on a CPU and 1 on a GPU."""
    assert [count_chunks(1024, 152_064, device) for device in ("cpu", "cuda")] == [5, 1]


def test_a_module_is_called_once_around_another_forward() -> None:
    head = torch.nn.Linear(4, 9)
    calls: list[str] = []
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.register_forward_hook(lambda *_: calls.append("after"))
    states = torch.randn(6, 4)
    expected = torch.nn.functional.linear(states, head.weight, head.bias)

    def in_two(states: torch.Tensor) -> torch.Tensor:
        calls.append("chunks")
        return torch.cat([head.forward(half) for half in states.chunk(2)])

    torch.testing.assert_close(call_with(head, in_two, states), expected)
    assert calls == ["before", "chunks", "after"]
    assert "forward" not in vars(head)


def test_a_forward_that_somebody_else_replaced_or_that_raises_is_put_back() -> None:
    head = torch.nn.Linear(4, 9)
    other = head.forward = lambda states: states  # type: ignore[method-assign]

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    states = torch.randn(6, 4)
    assert call_with(head, lambda states: head.forward(states), states) is states
    with pytest.raises(ValueError, match="no"):
        call_with(head, fail, states)
    assert head.forward is other
