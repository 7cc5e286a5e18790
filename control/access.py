"""Who may do what."""

from typing import NamedTuple


class Caller(NamedTuple):
    """role: 'local' (unix socket), 'admin', 'peer' (tunnel address), 'newcomer' (enroll address), 'stranger'."""

    role: str
    name: str | None = None
    uid: int | None = None  # of the process at the unix socket

    def __str__(self) -> str:
        """For the log: 'peer laptop', 'local (uid 0)', 'newcomer', 'stranger'."""
        if self.role == 'local':
            return f'local (uid {self.uid})'
        return f'peer {self.name}' if self.name else self.role


def may(caller: Caller, verb: str, name: str | None = None) -> bool:
    """True if the caller may do that to `name`. No other place decides this."""
    if verb == 'mount':  # folders of the server are root's to give
        return caller.role == 'local' and caller.uid == 0
    match caller.role:
        case 'local' | 'admin':
            return True
        case 'peer':
            return verb in ('list', 'ip', 'health') or (verb == 'vpn_remove' and name == caller.name)
        case 'newcomer':
            return verb == 'vpn_create'
    return False
