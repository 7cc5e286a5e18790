"""Who may do what."""

from typing import NamedTuple


class Caller(NamedTuple):
    """role: 'local' (unix socket), 'admin', 'peer' (tunnel address), 'newcomer' (enroll address), 'stranger'."""

    role: str
    name: str | None = None


def may(caller: Caller, verb: str, name: str | None = None) -> bool:
    """True if the caller may do that to `name`. No other place decides this."""
    match caller.role:
        case 'local' | 'admin':
            return True
        case 'peer':
            return verb in ('list', 'ip', 'health') or (verb == 'vpn_remove' and name == caller.name)
        case 'newcomer':
            return verb == 'vpn_create'
    return False
