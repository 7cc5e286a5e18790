"""Tells when an instance comes up against its limits: most programs do not say it, and then work no more."""

import weakref
from collections.abc import Iterable

from control.events import Emit
from handlers.containers.limits import Bounds
from handlers.images import wants
from handlers.serving.instance import Instance
from handlers.serving.pool import Pool


class LimitWatch:
    """Looks at every instance from time to time."""

    def __init__(self, bounds: Bounds, emit: Emit) -> None:
        self._bounds, self._emit = bounds, emit
        self._seen: weakref.WeakKeyDictionary[Instance, dict[str, int]] = weakref.WeakKeyDictionary()

    def look(self, pools: Iterable[Pool]) -> bool:
        """False: it tells nothing of the state of this server."""
        for pool in pools:
            for instance in pool.instances:
                if text := self.news_of(instance):
                    self._emit('handler', f'{pool.name}: {text}', name=pool.name, problem=True)
                    pool.log.append(f'[faasd] {text}\n'.encode())
                    pool.limit_reason = text
            if pool.limit_reason and not any(any(instance.hits().values()) for instance in pool.instances):
                pool.limit_reason = None
        return False

    def news_of(self, instance: Instance) -> str | None:
        """What has happened since it was asked the last time."""
        now, before = instance.hits(), self._seen.get(instance, {})
        self._seen[instance] = {key: max(count, before.get(key, 0)) for key, count in now.items()}
        new = [key for key, count in now.items() if count > before.get(key, 0)]
        if not new:
            return None
        limits, name = self._bounds.of(instance.revision.spec), instance.pool.name
        raising = f'faas config {name} --set'
        if 'memory' in new:
            limit = wants.to_text(limits.memory)
            return f'a process of it ran out of memory (memory {limit}): {raising} memory={2 * limits.memory >> 20}M'
        return f'no process or thread more could start (pids {limits.pids}): {raising} pids={2 * limits.pids}'
