"""Counts what arrives at a network interface: the far end of the namespace that `scripts/offline.sh` makes.

    packet_sink.py INTERFACE REPORT

Every IP packet that arrives counts. What a link says to itself does not: ARP, and IPv6's neighbour and router
discovery and multicast listener reports, which the kernel sends unasked and no router forwards.

Prints `ready` once it listens. On SIGTERM it writes REPORT, a JSON object: `packets`, `destinations` (packets
to each `protocol address:port`), `questions` (the names that were asked of the resolver).

Source of the numbers: linux/if_ether.h, linux/if_packet.h, and IANA's protocol numbers.
"""

from __future__ import annotations

import ipaddress
import json
import signal
import socket
import struct
import sys
from collections import Counter
from pathlib import Path

ETH_P_ALL = 0x0003
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
PACKET_OUTGOING = 4
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
DNS_PORT = 53
ICMPV6 = 58
HOP_BY_HOP = 0
LINK_ONLY = frozenset({130, 131, 132, 133, 134, 135, 136, 143})  # ICMPv6 types: RFC 4861, RFC 3810


def describe(kind: int, packet: bytes) -> tuple[str, str]:
    """`protocol address:port` of an IP packet, and the name it asks the resolver for, or ""."""
    if kind == ETH_P_IP:
        header, protocol = (packet[0] & 0x0F) * 4, packet[9]
        address = str(ipaddress.IPv4Address(packet[16:20]))
    else:
        header, protocol = 40, packet[6]
        address = f"[{ipaddress.IPv6Address(packet[24:40])}]"
    name = PROTOCOLS.get(protocol, str(protocol))
    payload = packet[header:]
    if name not in ("tcp", "udp") or len(payload) < 4:
        return f"{name} {address}", ""
    (port,) = struct.unpack("!H", payload[2:4])
    asks = question(payload[8:]) if name == "udp" and port == DNS_PORT else ""
    return f"{name} {address}:{port}", asks


def link_only(kind: int, packet: bytes) -> bool:
    """Whether an IPv6 packet is one that stays on its link by definition."""
    if kind != ETH_P_IPV6:
        return False
    protocol, at = packet[6], 40
    if protocol == HOP_BY_HOP:  # a router alert, before a multicast listener report
        protocol, at = packet[at], at + 8 + packet[at + 1] * 8
    return protocol == ICMPV6 and len(packet) > at and packet[at] in LINK_ONLY


def question(message: bytes) -> str:
    """The first name in a DNS query (RFC 1035, 4.1.2), or "" if it is none."""
    labels, at = [], 12
    while at < len(message) and 0 < message[at] < 64:
        labels.append(message[at + 1 : at + 1 + message[at]].decode("ascii", errors="replace"))
        at += 1 + message[at]
    return ".".join(labels)


def count(interface: str, report: Path) -> None:
    """Count until SIGTERM, then write the report."""
    destinations: Counter[str] = Counter()
    questions: Counter[str] = Counter()
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)) as arriving:
        arriving.bind((interface, ETH_P_ALL))
        arriving.settimeout(0.2)
        stopping = False

        def stop(*_: object) -> None:
            nonlocal stopping
            stopping = True

        signal.signal(signal.SIGTERM, stop)
        print("ready", flush=True)
        while True:
            try:
                packet, (_, kind, direction, *_rest) = arriving.recvfrom(65535)
            except TimeoutError:
                if stopping:  # and nothing has arrived for a while
                    break
                continue
            if direction == PACKET_OUTGOING or kind not in (ETH_P_IP, ETH_P_IPV6):
                continue
            if link_only(kind, packet):
                continue
            destination, asks = describe(kind, packet)
            destinations[destination] += 1
            if asks:
                questions[asks] += 1
    content = {
        "packets": destinations.total(),
        "destinations": dict(destinations.most_common()),
        "questions": dict(questions.most_common()),
    }
    report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    count(sys.argv[1], Path(sys.argv[2]))
