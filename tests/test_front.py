"""What a server sends for a reply, byte by byte, with one call of the kernel and with two."""
import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlray.engines.front_on_ray import send_whole
from mlray.serving.asgi import send_reply
from mlray.serving.wire import Reply


class Counted:
    "A transport that counts."
    def __init__(self, transport: Any, writes: list[int]): self.transport, self.writes = transport, writes
    def __getattr__(self, name: str) -> Any: return getattr(self.transport, name)
    def write(self, data: bytes) -> None:
        self.writes.append(len(data))
        self.transport.write(data)


@pytest.fixture(scope="module", params=[HttpToolsProtocol, H11Protocol], ids=["httptools", "h11"])
def server(request) -> Iterator[tuple[int, list[int]]]:
    "Answers /whole and /parts, and says how often it wrote."
    writes: list[int] = []

    class Protocol(request.param):
        def connection_made(self, transport: Any) -> None: super().connection_made(Counted(transport, writes))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        reply = Reply(422 if body == b"bad" else 200, b'{"said":"%b"}' % body if body != b"large" else b"x" * 10**6, {"retry-after": "1"} if body == b"bad" else {})
        await (send_whole if scope["path"] == "/whole" else send_reply)(reply, "r-1", send)
    made = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, http=Protocol, lifespan="off", log_level="critical", date_header=False))
    thread = threading.Thread(target=lambda: asyncio.run(made.serve()), daemon=True)
    thread.start()
    while not made.started: thread.join(0.01)
    yield made.servers[0].sockets[0].getsockname()[1], writes
    made.should_exit = True
    thread.join()


def said(port: int, path: str, bodies: list[bytes], at_once: bool, last: bytes = b"close") -> bytes:
    "All that comes back over one connection, which the last request ends."
    asked = [b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nConnection: %b\r\n\r\n%b" % (path.encode(), len(b), last if b is bodies[-1] else b"keep-alive", b) for b in bodies]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
        for piece in [b"".join(asked)] if at_once else asked: one.sendall(piece)
        return b"".join(iter(lambda: one.recv(2**16), b""))


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "pipelined"])
def test_the_bytes_are_the_same_and_each_reply_is_one_write(server, at_once):
    port, writes = server
    bodies = [b"one", b"bad", b"", b"large", b"two", b"last"]
    parts, before = said(port, "/parts", bodies, at_once), len(writes)
    whole = said(port, "/whole", bodies, at_once)
    assert whole == parts and len(re.findall(rb"HTTP/1.1 ", whole)) == len(bodies) and whole.endswith(b'{"said":"last"}')
    assert len(writes) - before == len(bodies) and before >= 2 * len(bodies)
    writes.clear()


def test_a_server_of_another_kind_gets_two_messages():
    heard: list[Any] = []
    async def send(message: Any) -> None: heard.append(message["type"])
    asyncio.run(send_whole(Reply(200, b"{}"), "r-1", send))
    assert heard == ["http.response.start", "http.response.body"]
