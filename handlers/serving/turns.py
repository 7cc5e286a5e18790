"""Turns: of instances that must not have a volume at the same time, the next starts when the former has ended."""

import contextlib

from handlers.serving.instance import Instance, InstanceState
from handlers.serving.program import UNSIGNALLED_MAX_S
from handlers.serving.rollout import Rollout


class TakesTurns:
    """The part of Pool that replaces an instance by ending it first. Clients wait in the backlog meanwhile."""

    def _has_turn(self, instance: Instance) -> bool:
        """True if no other instance has a volume that `instance` must have alone. Else those are asked to end."""
        spec = instance.revision.spec
        former = [each for each in self.instances if each is not instance and spec.excludes(each.revision.spec)]
        if not former:
            self._in_line.discard(instance)
            return True
        comes_new = instance not in self._in_line
        self._in_line.add(instance)
        if self._serving in former:
            self._vacate()
        elif comes_new:
            for each in former:  # one that another deploy tries is waited for: it will serve, or end
                if each is self._starting or each.state == InstanceState.STOPPING:
                    each.stop(0, self._vacate_s())
        return False

    def _vacate_s(self) -> float:
        """How long an instance may take to end for the next one."""
        return UNSIGNALLED_MAX_S + self.around.stop_timeout_s

    def _vacate(self) -> None:
        """Have the serving instance end, and nobody serve."""
        former = self._serving
        if not former.listens_itself:
            self._set_accepting(False)
            self._serving = None
            former.stop(0, self._vacate_s())
            return
        rollout = Rollout(self._group, self.around)
        if not rollout.must_wait(former):
            with contextlib.suppress(OSError):  # no listener: it is tried again
                self._roll_out(rollout, self._vacate_s())
