"""Errors for users name a fix."""

from __future__ import annotations

import ast

from support.paths import ROOT

# Its message contains one hint per wrong field.
WITHOUT_FIX = {"parse_recipe"}


def test_every_user_error_names_a_fix() -> None:
    found, missing = 0, []
    for path in sorted((ROOT / "orpo_ray").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or function.name in WITHOUT_FIX:
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("UserError", "TooManyBadRows"):
                    found += 1
                    if not any(keyword.arg == "fix" for keyword in call.keywords):
                        missing.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert found > 50
    assert missing == []
