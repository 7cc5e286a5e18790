"""The programs that faasd runs itself with --standalone: wireguard-go and CoreDNS."""

import contextlib
import json
import subprocess
import threading
import time
from typing import BinaryIO

import registry
from control.events import Emit
from control.health import Report
from dns_manager import DNSZoneManager
from host import files, process
from host.errors import StartError
from vpn_manager import VPNManager

# CoreDNS reads what strangers send. It is nobody's, and may only bind port 53; setpriv(1) becomes the program.
UNPRIVILEGED = [
    *('setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', '--no-new-privs'),
    *(f'--{kind}=-all,+net_bind_service' for kind in ('inh-caps', 'ambient-caps', 'bounding-set')),
]
QUERY_ERRORS_S = 60  # of failing queries, one is told in this time


class Supervisor:
    """Makes wg0 and runs CoreDNS. `record_file` names both, so that a next run can end what a killed run left."""

    def __init__(self, vpn: VPNManager, dns: DNSZoneManager, record_file: str, emit: Emit, report: Report) -> None:
        self._vpn, self._dns, self._record_file = vpn, dns, record_file
        self._emit, self._report = emit, report
        self._children: dict[str, subprocess.Popen] = {}

    def end_leftovers(self) -> None:
        """End the children and remove the interface of a run that was killed."""
        try:
            with open(self._record_file) as file:
                record = json.load(file)
        except FileNotFoundError:
            return
        except ValueError:
            record = {'children': {}, 'interface': [None, None]}
        for name, (pid, started) in record['children'].items():
            if process.end(pid, started):
                self._emit('faasd', f'Ended {name}, left by a run that was killed')
        interface, index = record['interface']
        if interface == self._vpn.interface and index in (0, self._vpn.index()):  # 0: it was being made
            self._vpn.take_down()
        files.remove_file(self._record_file)

    def _record(self) -> None:
        children = {name: [child.pid, process.start_time(child.pid)] for name, child in self._children.items()}
        record = {'interface': [self._vpn.interface, self._vpn.index()], 'children': children}
        files.write_file(self._record_file, json.dumps(record))

    def bring_up(self, undo: contextlib.ExitStack) -> None:
        """Make wg0. Raises StartError when somebody else has the interface."""
        if self._vpn.index():
            raise StartError(
                f'there is an interface {self._vpn.interface} already',
                'run faasd.py without --standalone if it is for faasd, or set FAAS_WG_INTERFACE to another name',
            )
        undo.callback(files.remove_file, self._record_file)
        undo.callback(self._take_down)
        self._make_interface()

    def _make_interface(self) -> None:
        self._record()
        child = self._vpn.bring_up()
        if child:
            self._children['wireguard-go'] = child
        self._record()
        how = ' (wireguard-go)' if child else ''
        self._emit('vpn', f'{self._vpn.interface} is up at {registry.GATEWAY}, UDP port {self._vpn.port}{how}')

    def remake_interface(self) -> None:
        """Make wg0 again after it is gone."""
        child = self._children.pop('wireguard-go', None)
        if child:
            process.finish(child)
        self._make_interface()

    def _take_down(self) -> None:
        self._vpn.take_down(self._children.pop('wireguard-go', None))

    def start_coredns(self, undo: contextlib.ExitStack, forwarders: list[str]) -> None:
        undo.callback(self._stop_coredns)
        self._run_coredns()
        if self._dns.wait_served('ns', registry.GATEWAY, timeout_s=5):
            others = ' '.join(forwarders) or 'nobody'
            self._emit('dns', f'CoreDNS answers for faas at {registry.GATEWAY}; other names go to {others}')
        else:
            self._emit('dns', f'CoreDNS does not answer at {registry.GATEWAY}', problem=True)

    def _run_coredns(self) -> None:
        child = process.start([*UNPRIVILEGED, 'coredns', '-quiet', '-conf', self._dns.corefile], output=True)
        self._children['coredns'] = child
        self._record()
        threading.Thread(target=self._read_coredns, args=(child.stdout,), name='coredns', daemon=True).start()

    def _read_coredns(self, output: BinaryIO) -> None:
        """Tell what troubles CoreDNS. Its line for each query is not kept."""
        told = 0
        with output:
            for line in output:
                of_a_query = b'plugin/errors' in line
                too_soon = time.monotonic() < told + QUERY_ERRORS_S
                if b'[INFO]' in line or b'maxprocs:' in line or (of_a_query and too_soon):
                    continue
                if of_a_query:
                    told = time.monotonic()
                text = f'CoreDNS: {line.decode(errors="replace").strip()}'
                self._emit('dns', text, problem=not of_a_query)

    def _stop_coredns(self) -> None:
        child = self._children.pop('coredns', None)
        if child:
            process.finish(child)

    def look_after_coredns(self) -> bool:
        """Start CoreDNS again if it has ended; False then, since nothing is known of the new one."""
        child = self._children.get('coredns')
        if child and child.poll() is not None:
            self._report('dns', f'CoreDNS ended with exit code {child.returncode}')
            self._run_coredns()
            return False
        return True

    def kill(self) -> None:
        """End the children at once, when faasd itself cannot end in order."""
        for child in self._children.values():
            child.kill()
