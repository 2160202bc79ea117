"""Settings of the service: one tree, unknown keys refused, the same in every entry point.

`t5-serve run --config FILE`, `serve run serve_app.app:build model=…` and the `args:` of a Serve
config all end in `ServiceSettings`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

# Replicas have another working directory than whoever wrote the path.
_OwnPath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Settings):
    """Which checkpoint, and how it is loaded."""

    name: str = Field("demo", description="`demo`, a folder, or a hub repository")
    revision: str | None = Field(None, description="branch, tag or commit of a hub repository")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="auto: bfloat16 where the device multiplies it, but float32 on a CPU for "
        "models below 25 million parameters; int8: weights and activations in bytes, on a CPU "
        "(float16 overflows in T5)",
    )
    max_input_tokens: int | None = Field(
        None, ge=16, le=8192, description="encoder input length; default: the model's own"
    )


class EngineSettings(_Settings):
    """The engine inside each replica of the Summarizer."""

    kind: Literal["continuous", "transformers"] = Field(
        "continuous",
        description="continuous: our own; transformers: `generate()`, the reference",
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0: the replica's num_cpus")
    max_batch_size: int = Field(
        0,
        ge=0,
        le=1024,
        description="rows of the batch; each beam of a document takes one. 0: 64 on a CPU, on a "
        "GPU what fits, up to 256; `transformers`: 32 requests",
    )
    max_batch_tokens: int = Field(4_096, ge=64, description="padded encoder tokens encoded at once")
    speculation: bool = Field(
        True, description="advance greedy requests by looking up copied spans, where it pays"
    )
    max_waiting_requests: int = Field(512, ge=1, description="queue bound, in documents or parts")
    max_waiting_tokens: int = Field(262_144, ge=512, description="queue bound, in encoder tokens")
    stall_s: float = Field(60, gt=0, description="busy this long without a step: unhealthy")


class ReplicaSettings(_Settings):
    """Replicas of the Summarizer and how Ray Serve scales and spreads them."""

    min: int = Field(1, ge=0)
    max: int = Field(1, ge=1)
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)
    target_ongoing_requests: float = Field(32, gt=0)
    max_ongoing_requests: int = Field(1024, ge=1)
    upscale_delay_s: float = Field(30, ge=0)
    downscale_delay_s: float = Field(600, ge=0)
    downscale_to_zero_delay_s: float | None = Field(None, ge=0, description="of the last replica")
    initial: int | None = Field(None, ge=0, description="replicas to begin with; default: min or 1")
    upscaling_factor: float = Field(1, gt=0)
    downscaling_factor: float = Field(1, gt=0)
    look_back_period_s: float = Field(30, gt=0)
    aggregation_function: Literal["mean", "max", "min"] = "mean"
    signal: Literal["requests", "tokens"] = Field(
        "requests", description="tokens: scale by work in front of replicas (docs/tuning.md)"
    )
    target_drain_s: float = Field(
        2, gt=0, description="signal tokens: seconds of work that a replica may have before it"
    )
    max_queued_requests: int = Field(-1, ge=-1, description="of each Api replica; -1: no bound")
    graceful_shutdown_timeout_s: float = Field(60, ge=0)
    health_check_period_s: float = Field(10, gt=0)
    health_check_timeout_s: float = Field(30, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaSettings:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        if not self.min <= self.first <= self.max:
            raise ValueError(f"initial ({self.first}) must be from {self.min} to {self.max}")
        return self

    @property
    def first(self) -> int:
        """Replicas to begin with."""
        return max(self.min, 1) if self.initial is None else self.initial


class ApiSettings(_Settings):
    """Replicas of the HTTP ingress."""

    replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0, ge=0, description="0: it shares what the Summarizer leaves")
    max_ongoing_requests: int = Field(1024, ge=1)
    ready_step_age_s: float = Field(30, gt=0, description="/readyz: a step this recent is proof")
    parts_in_flight: int = Field(
        64, ge=1, description="parts of one request that may be in the engine's queue at once"
    )


class Limits(_Settings):
    """What a request may ask for. Beyond it: an error naming the field, the limit, the value."""

    body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    input_tokens: int = Field(200_000, ge=16, description="per text")
    max_new_tokens: int = Field(512, ge=1, description="per summary")
    num_beams: int = Field(8, ge=1)
    batch_texts: int = Field(64, ge=1)
    timeout_s: float = Field(300, gt=0, description="longest deadline a client may ask for")
    default_timeout_s: float = Field(120, gt=0)
    reduce_rounds: int = Field(6, ge=1, description="most levels of summaries of summaries")
    max_retry_after_s: int = Field(120, ge=1)
    full_status: Literal[429, 503] = Field(503, description="status when the queue is full")


class RateLimit(_Settings):
    """What one client may use."""

    tokens_per_minute: int = Field(
        100_000, ge=0, description="input and output; 0: as many as it likes"
    )
    burst_tokens: int = Field(200_000, ge=1, description="at once, after a time without requests")
    concurrent_requests: int = Field(0, ge=0, description="at once; 0: as many as it likes")


class RateTier(RateLimit):
    """Other limits for the clients whose whole name matches."""

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    match: Annotated[str, AfterValidator(_pattern)] = Field(description="a regular expression")
    tokens_per_minute: int = Field(ge=0)
    burst_tokens: int = Field(ge=1)


class RateLimitSettings(RateLimit):
    """Limits of each client. A replica takes changes to them without a restart."""

    enabled: bool = False
    tiers: list[RateTier] = Field([], description="the first that matches counts")


class AuthSettings(_Settings):
    """Who may call.

    token: `Authorization: Bearer`, checked here. trusted-header: something in front has checked
    and names the client in a header; only safe where nothing else can reach the port.
    """

    mode: Literal["token", "trusted-header", "off"] = "token"
    tokens_file: _OwnPath | None = Field(None, description="default: the user's own tokens file")
    header: str = Field("X-Api-Client", pattern=r"^[A-Za-z0-9-]+$")


class LogSettings(_Settings):
    """Logs: JSON lines, never the text of a document."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class UsageSettings(_Settings):
    """Usage events: a JSON line per request in files of their own, for `t5-serve usage`."""

    enabled: bool = Field(True, description="false: the line goes to the log, as INFO")
    folder: _OwnPath | None = Field(None, description="default: the user's own state folder")
    max_bytes: int = Field(16 * 1024 * 1024, ge=65_536, description="a file, then the next begins")
    keep: int = Field(16, ge=2, description="files in the folder at most; the oldest go")
    queue_size: int = Field(8_192, ge=1, description="events that may wait to be written")


