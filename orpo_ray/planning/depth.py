"""A deep model as one of few layers: all layers of a part have the same sizes, so few of them tell about all."""

from __future__ import annotations

import copy
from typing import Any

# Layers of the language model and of the vision encoder that a plan keeps of a deep model. One is too few: alone, it
# has another peak than one of many.
LAYERS_RUN = 2


def is_deep(config: Any) -> bool:
    """Whether a plan looks at few layers, and at one more of each part, rather than at all of them."""
    return min(depths(config)) > LAYERS_RUN + 1


def depths(config: Any) -> tuple[int, int]:
    """Return the number of layers of the language model and of the vision encoder."""
    vision = config.vision_config
    return config.get_text_config().num_hidden_layers, getattr(vision, "num_hidden_layers", getattr(vision, "depth", 0))


def with_depth(config: Any, language: int, vision: int) -> Any:
    """Return a copy of the config with these numbers of layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = language
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:language]
    for name in ("num_hidden_layers", "depth"):
        if hasattr(config.vision_config, name):
            setattr(config.vision_config, name, vision)
    return config
