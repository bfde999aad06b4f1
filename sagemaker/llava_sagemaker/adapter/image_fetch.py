"""Pictures and videos that a request names by an https or s3 URL.

A server that fetches what strangers name is a way into its network. So nothing is fetched that the
operator has not allowed by name, and nothing from addresses that are not the public internet's: the
address that was checked is the one that is connected to, at every redirect anew.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from llava_sagemaker.adapter.errors import AdapterError

SECONDS = 10.0
"""For all of it: names, redirects, the picture."""
MAX_REDIRECTS = 3
MAX_HEADER_BYTES = 16 * 1024
_PORT = 443
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)
"""In the middle of an IPv6 address: the last 32 bits are an IPv4 address that it is sent to."""
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""All that is given out of IPv6, and so none of: unspecified, loopback, IPv4-compatible, NAT64 of a
site's own (64:ff9b:1::/48), discard-only (100::/64), segment routing (5f00::/16), unique local,
link-local, site-local, multicast."""
_SPECIAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        # IANA's IPv4 Special-Purpose Address Registry (RFC 6890), and multicast.
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24"),
        *("192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # What IANA's IPv6 registry has inside of the global unicast addresses; 2001::/23 has
        # Teredo, benchmarking, AMT, AS112, ORCHID and drone identifiers. 6to4 is looked into.
        *("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20"),
    )
)
"""No picture is there, whatever is_global says: it lets some through that are globally reachable,
but lead to the nearest machine of a kind, and differs between Python's releases."""

Address = tuple[str, int]
"""IP address and port."""
Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]


