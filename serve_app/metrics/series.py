"""Every Prometheus series of the service, declared once. docs/monitoring.md is checked against it.

Names are without the prefix `ray_`, which Ray adds, and without the `_total` that it appends to a
counter's. Ray also adds the labels `application`, `deployment` and `replica`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# Fixed, though timeouts are settings: Ray's agent keeps the boundaries that a node saw first, and
# drops histograms with another number of them. The defaults of `limits` (120 s and 300 s) are
# boundaries, and a document cannot take longer than the last unless `limits.timeout_s` is raised.
LATENCY_MS = (
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0),
    *(1e3, 2.5e3, 5e3, 10e3, 30e3, 60e3, 120e3, 300e3, 600e3),
)
STEP_MS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3)
BATCH_SIZES = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0)

# Names of clients come from outside: tokens, or an ingress. A replica counts this many by name.
MOST_CLIENTS = 100
OTHER_CLIENTS = "other"


class Kind(StrEnum):
    """What Prometheus calls the type of a series."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Series:
    """One series. `boundaries` are a histogram's, in the unit its name ends with."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name on Ray's metrics port; a histogram's without `_bucket`."""
        return f"ray_{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"


def _counter(name: str, text: str, *labels: str) -> Series:
    return Series(name, Kind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Series:
    return Series(name, Kind.GAUGE, text, labels)


def _histogram(name: str, text: str, boundaries: tuple[float, ...], *labels: str) -> Series:
    return Series(name, Kind.HISTOGRAM, text, labels, boundaries)


SPANS_DROPPED = _counter("t5_spans_dropped", "Spans that could not be sent to the collector.")

API_SERIES = (
    _counter("t5_http_requests", "HTTP requests answered.", "http_route", "status"),
    _histogram(
        "t5_http_latency_ms",
        "Time from request to the end of its answer.",
        LATENCY_MS,
        "http_route",
    ),
    _counter("t5_truncated_texts", "Texts of which a part was left out."),
    _counter("t5_chunks", "Parts that texts were split into."),
    _counter(
        "t5_shed_texts",
        "Texts refused for want of room (status 429 or 503), by the kind of problem.",
        "reason",
    ),
    _counter(
        "t5_rate_limited",
        "Requests refused for a limit of their client (`rate_limits`), by the limit.",
        "limit",
    ),
    _counter("t5_usage_events_dropped", "Usage events that could not be kept."),
    _gauge(
        "t5_client_requests_in_flight",
        f"Requests of a client being worked on. The first {MOST_CLIENTS} clients of a replica have "
        f"their name, the rest are `{OTHER_CLIENTS}`.",
        "client",
    ),
    _counter(
        "t5_client_requests",
        "Requests of a client answered, by class of status (`2xx`, `4xx`, `5xx`).",
        "client",
        "status",
    ),
    _counter(
        "t5_client_tokens",
        "Tokens of a client through the model, `input` and `output`.",
        "client",
        "kind",
    ),
)

ENGINE_SERIES = (
    _counter("t5_batches", "Batches through the model; with the continuous engine decode steps."),
    _counter("t5_batched_requests", "Documents in those batches; mean batch size is the ratio."),
    _histogram("t5_batch_size", "Documents in a batch, of every 16th.", BATCH_SIZES),
    _counter("t5_compute_seconds", "Wall time in the model: its rate is the utilization."),
    _counter("t5_encodes", "Times that waiting documents were encoded and took slots."),
    _counter("t5_encode_seconds", "Wall time of encoding; on a GPU, of launching it."),
    _histogram("t5_encode_ms", "Time of encoding, of every 16th time.", STEP_MS),
    _counter("t5_decode_seconds", "Wall time of decode steps."),
    _histogram("t5_decode_ms", "Time of a decode step, of every 16th.", STEP_MS),
    _counter("t5_tokens", "Tokens through the model, `input` and `output`.", "kind"),
    _counter(
        "t5_draft_tokens",
        "Tokens looked up in the source: `tried` ahead, and those `accepted`.",
        "kind",
    ),
    _counter("t5_queue_seconds", "Time that finished documents had waited in the queue."),
    _histogram("t5_queue_ms", "Wait of a document in the engine's queue.", LATENCY_MS),
    _histogram("t5_compute_ms", "Time of a document in the model.", LATENCY_MS),
    _counter(
        "t5_engine_requests",
        "Documents by outcome: `finished`, `deadline`, `cancelled`, `error`, `stopped` with their "
        "engine; refused at once, as the queue is full, `rejected`, or as they would be late, "
        "`too_late`; and `preempted`, back in the queue for want of memory.",
        "outcome",
    ),
    _counter(
        "t5_lost_compute_seconds",
        "Time in the model of documents that then had no result, by outcome.",
        "outcome",
    ),
    _gauge("t5_slots", "Rows of the running batch that there are; a beam takes one."),
    _gauge("t5_slots_used", "Rows taken."),
    _gauge("t5_running_requests", "Documents in the model."),
    _gauge("t5_waiting_requests", "Documents in the queue."),
    _gauge("t5_waiting_tokens", "Their tokens."),
    _gauge("t5_drain_tokens_per_s", "Measured rate at which waiting tokens leave the queue."),
    _gauge("t5_step_age_seconds", "Since the last step; grows while the engine is idle."),
    _gauge("t5_no_progress_seconds", "With work to do, since the last step; 0 while idle."),
)
