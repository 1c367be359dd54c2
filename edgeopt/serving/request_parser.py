"""Parse and validate requests of OpenAI's API (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgeopt.checkpoints import tokenizer
from edgeopt.errors import ConfigError, InputError

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine

DEFAULT_MAX_TOKENS = 64
_MAX_STOP_TEXTS = 4
_GREEDY_VALUES = {"temperature": (0,), "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,)}
"""Accepted values of the sampling fields: those that describe greedy decoding of one completion."""
_UNSUPPORTED_FIELDS = (
    "logprobs",
    "top_logprobs",
    "tools",
    "functions",
    "suffix",
    "echo",
    "logit_bias",
    "response_format",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A validated request for a completion or chat completion. Fields are named as in OpenAI's API.

    Attributes:
        prompt: token ids, with the chat template applied.
        max_tokens: limit of new tokens, reduced to the space left in the context.
        stop: texts that end the generation.
        adapter: name of the engine's adapter to use; an extension of OpenAI's API.
        include_usage: report token counts at the end of a stream.
    """

    prompt: list[int]
    max_tokens: int
    stop: tuple[str, ...]
    adapter: str | None
    stream: bool
    include_usage: bool


class ModelNotFoundError(ConfigError):
    """The request names a model other than the served one."""


class RequestParser:
    """Parser of the requests for one engine.

    Attributes:
        model_name: name of the served model in requests and responses.
    """

    def __init__(self, engine: Engine, model_name: str, *, context_length: int) -> None:
        self._engine, self.model_name, self._context_length = engine, model_name, context_length
        self.tokenizer = tokenizer.load(engine.directory)
        self._bos_tokens = tokenizer.prefix_ids(engine.directory)
        self._chat_template = _load_chat_template(engine.directory)

    def parse_completion(self, body: Any) -> CompletionRequest:
        """Parse the JSON body of `/v1/completions`. Raise ConfigError with the invalid field as its location."""
        fields = _validate(body)
        prompt = fields.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._request(fields, self._bos_tokens + self._encode(prompt))
        size = self._engine.spec.vocabulary_size
        if isinstance(prompt, list) and prompt and all(type(t) is int and 0 <= t < size for t in prompt):
            return self._request(fields, prompt)
        raise ConfigError(
            f"`prompt` must be one string or one list of token ids from 0 to {size - 1}", location="prompt"
        )

    def parse_chat(self, body: Any) -> CompletionRequest:
        """Parse the JSON body of `/v1/chat/completions`. Raise ConfigError with the invalid field as its location.

        Messages are rendered with the model's chat template. A model without one gets their contents, one per line.
        """
        fields = _validate(body)
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ConfigError("`messages` must be a list with at least one message", location="messages")
        parsed = [_parse_message(message, index) for index, message in enumerate(messages)]
        if self._chat_template is None:
            text = "\n".join(message["content"] for message in parsed)
            return self._request(fields, self._bos_tokens + self._encode(text))
        try:
            text = self._chat_template.render(messages=parsed, add_generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(
                f"the model's chat template rejected the messages ({error})", location="messages"
            ) from error
        return self._request(fields, self._encode(text))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _request(self, fields: Mapping[str, Any], prompt: list[int]) -> CompletionRequest:
        if fields.get("model") not in (None, self.model_name):
            raise ModelNotFoundError(
                f"`model` must be {self.model_name!r}, got {fields['model']!r}",
                location="model",
                hint="Use the served model or omit the field",
            )
        max_tokens = fields.get("max_completion_tokens", fields.get("max_tokens"))
        max_tokens = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        if type(max_tokens) is not int or max_tokens < 1:
            raise ConfigError(f"`max_tokens` must be a positive integer, got {max_tokens!r}", location="max_tokens")
        remaining_context = self._context_length - len(prompt)
        if not prompt or remaining_context < 1:
            raise ConfigError(
                f"`prompt` must have 1 to {self._context_length - 1} tokens, got {len(prompt)}", location="prompt"
            )
        stream_options = fields.get("stream_options") or {}
        adapter = fields.get("adapter")
        if adapter is not None and adapter not in self._engine.spec.adapters:
            available = ", ".join(self._engine.spec.adapters) or "none"
            raise ConfigError(
                f"`adapter` must name an adapter of the engine, got {adapter!r}",
                location="adapter",
                hint=f"Available adapters: {available}",
            )
        return CompletionRequest(
            prompt=prompt,
            max_tokens=min(max_tokens, remaining_context),
            stop=_parse_stop(fields.get("stop")),
            adapter=adapter,
            stream=fields.get("stream") is True,
            include_usage=isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
        )


def _validate(body: Any) -> Mapping[str, Any]:
    """Return the body. Raise ConfigError if it is not an object or requests an unsupported feature."""
    if not isinstance(body, dict):
        raise ConfigError("the body must be a JSON object", location="body")
    for name, allowed in _GREEDY_VALUES.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise ConfigError(
                f"`{name}` must be {allowed[0]}, got {body[name]!r}: the engine decodes greedily, "
                "one completion per request",
                location=name,
                hint="Omit the field",
            )
    for name in _UNSUPPORTED_FIELDS:
        if body.get(name):
            raise ConfigError(f"`{name}` is not supported", location=name, hint="Omit the field")
    return body


def _parse_message(message: Any, index: int) -> dict[str, str]:
    location = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConfigError("a message must be an object with `role` and `content`", location=location)
    content = message.get("content")
    if isinstance(content, list):  # content parts; only those of type text are supported
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(content, str):
        raise ConfigError("`content` must be a string or a list of text parts", location=f"{location}.content")
    return {"role": message["role"], "content": content}


def _parse_stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    if (
        not isinstance(texts, list)
        or len(texts) > _MAX_STOP_TEXTS
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise ConfigError(
            f"`stop` must be a string or a list of up to {_MAX_STOP_TEXTS} non-empty strings", location="stop"
        )
    return tuple(texts)


def _load_chat_template(folder: Path) -> Any:
    """Return the model's Jinja chat template, compiled in a sandbox, or None if the model has none."""
    config: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
    template_path = folder / "chat_template.jinja"
    text = template_path.read_text(encoding="utf-8") if template_path.is_file() else config.get("chat_template")
    if not isinstance(text, str):
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_template_error
    special_tokens = {
        name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    try:
        return environment.from_string(text, globals=special_tokens)
    except TemplateError as error:
        raise InputError(f"the chat template is not valid Jinja ({error})", location=str(folder)) from error


def _token_text(token: Any) -> str:
    """Return the text of a special token, stored as a string or as an object with `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
