"""One round of the chaos tests (`make test-chaos` plays ten): a replica of each kind dies."""

from __future__ import annotations

import pytest

from tests.chaos.rounds import play

SEED = 20


@pytest.mark.timeout(900)
def test_a_round_breaks_no_promise() -> None:
    names = ["engine killed", "tokens file broken", "api killed"]
    outcomes = play(SEED, 1, names)
    assert [one.fault for one in outcomes] == names
    assert [broken for one in outcomes for broken in one.broken] == []
    # There was something to lose.
    assert all(one.requests > 0 for one in outcomes)
