"""Choosing the next tokens: greedy and beam search, as `transformers`' `generate()` chooses them.

Both work on all documents of a group at once, each at its own step and with its own settings. What
is computed, and in which order, follows `GenerationMixin._sample` and `_beam_search` of
transformers 5, so that in float32 the outputs are equal token for token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.engine.gpu.slots import UNLIKELY, Group, View
from serve_app.engine.protocol import TokenConstraints

_NEVER = float("-inf")


class Search:
    """Chooses as a model's constraints have it.

    Nothing in it waits for the device or brings anything to it, so a CUDA graph may capture it.

    Args:
        eos_id: the end token.
        constraints: of the model.
        device: of the logits.
    """

    def __init__(self, eos_id: int, constraints: TokenConstraints, device: torch.device) -> None:
        self.eos_id = eos_id
        self._forced_first, self._forced_last = constraints.forced_first, constraints.forced_last
        self._suppressed, self._begin_suppressed = (
            torch.tensor(sorted(ids), device=device) if ids else None
            for ids in (constraints.suppressed, constraints.begin_suppressed)
        )

    def choose(self, group: Group, view: View, logits: Tensor) -> Tensor:
        """The second half of a step, after `Group.begin` and the decoder.

        Args:
            group: the documents.
            view: that `begin` was given.
            logits: (slots * beams, vocabulary), float32; changed in place.

        Returns:
            int64, by slot: with one beam, (2, slots), the tokens and whether documents are done;
            with more (slots,), whether they are done. Of no meaning where there is no document.
        """
        if group.beams == 1:
            return torch.stack(self._greedy(group, view, logits))
        return self._beams(group, view, logits).long()

    def _greedy(self, group: Group, view: View, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Append each document's likeliest token."""
        count, state = view.slots, group.state
        self._process(group, view, logits)
        chosen = logits.argmax(-1)
        generated = state.steps[:count] + 1
        state.tokens[:count].scatter_(2, generated[:, None, None], chosen[:, None, None])
        group.end()
        done = (chosen == self.eos_id) | (generated >= state.most[:count])
        return chosen, done.long()

    def _beams(self, group: Group, view: View, logits: Tensor) -> Tensor:
        """Extend each document's beams."""
        count, beams, state = view.slots, group.beams, group.state
        vocabulary = logits.shape[-1]
        scores = torch.log_softmax(logits, -1)
        self._process(group, view, scores)
        totals = scores.view(count, beams, vocabulary) + state.scores[:count, :, None]
        # Twice as many as beams: even if every beam's best is the end token, enough go on.
        top, index = totals.flatten(1).topk(2 * beams)
        parent, chosen = index // vocabulary, index % vocabulary

        generated = state.steps[:count] + 1
        ends = (chosen == self.eos_id) | (generated >= state.most[:count])[:, None]
        candidates = _pick(state.tokens[:count], parent)
        here = generated[:, None, None].expand(-1, 2 * beams, 1)
        candidates.scatter_(2, here, chosen[:, :, None])

        running = top + ends * UNLIKELY
        order = running.topk(beams).indices
        state.tokens[:count] = _pick(candidates, order)
        state.scores[:count] = running.gather(1, order)
        state.ancestry[:count] = _pick(state.ancestry[:count], parent.gather(1, order))

        length = (generated.double() ** state.penalty[:count]).float()[:, None]
        done, early = state.best_done[:count], state.early[:count]
        improvable = state.improvable[:count]
        first = torch.arange(2 * beams, device=logits.device) < beams
        finished = ends & first
        ranked = top / length
        ranked += (done.all(1) & early)[:, None] * UNLIKELY
        ranked += (~improvable)[:, None] * UNLIKELY
        ranked += ~finished * UNLIKELY
        merged = torch.cat([state.best_scores[:count], ranked], 1)
        best, pick = merged.topk(beams)
        state.best_tokens[:count] = _pick(
            torch.cat([state.best_tokens[:count], candidates], 1), pick
        )
        steps = torch.cat([state.best_steps[:count], generated[:, None].expand(-1, 2 * beams)], 1)
        state.best_steps[:count] = steps.gather(1, pick)
        state.best_scores[:count] = best
        state.best_done[:count] = done = torch.cat([done, finished], 1).gather(1, pick)

        possible = state.scores[:count, :1] / length
        worst = best.min(1, keepdim=True).values.expand_as(done).masked_fill(~done, UNLIKELY)
        state.improvable[:count] = improvable = improvable & (possible > worst).any(1)
        group.end()
        return ~improvable | (done.all(1) & early) | ends.all(1)

    def _process(self, group: Group, view: View, scores: Tensor) -> None:
        """Apply settings and constraints to `scores` (rows, vocabulary), in place, in the order in
        which transformers does it."""
        count, beams, state = view.slots, group.beams, group.state
        steps = _by_row(state.steps[:count], beams)
        rules = group.rules
        if rules.penalty:
            _penalize(group, view, scores)
        for size in rules.ngrams:
            asks = _by_row(state.ngram[:count] == size, beams)
            _ban_repeats(group, view, scores, size, asks)
        short = steps < _by_row(state.least[:count], beams)
        scores[:, self.eos_id].masked_fill_(short, _NEVER)
        if self._forced_first is not None:
            _force(scores, steps == 0, self._forced_first)
        if self._forced_last is not None:
            last = steps == _by_row(state.most[:count], beams) - 1
            _force(scores, last, self._forced_last)
        if self._suppressed is not None:
            scores.index_fill_(1, self._suppressed, _NEVER)
        if self._begin_suppressed is not None:
            begins = steps == (0 if self._forced_first is None else 1)
            some = scores.index_select(1, self._begin_suppressed)
            some.masked_fill_(begins[:, None], _NEVER)
            scores.index_copy_(1, self._begin_suppressed, some)


