"""Which addresses a table of URLs may make us connect to: the public internet, and what the recipe names."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedAddressError(Exception):
    """A host that is, or resolves to, an address we do not connect to. No OSError: retrying does not help."""


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
    return parsed.is_global and not parsed.is_multicast


class GuardedResolver(AbstractResolver):
    """Resolves names and refuses private addresses.

    The check is made on the very addresses that are then connected to, so that a name cannot resolve to a public
    address when it is checked and to a private one when it is used.

    Args:
        connect_to: other addresses (`HOST:PORT`) for some names; these are trusted.
        allow_private: no refusals.
        allow: networks that are not refused.
    """

    def __init__(self, connect_to: Mapping[str, str], *, allow_private: bool, allow: Iterable[str] = ()) -> None:
        self._connect_to = connect_to
        self._allow_private = allow_private
        self._allow = [ipaddress.ip_network(network) for network in allow]
        self._resolver = DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if target := self._connect_to.get(host.lower()):
            address, _, target_port = target.rpartition(":")
            return await self._resolver.resolve(address.strip("[]"), int(target_port), socket.AF_UNSPEC)
        found = await self._resolver.resolve(host, port, family)
        if private := [result["host"] for result in found if not self._allowed(result["host"])]:
            raise RefusedAddressError(f"{host} is {private[0]}")
        return found

    def check_literal(self, host: str) -> None:
        """Refuse an address written into a URL: names come to `resolve`, addresses do not.

        Raises:
            RefusedAddressError: where it is not public.
        """
        try:
            allowed = self._allowed(host)
        except ValueError:
            return
        if not allowed:
            raise RefusedAddressError(host)

    def _allowed(self, address: str) -> bool:
        if self._allow_private or is_public(address):
            return True
        parsed = ipaddress.ip_address(address.partition("%")[0])
        return any(parsed in network for network in self._allow)

    async def close(self) -> None:
        await self._resolver.close()
