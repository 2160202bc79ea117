"""Who is calling: bearer tokens checked here, or a client name a trusted ingress has set."""

from __future__ import annotations

import re
from collections.abc import Callable

from starlette.requests import Request

from serve_app.config import AuthSettings
from serve_app.errors import UnauthorizedError
from serve_app.tokens import TokenStore, default_tokens_file

_CLIENT = re.compile(r"[-._A-Za-z0-9]{1,64}")
_ANONYMOUS = "anonymous"

Authenticate = Callable[[Request], str]


def authenticator(settings: AuthSettings) -> Authenticate:
    """A function from a request to the name of its client.

    It raises `UnauthorizedError` with a `WWW-Authenticate` challenge (RFC 6750, section 3).
    """
    if settings.mode == "off":
        return lambda _request: _ANONYMOUS
    if settings.mode == "trusted-header":
        return lambda request: _trusted(request, settings.header)
    store = TokenStore(settings.tokens_file or default_tokens_file())
    return lambda request: _bearer(request, store)


def _trusted(request: Request, header: str) -> str:
    # Two copies would mean that the ingress did not replace the client's own.
    names = request.headers.getlist(header)
    if len(names) != 1 or _CLIENT.fullmatch(names[0]) is None:
        raise UnauthorizedError(
            f"{header}: the ingress must set it once, to a client name",
            WWW_Authenticate='Bearer realm="t5-serve"',
        )
    return names[0]


def _bearer(request: Request, store: TokenStore) -> str:
    given = request.headers.getlist("authorization")
    if not given:
        raise UnauthorizedError(
            "Authorization: a bearer token is required",
            WWW_Authenticate='Bearer realm="t5-serve"',
        )
    scheme, _, token = given[0].partition(" ")
    client = store.verify(token.strip()) if len(given) == 1 and scheme.lower() == "bearer" else None
    if client is None:
        raise UnauthorizedError(
            "Authorization: the token is not known, has expired or was revoked",
            WWW_Authenticate='Bearer realm="t5-serve", error="invalid_token"',
        )
    return client
