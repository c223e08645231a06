"""The guard against requests to private addresses: a table of URLs may only reach the public internet.

Otherwise a hostile table could read what is behind our firewall, such as a cloud's metadata service. The recipe may
name exceptions.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

# Networks that Python does not count as private, but that lead to a cloud's own services or back to this machine.
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
    """Tell whether an IP address is on the public internet, even if it is an IPv4 address inside an IPv6 one."""
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
    """Decides which addresses may be connected to.

    It is asked about the very address of each connection: a name checked beforehand could resolve to a public address
    then and to a private one when it is used.

    Args:
        allow_private: whether to allow every address.
        allow: private networks that are allowed all the same.
    """

    def __init__(self, *, allow_private: bool, allow: Iterable[str] = ()) -> None:
        self._allow_private = allow_private
        self._allow = [ipaddress.ip_network(network) for network in allow]

    def allows(self, address: str) -> bool:
        """Tell whether this IP address may be connected to."""
        if self._allow_private or is_public(address):
            return True
        parsed = ipaddress.ip_address(address.partition("%")[0])
        return any(parsed in network for network in self._allow)
