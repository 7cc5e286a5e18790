#!/bin/sh
# `make install` and `make uninstall`: faasd as services of systemd. DESTDIR and PREFIX as usual, and UNITDIR; settings
# (FAAS_VPN_ENDPOINT=…) go into faasd.env if there is none yet. PURGE=1 takes data and keys away as well.
set -eu
cd "$(dirname "$0")"
export PYTHONDONTWRITEBYTECODE=1                    # a root's __pycache__ would stay in somebody's checkout
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

destdir=${DESTDIR-} prefix=${PREFIX:-/usr/local}
case $prefix in
    /usr|/usr/local) unitdir=${UNITDIR:-$prefix/lib/systemd/system} ;;      # where systemd looks
    *) unitdir=${UNITDIR:-/etc/systemd/system} ;;
esac
lib=$prefix/lib/faasd
env_file=/etc/faasd/faasd.env
services='faasd.service faas-coredns.service'
units="$services faas-instances.service faas.slice"

say() { echo "install: $*"; }
die() { echo "install: $*" >&2; exit 1; }

case $prefix$unitdir in                             # both go into units as they are
    [!/]*|*[!/[:alnum:]._+-]*) die 'PREFIX and UNITDIR: absolute paths of letters, digits and . _ + - only' ;;
esac

# The services see neither a home nor what a person put on PATH.
find_python() {
    for python in /usr/bin/python3 /usr/bin/python3.1[1-9] /usr/local/bin/python3; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$python"; return; }
    done
    die 'Python 3.11 or newer is needed as /usr/bin/python3 (apt install python3)'
}

interface() {                                       # that of faasd.env, as faasd itself reads it
    "$python" -Bc 'import sys, faasd
try: print(faasd.read_settings({}, sys.argv[1])["wg_interface"])
except faasd.StartError as error: sys.exit(f"install: {error} ({error.hint})")' "$destdir$env_file"
}

runs_systemd() { [ -z "$destdir" ] && [ -d /run/systemd/system ]; }

# The interface that the installed units are for, if there are any.
installed_interface() {
    sed -n 's/^Wants=wg-quick@\(.*\)\.service faas-coredns.*/\1/p' "$destdir$unitdir/faasd.service" 2>/dev/null || true
}

put() { install -D -m "$1" "$2" "$destdir$3"; }

install_files() {
    # As a whole beside the old ones, then in their place: a module that is no more does not stay.
    new=$destdir$lib.new
    rm -rf "$new"
    trap 'rm -rf "$new"' EXIT
    install -d -m 755 "$new" "$new/handlers"
    install -m 644 ./*.py "$new"
    install -m 644 handlers/*.py "$new/handlers"
    for example in handlers/[!_]*/; do              # __pycache__ is of a faasd that ran here
        install -D -m 644 -t "$new/$example" "$example"*.py
    done
    rm -rf "$destdir$lib.old"
    [ ! -d "$destdir$lib" ] || mv "$destdir$lib" "$destdir$lib.old"
    mv "$new" "$destdir$lib"
    rm -rf "$destdir$lib.old"
    put 755 faas "$prefix/bin/faas"
    install -d -m 700 "$destdir/etc/wireguard"
    install -d -m 755 "$destdir/etc/coredns" "$destdir/etc/faasd"
}

install_units() {
    wg=$(interface) coredns=$(command -v coredns || echo /usr/local/bin/coredns)
    for unit in $units; do
        sed -e "s|@INTERFACE@|$wg|g; s|@PYTHON@|$python|g; s|@COREDNS@|$coredns|g; s|@LIB@|$lib|g" \
            "systemd/$unit" | install -D -m 644 /dev/stdin "$destdir$unitdir/$unit"
    done
    rm -rf "$destdir$unitdir"/wg-quick@*.service.d/faasd.conf
    put 644 systemd/wg-quick@.conf "$unitdir/wg-quick@$wg.service.d/faasd.conf"
}

install_env() {
    given=$(env | grep -E '^FAAS_[A-Z_]+=' || true)
    if [ ! -e "$destdir$env_file" ]; then
        { cat systemd/faasd.env; echo "$given"; } | install -D -m 644 /dev/stdin "$destdir$env_file"
        return
    fi
    echo "$given" | grep . | while read -r setting; do
        grep -qxF -e "$setting" "$destdir$env_file" || say "kept $env_file as it is; $setting is yours to write there"
    done
}

install_all() {
    python=$(find_python)
    [ "$(id -u)" = 0 ] || [ -n "$destdir" ] || die 'this needs root: sudo make install'
    before=$(installed_interface)
    if [ -z "$destdir" ]; then
        # First, since it refuses what cannot be. A faasd.env that is there is what counts, not what is given now.
        if [ -e "$env_file" ]; then set -- env -i PATH="$PATH"; fi
        "$@" "$python" -B faasd.py --prepare || exit 1
        getent group faas >/dev/null || groupadd --system faas
    fi
    install_env
    install_files
    install_units
    if ! runs_systemd; then
        say "the files are in place; no systemd runs here, so nothing was started"
        return
    fi
    start "$before"
}

