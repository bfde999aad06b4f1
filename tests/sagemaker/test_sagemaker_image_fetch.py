"""Fetching pictures by URL: what is allowed works, and nothing else is even connected to."""

from __future__ import annotations

import asyncio
import datetime
import http.server
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from llava_sagemaker.adapter import image_fetch
from llava_sagemaker.adapter.errors import AdapterError
from llava_sagemaker.adapter.image_fetch import ImageFetcher, is_public_address
from moto import mock_aws

PICTURE = b"\x89PNG a picture" * 100
LIMIT = 10_000


class Handler(http.server.BaseHTTPRequestHandler):
    """A web server with good and bad places."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))  # type: ignore[attr-defined]
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[len("/to/") :].replace("|", "/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/large"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"400\r\n" + b"x" * 0x400 + b"\r\n")
            except OSError:
                pass
        elif self.path == "/slow":
            self.server.let_go.wait(20.0)  # type: ignore[attr-defined]
        elif self.path.startswith("/picture"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(PICTURE)
        else:
            self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of `pictures.test` in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pictures.test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName(each) for each in ("pictures.test", "b.test")]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def web(certificate: Path) -> Iterator[Any]:
    """A TLS server on 127.0.0.1."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.let_go = [], threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.let_go.set()
    server.shutdown()
    server.server_close()
    thread.join()


class Net:
    """Stands for the internet: names, of which some lead to the local server as if it were a public
    one. What is asked of it is what would be connected to."""

    def __init__(self, web: Any, certificate: Path, hosts: list[str]) -> None:
        self.port = web.server_address[1]
        self.names = {"pictures.test": "127.0.0.1", "b.test": "127.0.0.1"}
        self.public = {"127.0.0.1"}
        self.fetch = ImageFetcher(
            hosts,
            [],
            LIMIT,
            resolve=self.resolve,
            is_public=lambda address: address in self.public or is_public_address(address),
            tls=ssl.create_default_context(cafile=str(certificate)),
        )

    async def resolve(self, host: str, port: int) -> list[tuple[str, int]]:
        if host not in self.names:
            ipaddress.ip_address(host)
            return [(host, self.port)]
        return [(address, self.port) for address in self.names[host].split()]


@pytest.fixture
def net(web: Any, certificate: Path) -> Net:
    return Net(web, certificate, ["pictures.test"])


def refusal(fetch: ImageFetcher, url: str) -> AdapterError:
    with pytest.raises(AdapterError) as told:
        asyncio.run(fetch(url))
    assert told.value.status == 400
    assert len(told.value.sentence) < 400
    return told.value


@pytest.mark.parametrize("path", ["picture", "picture?size=large&x=1", "to/picture", "to/|picture"])
def test_a_picture_from_an_allowed_host(net: Net, web: Any, path: str) -> None:
    if path == "to/picture":
        path = "to/https:||pictures.test|picture"
    assert asyncio.run(net.fetch(f"https://pictures.test/{path}")) == PICTURE
    assert {host for host, _ in web.asked} == {"pictures.test"}


INSIDE = [
    *("169.254.169.254", "127.0.0.1", "[::1]", "10.0.0.1", "192.168.1.1", "100.100.100.200"),
    *("0.0.0.0", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]"),
    *("[fd00:ec2::254]", "[fe80::1]", "224.0.0.1", "255.255.255.255"),
    *("[::127.0.0.1]", "[::169.254.169.254]", "[64:ff9b:1::a9fe:a9fe]", "[fec0::1]"),
    *("192.0.0.8", "192.88.99.1", "[::ffff:192.88.99.1]", "[2002:c058:6301::]"),
]


@pytest.mark.parametrize("host", INSIDE)
def test_nothing_inside_is_reached(web: Any, certificate: Path, host: str) -> None:
    # Even where somebody has put the address itself, or a name that leads there, on the list.
    bare = host.strip("[]")
    net = Net(web, certificate, [bare, "inside.test", "pictures.test"])
    net.public.clear()
    net.names["inside.test"] = bare
    assert not is_public_address(bare)
    for url in (f"https://{host}/picture", "https://inside.test/picture"):
        told = refusal(net.fetch, url)
        assert told.code == "image_not_allowed"
        assert "not public" in told.sentence
    # A name with a good address and a bad one.
    net.names["inside.test"] = f"93.184.215.14 {bare}"
    assert refusal(net.fetch, "https://inside.test/picture").code == "image_not_allowed"
    # A redirect from a good place.
    net.public.add("127.0.0.1")
    if bare != "127.0.0.1":
        net.names["inside.test"] = bare
        told = refusal(net.fetch, "https://pictures.test/to/https:||inside.test|picture")
        assert told.code == "image_not_allowed"
    assert [path for _, path in web.asked if not path.startswith("/to/")] == []


