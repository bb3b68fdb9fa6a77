"""Pictures by address, for servers that allow it: public addresses only, checked where the connection goes."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore
from httpcore._backends.auto import AutoBackend

from serve.refusal import Refusal
from serve.settings import Fetching

Resolve = Callable[[str, int], Awaitable[list[str]]]
# Addresses that carry an IPv4 address inside: a gateway may turn them into a private one.
CARRIERS = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "2002::/16", "2001::/32", "::/96")]
SPECIAL = ipaddress.ip_network("192.0.0.0/24")  # protocol assignments, of which Python calls a few global


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet; anything odd does not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # also `fe80::1%eth0`
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in CARRIERS) or ip.scope_id:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip in SPECIAL)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to an address that has just been checked: the name is never looked up a second time.

    Args:
        lookup: Names to addresses.
        allowed: Whether an address may be connected to.
        backend: What connects.
    """

    def __init__(self, lookup: Resolve, allowed: Callable[[str], bool], backend: Any = None):
        self.lookup, self.allowed = lookup, allowed
        self.backend = backend or AutoBackend()

    async def connect_tcp(self, host: str, port: int, **options: Any) -> Any:
        addresses = await self.lookup(host, port)
        if not addresses:
            raise Refusal(422, "url_failed", "the picture's address could not be fetched")
        if not all(self.allowed(address) for address in addresses):
            raise Refusal(403, "url_refused", "the picture's address is not on the public internet")
        return await self.backend.connect_tcp(addresses[0], port, **options)

    async def connect_unix_socket(self, path: str, **options: Any) -> Any:
        raise Refusal(403, "url_refused", "the picture's address is not on the public internet")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Fetcher:
    """Fetches pictures under a cap of bytes and seconds; redirects are checked as the first address was.

    No proxy, cookie or credential of this machine is used.

    Args:
        config: Whether, how long, how many redirects, which ports.
        max_bytes: Bytes of a picture.
        lookup: Names to addresses.
        allowed: Whether an address may be connected to.
        backend: What connects.
    """

    def __init__(
        self,
        config: Fetching,
        max_bytes: int,
        lookup: Resolve = resolve,
        allowed: Callable[[str], bool] = is_public,
        backend: Any = None,
    ):
        self.config, self.max_bytes = config, max_bytes
        self.network = CheckedBackend(lookup, allowed, backend)

    async def fetch(self, url: str) -> bytes:
        """Content of a picture's address.

        Raises:
            Refusal: 403: switched off, or an address that is not public; 422: anything else that went wrong. The
                message tells nothing of what lies behind the address.
        """
        if not self.config.enabled:
            raise Refusal(403, "urls_off", "pictures by address are switched off: send the picture itself")
        try:
            return await asyncio.wait_for(self._follow(url), self.config.seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise Refusal(
                422, "url_slow", f"the picture did not arrive within {self.config.seconds:g} s"
            ) from None
        except (
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.TimeoutException,
            OSError,
            ValueError,
        ):
            raise Refusal(422, "url_failed", "the picture's address could not be fetched") from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(self.config.redirects + 1):
            self.check(url)
            async with httpcore.AsyncConnectionPool(network_backend=self.network, retries=0) as pool:
                headers = [
                    ("Host", urlsplit(url).netloc),
                    ("Accept", "image/*"),
                    ("Accept-Encoding", "identity"),
                ]
                async with pool.stream("GET", url, headers=headers) as response:
                    found = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                    if response.status in (301, 302, 303, 307, 308) and b"location" in found:
                        url = urljoin(url, found[b"location"])
                        continue
                    if response.status != 200:
                        raise Refusal(422, "url_failed", "the picture's address could not be fetched")
                    return await self._read(response)
        raise Refusal(422, "url_redirects", f"more than {self.config.redirects} redirects")

    async def _read(self, response: httpcore.Response) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_stream():
            content += chunk
            if len(content) > self.max_bytes:
                raise Refusal(413, "picture_too_large", f"a picture is larger than {self.max_bytes:,} bytes")
        return bytes(content)

    def check(self, url: str) -> None:
        """Scheme, port and form of an address, before a name is looked up."""
        if not url.isascii() or not url.isprintable() or " " in url:
            raise Refusal(422, "bad_url", "expected an address in ASCII, escaped where it must be")
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError:
            raise Refusal(422, "bad_url", "expected an http or https address") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refusal(422, "bad_url", "expected an http or https address")
        if parts.username is not None or parts.password is not None:
            raise Refusal(422, "bad_url", "expected an address without user name and password")
        if port not in self.config.ports:
            raise Refusal(403, "url_refused", f"only the ports {self.config.ports} may be asked")
