"""Replicas and their queues on virtual time, compiled: what happens between two looks from outside.

A replica's engine works in steps (`engine/continuous.py`): between two of them those who are done
leave and waiting requests are encoded and get rows. As long as nobody comes or leaves, all steps
are alike, so they are taken at once: a request costs a few events, not one per token.

Routing is Ray Serve's power of two choices: of two replicas the one with fewer requests, if it may
have another. If both are full, any that is not; if none, the handle's queue, first come first
served. A replica that gets room takes from there at once, where Ray Serve would try again within a
second.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

OFF, RUNNING, DRAINING = 0, 1, 2
# Places in `Cluster.scalars`.
FREE, HANDLE_HEAD, HANDLE_TAIL, HANDLE_WAITING, SERVING, SEED = range(6)
# Columns of `Cluster.counts`, which has a row per time bucket.
ARRIVED, SUCCEEDED, MET, REJECTED, LATE = range(5)
# Columns of `Cluster.tally`: the fields of `engine.work.Tally`, in their order.
ENCODED, ENCODE_S, STEPS, STEP_S, ROWS, SQUARES, PRODUCTS, DOCUMENTS, MADE, FINISHED = range(10)
BINS = 2_304  # of latency histograms: 1 % wide each, from 0.1 ms on
_LOW, _WIDTH = 1e-4, math.log(1.01)
_INF = math.inf

# Nothing here allocates, so references to arrays need no counting; with it, counting takes two
# thirds of the time. The option is private to numba, which is pinned.
compiled = njit(cache=True, _nrt=False)
inlined = njit(cache=True, _nrt=False, forceinline=True)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Rules(NamedTuple):
    """The service model and limits; seconds, tokens, rows. As in `model.ServiceModel`."""

    call_s: float
    token_s: float
    squared_token_s: float
    step_s: float
    row_s: float
    source_token_s: float
    overhead_s: float
    rows: int
    batch_tokens: int
    engine_queue: int
    max_ongoing: int
    handle_queue: int  # -1: no bound
    deadline_s: float
    objective_s: float
    bucket_s: float


class Cluster(NamedTuple):
    """Arrays over replicas; `came` to `next` over a pool of requests, the last over buckets."""

    state: Ints
    ongoing: Ints
    rows: Ints
    live: Ints
    source: Ints
    step: Ints  # steps done when the present run of them began
    planned: Ints  # steps of that run
    since: Floats
    step_s: Floats
    encoding: Ints  # input tokens that were encoded before it
    encode_s: Floats
    tallied: Ints  # steps of it that `tally` has
    tally: Floats  # (replica, column): what it did since it began
    head: Ints
    tail: Ints
    waiting: Ints
    stopped: Floats
    due: Floats  # padded to a power of two
    tree: Ints  # winners of a tournament over `due`
    serving: Ints  # the running replicas, `scalars[SERVING]` of them
    finish: Ints  # (replica, document): the step it ends with
    document: Ints  # (replica, document): its request
    came: Floats
    tokens: Ints
    out: Ints
    beams: Ints
    next: Ints
    scalars: Ints
    counts: Ints
    latencies: Ints
    sums: Floats  # latency, wait before the first step; of successful requests


def cluster(replicas: int, rows: int, buckets: int, pool: int, seed: int) -> Cluster:
    """An empty one, of so many replicas at most."""
    padded = 1 << max(replicas - 1, 1).bit_length()

    def ints(*shape: int, value: int = 0) -> Ints:
        return np.full(shape, value, dtype=np.int64)

    tree = np.concatenate([ints(padded), np.arange(padded)])
    for node in range(padded - 1, 0, -1):
        tree[node] = tree[2 * node]
    following = np.arange(1, pool + 1)
    following[-1] = -1
    scalars = ints(6)
    scalars[[HANDLE_HEAD, HANDLE_TAIL]] = -1
    scalars[SEED] = seed * 2 + 1
    return Cluster(
        state=ints(replicas),
        ongoing=ints(replicas),
        rows=ints(replicas),
        live=ints(replicas),
        source=ints(replicas),
        step=ints(replicas),
        planned=ints(replicas),
        since=np.zeros(replicas),
        step_s=np.zeros(replicas),
        encoding=ints(replicas),
        encode_s=np.zeros(replicas),
        tallied=ints(replicas),
        tally=np.zeros((replicas, 10)),
        head=ints(replicas, value=-1),
        tail=ints(replicas, value=-1),
        waiting=ints(replicas),
        stopped=np.zeros(replicas),
        due=np.full(padded, _INF),
        tree=tree,
        serving=ints(replicas),
        finish=ints(replicas, rows),
        document=ints(replicas, rows),
        came=np.zeros(pool),
        tokens=ints(pool),
        out=ints(pool),
        beams=ints(pool),
        next=following,
        scalars=scalars,
        counts=ints(buckets, 5),
        latencies=ints(buckets, BINS),
        sums=np.zeros(2),
    )


def grown(c: Cluster) -> Cluster:
    """The same with twice the pool, whose free requests are the new ones. All must be in use."""
    size = len(c.came)
    free = np.arange(size + 1, 2 * size + 1)
    free[-1] = -1
    c.scalars[FREE] = size
    wider = {name: np.resize(getattr(c, name), 2 * size) for name in ("tokens", "out", "beams")}
    following = np.concatenate([c.next, free])
    return c._replace(came=np.resize(c.came, 2 * size), next=following, **wider)


@inlined
def _set_due(c: Cluster, replica: int, due: float) -> None:
    c.due[replica] = due
    node = (len(c.due) + replica) >> 1
    while node:
        left, right = c.tree[2 * node], c.tree[2 * node + 1]
        c.tree[node] = left if c.due[left] <= c.due[right] else right
        node >>= 1


@inlined
def _draw(c: Cluster, below: int) -> int:
    # Knuth's MMIX generator; its upper bits.
    c.scalars[SEED] = c.scalars[SEED] * 6364136223846793005 + 1442695040888963407
    drawn: int = ((c.scalars[SEED] >> 33) & 0x3FFFFFFF) % below
    return drawn


@inlined
def _bucket(c: Cluster, p: Rules, request: int) -> int:
    return min(int(c.came[request] / p.bucket_s), len(c.counts) - 1)


@inlined
def _release(c: Cluster, request: int) -> None:
    c.next[request] = c.scalars[FREE]
    c.scalars[FREE] = request


@inlined
def _fail(c: Cluster, p: Rules, request: int, kind: int) -> None:
    c.counts[_bucket(c, p, request), kind] += 1
    _release(c, request)


@inlined
def _finish(c: Cluster, p: Rules, request: int, now: float) -> None:
    latency = now - c.came[request] + p.overhead_s
    if latency > p.deadline_s:
        _fail(c, p, request, LATE)
        return
    bucket = _bucket(c, p, request)
    c.counts[bucket, SUCCEEDED] += 1
    if latency <= p.objective_s:
        c.counts[bucket, MET] += 1
    place = int(math.log(max(latency, _LOW) / _LOW) / _WIDTH)
    c.latencies[bucket, min(place, BINS - 1)] += 1
    c.sums[0] += latency
    _release(c, request)


@inlined
def _admit(c: Cluster, p: Rules, r: int, now: float) -> None:
    """Encode what waits and fits, then run until somebody is done."""
    count = longest = total = squares = 0
    short = False  # of the encoder's budget, so that the next step may take more
    while c.head[r] >= 0:
        request = c.head[r]
        late = now - c.came[request] + p.overhead_s > p.deadline_s
        tokens = c.tokens[request]
        if not late:
            if c.rows[r] > 0 and c.rows[r] + c.beams[request] > p.rows:
                break
            if count and max(longest, tokens) * (count + 1) > p.batch_tokens:
                short = True
                break
        c.head[r] = c.next[request]
        if c.head[r] < 0:
            c.tail[r] = -1
        c.waiting[r] -= 1
        if late:
            c.ongoing[r] -= 1
            _fail(c, p, request, LATE)
            continue
        place = c.live[r]
        c.finish[r, place] = c.step[r] + max(c.out[request], 1)
        c.document[r, place] = request
        c.live[r] += 1
        c.rows[r] += c.beams[request]
        c.source[r] += tokens
        c.sums[1] += now - c.came[request]
        count += 1
        longest = max(longest, tokens)
        total += tokens
        squares += tokens * tokens
    if c.live[r] == 0:
        _set_due(c, r, _INF)
        if c.state[r] == DRAINING:
            c.state[r] = OFF
            c.stopped[r] = now
        return
    steps = c.finish[r, 0]
    for place in range(1, c.live[r]):
        steps = min(steps, c.finish[r, place])
    encode = p.token_s * total + p.squared_token_s * squares
    if count:
        encode += p.call_s
    c.encoding[r], c.encode_s[r], c.tallied[r] = total, encode, 0
    c.since[r] = now + encode
    c.step_s[r] = p.step_s + p.row_s * c.rows[r] + p.source_token_s * c.source[r]
    c.planned[r] = 1 if short else steps - c.step[r]
    _set_due(c, r, c.since[r] + c.planned[r] * c.step_s[r])


@inlined
def tally(c: Cluster, r: int, steps: int) -> None:
    """Count what the replica has done, so many steps of the present run of them among it."""
    fresh = steps - c.tallied[r]
    if fresh <= 0:
        return
    row = c.tally[r]
    if c.tallied[r] == 0:  # as an engine does: once the unit of work is done
        row[ENCODED] += c.encoding[r]
        row[ENCODE_S] += c.encode_s[r]
    rows, seconds = c.rows[r], fresh * c.step_s[r]
    row[STEPS] += fresh
    row[STEP_S] += seconds
    row[ROWS] += fresh * rows
    row[SQUARES] += fresh * rows * rows
    row[PRODUCTS] += rows * seconds
    row[DOCUMENTS] += fresh * c.live[r]
    row[MADE] += fresh * c.live[r]
    c.tallied[r] = steps


@inlined
def _push(c: Cluster, p: Rules, r: int, request: int) -> bool:
    """Put a request into a replica's queue. False: that is full, and the request has failed."""
    if c.waiting[r] >= p.engine_queue:
        _fail(c, p, request, REJECTED)
        return False
    c.next[request] = -1
    if c.tail[r] >= 0:
        c.next[c.tail[r]] = request
    else:
        c.head[r] = request
    c.tail[r] = request
    c.waiting[r] += 1
    c.ongoing[r] += 1
    return True


