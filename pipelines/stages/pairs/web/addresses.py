"""Which addresses a table of URLs may make us connect to: the public internet, and what the recipe names."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

# Networks that are not marked as private, and lead to a cloud's own services or back to this machine.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",
            "192.0.0.0/24",
            "fec0::/10",
            "::/96",
            "::ffff:0:0:0/96",
            "64:ff9b:1::/48",
        ),
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, looking through the ways to write IPv4 inside IPv6."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if parsed.teredo is not None:
            inner = parsed.teredo[1]
        elif parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    if any(parsed in network for network in _NOT_PUBLIC):
        return False
    return parsed.is_global and not parsed.is_multicast


class Guard:
    """Says which addresses may be connected to.

    It is asked for the very address of each connection, so that a name cannot resolve to a public address when it is
    checked and to a private one when it is used.

    Args:
        allow_private: no refusals.
        allow: networks that are not refused although they are private.
    """

    def __init__(self, *, allow_private: bool, allow: Iterable[str] = ()) -> None:
        self._allow_private = allow_private
        self._allow = [ipaddress.ip_network(network) for network in allow]

    def allows(self, address: str) -> bool:
        if self._allow_private or is_public(address):
            return True
        parsed = ipaddress.ip_address(address.partition("%")[0])
        return any(parsed in network for network in self._allow)
