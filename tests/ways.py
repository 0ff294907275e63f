"""The way from a machine to its database, which tests make slow, freeze, and cut in the middle of a commit."""

from __future__ import annotations

import contextlib
import queue
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

COMMIT = re.compile(rb"commit\0", re.IGNORECASE)  # the end of a text in PostgreSQL's messages Query and Parse
Waiting = queue.SimpleQueue[tuple[float, bytes]]  # when each is due
AT_ONCE = struct.pack("ii", 1, 0)  # close without waiting for what was not delivered


class Way:
    """A TCP proxy in front of PostgreSQL's socket; `serve` may run in a thread, or in a process of its own."""

    def __init__(self, target: Path) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        self.delay = 0.0  # seconds, in each direction
        self.open = threading.Event()  # else what comes waits
        self.open.set()
        self.freezes = False  # at the next commit, before it is passed on
        self.cuts: Iterator[str] = iter(())  # how each commit from now on ends: "" well; otherwise see _commit
        self.ended = Counter[str]()  # how commits ended
        self.statements = self.trips = 0  # so far, of all connections
        self._target = str(target)
        self._links: set[Link] = set()

    def start(self) -> Way:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def serve(self) -> None:
        """Take connections until `stop`."""
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
            except OSError:  # there is no database at the moment
                client.close()
                server.close()
                continue
            self._links.add(Link(self, client, server))

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.open.set()
        self.cut()

    def cut(self) -> None:
        """Break all connections."""
        for link in [*self._links]:
            link.cut()

    def forget(self, link: Link) -> None:
        self._links.discard(link)


class Link:
    """One connection; each direction has a thread that reads and one that passes on in time."""

    def __init__(self, way: Way, client: socket.socket, server: socket.socket) -> None:
        self._way, self._ends = way, (client, server)
        self._is_deaf = False  # the client hears nothing any more
        self._asked, self._is_begun, self._last = bytearray(), False, b""
        self._mutex, self._running = threading.Lock(), 4
        for source, target in ((client, server), (server, client)):
            waiting: Waiting = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(self._read, source, waiting), daemon=True).start()
            threading.Thread(target=self._run, args=(self._pass_on, target, waiting), daemon=True).start()

    def cut(self) -> None:
        client, server = self._ends
        with contextlib.suppress(OSError):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self, work: Callable[[socket.socket, Waiting], None], end: socket.socket, waiting: Waiting) -> None:
        with contextlib.suppress(OSError):
            work(end, waiting)
        waiting.put((0.0, b""))
        self.cut()
        with self._mutex:
            self._running -= 1
            last = not self._running
        if last:
            for each in self._ends:
                each.close()
            self._way.forget(self)

    def _read(self, source: socket.socket, waiting: Waiting) -> None:
        while data := source.recv(1 << 18):
            if source is self._ends[0]:
                self._note(data)
            waiting.put((time.monotonic() + self._way.delay, data))

    def _note(self, data: bytes) -> None:
        """Count what runs statements (the messages Query and Execute), and what makes the server answer: Query, Sync, and a
        Flush that is not for a Sync's answer."""
        self._asked += data
        while len(self._asked) >= 5:
            of_type = int(self._is_begun)  # the first message has none
            length = int.from_bytes(self._asked[of_type : of_type + 4], "big") + of_type
            if len(self._asked) < length:
                return
            type_ = bytes(self._asked[:of_type])
            self._way.statements += type_ in (b"Q", b"E")
            self._way.trips += type_ in (b"Q", b"S") or (type_ == b"H" and self._last != b"S")
            self._last = type_
            self._is_begun = True
            del self._asked[:length]

    def _pass_on(self, target: socket.socket, waiting: Waiting) -> None:
        while True:
            due, data = waiting.get()
            if not data:
                return
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            self._way.open.wait()
            if target is self._ends[1]:
                if COMMIT.search(data) and self._commit(target, data):
                    return
            elif self._is_deaf:  # the commit was answered, and nobody is told
                return
            target.sendall(data)

    def _commit(self, target: socket.socket, data: bytes) -> bool:
        """Whether a commit ends the connection: it is not sent; or sent and not waited for; or done and not told."""
        way = self._way
        if way.freezes:
            way.freezes = False
            way.open.clear()
            way.open.wait()
        how = next(way.cuts, "")
        way.ended[how] += 1
        self._is_deaf = how == "done"
        if how == "sent":
            target.sendall(data)
        return how in ("unsent", "sent")


@contextlib.contextmanager
def on_way(target: Path) -> Iterator[Way]:
    """A way for a while."""
    way = Way(target).start()
    try:
        yield way
    finally:
        way.stop()
