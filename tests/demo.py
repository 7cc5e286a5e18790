"""`make demo`: the whole story on this machine, between two hosts of its own, every command with its real output.

Each step says what must be seen; the first that shows something else ends the demo with exit status 1. Nothing stays
behind, whichever way it ends.
"""
import contextlib
import fcntl
import os
import pathlib
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time

from tests import lab

ENDPOINT = '203.0.113.10'
GATEWAY = 'fd00:faa5:0:100::1'
URL = "'http://fibonacci.faas/?n=10'"                # as the shell takes it: zsh takes ? for a pattern
ANSWER = '0, 1, 1, 2, 3, 5, 8, 13, 21, 34'
COMMAND_TIMEOUT_S = 60
TERMINAL = sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
COLOURS = TERMINAL and not os.environ.get('NO_COLOR')

REAL_SERVER = f'''
On a real server (Debian 12, Ubuntu 24.04 or newer; UDP and TCP port 51820 reachable):

  make deps
  sudo make install FAAS_VPN_ENDPOINT=faas.example.com
  sudo faas new fibonacci
  sudo faas vpn invite

On your laptop, which needs wireguard-tools and the one file `faas`, paste what invite printed:

  ./faas vpn connect --invite - <<'EOF'
  faas1_…
  EOF
  curl {URL}
'''


class StepFailed(Exception):
    """A command did not do what the story says; one line says what was missed."""


