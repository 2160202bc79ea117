"""What schemathesis must know beside the OpenAPI document, which cannot compare two fields."""

from __future__ import annotations

from typing import Any

import schemathesis

_MOST = (("max_new_tokens", 0), ("max_length", 1))  # the latter counts the decoder's start token


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    """Whether the least of tokens asked for is surely no more than the most.

    The most is the model's own where it is not said, so a least alone may be too much.
    """
    asked = case.body
    if isinstance(asked, dict) and isinstance(asked.get("parameters"), dict):
        asked = asked["parameters"].get("generate_parameters")
    if not isinstance(asked, dict):
        return True
    least = [asked[name] for name in ("min_new_tokens", "min_length") if _number(asked.get(name))]
    most = [asked[name] - over for name, over in _MOST if _number(asked.get(name))]
    return not least or (bool(most) and max(least) <= min(most))


def _number(value: object) -> bool:
    return isinstance(value, int | float)
