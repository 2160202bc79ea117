"""The waiting line: first come first served within a share, shares in turn by work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.protocol import EngineRequest, GenerationSettings
from serve_app.engine.queue import Entry, FairQueue


def entry(name: str, share: str, tokens: int = 1, **said: int) -> Entry:
    request = EngineRequest(name, [1] * tokens, GenerationSettings(**said), share=share)
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
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_a_newcomer_comes_next_whatever_the_others_have() -> None:
    queue = filled("a", "a", "a", "a")
    assert names([queue.pop()]) == ["a0"]
    queue.push(entry("b", "b"))
    assert names([queue.pop() for _ in range(4)]) == ["b", "a1", "a2", "a3"]


def test_turns_are_of_work_not_of_entries() -> None:
    queue = FairQueue()
    # A turn of a costs 90 + 10, of b 20 + 10, of c 2 beams of 10 and 10.
    for number in range(3):
        queue.push(entry(f"a{number}", "a", 90, max_new_tokens=10))
    for number in range(5):
        queue.push(entry(f"b{number}", "b", 20, max_new_tokens=10))
    for number in range(3):
        queue.push(entry(f"c{number}", "c", 10, max_new_tokens=10, num_beams=2))
    # a at 0, 100, 200; b at 0, 30, 60, 90, 120; c at 0, 30, 60.
    expected = ["a0", "b0", "c0", "b1", "c1", "b2", "c2", "b3", "a1", "b4", "a2"]
    assert names(list(queue)) == expected
    assert [one.request.id for one in queue.before("c")] == expected[:8]
    assert [one.request.id for one in queue.before("new")] == ["a0", "b0", "c0"]
    assert names([queue.pop() for _ in range(8)]) == expected[:8]
    queue.push(entry("c3", "c", 10, max_new_tokens=10))  # at 90, where all are
    assert names(list(queue)) == ["c3", "a1", "b4", "a2"]


def test_what_was_taken_out_is_not_on_its_share() -> None:
    queue = FairQueue()
    queue.push(entry("b0", "b", 10, max_new_tokens=10))
    queue.push(entry("b1", "b", 10, max_new_tokens=10))
    for number in range(9):
        queue.push(entry(f"a{number}", "a", 10, max_new_tokens=10))
    queue.take(lambda one: one.request.share == "a" and one.request.id > "a0")
    queue.push(entry("a9", "a", 10, max_new_tokens=10))
    assert names(list(queue)) == ["b0", "a0", "b1", "a9"]


def test_a_share_can_be_passed_over() -> None:
    queue = filled("a", "a", "b")
    assert names([queue.pop(but={"a"})]) == ["b2"]
    assert queue.peek(but={"a"}) is None
    assert names([queue.pop(), queue.pop()]) == ["a0", "a1"]


def test_a_full_queue_has_room_for_who_has_less_than_its_part() -> None:
    queue = filled(*"aaaaaa")
    assert queue.full(entry("a6", "a"), 6, 1_000) == "6 requests are waiting"
    # Of two shares each has 3 of 6; of three, 2; of four, 1.
    for number in range(3):
        assert queue.full(entry(f"b{number}", "b"), 6, 1_000) is None
        queue.push(entry(f"b{number}", "b"))
    assert queue.full(entry("b3", "b"), 6, 1_000) is not None
    queue.push(entry("c0", "c"))
    queue.push(entry("c1", "c"))
    assert queue.full(entry("c2", "c"), 6, 1_000) is not None
    queue.push(entry("d0", "d"))
    # Twice of it is the end, whoever comes.
    assert len(queue) == 12
    assert queue.full(entry("e0", "e"), 6, 1_000) == "6 requests are waiting"


def test_the_bound_of_tokens_is_kept_as_that_of_requests() -> None:
    queue = FairQueue()
    assert queue.full(entry("long", "a", tokens=200), 100, 100) is None  # nothing else waits
    queue.push(entry("a0", "a", tokens=90))
    assert queue.full(entry("a1", "a", tokens=11), 100, 100) == "its limit is 100 tokens"
    assert queue.full(entry("a1", "a", tokens=10), 100, 100) is None
    assert queue.full(entry("b0", "b", tokens=50), 100, 100) is None
    assert queue.full(entry("b0", "b", tokens=51), 100, 100) == "its limit is 100 tokens"


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
