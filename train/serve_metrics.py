"""What does a server tell Prometheus? Requests, tokens, times, and how full it is."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
