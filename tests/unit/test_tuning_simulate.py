"""Simulated replicas against queueing theory, the engine's own scheduling, and common sense."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from serve_app.tuning import kernel
from serve_app.tuning.arrivals import Load
from serve_app.tuning.loads import drawn, recorded
from serve_app.tuning.model import Decode, Encode, Platform, Scaling, ServiceModel
from serve_app.tuning.outcome import figures, quantile, record, reversals
from serve_app.tuning.simulate import Block, Simulated, Simulation, Timeline
from serve_app.tuning.sizes import Mix, Sizes
from serve_app.tuning.trace import Trace, TraceError

ROOT = Path(__file__).resolve().parents[2]
FOREVER = 1e9


def block(at: Any, tokens: Any, steps: Any = 1, beams: Any = 1) -> Block:
    at = np.asarray(at, dtype=float)
    shaped = [np.broadcast_to(np.asarray(one, dtype=np.int64), at.shape) for one in (tokens, steps)]
    rows = np.broadcast_to(np.asarray(beams, dtype=np.int64), at.shape)
    return at, shaped[0].copy(), shaped[1].copy(), rows.copy()


def fixed(replicas: int) -> Scaling:
    return Scaling(min_replicas=replicas, max_replicas=replicas)


# One row and no decoding: a server whose service time is in proportion to a request's tokens.
SERVER = ServiceModel(
    encode=Encode(token_s=1e-5),
    decode=Decode(step_s=0, row_s=0),
    overhead_s=0,
    rows=1,
    max_batch_tokens=1,
    max_waiting_requests=10**9,
)
ONE_SECOND = 100_000  # tokens


def mean_wait(seed: int, rate: float, servers: int, exponential: bool) -> float:
    rng = np.random.default_rng(seed)
    count = 20_000
    at = np.cumsum(rng.exponential(1 / rate, count))
    tokens = rng.exponential(ONE_SECOND, count) if exponential else np.full(count, ONE_SECOND)
    # One request at a time and replica: the handle's queue is the one queue of all servers.
    platform = Platform(max_ongoing_requests=1, deadline_s=FOREVER)
    found = Simulation(
        iter([block(at, np.maximum(tokens, 1))]), at[-1], SERVER, fixed(servers), platform
    ).run()
    assert found.counts[:, kernel.SUCCEEDED].sum() == count
    return found.wait_s / count


def agrees(waits: list[float], theory: float) -> None:
    """Within the confidence interval of independent runs: 4 standard errors."""
    error = np.std(waits, ddof=1) / math.sqrt(len(waits))
    assert abs(np.mean(waits) - theory) < 4 * error
    assert error < 0.1 * theory


@pytest.mark.parametrize(("rate", "servers"), [(0.7, 1), (2.4, 3), (8.5, 10)])
def test_exponential_service_waits_as_erlang_says(rate: float, servers: int) -> None:
    """M/M/c: the probability to wait is Erlang's C, the mean wait C / (c mu - lambda)."""
    rho = rate / servers
    tail = rate**servers / math.factorial(servers) / (1 - rho)
    waiting = tail / (sum(rate**n / math.factorial(n) for n in range(servers)) + tail)
    agrees([mean_wait(seed, rate, servers, True) for seed in range(12)], waiting / (servers - rate))


def test_even_service_waits_as_pollaczek_and_khinchine_say() -> None:
    """M/D/1: rho / (2 (1 - rho)) of a service time."""
    agrees([mean_wait(seed, 0.75, 1, False) for seed in range(12)], 0.75 / (2 * 0.25))


# The engine's scheduling


