"""Packages that only some users need. Each comes with an extra: `pip install "orpo-ray[wandb]"`."""

from __future__ import annotations

from importlib.util import find_spec

from orpo_ray.errors import UserError

# Module -> the extra that installs it. pyproject.toml lists the same extras.
EXTRAS = {"easy_vqa": "quickstart", "optuna": "sweep", "sklearn": "text-baseline", "wandb": "wandb"} | {
    name: name for name in ("tensorboard", "mlflow", "trackio")
}


def is_installed(module: str) -> bool:
    """Whether the module of an extra can be imported."""
    return find_spec(module) is not None


def install_command(module: str) -> str:
    """The command that installs the extra of a module."""
    return f'pip install "orpo-ray[{EXTRAS[module]}]"'


def require(module: str, purpose: str, otherwise: str | None = None) -> None:
    """Check that the module of an extra is installed. Call it right before the import.

    Args:
        module: Name of the module, a key of `EXTRAS`.
        purpose: The recipe key or feature that needs the module.
        otherwise: What to do instead of installing the module.

    Raises:
        UserError: The module is not installed. The message names the extra.
    """
    if not is_installed(module):
        fix = install_command(module) + (f", or {otherwise}" if otherwise else "")
        raise UserError(f"the package {module} is not installed", field=purpose, fix=fix)
