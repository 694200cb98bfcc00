"""bitsandbytes' 8-bit AdamW with fewer waits for the device, and with paged moments also after a checkpoint was loaded.

The formulas, the states and their format are the library's own. Importing this module imports bitsandbytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from bitsandbytes import utils
from bitsandbytes.optim import adamw
from bitsandbytes.optim.optimizer import Optimizer8bit


def _without_waits(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the library's `step`, except that its wait for the device after each parameter does nothing.

    A LoRA run has hundreds of parameters. The library's kernels are in the same stream as torch's, so their order does
    not need the waits. The function gets its own view of the module, because other code in the process may use the
    library too, in other threads.
    """
    own = inspect.unwrap(step)
    names = {**own.__globals__, "sync_gpu": lambda parameter: None}
    return torch.no_grad()(FunctionType(own.__code__, names, argdefs=own.__defaults__))


_step = _without_waits(Optimizer8bit.step)


class AdamW8bit(adamw.AdamW8bit):
    """Does not wait for the device in a step."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step."""
        return _step(self, closure)


class PagedAdamW8bit(adamw.PagedAdamW8bit):
    """Waits for the device once in a step, and keeps large moments paged when a state is loaded."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step."""
        loss = _step(self, closure)
        # The host can read paged moments without a copy, which would wait. The library waits here too.
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            utils.sync_gpu(parameter)
            break
        return loss

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state. Moments go where the library puts those of a first step: large ones into paged memory.

        The library itself loads all of them into the memory of the GPU.
        """
        super().load_state_dict(state_dict, move_to_device=False)
        if not move_to_device:
            return
        for parameter, state in self.state.items():
            for name, saved in state.items():
                if name in ("state1", "state2"):
                    state[name] = self.get_state_buffer(parameter, dtype=saved.dtype).copy_(saved)
                elif torch.is_tensor(saved):
                    state[name] = saved.to(parameter.device)
