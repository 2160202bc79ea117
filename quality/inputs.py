"""What the gate reads: the held-out texts, the floors, and the summaries that the runner wrote."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from quality import RUNS, SEARCHES, GateError

T = TypeVar("T")
Share = Annotated[float, Field(ge=0, le=1)]
Points = Annotated[float, Field(ge=0, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(_Strict):
    """A held-out text. Only those of `software` are held against floors."""

    id: str
    group: Literal["software", "prose"]
    kind: str
    text: str = Field(min_length=1)
    synopsis: str = Field(min_length=1)


class Parity(_Strict):
    """What engines must have in common with `generate()`: shares of texts, points of ROUGE-L."""

    float32_identical: Share
    served_identical: Share
    served_rougeL_loss: Points  # noqa: N815


class Bounds(_Strict):
    """Floors of ROUGE in points, ceilings of what is broken as shares of texts, for one search."""

    rouge1: Points
    rougeL: Points  # noqa: N815
    empty: Share
    looping: Share
    cut_off: Share


class ModelBounds(_Strict):
    """Bounds of one model. `weights` begins the SHA-256 of those they were measured with."""

    weights: str = Field(pattern=r"^[0-9a-f]{12,64}$")
    greedy: Bounds
    beams: Bounds
    parity: Parity | None = None


class Floors(_Strict):
    """`floors.toml`: parity for every model that has none of its own, and each model's bounds."""

    parity: Parity
    models: dict[str, ModelBounds]


@dataclass(frozen=True, slots=True)
class Summary:
    """One text's summary by one run. Without one, `error` says why."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    ended: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """What the runner wrote: about the model; dtypes by run; summaries by run, search and id."""

    model: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    summaries: dict[tuple[str, str, str], Summary] = field(default_factory=dict)

    def add(self, line: str) -> None:
        """Take one more line.

        Raises:
            GateError: it is none of the runner's.
        """
        try:
            row = json.loads(line)
            if "model" in row:
                self.model.update(row, model=str(row["model"]), weights=str(row["weights"]))
                return
            run = row["run"]
            if run not in RUNS:
                raise ValueError(f"run {run!r}")
            if "dtype" in row:
                self.dtypes[run] = row["dtype"]
                return
            search, id_ = row["search"], row["id"]
            if search not in SEARCHES:
                raise ValueError(f"search {search!r}")
            self.summaries[run, search, id_] = (
                Summary(error=str(row["error"]))
                if "error" in row
                else Summary(tuple(row["tokens"]), str(row["text"]), row["ended"] is True)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise GateError(f"not a line of the runner's ({error}): {line.strip()[:80]}") from None


def read_texts(path: Path) -> list[Text]:
    """Held-out texts, one JSON object a line."""
    texts = [
        _checked(TypeAdapter(Text), line, f"{path}, line {number}")
        for number, line in enumerate(_read(path).splitlines(), 1)
    ]
    if not any(text.group == "software" for text in texts):
        raise GateError(f"{path}: no text of group software")
    if len({text.id for text in texts}) < len(texts):
        raise GateError(f"{path}: two texts have one id")
    return texts


def read_floors(path: Path) -> Floors:
    """The file of floors; keys it does not know are errors."""
    try:
        return Floors.model_validate(tomllib.loads(_read(path)))
    except tomllib.TOMLDecodeError as error:
        raise GateError(f"{path}: {error}") from None
    except ValidationError as error:
        raise GateError(f"{path}: {_one_line(error)}") from None


def bounds_of(floors: Floors, name: str, path: Path) -> ModelBounds:
    """Bounds of the model `name`."""
    if name not in floors.models:
        known = ", ".join(floors.models)
        raise GateError(
            f'{path} has no floors for the model {name!r}: add [models."{name}"] '
            f"(--measure prints it), or name another's with --floors-of (there are: {known})"
        )
    return floors.models[name]


def read_rows(path: Path) -> Rows:
    """What a run of the gate has kept of its runner. A summary that is missing has failed."""
    rows = Rows()
    for line in _read(path).splitlines():
        rows.add(line)
    if not rows.model:
        raise GateError(f"{path}: no line about the model")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise GateError(f"{path}: {reason}") from None


def _checked(adapter: TypeAdapter[T], line: str, source: str) -> T:
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        raise GateError(f"{source}: {_one_line(error)}") from None


def _one_line(error: ValidationError) -> str:
    said = []
    for detail in error.errors(include_url=False):
        key = ".".join(map(str, detail["loc"])) or "the line"
        unknown = detail["type"] == "extra_forbidden"
        said.append(f"{key}: {'unknown key' if unknown else detail['msg']}")
    return "; ".join(said)
