"""The reference engine: `transformers`' own `generate()` over batches formed when it is free.

Pull-when-free: when the model becomes free, the thread takes what waits *now*: no timer, so an
idle engine starts at once and a busy one finds its next batch already full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    Event,
    Finished,
    FinishReason,
    GenerationSettings,
    TokenConstraints,
    Tokens,
    Usage,
)
from serve_app.engine.queue import Entry
from serve_app.engine.thread import EngineThread, failure, padded

_BATCH_SIZE = 32  # where none is set


class ReferenceEngine(EngineThread):
    """`generate()` behind the `Engine` protocol.

    See `EngineThread` for the arguments. `max_batch_size` are requests in one `generate()` call,
    `max_batch_tokens` its padded encoder tokens.
    """

    def _open(self) -> None:
        self._model = _load_model(self._checkpoint, self._device, self._dtype)
        self._slots = self._max_batch_size or _BATCH_SIZE

    def _work(self) -> None:
        with self._lock:
            batch = self._take()
        if batch:
            self._generate(batch)
            with self._lock:
                self._running = []
                self._slots_used = 0

    def _take(self) -> list[Entry]:
        """The request whose turn it is and, in order, all that can share a `generate()` with it."""
        first = self._waiting.peek()
        if first is None:
            return []
        settings = first.request.settings
        count = longest = 0

        def fits(entry: Entry) -> bool:
            nonlocal count, longest
            grown = max(longest, entry.tokens)
            if count and (
                entry.request.settings != settings
                or count == self._slots
                or grown * (count + 1) > self._max_batch_tokens
            ):
                return False
            count, longest = count + 1, grown
            return True

        batch = self._waiting.take(fits)
        now = time.monotonic()
        for entry in batch:
            entry.started = now
        self._running = batch
        self._slots_used = len(batch)
        return batch

    def _generate(self, batch: list[Entry]) -> None:
        began = time.monotonic()
        settings = batch[0].request.settings
        try:
            watch = _Watch(self, batch, settings.num_beams)
            outputs = self._forward(batch, settings, watch)
        except Exception as error:
            self._isolate(batch, error, self._generate)
            return
        seconds = time.monotonic() - began
        input_tokens = sum(entry.tokens for entry in batch)
        self._drained(input_tokens, seconds)
        with self._lock:  # its work is measured in input tokens alone
            self._tally.encoded(input_tokens, seconds)
            self._tally.finished += len(batch)
        output_tokens = sum(len(ids) for ids, _ in outputs)
        events: list[Event] = [BatchRan(len(batch), input_tokens, output_tokens, seconds)]
        for entry, (ids, reason) in zip(batch, outputs, strict=True):
            if entry.over:
                continue
            if entry.request.stream and len(ids) > entry.streamed:
                events.append(Tokens(entry.request.id, ids[entry.streamed :]))
            usage = Usage(
                input_tokens=entry.tokens,
                output_tokens=len(ids),
                queue_ms=(entry.started - entry.arrived) * 1e3,
                compute_ms=seconds * 1e3,
            )
            events.append(Finished(entry.request.id, ids, reason, usage))
        self._finish(events)

    @torch.inference_mode()
    def _forward(
        self, batch: list[Entry], settings: GenerationSettings, watch: _Watch
    ) -> list[tuple[list[int], FinishReason]]:
        device = self._model.device
        config = self._model.config
        pad, eos = int(config.pad_token_id), int(config.eos_token_id)
        input_ids, mask = padded(batch, pad, device)
        generate = cast("Callable[..., torch.Tensor]", self._model.generate)
        output = generate(
            input_ids=input_ids,
            attention_mask=mask.long(),
            generation_config=_generation_config(
                self._model, settings, self._checkpoint.constraints
            ),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return [_strip(row, eos, pad) for row in output[:, 1:].tolist()]


class _Watch(StoppingCriteria):
    """Looks in after every decode step: streams, and stops rows nobody waits for any more."""

    def __init__(self, engine: ReferenceEngine, batch: list[Entry], num_beams: int) -> None:
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
        # Beams have no settled prefix until the search ends; greedy rows are final at once.
        if self._num_beams == 1:
            for row, entry in enumerate(self._batch):
                if entry.request.stream and not entry.over:
                    new = input_ids[row, 1 + entry.streamed :].tolist()
                    ids, _reason = _strip(new, self._eos, self._pad)
                    if ids:
                        entry.streamed += len(ids)
                        events.append(Tokens(entry.request.id, ids))
        # A request's end comes last of its events.
        for entry in self._batch:
            entry.made = input_ids.shape[1] - 1  # without the start token
            failed = None if entry.over else failure(entry, now)
            if failed is not None:
                events.append(failed)
        self._engine._finish(events)
        gone = torch.tensor([entry.over for entry in self._batch], device=input_ids.device)
        rows = input_ids.shape[0] // len(self._batch)
        return cast(torch.BoolTensor, gone.repeat_interleave(rows))


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


def _generation_config(
    model: PreTrainedModel, settings: GenerationSettings, constraints: TokenConstraints
) -> GenerationConfig:
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
        repetition_penalty=settings.repetition_penalty,
        suppress_tokens=list(constraints.suppressed) or None,
        begin_suppress_tokens=list(constraints.begin_suppressed) or None,
        forced_bos_token_id=constraints.forced_first,
        forced_eos_token_id=constraints.forced_last,
        pad_token_id=model.config.pad_token_id,
        eos_token_id=model.config.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
        **beams,
    )
