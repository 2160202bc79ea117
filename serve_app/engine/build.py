"""Choose device, dtype and engine for a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from serve_app.engine import native
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import Emit, Engine

if TYPE_CHECKING:
    from serve_app.engine.reference import ReferenceEngine


_SMALL_PARAMETERS = 25_000_000


class ModelOptions(Protocol):
    """How to load the model; see `serve_app.config.ModelSettings`."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...


class EngineOptions(Protocol):
    """Which engine and its bounds; see `serve_app.config.EngineSettings`."""

    @property
    def kind(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def max_batch_size(self) -> int: ...
    @property
    def max_batch_tokens(self) -> int: ...
    @property
    def speculation(self) -> bool: ...
    @property
    def max_waiting_requests(self) -> int: ...
    @property
    def max_waiting_tokens(self) -> int: ...


def build_engine(
    checkpoint: Checkpoint, emit: Emit, *, model: ModelOptions, engine: EngineOptions, cpus: int
) -> Engine:
    """Load `checkpoint` into the engine that `engine.kind` names and start it."""
    device = model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = model.dtype if model.dtype != "auto" else _dtype(checkpoint, device)
    kind: type[ContinuousEngine] | type[ReferenceEngine]
    if engine.kind == "transformers":
        # Imported on demand: it takes longer than all the rest of a replica's start.
        from serve_app.engine.reference import ReferenceEngine

        kind = ReferenceEngine
    else:
        kind = ContinuousEngine
    return kind(
        checkpoint,
        emit,
        device=device,
        dtype=dtype,
        threads=engine.threads or cpus,
        max_batch_size=engine.max_batch_size,
        max_batch_tokens=engine.max_batch_tokens,
        max_waiting_requests=engine.max_waiting_requests,
        max_waiting_tokens=engine.max_waiting_tokens,
        speculation=engine.speculation,
    )


def _dtype(checkpoint: Checkpoint, device: str) -> str:
    """bfloat16 where the device multiplies it.

    A model of a few million parameters gains little on a CPU (its step is spent elsewhere) and may
    as well be exact.
    """
    if device != "cpu":
        return "bfloat16"
    small = checkpoint.parameters < _SMALL_PARAMETERS
    return "float32" if small or not native.bfloat16() else "bfloat16"
