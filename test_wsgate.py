"""Tests for wsgate, in the order of wsgate.py; every server here is real, on port 0.

No mocks of sockets, no fixed ports, no bare sleeps: eventually() is the only place that
waits for time to pass. A slow machine sets TIME_FACTOR=5.
"""

import base64
import configparser
import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import pytest

import wsgate

HERE = os.path.dirname(os.path.abspath(wsgate.__file__))
WSGATE = os.path.join(HERE, "wsgate.py")

# The unit of every timeout below.
MS = 0.001 * float(os.environ.get("TIME_FACTOR", "1"))

# --------------------------------------------------------------------- Helpers


def eventually(condition, within=5000 * MS):
    """Wait until condition() is true and return its value; fail otherwise. The only sleep here."""
    end = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "not within %.1f s" % within
        time.sleep(5 * MS)


def every_way(data):
    """The same bytes whole, byte by byte and in random pieces: parsers must not care."""
    yield [data]
    yield [data[i:i + 1] for i in range(len(data))]
    rng, pieces, rest = random.Random(len(data)), [], data
    while rest:
        size = rng.randint(1, 7)
        pieces.append(rest[:size])
        rest = rest[size:]
    yield pieces


class Peer:
    """One end of a connection: what is sent and read is bytes, nothing is hidden."""

    def __init__(self, sock):
        self.sock = sock
        self.sock.settimeout(5000 * MS)
        self.buffer = b""

    def send(self, *parts):
        self.sock.sendall(b"".join(parts))
        return self

    def read(self, size):
        """Exactly size bytes."""
        while len(self.buffer) < size:
            data = self.sock.recv(65536)
            assert data, "ended after %r" % self.buffer[:200]
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def read_until(self, mark):
        while mark not in self.buffer:
            data = self.sock.recv(65536)
            assert data, "ended after %r" % self.buffer[:200]
            self.buffer += data
        end = self.buffer.index(mark) + len(mark)
        data, self.buffer = self.buffer[:end], self.buffer[end:]
        return data

    def rest(self):
        """All bytes up to the end of the stream; a reset counts as one."""
        try:
            while True:
                data = self.sock.recv(65536)
                if not data:
                    break
                self.buffer += data
        except ConnectionError:
            pass
        data, self.buffer = self.buffer, b""
        return data

    def head(self):
        """Read a head -> its bytes, with the empty line."""
        return self.read_until(b"\r\n\r\n")

    def response(self, method=b"GET"):
        """Read one response -> Response(status, fields, body)."""
        return read_response(self, method)

    def ended(self, within=5000 * MS):
        """True if the other side ends the connection (FIN or RST) in time; reads and drops what comes."""
        deadline = time.monotonic() + within
        try:
            while True:
                self.sock.settimeout(max(0.001, deadline - time.monotonic()))
                if not self.sock.recv(65536):
                    return True
        except ConnectionError:
            return True
        except socket.timeout:
            return False
        finally:
            self.sock.settimeout(5000 * MS)

    def silent(self, seconds):
        """True if nothing comes and nothing ends for so long."""
        return not self.buffer and not select_readable(self.sock, seconds)

    def finish(self):
        """Say that nothing more will be sent."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self):
        self.sock.close()


def select_readable(sock, seconds):
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Response:
    """A response as a client sees it; fields is a list of (lower-case name, value)."""

    def __init__(self, head, body):
        lines = head.split(b"\r\n")
        self.head = head
        self.status = int(lines[0].split(b" ")[1])
        self.fields = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines[1:-2])]
        self.body = body

    def get(self, name):
        """The value of a field, None if it is not there."""
        return dict(self.fields).get(name)

    @property
    def reason(self):
        """The word in X-Wsgate-Reason."""
        return (self.get(b"x-wsgate-reason") or b"").decode()


def read_response(peer, method=b"GET"):
    while True:
        head = peer.head()
        response = Response(head, b"")
        if response.status == 101 or response.status >= 200:
            break
    length, chunked = response.get(b"content-length"), response.get(b"transfer-encoding")
    if method == b"HEAD" or response.status in (101, 204, 304):
        return response
    if chunked:
        response.body, _ = read_chunked(peer)
    elif length is not None:
        response.body = peer.read(int(length))
    else:
        response.body = peer.rest()
    return response


def read_chunked(peer):
    """-> (payload, trailer lines)"""
    payload = b""
    while True:
        size = int(peer.read_until(b"\r\n"), 16)
        if not size:
            break
        payload += peer.read(size)
        assert peer.read(2) == b"\r\n"
    trailers = []
    while True:
        line = peer.read_until(b"\r\n")
        if line == b"\r\n":
            return payload, trailers
        trailers.append(line[:-2])


def connect(port, host="127.0.0.1"):
    """A raw connection to the gate -> Peer."""
    return Peer(socket.create_connection((host, port), 5000 * MS))


def field(head, name):
    """The values of a field in the bytes of a head."""
    return [line.partition(b":")[2].strip() for line in head.split(b"\r\n")[1:]
            if line.partition(b":")[0].lower() == name.lower()]


KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3


def request(method=b"GET", target=b"/", *fields, **more):
    """The bytes of a request; body=... adds Content-Length."""
    body = more.get("body")
    lines = [method + b" " + target + b" HTTP/1.1"]
    if not any(line.lower().startswith(b"host:") for line in fields):
        lines.append(b"Host: gate.test")
    lines += fields
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def handshake(target=b"/", *fields):
    """The bytes of a WebSocket handshake."""
    return request(b"GET", target, b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Key: " + KEY,
                   b"Sec-WebSocket-Version: 13", *fields)


def switching(*fields):
    """A backend's good 101."""
    return b"\r\n".join((b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade",
                         b"Sec-WebSocket-Accept: " + ACCEPT) + fields) + b"\r\n\r\n"