def stepwise(load: Block, model: ServiceModel) -> list[float]:
    """Latencies of one engine, each unit of work taken as `ContinuousEngine._work` takes it."""
    coming = list(zip(*(column.tolist() for column in load), range(len(load[0])), strict=True))
    waiting: list[Any] = []
    running: list[list[Any]] = []  # request, steps left
    done = [0.0] * len(coming)
    now = 0.0
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            waiting.append(coming.pop(0))
        pulled: list[Any] = []
        rows = sum(one[3] for one, _ in running)
        while waiting:
            rows += waiting[0][3]
            longest = max([waiting[0][1], *(one[1] for one in pulled)])
            if rows > model.rows and rows != waiting[0][3]:
                break
            if pulled and longest * (len(pulled) + 1) > model.max_batch_tokens:
                break
            pulled.append(waiting.pop(0))
        if pulled:
            encode = model.encode
            now += encode.call_s + sum(
                encode.token_s * one[1] + encode.squared_token_s * one[1] ** 2 for one in pulled
            )
        running += [[one, one[2]] for one in pulled]
        decode = model.decode
        now += decode.step_s + decode.row_s * sum(one[3] for one, _ in running)
        now += decode.source_token_s * sum(one[1] for one, _ in running)
        for entry in running:
            entry[1] -= 1
            if entry[1] == 0:
                done[entry[0][4]] = now - entry[0][0] + model.overhead_s
        running = [entry for entry in running if entry[1]]
    return done


@pytest.mark.parametrize("seed", range(6))
def test_runs_of_steps_are_what_single_steps_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 400
    at = np.cumsum(rng.exponential(rng.choice([0.005, 0.02, 0.2]), count))
    beams = rng.choice([1, 1, 4], count)
    load = block(at, rng.integers(1, 300, count), rng.integers(1, 40, count), beams)
    model = ServiceModel(
        encode=Encode(call_s=0.001, token_s=5e-5, squared_token_s=1e-8),
        decode=Decode(step_s=0.001, row_s=0.0002, source_token_s=1e-7),
        rows=16,
        max_batch_tokens=1_000,
        max_waiting_requests=10**6,
    )
    platform = Platform(deadline_s=FOREVER, max_ongoing_requests=10**6)
    found = Simulation(iter([load]), at[-1], model, fixed(1), platform, objective_s=0.5).run()
    expected = np.array(stepwise(load, model))
    assert found.latency_s == pytest.approx(expected.sum(), rel=1e-9)
    assert found.counts[:, kernel.MET].sum() == (expected <= 0.5).sum()
    ordered = np.sort(expected)
    for percent in (50, 95, 99):
        exact = ordered[math.ceil(count * percent / 100) - 1]
        assert quantile(found.latencies.sum(axis=0), percent) == pytest.approx(exact, rel=0.0051)


# Scaling


def simulated(
    rate: float = 20.0,
    duration: float = 1_800.0,
    kind: str = "poisson",
    *,
    seed: int = 1,
    scaling: dict[str, Any] | None = None,
    platform: dict[str, Any] | None = None,
    peak: float = 2.0,
) -> Simulated:
    load = Load(kind, rate, duration, peak=peak)  # type: ignore[arg-type]
    sizes = Sizes.parse("lognormal:180:0.6"), Sizes.parse("lognormal:60:0.5"), Mix.parse("1")
    return Simulation(
        drawn(load, *sizes, 512, seed),
        duration,
        ServiceModel(),
        Scaling(**{"max_replicas": 8, "target_ongoing_requests": 2, **(scaling or {})}),
        Platform(**(platform or {})),
        seed=seed,
    ).run()


def first(timeline: Timeline, values: list[int], above: int) -> float:
    return next(at for at, value in zip(timeline.at, values, strict=True) if value > above)


def test_replicas_come_after_delay_node_and_cold_start() -> None:
    found = simulated(platform={"node_s": 77, "cold_start_s": 11}, scaling={"upscale_delay_s": 40})
    line = found.timeline
    wanted = first(line, line.target, 1)
    assert 40 <= wanted <= 40 + 10 + 1  # the first report comes within a push interval
    assert first(line, line.nodes, 1) == pytest.approx(wanted + 77)
    assert first(line, line.running, 1) == pytest.approx(wanted + 88)


def test_a_node_that_is_still_there_is_used_again_and_one_that_is_not_goes() -> None:
    def nodes(idle: float) -> Simulated:
        return simulated(
            8,
            3_600,
            "diurnal",
            scaling={"downscale_delay_s": 60, "min_replicas": 1},
            platform={"node_idle_s": idle, "node_s": 30},
        )

    brief, long = nodes(1), nodes(100_000)
    assert np.all(np.diff(long.timeline.nodes) >= 0)
    assert min(brief.timeline.nodes[5:]) < max(brief.timeline.nodes)
    assert long.node_s > brief.node_s
    for found in (brief, long):
        assert found.node_s >= found.replica_s - 1e-6


