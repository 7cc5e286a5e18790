"""The firewalls of others: Docker, ufw and firewalld drop packets that ours lets through. They are told of our veths.

Our veths are opened in the place that each leaves to others, and only for what our own table has marked where the place
can tell. Nothing is written into their files: after a reload of theirs look() does it again.
"""

import json
import threading
from collections.abc import Callable
from typing import NamedTuple

from host import egress_rules, process
from host.errors import EXPECTED, FaasError

VETHS = f'{egress_rules.LINKS}+'  # as iptables and firewalld write a wildcard
COMMENT = 'faasd'
# Who, its chain for the rules of others, and the directions that need one. ufw lets answers through by itself.
CHAINS = (
    ('Docker', 'DOCKER-USER', ('-i', '-o')),
    *(('ufw', f'{ufw}-user-{hook}', ('-i',)) for ufw in ('ufw', 'ufw6') for hook in ('forward', 'input')),
)
HOOKS = ('input', 'forward')
ZONE = 'trusted'  # firewalld has it always, and lets everything through that comes from it
FAMILIES = {'iptables': 'ip', 'ip6tables': 'ip6'}


class Shut(FaasError):
    """A firewall of others drops what functions send."""

    status = 503


class Seen(NamedTuple):
    """What is there of others: the chains of nftables, as JSON has them, and the rules of iptables by program."""

    chains: list[dict]
    rules: dict[str, list[str]]

    @property
    def firewalld(self) -> bool:
        return any(chain['table'] == 'firewalld' for chain in self.chains)

    def wanted(self) -> list[tuple[str, str, str]]:
        """(program, who, rule) for each rule that iptables should have."""
        return [
            (program, who, f'{chain} {way} {VETHS} -m mark --mark {egress_rules.MARK:#x}'
                           f' -m comment --comment {COMMENT} -j ACCEPT')
            for program, lines in self.rules.items()
            for who, chain, ways in CHAINS
            if f'-N {chain}' in lines
            for way in ways
        ]  # fmt: skip


class ForeignFirewalls:
    """Opens our veths in the firewalls of others while `look(True)` is called, from one thread or several."""

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit, self._lock = emit, threading.Lock()
        self._open: bool | None = None  # None: a killed faasd may have left something

    def open(self) -> None:
        """Open them before the first veth; later it costs nothing. What cannot be opened is for look() to say."""
        if not self._open:
            try:
                self.look(True)
            except EXPECTED:
                self._open = True

    def look(self, wanted: bool) -> bool:
        """Make it so. False: there is nothing to look at. Raises Shut when something drops what functions send."""
        with self._lock:
            if not wanted:
                if self._open is not False:
                    self._close()
                self._open = False
                return True
            self._open = True
            return self._look()

    def close(self) -> None:
        """Take everything away. Raises CommandError."""
        self.look(False)

    def _look(self):
        seen = look_around()
        opened = set()
        for program, who, rule in seen.wanted():
            if f'-A {rule}' not in seen.rules[program]:
                process.run([program, '-w', '5', '-I', *rule.split()])
                opened.add(who)
        if seen.firewalld and not _has_zone():
            process.run(['firewall-cmd', f'--zone={ZONE}', f'--change-interface={VETHS}'])
            opened.add('firewalld')
        for who in sorted(opened):
            self._emit('egress', f'{who} drops what functions send: it lets {VETHS} through now')
        if shut := list(strangers(seen)):
            raise Shut(f'{" and ".join(shut)} may drop what functions send: let {VETHS} through there, in and out')
        return True

    def _close(self):
        seen = look_around()
        closed = set()
        for program, who, rule in seen.wanted():
            if f'-A {rule}' in seen.rules[program]:
                process.run([program, '-w', '5', '-D', *rule.split()])
                closed.add(who)
        if seen.firewalld and _has_zone() == ZONE:
            process.run(['firewall-cmd', f'--zone={ZONE}', f'--remove-interface={VETHS}'])
            closed.add('firewalld')
        for who in sorted(closed):
            self._emit('egress', f'{who} no longer lets {VETHS} through: no function needs it')


def look_around() -> Seen:
    """What others have put into the kernel. Raises CommandError."""
    listed = json.loads(process.run(['nft', '-j', 'list', 'chains']).stdout)['nftables']
    chains = [each['chain'] for each in listed if 'chain' in each]
    rules = {}
    for program, family in FAMILIES.items():
        has_table = any(chain['family'] == family and chain['table'] == 'filter' for chain in chains)
        if (has_table or _is_legacy(family)) and process.installed(program):
            # A table of that name that nft has made is none of iptables, which says so and fails.
            rules[program] = process.run([program, '-w', '5', '-S'], ok=range(256)).stdout.splitlines()
    return Seen(chains, rules)


def _is_legacy(family):
    """True if the kernel has tables of iptables-legacy. nft does not list them."""
    try:
        with open(f'/proc/net/{family}_tables_names') as file:
            return 'filter\n' in file
    except FileNotFoundError:
        return False


def _has_zone():
    """The zone of firewalld that our veths are in: ours, 'another', or None."""
    text = process.run(['nft', 'list', 'chain', 'inet', 'firewalld', 'filter_INPUT_ZONES'], ok=range(256)).stdout
    lines = [line for line in text.splitlines() if f'"{egress_rules.LINKS}*"' in line]
    return (ZONE if lines[0].endswith(f'_{ZONE}') else 'another') if lines else None


def strangers(seen: Seen) -> list[str]:
    """What drops everything at input or forward that it does not know, and has no place that we know."""
    for program, lines in seen.rules.items():
        known = [chain for _, chain, _ in CHAINS if f'-N {chain}' in lines]
        for hook in HOOKS:
            name = hook.upper()
            ends = (f'-P {name} DROP', f'-A {name} -j DROP', f'-A {name} -j REJECT')
            drops = any(line.startswith(ends) for line in lines)
            ours = any(hook in chain for chain in known) or (hook == 'forward' and 'DOCKER-USER' in known)
            if drops and not ours and not any(line.startswith(f'-A {name} -i {egress_rules.LINKS}') for line in lines):
                yield f'{name} of {program}'
    for chain in seen.chains:
        of_iptables = chain['family'] in FAMILIES.values() and chain['table'] == 'filter'
        if chain.get('hook') in HOOKS and chain.get('policy') == 'drop' and not of_iptables:
            place = [chain['family'], chain['table'], chain['name']]
            text = process.run(['nft', 'list', 'chain', *place], ok=range(256)).stdout
            if chain['family'] in ('inet', 'ip', 'ip6') and f'"{egress_rules.LINKS}' not in text:
                yield f'the chain {" ".join(place)} of nftables'


if __name__ == '__main__':  # install.sh, where faasd is gone: take away what it has left
    ForeignFirewalls(lambda area, text: print(f'install: {text}')).close()
