"""Scaling by tokens, simulated: what replicas report, what is decided by it, and by whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ray.serve._private.metrics_utils import TimeStampedValue
from ray.serve.config import AutoscalingConfig

from serve_app.cli.errors import CliError
from serve_app.cli.live import agree
from serve_app.engine.work import Meter, Tally
from serve_app.scaling import PATH, SERIES, TokenPolicy
from serve_app.tuning import kernel, meter
from serve_app.tuning.arrivals import Load
from serve_app.tuning.loads import drawn
from serve_app.tuning.model import Decode, Encode, Platform, Scaling, ServiceModel
from serve_app.tuning.ray_policy import Policy
from serve_app.tuning.reports import Reports
from serve_app.tuning.simulate import Block, Simulation, _rules
from serve_app.tuning.sizes import Mix, Sizes

FOREVER = 1e9
MODEL = ServiceModel(
    encode=Encode(call_s=0.001, token_s=5e-5, squared_token_s=1e-8),
    decode=Decode(step_s=0.001, row_s=0.0002, source_token_s=1e-7),
    rows=16,
    max_batch_tokens=1_000,
    max_waiting_requests=10**6,
)


# No decoding to speak of, one request at a time: work is in proportion to input tokens.
SERVER = ServiceModel(
    encode=Encode(token_s=1e-5),
    decode=Decode(step_s=0, row_s=0),
    overhead_s=0,
    max_input_tokens=10**6,
    rows=1,
    max_batch_tokens=1,
    max_waiting_requests=10**6,
)


# What replicas report


class Engine:
    """One engine, a unit of work after the other, counted by the engine's own `Tally`.

    Args:
        load: requests: when they come, input tokens, steps, beams.
    """

    def __init__(self, load: Block) -> None:
        self.coming = list(zip(*(column.tolist() for column in load), strict=True))
        self.waiting: list[Any] = []
        self.running: list[list[Any]] = []  # request, steps made
        self.encoding: list[Any] = []
        self.now = self.encoded_at = self.ends = 0.0
        self.tally, self.meter = Tally(), Meter(MODEL.rows)

    def until(self, moment: float) -> None:
        """Do what has ended by then; a unit that has not is begun."""
        while True:
            if self.ends <= self.now and not self._begin(moment):
                return
            if self.ends > moment:
                self._come(moment)
                return
            self._end()

    def _come(self, moment: float) -> None:
        while self.coming and self.coming[0][0] <= moment:
            self.waiting.append(self.coming.pop(0))

    def _begin(self, moment: float) -> bool:
        self._come(self.now)
        if not self.waiting and not self.running:
            if not self.coming or self.coming[0][0] > moment:
                return False
            self.now = self.coming[0][0]
            self._come(self.now)
        pulled: list[Any] = []
        rows = sum(one[3] for one, _ in self.running)
        while self.waiting:
            rows += self.waiting[0][3]
            longest = max([self.waiting[0][1], *(one[1] for one in pulled)])
            if rows > MODEL.rows and rows != self.waiting[0][3]:
                break
            if pulled and longest * (len(pulled) + 1) > MODEL.max_batch_tokens:
                break
            pulled.append(self.waiting.pop(0))
        encode, decode = MODEL.encode, MODEL.decode
        seconds = sum(
            encode.token_s * one[1] + encode.squared_token_s * one[1] ** 2 for one in pulled
        )
        self.encoding = pulled
        self.encoded_at = self.now + seconds + (encode.call_s if pulled else 0.0)
        self.running += [[one, 0] for one in pulled]
        step = decode.step_s + decode.row_s * sum(one[3] for one, _ in self.running)
        step += decode.source_token_s * sum(one[1] for one, _ in self.running)
        self.ends = self.encoded_at + step
        return True

    def _end(self) -> None:
        count = len(self.running)
        rows = sum(one[3] for one, _ in self.running)
        self.tally.encoded(sum(one[1] for one in self.encoding), self.encoded_at - self.now)
        self.tally.stepped(rows, count, count, self.ends - self.encoded_at)
        self.encoding, self.now = [], self.ends
        for entry in self.running:
            entry[1] += 1
        self.running = [entry for entry in self.running if entry[1] < entry[0][2]]
        self.tally.finished += count - len(self.running)

    def work(self, moment: float) -> tuple[float, float, float, float] | None:
        """As `ThreadedEngine.work` asks its meter."""
        self.meter.read(self.tally)
        mean = self.meter.steps
        waiting = [float(sum(one[1] for one in self.waiting)), 0.0]
        running = [
            float(sum(one[1] for one in self.encoding)) if moment < self.encoded_at else 0.0,
            0.0,
        ]
        for one in self.waiting:
            waiting[1] += one[3] * max(one[2] if mean is None else mean, 1.0)
        for one, made in self.running:
            running[1] += one[3] * max((one[2] if mean is None else mean) - made, 1.0)
        said = self.meter.work((waiting[0], waiting[1]), (running[0], running[1]))
        return (
            None if said is None else (said.waiting_s, said.running_s, said.done_s, said.finished)
        )


@pytest.mark.parametrize("seed", range(4))
def test_a_replica_reports_what_an_engine_would_measure(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 600
    at = np.cumsum(rng.exponential(rng.choice([0.008, 0.02, 0.1]), count))
    load: Block = (
        at,
        rng.integers(1, 300, count),
        rng.integers(1, 40, count),
        rng.choice([1, 1, 4], count),
    )
    rules = _rules(MODEL, Platform(deadline_s=FOREVER, max_ongoing_requests=10**6), 2.0, FOREVER)
    cluster, meters = kernel.cluster(2, MODEL.rows, 1, 4_096, 1), meter.meters(2)
    kernel.start(cluster, rules, 0, 0.0)
    engine = Engine(load)
    index, known = 0, 0
    for moment in np.sort(rng.uniform(0, at[-1] * 1.1, 40)):
        index = kernel.advance(cluster, rules, *load, index, moment)
        said = np.empty((1, 4))
        meter.report(cluster, meters, MODEL.rows, np.array([0]), moment, said)
        engine.until(moment)
        expected = engine.work(moment)
        if expected is None:
            assert np.isnan(said).all()
            continue
        assert said[0] == pytest.approx(expected, rel=1e-6, abs=1e-9)
        known += 1
    assert known > 30
    assert said[0, meter.DONE] > 500


def test_a_new_replica_has_no_past() -> None:
    scaling = Scaling(signal="tokens")
    reports, cluster = Reports(scaling, 2, SERVER.rows), kernel.cluster(2, SERVER.rows, 1, 64, 1)
    rules = _rules(SERVER, Platform(), 2.0, FOREVER)
    ones = np.ones(40, dtype=np.int64)
    for replica in (0, 1):
        kernel.start(cluster, rules, replica, 0.0)
    index = 0
    for moment in (1.0, 2.0, 3.0):
        load = np.arange(40) * 0.05, ones * 5_000, ones, ones
        index = kernel.advance(cluster, rules, *load, index, moment)
        reports.record(moment, cluster, [0, 1])
    reports.push(3.0, cluster, [0, 1])
    kept = reports.points(0)
    assert len(kept) > 1
    assert kept[-1].done_s > 0
    reports.begin(1)
    assert reports.points(1) == []
    assert reports.points(0) == kept
    reports.push(4.0, cluster, [0, 1])
    assert reports.points(1) == []


def test_requests_of_a_replica_that_is_gone_are_not_those_of_its_successor() -> None:
    """10 requests wait in the handle's queue, 4 are at each replica, at 1, 2 and 3 s.

    Replica 1 stops at 3.5 s and another takes its number. What is known then is the queue and
    replica 0: 14. Reported at 4 s, the new one is there with its one value of that moment, 6, and
    the window begins with it: 20 from then on.
    """
    reports, cluster = Reports(Scaling(), 2, SERVER.rows), kernel.cluster(2, SERVER.rows, 1, 64, 1)
    cluster.scalars[kernel.HANDLE_WAITING] = 10
    cluster.ongoing[:] = 4
    for moment in (1.0, 2.0, 3.0):
        reports.record(moment, cluster, [0, 1])
    reports.push(3.0, cluster, [0, 1])
    assert reports.load.at(3.4) == pytest.approx(18)
    reports.digest(3.5, [0])
    reports.begin(1)
    reports.digest(3.5, [0, 1])
    assert reports.load.at(3.9) == pytest.approx(14)
    cluster.ongoing[1] = 6
    reports.push(4.0, cluster, [0, 1])
    assert reports.load.begin == 4
    assert reports.load.at(4.5) == pytest.approx(20)


# What is decided


def simulation(scaling: Scaling, platform: Platform, *, rate: float = 30, seed: int = 1) -> Any:
    load = Load("flash-crowd", rate, 900, peak=4)
    sizes = Sizes.parse("lognormal:180:0.9"), Sizes.parse("lognormal:60:0.7"), Mix.parse("1:8,4:2")
    blocks = drawn(load, *sizes, 512, seed)
    return Simulation(blocks, 900, ServiceModel(), scaling, platform, seed=seed)


@pytest.mark.parametrize(
    ("settings", "push_interval_s"),
    [
        ({}, 10),
        ({"aggregation_function": "max", "upscale_delay_s": 0, "downscale_delay_s": 20}, 10),
        ({"min_replicas": 0, "look_back_period_s": 11, "downscale_delay_s": 40}, 10),
        ({"look_back_period_s": 11, "upscale_delay_s": 5}, 95),  # reports become too old
    ],
    ids=["chart", "hasty", "to zero", "stale"],
)
def test_targets_are_what_serves_policy_says_asked_at_each_pass(
    settings: dict[str, Any], push_interval_s: float
) -> None:
    """Beside a run in which the policy gets all that Serve's controller would give it."""
    said = {"max_replicas": 12, "signal": "tokens", "target_drain_s": 1.5, **settings}
    scaling = Scaling.model_validate(said)
    platform = Platform(
        node_s=20, cold_start_s=10, push_interval_s=push_interval_s, max_ongoing_requests=80
    )
    ours, theirs = (simulation(scaling, platform) for _ in range(2))
    ours_asked = asked(ours)

    def told(now: float) -> dict[str, Any]:
        raw: dict[str, Any] = {name: {} for name in SERIES}
        for replica in theirs._running:
            for at, work in theirs._reports._reported_works:
                if not np.isnan(work[replica]).any():
                    for name, value in zip(SERIES, work[replica].tolist(), strict=True):
                        raw[name].setdefault(replica, []).append(TimeStampedValue(at, value))
        return {
            "raw_metrics": raw,
            "running_replicas": list(theirs._running),
            "total_queued_requests": theirs._reports._queued.at(now),
        }

    policy = TokenPolicy(target_drain_s=1.5)
    theirs._policy = Policy(scaling, policy, told)
    theirs._policy.steady = False
    one, other = ours.run(), theirs.run()
    assert not policy._told  # that it failed
    assert (one.timeline.at, one.timeline.target) == (other.timeline.at, other.timeline.target)
    assert one.replica_s == other.replica_s
    assert max(one.timeline.target) > 2
    assert ours_asked[0] < 3_000  # of 9,000 passes


