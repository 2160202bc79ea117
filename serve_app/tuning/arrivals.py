"""When requests come: seeded arrival processes, the same for `bench` and for simulation.

Every process is a renewal process of unit rate, seen through a clock that runs with the load: its
n-th request comes when the expected number of requests reaches the sum of the first n gaps (time
change of a point process; Daley and Vere-Jones, "An Introduction to the Theory of Point
Processes", section 7.4). Gaps say how regular arrivals are, the profile how the rate changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["constant", "poisson", "bursty", "diurnal", "flash-crowd"]
KINDS: tuple[Kind, ...] = ("constant", "poisson", "bursty", "diurnal", "flash-crowd")

Floats = NDArray[np.float64]

_BLOCK = 1 << 18  # arrivals made at once
_GRID = 4_096  # steps of a profile; the rate is linear within each
# Of a flash crowd, in shares of the duration: the rise begins, ends; the fall begins, ends.
FLASH = (0.4, 0.42, 0.6, 0.7)


@dataclass(frozen=True)
class Load:
    """An arrival process.

    Attributes:
        kind: `constant` (even gaps), `poisson`, `bursty` (gamma-distributed gaps), `diurnal` (a
            Poisson process whose rate is a cosine that begins at its lowest) or `flash-crowd`
            (Poisson; the rate rises to `peak` times itself, stays and falls: `FLASH`).
        rate: requests per second: the mean, for `flash-crowd` that before and after the crowd.
        duration_s: seconds.
        burstiness: squared coefficient of variation of the gaps of `bursty`; 1 is Poisson.
        peak: highest over mean rate of `diurnal` (at most 2), over usual rate of `flash-crowd`.
        period_s: of `diurnal`, seconds; None: the duration.

    Raises:
        ValueError: a field is out of its bounds; names field, bound and value.
    """

    kind: Kind
    rate: float
    duration_s: float
    burstiness: float = 4.0
    peak: float = 2.0
    period_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "duration_s", "burstiness"):
            value = getattr(self, name)
            if not (0 < value < float("inf")):
                raise ValueError(f"{name}: must be above 0, is {value}")
        if self.period_s is not None and self.period_s <= 0:
            raise ValueError(f"period_s: must be above 0, is {self.period_s}")
        if self.kind not in KINDS:
            raise ValueError(f"kind: must be one of {', '.join(KINDS)}, is {self.kind!r}")
        most = 2.0 if self.kind == "diurnal" else 1_000.0
        if not 1 <= self.peak <= most:
            raise ValueError(f"peak: must be from 1 to {most:g}, is {self.peak:g}")

    def rate_at(self, seconds: Floats) -> Floats:
        """Expected requests per second at each moment."""
        if self.kind == "diurnal":
            turns = seconds / (self.period_s or self.duration_s)
            return self.rate * (1 - (self.peak - 1) * np.cos(2 * np.pi * turns))
        if self.kind == "flash-crowd":
            crowd = np.interp(seconds / self.duration_s, FLASH, [0, 1, 1, 0], left=0, right=0)
            return self.rate * (1 + (self.peak - 1) * crowd)
        return np.full_like(seconds, self.rate)

    def expected(self) -> float:
        """Expected number of requests."""
        return float(self._clock()[1][-1])

    def _clock(self) -> tuple[Floats, Floats]:
        """Moments, and how many requests are expected until each."""
        grid = np.linspace(0, self.duration_s, _GRID + 1)
        if self.kind == "flash-crowd":
            grid = np.union1d(grid, np.array(FLASH) * self.duration_s)
        elif self.kind != "diurnal":
            grid = grid[[0, -1]]
        rates = self.rate_at(grid)
        steps = np.diff(grid) * (rates[1:] + rates[:-1]) / 2
        return grid, np.concatenate([[0.0], np.cumsum(steps)])


def arrivals(load: Load, rng: np.random.Generator) -> Floats:
    """All arrivals, seconds from the beginning, in order."""
    return np.concatenate([*blocks(load, rng), np.empty(0)])


def blocks(load: Load, rng: np.random.Generator) -> Iterator[Floats]:
    """The arrivals in pieces, for loads of more requests than one wants in memory."""
    moments, expected = load._clock()
    reached = 0.0
    while reached < expected[-1]:
        sums = reached + np.cumsum(_gaps(load, rng))
        reached = float(sums[-1])
        # A sum of gaps may miss its own end by an error of floating point.
        within = sums[sums <= expected[-1] * (1 + 1e-12)]
        if within.size:
            yield np.interp(within, expected, moments)


def _gaps(load: Load, rng: np.random.Generator) -> Floats:
    """Gaps of mean 1."""
    count = min(_BLOCK, int(load.expected() * 1.1) + 64)
    if load.kind == "constant":
        return np.ones(count)
    if load.kind == "bursty":
        return rng.gamma(1 / load.burstiness, load.burstiness, count)
    return rng.exponential(1.0, count)
