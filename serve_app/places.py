"""Where a user's own files are."""

from __future__ import annotations

import os
from pathlib import Path


def own_path(variable: str, xdg: str, default: str, inside: str) -> Path:
    """The path that the environment's `variable` names, else `inside` of an XDG base folder.

    Args:
        variable: names the path itself; `~` is the home.
        xdg: variable of the base folder (XDG Base Directory specification), as `XDG_CONFIG_HOME`.
        default: the base folder where that is not set.
        inside: the path in it.
    """
    if named := os.environ.get(variable):
        return Path(named).expanduser().absolute()
    base = Path(os.environ.get(xdg, ""))
    # The specification: a relative path is invalid and must be ignored.
    if not base.is_absolute():
        base = Path(default).expanduser()
    return base / inside