def asked(simulated: Simulation) -> list[int]:
    """How often its policy will have been asked to decide."""
    count = [0]
    decide = simulated._policy.decide

    def counted(*arguments: Any) -> int:
        count[0] += 1
        return decide(*arguments)

    simulated._policy.decide = counted  # type: ignore[method-assign]
    return count


@pytest.mark.parametrize(("drain_s", "replicas"), [(60, 3), (0.02, 6)])
def test_a_steady_load_gets_its_work_a_second_and_room_to_drain(
    drain_s: float, replicas: int
) -> None:
    """50 requests a second of 0.05 s each are 2.5 s of work a second, so 3 replicas.

    Where each replica may have 0.02 s of work before it, those at work alone count: 2.5 of them on
    average, half done, are 0.06 s, another 3 replicas; more where requests wait for each other.
    """
    at = np.arange(0, 1_200, 0.02)
    ones = np.ones(len(at), dtype=np.int64)
    scaling = Scaling(
        max_replicas=20, initial_replicas=6, signal="tokens", target_drain_s=drain_s,
        downscale_delay_s=30,
    )  # fmt: skip
    found = Simulation(
        iter([(at, ones * 5_000, ones, ones)]), 1_200, SERVER, scaling, Platform(node_s=1)
    ).run()
    assert found.timeline.target[-1] >= replicas
    assert drain_s < 1 or found.timeline.target[-1] == replicas


