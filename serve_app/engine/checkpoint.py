"""Find a T5 checkpoint and read what it says of itself, without loading its weights."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from serve_app.engine.protocol import GenerationSettings, TokenConstraints

DEMO_NAME = "demo"
DEMO_PATH = Path(__file__).resolve().parent.parent / "demo_model"
SUPPORTED_MODEL_TYPES = ("t5", "mt5")

# Everything a T5 needs and nothing that can run code: no pickles (*.bin, *.pt), no *.py.
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model"]


class CheckpointError(Exception):
    """The checkpoint cannot be used; the message says which one and why, in one line."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk in the Hugging Face layout.

    `name` is what the user asked for, `revision` pins its contents: the hub's commit hash, or
    the first 12 hex digits of the SHA-256 over the weights for a folder.
    """

    name: str
    revision: str
    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        return _read_json(self.path / "config.json")

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return _read_json(path) if path.exists() else {}

    @property
    def _task(self) -> dict[str, Any]:
        params = self.config.get("task_specific_params") or {}
        return params.get("summarization") or {}

    @property
    def prefix(self) -> str:
        """Text put before every document; T5's is `"summarize: "`."""
        return str(self._task.get("prefix", "summarize: "))

    @property
    def max_input_tokens(self) -> int:
        """Encoder input length the model was trained for, end token included."""
        return int(self.config.get("n_positions") or 512)

    @cached_property
    def parameters(self) -> int:
        """Number of weights, from the files' headers."""
        count = 0
        for path in self.path.glob("*.safetensors"):
            with safe_open(path, framework="np") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        return count

    @property
    def defaults(self) -> GenerationSettings:
        """The model's own summarization settings.

        `task_specific_params.summarization` wins over `generation_config.json`, as it did in
        `transformers`' summarization pipeline (removed in v5). `min_length` and `max_length`
        count the decoder's start token, `*_new_tokens` do not: hence the minus one.
        """
        said = {**self._generation_config, **self._task}
        max_new = said.get("max_new_tokens") or (int(said.get("max_length", 129)) - 1)
        min_new = said.get("min_new_tokens") or max(int(said.get("min_length", 0)) - 1, 0)
        return GenerationSettings(
            num_beams=int(said.get("num_beams") or 1),
            min_new_tokens=min(int(min_new), int(max_new)),
            max_new_tokens=int(max_new),
            length_penalty=float(said.get("length_penalty", 1.0)),
            no_repeat_ngram_size=int(said.get("no_repeat_ngram_size") or 0),
            early_stopping=said.get("early_stopping") is True,
            repetition_penalty=float(said.get("repetition_penalty") or 1.0),
        )

    @property
    def constraints(self) -> TokenConstraints:
        """Tokens that the model's configuration suppresses or forces."""
        said = {**self._generation_config, **self._task}
        return TokenConstraints(
            suppressed=tuple(said.get("suppress_tokens") or ()),
            begin_suppressed=tuple(said.get("begin_suppress_tokens") or ()),
            forced_first=said.get("forced_bos_token_id"),
            forced_last=said.get("forced_eos_token_id"),
        )

    @property
    def eos_id(self) -> int:
        """Id of `</s>`."""
        return int(self.config.get("eos_token_id", 1))


def resolve(name: str, revision: str | None = None) -> Checkpoint:
    """Turn a model name into a checkpoint on disk, downloading from the hub if it is not a folder.

    Args:
        name: `"demo"` (bundled), a folder, or a hub repository such as `google-t5/t5-small`.
        revision: branch, tag or commit of a hub repository.

    Raises:
        CheckpointError: not found, not a T5, without safetensors weights, or with weights that are
            not those of their `FILE.sha256`.
    """
    folder = DEMO_PATH if name == DEMO_NAME else Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"model {name!r} is a folder and has no revision {revision!r}")
        weights = sorted(folder.glob("*.safetensors"))
        checkpoint = Checkpoint(name, _digest(name, weights), folder) if weights else None
    else:
        path = _download(name, revision)
        weights = sorted(path.glob("*.safetensors"))
        checkpoint = Checkpoint(name, path.name, path) if weights else None
    if checkpoint is None:
        raise CheckpointError(f"model {name!r} has no *.safetensors weights (pickles are not read)")
    model_type = checkpoint.config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        raise CheckpointError(f"model {name!r} is of type {model_type!r}, not one of: {known}")
    for path in weights:
        _check_header(name, path)
    return checkpoint


def _download(name: str, revision: str | None) -> Path:
    # Imported late: the hub client is slow to import and most starts do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if name.startswith((".", "/", "~")):
        raise CheckpointError(f"model {name!r}: no such folder")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS))
    except HFValidationError:
        raise CheckpointError(f"model {name!r}: neither a folder nor a hub repository") from None
    except Exception as error:  # the hub client raises a wide family; all mean "not had"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"model {name!r} could not be fetched: {reason}") from error


def _digest(name: str, weights: list[Path]) -> str:
    """Of all weights. Each file is held against the checksum beside it, where there is one."""
    every = hashlib.sha256()
    for path in weights:
        own = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                every.update(block)
                own.update(block)
        expected = _checksum(path.with_name(path.name + ".sha256"))
        if expected not in (None, own.hexdigest()):
            raise CheckpointError(
                f"model {name!r}: {path.name} is damaged or not the one it was: its SHA-256 is "
                f"{own.hexdigest()}, {path.name}.sha256 has {expected}"
            )
    return every.hexdigest()[:12]


def _checksum(path: Path) -> str | None:
    """The digest in a file as `sha256sum` writes it; None where there is no file."""
    try:
        return (path.read_text(encoding="utf-8").split() or [""])[0]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_header(name: str, path: Path) -> None:
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"model {name!r}: {path.name} is no safetensors file: {error}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
