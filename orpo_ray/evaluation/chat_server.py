"""A model behind an address that speaks OpenAI's chat completions, such as vLLM, SGLang or a hosted service."""

from __future__ import annotations

import base64
import io
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from PIL import Image
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from orpo_ray.data.images import load_image
from orpo_ray.errors import RowError, UserError, preview

KEY = "OPENAI_API_KEY"
TIMEOUT = 120.0  # seconds for one reply
ATTEMPTS = 4
RETRIED = {408, 429, 500, 502, 503, 504}
# What is wrong with one request: it is too long, an image too large, or a filter stops it. Other refusals, such as of a
# key (401, 403), an address or a model (404) or an unpaid bill (402), meet every request.
REFUSED = {400, 413, 415, 422, 451}
REASON_CHARACTERS = 300
_PNG = b"\x89PNG"


@dataclass(frozen=True)
class Reply:
    """What a server replied."""

    text: str
    finished: bool
    """False if the reply was cut off at the most tokens."""


class _Busy(Exception):
    """The server should be asked again."""


@dataclass(frozen=True)
class ChatServer:
    """A model behind an address."""

    url: str
    """Up to and including the version, such as `http://localhost:8000/v1`."""
    model: str
    field: str
    """The option or recipe field that gives the address, for messages."""
    title: str = "server"
    """What the server is, for messages."""

    def check(self) -> None:
        """Check the address, and that a key would not travel in the clear. Raises UserError."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("not an address", field=self.field, value=self.url, fix="give http(s)://HOST[:PORT]/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "an address with a key in it", field=self.field, fix=f"set {KEY} in the environment instead"
            )
        if parts.scheme == "http" and os.environ.get(KEY) and not _is_own_machine(parts.hostname):
            raise UserError(
                f"{KEY} would be sent to another machine without encryption",
                field=self.field,
                value=self.url,
                fix=f"use https, or unset {KEY}",
            )

    def reply(self, messages: list[dict[str, Any]], max_tokens: int, temperature: float, **options: Any) -> Reply:
        """Send messages, and return the reply.

        Args:
            messages: as the protocol has them.
            max_tokens: most tokens of the reply.
            temperature: 0 for the most likely tokens.
            options: further fields of the request, such as `seed`.

        Raises:
            RowError: the server refuses this request, with its reason; the next one may be answered.
            UserError: the server does not answer.
        """
        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        try:
            for attempt in Retrying(
                retry=retry_if_exception_type(_Busy), stop=stop_after_attempt(ATTEMPTS),
                wait=wait_exponential(max=30), reraise=True,
            ):  # fmt: skip
                with attempt:
                    reply = self._post(body | options)
        except _Busy as error:
            raise self._failed(str(error)) from None
        return reply

    def _post(self, body: dict[str, Any]) -> Reply:
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = self.url.rstrip("/") + "/chat/completions"
        try:
            # A redirect could lead the key elsewhere.
            found = requests.post(address, json=body, headers=headers, timeout=TIMEOUT, allow_redirects=False)
        except requests.RequestException as error:
            raise _Busy(type(error).__name__) from None
        if found.status_code in RETRIED:
            raise _Busy(f"status {found.status_code}")
        if found.status_code in REFUSED:
            said = preview(_reason_of(found), REASON_CHARACTERS)
            raise RowError(f"refused_by_{self.title}", f"status {found.status_code}: {said}")
        if found.status_code != 200:
            raise self._failed(f"status {found.status_code}: {preview(found.text)}")
        try:
            choice = found.json()["choices"][0]
            return Reply(str(choice["message"]["content"] or ""), choice.get("finish_reason") != "length")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise self._failed(f"not a chat completion: {preview(found.text)}") from None

    def _failed(self, why: str) -> UserError:
        return UserError(f"the {self.title} does not answer: {why}", field=self.field, value=self.url,
                         fix="check address, model and key; the server must offer /chat/completions")  # fmt: skip


def _reason_of(response: requests.Response) -> str:
    """Return the message of an error as the protocol has it, or else what came."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text


def sent_image(image: Mapping[str, Any]) -> bytes:
    """Return the file of an image as every server decodes it: a JPEG or PNG as it is, another one as PNG.

    Raises:
        RowError: the image cannot be used.
    """
    picture = load_image(image, None)  # also refuses what no model should get
    data: bytes = image["bytes"]
    with Image.open(io.BytesIO(data)) as opened:
        if opened.format in ("JPEG", "PNG"):
            return data
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")  # JPEG has no sides of more than 65,535 pixels
    return buffer.getvalue()


def image_part(image: bytes) -> dict[str, Any]:
    """Return the part of a message that shows a JPEG or PNG file."""
    kind = "image/png" if image.startswith(_PNG) else "image/jpeg"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(image).decode()}"}}


def _is_own_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
