"""What a function may reach, and the nftables rules for that."""

import ipaddress
import re
from collections.abc import Iterable
from typing import NamedTuple

# Never the internet. Of IPv6, only 2000::/3 is it.
NOT_INTERNET_4 = (
    '0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, 192.0.0.0/24, 192.168.0.0/16, '
    '198.18.0.0/15, 224.0.0.0/3'
)
NOT_INTERNET_6 = '2001::/32, 2002::/16'  # tunnels to IPv4 addresses
MARK = 0xFAA6  # on what the egress table has let through; see host/firewall.py
LINKS = 'faas-'  # what the names of all veths begin with: one wildcard serves every firewall
MOST_FLOWS = 2048  # of one instance that the kernel tracks at a time

LABEL = '[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?'
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Target(NamedTuple):
    """kind: 'functions', 'internet', 'host', 'network' or 'name'. `port` None: every port."""

    kind: str
    what: Network | str | None = None
    port: int | None = None


def parse(text: str) -> Target:
    """The Target of 'functions', 'internet', 'host:5432', 'db.example.com:5432', '10.1.2.0/24:5432', '[fd00::/8]:80'.

    Raises ValueError.
    """
    if text in ('functions', 'internet'):
        return Target(text)
    found = re.fullmatch(r'\[([^\]]+)\](?::([0-9]{1,5}))?|([^:\[\]]+)(?::([0-9]{1,5}))?', text, re.ASCII)
    if not found:
        raise ValueError(f'{text!r} is not something to reach')
    place, digits = found[1] or found[3], found[2] or found[4]
    port = int(digits) if digits else None
    if port is not None and not 0 < port < 65536:
        raise ValueError(f'{port} is not a port')
    if place == 'host':
        if port is None:
            raise ValueError('host needs a port')
        return Target('host', None, port)
    if re.fullmatch(r'[0-9./]+|.*:.*', place):
        network = ipaddress.ip_network(place)
        if network.version == 6 and (network.network_address.ipv4_mapped or '%' in place or not found[1]):
            raise ValueError(f'{place} is not a network')
        return Target('network', network, port)
    name = place.lower()
    if len(name) > 253 or not re.fullmatch(rf'({LABEL}\.)+{LABEL}', name):
        raise ValueError(f'{place!r} is not a name')
    return Target('name', name, port)


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """True if it is of the internet."""
    never = NOT_INTERNET_4 if address.version == 4 else NOT_INTERNET_6
    if any(address in ipaddress.ip_network(each) for each in never.split(', ')):
        return False
    return address.version == 4 or address in ipaddress.ip_network('2000::/3')


class Place(NamedTuple):
    """Where the table stands: its name, and the addresses of this server."""

    table: str
    gateway: str  # of wg0: CoreDNS for every name
    zone_server: str  # CoreDNS for faas alone
    host4: str  # the veths' own addresses
    host6: str


def base(place: Place, local: Iterable[Network]) -> str:
    """The table without functions. `local` are the networks that this server is in: they are not the internet."""
    four = ', '.join([NOT_INTERNET_4, *(str(each) for each in local if each.version == 4)])
    six = ', '.join([NOT_INTERNET_6, *(str(each) for each in local if each.version == 6)])
    return f"""\
table inet {place.table}
delete table inet {place.table}
table inet {place.table} {{
  set local4 {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {four} }} }}
  set local6 {{ type ipv6_addr; flags interval; auto-merge; elements = {{ {six} }} }}
  map forwarded {{ type ifname : verdict; }}
  map received {{ type ifname : verdict; }}
  map translated {{ type ifname : verdict; }}
  chain forward {{ type filter hook forward priority filter - 1; policy accept;
    oifname "faas-*" ct state established,related meta mark set {MARK:#x} accept
    oifname "faas-*" counter drop
    iifname "faas-*" iifname vmap @forwarded
    iifname "faas-*" counter reject with icmpx admin-prohibited
  }}
  chain input {{ type filter hook input priority filter - 1; policy accept;
    iifname "faas-*" iifname vmap @received
    iifname "faas-*" counter reject with icmpx admin-prohibited
  }}
  chain prerouting {{ type nat hook prerouting priority dstnat; policy accept;
    iifname "faas-*" iifname vmap @translated
  }}
  chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;
    iifname "faas-*" oifname != "faas-*" masquerade
  }}
}}
"""