class TracingSettings(_Settings):
    """Traces by OpenTelemetry: spans of requests, sent to a collector. Without one: none."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/]+(/.*)?$",
        description="a collector's OTLP over HTTP, as http://collector:4318; /v1/traces is added",
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="of requests whose traceparent does not decide"
    )
    queue_size: int = Field(4_096, ge=1, description="spans that may wait to be sent")


def _short(key: str) -> BeforeValidator:
    """Let a plain string stand for a section's main key: `serve run` can only pass strings."""

    def widen(value: Any) -> Any:
        return {key: value} if isinstance(value, str) else value

    return BeforeValidator(widen)


def _replica_range(value: Any) -> Any:
    """`N` or `MIN:MAX`, as `t5-serve run --replicas` takes them."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)(?::(\d+))?", value)
    if match is None:
        raise ValueError("must be N or MIN:MAX")
    low, high = match.group(1), match.group(2) or match.group(1)
    return {"min": int(low), "max": int(high)}


class ServiceSettings(_Settings):
    """Everything `serve_app.app:build` takes."""

    model: Annotated[ModelSettings, _short("name")] = ModelSettings()
    engine: Annotated[EngineSettings, _short("kind")] = EngineSettings()
    replicas: Annotated[ReplicaSettings, BeforeValidator(_replica_range)] = ReplicaSettings()
    api: ApiSettings = ApiSettings()
    limits: Limits = Limits()
    rate_limits: RateLimitSettings = RateLimitSettings()
    auth: Annotated[AuthSettings, _short("mode")] = AuthSettings()
    log: Annotated[LogSettings, _short("level")] = LogSettings()
    usage: UsageSettings = UsageSettings()
    tracing: Annotated[TracingSettings, _short("endpoint")] = TracingSettings()
