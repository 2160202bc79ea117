"""What search keeps of documents, apart from the attention's caches."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class State:
    """Decoding state of slots, each a row of bytes of which the tensors here are views.

    So one copy fills or moves a slot: with a copy for each tensor, a document that leaves would
    cost a GPU more launches than a tenth of a decode step.

    The first dimension of all tensors is the slot: `tokens` (beams, 1 + steps), the start token
    first; `steps`, the tokens generated so far; the request's `least` and `most` new tokens, n-gram
    size `ngram`, length `penalty`, `repetition` penalty and `early` stopping; `sources`, the length
    of its input. For beam search `scores` (beams,), `ancestry` (beams, steps), and of the finished
    hypotheses `best_tokens`, `best_scores`, `best_done`, `best_steps`; `improvable` says whether
    running beams may still beat them. Counts, tokens and `ancestry` are int64, `penalty` float64,
    the other numbers float32, the rest bool. All begin as zeros.
    """

    penalty: Tensor
    steps: Tensor
    least: Tensor
    most: Tensor
    ngram: Tensor
    sources: Tensor
    tokens: Tensor
    ancestry: Tensor
    best_tokens: Tensor
    best_steps: Tensor
    scores: Tensor
    best_scores: Tensor
    repetition: Tensor
    early: Tensor
    improvable: Tensor
    best_done: Tensor

    def __init__(
        self, slots: int, beams: int, steps: int, device: torch.device, *, pinned: bool = False
    ) -> None:
        alone, each, several = (), (beams,), (beams, 1 + steps)
        # The widest first: a view must begin at a multiple of its numbers' size.
        fields: list[tuple[torch.dtype, dict[str, tuple[int, ...]]]] = [
            (torch.float64, {"penalty": alone}),
            (torch.int64, {
                "steps": alone, "least": alone, "most": alone, "ngram": alone, "sources": alone,
                "tokens": several, "ancestry": (beams, steps), "best_tokens": several,
                "best_steps": each,
            }),
            (torch.float32, {"scores": each, "best_scores": each, "repetition": alone}),
            (torch.bool, {"early": alone, "improvable": alone, "best_done": each}),
        ]  # fmt: skip
        width = sum(t.itemsize * prod(shape) for t, named in fields for shape in named.values())
        self.rows = torch.zeros(
            slots, -(-width // 8) * 8, dtype=torch.uint8, device=device, pin_memory=pinned
        )
        self._names: list[str] = []
        start = 0
        for dtype, named in fields:
            for name, shape in named.items():
                end = start + dtype.itemsize * prod(shape)
                setattr(self, name, self.rows[:, start:end].view(dtype).view(slots, *shape))
                self._names.append(name)
                start = end

    def take_over(self, other: State) -> None:
        """Copy what a smaller one holds."""
        for name in self._names:
            old = getattr(other, name)
            getattr(self, name)[tuple(slice(0, extent) for extent in old.shape)] = old
