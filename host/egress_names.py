"""The addresses of the names that functions may reach."""

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable

LOOKUP_S = 30  # how often names are looked up: the resolver of the host keeps their addresses for the TTL
MOST_LOOKUPS = 32  # at a time
KEPT_S = 600  # an address counts for so long after it was last seen


class Names:
    """What the host's resolver says of names, and when it said it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, dict[str, float]] = {}  # name → {address: when it was last seen}
        self._next = 0.0
        self._thread: threading.Thread | None = None

    def addresses(self, name: str) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
        """[(address, seconds for which it counts)], the latest first."""
        now, found = self._clock(), self._seen.get(name, {})
        pairs = [(text, round(found[text] + KEPT_S - now)) for text in sorted(found, key=lambda each: -found[each])]
        return [(ipaddress.ip_address(text), left_s) for text, left_s in pairs if left_s > 0]

    def need(self, names: Iterable[str], within_s: float) -> None:
        """Look up those that have no address yet."""
        self.look_up([name for name in names if not self.addresses(name)], within_s)

    def refresh(self, names: Iterable[str], done: Callable[[], None]) -> None:
        """Look the names up when it is time, in a thread of its own that calls done()."""
        names = set(names)
        if not names or self._clock() < self._next or (self._thread and self._thread.is_alive()):
            return

        def look_up():
            self.look_up(names, LOOKUP_S)
            self._seen = {name: found for name, found in self._seen.items() if self.addresses(name)}
            done()

        self._next = self._clock() + LOOKUP_S
        self._thread = threading.Thread(target=look_up, name='egress names', daemon=True)
        self._thread.start()

    def look_up(self, names: Iterable[str], within_s: float) -> None:
        """Ask the host's resolver, side by side, and wait for the answers for `within_s`."""
        waiting = list(names)

        def ask():
            with contextlib.suppress(IndexError):
                while True:
                    self._ask(waiting.pop())

        threads = [threading.Thread(target=ask, daemon=True) for _ in waiting[:MOST_LOOKUPS]]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + within_s
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))

    def _ask(self, name):
        try:
            infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        now = self._clock()
        kept = {text: seen for text, seen in self._seen.get(name, {}).items() if now - seen < KEPT_S}
        self._seen[name] = kept | {info[4][0].partition('%')[0]: now for info in infos}
