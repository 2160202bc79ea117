"""The engine: continuous batching. Every step decodes whoever is there, and none waits for others.

A unit of work: documents that are done, cancelled or late have left; waiting ones are encoded in
microbatches of similar length within a token budget and get slots; then one decode step for all
rows, greedy and beam search side by side, each with its own settings.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from serve_app.engine.model import T5
from serve_app.engine.protocol import (
    BatchRan,
    Event,
    Finished,
    FinishReason,
    Tokens,
    Usage,
)
from serve_app.engine.queue import Entry
from serve_app.engine.search import beam_step, greedy_step, output
from serve_app.engine.slots import Group
from serve_app.engine.thread import EngineThread, broken, failure, padded
from serve_app.engine.weights import load_weights, read_shape

logger = logging.getLogger(__name__)

_SIMILAR = 0.7  # documents of one microbatch have at least this share of its longest


class ContinuousEngine(EngineThread):
    """T5 with iteration-level scheduling (Yu et al. 2022, "Orca"), behind the `Engine` protocol.

    See `EngineThread` for the arguments. `max_batch_size` are rows of the running batch, of which a
    document takes one per beam; `max_batch_tokens` are what is encoded between two decode steps.
    """

    @torch.inference_mode()
    def _open(self) -> None:
        shape = read_shape(self._checkpoint.config)
        dtype = getattr(torch, self._dtype)
        weights = load_weights(self._checkpoint, shape, self._device, dtype)
        self._model = T5(weights, shape)
        self._groups: dict[int, Group] = {}  # by number of beams
        self._undrained_s = 0.0

    @torch.inference_mode()
    def _work(self) -> None:
        began = time.monotonic()
        self._drop_dead(began)
        encoded = self._admit()
        groups = [group for group in self._groups.values() if len(group)]
        if not groups:
            return
        documents = sum(map(len, groups))
        try:
            events, made = self._step(groups)
        except Exception as error:
            # A step is of the whole batch: nobody can tell whose fault it was.
            logger.exception("a decode step of %d documents failed", documents)
            events, made = self._abandon(error), 0
        seconds = time.monotonic() - began
        self._account(events, seconds)
        self._finish([*events, BatchRan(documents, encoded, made, seconds)])

    def _drop_dead(self, now: float) -> None:
        """Free the slots of requests nobody waits for any more."""
        events: list[Event] = []
        for group in self._groups.values():
            dead = {slot: f for slot, e in enumerate(group.entries) if (f := failure(e, now))}
            group.leave(list(dead))
            events.extend(dead.values())
        if events:
            self._update_running()
            self._finish(events)

    def _admit(self) -> int:
        """Encode waiting documents and give them slots; returns how many tokens that took."""
        with self._lock:
            admitted = self._pull()
            now = time.monotonic()
            for entry in admitted:
                entry.started = now
        for batch in _microbatches(admitted):
            self._encode(batch)
        self._update_running()
        return sum(entry.tokens for entry in admitted)

    def _pull(self) -> list[Entry]:
        """Take from the queue, in turn, what fits into free rows and the encoder's budget."""
        pulled: list[Entry] = []
        rows = sum(group.rows for group in self._groups.values())
        longest = 0
        while len(self._waiting):
            entry = self._waiting.peek()
            rows += entry.request.settings.num_beams
            longest = max(longest, entry.tokens)
            # More beams than rows, or more tokens than the budget: alone, it may all the same.
            fits = rows <= self._max_batch_size or rows == entry.request.settings.num_beams
            affordable = not pulled or longest * (len(pulled) + 1) <= self._max_batch_tokens
            if not (fits and affordable):
                break
            pulled.append(self._waiting.pop())
        return pulled

    def _encode(self, batch: list[Entry]) -> None:
        """Encode documents and give them slots. Those that cannot be encoded fail alone."""
        try:
            lengths = [entry.tokens for entry in batch]
            ids, mask = padded(batch, self._model.shape.pad_id, self._model.device)
            keys, values = self._model.encode(ids, mask)
        except Exception as error:
            self._isolate(batch, error, self._encode)
            return
        for beams in {entry.request.settings.num_beams for entry in batch}:
            mine = [i for i, e in enumerate(batch) if e.request.settings.num_beams == beams]
            if beams not in self._groups:
                self._groups[beams] = Group(self._model, beams)
            self._groups[beams].admit(
                [batch[i] for i in mine],
                [lengths[i] for i in mine],
                (keys[:, mine], values[:, mine]),
            )

    def _step(self, groups: list[Group]) -> tuple[list[Event], int]:
        """One token for every row; returns what happened and how many tokens came out."""
        eos_id = self._model.shape.eos_id
        rows = [group.rows for group in groups]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = zip(groups, *(part.split(rows) for part in (query, key, value)), strict=True)
            return _joined([group.attend(layer, q, k, v) for group, q, k, v in parts])

        def cross(layer: int, query: Tensor) -> Tensor:
            parts = zip(groups, query.split(rows), strict=True)
            return _joined([group.cross(layer, part) for group, part in parts])

        ids = _joined([group.begin() for group in groups])
        logits = self._model.decode(ids, attend, cross)
        events: list[Event] = []
        made = 0
        for group, part in zip(groups, logits.split(rows), strict=True):
            made += len(group)
            if group.beams == 1:
                chosen, done = greedy_step(group, part, eos_id)
                flags = done.tolist()
                events.extend(_deltas(group, chosen.tolist(), eos_id))
            else:
                flags = beam_step(group, part, eos_id).tolist()
            leaving = [slot for slot, over in enumerate(flags) if over]
            events.extend(self._finished(group, slot) for slot in leaving)
            group.leave(leaving)
        self._stepped()
        self._update_running()
        return events, made

    def _finished(self, group: Group, slot: int) -> Finished:
        entry = group.entries[slot]
        ids, ended = output(group, slot, self._model.shape.eos_id)
        usage = Usage(
            input_tokens=entry.tokens,
            output_tokens=len(ids),
            queue_ms=(entry.started - entry.arrived) * 1e3,
            compute_ms=(time.monotonic() - entry.started) * 1e3,
        )
        reason = FinishReason.STOP if ended else FinishReason.MAX_NEW_TOKENS
        return Finished(entry.request.id, ids, reason, usage)

    def _abandon(self, error: Exception) -> list[Event]:
        failed: list[Event] = [
            broken(entry, error) for group in self._groups.values() for entry in group.entries
        ]
        self._groups = {}
        self._update_running()
        return failed

    def _account(self, events: list[Event], seconds: float) -> None:
        """Feed the drain rate: input tokens of finished requests over time at work."""
        self._undrained_s += seconds
        done = [event for event in events if isinstance(event, Finished)]
        if done:
            tokens = sum(event.usage.input_tokens for event in done)
            self._drained(tokens, self._undrained_s)
            self._undrained_s = 0.0

    def _update_running(self) -> None:
        running = [entry for group in self._groups.values() for entry in group.entries]
        with self._lock:
            self._running = running


def _microbatches(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Documents of similar length together, so that little is encoded that is padding."""
    batch: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: -entry.tokens):
        if batch and entry.tokens < _SIMILAR * batch[0].tokens:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _deltas(group: Group, chosen: list[int], eos_id: int) -> Iterator[Tokens]:
    for entry, token in zip(group.entries, chosen, strict=True):
        if entry.request.stream and token != eos_id:
            yield Tokens(entry.request.id, [token])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
