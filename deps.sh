#!/bin/sh
# Installs what faasd needs and this machine lacks: packages of Debian or Ubuntu, and CoreDNS in /usr/local/bin.
# Says what before it does; silent and quick when nothing is missing. As root, or as a user with sudo. `deps.sh test`:
# what the tests use, as well. `deps.sh lint`: what `make lint` needs, alone.
set -eu
purpose=${1-}

COREDNS_MODULE=v1.15.0                              # built where there is a Go
# Else fetched ready-made: the last release whose digests are at hand from somebody else, the packagers of Arch Linux's
# coredns-bin (for amd64 others agree). Compare them with the .sha256 files beside the archives when you change it.
COREDNS_RELEASE=1.14.6
COREDNS_SHA256_amd64=4402578c8f7b95dac1d8258bfd13e7a9d30f70d7a53f396b02a6d6ca78d56152
COREDNS_SHA256_arm64=a99987b82977a791e232fcb828133cb645130481cc36af6e06fbf938326d2c3e
# A daemon that is root runs it, so it lies where only root writes and where sudo's PATH finds it.
COREDNS=/usr/local/bin/coredns

PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin

say() { echo "deps: $*"; }
die() { echo "deps: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif have sudo; then sudo "$@"
    else die "this needs root: run it as root, or install sudo"
    fi
}

at_least() {                                        # at_least 1.26 "$version"
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
        apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"
}

# Recommended packages stay out: that of wireguard-tools is a kernel.
install_packages() {
    have apt-get || die "no apt-get here. Please install these yourself: $*"
    say "installing the packages $*"
    if ! apt-get -qq --simulate --no-install-recommends install "$@" >/dev/null 2>&1; then apt -q update; fi
    # The lists may be older than what the mirror still has.
    apt -q -y --no-install-recommends install "$@" ||
        { apt -q update; apt -q -y --no-install-recommends install "$@"; }
}

kernel_has_wireguard() {
    [ -d /sys/module/wireguard ] && return
    if [ "$(id -u)" = 0 ] && have ip; then
        unshare --net ip link add wg-try type wireguard 2>/dev/null
    else
        have modprobe && modprobe --quiet --dry-run wireguard
    fi
}

missing_packages() {
    if [ "$purpose" = lint ]; then
        have shellcheck || echo shellcheck
        # For ruff. Debian's Python can make a venv only with this.
        python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv
        return
    fi
    have wg || echo wireguard-tools
    have wireguard-go || kernel_has_wireguard || echo wireguard-go
    have runc || echo runc
    have nft || echo nftables
    have ip || echo iproute2
    have ping || echo iputils-ping
    have curl || echo curl
    have zstd || echo zstd
    [ -x /usr/bin/python3 ] || echo python3         # functions run with it, whichever python3 runs faasd
    [ "$purpose" = test ] || return 0
    have dig || echo bind9-dnsutils
    have ps || echo procps
    have debootstrap || echo debootstrap
    have systemd-nspawn || echo systemd-container
    have podman || echo podman
    have skopeo || echo skopeo
    have java || echo default-jdk-headless
    have go || echo golang-go                       # what else the tests serve they unpack: see tests/packages.py
}

coredns_suffices() {
    version=$("$1" -version 2>/dev/null | sed -n 's/^CoreDNS-//p')
    [ -n "$version" ] && at_least 1.9 "$version"
}

go_suffices() {
    have go || return
    version=$(go env GOVERSION 2>/dev/null) || return
    at_least 1.26 "${version#go}" && return
    # From 1.21 on Go fetches the toolchain that a module asks for, unless it is told not to.
    at_least 1.21 "${version#go}" && [ "$(go env GOTOOLCHAIN)" != local ]
}

build_coredns() {                                   # build_coredns FOLDER
    say "building CoreDNS $COREDNS_MODULE with $(go env GOVERSION), which takes a minute or two, as $COREDNS"
    (cd "$1" && GOBIN=$1 GOOS='' GOARCH='' GOFLAGS='' go install "github.com/coredns/coredns@$COREDNS_MODULE")
}

fetch_coredns() {                                   # fetch_coredns FOLDER
    case $(uname -m) in
        x86_64) arch=amd64 digest=$COREDNS_SHA256_amd64 ;;
        aarch64) arch=arm64 digest=$COREDNS_SHA256_arm64 ;;
        *) die "no CoreDNS archive is known for $(uname -m): install coredns >= 1.9, or Go >= 1.26, and try again" ;;
    esac
    archive=coredns_${COREDNS_RELEASE}_linux_$arch.tgz
    say "fetching CoreDNS $COREDNS_RELEASE from github.com as $COREDNS"
    [ -e /etc/ssl/certs/ca-certificates.crt ] || install_packages ca-certificates
    curl -fsSL --proto '=https' --retry 3 -o "$1/$archive" \
        "https://github.com/coredns/coredns/releases/download/v$COREDNS_RELEASE/$archive" ||
        die "cannot fetch $archive: install coredns >= 1.9, or Go >= 1.26, and try again"
    echo "$digest  $1/$archive" | sha256sum --check --status - || die "$archive is not what was published: not used"
    tar -xzf "$1/$archive" -C "$1" --no-same-owner coredns
}

get_coredns() {
    found=$(command -v coredns || true)
    if [ -n "$found" ] && coredns_suffices "$found"; then
        case $found in
            /usr/*|/bin/*|/sbin/*|/opt/*|/snap/*) return ;;
        esac
        say "copying $found to $COREDNS, where root looks for it"
    fi
    folder=$(mktemp -d /var/tmp/faasd-deps.XXXXXX)
    trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
    trap 'exit 130' INT TERM HUP
    if [ -n "$found" ] && coredns_suffices "$found"; then cp "$found" "$folder/coredns"
    elif go_suffices && build_coredns "$folder"; then :
    else fetch_coredns "$folder"
    fi
    # By rename, so that nobody ever runs half of it.
    as_root install -D -m 755 -o root -g root "$folder/coredns" "$COREDNS.$$"
    as_root mv -f "$COREDNS.$$" "$COREDNS"
    say "CoreDNS $("$COREDNS" -version | sed -n 's/^CoreDNS-//p') is $COREDNS"
}

packages=$(missing_packages)
# shellcheck disable=SC2086 # one word for each package
[ -z "$packages" ] || install_packages $packages
[ "$purpose" = lint ] || get_coredns
