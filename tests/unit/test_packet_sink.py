"""What the counting sink makes of a packet."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from scripts.packet_sink import ETH_P_IP, ETH_P_IPV6, describe, link_only, question

QUERY = struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + b"\x0bhuggingface\x02co\x00" + struct.pack("!2H", 1, 1)


def ipv4(protocol: int, payload: bytes, to: str = "1.1.1.1") -> bytes:
    addresses = ipaddress.IPv4Address("198.18.0.2").packed + ipaddress.IPv4Address(to).packed
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + addresses + payload


def ipv6(protocol: int, payload: bytes, to: str = "2606:4700::1111") -> bytes:
    addresses = ipaddress.IPv6Address("2001:2::2").packed + ipaddress.IPv6Address(to).packed
    return struct.pack("!IHBB", 0x60000000, len(payload), protocol, 64) + addresses + payload


def udp(port: int, message: bytes) -> bytes:
    return struct.pack("!4H", 40000, port, 8 + len(message), 0) + message


def test_a_connection_is_named_by_its_address_and_port() -> None:
    syn = struct.pack("!2H", 40000, 443) + bytes(16)
    assert describe(ETH_P_IP, ipv4(6, syn)) == ("tcp 1.1.1.1:443", "")
    assert describe(ETH_P_IPV6, ipv6(6, syn)) == ("tcp [2606:4700::1111]:443", "")


def test_a_question_to_the_resolver_is_named_by_what_it_asks() -> None:
    assert describe(ETH_P_IP, ipv4(17, udp(53, QUERY))) == ("udp 1.1.1.1:53", "huggingface.co")


@pytest.mark.parametrize("message", [b"", QUERY[:12], b"\x00" * 12 + b"\xc0\x0c"])
def test_what_is_no_question_names_nothing(message: bytes) -> None:
    assert question(message) == ""


def test_other_protocols_and_cut_packets_still_have_a_destination() -> None:
    assert describe(ETH_P_IP, ipv4(1, b"\x08\x00")) == ("icmp 1.1.1.1", "")
    assert describe(ETH_P_IP, ipv4(47, b"")) == ("47 1.1.1.1", "")
    assert describe(ETH_P_IP, ipv4(17, b"\x00")) == ("udp 1.1.1.1", "")


def test_only_what_a_link_says_to_itself_is_left_out() -> None:
    neighbour_solicitation, echo = b"\x87" + bytes(23), b"\x80" + bytes(7)
    assert link_only(ETH_P_IPV6, ipv6(58, neighbour_solicitation))
    report = b"\x3a\x00\x05\x02\x00\x00\x01\x00" + b"\x8f" + bytes(7)
    assert link_only(ETH_P_IPV6, ipv6(0, report))
    assert not link_only(ETH_P_IPV6, ipv6(58, echo))
    assert not link_only(ETH_P_IPV6, ipv6(17, udp(53, QUERY)))
    assert not link_only(ETH_P_IP, ipv4(1, neighbour_solicitation))