@inlined
def _wake(c: Cluster, p: Rules, r: int, now: float) -> None:
    """Somebody came: an idle replica begins, a busy one looks after its present step."""
    if c.live[r] == 0:
        _admit(c, p, r, now)
    elif c.planned[r] > 1 and c.rows[r] + c.beams[c.head[r]] <= p.rows and c.step_s[r] > 0:
        steps = max(1, math.ceil((now - c.since[r]) / c.step_s[r]))
        if steps < c.planned[r]:
            c.planned[r] = steps
            _set_due(c, r, c.since[r] + steps * c.step_s[r])


@inlined
def _pull(c: Cluster, p: Rules, r: int) -> None:
    """Take from the handle's queue what the replica may have."""
    while c.scalars[HANDLE_WAITING] > 0 and c.state[r] == RUNNING and c.ongoing[r] < p.max_ongoing:
        request = c.scalars[HANDLE_HEAD]
        c.scalars[HANDLE_HEAD] = c.next[request]
        if c.next[request] < 0:
            c.scalars[HANDLE_TAIL] = -1
        c.scalars[HANDLE_WAITING] -= 1
        _push(c, p, r, request)


@inlined
def _choose(c: Cluster, p: Rules) -> int:
    count: int = c.scalars[SERVING]
    if count == 0:
        return -1
    first: int = c.serving[_draw(c, count)]
    if count > 1:
        second = c.serving[_draw(c, count - 1)]
        if second == first:
            second = c.serving[count - 1]
        if c.ongoing[second] < c.ongoing[first]:
            first = second
    if c.ongoing[first] < p.max_ongoing:
        return first
    begin = _draw(c, count)
    for turn in range(count):
        other: int = c.serving[(begin + turn) % count]
        if c.ongoing[other] < p.max_ongoing:
            return other
    return -1


