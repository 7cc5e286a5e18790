"""The nftables table: what peers reach, and what a passed socket may open."""

import re

from host import egress_rules, process
from host.errors import FaasError

MARK = 0xFAA5  # on every socket that is handed out; see RULES

# Who may talk to what. The mark rules belong to the hand-off: a function holds sockets of the host's network, and
# AF_UNSPEC plus connect() or bind() plus listen() would otherwise make them a way into it. They look at SYNs only, so
# running answers survive a reload of the table. Protocols are numbers (ICMPv6, TCP, UDP): a small server may lack
# /etc/protocols. What comes from the veth of an instance, or goes there, is marked by the table of egress.py; without
# that table nothing passes.
RULES = """\
table inet {table}
delete table inet {table}
table inet {table} {{
  chain input {{ type filter hook input priority filter; policy accept;
    iifname "faas-*" meta mark != {egress_mark:#x} counter drop
    ip6 daddr fd00:faa5::/32 iifname != {{ "{interface}", "lo" }} iifname != "faas-*" counter drop
    socket mark {mark:#x} tcp flags & (syn | ack) == syn ip6 daddr fd00:faa5:1::/48 tcp dport 80 accept
    socket mark {mark:#x} tcp flags & (syn | ack) == syn counter drop
    iifname != "{interface}" return
    ct state established,related accept
    meta l4proto 58 accept
    ip6 daddr fd00:faa5:1::/48 tcp dport 80 accept
    ip6 daddr {{ {gateway}, {zone_server} }} meta l4proto {{ 6, 17 }} th dport 53 accept
    ip6 daddr {gateway} tcp dport 8080 accept
    counter reject
  }}
  chain output {{ type filter hook output priority filter; policy accept;
    socket mark {mark:#x} oifname != "{interface}" oifname != "lo" oifname != "faas-*" counter drop
    socket mark {mark:#x} tcp flags & (syn | ack) == syn counter drop
  }}
  chain forward {{ type filter hook forward priority filter; policy accept;
    iifname "{interface}" counter drop
    oifname "{interface}" counter drop
    iifname "faas-*" meta mark != {egress_mark:#x} counter drop
    oifname "faas-*" meta mark != {egress_mark:#x} counter drop
  }}
}}
"""


class FirewallError(FaasError):
    """The table cannot be put in place."""

    status = 503


class Firewall:
    """Keeps `table` (family inet) for the WireGuard `interface` and the server's two addresses."""

    def __init__(self, table: str, interface: str, gateway: str, zone_server: str) -> None:
        self.table = table
        self._interface, self._gateway, self._zone_server = interface, gateway, zone_server
        self._loaded = None  # the table as it was when it was loaded

    def load(self) -> None:
        """Put the nftables table in place; raises FirewallError: without it no socket may be handed out."""
        rules = RULES.format(
            table=self.table,
            interface=self._interface,
            gateway=self._gateway,
            zone_server=self._zone_server,
            mark=MARK,
            egress_mark=egress_rules.MARK,
        )
        try:
            process.run(['nft', '-f', '-'], input=rules)
        except process.CommandError as error:
            raise FirewallError(
                f'the nftables table inet {self.table} cannot be loaded: {_reason(error)}',
                'a passed socket opens the host without it; install nftables (make deps), and a kernel with nft_socket',
            ) from error
        self._loaded = self._listing()

    def is_loaded(self) -> bool:
        """True if the table is as load() left it: no flush, no rule less, no rule in the place of another.

        Raises FirewallError when nft could not look. The table may be there then, or not.
        """
        return self._loaded is not None and self._listing() == self._loaded

    def _listing(self) -> str | None:
        """The table as nft sees it, less what changes by itself; None if there is none. Raises FirewallError."""
        try:
            text = process.run(['nft', '--json', 'list', 'table', 'inet', self.table]).stdout
        except process.CommandError as error:
            if error.exit_code == 1 and 'No such file or directory' in error.stderr:
                return None
            raise self._unknown(_reason(error)) from error
        except OSError as error:  # nft could not be started: no descriptor, process or memory is left
            raise self._unknown(error.strerror) from error
        return re.sub(r'"(handle|packets|bytes)": \d+', '', text)

    def _unknown(self, why: str) -> FirewallError:
        return FirewallError(
            f'the nftables table inet {self.table} cannot be looked at: {why}', f'nft list table inet {self.table}'
        )

    def remove(self) -> None:
        """Take the table away; it may be gone already. Raises CommandError."""
        process.run(['nft', '-f', '-'], input=f'table inet {self.table}\ndelete table inet {self.table}\n')


def _reason(error: process.CommandError) -> str:
    """What nft says, in one line. Below that line nft points to the place."""
    found = re.search(r'Error: (.*)', error.stderr)
    return found[1] if found else error.reason