def chains(place: Place, link: str, ipv4: str, ipv6: str, targets: Iterable[Target]) -> str:
    """The rules of one instance behind the veth `link`. Names have sets `link`-4-PORT, `link`-6-PORT; 0: every port."""
    name = link.replace('-', '_')
    out, received, translated, sets = [], [], [], set()
    for target in targets:
        ports = f'meta l4proto {{ 6, 17 }} th dport {target.port}' if target.port else ''
        if target.kind == 'functions':
            received.append('ip6 daddr fd00:faa5:1::/48 tcp dport 80')
            received.append(f'ip6 daddr {place.zone_server} meta l4proto {{ 6, 17 }} th dport 53')
        elif target.kind == 'internet':
            received.append(f'ip6 daddr {place.gateway} meta l4proto {{ 6, 17 }} th dport 53')
            out += ['ip daddr != @local4', 'ip6 daddr 2000::/3 ip6 daddr != @local6']
        elif target.kind == 'host':
            translated.append(f'ip daddr {place.host4} {ports} dnat ip to 127.0.0.1')
            received.append(f'ct status dnat ct original ip daddr {place.host4} {ports}')
        elif target.kind == 'network':
            version = 'ip' if target.what.version == 4 else 'ip6'
            out.append(f'{version} daddr {target.what} {ports}')
        elif target.kind == 'name':
            for version, number in (('ip', 4), ('ip6', 6)):
                kind = set_name(link, number, target.port)
                sets.add(f'set {kind} {{ type ipv{number}_addr; flags timeout; }}')
                out.append(f'{version} daddr @{kind} {ports}')
    bound = [f'ip saddr != {ipv4} counter drop', f'ip6 saddr != {ipv6} counter drop']
    # What the kernel does not track is not masqueraded: it would leave with the instance's own address.
    known = ['ct state established,related meta mark set {mark} accept', 'ct state != new counter drop']
    limit = f'jump {name}_flows'  # one rule for both chains, so that both count together
    lines = {
        f'{name}_flows': [f'ct count over {MOST_FLOWS} counter drop'],
        f'{name}_forward': [*bound, *known, limit,
                            *(f'{each} meta mark set {{mark}} accept' for each in out)],
        f'{name}_input': [*bound, *known, limit,
                          *(f'{each} meta mark set {{mark}} accept' for each in dict.fromkeys(received))],
        f'{name}_nat': translated,
    }  # fmt: skip
    end = 'counter reject with icmpx admin-prohibited'
    text = [f'table inet {place.table} {{', *sorted(sets)]
    for chain, rules in lines.items():
        rules = [*rules, *([end] if chain.endswith(('_forward', '_input')) else [])]
        text += [f'chain {chain} {{', *(rule.replace('{mark}', f'{MARK:#x}') for rule in rules), '}']
    text.append('}')
    for kind, chain in (('forwarded', 'forward'), ('received', 'input'), ('translated', 'nat')):
        text.append(f'add element inet {place.table} {kind} {{ "{link}" : goto {name}_{chain} }}')
    return '\n'.join(text) + '\n'


def without(place: Place, link: str, targets: Iterable[Target]) -> str:
    """Take the rules of one instance away."""
    name = link.replace('-', '_')
    text = []
    for kind, chain in (('forwarded', 'forward'), ('received', 'input'), ('translated', 'nat')):
        text.append(f'delete element inet {place.table} {kind} {{ "{link}" }}')
        text.append(f'delete chain inet {place.table} {name}_{chain}')
    text.append(f'delete chain inet {place.table} {name}_flows')
    ports = {target.port for target in targets if target.kind == 'name'}
    text += [f'delete set inet {place.table} {set_name(link, number, port)}' for port in ports for number in (4, 6)]
    return '\n'.join(text) + '\n'


def set_name(link: str, version: int, port: int | None) -> str:
    """The set of the addresses of names that the instance behind `link` may reach at `port`."""
    return f'{link.replace("-", "_")}_v{version}_{port or 0}'
