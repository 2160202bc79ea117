"""Who may begin: in turn, and not all of the batch for one share while others are there."""

from __future__ import annotations

from serve_app.engine.pace import Pace
from serve_app.engine.protocol import EngineRequest, GenerationSettings
from serve_app.engine.queue import Entry, FairQueue
from serve_app.engine.shares import TimeShares
from serve_app.engine.turns import Turns
from serve_app.engine.work import Tally


class Batch:
    """A queue and a batch that `Turns` fills."""

    def __init__(self, rows: int, tokens: int = 10_000, time: TimeShares | None = None) -> None:
        self.queue = FairQueue()
        self.running: list[Entry] = []
        self.turns = Turns(rows, tokens, time)
        self.pace = Pace(rows)
        self._numbers = iter(range(1_000))

    def wait(
        self,
        share: str,
        count: int = 1,
        tokens: int = 10,
        beams: int = 1,
        deadline: float | None = None,
    ) -> None:
        for _ in range(count):
            name = f"{share}{next(self._numbers)}"
            settings = GenerationSettings(num_beams=beams, max_new_tokens=10)
            request = EngineRequest(name, [1] * tokens, settings, deadline, share=share)
            self.queue.push(Entry(request, arrived=0.0))

    def pull(self, now: float = 0.0) -> str:
        """The shares of those who begin, in order."""
        pulled = self.turns.pull(self.queue, self.running, self.pace, now)
        self.running += pulled
        return "".join(entry.request.share for entry in pulled)

    def leave(self, share: str, count: int) -> None:
        for _ in range(count):
            self.running.remove(next(e for e in self.running if e.request.share == share))


def measured(rows: int) -> Batch:
    """With steps of 1 ms and 1 ms a row, 10 of them a document, and nothing of note to encode."""
    batch, tally = Batch(rows), Tally()
    batch.pace.stepped(tally, now=-1.0)
    tally.encoded(1_000, 1e-9)
    for count in (1, rows) * 500:
        tally.stepped(count, count, count, 0.001 + 0.001 * count)
    tally.finished = tally.made / 10
    batch.pace.stepped(tally, now=0.0)
    return batch


def test_a_share_alone_gets_all_rows() -> None:
    batch = Batch(rows=8)
    batch.wait("a", 10)
    assert batch.pull() == "a" * 8
    assert batch.pull() == ""
    batch.leave("a", 1)
    assert batch.pull() == "a"


def test_who_comes_to_a_full_batch_gets_the_next_row() -> None:
    batch = Batch(rows=8)
    batch.wait("a", 100)
    batch.pull()
    batch.wait("b", 2)
    batch.leave("a", 3)
    assert batch.pull() == "bb"  # with b there, a has more than half


def test_while_others_are_there_a_share_has_half_and_later_all_again() -> None:
    batch = Batch(rows=8)
    batch.wait("a", 100)
    batch.wait("b")
    assert batch.pull(now=0.0) == "abaaa"
    batch.leave("b", 1)
    # b may come back, and finds a row.
    assert batch.pull(now=9.0) == ""
    batch.wait("b")
    assert batch.pull(now=9.5) == "b"
    batch.leave("b", 1)
    assert batch.pull(now=30.0) == "aaaa"


def test_shares_that_all_want_much_fill_the_batch() -> None:
    batch = Batch(rows=8)
    for share in "abc":
        batch.wait(share, 10)
    assert sorted(batch.pull()) == sorted("aaabbbcc")


def test_what_is_encoded_at_once_is_bound_for_all_and_for_a_share_beside_others() -> None:
    batch = Batch(rows=100, tokens=800)
    batch.wait("a", 50, tokens=100)
    assert batch.pull() == "a" * 8
    batch.wait("b", tokens=100)
    assert batch.pull() == "baaaa"
    # One that is longer than all that may be encoded at once, all the same.
    batch = Batch(rows=8, tokens=50)
    batch.wait("a", 2, tokens=100)
    assert batch.pull() == "a"


def test_rows_stay_free_where_one_more_would_make_the_others_late() -> None:
    batch = measured(rows=8)
    # 7 tenths of 0.06 s for 10 steps: 4.2 ms each, those of 3 rows.
    batch.wait("a", 8, deadline=0.06)
    assert batch.pull(now=0.0) == "aaa"
    assert batch.pull(now=0.0) == ""
    batch.leave("a", 1)
    assert batch.pull(now=0.0) == "a"
    # Of those who will be late anyway nobody takes care.
    batch = measured(rows=8)
    batch.wait("a", 8, deadline=0.0)
    assert batch.pull(now=0.0) == "a" * 8


def test_more_beams_than_rows_begin_in_an_empty_batch() -> None:
    batch = Batch(rows=4)
    batch.wait("a", beams=8)
    batch.wait("a")
    assert batch.pull() == "a"
    assert batch.pull() == ""
    batch.leave("a", 1)
    assert batch.pull() == "a"


def test_who_needs_many_rows_is_not_passed_by_for_ever() -> None:
    batch = Batch(rows=4)
    batch.wait("a", 4)
    batch.pull()
    batch.wait("b", beams=4)
    batch.wait("c", 10)
    batch.leave("a", 2)
    assert batch.pull() == ""  # two rows are free, which c could use; b is first
    batch.leave("a", 2)
    assert batch.pull() == "b"


def test_where_time_counts_shares_get_one_document_each_between_two_steps() -> None:
    time = TimeShares()
    batch = Batch(rows=16, time=time)
    batch.wait("a", 20)
    assert batch.pull() == "a" * 16  # alone
    batch.leave("a", 16)
    for share in "bcd":
        batch.wait(share, 5)
    assert sorted(batch.pull()) == list("abcd")
    assert sorted(batch.pull()) == list("abcd")
    # Whoever is ahead of another that is there waits; nobody waits for those that are not.
    time.join("abcd")
    time.encoded({"a": 1, "b": 1}, 1.0)
    assert sorted(batch.pull()) == list("cd")
    batch.leave("c", 3)
    batch.leave("d", 3)
    batch.queue.take(lambda entry: entry.request.share in "cd")
    assert sorted(batch.pull()) == list("ab")
