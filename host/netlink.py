"""Netlink sockets that hear of changes (netlink(7))."""

import socket

RTNLGRP_LINK, RTNLGRP_IPV6_IFADDR = 1, 9  # linux/rtnetlink.h
NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7  # linux/netlink.h, linux/netfilter/nfnetlink.h


def listen(family: int, *groups: int) -> socket.socket:
    """A netlink socket (owned by the caller) that hears of changes in the groups. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
    sock.bind((0, sum(1 << group - 1 for group in groups)))
    return sock
