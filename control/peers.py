"""What people ask for about WireGuard peers: create, redeem, remove, list, invite. It knows no HTTP."""

import contextlib
import hmac
import secrets
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

import registry
import vpn_manager
from control.enroll import EnrollPort
from control.events import Emit, attempt, date, timestamp
from control.projection import Projection
from host.errors import EXPECTED, FaasError, StartError


class AfterAnswer(NamedTuple):
    """The answer to a verb must arrive before the verb acts. The caller answers, then calls act() in any case."""

    act: Callable[[], None]


class LockedOut(FaasError):
    """A peer is locked out, and its removal is not written yet."""

    status = HTTPStatus.INSUFFICIENT_STORAGE


class Peers:
    """The peers of the registry, and what follows them: wg0 and peers/."""

    def __init__(
        self,
        known: registry.Registry,
        vpn: vpn_manager.VPNManager,
        enroll: EnrollPort,
        emit: Emit,
        enrolls_openly: bool,
    ) -> None:
        self._registry, self._vpn, self._enroll, self._emit = known, vpn, enroll, emit
        self.enrolls_openly = enrolls_openly
        self._unwritten: set[str] = set()  # names whose removal the disk had no room for
        self.projection = Projection(self._project, lambda: not vpn.files_changed(known.peers()))

    # Keeping wg0 and peers/ as the registry says

    def begin(self) -> None:
        """The first projection. Raises StartError if it would cut off a peer that somebody else gave to wg0."""
        self._lock_out_removed()
        self._adopt()
        self._refuse_strangers()
        self.projection.sync()

    def _project(self) -> None:
        removed = self._lock_out_removed()
        attempt(self._emit, self._adopt)  # files that cannot be read keep nobody in
        self._vpn.project(self._registry.peers(), removed)
        for name in removed:
            self._registry.end_peer_removal(name)
            self._emit('vpn', f'Removed peer: {name}', name=name)

    def _lock_out_removed(self) -> list[str]:
        """Tell WireGuard first: nothing that a disk says may delay it. Returns the names."""
        removed = self._registry.removed_peers()
        self._vpn.lock_out([key for _, key in removed])
        return [name for name, _ in removed]

    def _adopt(self) -> None:
        """Take in the files that a person put into peers/."""
        removed = {name for name, _ in self._registry.removed_peers()}
        known = {peer.name for peer in self._registry.peers()}
        for name, text in self._vpn.peer_files().items():
            if name not in known and name not in removed:
                try:
                    key, preshared, ipv6 = vpn_manager.parse_peer(text)
                    self._registry.add_peer(name, self._vpn.check_peer_key(key), ipv6=ipv6, preshared_key=preshared)
                    self._emit('vpn', f'Adopted peer: {name} → {ipv6}', name=name)
                except FaasError as error:
                    self._vpn.complain(name, str(error))

    def _refuse_strangers(self) -> None:
        removed = {key for _, key in self._registry.removed_peers()}
        known = {peer.public_key for peer in self._registry.peers()}
        strangers = self._vpn.public_keys() - known - removed
        if strangers:
            interface = self._vpn.interface
            raise StartError(
                f'{interface} has a peer that faasd does not know: {sorted(strangers)[0]}',
                f'give it a file in {self._vpn.peers_dir}, or remove it: wg set {interface} peer KEY remove',
            )

    def _welcome(self, peer: registry.Peer) -> dict[str, str]:
        """The answer to a new peer. Should wg0 be away, the peer is kept all the same and follows when it returns."""
        try:
            self.projection.sync()
        except EXPECTED as error:
            text = f'{peer.name} is registered and not yet on {self._vpn.interface}: {error}'
            self._emit('vpn', text, name=peer.name, problem=True)
        return self._vpn.create_client_config(peer.ipv6)

    # Verbs

    def create(self, name: str, public_key: str, by: str) -> tuple[dict[str, str], str]:
        """A peer that `by` asks for, who may do so: (the three fields of the document, the name of the peer)."""
        peer = self._registry.add_peer(name, self._vpn.check_peer_key(public_key))
        self._emit('vpn', f'Created peer: {name} → {peer.ipv6}, by {by}', name=name)
        return self._welcome(peer), peer.name

    def proved_invite(self, invite_id: str, proof: str, nonce: str, body: bytes) -> registry.Invite:
        """The invite of a request whose HMAC is `proof`. Raises BadInvite."""
        invite = self._registry.invite(invite_id)
        # An unknown invite costs as much time as a known one with a wrong proof.
        checked = (invite or registry.Invite('', secrets.token_bytes(32), None, '', 0)).proof(
            'faas1 request', invite_id, nonce, body
        )
        if not hmac.compare_digest(checked.encode(), proof.encode()) or not invite:
            raise registry.BadInvite
        return invite

    def redeem(self, invite: registry.Invite, name: str, public_key: str) -> tuple[dict[str, str], str]:
        """The peer of an invite: (the three fields of the document, the name of the peer)."""
        peer = self._registry.redeem(invite.id, name, self._vpn.check_peer_key(public_key))
        self._emit('vpn', f'Created peer: {peer.name} → {peer.ipv6} (invite {invite.id})', name=peer.name)
        return self._welcome(peer), peer.name

    def remove(self, name: str, by: str, caller_name: str | None = None) -> AfterAnswer | None:
        """Lock a peer out. When it removes itself, the tunnel ends with that: the answer must come first."""
        try:
            self._registry.begin_peer_removal(name)
            self._emit('vpn', f'Removing peer: {name}, by {by}', name=name)
        except FaasError as error:
            if error.status == HTTPStatus.INSUFFICIENT_STORAGE:
                self._lock_out_unwritten(name, error)
            raise
        if name == caller_name:
            return AfterAnswer(self.projection.sync)
        self.projection.sync()
        return None

    def _lock_out_unwritten(self, name: str, error: FaasError) -> None:
        """The disk has no room even for a removal: lock the peer out, and remember it in memory. Raises LockedOut."""
        keys = [peer.public_key for peer in self._registry.peers() if peer.name == name]
        if not keys:
            return
        self._unwritten.add(name)
        self._vpn.lock_out(keys)
        raise LockedOut(f'{name} is locked out, and will be removed when the disk has room: {error}', error.hint)

    def write_removals(self) -> None:
        """Write the removals that the disk had no room for. Raises FaasError while it has none."""
        for name in list(self._unwritten):
            with contextlib.suppress(registry.NotFound):
                self._registry.begin_peer_removal(name)
            self._unwritten.discard(name)
            self.projection.sync()

    def list(self) -> list[dict[str, str]]:
        active = self._vpn.active()
        return [
            {
                'name': peer.name,
                'ipv6': peer.ipv6,
                'created': date(peer.created),
                'status': 'active' if peer.public_key in active else 'inactive',
            }
            for peer in self._registry.peers()
        ]

    def invite(self, name: str | None, lifetime_s: int, admin: bool, by: str) -> dict[str, str | None]:
        with self._enroll.opened():
            invite = self._registry.add_invite(name, 'admin' if admin else 'peer', lifetime_s)
        self._emit('vpn', f'Invited {name or "a peer"} ({invite.id}){" as admin" if admin else ""}, by {by}')
        host, _ = vpn_manager.split_endpoint(self._vpn.endpoint, self._vpn.port)
        api = vpn_manager.join_endpoint(host, self._enroll.port)
        return {
            'token': invite.token(api, self._vpn.endpoint, self._vpn.get_server_public_key()),
            'name': name,
            'expires': timestamp(invite.expires),
        }
