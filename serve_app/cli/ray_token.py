"""Ray's own token, which its dashboard asks for."""

from __future__ import annotations

import os
from pathlib import Path

from serve_app.cli.errors import CliError

_OWN = Path("~/.ray/auth_token")


def ray_token(file: Path | None) -> str | None:
    """The token of a file, of `RAY_AUTH_TOKEN`, or of this user; None: there is none.

    Raises:
        CliError: the file cannot be read.
    """
    if file is None:
        if token := os.environ.get("RAY_AUTH_TOKEN"):
            return token
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or _OWN).expanduser()
        if not file.exists():
            return None
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{file}: {getattr(error, 'strerror', None) or 'not text'}") from None
