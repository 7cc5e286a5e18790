"""What heals the network of faasd: its nftables table, and wg0."""

import registry
from control.health import Problems
from control.peers import Peers
from control.projection import Projection
from control.supervisor import Supervisor
from handlers.serving.server import FaaSServer
from host.firewall import Firewall, FirewallError
from vpn_manager import VPNError, VPNManager


class Repairs:
    """Checks for the monitor. `supervisor` is None where faasd does not make wg0 itself."""

    def __init__(
        self,
        known: registry.Registry,
        vpn: VPNManager,
        firewall: Firewall,
        server: FaaSServer,
        peers: Peers,
        addresses: Projection,
        supervisor: Supervisor | None,
        problems: Problems,
    ) -> None:
        self._registry, self._vpn, self._firewall, self._server = known, vpn, firewall, server
        self._peers, self._addresses, self._supervisor, self._problems = peers, addresses, supervisor, problems
        self._permitted = True  # as FaaSServer begins

    def table(self) -> None:
        """Load the table again. Nothing is handed out without it. Raises FirewallError when that cannot be told."""
        try:
            loaded = self._firewall.is_loaded()
        except FirewallError:
            self._permit(False)
            raise
        if loaded:
            return self._permit(True)
        self._permit(False)
        self._problems.report(
            'rules', f'the nftables table inet {self._firewall.table} was taken away: nothing is handed out without it'
        )
        self._firewall.load()
        self._permit(True)

    def _permit(self, permitted: bool) -> None:
        if permitted != self._permitted:
            self._permitted = permitted
            self._server.permit(permitted)

    def missing_interface(self) -> bool:
        """Make wg0 again when it is gone. False when it is there or stays away: this tells nothing of its state."""
        if self._vpn.index():
            return False
        interface = self._vpn.interface
        self._problems.report(interface, f'{interface} is gone: no function can be reached until it is back')
        if not self._supervisor:
            return False
        self._supervisor.remake_interface()
        return self.interface()

    def interface(self) -> bool:
        """Give wg0 what it lacks: its address, the addresses of functions, peers."""
        interface = self._vpn.interface
        if not self._vpn.index():
            return False
        try:
            self._vpn.check_interface()
        except VPNError as error:
            self._problems.report(interface, str(error))
            if not self._supervisor:
                return False
            self._vpn.set_up()
            self._vpn.check_interface()
        self._addresses.sync()
        # `systemctl reload wg-quick@wg0` leaves only the peers of wg0.conf.
        if interface in self._problems or not self._vpn.holds(self._registry.peers()):
            self._peers.projection.sync()
        return True
