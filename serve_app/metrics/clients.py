"""Clients by name, as many as Prometheus can bear."""

from __future__ import annotations

from collections import Counter

from serve_app.metrics.series import MOST_CLIENTS, OTHER_CLIENTS


class Clients:
    """Requests in flight per client: the first names by name, all further ones together."""

    def __init__(self, most: int = MOST_CLIENTS) -> None:
        self._most = most
        self.in_flight: Counter[str] = Counter()

    def entered(self, client: str) -> None:
        """A request of this client has begun."""
        self.in_flight[self.label(client)] += 1

    def left(self, client: str) -> str:
        """A request that `entered` is over; returns the client's label."""
        label = self.label(client)
        self.in_flight[label] -= 1
        return label

    def label(self, client: str) -> str:
        """The client's name, if it is among the first, or `OTHER_CLIENTS`."""
        if client in self.in_flight:
            return client
        # What is at 0 stays: its gauge must say so, and its counters go on under the name.
        if len(self.in_flight) < self._most:
            self.in_flight[client] = 0
            return client
        return OTHER_CLIENTS
