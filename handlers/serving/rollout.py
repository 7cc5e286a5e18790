"""Rollout: one instance takes the place of another, and nobody's connection is lost.

    TRIAL ──cut_over()──▶ DRAINING ──▶ STOPPING ──▶ DONE
      │                   the former takes what      the former
      └──── drop() ─────▶ waits at its listener      has ended

A listener that connections are steered to always has an owner: the instance that listens there, or faasd, which accepts
there for an instance that is handed its connections.
"""

import collections
import contextlib
import enum
import socket

from handlers.serving.instance import Instance, Surroundings
from handlers.serving.listeners import ListenerGroup

REPLACED_INSTANCE_MAX_S = 600  # how long a replaced instance may take to finish what it holds
KEEPALIVE_IDLE_S = 30  # how long it keeps idle connections that were kept alive
# A former listener is done with when nothing came to it for so long: a client's last packet of the handshake may be on
# its way.
LISTENER_QUIET_S = 1
ROLLOUT_POLL_S = 0.02
SHARED_LISTENER_MAX_S = 10  # how long two instances may have one listener, when no other could be made


class OwnerError(RuntimeError):
    """Connections would go to a listener that nobody accepts from: a fault in this program."""


class Phase(enum.Enum):
    """Where a rollout is."""

    TRIAL = 'trial'
    DRAINING = 'draining'
    STOPPING = 'stopping'
    DONE = 'done'


