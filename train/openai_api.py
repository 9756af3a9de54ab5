"""How does OpenAI's API spell requests, answers and errors? What is not supported is refused, never ignored."""

import difflib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

OFF: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Parameters that are not supported, and the values that ask for nothing."""
IGNORED = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
"""Parameters that do not change an answer."""
MESSAGE_IGNORED = ("name", "refusal", "annotations", "reasoning_content")
"""Fields of a message that no chat template needs."""


class ApiError(Exception):
    """What goes wrong with a request, as OpenAI's clients expect it.

    Attributes:
      status: of HTTP.
      message: for people.
      code: for programs.
      param: the parameter at fault.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Asked(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: StrictInt | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: StrictInt | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, body: Any) -> Any:
        """JSON can spell half of a character, a lone surrogate, which no tokenizer takes and no answer can repeat."""
        try:
            json.dumps(body if isinstance(body, dict) else {}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds half of a character, {error.object[error.start]!a}") from None
        return body

    def check(self) -> None:
        """Raises ApiError for parameters that are unknown, or ask for what is not supported."""
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name not in OFF:
                near = difflib.get_close_matches(name, [*type(self).model_fields, *OFF], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ApiError(400, f"unknown parameter {name!r}{hint}", "unknown_parameter", name)
            # True equals 1, and False 0, but they ask for something else.
            if not any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in OFF[name]):
                only = f" other than {OFF[name][0]!r}" if OFF[name] else ""
                raise ApiError(
                    400, f"{name}={value!r}: no value{only} is supported; leave it out", "unsupported_parameter", name
                )
        if any(not string for string in self.stops):
            raise ApiError(400, "stop: an empty string would end every answer at once", "invalid_value", "stop")

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_in_stream(self) -> bool:
        """Whether the stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionAsked(Asked):
    """The body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt, text or tokens.

        Raises:
          ApiError: there are several.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                message = f"prompt: found {len(prompt)} prompts; one a request is supported, and many requests at once"
                raise ApiError(400, message, "unsupported_value", "prompt")
            return prompt[0]
        return prompt


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """Role and content as chat templates know them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatAsked(Asked):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)

    def check(self) -> None:
        """Raises ApiError for what is not supported, in the messages as well."""
        super().check()
        for number, message in enumerate(self.messages):
            # What a client repeats of an answer, and names, change nothing; calls of tools would.
            extra = message.model_extra or {}
            if wrong := [name for name, value in extra.items() if value and name not in MESSAGE_IGNORED]:
                place = f"messages.{number}.{wrong[0]}"
                raise ApiError(400, f"{place}: not supported; leave it out", "unsupported_parameter", place)


class Reply:
    """Spells one answer, whole or in pieces.

    Args:
      chat: of a conversation, else of a text.
      model: the name that was asked for.
      prompt_tokens: length of the prompt.
    """

    def __init__(self, chat: bool, model: str, prompt_tokens: int):
        self.chat, self.prompt_tokens = chat, prompt_tokens
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, reason: str, tokens: int) -> dict[str, Any]:
        """The response that is not streamed."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [self._choice(said, reason)], "usage": self.usage(tokens)}

    def piece(self, text: str, reason: str | None, first: bool = False) -> str:
        """An event of the stream; the first of a conversation tells the role."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        return self._event([self._choice({"delta": delta} if self.chat else {"text": text}, reason)])

    def usage_piece(self, tokens: int) -> str:
        """The event with the number of tokens."""
        return self._event([], usage=self.usage(tokens))

    def usage(self, tokens: int) -> dict[str, int]:
        """How many tokens were read and written."""
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _event(self, choices: Sequence[Any], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self.head, "object": kind, "choices": choices, **more})


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
"""The last event of a stream."""


def listed(name: str, created: int, owner: str) -> dict[str, Any]:
    """A model in a list of them."""
    return {"id": name, "object": "model", "created": created, "owned_by": owner}
