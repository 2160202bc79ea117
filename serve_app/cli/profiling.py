"""Measure a replica's engine on this machine, for what simulates it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from serve_app.cli.errors import CliError, settings_message

if TYPE_CHECKING:
    from serve_app.tuning.profile import Profile


def profiled(
    model: str,
    revision: str | None,
    *,
    dtype: str,
    device: str,
    threads: int,
    rows: int,
    seconds: float,
) -> Profile:
    """The service model of a replica, measured for about so many seconds.

    Raises:
        CliError: there is no such model, or it cannot be profiled.
    """
    from pydantic import ValidationError

    from serve_app.config import EngineSettings, ModelSettings
    from serve_app.engine.build import build_engine
    from serve_app.engine.checkpoint import CheckpointError, resolve
    from serve_app.tuning.profile import ProfileError, profile

    try:
        settings = ModelSettings.model_validate(
            {"name": model, "revision": revision, "device": device, "dtype": dtype}
        )
        checkpoint = resolve(settings.name, settings.revision)
        longest = checkpoint.max_input_tokens
        # Nothing looked up: a step is then a token, as in the simulation.
        engine = EngineSettings(threads=threads, max_batch_size=rows, speculation=False)
        make = partial(build_engine, checkpoint, model=settings, engine=engine, cpus=threads)
        lengths = sorted({min(length, longest) for length in (32, 128, longest // 2, longest)})
        name = f"{model}, {dtype}, {threads} threads"
        return profile(lambda emit: make(emit), name, seconds, lengths, rows)
    except ValidationError as error:
        raise CliError(settings_message(error)) from None
    except (CheckpointError, ProfileError) as error:
        raise CliError(str(error)) from None
