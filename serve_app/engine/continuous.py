"""The engine: continuous batching. Every step decodes whoever is there, and none waits for others.

A unit of work: documents that are done, cancelled or late have left; waiting ones are encoded in
microbatches of similar length within a token budget and get slots; then one decode step for all
rows, greedy and beam search side by side, each with its own settings.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from serve_app.engine import native
from serve_app.engine.checkpoint import Checkpoint, CheckpointError
from serve_app.engine.faults import let_go, out_of_memory, poisoned
from serve_app.engine.protocol import BatchRan, Event, Finished, FinishReason, Tokens
from serve_app.engine.queue import Entry
from serve_app.engine.runner import Advance, Plan, Runner
from serve_app.engine.shares import TimeShares
from serve_app.engine.thread import EngineThread, broken, failure
from serve_app.engine.turns import Turns

logger = logging.getLogger(__name__)

_MOST_HELD = 16  # steps for which waiting documents are held back while few rows are free
_RECOVERY_STEPS = 256  # without running out of memory, after which twice as many rows are tried


class ContinuousEngine(EngineThread):
    """T5 with iteration-level scheduling (Yu et al. 2022, "Orca"), behind the `Engine` protocol.

    See `EngineThread` for the arguments. `max_batch_size` are rows of the running batch, of which a
    document takes one per beam; `max_batch_tokens` are what is encoded between two decode steps.
    `dtype` may be `int8` on a CPU.
    """

    @staticmethod
    def _make_runner(checkpoint: Checkpoint, plan: Plan) -> Runner:
        return make_runner(checkpoint, plan)

    @torch.inference_mode()
    def _open(self) -> None:
        plan = Plan(
            device=self._device,
            dtype=self._dtype,
            rows=self._max_batch_size,
            steps=self._checkpoint.defaults.max_new_tokens,
            source=self._checkpoint.max_input_tokens,
            speculation=self._speculation,
            encode_tokens=self._max_batch_tokens,
        )
        self._runner = self._make_runner(self._checkpoint, plan)
        self._undrained_s = 0.0
        self._slots = self._rows_allowed = self._runner.most_rows
        self._good_steps = self._preempted = self._held = 0
        self._time = TimeShares() if self._runner.steps_some else None
        self._turns = Turns(self._slots, self._max_batch_tokens, self._time)

    @torch.inference_mode()
    def _work(self) -> None:
        began, cpu_began = time.monotonic(), time.thread_time()
        self._drop_dead(began)
        encoded = self._admit()
        encode_seconds = time.monotonic() - began if encoded else 0.0
        if not self._runner.entries:
            return
        stepping = list(self._stepping())
        documents, rows = len(stepping), sum(entry.rows for entry in stepping)
        made = drafted = accepted = 0
        try:
            some = documents < len(self._runner.entries)
            advances = self._runner.step(stepping if some else None)
            self._stepped()
        except Exception as error:
            if poisoned(error):
                raise
            events = self._step_failed(error, stepping)
        else:
            self._recover()
            events = list(self._events(advances))
            made = sum(advance.made for advance in advances)
            drafted = sum(advance.drafted for advance in advances)
            accepted = made - len(advances)
            self._leave([advance.entry for advance in advances if advance.output is not None])
        ended = time.monotonic()
        seconds = ended - began
        if self._time is not None:
            self._time.stepped(_by_share(stepping), self._pace.step, seconds - encode_seconds)
        with self._lock:
            self._tally.encoded(encoded, encode_seconds)
            self._tally.stepped(rows, documents, made, seconds - encode_seconds)
            self._tally.cpu_s += time.thread_time() - cpu_began
            self._pace.stepped(self._tally, ended)
        self._account(events, seconds)
        preempted, self._preempted = self._preempted, 0
        ran = BatchRan(
            documents, encoded, made, seconds, drafted, accepted, encode_seconds, preempted
        )
        # First what was done, then whom it was for: who sees an end counted sees its tokens, too.
        self._finish([ran, *events])

    def _stepping(self) -> list[Entry]:
        """The documents that take the next step: all, or those of shares that are not ahead."""
        entries = self._runner.entries
        if self._time is None:
            return entries
        rows = _by_share(entries)
        if len(rows) == 1:
            return entries
        ahead = {share for share in rows if self._time.ahead(share, rows, self._pace.step)}
        return [entry for entry in entries if entry.request.share not in ahead]

    def _drop_dead(self, now: float) -> None:
        """Free the slots of requests nobody waits for any more."""
        dead = {entry: f for entry in self._runner.entries if (f := failure(entry, now))}
        if dead:
            self._leave(list(dead))
            self._finish(list(dead.values()))

    def _admit(self) -> int:
        """Encode waiting documents and give them slots; returns how many tokens that took."""
        with self._lock:
            now = time.monotonic()
            admitted: list[Entry] = []
            if not self._hold():
                admitted = self._turns.pull(
                    self._waiting, self._runner.entries, self._pace, now, self._rows_allowed
                )
            for entry in admitted:
                entry.started = now
        if admitted:
            self._encode(admitted)
            self._update_running()
        encoded = Counter[str]()
        for entry in admitted:
            if entry.encoded:
                encoded[entry.request.share] += entry.tokens
        if self._time is not None:
            self._time.join(_by_share(self._runner.entries))
            self._time.encoded(encoded, time.monotonic() - now)
        return encoded.total()

    def _hold(self) -> bool:
        """Whether to wait for more rows to become free.

        Only where more documents wait than have room, so that somebody waits in any case, and not
        for long: long documents side by side may leave none free for a while.
        """
        free = self._rows_allowed - self._runner.rows
        few = 0 < free < min(self._runner.admit_share * self._rows_allowed, len(self._waiting))
        self._held = self._held + 1 if few and self._held < _MOST_HELD else 0
        return self._held > 0 and len(self._runner.entries) > 0

    def _encode(self, batch: list[Entry]) -> None:
        """Encode documents and give them slots. Those that cannot be encoded fail alone."""
        try:
            self._runner.admit(batch)
        except Exception as error:
            if out_of_memory(error) and len(batch) == 1 and self._runner.entries:
                self._put_back(batch, error)  # the others may hold the memory that it needs
            else:
                self._isolate(batch, error, self._encode)
            return
        now = time.monotonic()
        for entry in batch:
            entry.encoded = now

    def _step_failed(self, error: Exception, stepping: list[Entry]) -> list[Event]:
        """After a step without result: who fails of those that took it.

        Out of memory, the newest half of the batch is put back, as far as possible of those who
        have streamed nothing yet. Otherwise all of the step fail: nobody can tell whose fault it
        was.
        """
        entries = list(self._runner.entries)
        if out_of_memory(error) and len(entries) > 1:
            kept = sorted(entries, key=lambda one: (not one.streamed, one.started))
            self._put_back(kept[: (len(kept) - 1) // 2 : -1], error)
            return []
        logger.error(
            "a decode step of %d documents failed", len(stepping), exc_info=error,
            extra={"request_ids": [entry.origin for entry in stepping]},
        )  # fmt: skip
        self._leave(stepping)
        return [broken(entry, error) for entry in stepping]

    def _put_back(self, entries: list[Entry], error: Exception) -> None:
        """Return documents, newest first, to the front of the queue, to start again.

        Until a number of steps has gone well there are no more rows than stay now.
        """
        self._leave([entry for entry in entries if entry.encoded])
        self._rows_allowed, self._good_steps = max(self._runner.rows, 1), 0
        self._preempted += len(entries)
        logger.warning(
            "out of memory: %d documents wait again, rows: %d", len(entries), self._rows_allowed,
            exc_info=error, extra={"request_ids": [entry.origin for entry in entries]},
        )  # fmt: skip
        let_go(error)
        with self._lock:
            for entry in entries:
                entry.started = entry.encoded = 0.0
                entry.made = 0
                self._waiting.put_back(entry)
            self._sweep_at = 0  # they may be late or cancelled

    def _recover(self) -> None:
        """After a step that went well."""
        if self._rows_allowed >= self._runner.most_rows:
            return
        self._good_steps += 1
        if self._good_steps == _RECOVERY_STEPS:
            self._rows_allowed = min(self._rows_allowed * 2, self._runner.most_rows)
            self._good_steps = 0

    def _check(self) -> None:
        super()._check()
        entries, rows = self._runner.entries, self._runner.rows
        taken = sum(entry.rows for entry in entries)
        if not rows == taken == self._slots_used or any(entry.over for entry in entries):
            raise AssertionError(
                f"{rows} rows are taken, {self._slots_used} by account, {taken} by documents"
            )

    def _leave(self, entries: list[Entry]) -> None:
        if entries:
            self._runner.leave(entries)
            self._update_running()

    def _events(self, advances: list[Advance]) -> Iterator[Event]:
        eos_id = self._runner.shape.eos_id
        now = time.monotonic()
        for advance in advances:
            entry = advance.entry
            # Who was put back and has started again has already streamed the first of them.
            seen = entry.streamed - entry.made
            entry.made += advance.made
            if new := [token for token in advance.new[max(seen, 0) :] if token != eos_id]:
                entry.streamed += len(new)
                yield Tokens(entry.request.id, new)
            if advance.output is None:
                continue
            ids, reason = advance.output, FinishReason.MAX_NEW_TOKENS
            if ids and ids[-1] == eos_id:
                ids, reason = ids[:-1], FinishReason.STOP
            usage = replace(entry.usage(now), output_tokens=len(ids))
            yield Finished(entry.request.id, ids, reason, usage)

    def _account(self, events: list[Event], seconds: float) -> None:
        """Feed the drain rate: input tokens of finished requests over time at work."""
        self._undrained_s += seconds
        done = [event for event in events if isinstance(event, Finished)]
        if done:
            tokens = sum(event.usage.input_tokens for event in done)
            self._drained(tokens, self._undrained_s)
            self._undrained_s = 0.0
            with self._lock:
                self._tally.finished += len(done)

    def _update_running(self) -> None:
        with self._lock:
            self._running = list(self._runner.entries)
            self._slots_used = self._runner.rows


def _by_share(entries: Iterable[Entry]) -> Counter[str]:
    """Rows of each share."""
    rows = Counter[str]()
    for entry in entries:
        rows[entry.request.share] += entry.rows
    return rows


def make_runner(checkpoint: Checkpoint, plan: Plan) -> Runner:
    """Who holds the running batch on this device."""
    kernels = native.load() if plan.device == "cpu" else None
    if kernels is not None:
        from serve_app.engine.cpu.runner import CpuRunner

        return CpuRunner(checkpoint, plan, kernels)
    if plan.dtype == "int8":
        raise CheckpointError(
            "dtype 'int8' needs a CPU and its kernels: python -m serve_app.engine.native"
        )
    if plan.device == "cpu":
        logger.warning(
            "the CPU kernels are not built, so the engine runs several times slower: "
            "python -m serve_app.engine.native"
        )
    from serve_app.engine.gpu.runner import TorchRunner

    return TorchRunner(checkpoint, plan)
