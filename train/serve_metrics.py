"""What does a server tell Prometheus? Requests, tokens, times, and how full it is."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from train.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
      engine: whose rows and queue are shown.
      adapters: how many are in memory.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, adapters: Callable[[], int]):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "jaxpeft"}
        self.requests = Counter("requests", "Requests by path and HTTP status", ["path", "status"], **own)
        self.tokens = Counter("tokens", "Tokens read (prompt) and written (completion)", ["kind"], **own)
        self.seconds = Histogram("request_seconds", "From request to its last token", buckets=SECONDS, **own)
        for name, help, value in (
            ("queue_length", "Requests that wait for a row", lambda: engine.waiting),
            ("rows_in_use", "Rows that are written", lambda: engine.busy),
            ("rows", "Rows that there are", lambda: engine.rows),
            ("adapters", "Adapters in memory", adapters),
            ("programs_compiled", "Programs compiled since the start", lambda: engine.traces.total()),
        ):
            Gauge(name, help, **own).set_function(value)

    def count(self, path: str, status: int) -> None:
        """One request more."""
        self.requests.labels(path, str(status)).inc()

    def answered(self, prompt: int, completion: int, seconds: float) -> None:
        """One answer more of the engine, whole or not, with its tokens."""
        self.tokens.labels("prompt").inc(prompt)
        self.tokens.labels("completion").inc(completion)
        self.seconds.observe(seconds)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry)


class Counted:
    """Counts what is asked under ``/v1``, by the route and by how it ended: as ASGI goes, an application around one.

    Args:
      app: the application.
      metrics: that count.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, as the application does."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope.setdefault("answered", message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            scope["answered"] = 500
            raise
        finally:
            # Paths that are no route would be as many series as anybody likes to ask for.
            if path := getattr(scope.get("route"), "path", ""):
                self.metrics.count(path, scope.get("answered", 499))
