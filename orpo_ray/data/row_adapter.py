"""The user's own row adapter (`data.format: module:function`): import it, and call it for a row."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from orpo_ray.errors import RowError, UserError, preview


@functools.cache
def load_adapter(name: str) -> Callable[[dict[str, Any]], Any]:
    """Import the function `module:function`; the module may be in the working directory. Raises UserError."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
        raise UserError(
            f"cannot import the adapter: {type(error).__name__}: {error}",
            field="data.format",
            value=name,
            fix="give a module in the working directory, or an installed one",
        ) from None
    if not callable(function):
        raise UserError(
            f"{module_name} has no function {function_name}",
            field="data.format",
            value=name,
            fix="give the adapter as module:function",
        )
    return function


def call_adapter(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row with an adapter. Raises RowError if the adapter fails or returns no mapping."""
    function = load_adapter(name)
    try:
        converted = function(row)
    except RowError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
        raise RowError("adapter_failed", f"{type(error).__name__}: {error}") from None
    if not isinstance(converted, Mapping):
        raise RowError("adapter_failed", f"{name} must return a mapping of columns, found {preview(converted)}")
    return dict(converted)