def test_long_documents_count_for_what_they_are() -> None:
    """As many requests, a fortieth of the work: the target by tokens follows that, not those."""
    at = np.arange(0, 2_400, 0.05)
    ones = np.ones(len(at), dtype=np.int64)
    tokens = np.where(at < 1_200, 250, 10_000)  # 0.05, then 2 s of work a second
    scaling = Scaling(
        max_replicas=20, signal="tokens", target_drain_s=30, downscale_delay_s=30,
        target_ongoing_requests=1_000,
    )  # fmt: skip
    line = (
        Simulation(iter([(at, tokens, ones, ones)]), 2_400, SERVER, scaling, Platform(node_s=1))
        .run()
        .timeline
    )
    before = [target for at, target in zip(line.at, line.target, strict=True) if at < 1_200]
    assert max(before) == 1
    assert line.target[-1] >= 2


# A live service that has it


def test_a_service_must_scale_by_what_is_simulated() -> None:
    tokens = Scaling(signal="tokens", target_drain_s=1.5, initial_replicas=None)
    policy = {"policy_function": PATH, "policy_kwargs": {"target_drain_s": 1.5}}
    shared = tokens.model_dump(exclude={"signal", "target_drain_s", "initial_replicas"})

    def config(**said: Any) -> dict[str, Any]:
        taken = AutoscalingConfig(**shared, **said)
        return {"autoscaling_config": taken.model_dump(mode="json"), "max_ongoing_requests": 1_024}

    agree(tokens, Platform(), config(policy=policy))
    agree(Scaling(), Platform(), config())
    with pytest.raises(CliError, match="signal: the service has requests, to be simulated is tok"):
        agree(tokens, Platform(), config())
    with pytest.raises(CliError, match="signal: the service has tokens, to be simulated is req"):
        agree(Scaling(), Platform(), config(policy=policy))
    policy["policy_kwargs"] = {"target_drain_s": 3.0}
    with pytest.raises(CliError, match=r"target_drain_s: the service has 3\.0, to be simulated is"):
        agree(tokens, Platform(), config(policy=policy))