class Rollout:
    """The replacement of what serves a group by `successor`; without one faasd itself goes on with the address."""

    def __init__(self, group: ListenerGroup | None, around: Surroundings, successor: Instance | None = None) -> None:
        self.phase = Phase.TRIAL
        self.successor, self.former = successor, None
        self._group, self._around = group, around
        self._waiting: collections.deque[socket.socket] = collections.deque()  # accepted before the cut-over
        self._quiet_since = 0.0  # when something waited for the former for the last time
        self._drain_until = 0.0  # it is told to stop at this time, whatever waits
        self._stop_until = 0.0  # it is killed at this time

    # Trial

    def give_listener(self, share: bool) -> bool:
        """Lend the successor a listener: the current one if `share`, else the next one. False while there is no room.

        Raises OSError.
        """
        if not self.successor.can_listen:
            return True
        if not share and not self._group.has_room:
            return False
        self.successor.use_listener(self._group.current if share else self._group.add())
        return True

    @property
    def shares_current(self) -> bool:
        """True if the successor may begin to accept at the current listener: no other may be started there."""
        return self.phase == Phase.TRIAL and self._group is not None and self.successor.listener is self._group.current

    @property
    def has_own_listener(self) -> bool:
        """True if the successor was given another than the current listener."""
        return self.successor is not None and self.successor.listener not in (None, self._group.current)

    def drop(self) -> None:
        """The successor will not serve: its listener goes."""
        if self._group:
            self._group.remove_next(self.successor.listener)
        self.phase = Phase.DONE

    # Cut over

    def must_wait(self, former: Instance | None) -> bool:
        """True while the cut-over from `former` needs another listener, and there is no room for one."""
        return former is not None and former.listens_itself and not self.has_own_listener and not self._group.has_room

    def cut_over(
        self,
        former: Instance | None,
        pending: collections.deque[socket.socket],
        within_s: float = REPLACED_INSTANCE_MAX_S,
    ) -> None:
        """Have new connections go to the successor; `former` finishes what it holds within `within_s`.

        It also takes what is `pending`, if the successor cannot. Raises OSError when no listener can be made, and
        OwnerError. Nothing has changed then.
        """
        successor, own = self.successor, self.has_own_listener
        listens = successor is not None and successor.listens_itself
        if own and not listens and not (former and former.listens_itself):
            self._group.remove_next(successor.listener)  # both are handed what faasd accepts: the current one stays
            own = False
        if former is None:
            if own and not successor.must_answer:
                raise OwnerError('nobody would serve what waits at the listener of an instance that has ended')
            if own and listens:
                self._group.take_over(successor.listener)
            elif own:
                self._group.remove_next(successor.listener)
            self.phase = Phase.DONE
        elif not own and not former.listens_itself:
            former.stop(KEEPALIVE_IDLE_S, within_s)
            self.phase = Phase.DONE
        elif listens and not own:
            raise OwnerError(f'{successor!r} does not listen where connections would go')
        else:
            self._group.cut_over(successor.listener if own else self._group.add())
            self._drain(former, pending, within_s)

    # Drain

    def _drain(self, former, pending, within_s):
        """Have `former` take what waits for it, then stop it."""
        self.former, self.phase = former, Phase.DRAINING
        if not former.listens_itself:
            self._waiting.extend(pending)
            pending.clear()
        self._quiet_since = now = self._around.clock()
        self._drain_until, self._stop_until = now + within_s / 2, now + within_s
        former.drain()
        self._poll()

    def _poll(self):
        now = self._around.clock()
        if self.phase == Phase.DRAINING:
            if not self.former.listens_itself:
                self._hand_over_waiting()
            if self._waiting or self._group.former_queued():
                self._quiet_since = now
            if now >= min(self._quiet_since + LISTENER_QUIET_S, self._drain_until):
                self.phase = Phase.STOPPING
                self.former.stop(KEEPALIVE_IDLE_S, self._stop_until - now)
        # A server whose listener is shut down before it was told to stop may take that for the end of everything, and
        # drop what it holds: such as a Go program with log.Fatal(http.ListenAndServe(…)).
        if self.phase == Phase.STOPPING and not (
            self.former.listens_itself and self.former.told_s() < LISTENER_QUIET_S
        ):
            self._group.former_is_done()
            self.phase = Phase.DONE
        if self.phase != Phase.DONE:
            self._around.loop.later(ROLLOUT_POLL_S, self._poll)

    def _hand_over_waiting(self):
        with contextlib.suppress(OSError):
            while self.former.takes() and (self._waiting or self._group.former_queued()):
                connection = self._waiting.popleft() if self._waiting else self._group.accept_former()
                if not self.former.send(connection):
                    self._waiting.appendleft(connection)
                    return

    def fall_back(self, former: Instance | None) -> Instance | None:
        """The successor cannot have a listener of its own; `former` ends soon. Returns what serves now."""
        if former:
            former.stop(0, SHARED_LISTENER_MAX_S)
        if self.successor and self.successor.listens_itself:
            self.drop()
            self.successor.stop(0, REPLACED_INSTANCE_MAX_S)
            return None  # the next connection starts another at the current listener
        return self.successor

    def former_ended(self) -> list[socket.socket]:
        """The former instance has ended. Returns what it has not taken (the caller's now)."""
        self.phase = Phase.DONE
        self._group.close_former()
        left = list(self._waiting)
        self._waiting.clear()
        return left


class Trials:
    """The rollouts of instances that do not serve yet."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._rollouts: dict[Instance, Rollout] = {}

    def __bool__(self) -> bool:
        return bool(self._rollouts)

    def place(self, instance: Instance, group: ListenerGroup, alone: bool) -> bool:
        """Give `instance` what it needs to start. False while there is no room. Raises OSError.

        It shares the current listener when it is `alone`: no other serves there, or will.
        """
        rollout = Rollout(group, self._around, instance)
        if not rollout.give_listener(alone and not self.at_current_listener()):
            return False
        self._rollouts[instance] = rollout
        return True

    def at_current_listener(self) -> bool:
        """True if one may begin to accept at the current listener: no other may be started there."""
        return any(rollout.shares_current for rollout in self._rollouts.values())

    def get(self, instance: Instance) -> Rollout | None:
        return self._rollouts.get(instance)

    def end(self, instance: Instance) -> None:
        """The trial of `instance` is over: it serves."""
        self._rollouts.pop(instance, None)

    def drop(self, instance: Instance) -> None:
        """`instance` will not serve."""
        if rollout := self._rollouts.pop(instance, None):
            rollout.drop()
