"""The settings: one table, read from the environment, then from a file, then from the defaults."""

import contextlib
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from control.events import printable
from handlers.containers.bundle import ID_RANGE
from handlers.containers.containers import ID_SLOTS
from handlers.containers.private import read_places
from handlers.images import wants
from handlers.images.wants import to_bytes
from host.errors import FaasError, StartError
from vpn_manager import split_endpoint

WIREGUARD_PORT = 51820
INTERFACE = r'(?!faas-)[a-zA-Z0-9_][\w.-]{0,14}'  # see host.egress_rules.LINKS
ENV_FILE = '/etc/faasd/faasd.env'
MACHINE_MEMORY = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def number(convert: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = convert(text)
        if not least <= value <= most:  # NaN is refused too
            raise ValueError(f'a number from {least} to {most} is expected')
        return value

    return parse


def at_most(convert: Callable[[str], float], most: float) -> Callable[[str], float]:
    """0 means `most`, what the machine has."""
    return lambda text: number(convert, 0, 1 << 50)(text) or most


def matching(pattern: str, what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f'{what} is expected')
        return text

    return parse


def endpoint(text: str) -> str:
    if text:
        split_endpoint(text, WIREGUARD_PORT)
    return text


def ipv4_network(text: str) -> str:
    network = ipaddress.IPv4Network(text)
    if network.prefixlen > 27:
        raise ValueError('a network of at least 32 addresses is expected')
    return str(network)


def resolvers(text: str) -> list[str]:
    return [str(ipaddress.ip_address(address)) for address in text.split()]


SETTINGS = {  # name: (default, parser); docs/API.md has the same table, a test compares them
    'FAAS_VPN_ENDPOINT': ('', endpoint),
    'FAAS_WG_INTERFACE': ('wg0', matching(INTERFACE, 'the name of an interface, not of a veth of ours,')),
    'FAAS_WG_PORT': ('51820', number(int, 1, 65535)),
    'FAAS_NFT_TABLE': ('faas', matching(r'[a-zA-Z]\w{0,30}', 'the name of a table')),
    'FAAS_GUARD': ('bpf', matching('bpf|table', 'bpf or table')),
    'FAAS_ENROLL': ('invite', matching('invite|open', 'invite or open')),
    'FAAS_ENROLL_BIND': ('[::]:51820', endpoint),
    'FAAS_DNS_FORWARD': ('', resolvers),
    'FAAS_MAX_UPLOAD': ('4G', number(to_bytes, 1 << 10, 1 << 40)),
    'FAAS_MAX_UNPACKED': ('16G', number(to_bytes, 1 << 10, 1 << 40)),
    'FAAS_START_TIMEOUT': ('30', number(float, 0.1, 3600)),
    'FAAS_STOP_TIMEOUT': ('10', number(float, 0, 3600)),
    'FAAS_IDLE_TIMEOUT': ('900', number(float, 0, 1e9)),
    'FAAS_MEMORY': ('256M', number(to_bytes, 16 << 20, 1 << 50)),
    'FAAS_PIDS': ('1024', number(int, 8, 1 << 20)),
    'FAAS_CPUS': ('1', number(float, 0.01, 4096)),
    'FAAS_MEMORY_MAX': ('0', at_most(to_bytes, MACHINE_MEMORY)),
    'FAAS_PIDS_MAX': ('16384', number(int, 8, 1 << 20)),
    'FAAS_CPUS_MAX': ('0', at_most(float, os.cpu_count())),
    'FAAS_MOUNTS': ('', read_places),
    'FAAS_EGRESS': ('', lambda text: wants.egress(wants.read_list(text))),
    'FAAS_EGRESS_IPV4': ('198.18.0.0/16', ipv4_network),
    'FAAS_BUILD_MEMORY': ('1G', number(to_bytes, 64 << 20, 1 << 50)),
    'FAAS_BUILD_CPUS': ('0', at_most(float, os.cpu_count())),
    'FAAS_BUILD_TIMEOUT': ('600', number(float, 1, 86400)),
    'FAAS_BUILD_DISK': ('4G', number(to_bytes, 64 << 20, 1 << 44)),
    'FAAS_BUILD_EGRESS': ('internet', lambda text: wants.egress(wants.read_list(text))),
    'FAAS_RUNTIME': ('runc', matching('runc|crun', 'runc or crun')),
    'FAAS_CGROUP': ('', matching(r'(/[\w@.-]+)*', 'the path of a cgroup from the root')),
    'FAAS_ID_BASE': ('1879048192', number(int, 65536, (1 << 31) - ID_SLOTS * ID_RANGE)),
}


class BadSettings(StartError):
    """A setting has a value that it cannot have. Another try would not help."""

    exit_code = os.EX_CONFIG


def read_settings(environ: Mapping[str, str], path: str = ENV_FILE) -> dict[str, Any]:
    """{'wg_port': value, …} from the environment, then the file, then the defaults. Raises BadSettings."""
    texts, lines = {}, []
    try:
        with contextlib.suppress(FileNotFoundError), open(path, encoding='utf-8-sig') as file:
            lines = list(file)
    except UnicodeDecodeError as error:
        raise BadSettings(f'{path} is not UTF-8: {error.reason}', 'save it as UTF-8') from error
    for line in lines:
        key, equals, value = line.strip().partition('=')
        if equals and not key.startswith('#'):
            if key.strip() not in SETTINGS:
                name = printable(key.strip()[:200])
                raise BadSettings(f'{path}: there is no setting {name}', 'docs/API.md lists them')
            texts[key.strip()] = value.strip().strip('"\'')
    settings = {}
    for name, (default, parse) in SETTINGS.items():
        text = environ.get(name, texts.get(name, default))
        try:
            settings[name.removeprefix('FAAS_').lower()] = parse(text)
        except (ValueError, FaasError) as error:
            why = printable(f'{name}={text[:200]}: {str(error)[:200]}')
            raise BadSettings(why, f'correct it in {path} or in the environment') from error
    return settings
