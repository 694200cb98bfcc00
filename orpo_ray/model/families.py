"""The few facts that differ by family of vision-language model, one entry each.

A family is named by its config's `model_type`. What transformers states itself (image token, head, processor) is
asked there and does not stand here.
"""

from __future__ import annotations

from dataclasses import dataclass

from orpo_ray.errors import UserError


@dataclass(frozen=True)
class Family:
    """Where the parts are, as names below the `...ForConditionalGeneration` model.

    vision, connector, language: prefixes of parameter names. nested_images: the vision input has a leading batch
    dimension, [1, tiles, 3, H, W]. image_inputs: which tensors of the processor the vision part takes.
    """

    vision: str
    connector: str
    language: str
    nested_images: bool = False
    image_inputs: tuple[str, ...] = ("pixel_values",)

    def prefix(self, part: str) -> str:
        """Parameter prefix of `vision`, `connector` or `language`."""
        return {"vision": self.vision, "connector": self.connector, "language": self.language}[part]


_IDEFICS3 = Family(
    vision="model.vision_model.",
    connector="model.connector.",
    language="model.text_model.",
    nested_images=True,
    image_inputs=("pixel_values", "pixel_attention_mask"),
)

FAMILIES: dict[str, Family] = {
    "smolvlm": _IDEFICS3,
    "idefics3": _IDEFICS3,
    "llava": Family(
        vision="model.vision_tower.", connector="model.multi_modal_projector.", language="model.language_model."
    ),
}


def family_of(model_type: str) -> Family:
    """The entry of a `model_type`. Raises UserError naming those that there are."""
    if model_type not in FAMILIES:
        raise UserError(
            "this model family is not supported", field="model.id", value=model_type, fix=f"use one of {list(FAMILIES)}"
        )
    return FAMILIES[model_type]
