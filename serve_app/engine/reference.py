"""The reference engine: `transformers`' own `generate()` over batches formed when it is free.

Pull-when-free: when the model becomes free, the thread takes what waits *now*: no timer, so an
idle engine starts at once and a busy one finds its next batch already full.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.protocol import (
    BatchRan,
    Emit,
    EngineLoad,
    EngineRequest,
    EngineStoppedError,
    Event,
    Failed,
    FailureReason,
    Finished,
    FinishReason,
    GenerationSettings,
    QueueFullError,
    Tokens,
    Usage,
)

logger = logging.getLogger(__name__)

_RATE_SMOOTHING = 0.3  # weight of the newest batch in the drain rate


@dataclass(slots=True)
class _Entry:
    """A request on its way through the engine."""

    request: EngineRequest
    arrived: float
    started: float = 0.0
    streamed: int = 0
    cancelled: bool = False
    over: bool = field(default=False)  # its last event has been emitted

    def late(self, now: float) -> bool:
        return self.request.deadline is not None and now >= self.request.deadline


class ReferenceEngine:
    """`generate()` behind the `Engine` protocol.

    Args:
        checkpoint: the model to load.
        emit: called on the engine's thread with the events of each step.
        device: torch device, e.g. `"cpu"` or `"cuda"`.
        dtype: torch dtype name of the weights, e.g. `"float32"`.
        threads: intra-op threads on the CPU; 0 keeps torch's choice.
        max_batch_size: most requests in one `generate()` call.
        max_batch_tokens: most padded encoder tokens (longest x requests) in one call.
        max_waiting_requests: bound of the queue.
        max_waiting_tokens: bound of the queue in encoder tokens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        emit: Emit,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 0,
        max_batch_size: int = 32,
        max_batch_tokens: int = 16_384,
        max_waiting_requests: int = 512,
        max_waiting_tokens: int = 262_144,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._model = _load_model(checkpoint, device, dtype)
        self._emit = emit
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens

        self._lock = threading.Condition()
        self._waiting: deque[_Entry] = deque()
        self._waiting_tokens = 0
        self._running: list[_Entry] = []
        self._by_id: dict[str, _Entry] = {}
        self._closing = False
        self._drain_rate: float | None = None
        self._steps = 0
        self._last_step: float | None = None
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="t5-engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """See `Engine.submit`."""
        tokens = len(request.input_ids)
        with self._lock:
            if self._closing or not self._thread.is_alive():
                raise EngineStoppedError("the engine has stopped")
            if request.id in self._by_id:
                raise ValueError(f"request id {request.id!r} is already in the engine")
            if len(self._waiting) >= self._max_waiting_requests:
                limit = f"{self._max_waiting_requests} requests"
                raise QueueFullError(f"the queue is full: {limit} are waiting", self._load())
            # A request longer than the whole bound still gets in when nothing else waits.
            if self._waiting and self._waiting_tokens + tokens > self._max_waiting_tokens:
                limit = f"{self._max_waiting_tokens} tokens"
                raise QueueFullError(f"the queue is full: its limit is {limit}", self._load())
            entry = _Entry(request, arrived=time.monotonic())
            self._by_id[request.id] = entry
            self._waiting.append(entry)
            self._waiting_tokens += tokens
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        with self._lock:
            entry = self._by_id.get(request_id)
            if entry is None:
                return
            entry.cancelled = True
            self._lock.notify()

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        with self._lock:
            return self._load()

    def stalled(self, limit_s: float) -> str | None:
        """See `Engine.stalled`."""
        with self._lock:
            if not self._thread.is_alive():
                return "the engine thread has died"
            if self._busy_since is None:
                return None
            age = time.monotonic() - max(self._last_step or 0.0, self._busy_since)
            return f"no step for {age:.0f} s while busy" if age > limit_s else None

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            self._closing = True
            for entry in self._by_id.values():
                entry.cancelled = True
            self._lock.notify()
        self._thread.join(timeout=30)

    # The engine's thread from here on.

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closing:
                    self._lock.wait()
                dropped = self._drop_dead()
                batch = self._take()
                if batch:
                    self._busy_since = time.monotonic()
                stop = self._closing and not batch
            self._finish(dropped)
            if batch:
                self._generate(batch)
                with self._lock:
                    self._running = []
                    self._busy_since = None
            if stop:
                return

    def _drop_dead(self) -> list[Event]:
        """Take cancelled and late requests out of the queue before they cost compute."""
        now = time.monotonic()
        events: list[Event] = []
        alive: deque[_Entry] = deque()
        for entry in self._waiting:
            failed = _failure(entry, now)
            if failed is None:
                alive.append(entry)
            else:
                entry.over = True
                self._waiting_tokens -= len(entry.request.input_ids)
                events.append(failed)
        self._waiting = alive
        return events

    def _take(self) -> list[_Entry]:
        """The oldest waiting request and, in order, all that can share a `generate()` with it."""
        if not self._waiting:
            return []
        settings = self._waiting[0].request.settings
        batch: list[_Entry] = []
        left: deque[_Entry] = deque()
        longest = 0
        for entry in self._waiting:
            grown = max(longest, len(entry.request.input_ids))
            fits = not batch or (
                entry.request.settings == settings
                and len(batch) < self._max_batch_size
                and grown * (len(batch) + 1) <= self._max_batch_tokens
            )
            if fits:
                batch.append(entry)
                longest = grown
            else:
                left.append(entry)
        now = time.monotonic()
        for entry in batch:
            entry.started = now
            self._waiting_tokens -= len(entry.request.input_ids)
        self._waiting = left
        self._running = batch
        return batch

    def _generate(self, batch: list[_Entry]) -> None:
        began = time.monotonic()
        settings = batch[0].request.settings
        try:
            watch = _Watch(self, batch, settings.num_beams)
            outputs = self._forward(batch, settings, watch)
        except Exception as error:
            # One bad request must not take the batch with it: halve until it stands alone.
            logger.exception("generate() failed for a batch of %d", len(batch))
            if len(batch) > 1:
                middle = len(batch) // 2
                self._generate(batch[:middle])
                self._generate(batch[middle:])
            else:
                message = f"{type(error).__name__}: {error}"
                self._finish([Failed(batch[0].request.id, FailureReason.ERROR, message)])
            return
        seconds = time.monotonic() - began
        input_tokens = sum(len(entry.request.input_ids) for entry in batch)
        self._measure(input_tokens, seconds)
        events: list[Event] = []
        for entry, (ids, reason) in zip(batch, outputs, strict=True):
            if entry.over:
                continue
            if entry.request.stream and len(ids) > entry.streamed:
                events.append(Tokens(entry.request.id, ids[entry.streamed :]))
            usage = Usage(
                input_tokens=len(entry.request.input_ids),
                output_tokens=len(ids),
                queue_ms=(entry.started - entry.arrived) * 1e3,
                compute_ms=seconds * 1e3,
            )
            events.append(Finished(entry.request.id, ids, reason, usage))
        output_tokens = sum(len(ids) for ids, _ in outputs)
        events.append(BatchRan(len(batch), input_tokens, output_tokens, seconds))
        self._finish(events)

    @torch.inference_mode()
    def _forward(
        self, batch: list[_Entry], settings: GenerationSettings, watch: _Watch
    ) -> list[tuple[list[int], FinishReason]]:
        device = self._model.device
        config = self._model.config
        rows = [list(entry.request.input_ids) for entry in batch]
        width = max(map(len, rows))
        pad, eos = int(config.pad_token_id), int(config.eos_token_id)
        input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
        )
        generate = cast("Callable[..., torch.Tensor]", self._model.generate)
        output = generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=_generation_config(self._model, settings),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return [_strip(row, eos, pad) for row in output[:, 1:].tolist()]

    def _finish(self, events: list[Event]) -> None:
        """Forget the requests these events end, then hand the events out."""
        with self._lock:
            for event in events:
                if isinstance(event, Finished | Failed):
                    entry = self._by_id.pop(event.id, None)
                    if entry is not None:
                        entry.over = True
        if events:
            self._emit(events)

    def _measure(self, input_tokens: int, seconds: float) -> None:
        rate = input_tokens / max(seconds, 1e-6)
        with self._lock:
            old = self._drain_rate
            self._drain_rate = rate if old is None else old + _RATE_SMOOTHING * (rate - old)

    def _load(self) -> EngineLoad:
        age = None if self._last_step is None else time.monotonic() - self._last_step
        return EngineLoad(
            waiting_requests=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            running_requests=len(self._running),
            steps=self._steps,
            drain_tokens_per_s=self._drain_rate,
            last_step_age_s=age,
        )

    def _stepped(self) -> None:
        with self._lock:
            self._steps += 1
            self._last_step = time.monotonic()


class _Watch(StoppingCriteria):
    """Looks in after every decode step: streams, and stops rows nobody waits for any more."""

    def __init__(self, engine: ReferenceEngine, batch: list[_Entry], num_beams: int) -> None:
        self._engine = engine
        self._batch = batch
        self._num_beams = num_beams
        self._eos = int(engine._model.config.eos_token_id)
        self._pad = int(engine._model.config.pad_token_id)

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object
    ) -> torch.BoolTensor:
        self._engine._stepped()
        now = time.monotonic()
        events: list[Event] = []
        for entry in self._batch:
            failed = None if entry.over else _failure(entry, now)
            if failed is not None:
                events.append(failed)
        # Beams have no settled prefix until the search ends; greedy rows are final at once.
        if self._num_beams == 1:
            for row, entry in enumerate(self._batch):
                if entry.request.stream and not entry.over:
                    new = input_ids[row, 1 + entry.streamed :].tolist()
                    ids, _reason = _strip(new, self._eos, self._pad)
                    if ids:
                        entry.streamed += len(ids)
                        events.append(Tokens(entry.request.id, ids))
        self._engine._finish(events)
        gone = torch.tensor([entry.over for entry in self._batch], device=input_ids.device)
        rows = input_ids.shape[0] // len(self._batch)
        return cast(torch.BoolTensor, gone.repeat_interleave(rows))


def _failure(entry: _Entry, now: float) -> Failed | None:
    if entry.cancelled:
        return Failed(entry.request.id, FailureReason.CANCELLED, "cancelled")
    if entry.late(now):
        return Failed(entry.request.id, FailureReason.DEADLINE, "the deadline has passed")
    return None


def _strip(row: Sequence[int], eos: int, pad: int) -> tuple[list[int], FinishReason]:
    """Output ids up to the first end token, without it, and why they end there.

    A row without an end token either used up its tokens or was stopped early, in which case it is
    padded; its padding is not output.
    """
    ids = list(row)
    if eos in ids:
        return ids[: ids.index(eos)], FinishReason.STOP
    while ids and ids[-1] == pad:
        ids.pop()
    return ids, FinishReason.MAX_NEW_TOKENS


def _load_model(checkpoint: Checkpoint, device: str, dtype: str) -> PreTrainedModel:
    model = AutoModelForSeq2SeqLM.from_pretrained(
        str(checkpoint.path),
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    # generate() fills what a request leaves open from here: leave it nothing but the token ids.
    config = model.config
    model.generation_config = GenerationConfig(
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    model.to(torch.device(device))
    model.eval()
    return cast(PreTrainedModel, model)


def _generation_config(model: PreTrainedModel, settings: GenerationSettings) -> GenerationConfig:
    beams: dict[str, object] = {}
    if settings.num_beams > 1:
        beams = {
            "length_penalty": settings.length_penalty,
            "early_stopping": settings.early_stopping,
        }
    return GenerationConfig(
        do_sample=False,
        num_beams=settings.num_beams,
        min_new_tokens=settings.min_new_tokens or None,
        max_new_tokens=settings.max_new_tokens,
        no_repeat_ngram_size=settings.no_repeat_ngram_size or None,
        pad_token_id=model.config.pad_token_id,
        eos_token_id=model.config.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
        **beams,
    )
