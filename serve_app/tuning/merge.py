"""Ray's merge of what handles and replicas reported, compiled.

A simulated day has ten thousand reports of few points each, where Ray's arrays would spend nearly
all of the time on calls. What is computed is `ray.serve._private.autoscaling_metrics_merge`, each
sum in its order, so that it is equal to the last bit; the tests hold it against that.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from serve_app.tuning.arrivals import Floats
from serve_app.tuning.sizes import Ints

# Places in the array of figures.
BEGIN, LAST, VALUE, LOW, HIGH = range(5)


@njit(cache=True)  # type: ignore[untyped-decorator]
def laid(times: Floats, values: NDArray[np.float64], columns: Ints) -> tuple[Floats, Floats, Ints]:
    """Series as `merge_and_aggregate_arrays` takes them: times, values, where each begins.

    Args:
        times: of the points, ascending.
        values: (point, series); NaN: that series does not have the point.
        columns: the series that are wanted, in the order that is wanted.
    """
    size = len(times) * len(columns)
    ts, val = np.empty(size), np.empty(size)
    offsets = np.zeros(len(columns) + 1, dtype=np.int64)
    count = 0
    for place in range(len(columns)):
        column = columns[place]
        for point in range(len(times)):
            value = values[point, column]
            if not math.isnan(value):
                ts[count], val[count] = times[point], value
                count += 1
        offsets[place + 1] = count
    return ts[:count], val[:count], offsets


@njit(cache=True)  # type: ignore[untyped-decorator]
def steps(ts: Floats, val: Floats, offsets: Ints) -> tuple[Floats, Floats, Floats]:
    """The total of series as a step function, over the window that Ray aggregates.

    That begins when the last of the series does and ends, here, a second after the last change.

    Returns:
        Totals, for how many seconds each holds, and figures: when the window begins, when the total
        changed last and to what, least and greatest total. All empty where nothing was reported.
    """
    moments, totals = np.empty(len(ts)), np.empty(len(ts))
    count = active = lone = 0
    aligned = -math.inf
    for series in range(len(offsets) - 1):
        if offsets[series + 1] > offsets[series]:
            active, lone = active + 1, series
            aligned = max(aligned, ts[offsets[series]])
    if active == 1:  # as it is: neither rounded nor without what repeats
        for point in range(offsets[lone], offsets[lone + 1]):
            moments[count], totals[count] = ts[point], val[point]
            count += 1
    else:
        for series in range(len(offsets) - 1):
            place, before = 0, 0.0
            for point in range(offsets[series], offsets[series + 1]):
                delta = val[point] - before
                before = val[point]
                if delta == 0:
                    continue
                at = math.floor(ts[point] * 100.0 + 0.5) / 100.0
                while place < count and moments[place] < at:
                    place += 1
                if place == count or moments[place] != at:
                    for later in range(count, place, -1):
                        moments[later], totals[later] = moments[later - 1], totals[later - 1]
                    moments[place], totals[place] = at, 0.0
                    count += 1
                totals[place] += delta
        for place in range(1, count):
            totals[place] += totals[place - 1]
    if count == 0:
        return np.empty(0), np.empty(0), np.empty(0)
    first, last = moments[0], moments[count - 1]
    begin = max(aligned, first) if active > 1 and aligned <= last else first
    low, high = math.inf, -math.inf
    before = 0  # the last change at or before the window's beginning
    for place in range(count):
        if moments[place] <= begin:
            before = place
        if moments[place] >= begin:
            low, high = min(low, totals[place]), max(high, totals[place])
    held, seconds = np.empty(count - before), np.empty(count - before)
    since = begin
    for place in range(before, count):
        # Of changes at the same moment the last one holds.
        same = place
        while same + 1 < count and moments[same + 1] == moments[place]:
            same += 1
        # Ray is asked a second later, and takes the difference from the time of the last change.
        until = moments[place + 1] if place + 1 < count else last + ((last + 1) - last)
        held[place - before] = totals[same]
        seconds[place - before] = until - since
        since = until
    figures = np.empty(5)
    figures[BEGIN], figures[LAST], figures[VALUE] = begin, last, totals[count - 1]
    figures[LOW], figures[HIGH] = low, high
    return held, seconds, figures
