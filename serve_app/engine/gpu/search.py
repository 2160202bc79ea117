"""Choosing the next tokens: greedy and beam search, as `transformers`' `generate()` chooses them.

Both work on all documents of a group at once, each at its own step and with its own settings. What
is computed, and in which order, follows `GenerationMixin._sample` and `_beam_search` of
transformers 5, so that in float32 the outputs are equal token for token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.engine.gpu.slots import UNLIKELY, Group
from serve_app.engine.protocol import TokenConstraints

_NEVER = float("-inf")


def greedy_step(
    group: Group, logits: Tensor, eos_id: int, constraints: TokenConstraints
) -> tuple[Tensor, Tensor]:
    """Append each document's likeliest token.

    Args:
        group: one beam per document; `Group.begin` has been called for this step.
        logits: (documents, vocabulary), float32; changed in place.
        eos_id: the end token.
        constraints: of the model.

    Returns:
        The tokens, (documents,), and whether each document is done with it.
    """
    count, state = len(group), group.state
    _process(group, logits, eos_id, constraints)
    chosen = logits.argmax(-1)
    generated = state.steps[:count] + 1
    state.tokens[:count].scatter_(2, generated[:, None, None], chosen[:, None, None])
    group.end()
    return chosen, (chosen == eos_id) | (generated >= state.most[:count])


def beam_step(group: Group, logits: Tensor, eos_id: int, constraints: TokenConstraints) -> Tensor:
    """Extend each document's beams.

    Args:
        group: two or more beams per document; `Group.begin` has been called for this step.
        logits: (documents * beams, vocabulary), float32.
        eos_id: the end token.
        constraints: of the model.

    Returns:
        Whether each document is done, (documents,).
    """
    count, beams, state = len(group), group.beams, group.state
    vocabulary = logits.shape[-1]
    scores = torch.log_softmax(logits, -1)
    _process(group, scores, eos_id, constraints)
    totals = scores.view(count, beams, vocabulary) + state.scores[:count, :, None]
    # Twice as many as beams: even if every beam's best is the end token, enough go on.
    top, index = totals.flatten(1).topk(2 * beams)
    parent, chosen = index // vocabulary, index % vocabulary

    generated = state.steps[:count] + 1
    ends = (chosen == eos_id) | (generated >= state.most[:count])[:, None]
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
    state.best_tokens[:count] = _pick(torch.cat([state.best_tokens[:count], candidates], 1), pick)
    steps = torch.cat([state.best_steps[:count], generated[:, None].expand(-1, 2 * beams)], 1)
    state.best_steps[:count] = steps.gather(1, pick)
    state.best_scores[:count] = best
    state.best_done[:count] = done = torch.cat([done, finished], 1).gather(1, pick)

    possible = state.scores[:count, :1] / length
    worst = torch.where(done, best.min(1, keepdim=True).values, UNLIKELY)
    state.improvable[:count] = improvable = improvable & (possible > worst).any(1)
    group.end()
    return ~improvable | (done.all(1) & early) | ends.all(1)


def _process(group: Group, scores: Tensor, eos_id: int, constraints: TokenConstraints) -> None:
    """Apply settings and constraints to `scores` (rows, vocabulary), in place, in the order in
    which transformers does it."""
    count, beams, state = len(group), group.beams, group.state
    steps = state.steps[:count].repeat_interleave(beams)
    settings = [entry.request.settings for entry in group.entries]
    if any(one.repetition_penalty != 1.0 for one in settings):
        _penalize(group, scores)
    for size in {one.no_repeat_ngram_size for one in settings} - {0}:
        asks = (state.ngram[:count] == size).repeat_interleave(beams)
        _ban_repeats(group, scores, size, asks)
    short = steps < state.least[:count].repeat_interleave(beams)
    scores[:, eos_id].masked_fill_(short, _NEVER)
    if constraints.forced_first is not None:
        _force(scores, steps == 0, constraints.forced_first)
    if constraints.forced_last is not None:
        last = steps == state.most[:count].repeat_interleave(beams) - 1
        _force(scores, last, constraints.forced_last)
    if constraints.suppressed:
        scores[:, list(constraints.suppressed)] = _NEVER
    if constraints.begin_suppressed:
        begins = steps == (0 if constraints.forced_first is None else 1)
        ids = list(constraints.begin_suppressed)
        scores[:, ids] = torch.where(begins[:, None], _NEVER, scores[:, ids])


def _force(scores: Tensor, where: Tensor, token: int) -> None:
    scores.masked_fill_(where[:, None], _NEVER)
    scores[:, token].masked_fill_(where, 0.0)


def _penalize(group: Group, scores: Tensor) -> None:
    """Repetition penalty (Keskar et al. 2019) on every token that a row has, once."""
    count, beams, state = len(group), group.beams, group.state
    longest = group.longest + 1
    tokens = state.tokens[:count, :, :longest].flatten(0, 1)
    position = torch.arange(longest, device=scores.device)
    behind = position > state.steps[:count].repeat_interleave(beams)[:, None]
    tokens = torch.where(behind, tokens[:, :1], tokens)  # the start token again: once is once
    penalty = state.repetition[:count].repeat_interleave(beams)[:, None]
    had = scores.gather(1, tokens)
    scores.scatter_(1, tokens, torch.where(had < 0, had * penalty, had / penalty))


def _ban_repeats(group: Group, scores: Tensor, size: int, asks: Tensor) -> None:
    """Ban tokens that would repeat a run of `size` tokens, in rows where `asks` is true."""
    count, beams, state = len(group), group.beams, group.state
    length = (state.steps[:count] + 1).repeat_interleave(beams)  # start token included
    longest = group.longest + 1
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


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """(documents, any, length) rows by (documents, wanted) index."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))
