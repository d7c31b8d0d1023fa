"""An HTTP proxy on loopback before a store, which fails as stores do."""

import contextlib
import http.client
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>%s</Message></Error>'
ANSWERS = {
    500: ERROR % (b"InternalError", b"We encountered an internal error."),
    503: ERROR % (b"SlowDown", b"Please reduce your request rate."),
}


@dataclass
class Fault:
    """What goes wrong with some requests."""

    kind: Literal["status", "slow", "cut upload", "cut answer", "lost answer", "stale listing"]
    """`status`: an error instead of an answer. `slow`: the answer comes late. `cut upload`: the
    connection ends in the middle of the body. `cut answer`: in the middle of the answer. `lost
    answer`: the store does it, and the connection ends before it says so. `stale listing`: lists
    what was there `seconds` ago."""
    status: int = 500
    seconds: float = 0.0
    """Of `slow` and `stale listing`."""
    methods: tuple[str, ...] = ()
    """Only these; all if empty."""
    name: str = ""
    """Only requests whose path has this in it."""
    count: float = float("inf")
    """So many requests."""
    until: float = float("inf")
    """Up to this `time.monotonic()`."""
    hits: int = field(default=0, init=False)

    def meets(self, method: str, path: str) -> bool:
        if self.kind == "stale listing" and not (method == "GET" and "list-type" in path):
            return False
        return (
            self.hits < self.count
            and time.monotonic() < self.until
            and (not self.methods or method in self.methods)
            and self.name in path
        )


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to `behind`, a host and a port, but for its `faults`."""

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self.listings: dict[str, list[tuple[float, bytes]]] = {}
        """Request -> when it was answered, and what."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        self.faults += faults
        try:
            yield
        finally:
            for fault in faults:
                self.faults.remove(fault)

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.meets(method, path):
                    fault.hits += 1
                    return fault
        return None


@contextlib.contextmanager
def proxy(behind: str) -> Iterator[Proxy]:
    """Run a proxy before the store at `behind`, such as `http://127.0.0.1:9000`."""
    with Proxy(behind.removeprefix("http://")) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do(self) -> None:
        fault = self.server.fault_of(self.command, self.path)
        kind = fault.kind if fault else ""
        size = int(self.headers.get("Content-Length", 0))
        if kind == "cut upload":
            self.rfile.read(size // 2)
            return self._cut()
        body = self.rfile.read(size)
        if kind == "status":
            assert fault is not None
            return self._answer(fault.status, {}, ANSWERS[fault.status])
        if kind == "slow":
            assert fault is not None
            time.sleep(fault.seconds)
        status, headers, answer = self._passed_on(body)
        if kind == "lost answer":
            return self._cut()
        if "list-type" in self.path and status == 200:
            kept = self.server.listings.setdefault(self.path, [])
            kept.append((time.monotonic(), answer))
            if kind == "stale listing":
                assert fault is not None
                at = time.monotonic() - fault.seconds
                answer = next((old for when, old in reversed(kept) if when <= at), kept[0][1])
        self._answer(status, headers, answer, cut=kind == "cut answer")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

    def _passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        skipped = {"connection", "expect"}
        headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False
    ) -> None:
        own = {"connection", "transfer-encoding", "content-length", "date", "server"}
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in own:
                self.send_header(name, value)
        length = next((v for k, v in headers.items() if k.lower() == "content-length"), None)
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", length if is_head and length else str(len(body)))
        self.end_headers()
        if not is_head:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass
