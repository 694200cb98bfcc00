"""Chat templates of instruction-tuned models that are published without one."""

from __future__ import annotations

from typing import Any

# The dialogue format of idefics-9b-instruct and idefics-80b-instruct, by their model cards.
_IDEFICS = (
    "{{ bos_token }}{% for m in messages %}{{ '\n' if not loop.first }}{{ m['role'] | capitalize }}:"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}"
    "{{ '' if not loop.first and loop.previtem['type'] == 'image' else '<fake_token_around_image>' }}"
    "<image><fake_token_around_image>"
    "{% elif part['type'] == 'text' %}{{ ' ' if loop.first }}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>{% endfor %}{% if add_generation_prompt %}\nAssistant:{% endif %}"
)


def give_template(processor: Any) -> None:
    """Give a processor without a chat template the template of its family, if it is known."""
    if getattr(processor, "chat_template", None) is None and type(processor).__name__ == "IdeficsProcessor":
        processor.chat_template = _IDEFICS
