"""What is wrong now, and what was."""

from collections.abc import Callable
from typing import Any

import dns_manager
import registry
from control.events import Emit, Events
from host.version import VERSION

Report = Callable[[str, str | None], None]  # report(area, what is wrong, or None when the area is well again)


class Problems:
    """What is wrong now, by area. Each change is told once."""

    def __init__(self, emit: Emit) -> None:
        self._emit, self._now = emit, {}

    def report(self, area: str, text: str | None) -> None:
        if text == self._now.get(area):
            return
        if text:
            self._emit(area, text, problem=True)
            self._now[area] = text
        else:
            del self._now[area]
            self._emit(area, 'is well again')

    def __contains__(self, area: str) -> bool:
        return area in self._now

    def list(self) -> list[dict[str, str]]:
        return [{'area': area, 'what': text} for area, text in list(self._now.items())]


class Health:
    """The answer of /api/health. `functions()` gives the items of /api/list; `guard` is 'bpf' or 'table'."""

    def __init__(self, problems: Problems, events: Events, functions: Callable[[], list[dict]], guard: str) -> None:
        self._problems, self._events, self._functions, self._guard = problems, events, functions, guard

    def answer(self, with_recent: bool) -> dict[str, Any]:
        """What is wrong now; `with_recent`: what was, too, in words that are not for everybody."""
        listed, problems = self._functions(), self._problems.list()
        problems += [
            {'area': 'function', 'what': f'{item["name"]}: {item["reason"]}'} for item in listed if item['reason']
        ]
        try:
            dns_manager.query(registry.GATEWAY, 'ns.faas')
        except OSError as error:
            problems.append({'area': 'dns', 'what': f'CoreDNS does not answer at {registry.GATEWAY}: {error}'})
        return {
            'status': 'degraded' if problems else 'ok',
            'version': VERSION,
            'guard': self._guard,
            'problems': problems,
            'functions': {'live': len(listed), 'crashing': sum(item['status'] == 'crashing' for item in listed)},
            **({'recent': self._events.problems()} if with_recent else {}),
        }
