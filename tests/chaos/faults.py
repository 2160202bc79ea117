"""The faults: what is done to a running service, when it has recovered, what clients may see."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from serve_app.tokens import create
from tests.chaos.service import LocalService, until

Recovered = Callable[[], bool]
_WRITTEN_S = 10.0  # a loaded machine's writers may be late


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: as in tables and on the command line.
        inject: does it. Gives the condition by which the service has recovered.
        allowed: what requests may end with that were under way between fault and recovery, beside
            what they end with otherwise; see `judge.label`.
        loses_events: whether their usage events may be lost.
        ends_service: `t5-serve run` ends by it, with a message.
        missing: why it cannot be done to this service, or "".
    """

    name: str
    inject: Callable[[LocalService, random.Random], Recovered]
    allowed: frozenset[str] = frozenset()
    loses_events: bool = False
    ends_service: bool = False
    missing: Callable[[LocalService], str] = lambda _: ""


def _kill(role: str) -> Callable[[LocalService, random.Random], Recovered]:
    def inject(service: LocalService, chance: random.Random) -> Recovered:
        victim = chance.choice(service.processes(role))
        victim.kill()

        def recovered() -> bool:
            others = [one.pid for one in service.processes(role)]
            return (
                len(others) > 0
                and victim.pid not in others
                and service.whole(without=victim.pid)
                and service.answers()
            )

        return recovered

    return inject


def _freeze(service: LocalService, chance: random.Random) -> Recovered:
    victim = chance.choice(service.processes("engine"))
    victim.send_signal(signal.SIGSTOP)
    try:
        # Less than makes Serve replace it: what is tested is that its requests wait.
        time.sleep(chance.uniform(2, 8))
    finally:
        victim.send_signal(signal.SIGCONT)
    return lambda: service.whole() and service.answers()


def _end(service: LocalService, chance: random.Random) -> Recovered:
    service.processes("gcs")[0].kill()
    return lambda: service.process.poll() is not None


def _fill_disk(service: LocalService, chance: random.Random) -> Recovered:
    before = _dropped(service)
    service.fill_disk()
    try:
        until(
            lambda: _dropped(service) > before,
            "events that cannot be written are counted",
        )
    finally:
        service.free_disk()
    return lambda: writes_events(service)


def _dropped(service: LocalService) -> float:
    name = "ray_t5_usage_events_dropped_total"
    return sum(service.series(name)[name].values())


def _remove_folder(service: LocalService, chance: random.Random) -> Recovered:
    service.remove_usage()
    return lambda: writes_events(service)


def _break_tokens(service: LocalService, chance: random.Random) -> Recovered:
    kept = service.tokens_file.with_name("kept.json")
    shutil.copy(service.tokens_file, kept)
    service.tokens_file.write_text('{"version": 1, "tokens": [{"id": ')
    # Known tokens stay in force: the load goes on with one.
    time.sleep(chance.uniform(2, 4))
    kept.replace(service.tokens_file)
    _, token = create(service.tokens_file, f"after-{chance.randrange(1 << 30)}", None)
    return lambda: service.answers(token)


def writes_events(service: LocalService) -> bool:
    """Whether all Api replicas write the events of new requests."""
    ids = {f"chaos-probe-{random.getrandbits(64):016x}" for _ in range(8)}
    headers = {"Authorization": f"Bearer {service.token}"}
    try:
        for one in ids:
            httpx.get(
                f"{service.url}/v1/models",
                headers={**headers, "X-Request-Id": one},
                timeout=60,
                trust_env=False,
            )
    except httpx.HTTPError:
        return False
    deadline = time.monotonic() + _WRITTEN_S
    while time.monotonic() < deadline:
        written = [event for event in service.events() if event["request_id"] in ids]
        if len(written) == len(ids):
            return len({event["replica"] for event in written}) == 2
        time.sleep(0.2)
    return False


def _no_disk(service: LocalService) -> str:
    return "" if service.usage_is_a_disk else "a small file system needs root"


_STREAM_CUT = "200 unavailable"  # some of it had been streamed: it cannot be begun again
_CUT = frozenset({"closed", "500 by Serve"})
FAULTS = (
    Fault("engine killed", _kill("engine"), frozenset({_STREAM_CUT})),
    Fault("engine frozen", _freeze),
    Fault("api killed", _kill("api"), _CUT, loses_events=True),
    Fault("proxy killed", _kill("proxy"), frozenset({"closed", "refused"})),
    Fault("controller killed", _kill("controller")),
    Fault("disk full", _fill_disk, loses_events=True, missing=_no_disk),
    Fault("usage folder removed", _remove_folder, loses_events=True),
    Fault("tokens file broken", _break_tokens),
    Fault("gcs killed", _end, _CUT | {"refused"}, loses_events=True, ends_service=True),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
