"""What a Summarizer replica tells of its engine."""

from __future__ import annotations

from serve_app.engine.protocol import BatchRan, EngineLoad, Failed, Finished
from serve_app.metrics.exporter import Exporter

# A histogram costs Ray's agent about 10 µs for each value: of steps, which there may be a thousand
# of in a second, only some go in. By count, not by time, or long steps would be seen more often.
_EVERY = 16


class EngineMetrics:
    """Figures of one engine as Prometheus series. Called on the replica's event loop."""

    def __init__(self, exporter: Exporter) -> None:
        self._to = exporter
        self._steps = 0
        self._encodes = 0

    def event(self, event: BatchRan | Finished | Failed) -> None:
        """The engine ran a batch, or is done with a document."""
        if isinstance(event, BatchRan):
            self._batch(event)
        elif isinstance(event, Finished):
            self._to.add("t5_engine_requests", 1, "finished")
            self._to.add("t5_queue_seconds", event.usage.queue_ms / 1e3)
            self._to.observe("t5_queue_ms", event.usage.queue_ms)
            self._to.observe("t5_compute_ms", event.usage.compute_ms)
        else:
            self._to.add("t5_engine_requests", 1, event.reason.value)
            lost_s = event.usage.compute_ms / 1e3
            self._to.add("t5_lost_compute_seconds", lost_s, event.reason.value)

    def rejected(self, outcome: str) -> None:
        """The queue was full (`rejected`), or too long (`too_late`)."""
        self._to.add("t5_engine_requests", 1, outcome)

    def load(self, load: EngineLoad) -> None:
        """Set the gauges."""
        self._to.set("t5_slots", load.slots)
        self._to.set("t5_slots_used", load.slots_used)
        self._to.set("t5_running_requests", load.running_requests)
        self._to.set("t5_waiting_requests", load.waiting_requests)
        self._to.set("t5_waiting_tokens", load.waiting_tokens)
        self._to.set("t5_no_progress_seconds", load.no_progress_s)
        if load.drain_tokens_per_s is not None:
            self._to.set("t5_drain_tokens_per_s", load.drain_tokens_per_s)
        if load.last_step_age_s is not None:
            self._to.set("t5_step_age_seconds", load.last_step_age_s)

    def _batch(self, ran: BatchRan) -> None:
        add = self._to.add
        add("t5_batches")
        add("t5_batched_requests", ran.requests)
        add("t5_compute_seconds", ran.seconds)
        add("t5_decode_seconds", ran.seconds - ran.encode_seconds)
        add("t5_engine_requests", ran.preempted, "preempted")
        add("t5_tokens", ran.input_tokens, "input")
        add("t5_tokens", ran.output_tokens, "output")
        if ran.drafted:
            add("t5_draft_tokens", ran.drafted, "tried")
            add("t5_draft_tokens", ran.accepted, "accepted")
        if self._steps % _EVERY == 0:
            self._to.observe("t5_batch_size", ran.requests)
            self._to.observe("t5_decode_ms", (ran.seconds - ran.encode_seconds) * 1e3)
        self._steps += 1
        if ran.encode_seconds:
            add("t5_encodes")
            add("t5_encode_seconds", ran.encode_seconds)
            if self._encodes % _EVERY == 0:
                self._to.observe("t5_encode_ms", ran.encode_seconds * 1e3)
            self._encodes += 1