def test_delays_below_the_look_back_thrash() -> None:
    """ray#26455: the load of half a minute ago is acted upon again and again."""

    def turns(delay: float) -> int:
        scaling = {"upscale_delay_s": delay, "downscale_delay_s": delay, "look_back_period_s": 30}
        platform = {"node_s": 0, "cold_start_s": 5}
        return reversals(simulated(15, 7_200, scaling=scaling, platform=platform).timeline)

    hasty, patient = turns(0), turns(300)
    assert hasty > 5 * max(patient, 1)


def test_every_request_is_accounted_for_when_replicas_die_and_queues_are_full() -> None:
    found = simulated(
        60,
        platform={
            "failures_per_replica_hour": 60,
            "deadline_s": 20,
            "max_queued_requests": 50,
            "max_ongoing_requests": 40,
        },
    )
    totals = found.counts.sum(axis=0)
    assert found.failures > 10
    ended = totals[[kernel.SUCCEEDED, kernel.REJECTED, kernel.LATE]]
    assert totals[kernel.ARRIVED] == ended.sum()
    assert np.all(ended > 0)
    assert found.latencies.sum() == totals[kernel.SUCCEEDED]


def test_an_overload_of_any_length_is_held() -> None:
    found = simulated(
        200,
        120,
        scaling={"max_replicas": 1},
        platform={"max_ongoing_requests": 8, "deadline_s": FOREVER},
    )
    totals = found.counts.sum(axis=0)
    assert totals[kernel.SUCCEEDED] == totals[kernel.ARRIVED] > 20_000
    assert figures(found)["latency_p99_s"] > 120


def test_scaled_to_zero_it_wakes() -> None:
    at = [1.0, 2_000.0]
    scaling = Scaling(min_replicas=0, downscale_delay_s=60)
    platform = Platform(node_s=30, cold_start_s=10, node_idle_s=5)
    found = Simulation(iter([block(at, 100, 10)]), 2_400, ServiceModel(), scaling, platform).run()
    assert 0 in found.timeline.running
    assert found.counts[:, kernel.SUCCEEDED].sum() == 2
    # The second waits for a report, a node and a start.
    assert 40 < found.latency_s < 40 + 10 + 1
    assert found.replica_s < 600


def test_the_same_seed_is_the_same_run_to_the_last_figure() -> None:
    one, same, other = (
        json.dumps(record(simulated(platform={"failures_per_replica_hour": 5}, seed=seed), {}))
        for seed in (3, 3, 4)
    )
    assert one == same
    assert one != other


def test_a_recorded_load_is_its_parts_and_guesses_what_was_refused() -> None:
    trace = Trace(
        at=np.array([0.0, 10.0, 20.0]),
        characters=np.array([5, 5, 5]),
        input_tokens=np.array([900, 300, 0]),
        output_tokens=np.array([60, 30, 0]),
        parts=np.array([3, 1, 1]),
        beams=np.array([0, 4, 0]),
    )
    [(at, tokens, steps, beams)] = recorded(trace, 2.0, 100, 512)
    assert at.tolist() == [0, 0, 0, 5, 10]
    assert tokens.tolist() == [300, 300, 300, 300, 300]
    assert steps.tolist() == [20, 20, 20, 30, 25]
    assert beams.tolist() == [1, 1, 1, 4, 1]
    [(at, *_)] = recorded(trace, 2.0, 5, 512)
    assert at.tolist() == [0, 0, 0, 5]
    nothing = Trace(trace.at, trace.characters, *[trace.at.astype(np.int64) * 0] * 4)
    with pytest.raises(TraceError, match="no request of the trace got an answer"):
        next(recorded(nothing, 1.0, 5, 512))