class ImageFetcher:
    """Fetches pictures from allowed places.

    Args:
        hosts: names of https servers, or `.example.com` for all names below it.
        buckets: names of S3 buckets.
        limit_bytes: of a picture.
        resolve: the addresses of a name and port.
        is_public: whether an IP address may be connected to.
        tls: whom to trust.
    """

    def __init__(
        self,
        hosts: Collection[str],
        buckets: Collection[str],
        limit_bytes: int,
        *,
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = [host.lower().rstrip(".") for host in hosts]
        self._buckets = frozenset(buckets)
        self._limit = limit_bytes
        self._resolve = resolve or _resolve
        self._is_public = is_public or is_public_address
        self._tls = tls or ssl.create_default_context()
        self._s3: Any = None

    async def __call__(self, url: str) -> bytes:
        """The file at a URL.

        Raises:
            AdapterError: image_not_allowed or image_not_fetched.
        """
        try:
            async with asyncio.timeout(SECONDS):
                scheme = url[:8].partition(":")[0].lower()
                if scheme == "s3":
                    return await asyncio.to_thread(self._from_s3, url)
                if scheme == "https":
                    return await self._from_https(url)
        except TimeoutError:
            raise _not_fetched(url, f"it took longer than {SECONDS:.0f} s") from None
        raise _not_allowed(url, "only https:// and s3:// URLs, data URIs and base64 are taken")

    async def _from_https(self, url: str) -> bytes:
        at = url
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._checked(url, at)
            status, location, body = await self._get(url, parts)
            if status == 200:
                return body
            if status not in (301, 302, 303, 307, 308) or not location:
                raise _not_fetched(url, f"the server answered with status {status}")
            try:
                at = urljoin(at, location)
            except ValueError:
                raise _not_allowed(url, "it was redirected to a URL that cannot be read") from None
        raise _not_fetched(url, f"it was redirected more than {MAX_REDIRECTS} times")

    def _checked(self, url: str, at: str) -> SplitResult:
        """The parts of the URL that is asked now: `url`, or where it was redirected to."""
        moved = "" if at == url else "it was redirected to a place that is not: "
        try:
            parts = urlsplit(at)
            host, port = (parts.hostname or "").rstrip("."), parts.port or _PORT
        except ValueError:
            raise _not_allowed(url, f"{moved}the URL cannot be read") from None
        if parts.scheme != "https":
            raise _not_allowed(url, f"{moved}the scheme {parts.scheme[:20]!r} is not https")
        if parts.username is not None or port != _PORT:
            raise _not_allowed(url, f"{moved}a user name or a port in the URL")
        if not any(
            host == name or (name[:1] == "." and host.endswith(name)) for name in self._hosts
        ):
            raise _not_allowed(url, f"{moved}the host {host[:100]!r} is not on this server's list")
        return parts

    async def _get(self, url: str, parts: SplitResult) -> tuple[int, str, bytes]:
        """One request -> status, where it is redirected to, body."""
        host = parts.hostname or ""
        try:
            addresses = await self._resolve(host, _PORT)
            for address, _ in addresses:
                if not self._is_public(address):
                    raise _not_allowed(url, "its host has an address that is not public")
            reader, writer = await asyncio.open_connection(
                *addresses[0], ssl=self._tls, server_hostname=host, limit=MAX_HEADER_BYTES * 4
            )
        except (OSError, IndexError, UnicodeError, ssl.SSLError) as error:
            raise _not_fetched(url, f"its server cannot be reached ({error})") from None
        try:
            return await self._converse(url, parts, reader, writer)
        except (OSError, h11.RemoteProtocolError) as error:
            raise _not_fetched(url, f"the connection failed ({error})") from None
        finally:
            writer.transport.abort()  # no farewell that could be waited for

    async def _converse(
        self,
        url: str,
        parts: SplitResult,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> tuple[int, str, bytes]:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = [
            ("Host", parts.hostname or ""),
            ("Accept", "image/*, video/*"),
            ("Connection", "close"),
        ]
        try:
            request = h11.Request(method="GET", target=target, headers=headers)
        except (h11.LocalProtocolError, UnicodeEncodeError):
            raise _not_fetched(
                url, "its path has characters that must be percent-encoded"
            ) from None
        writer.write(connection.send(request) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        status, location, body = 0, "", bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(64 * 1024))
            elif isinstance(event, h11.Response):
                status = event.status_code
                fields = {name: value.decode("latin-1") for name, value in event.headers}
                location = fields.get(b"location", "")
                if status != 200:
                    return status, location, b""
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._limit:
                    raise _too_large(url, self._limit)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return status, location, bytes(body)

    def _from_s3(self, url: str) -> bytes:
        bucket, _, key = url[len("s3://") :].partition("/")
        if bucket not in self._buckets:
            raise _not_allowed(url, f"the bucket {bucket[:100]!r} is not on this server's list")
        import boto3  # half a second, and few servers need it
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        if self._s3 is None:
            limits = Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 2})
            self._s3 = boto3.client("s3", config=limits)
        try:
            found = self._s3.get_object(Bucket=bucket, Key=key)
            with found["Body"] as body:
                data: bytes = body.read(self._limit + 1)
        except (BotoCoreError, ClientError, ValueError) as error:  # the last: half a character
            raise _not_fetched(url, str(error)) from None
        if len(data) > self._limit:
            raise _too_large(url, self._limit)
        return data


def is_public_address(text: str) -> bool:
    """Whether an IP address is the public internet's, whatever it is wrapped in."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public_address(str(address.ipv4_mapped))
        if address.sixtofour is not None:
            return is_public_address(str(address.sixtofour))
        if address in _NAT64:
            return is_public_address(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
        if int(address) >> 32 & 0xFFFF_FFFF in _ISATAP:
            return is_public_address(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not any(address in network for network in _SPECIAL)


async def _resolve(host: str, port: int) -> list[Address]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(str(address[0]), int(address[1])) for *_, address in found]


def _shown(url: str) -> str:
    return url if len(url) <= 100 else f"{url[:97]}..."


def _not_allowed(url: str, reason: str) -> AdapterError:
    return AdapterError(
        400, "image_not_allowed", f"the picture {_shown(url)!r} may not be fetched: {reason}"
    )


def _not_fetched(url: str, reason: str) -> AdapterError:
    return AdapterError(
        400, "image_not_fetched", f"the picture {_shown(url)!r} could not be fetched: {reason}"
    )


def _too_large(url: str, limit: int) -> AdapterError:
    return _not_fetched(url, f"it is larger than {limit} bytes")