@inlined
def _route(c: Cluster, p: Rules, request: int, now: float, bounded: bool) -> None:
    # Who waits already goes first.
    r = _choose(c, p) if c.scalars[HANDLE_WAITING] == 0 else -1
    if r >= 0:
        if _push(c, p, r, request):
            _wake(c, p, r, now)
        return
    if bounded and 0 <= p.handle_queue <= c.scalars[HANDLE_WAITING]:
        _fail(c, p, request, REJECTED)
        return
    c.next[request] = -1
    if c.scalars[HANDLE_TAIL] >= 0:
        c.next[c.scalars[HANDLE_TAIL]] = request
    else:
        c.scalars[HANDLE_HEAD] = request
    c.scalars[HANDLE_TAIL] = request
    c.scalars[HANDLE_WAITING] += 1


@inlined
def _boundary(c: Cluster, p: Rules, r: int, now: float) -> None:
    """A run of steps has ended: who is done leaves, who waits comes in."""
    tally(c, r, c.planned[r])
    c.step[r] += c.planned[r]
    place = 0
    while place < c.live[r]:
        if c.finish[r, place] > c.step[r]:
            place += 1
            continue
        request = c.document[r, place]
        c.live[r] -= 1
        c.rows[r] -= c.beams[request]
        c.source[r] -= c.tokens[request]
        c.ongoing[r] -= 1
        c.tally[r, FINISHED] += 1
        c.finish[r, place] = c.finish[r, c.live[r]]
        c.document[r, place] = c.document[r, c.live[r]]
        _finish(c, p, request, now)
    _pull(c, p, r)
    _admit(c, p, r, now)