start() {                                           # start INTERFACE-BEFORE
    wg=$(interface)
    systemctl daemon-reload
    if [ -n "$1" ] && [ "$1" != "$wg" ]; then
        systemctl disable --quiet --now "wg-quick@$1.service" || true
    fi
    port=$(sed -n 's/^ListenPort = //p' "/etc/wireguard/$wg.conf")
    # shellcheck disable=SC2086 # one word for each unit
    systemctl enable --quiet "wg-quick@$wg.service" $services
    # One that was brought up by hand is ours too, says --prepare. The unit could not make it, nor take it down. A faasd
    # with children runs --standalone, and looks after its own.
    systemctl --quiet is-active "wg-quick@$wg.service" || [ -e /run/faasd/children.json ] ||
        wg-quick down "$wg" >/dev/null 2>&1 || true
    if [ "$(wg show "$wg" listen-port 2>/dev/null)" != "$port" ]; then
        systemctl restart "wg-quick@$wg.service" || failed "wg-quick@$wg.service"
    fi
    # shellcheck disable=SC2086
    systemctl restart $services || failed $services
    say "faasd runs and starts at boot; its log: journalctl -u faasd"
    say "next: sudo faas new fibonacci; sudo faas vpn invite"
}

failed() {                                          # failed UNIT…
    for unit; do
        systemctl --quiet is-active "$unit" && continue
        # What it said itself, not systemd's words about it.
        journalctl --quiet --no-pager --output=cat --lines=3 _SYSTEMD_UNIT="$unit" >&2 || true
        die "$unit does not start; the rest is in place: mend this, then once more: sudo make install"
    done
}

uninstall_all() {
    [ "$(id -u)" = 0 ] || [ -n "$destdir" ] || die 'this needs root: sudo make uninstall'
    wg=$(installed_interface)
    if runs_systemd; then
        for unit in $services faas-instances.service faas.slice ${wg:+"wg-quick@$wg.service"}; do
            systemctl disable --quiet --now "$unit" 2>/dev/null || true
        done
    fi
    if [ -z "$destdir" ] && [ -e /run/faasd/faasd.lock ] && ! flock --nonblock /run/faasd/faasd.lock true; then
        die 'another faasd runs on this host, by hand perhaps: end it, then once more: sudo make uninstall'
    fi
    for unit in $units; do rm -f "$destdir$unitdir/$unit"; done
    rm -f "$destdir$unitdir"/wg-quick@*.service.d/faasd.conf
    rmdir "$destdir$unitdir"/wg-quick@*.service.d 2>/dev/null || true
    rm -rf "$destdir$lib" "$destdir$lib.new" "$destdir$lib.old"
    rm -f "$destdir$prefix/bin/faas"
    if runs_systemd; then systemctl daemon-reload; fi
    if [ -z "$destdir" ]; then
        if getent group faas >/dev/null; then groupdel faas || say 'left: the group faas, which is somebody'"'"'s own'; fi
        rm -rf /run/faasd
        # systemd knows nothing of those that runc made in hierarchies of its own choice (cgroup version 1).
        find /sys/fs/cgroup -depth -type d -path '*/faas.slice*' -exec rmdir {} + 2>/dev/null || true
    fi
    if [ "${PURGE-}" = 1 ]; then
        purge
    else
        say "left: /etc/faasd, /var/lib/faasd, the keys in /etc/wireguard (PURGE=1 takes them too)"
    fi
    say 'gone; packages and coredns stay, they may be somebody else'"'"'s'
}

purge() {
    key=$destdir/etc/wireguard/server_private.key
    ours=$(tr -d '[:space:]' 2>/dev/null <"$key" || true)           # an empty line is in every file
    for conf in "$destdir"/etc/wireguard/*.conf; do # the one with our key
        if [ -n "$ours" ] && [ -e "$conf" ] && echo "$ours" | grep -qF -f - "$conf"; then rm -f "$conf"; fi
    done
    rm -rf "$destdir/etc/faasd" "$destdir/var/lib/faasd" "$destdir/etc/wireguard/peers" \
        "$key" "$destdir/etc/wireguard/server_public.key"
    if grep -qs '^# Written by faasd\.' "$destdir/etc/coredns/Corefile"; then rm -f "$destdir/etc/coredns/Corefile"; fi
    rmdir "$destdir/etc/coredns" 2>/dev/null || true
}

case ${1-} in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *) die 'say install or uninstall' ;;
esac