def test_no_address_of_ianas_special_registries_is_public() -> None:
    special = [
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.9/32"),
        *("192.0.0.10/32", "192.0.0.170/31", "192.0.2.0/24", "192.31.196.0/24"),
        *("192.52.193.0/24", "192.88.99.0/24", "192.88.99.2/32", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("240.0.0.0/4", "255.255.255.255/32", "224.0.0.0/4"),
        *("::1/128", "::/128", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23"),
        *("2001::/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48"),
        *("2001:3::/32", "2001:4:112::/48", "2001:10::/28", "2001:20::/28", "2001:30::/28"),
        *("2001:db8::/32", "2620:4f:8000::/48", "3fff::/20", "5f00::/16", "fc00::/7"),
        *("fe80::/10", "fec0::/10", "ff00::/8"),
    ]
    for network in map(ipaddress.ip_network, special):
        for address in (network[0], network[-1]):
            forms = [str(address)]
            if address.version == 4:
                high, low = divmod(int(address), 1 << 16)
                wrapped = f"{high:x}:{low:x}"
                forms += [f"::ffff:{address}", f"64:ff9b::{wrapped}", f"2002:{wrapped}::1"]
                forms += [f"2600:1::5efe:{wrapped}", f"2600:1::200:5efe:{wrapped}"]
            assert [form for form in forms if is_public_address(form)] == [], network


@pytest.mark.parametrize(
    "address",
    [
        *("93.184.215.14", "8.8.8.8", "192.0.1.1", "192.88.98.1", "223.255.255.255"),
        *("2600:1901::1", "2a00:1450:4001::1", "2001:4860:4860::8888", "::ffff:8.8.8.8"),
        *("64:ff9b::808:808", "2002:808:808::1"),
    ],
)
def test_public_addresses(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize(
    "to",
    [
        "https:||b.test|picture",
        "http:||pictures.test|picture",
        "https:||pictures.test:444|picture",
        "https:||169.254.169.254|latest|meta-data|",
        "file:|||etc|passwd",
        "https:||user@pictures.test|picture",
        "https:||[|",
    ],
)
def test_a_redirect_to_what_is_not_allowed(net: Net, web: Any, to: str) -> None:
    told = refusal(net.fetch, f"https://pictures.test/to/{to}")
    assert told.code == "image_not_allowed"
    assert "it was redirected" in told.sentence
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "https://other.test/picture",
        "https://pictures.test.other.test/picture",
        "https://xpictures.test/picture",
        "http://pictures.test/picture",
        "https://pictures.test:8443/picture",
        "https://me:secret@pictures.test/picture",
        "file:///etc/passwd",
        "gopher://pictures.test/",
        "https://",
        "https://[",
        "s3://bucket/key",
        "C:\\cat.png",
    ],
)
def test_what_is_not_allowed_is_not_asked(net: Net, web: Any, url: str) -> None:
    assert refusal(net.fetch, url).code == "image_not_allowed"
    assert web.asked == []


def test_nothing_is_allowed_by_default(web: Any, certificate: Path) -> None:
    net = Net(web, certificate, [])
    assert "not on this server's list" in refusal(net.fetch, "https://pictures.test/a").sentence


def test_all_names_below_one(web: Any, certificate: Path) -> None:
    net = Net(web, certificate, [".test"])
    assert asyncio.run(net.fetch("https://PICTURES.test/picture")) == PICTURE
    assert refusal(net.fetch, "https://contest/picture").code == "image_not_allowed"


def test_limits(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "larger than" in refusal(net.fetch, "https://pictures.test/large").sentence
    loop = "https://pictures.test/" + "to/" * 5 + "picture"
    assert "redirected more than" in refusal(net.fetch, loop).sentence
    assert "status 404" in refusal(net.fetch, "https://pictures.test/nothing").sentence
    monkeypatch.setattr(image_fetch, "SECONDS", 0.3)
    told = refusal(net.fetch, "https://pictures.test/slow")
    assert (told.code, "took longer" in told.sentence) == ("image_not_fetched", True)


def test_a_server_nobody_trusts(web: Any, certificate: Path) -> None:
    net = Net(web, certificate, ["pictures.test", "b.test", "stranger.test"])
    net.names["stranger.test"] = "127.0.0.1"  # has another's certificate
    told = refusal(net.fetch, "https://stranger.test/picture")
    assert told.code == "image_not_fetched"
    assert asyncio.run(net.fetch("https://b.test/picture")) == PICTURE


@mock_aws  # type: ignore[untyped-decorator]
def test_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3 = boto3.client("s3")
    for bucket in ("pictures", "secrets"):
        s3.create_bucket(Bucket=bucket)
        s3.put_object(Bucket=bucket, Key="some/cat.png", Body=PICTURE)
    s3.put_object(Bucket="pictures", Key="large", Body=b"x" * (LIMIT + 1))
    fetch = ImageFetcher([], ["pictures"], LIMIT)
    assert asyncio.run(fetch("s3://pictures/some/cat.png")) == PICTURE
    assert refusal(fetch, "s3://secrets/some/cat.png").code == "image_not_allowed"
    assert "larger than" in refusal(fetch, "s3://pictures/large").sentence
    assert refusal(fetch, "s3://pictures/none").code == "image_not_fetched"
    assert refusal(fetch, "s3://pictures").code == "image_not_fetched"
