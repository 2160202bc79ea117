"""How large requests are: distributions written in one word, as `lognormal:180:0.6`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Name, and what its numbers are.
_FORMS = {
    "constant": ("N",),
    "uniform": ("LOW", "HIGH"),
    "exponential": ("MEAN",),
    "lognormal": ("MEDIAN", "SIGMA"),
}
FORMS = ", ".join(":".join((name, *numbers)) for name, numbers in _FORMS.items())
_MOST = 1_000_000


@dataclass(frozen=True)
class Sizes:
    """A distribution of whole numbers from 1 to a million; what falls outside is cut to that."""

    name: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sizes:
        """Read `NAME:NUMBER…`; a number alone is `constant`.

        Raises:
            ValueError: not one of `FORMS`, or a number out of its bounds.
        """
        name, *rest = text.split(":")
        if not rest:
            name, rest = "constant", [name]
        wanted = _FORMS.get(name)
        try:
            numbers = tuple(float(one) for one in rest)
        except ValueError:
            wanted = None
        if wanted is None or len(rest) != len(wanted):
            raise ValueError(f"must be one of {FORMS}, is {text!r}")
        if not all(0 < one <= _MOST for one in numbers):
            raise ValueError(f"numbers must be above 0 and at most {_MOST:,}, is {text!r}")
        if name == "uniform" and numbers[0] > numbers[1]:
            raise ValueError(f"LOW is above HIGH in {text!r}")
        return cls(name, numbers)

    def sample(self, rng: np.random.Generator, count: int) -> Ints:
        """So many of them."""
        first, *more = self.numbers
        if self.name == "constant":
            values = np.full(count, first)
        elif self.name == "uniform":
            values = rng.uniform(first - 0.5, more[0] + 0.5, count)
        elif self.name == "exponential":
            values = rng.exponential(first, count)
        else:
            values = rng.lognormal(np.log(first), more[0], count)
        sizes: Ints = np.clip(np.rint(values), 1, _MOST).astype(np.int64)
        return sizes

    def __str__(self) -> str:
        return ":".join((self.name, *(f"{one:g}" for one in self.numbers)))


@dataclass(frozen=True)
class Mix:
    """Beam widths and how often each comes, as `1:0.8,4:0.2`."""

    beams: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Read `BEAMS:SHARE,…`; a number alone is all of them. Shares are brought to a sum of 1.

        Raises:
            ValueError: ill-formed.
        """
        parts = [part.partition(":") for part in text.split(",")]
        try:
            beams = tuple(int(width) for width, _, _ in parts)
            shares = tuple(float(share) if colon else 1.0 for _, colon, share in parts)
        except ValueError:
            raise ValueError(f"must be BEAMS or BEAMS:SHARE,…, is {text!r}") from None
        if min(beams) < 1 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
            raise ValueError(f"needs beams of 1 and more, shares of 0 and more, is {text!r}")
        return cls(beams, tuple(share / sum(shares) for share in shares))

    def sample(self, rng: np.random.Generator, count: int) -> Ints:
        """So many beam widths."""
        drawn: Ints = rng.choice(np.array(self.beams), count, p=np.array(self.shares))
        return drawn