@compiled
def advance(
    c: Cluster,
    p: Rules,
    came: Floats,
    tokens: Ints,
    out: Ints,
    beams: Ints,
    index: int,
    until: float,
) -> int:
    """Let all happen that is due by `until`, arrivals from `index` on among it.

    Gives the next arrival's index; negative, one less than its negation, when the pool is used up.
    """
    while True:
        replica = c.tree[1]
        due = c.due[replica]
        arrival = came[index] if index < len(came) else _INF
        if min(due, arrival) > until:
            return index
        if due <= arrival:
            if due == _INF:
                return index
            _boundary(c, p, replica, due)
            continue
        request = c.scalars[FREE]
        if request < 0:
            return -index - 1
        c.scalars[FREE] = c.next[request]
        c.came[request] = arrival
        c.tokens[request] = tokens[index]
        c.out[request] = out[index]
        c.beams[request] = beams[index]
        c.counts[_bucket(c, p, request), ARRIVED] += 1
        _route(c, p, request, arrival, True)
        index += 1


@compiled
def start(c: Cluster, p: Rules, r: int, now: float) -> None:
    """A replica is ready."""
    c.state[r] = RUNNING
    c.serving[c.scalars[SERVING]] = r
    c.scalars[SERVING] += 1
    c.step[r] = 0
    c.tally[r] = 0.0
    _pull(c, p, r)
    _admit(c, p, r, now)


@compiled
def stop(c: Cluster, r: int, now: float) -> None:
    """A replica gets no more requests and is off once it has finished those it has."""
    _unlist(c, r)
    c.state[r] = DRAINING if c.ongoing[r] else OFF
    c.stopped[r] = now


@inlined
def _unlist(c: Cluster, r: int) -> None:
    last = c.scalars[SERVING] - 1
    for place in range(last + 1):
        if c.serving[place] == r:
            c.serving[place] = c.serving[last]
            c.scalars[SERVING] = last
            return


@compiled
def kill(c: Cluster, p: Rules, r: int, now: float) -> None:
    """A replica dies; its requests begin anew elsewhere."""
    _unlist(c, r)
    c.state[r] = OFF
    c.stopped[r] = now
    waiting, live = c.head[r], c.live[r]
    c.head[r] = c.tail[r] = -1
    c.waiting[r] = c.live[r] = c.rows[r] = c.source[r] = c.ongoing[r] = 0
    _set_due(c, r, _INF)
    for place in range(live):
        _route(c, p, c.document[r, place], now, False)
    while waiting >= 0:
        following = c.next[waiting]
        _route(c, p, waiting, now, False)
        waiting = following


def latency_of(place: float) -> float:
    """Seconds in the middle of a histogram's bin."""
    return _LOW * math.exp((place + 0.5) * _WIDTH)