def ok(body=b"ok", *fields):
    """A backend's 200 with a length."""
    return b"\r\n".join((b"HTTP/1.1 200 OK",) + fields + (b"Content-Length: %d" % len(body),)) + b"\r\n\r\n" + body


def frame(opcode, payload=b"", mask=None, fin=True, rsv=0):
    """A WebSocket frame, by itself, not by wsgate's code."""
    head = bytes(((0x80 if fin else 0) | rsv << 4 | opcode,))
    bit = 0x80 if mask is not None else 0
    if len(payload) < 126:
        head += bytes((bit | len(payload),))
    elif len(payload) < 1 << 16:
        head += bytes((bit | 126,)) + struct.pack("!H", len(payload))
    else:
        head += bytes((bit | 127,)) + struct.pack("!Q", len(payload))
    if mask is None:
        return head + payload
    key = (mask * (len(payload) // 4 + 1))[:len(payload)]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(len(payload), "big")


def read_frame(peer):
    """-> (opcode, payload) of the next frame, unmasked."""
    first, second = peer.read(2)
    length = second & 0x7F
    if length > 125:
        length = int.from_bytes(peer.read(2 if length == 126 else 8), "big")
    mask = peer.read(4) if second & 0x80 else b"\0\0\0\0"
    payload = peer.read(length)
    return first & 0x0F, bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


class ScriptedBackend:
    """A listener on port 0 that runs one script per connection, in a thread, and keeps what it needs to tell.

    script(peer): reads and writes. heads: the request heads seen by scripts that used peer.head().
    """

    def __init__(self, script=None, tls=None, path=None, family=socket.AF_INET):
        self.script = script
        self.tls = tls
        if path:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(path)
            self.where = "unix:" + path
        else:
            self.listener = socket.socket(family)
            self.listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
            self.port = self.listener.getsockname()[1]
            self.where = ("[::1]:%d" if family == socket.AF_INET6 else "127.0.0.1:%d") % self.port
        self.listener.listen(1024)
        self.peers = []        # every connection accepted, as Peer
        self.errors = []       # assertion errors of scripts
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            peer = Peer(sock)
            self.peers.append(peer)
            if self.script:
                threading.Thread(target=self.run, args=(peer,), daemon=True).start()

    def run(self, peer):
        try:
            if self.tls:
                peer.sock = self.tls.wrap_socket(peer.sock, server_side=True)
            self.script(peer)
        except (OSError, AssertionError) as error:
            self.errors.append(error)
        finally:
            if not getattr(peer, "kept", False):
                peer.close()

    def peer(self, number=0):
        """The connection of this number, once it is there (a backend without a script)."""
        return eventually(lambda: len(self.peers) > number and self.peers[number])

    def close(self):
        """Refuse connections from now on."""
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        self.thread.join(5000 * MS)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
        for peer in self.peers:
            peer.close()


def answer(*raw):
    """A script that reads one request head (and its body by length) and sends these bytes."""
    def script(peer):
        read_request(peer)
        peer.send(*raw)
        peer.finish()
        peer.ended()
    return script


def read_request(peer):
    """Read a request -> (head, body)."""
    head = peer.head()
    length = field(head, b"content-length")
    if field(head, b"transfer-encoding"):
        return head, read_chunked(peer)[0]
    return head, peer.read(int(length[0])) if length else b""


def echo(peer):
    """A script: 101, then every byte comes back until the end."""
    peer.head()
    peer.send(switching())
    data, peer.buffer = peer.buffer, b""
    while True:
        if data:
            peer.sock.sendall(data)
        data = peer.sock.recv(65536)
        if not data:
            return


class Running:
    """A gate in this process, on port 0, and its logs."""

    def __init__(self, gate):
        self.gate = gate
        self.port = gate.listeners[0].server_address[1]
        self.access = []       # lines of the access log
        self.errors = []       # lines of the error log

    def connect(self):
        return connect(self.port)

    def ask(self, raw, method=b"GET"):
        """Send a request on a connection of its own -> Response."""
        peer = self.connect()
        try:
            return peer.send(raw).response(method)
        finally:
            peer.close()

    def tunnel(self, backend, *fields):
        """Open a tunnel to a backend without a script -> (client Peer, backend Peer)."""
        count = len(backend.peers)
        client = self.connect().send(handshake(b"/", *fields))
        peer = backend.peer(count)
        peer.head()
        peer.send(switching())
        assert client.response().status == 101
        return client, peer

    def line(self, *marks):
        """The access log line that has all these texts in it, once it is there."""
        return eventually(lambda: next((line for line in list(self.access) if all(mark in line for mark in marks)), None))

    def signal(self, name):
        """As if the process had got this signal."""
        self.gate.signals.append(getattr(signal, name))
        self.gate.wake_out.send(b"!")


class ListHandler(logging.Handler):
    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def running(ini, tmp_path):
    """A gate with this configuration (its listen is added if there is none); stopped and checked for leaks at the end."""
    path = os.path.join(str(tmp_path), "wsgate.ini")
    if "listen =" not in ini:
        ini = ini.replace("[server]", "[server]\nlisten = 127.0.0.1:0", 1)
    with open(path, "w") as file:
        file.write(ini)
    gate = wsgate.Gate(wsgate.load_config(path))
    gate.load = lambda: wsgate.load_config(path)
    gate.open()
    here = Running(gate)
    here.path = path
    handlers = [(wsgate.access_log, ListHandler(here.access)), (wsgate.log, ListHandler(here.errors))]
    for logger, handler in handlers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    thread = threading.Thread(target=gate.run, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        here.signal("SIGTERM")
        thread.join(5000 * MS)
        for logger, handler in handlers:
            logger.removeHandler(handler)
        assert not thread.is_alive(), "the gate did not stop"
    assert not any("Traceback" in line or "internal error" in line for line in here.errors), here.errors


def simple(backend, *lines):
    """The INI text of a gate in front of one backend; lines go into [server]."""
    return "[server]\n%s\nproxy_pass = http://%s\n" % ("\n".join(lines), backend.where)


@contextlib.contextmanager
def gate_and_backend(tmp_path, script=None, *lines):
    """-> (Running, ScriptedBackend)"""
    with ScriptedBackend(script) as backend:
        with running(simple(backend, *lines), tmp_path) as gate:
            yield gate, backend


def descriptors():
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def threads():
    """How many threads this process has, those of _thread included."""
    return len(os.listdir("/proc/self/task"))


@contextlib.contextmanager
def nothing_left():
    """What goes on inside leaves no thread and no descriptor behind."""
    before = descriptors(), threads()
    yield
    eventually(lambda: descriptors() <= before[0] and threads() <= before[1])


@contextlib.contextmanager
def process(*arguments, **more):
    """The real program as a process; stderr and stdout are collected -> Popen with .lines."""
    environ = dict(os.environ, PYTHONUNBUFFERED="1", **more.get("environ", {}))
    child = subprocess.Popen([sys.executable, WSGATE] + list(arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             stdin=subprocess.DEVNULL, universal_newlines=True, env=environ, cwd=more.get("cwd"),
                             preexec_fn=more.get("before"))
    child.lines = []

    def collect():
        for line in child.stdout:
            child.lines.append(line.rstrip("\n"))

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    child.said = lambda text: any(text in line for line in list(child.lines))
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        collector.join(5000 * MS)
        child.stdout.close()


def run_program(*arguments, **more):
    """Run the program to its end -> (exit status, output)."""
    done = subprocess.run([sys.executable, more.pop("file", WSGATE)] + list(arguments), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, universal_newlines=True, timeout=20000 * MS, **more)
    return done.returncode, done.stdout


def free_port():
    """A port that nobody listens on now, for a process that is told its port by a file."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def listening(port):
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection(("127.0.0.1", port), 1000 * MS).close()
        return True
    except OSError:
        return False
def test_smoke(tmp_path):
    with nothing_left():
        with gate_and_backend(tmp_path, echo) as (gate, backend):
            client = gate.connect().send(handshake())
            assert client.response().status == 101
            client.send(frame(1, b"hello", b"abcd"))
            assert client.read(11) == frame(1, b"hello", b"abcd")
            client.close()
            assert "101 closed" in gate.line("101", "closed")
