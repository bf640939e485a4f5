"""Ranges on kept connections: an answer counts when it is whole, and what is not a plain range is left to aiohttp."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from yarl import URL

from data.storage import remote
from data.storage.http import HttpError
from data.storage.range_connections import RangeConnections, UnusualAnswerError
from data.storage.retry import is_transient

PLAIN = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nETag: x\r\n\r\nbytes"
Answer = tuple[Mapping[str, str], bytes]
Get = Callable[[], Awaitable[Answer]]


class Server:
    """Gives its answers in turn, whatever is asked; an answer that ends with b"END" ends the connection too."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers, self.requests, self.connections = answers, list[bytes](), 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                answer = self.answers.pop(0)
                writer.write(answer.removesuffix(b"END"))
                if answer.endswith(b"END"):
                    break
        except asyncio.IncompleteReadError:  # the client has left
            pass
        writer.close()


def run(answers: list[bytes], use: Callable[[Get], Awaitable[None]], host: str = "127.0.0.1") -> Server:
    """Let `use` get ranges from a server with these answers, at 127.0.0.1."""

    async def both() -> Server:
        server = Server(answers)
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
            port, connections = listening.sockets[0].getsockname()[1], RangeConnections(ssl.create_default_context())
            url = URL(f"http://{host}:{port}/a%20b?x=%2F", encoded=True)
            await use(lambda: connections.get(url, {"Range": "bytes=0-4"}))
            connections.close()
        return server

    return asyncio.run(both())


def test_one_connection_serves_many_requests() -> None:
    async def use(get: Get) -> None:
        for _ in range(3):
            headers, content = await get()
            assert (headers["etag"], content) == ("x", b"bytes")

    server = run([PLAIN] * 3, use)
    assert server.connections == 1
    assert server.requests[0].startswith(b"GET /a%20b?x=%2F HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nRange: bytes=0-4\r\n" in server.requests[0]
    assert b"\r\nUser-Agent: " in server.requests[0], "some servers refuse a request without it"


def test_a_host_whose_first_address_does_not_answer_is_reached_by_its_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a host with an IPv6 address, where the network has no IPv6."""
    connect = asyncio.SelectorEventLoop.sock_connect

    def addresses(host: str, port: int, *_: object) -> list[tuple[object, ...]]:
        assert host == "two.test"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]

    async def connect_or_hang(loop: asyncio.SelectorEventLoop, sock: socket.socket, address: tuple[str, int]) -> None:
        if address[0] == "127.0.0.2":
            await asyncio.Event().wait()
        await connect(loop, sock, address)

    async def use(get: Get) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", addresses)
        assert (await get())[1] == b"bytes"

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect_or_hang)
    monkeypatch.setattr(remote, "CONNECT_TIMEOUT_S", 5.0)
    assert run([PLAIN], use, "two.test").connections == 1


@pytest.mark.parametrize("told", [b"", b"Connection: close\r\n"], ids=["untold", "told"])
def test_a_connection_that_the_server_closes_is_replaced(told: bytes) -> None:
    async def use(get: Get) -> None:
        for _ in range(2):
            assert (await get())[1] == b"bytes"

    last = PLAIN.replace(b"ETag", told + b"ETag") + b"END"
    assert run([last, PLAIN], use).connections == 2


def test_a_connection_that_is_closed_when_a_request_is_on_its_way_is_replaced() -> None:
    async def use(get: Get) -> None:
        for _ in range(2):
            assert (await get())[1] == b"bytes"

    assert run([PLAIN, b"END", PLAIN], use).connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN.replace(b"206 Partial Content", b"200 OK"),
        b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbytes\r\n0\r\n\r\n",
        PLAIN.replace(b"1.1", b"1.0"),
        PLAIN.replace(b"Content-Length: 5", b"Content-Length: -5"),
    ],
    ids=["whole file", "redirect", "chunks", "HTTP/1.0", "no length"],
)
def test_what_is_no_plain_range_is_told_apart_and_its_connection_not_used_again(answer: bytes) -> None:
    async def use(get: Get) -> None:
        with pytest.raises(UnusualAnswerError):
            await get()
        assert (await get())[1] == b"bytes"

    assert run([answer, PLAIN], use).connections == 2


def test_a_server_is_believed_by_its_certificate_alone(tmp_path: Path) -> None:
    """The certificate is its own authority, and for 127.0.0.1: not for localhost."""
    own = certificate(tmp_path / "own.pem")
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(own)
    trusting = ssl.create_default_context(cafile=own)

    async def both() -> None:
        server = Server([PLAIN] * 2)
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=serving) as listening:
            port = listening.sockets[0].getsockname()[1]
            connections = RangeConnections(trusting)
            for _ in range(2):
                assert (await connections.get(URL(f"https://127.0.0.1:{port}/x"), {}))[1] == b"bytes"
            assert server.connections == 1
            with pytest.raises(ssl.SSLCertVerificationError, match="localhost"):
                await connections.get(URL(f"https://localhost:{port}/x"), {})
            with pytest.raises(ssl.SSLCertVerificationError, match=r"self[- ]signed"):
                await RangeConnections(ssl.create_default_context()).get(URL(f"https://127.0.0.1:{port}/x"), {})
            connections.close()

    asyncio.run(both())


def certificate(path: Path) -> Path:
    """A file with a key, and a certificate for 127.0.0.1 that it has signed itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    address = x509.IPAddress(ip_address("127.0.0.1"))
    signed = built.add_extension(x509.SubjectAlternativeName([address]), critical=False).sign(key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + signed.public_bytes(encoding))
    return path


@pytest.mark.parametrize(("status", "transient"), [("503 Slow Down", True), ("403 Forbidden", False)])
def test_an_error_status_is_an_error_as_elsewhere(status: str, transient: bool) -> None:
    async def use(get: Get) -> None:
        with pytest.raises(HttpError, match=status.partition(" ")[2]) as error:
            await get()
        assert is_transient(error.value) == transient

    run([f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()], use)


@pytest.mark.parametrize("answer", [PLAIN[:-1], PLAIN[:20], b""], ids=["body", "headers", "nothing"])
def test_an_answer_that_is_cut_off_is_an_error_that_may_pass(answer: bytes) -> None:
    async def use(get: Get) -> None:
        with pytest.raises((OSError, EOFError)) as error:
            await get()
        assert is_transient(error.value)

    run([answer + b"END"], use)