class Stage:
    """Two hosts and a screen. Prints whole lines only, so that the server's log and a command's output do not mix."""

    def __init__(self, server, laptop):
        self.server, self.laptop = server, laptop
        self._lock = threading.Lock()

    def line(self, text='', colour=None):
        with self._lock:
            print(f'\033[{colour}m{text}\033[0m' if colour and COLOURS else text, flush=True)

    def chapter(self, text):
        self.line()
        for line in textwrap.wrap(text, 100):
            self.line(f'# {line}', '1')

    def prompt(self, host, command):
        prompt, colour = ('server#', 32) if host is self.server else ('laptop$', 36)
        self.line(f'\033[1;{colour}m{prompt}\033[0m {command}' if COLOURS else f'{prompt} {command}')

    def type(self, host, command, *seen, exit_code=0):
        """Show and run a command of one line; returns its output.

        Raises StepFailed when a text of `seen` is not in it or the exit code is another.
        """
        self.prompt(host, command)
        process, stream = self._start(host, ['sh', '-c', command])
        watchdog = threading.Timer(COMMAND_TIMEOUT_S, process.kill)
        watchdog.daemon = True
        watchdog.start()
        output = []
        with stream:
            for line in lines(stream):
                output.append(line)
                self.line(line)
        code = process.wait()
        watchdog.cancel()
        if code:
            self.line(f'(exit status {code})', '2')
        output = '\n'.join(output)
        if code != exit_code:
            raise StepFailed(f'`{command}` ended with {code}, not with {exit_code}')
        for text in seen:
            if text not in output:
                raise StepFailed(f'`{command}` did not show: {text}')
        return output

    @contextlib.contextmanager
    def running(self, host, command, ready, env):
        """Show and start a python3 command that stays, its log in dim lines; goes on when one has `ready` in it."""
        settings = ''.join(f'{key}={value} ' for key, value in env.items())
        self.prompt(host, f'{settings}{command}')
        process = host.popen([sys.executable, *shlex.split(command)[1:]], env=env, text=True, errors='replace',
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        log, decided = [], threading.Event()

        def follow():
            for line in process.stdout:
                log.append(line)
                self.line(f'  {line.rstrip()}', '2')
                if ready in line:
                    decided.set()
            decided.set()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        decided.wait(COMMAND_TIMEOUT_S)
        if not any(ready in line for line in log):
            raise StepFailed(f'`{command}` did not start')
        yield process
        process.wait(COMMAND_TIMEOUT_S)
        follower.join()
        process.stdout.close()
        if any('Traceback' in line for line in log):
            raise StepFailed(f'`{command}` stumbled: see its log above')

    def _start(self, host, argv):
        """(process, file of its output): on a terminal of its own if we are on one, else on a pipe."""
        if not TERMINAL:
            process = host.popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            return process, process.stdout
        ours, theirs = pty.openpty()
        size = fcntl.ioctl(sys.stdout, termios.TIOCGWINSZ, struct.pack('8x'))
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        try:
            process = host.popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        finally:
            os.close(theirs)
        return process, open(ours, 'rb', buffering=0)


def lines(stream):
    """The lines of a binary stream as they come, without their ends."""
    rest = b''
    with contextlib.suppress(OSError):              # a terminal's end is EIO
        while chunk := os.read(stream.fileno(), 4096):
            *whole, rest = (rest + chunk).split(b'\n')
            yield from (line.rstrip(b'\r').decode(errors='replace') for line in whole)
    if rest:
        yield rest.decode(errors='replace')


def by_hand(stage, *seen, exit_code):
    """On the laptop, without faas: bring the kept key up on an interface of its own and ping the server through it."""
    laptop = stage.laptop
    kernel = laptop.run(['ip', 'link', 'add', 'wg-probe', 'type', 'wireguard'], ok=None).returncode == 0
    if kernel:
        laptop.run(['ip', 'link', 'delete', 'wg-probe'])
    stage.type(laptop, 'ip link add wg-hand type wireguard' if kernel else 'wireguard-go wg-hand 2>/dev/null')
    stage.type(laptop, 'wg setconf wg-hand kept.conf')
    stage.type(laptop, 'ip address add fd00:faa5:0:100::a/64 dev wg-hand && ip link set wg-hand up')
    stage.type(laptop, f'ping -c 2 -W 2 {GATEWAY}', *seen, exit_code=exit_code)
    handshake = stage.type(laptop, 'wg show wg-hand latest-handshakes')
    stage.type(laptop, 'ip link delete wg-hand')
    return int(handshake.split()[-1])


def story(stage):
    server, laptop = stage.server, stage.laptop
    for host in (server, laptop):
        host.path('/root/.curlrc').write_text('no-progress-meter\n')

    stage.chapter('A server with nothing prepared: faasd makes keys, WireGuard and CoreDNS itself.')
    with stage.running(server, 'python3 faasd.py --standalone', 'Ready', {'FAAS_VPN_ENDPOINT': ENDPOINT}) as faasd:
        stage.chapter('Deploy a function, and invite a laptop.')
        stage.type(server, './faas new fibonacci', 'fd00:faa5:1:0::a', 'fibonacci.faas')
        invite = stage.type(server, './faas vpn invite')
        pasted = re.search(r"./faas vpn connect.* --invite - <<'EOF'\nfaas1_\S+\nEOF\n", f'{invite}\n')
        if not pasted:
            raise StepFailed('`./faas vpn invite` printed nothing to paste on the laptop')

        stage.chapter('The laptop joins with that, and calls the function by its name, through the tunnel.')
        stage.type(laptop, f'curl {URL}', exit_code=6)
        stage.type(laptop, pasted[0], 'Connected!', 'fd00:faa5:0:100::a')
        stage.type(laptop, f'curl {URL}', ANSWER)
        stage.type(laptop, 'ip -6 route get fd00:faa5:1:0::a', 'dev wg-faas')
        stage.type(laptop, './faas vpn status', 'Connected', ENDPOINT, 'Active')
        stage.type(laptop, './faas vpn list', 'default', 'active')
        stage.type(laptop, 'wg showconf wg-faas >kept.conf')

        stage.chapter('Disconnected, the name means nothing to the laptop. (The key kept by hand would still do.)')
        stage.type(laptop, './faas vpn disconnect', 'Disconnected.')
        stage.type(laptop, f'curl {URL}', 'Could not resolve host', exit_code=6)
        if not by_hand(stage, ' 0% packet loss', exit_code=0):
            raise StepFailed('the key did not work by hand before it was removed')

        stage.chapter('Connect again, from the saved configuration.')
        stage.type(laptop, './faas vpn connect', 'Found existing config: default', 'Connected!')
        stage.type(laptop, f'curl {URL}', ANSWER)

        stage.chapter('Removed is locked out: the kept key, brought up by hand as before, gets no answer any more.')
        stage.type(laptop, './faas vpn remove', 'Removed VPN configuration: default')
        if stage.type(server, 'wg show wg0 peers'):
            raise StepFailed('the server still knows the peer')
        if by_hand(stage, '100% packet loss', exit_code=1):
            raise StepFailed('the removed key still made a handshake')

        stage.chapter('Stop the server: what it set up goes with it.')
        stage.prompt(server, '^C')
        faasd.send_signal(signal.SIGINT)
    if faasd.returncode:
        raise StepFailed(f'faasd ended with {faasd.returncode}, not with 0')
    stage.type(server, 'ip link show wg0', 'does not exist', exit_code=1)


def machine():
    """What this machine has of the things that the story makes, and its resolv.conf."""
    places = [f'/sys/class/net/{link}' for link in ('wg0', 'wg-faas', 'wg-hand', 'eth0', 'eth1')]
    places += ['/etc/wireguard/wg0.conf', '/etc/coredns', '/etc/faasd', '/var/lib/faasd', '/run/faasd', '/run/faas']
    table = subprocess.run(['nft', 'list', 'table', 'inet', 'faas'], capture_output=True).returncode == 0
    return [os.path.exists(place) for place in places], table, pathlib.Path('/etc/resolv.conf').read_bytes()


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `make demo | head` ends quietly; the hosts end with us
    started, before = time.monotonic(), machine()
    try:
        with lab.pair() as (server, laptop):
            stage = Stage(server, laptop)
            stage.line(f'Two hosts on this machine, joined by a cable: server {ENDPOINT}, laptop 203.0.113.20.')
            story(stage)
        if machine() != before:
            raise StepFailed('it left something on this machine itself')
    except KeyboardInterrupt:
        print('\nInterrupted; both hosts and all that ran in them are gone.', file=sys.stderr)
        return 130
    except (StepFailed, RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
        print(f'\nThe demo failed: {error}', file=sys.stderr)
        return 1
    print(f'\nThat was all, in {time.monotonic() - started:.0f} s. Both hosts are gone, this machine is as before.')
    print(REAL_SERVER)
    return 0


if __name__ == '__main__':
    sys.exit(main())