def _force(scores: Tensor, where: Tensor, token: int) -> None:
    scores.masked_fill_(where[:, None], _NEVER)
    scores[:, token].masked_fill_(where, 0.0)


def _penalize(group: Group, view: View, scores: Tensor) -> None:
    """Repetition penalty (Keskar et al. 2019) on every token that a row has, once."""
    count, beams, state = view.slots, group.beams, group.state
    longest = view.depth
    tokens = state.tokens[:count, :, :longest].flatten(0, 1)
    position = torch.arange(longest, device=scores.device)
    behind = position > _by_row(state.steps[:count], beams)[:, None]
    tokens = torch.where(behind, tokens[:, :1], tokens)  # the start token again: once is once
    penalty = _by_row(state.repetition[:count], beams)[:, None]
    had = scores.gather(1, tokens)
    scores.scatter_(1, tokens, torch.where(had < 0, had * penalty, had / penalty))


def _ban_repeats(group: Group, view: View, scores: Tensor, size: int, asks: Tensor) -> None:
    """Ban tokens that would repeat a run of `size` tokens, in rows where `asks` is true."""
    count, beams, state = view.slots, group.beams, group.state
    length = _by_row(state.steps[:count], beams) + 1  # start token included
    longest = view.depth
    if longest < size:
        return
    tokens = state.tokens[:count, :, :longest].flatten(0, 1)
    runs = tokens.unfold(1, size, 1)  # (rows, windows, size)
    window = torch.arange(runs.shape[1], device=scores.device)
    repeats = (window + size <= length[:, None]) & asks[:, None]
    if size > 1:
        tail = length[:, None] - (size - 1) + torch.arange(size - 1, device=scores.device)
        recent = tokens.gather(1, tail.clamp(min=0))
        repeats &= (runs[:, :, :-1] == recent[:, None]).all(-1)
    penalty = torch.zeros(repeats.shape, device=scores.device).masked_fill_(repeats, _NEVER)
    scores.scatter_add_(1, runs[:, :, -1], penalty)


def _by_row(values: Tensor, beams: int) -> Tensor:
    """Each document's value for each of its beams."""
    return values if beams == 1 else values.repeat_interleave(beams)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """(documents, any, length) rows by (documents, wanted) index."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))
