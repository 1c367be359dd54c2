"""What a request asks for, in the terms of OpenAI's API (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgeopt.checkpoints import tokenizer
from edgeopt.errors import ConfigError, EdgeoptError, InputError

if TYPE_CHECKING:
    from edgeopt.core.artifact import Engine

DEFAULT_NEW_TOKENS = 64
_STOPS = 4
_GREEDY = {"temperature": (0,), "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,)}
"""Fields of which only these values mean what this service does."""
_ABSENT = ("logprobs", "top_logprobs", "tools", "functions", "suffix", "echo", "logit_bias", "response_format")
"""Fields that ask for what this service cannot do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    prompt: list[int]
    max_new_tokens: int
    stops: tuple[str, ...]
    adapter: str | None
    stream: bool
    usage: bool
    """Whether the last piece of a stream tells how many tokens there were."""


class Reader:
    """Reads the requests for one engine."""

    def __init__(self, engine: Engine, name: str, *, context_length: int) -> None:
        self._engine, self.name, self._context_length = engine, name, context_length
        self.tokenizer = tokenizer.load(engine.directory)
        self._prefix = tokenizer.prefix(engine.directory)
        self._template = _template(engine.directory)

    def completion(self, body: Any) -> Asked:
        """What a request to `/v1/completions` asks for. Raises ConfigError with the field as its place."""
        fields = _checked(body)
        prompt = fields.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._asked(fields, self._prefix + self._ids(prompt))
        size = self._engine.spec.vocabulary_size
        if isinstance(prompt, list) and prompt and all(type(t) is int and 0 <= t < size for t in prompt):
            return self._asked(fields, prompt)
        raise ConfigError("it is neither a text nor token ids, or it is more than one", location="prompt")

    def chat(self, body: Any) -> Asked:
        """What a request to `/v1/chat/completions` asks for. Raises ConfigError with the field as its place."""
        fields = _checked(body)
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ConfigError("a list of at least one message is needed", location="messages")
        known = [_message(message, n) for n, message in enumerate(messages)]
        if self._template is None:
            text = "\n".join(message["content"] for message in known)
            return self._asked(fields, self._prefix + self._ids(text))
        try:
            text = self._template.render(messages=known, add_generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template refuses ({error})", location="messages") from error
        return self._asked(fields, self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _asked(self, fields: Mapping[str, Any], prompt: list[int]) -> Asked:
        if fields.get("model") not in (None, self.name):
            raise UnknownModelError(
                f"there is no model {fields['model']!r} here", location="model", hint=f"Name {self.name}, or none"
            )
        limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
        limit = DEFAULT_NEW_TOKENS if limit is None else limit
        if type(limit) is not int or limit < 1:
            raise ConfigError(f"{limit!r} tokens cannot be generated", location="max_tokens", hint="Give 1 or more")
        room = self._context_length - len(prompt)
        if not prompt or room < 1:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens cannot be continued",
                location="prompt",
                hint=f"Give 1 to {self._context_length - 1} tokens",
            )
        options = fields.get("stream_options") or {}
        adapter = fields.get("adapter")
        if adapter is not None and adapter not in self._engine.spec.adapters:
            known = ", ".join(self._engine.spec.adapters) or "none"
            raise ConfigError(f"there is no adapter {adapter!r}", location="adapter", hint=f"There are: {known}")
        return Asked(
            prompt=prompt,
            max_new_tokens=min(limit, room),
            stops=_stops(fields.get("stop")),
            adapter=adapter,
            stream=fields.get("stream") is True,
            usage=isinstance(options, dict) and options.get("include_usage") is True,
        )


class UnknownModelError(ConfigError):
    """A request names another model than the one that is served."""


def _checked(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise ConfigError("the body is no JSON object", location="body")
    for name, allowed in _GREEDY.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise ConfigError(
                f"{body[name]!r} is not offered: an engine decodes greedily, one completion at a time",
                location=name,
                hint=f"Leave it out, or give {allowed[0]}",
            )
    for name in _ABSENT:
        if body.get(name):
            raise ConfigError("it is not offered", location=name, hint="Leave it out")
    return body


def _message(message: Any, number: int) -> dict[str, str]:
    location = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConfigError("a message has a role and a content", location=location)
    content = message.get("content")
    if isinstance(content, list):  # parts, of which only text can be read
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(content, str):
        raise ConfigError("the content is no text", location=f"{location}.content")
    return {"role": message["role"], "content": content}


def _stops(stop: Any) -> tuple[str, ...]:
    found = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(found, list) or len(found) > _STOPS or not all(isinstance(s, str) and s for s in found):
        raise ConfigError(f"it is neither a text nor a list of up to {_STOPS} texts", location="stop")
    return tuple(found)


def _template(folder: Path) -> Any:
    """The model's chat template; None where it has none."""
    config: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
    file = folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(text, str):
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    special = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    try:
        return environment.from_string(text, globals=special)
    except TemplateError as error:
        raise InputError(f"the chat template cannot be read ({error})", location=str(folder)) from error


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def told(error: EdgeoptError) -> dict[str, Any]:
    """The body of an answer that refuses."""
    kind = "invalid_request_error" if isinstance(error, ConfigError) else "server_error"
    code = "model_not_found" if isinstance(error, UnknownModelError) else None
    return {"error": {"message": str(error), "type": kind, "param": error.location or None, "code": code}}
