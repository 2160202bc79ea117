"""What fits on a card."""

from __future__ import annotations

from serve_app.engine.checkpoint import CheckpointError
from serve_app.engine.runner import Plan
from serve_app.engine.weights import Shape

MOST_ROWS = 256  # more would make single steps slow for who waits for them
_SPARE = 0.9  # of the free memory: allocators leave gaps, and graphs take some
LIBRARIES = 256 << 20  # workspaces of matrix products, and kernels, which are loaded on first use


def row_bytes(shape: Shape, plan: Plan, value_bytes: int) -> int:
    """Memory of one row of the batch: its caches, and its logits, raw and in search's three forms,
    once where a step is launched before it is captured and once where it is captured.

    A document with beams takes a row for each and its source's keys and values only once, so this
    is the most that a row can take.
    """
    inner = shape.heads * shape.head_width
    caches = shape.decoder_layers * 2 * inner * (plan.steps + 1 + plan.source) * value_bytes
    return caches + 2 * (value_bytes + 3 * 4) * shape.vocabulary


def encoder_bytes(shape: Shape, plan: Plan, value_bytes: int) -> int:
    """Memory that encoding takes at most: `encode_tokens` of documents of the longest kind."""
    inner = shape.heads * shape.head_width
    scores = 4 * shape.heads * plan.source  # the bias, products, their sum and the weights
    between = 2 * shape.width + 4 * inner + shape.decoder_layers * 2 * inner
    return plan.encode_tokens * (scores + between + 8 * shape.width) * value_bytes


def plan_rows(shape: Shape, plan: Plan, free_bytes: int, value_bytes: int = 2) -> int:
    """How many rows the batch may have.

    Args:
        shape: the model's.
        plan: `rows` is what is asked for, 0 what fits up to `MOST_ROWS`.
        free_bytes: on the card, weights loaded.
        value_bytes: of the caches.

    Raises:
        CheckpointError: it does not fit; the message says what would.
    """
    left = free_bytes * _SPARE - LIBRARIES - encoder_bytes(shape, plan, value_bytes)
    fit = max(int(left // row_bytes(shape, plan, value_bytes)), 0)
    wanted = plan.rows or 1
    if fit < wanted:
        raise CheckpointError(
            f"max_batch_size {wanted} needs more memory than the device has free "
            f"({free_bytes / 2**30:.1f} GiB): {fit} rows fit with inputs of {plan.source} tokens, "
            f"{plan.steps} new tokens and max_batch_tokens {plan.encode_tokens}"
        )
    return plan.rows or min(fit, MOST_ROWS)