def test_defaults_are_the_charts() -> None:
    values = yaml.safe_load((ROOT / "helm/t5-summarizer/values.yaml").read_text())
    summarizer = values["summarizer"]
    scaling = Scaling().model_dump()
    assert {name: scaling[name] for name in summarizer["autoscaling_config"]} == pytest.approx(
        summarizer["autoscaling_config"]
    )
    platform = Platform()
    assert platform.max_ongoing_requests == summarizer["max_ongoing_requests"]
    assert platform.max_queued_requests == summarizer["max_queued_requests"]
    assert platform.node_idle_s == summarizer["workers"]["idleTimeoutSeconds"]
    assert platform.min_nodes == summarizer["workers"]["minReplicas"]
    assert platform.deadline_s == values["limits"]["default_timeout_s"]


# The command


def tuned(tmp_path: Path, *args: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "T5_SERVE_USAGE_FOLDER": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", "tune", "simulate", *args],
        env=environment,
        capture_output=True,
        timeout=250,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_command_takes_the_charts_values_and_tells_three_ways(tmp_path: Path) -> None:
    values, model, html = (tmp_path / name for name in ("values.yaml", "model.yaml", "day.html"))
    values.write_text(
        "summarizer:\n  autoscaling_config: {max_replicas: 6, target_ongoing_requests: 3}\n"
        "  workers: {idleTimeoutSeconds: 300}\ningress: {enabled: true}\n"
    )
    model.write_text("name: slow\ndecode: {step_s: 0.004}\n")
    args = ["--rate", "10", "--values", str(values), "--model", str(model), "--set", "node_s=60"]
    status, out, err = tuned(tmp_path, *args, "--json", "--html", str(html))
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["scaling"]["max_replicas"] == 6
    assert told["platform"]["node_idle_s"] == 300
    assert told["platform"]["node_s"] == 60
    assert told["model"]["decode"]["step_s"] == 0.004
    assert told["figures"]["requests"] == pytest.approx(36_000, rel=0.03)
    assert len(told["timeline"]["at_s"]) == len(told["timeline"]["running"]) > 2
    assert html.read_text().count("<svg") == 3
    status, out, _ = tuned(tmp_path, *args)
    assert status == 0
    assert "replica: slow; objective 2 s" in out
    assert "latency_p95_s" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "max_replica=3"], "--set max_replica=3: must be NAME=VALUE, NAME one of min_"),
        (["--set", "max_replicas=x"], "--set: max_replicas: Input should be a valid integer"),
        (
            ["--set", "min_replicas=9"],
            "--set: settings: min_replicas (9), initial_replicas (9) and",
        ),
        (["--model", "{}/none.yaml"], "{}/none.yaml: No such file or directory"),
        (["--model", "{}/typo.yaml"], "{}/typo.yaml: encode.tokens_s: Extra inputs are not permit"),
        (["--values", "{}/list.yaml"], "{}/list.yaml: the file must be a mapping"),
        (["--values", "{}/odd.yaml"], "{}/odd.yaml: max_replica: Extra inputs are not permitted"),
        (["--input-tokens", "big"], "--input-tokens: must be one of constant:N"),
        (["--arrivals", "trace", "--logs", "{}/list.yaml"], "no usage event tells the size of a t"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "typo.yaml").write_text("encode: {tokens_s: 1}\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "odd.yaml").write_text("summarizer: {autoscaling_config: {max_replica: 1}}\n")
    status, out, err = tuned(tmp_path, *(one.replace("{}", str(tmp_path)) for one in args))
    assert (status, out) == (2, "")
    assert err.startswith(f"t5-serve: {message.replace('{}', str(tmp_path))}")
    assert err.count("\n") == 1


def test_a_trace_is_simulated_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    lines = [
        {
            "time": f"2026-11-23T{8 + at:02}:00:00Z",
            "message": "request",
            "request_id": str(at),
            "method": "POST",
            "total_ms": 5.0,
            "characters": 100,
            "input_tokens": 30,
            "output_tokens": 6,
        }
        for at in range(3)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    status, out, err = tuned(tmp_path, "--arrivals", "trace", "--logs", str(log), "--json")
    assert (status, err) == (0, f"t5-serve: 1 line could not be read: {log}:4: not JSON\n")
    told = json.loads(out)
    assert told["figures"]["requests"] == 3
    assert told["figures"]["seconds"] == pytest.approx(3 * 3_600, rel=1e-6)
    assert told["load"] == "trace of 3 texts, 1 times as fast, for 10,800 s"
