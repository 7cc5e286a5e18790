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
apparmor=/etc/apparmor.d/faas-instance
lock=/run/faasd/faasd.lock
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

ask_faasd() {                                       # ask_faasd CODE [ARGUMENT…]: Python on the modules of faasd
    code=$1
    shift
    "$python" -c "import sys
from control import settings
from host import errors, version
$code" "$@"
}

interface() {                                       # that of faasd.env, as faasd itself reads it
    ask_faasd 'try: print(settings.read_settings({}, sys.argv[1])["wg_interface"])
except errors.FaasError as error: sys.exit(f"install: {error} ({error.hint})")' "$destdir$env_file"
}

refuse_unknown() {                                  # refuse_unknown NAME…: settings that faasd does not have
    ask_faasd 'unknown = [name for name in sys.argv[1:] if name not in settings.SETTINGS]
if unknown: sys.exit(f"install: there is no setting {unknown[0]} (docs/API.md lists them)")' "$@"
}

runs_systemd() { [ -z "$destdir" ] && [ -d /run/systemd/system ]; }

# The interface that the installed units are for, if there are any.
installed_interface() {
    sed -n 's/^Wants=wg-quick@\(.*\)\.service faas-coredns.*/\1/p' "$destdir$unitdir/faasd.service" 2>/dev/null || true
}

# A faasd outside systemd holds wg0 and the lock; the service could not start, and an uninstall would pull them away.
refuse_by_hand() {
    if runs_systemd && [ -e $lock ] && ! flock --nonblock $lock true &&
        [ "$(systemctl show --property=MainPID --value faasd.service)" = 0 ]; then
        die "a faasd that was started by hand runs here: end it first (Ctrl-C), then once more: sudo make $1"
    fi
}

put() { install -D -m "$1" "$2" "$destdir$3"; }

install_files() {
    # All new files are put beside the old ones, then in their place: an old module does not stay.
    new=$destdir$lib.new
    rm -rf "$new"
    trap 'rm -rf "$new"' EXIT
    install -d -m 755 "$new"
    for file in ./*.py control/*.py host/*.py; do
        [ ! -f "$file" ] || install -D -m 644 "$file" "$new/$file"
    done
    for file in handlers/*/*; do                    # modules and examples
        [ -f "$file" ] || continue
        install -D -m "$([ -x "$file" ] && echo 755 || echo 644)" "$file" "$new/$file"
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
    wg=$(interface)
    version=$(ask_faasd 'print(version.VERSION)')
    coredns=/usr/local/bin/coredns                  # not one in a home, which a service does not see
    [ -x $coredns ] || coredns=$(command -v coredns || echo $coredns)
    for unit in $units; do
        sed -e "s|@INTERFACE@|$wg|g; s|@PYTHON@|$python|g; s|@COREDNS@|$coredns|g; s|@LIB@|$lib|g" \
            -e "s|@VERSION@|$version|g" "systemd/$unit" | install -D -m 644 /dev/stdin "$destdir$unitdir/$unit"
    done
    rm -rf "$destdir$unitdir"/wg-quick@*.service.d/faasd.conf
    put 644 systemd/wg-quick@.conf "$unitdir/wg-quick@$wg.service.d/faasd.conf"
}

runs_apparmor() { [ -z "$destdir" ] && [ -d /sys/kernel/security/apparmor ] && command -v apparmor_parser >/dev/null; }

# Where there is AppArmor. A package has the profile always.
install_apparmor() {
    [ -n "$destdir" ] || [ -d /etc/apparmor.d ] || return 0
    sed "s|@VERSION@|$version|" systemd/faas-instance.apparmor | install -D -m 644 /dev/stdin "$destdir$apparmor"
    runs_apparmor || return 0
    apparmor_parser --replace "$apparmor" || say "$apparmor is not loaded: functions run without AppArmor"
}

# After the last instance has ended.
remove_apparmor() {
    [ -e "$destdir$apparmor" ] || return 0
    ! runs_apparmor || apparmor_parser --remove "$apparmor" || true
    rm -f "$destdir$apparmor" "$destdir"/var/cache/apparmor/*/faas-instance
}

# The settings in our environment, as `given`. A faasd.env that is there counts instead, also for --prepare.
read_given() {
    # Those of the client are no server's; FAAS_INVITE holds a secret.
    given=$(env | grep -E '^FAAS_[A-Z_]+=' | grep -vE '^FAAS_(INVITE|SERVER|SOCKET)=' || true)
    names=$(printf '%s' "$given" | cut -d = -f 1)
    # shellcheck disable=SC2086 # one word for each name
    refuse_unknown $names
    # shellcheck disable=SC2086
    [ ! -e "$destdir$env_file" ] || unset $names
}

install_env() {
    if [ ! -e "$destdir$env_file" ]; then
        printf '%s\n' "$(cat systemd/faasd.env)" ${given:+"$given"} | install -D -m 644 /dev/stdin "$destdir$env_file"
        return
    fi
    [ -z "$given" ] || printf '%s\n' "$given" | while read -r setting; do
        grep -qxF -e "$setting" "$destdir$env_file" || say "kept $env_file as it is; $setting is yours to write there"
    done
}

install_all() {
    python=$(find_python)
    [ "$(id -u)" = 0 ] || [ -n "$destdir" ] || die 'this needs root: sudo make install'
    refuse_by_hand install
    read_given
    before=$(installed_interface)
    if [ -z "$destdir" ]; then
        # First, since it refuses what cannot be.
        "$python" faasd.py --prepare || exit 1
        getent group faas >/dev/null || groupadd --system faas
    fi
    install_env
    install_files
    install_units
    install_apparmor
    if ! runs_systemd; then
        say "the files are in place; no systemd runs here, so nothing was started"
        return
    fi
    start "$before"
}

start() {                                           # start INTERFACE-BEFORE
    wg=$(interface)
    # Makes the key of the host for secrets, if there is none: the unit sees its folder read-only.
    if command -v systemd-creds >/dev/null; then
        systemd-creds setup >/dev/null 2>&1 || say 'systemd-creds has no key of the host: secrets are not encrypted'
    fi
    systemctl daemon-reload
    if [ -n "$1" ] && [ "$1" != "$wg" ]; then
        systemctl disable --quiet --now "wg-quick@$1.service" || true
    fi
    # One that was brought up by hand is ours too, says --prepare, and would be in the unit's way.
    systemctl --quiet is-active "wg-quick@$wg.service" || wg-quick down "$wg" 2>/dev/null || true
    port=$(sed -n 's/^ListenPort = //p' "/etc/wireguard/$wg.conf")
    # shellcheck disable=SC2086 # one word for each unit
    systemctl enable --quiet "wg-quick@$wg.service" $services
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
    refuse_by_hand uninstall
    wg=$(installed_interface)
    if runs_systemd; then
        for unit in $services faas-instances.service faas.slice ${wg:+"wg-quick@$wg.service"}; do
            systemctl disable --quiet --now "$unit" 2>/dev/null || true
        done
    fi
    for unit in $units; do rm -f "$destdir$unitdir/$unit"; done
    rm -f "$destdir$unitdir"/wg-quick@*.service.d/faasd.conf
    rmdir "$destdir$unitdir"/wg-quick@*.service.d 2>/dev/null || true
    remove_apparmor
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
    for conf in "$destdir"/etc/wireguard/*.conf; do # the one with our key; an empty line would be in every file
        if grep -s . "$key" | grep -qsFf - "$conf"; then rm -f "$conf"; fi
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
