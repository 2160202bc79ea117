"""The waiting line: first come first served within a share, shares in turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.protocol import EngineRequest, GenerationSettings
from serve_app.engine.queue import Entry, FairQueue


def entry(name: str, share: str, tokens: int = 1) -> Entry:
    request = EngineRequest(name, [1] * tokens, GenerationSettings(), share=share)
    return Entry(request, arrived=0.0)


def names(entries: list[Entry]) -> list[str]:
    return [one.request.id for one in entries]


def filled(*order: str) -> FairQueue:
    queue = FairQueue()
    for number, share in enumerate(order):
        queue.push(entry(f"{share}{number}", share, tokens=number + 1))
    return queue


def test_shares_take_turns_and_keep_their_order() -> None:
    queue = filled("a", "a", "a", "b", "c", "b")
    expected = ["a0", "b3", "c4", "a1", "b5", "a2"]
    assert names(list(queue)) == expected
    assert names([queue.pop() for _ in range(6)]) == expected
    assert len(queue) == queue.tokens == 0
    with pytest.raises(IndexError):
        queue.peek()


def test_a_newcomer_waits_for_one_turn_of_the_others_not_for_all_they_have() -> None:
    queue = filled("a", "a", "a", "a")
    assert names([queue.pop()]) == ["a0"]
    queue.push(entry("b", "b"))
    assert names([queue.pop() for _ in range(4)]) == ["a1", "b", "a2", "a3"]


def test_taking_asks_in_order_and_leaves_the_rest() -> None:
    queue = filled("a", "b", "a", "b")
    asked: list[str] = []

    def wanted(one: Entry) -> bool:
        asked.append(one.request.id)
        return one.request.id in ("a2", "b1")

    assert names(queue.take(wanted)) == ["b1", "a2"]
    assert asked == ["a0", "b1", "a2", "b3"]
    assert names(list(queue)) == ["a0", "b3"]
    assert queue.tokens == 1 + 4


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(0, 30))
def test_nothing_is_lost_and_the_tokens_are_counted(order: list[str], pops: int) -> None:
    queue = filled(*order)
    popped = [queue.pop() for _ in range(min(pops, len(order)))]
    rest = list(queue)
    assert sorted(names(popped + rest)) == sorted(f"{s}{i}" for i, s in enumerate(order))
    assert queue.tokens == sum(one.tokens for one in rest)
    assert len(queue) == len(rest)
