"""How are many adapters served over HTTP? Through OpenAI's API: the adapter is the name of the model."""

import asyncio
import contextlib
import dataclasses
import hmac
import math
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import fastapi
import jinja2
import numpy as np
import uvicorn
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from train import openai_api
from train.engine import Engine
from train.openai_api import ApiError, Asked, ChatAsked, CompletionAsked, Reply
from train.request import Answer, Closed, QueueFull, Request, TooLong
from train.resident import Resident, Residents
from train.serve_metrics import Counted, Metrics
from train.template import Template, TemplateError
from train.text import Text


@dataclass(frozen=True)
class Service:
    """What answers requests.

    Attributes:
      engine: writes.
      template: turns messages into tokens.
      residents: the adapters; None serves the base alone.
      name: of the base.
      api_keys: one of them must come with each request; none are needed if it is empty.
      timeout: seconds that a request may take, waiting included.
      tokenizing: held by the request whose prompt becomes tokens.
    """

    engine: Engine
    template: Template
    residents: Residents | None
    name: str
    api_keys: Sequence[str] = ()
    timeout: float = 600.0
    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def names(self) -> dict[str, int]:
        """{name: when it was written} of the base and the adapters."""
        found = {} if self.residents is None else self.residents.found
        return {self.name: 0} | {name: resident.created for name, resident in found.items()}

    async def rescan(self) -> None:
        """Looks for adapters that came or went."""
        if self.residents is not None:
            await asyncio.to_thread(self.residents.scan)

    async def resident(self, name: str) -> Resident | None:
        """The adapter of that name, None for the base.

        Raises:
          ApiError: there is none.
        """
        if name == self.name:
            return None
        if name not in self.names():
            await self.rescan()
        if self.residents is not None and (found := self.residents.found.get(name)):
            return found
        message = f"there is no model {name!r}"
        if self.residents is not None and name in self.residents.refused:
            message += f"; its adapter cannot be used: {self.residents.refused[name]}"
        elif near := self.residents.nearest(name) if self.residents is not None else [self.name]:
            message += f"; the nearest names are {', '.join(near)}"
        raise ApiError(404, message, "model_not_found", "model")

    def template_of(self, resident: Resident | None) -> Template:
        """A run's adapter reads conversations as it was trained to, all others as the base does."""
        kind = resident.template if resident is not None else None
        return self.template if kind is None else dataclasses.replace(self.template, kind=kind)

    def prompt(self, asked: CompletionAsked | ChatAsked, template: Template) -> np.ndarray:
        """The tokens of what was asked.

        Raises:
          ApiError: they cannot be made.
        """
        try:
            if isinstance(asked, ChatAsked):
                return template.prompt([message.plain() for message in asked.messages])
            prompt = asked.one_prompt
            if isinstance(prompt, str):
                return template.plain(prompt)
            vocabulary = self.engine.model.config.vocab_size
            if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
                raise ApiError(400, f"prompt: token {wrong[0]} is not of 0 to {vocabulary - 1}", param="prompt")
            return np.asarray(prompt, np.int32)
        except (TemplateError, jinja2.TemplateError) as error:
            raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from None

    async def submit(self, asked: CompletionAsked | ChatAsked) -> "Ongoing":
        """Puts a request into the queue.

        Raises:
          ApiError: it cannot be answered.
        """
        asked.check()
        resident = await self.resident(asked.model)
        async with self.tokenizing:  # A long text takes its time, and tokenizers are not made for threads.
            tokens = await asyncio.to_thread(self.prompt, asked, self.template_of(resident))
        longest = asked.max_completion_tokens or asked.max_tokens if isinstance(asked, ChatAsked) else asked.max_tokens
        if longest is None:  # As OpenAI's: a text has 16 tokens, an answer in a conversation as many as fit.
            longest = max(self.engine.max_length - len(tokens), 1) if isinstance(asked, ChatAsked) else 16
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(tokens: list[int], ended: str | None) -> None:
            # A loop that is closed has no one to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, (tokens, ended))

        try:
            request = Request(
                tokens=tokens,
                adapter=resident and resident.adapter,
                max_tokens=longest,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                seed=secrets.randbits(32) if asked.seed is None else asked.seed,
            )
            answer = self.engine.submit(request, deliver)
        except TooLong as error:
            raise ApiError(400, str(error), "context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from None
        except QueueFull as error:
            raise ApiError(429, str(error), "queue_full") from None
        except Closed as error:
            raise ApiError(503, str(error), "shutting_down") from None
        # A text goes on where the prompt ends; an answer begins anew.
        after = [] if isinstance(asked, ChatAsked) else tokens.tolist()
        text = Text(self.template.tokenizer, asked.stops, after)
        return Ongoing(answer, events, text, time.monotonic() + self.timeout, self.timeout)

    async def authorize(self, request: fastapi.Request) -> None:
        """Raises ApiError unless the request has one of the keys."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and any(
            hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.api_keys
        )
        if self.api_keys and not known:
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")


@dataclass
class Ongoing:
    """An answer in the making.

    Attributes:
      answer: in the engine.
      events: what it delivers.
      text: of it so far.
      deadline: on the clock of `time.monotonic`.
      timeout: seconds that it had.
    """

    answer: Answer
    events: asyncio.Queue
    text: Text
    deadline: float
    timeout: float

    async def pieces(self) -> AsyncIterator[tuple[str, str | None]]:
        """New text, and at the end why it ended. An iterator that is closed frees the row.

        Raises:
          ApiError: no answer in time, or the server fails.
        """
        try:
            while True:
                try:
                    wait = self.deadline - time.monotonic()
                    tokens, ended = await asyncio.wait_for(self.events.get(), max(wait, 0))
                except TimeoutError:
                    raise ApiError(504, f"no answer within {self.timeout:g} seconds", "timeout") from None
                if ended and ended.startswith("error"):
                    raise ApiError(500, f"the model failed; {ended}", "internal_error")
                if ended == "cancelled":
                    raise ApiError(503, "the server is shutting down", "shutting_down")
                piece = self.text.add(tokens)
                if self.text.stopped:
                    yield piece, "stop"
                    return
                if ended:
                    yield piece + self.text.end(), ended
                    return
                if piece:
                    yield piece, None
        finally:
            self.answer.cancel()


def app(service: Service) -> FastAPI:
    """The web application; it starts the engine, and closes it at the end."""
    engine, metrics = service.engine, Metrics(service.engine, lambda: len(service.names()) - 1)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    made = FastAPI(title="jaxpeft", lifespan=lifespan)
    made.add_middleware(Counted, metrics=metrics)

    @made.exception_handler(ApiError)
    async def refused(request: fastapi.Request, error: ApiError) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.body(), error.status, headers=headers)

    @made.exception_handler(RequestValidationError)
    async def invalid(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return await refused(request, ApiError(400, f"{place or 'body'}: {first['msg']}", "invalid_value", place))

    @made.exception_handler(HTTPException)
    async def lost(request: fastapi.Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers=error.headers)

    @made.exception_handler(Exception)
    async def failed(request: fastapi.Request, error: Exception) -> JSONResponse:  # Whose traceback uvicorn writes.
        return await refused(request, ApiError(500, f"the server failed; {type(error).__name__}", "internal_error"))

    keyed = [Depends(service.authorize)]

    @made.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        await service.rescan()
        return {"object": "list", "data": [openai_api.listed(*item, "jaxpeft") for item in service.names().items()]}

    @made.get("/v1/models/{name:path}", dependencies=keyed)
    async def model(name: str) -> dict[str, Any]:
        await service.resident(name)
        return openai_api.listed(name, service.names()[name], "jaxpeft")

    @made.post("/v1/adapters/reload", dependencies=keyed)
    async def reload() -> dict[str, Any]:
        await service.rescan()
        residents = service.residents
        return {
            "adapters": list(residents.found) if residents else [],
            "refused": residents.refused if residents else {},
        }

    @made.post("/v1/completions", dependencies=keyed)
    async def completions(asked: CompletionAsked, request: fastapi.Request) -> Response:
        return await answered(asked, request)

    @made.post("/v1/chat/completions", dependencies=keyed)
    async def chat(asked: ChatAsked, request: fastapi.Request) -> Response:
        return await answered(asked, request)

    async def answered(asked: CompletionAsked | ChatAsked, request: fastapi.Request) -> Response:
        began = time.monotonic()
        ongoing = await service.submit(asked)
        reply = Reply(isinstance(asked, ChatAsked), asked.model, len(ongoing.answer.request.tokens))

        def done(status: int) -> None:
            request.scope["answered"] = status
            metrics.answered(reply.prompt_tokens, len(ongoing.text.tokens), time.monotonic() - began)

        if asked.stream:
            # A client may be gone before the stream begins, which then never ends either.
            leave = BackgroundTask(ongoing.answer.cancel)
            return StreamingResponse(
                stream(asked, ongoing, reply, done), media_type="text/event-stream", background=leave
            )
        whole = asyncio.ensure_future(_whole(ongoing))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                done(499)
                return Response(status_code=499)  # No one reads it.
            text, reason = whole.result()
        finally:
            whole.cancel()
            gone.cancel()
        done(200)
        return JSONResponse(reply.whole(text, reason, len(ongoing.text.tokens)))

    async def stream(asked: Asked, ongoing: Ongoing, reply: Reply, done: Any) -> AsyncIterator[str]:
        status, first = 499, reply.chat
        try:
            async with contextlib.aclosing(ongoing.pieces()) as pieces:
                async for text, reason in pieces:
                    yield reply.piece(text, reason, first)
                    first = False
            if asked.usage_in_stream:
                yield reply.usage_piece(len(ongoing.text.tokens))
            yield openai_api.DONE
            status = 200
        except ApiError as error:  # The status was sent long ago.
            status = error.status
            yield openai_api.event(error.body())
        finally:
            done(status)

    @made.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if engine.alive else "failed"}, 200 if engine.alive else 503)

    @made.get("/metrics")
    async def shown() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)

    return made


async def _whole(ongoing: Ongoing) -> tuple[str, str]:
    async with contextlib.aclosing(ongoing.pieces()) as pieces:
        found = [piece async for piece in pieces]
    return "".join(text for text, _ in found), str(found[-1][1])


async def _disconnected(request: fastapi.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, which takes no connections yet.

    Raises:
      OSError: the address is taken, or is none of this machine.
      OverflowError: no port has such a number.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError):
        made.close()
        raise
    return made


class Server(uvicorn.Server):
    """uvicorn's, in which what is under way at the end has `grace` seconds, and then learns that the server goes.

    Args:
      service: what answers.
      grace: seconds.
    """

    def __init__(self, service: Service, grace: float):
        # uvicorn cuts connections off; by then the engine has cancelled what they wait for, and they have said so.
        cut = math.ceil(grace) + 5
        # No route is a websocket, and the packages that uvicorn looks for warn of themselves. Its own configuration of
        # logging would close the handlers of others, and absl's closes a stream that stderr no longer is.
        super().__init__(
            uvicorn.Config(app(service), log_level="warning", log_config=None, ws="none", timeout_graceful_shutdown=cut)
        )
        self.engine, self.grace = service.engine, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no connections, and ends when all is answered."""
        loop = asyncio.get_running_loop()
        late = loop.call_later(self.grace, loop.run_in_executor, None, self.engine.close)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()


def run(service: Service, address: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
      service: what answers.
      address: from `bound`.
      grace: seconds that what is under way then has to end.
      ready: called when these signals end it in good order.
    """
    server = Server(service, grace)

    def leave(*_: Any) -> None:
        # uvicorn raises a signal once more when it has ended; and one may come before uvicorn listens to them.
        server.should_exit = True

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ready()
        server.run(sockets=[address])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
