"""What a simulation is told: how fast a replica is, how it is scaled, what it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ModelFileError(Exception):
    """A file cannot be used; the message says which and why, in one line."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Encode(_Strict):
    """Seconds to encode what is admitted between two steps: call + token · n + squared · n²."""

    call_s: float = Field(0.0, ge=0)
    token_s: float = Field(0.0001, ge=0, description="per input token")
    squared_token_s: float = Field(0.0, ge=0, description="per squared input tokens of a text")


class Decode(_Strict):
    """Seconds of a decode step of all rows: step + row · rows + source · their input tokens."""

    step_s: float = Field(0.00105, ge=0)
    row_s: float = Field(0.00023, ge=0)
    source_token_s: float = Field(0.0, ge=0)


class ServiceModel(_Strict):
    """One replica. The defaults are T5-small in int8 on two cores (docs/performance.md)."""

    name: str = "T5-small, int8, 2 cores"
    encode: Encode = Encode()
    decode: Decode = Decode()
    overhead_s: float = Field(0.005, ge=0, description="of a request, outside the engine")
    rows: int = Field(64, ge=1, le=1024, description="engine.max_batch_size")
    max_input_tokens: int = Field(512, ge=1, description="longer inputs are cut to it")
    max_batch_tokens: int = Field(4_096, ge=1)
    max_waiting_requests: int = Field(512, ge=1)


class Scaling(_Strict):
    """The chart's `summarizer.autoscaling_config`."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1, le=100_000)
    initial_replicas: int | None = Field(None, ge=0)
    target_ongoing_requests: float = Field(32, gt=0)
    upscale_delay_s: float = Field(30, ge=0)
    downscale_delay_s: float = Field(600, ge=0)
    downscale_to_zero_delay_s: float | None = Field(None, ge=0)
    upscaling_factor: float = Field(1, gt=0)
    downscaling_factor: float = Field(1, gt=0)
    look_back_period_s: float = Field(30, gt=0)
    aggregation_function: Literal["mean", "max", "min"] = "mean"
    signal: Literal["requests", "tokens"] = "requests"
    target_drain_s: float = Field(2, gt=0, description="work before a replica; signal: tokens")

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        begin = self.first_replicas
        if not self.min_replicas <= begin <= self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}), initial_replicas ({begin}) and max_replicas "
                f"({self.max_replicas}) must ascend"
            )
        return self

    @property
    def first_replicas(self) -> int:
        """Replicas in the beginning, as the chart has it."""
        return max(1, self.min_replicas) if self.initial_replicas is None else self.initial_replicas


class Platform(_Strict):
    """What replicas run on. Seconds."""

    max_ongoing_requests: int = Field(1_024, ge=1)
    max_queued_requests: int = Field(-1, ge=-1)
    deadline_s: float = Field(120, gt=0, description="limits.default_timeout_s")
    cold_start_s: float = Field(20, ge=0, description="from a node to a ready replica")
    node_s: float = Field(120, ge=0, description="until a new node is there, image and all")
    node_idle_s: float = Field(120, ge=0, description="that a node without a replica stays")
    min_nodes: int = Field(0, ge=0)
    failures_per_replica_hour: float = Field(0, ge=0)
    push_interval_s: float = Field(10, gt=0)
    control_period_s: float = Field(0.1, gt=0)


def load_model(path: Path) -> ServiceModel:
    """A service model file, YAML or JSON.

    Raises:
        ModelFileError: cannot be read, or breaks a rule.
    """
    try:
        return ServiceModel.model_validate(_read(path))
    except ValidationError as error:
        raise _broken(path, error) from None


def load_values(path: Path, platform: Platform) -> tuple[Scaling, Platform]:
    """Scaling of a values file of the chart, and `platform` with what the file says of it.

    Values that have nothing to do with scaling are passed over: they are the chart's to check.

    Raises:
        ModelFileError: cannot be read, or breaks a rule.
    """
    values = _section(path, _read(path), "")
    summarizer = _section(path, values.get("summarizer"), "summarizer")
    workers = _section(path, summarizer.get("workers"), "summarizer.workers")
    limits = _section(path, values.get("limits"), "limits")
    said = {
        "max_ongoing_requests": summarizer.get("max_ongoing_requests"),
        "max_queued_requests": summarizer.get("max_queued_requests"),
        "node_idle_s": workers.get("idleTimeoutSeconds"),
        "min_nodes": workers.get("minReplicas"),
        "deadline_s": limits.get("default_timeout_s"),
    }
    told = {name: value for name, value in said.items() if value is not None}
    scaling = _section(path, summarizer.get("autoscaling_config"), "autoscaling_config")
    try:
        return (
            Scaling.model_validate(scaling),
            Platform.model_validate({**platform.model_dump(), **told}),
        )
    except ValidationError as error:
        raise _broken(path, error) from None


def _section(path: Path, value: object, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: {name or 'the file'} must be a mapping")
    return value


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(f"{path}: not YAML: {' '.join(str(error).split())[:120]}") from None


def _broken(path: Path, error: ValidationError) -> ModelFileError:
    said = []
    for detail in error.errors(include_url=False):
        field = ".".join(map(str, detail["loc"])) or "settings"
        shown = "" if isinstance(detail["input"], dict) else f", is {detail['input']!r}"
        said.append(f"{field}: {detail['msg'].removeprefix('Value error, ')}{shown}")
    return ModelFileError(f"{path}: {'; '.join(said)}")
