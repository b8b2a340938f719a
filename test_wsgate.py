"""Tests for wsgate, in the order of wsgate.py: the sections have the same names.

Every server and client here is real, on port 0. No mocks of sockets, no fixed ports, no bare
sleeps: eventually() is the only place that waits for time to pass.

    To test ...                        copy this
    a value of wsgate.ini              a row of the tables in "Configuration", or
                                       load_text(tmp_path, SERVER + "key = value\n")
    an error in wsgate.ini             error, = errors_of(tmp_path, "[server]\n...")
    a request that is refused          a row of BAD_REQUEST_LINES or BAD_REQUEST_FIELDS
    what the backend receives          with http_exchange(tmp_path, request(...)) as (
                                               gate, client, backend, head):
    a response of wsgate itself        with running(ini, tmp_path) as gate:
                                           response = gate.fetch(request(b"GET", b"/path"))
    a backend that behaves badly       with gate_and_backend(tmp_path, script) as (gate, backend):
                                       with a script(peer) as those in "Helpers: backends"
    a WebSocket tunnel                 with tunnel(tmp_path, "idle_timeout = 1s") as (
                                               gate, client, backend):
    a tunnel without frames            raw_tunnel() in place of tunnel()
    the access log                     gate.line("reason=..."), line_of(gate, client, backend)
    several servers                    running(ini_for_pool([one.where, two.where]), tmp_path)
    TLS                                running(tls_ini(tls, ...), tmp_path), tls_connect(gate, tls)
    a constant of wsgate, made short   constants(LINGER=200 * MS)
    a reload                           reload(gate, ini)
    signals, the process               with program(tmp_path, "return = 200") as child:
    the command line                   run_program("-c", path, "-t")

    make test ARGS="-k words -x"       some tests, up to the first failure
    TIME_FACTOR=5 make test            on a slow machine
"""

import ast
import base64
import configparser
import contextlib
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import py_compile
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc

import pytest

import wsgate

HERE = os.path.dirname(os.path.abspath(wsgate.__file__))
WSGATE = os.path.join(HERE, "wsgate.py")

# In memory where that is possible: on a disk, a folder for each test takes seconds altogether.
FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
os.chmod(FOLDER.name, 0o755)  # for tests that drop root

# What process() and run_program() run: the compiled wsgate.py starts in half the time.
PROGRAM = py_compile.compile(WSGATE, os.path.join(FOLDER.name, "wsgate"))
IMPATIENT = """import sys, wsgate
wsgate.__file__ = __file__  # what USR2 starts
wsgate.QUIET = wsgate.Workers.KEEP = 0.05
sys.exit(wsgate.main())
"""

# The unit of all times below.
MS = 0.001 * float(os.environ.get("TIME_FACTOR", "1"))

FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()


# ----------------------------------------------------- Helpers: time and chunks


@pytest.fixture(autouse=True)
def short_lived_workers(monkeypatch):
    """Make idle worker threads end soon: nothing_left() waits for them."""
    monkeypatch.setattr("wsgate.Workers.KEEP", 0.005)


@pytest.fixture
def tmp_path():
    """Return a folder for one test; pytest's own takes longer than most tests."""
    return pathlib.Path(tempfile.mkdtemp(dir=FOLDER.name))


@pytest.fixture
def constants(monkeypatch):
    """Return a function that sets constants of wsgate for one test: constants(LINGER=200 * MS)."""
    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(wsgate, name, value)
    return change


@pytest.fixture
def impatient(monkeypatch):
    """Let process() run a wsgate whose tunnels are quiet soon and whose idle threads end soon."""
    folder = tempfile.mkdtemp(dir=FOLDER.name)
    shutil.copy(PROGRAM, os.path.join(folder, "wsgate.pyc"))
    monkeypatch.setitem(globals(), "PROGRAM", write_file(folder, "wsgate", IMPATIENT))


def eventually(condition, within=5000 * MS):
    """Wait until condition() is true and return its value; fail after within seconds."""
    end, pause = time.monotonic() + within, 0.0002
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "not true within %.1f s" % within
        time.sleep(pause)
        pause = min(2 * pause, 0.005)


@contextlib.contextmanager
def takes(least, most):
    """Fail unless the block takes this many (scaled) milliseconds.

    The lower bound has a tolerance: what the gate times may have begun before the block.
    """
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert 0.8 * least * MS <= took <= most * MS, "took %.3f s" % took


@contextlib.contextmanager
def nothing_left():
    """Fail if the block leaves a thread or an open descriptor."""
    before = descriptors(), threads()
    yield
    eventually(lambda: descriptors() <= before[0] and threads() <= before[1])


def descriptors():
    """Return the number of open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def pipe_ends():
    """Return the number of open ends of pipes in this process."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of this folder
            count += os.readlink("/proc/self/fd/" + name).startswith("pipe:")
    return count


def threads():
    """Return the number of threads of this process, those of _thread included."""
    return len(os.listdir("/proc/self/task"))


def cpu_while_waiting(wait):
    """Return the CPU time in seconds that this process uses in wait milliseconds."""
    here, there = socket.socketpair()
    with here, there:
        used = time.process_time()
        select_readable(here, wait * MS)
        return time.process_time() - used


def peak_memory(pid):
    """Return the most memory that a process has had resident so far, in KiB."""
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1))


def processor_seconds(pid):
    """Return the CPU time in seconds that a process has used."""
    with open("/proc/%d/stat" % pid) as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def resources_of(pid):
    """Return (threads, descriptors, MiB of memory) of a process."""
    with open("/proc/%d/statm" % pid) as file:
        memory = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2 ** 20
    return len(os.listdir("/proc/%d/task" % pid)), len(os.listdir("/proc/%d/fd" % pid)), memory


def all_chunkings(data):
    """Yield the same bytes whole, byte by byte and in random pieces."""
    yield [data]
    yield [data[i:i + 1] for i in range(len(data))]
    rng, pieces, rest = random.Random(len(data)), [], data
    while rest:
        size = rng.randint(1, 7)
        pieces.append(rest[:size])
        rest = rest[size:]
    yield pieces


def some_chunkings(data):
    """all_chunkings; long data not byte by byte."""
    if len(data) < 2000:
        return all_chunkings(data)
    return [data], [data[i:i + 999] for i in range(0, len(data), 999)]


def random_pieces(rng, data, largest):
    """Yield the same bytes in pieces of random sizes."""
    position = 0
    while position < len(data):
        size = rng.choice((rng.randint(1, 20), rng.randint(1, 2000), rng.randint(1, largest)))
        yield data[position:position + size]
        position += size


def fuzzed(rng, good):
    """Return one of these byte strings, mutated at random."""
    data = rng.choice(good)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        start = rng.randint(0, len(data))
        end = min(len(data), start + rng.choice((0, 1, 1, 4, 30)))
        other = rng.choice(good)
        piece = rng.choice((b"", rng.choice(FUZZ_BYTES), rng.choice(FUZZ_BYTES),
                            data[start:end] * 2, other, other[:rng.randint(0, len(other))],
                            bytes(rng.getrandbits(8) for _ in range(rng.randint(1, 40)))))
        data = data[:start] + piece + data[end:]
    return data


FUZZ_BYTES = [bytes((byte,)) for byte in b"\r\n\0 \t:0-+_\xff%#,;"]
FUZZ_BYTES += [b"\r\n", b"9" * 20, b"f" * 16]


def send_in_thread(peer, pieces):
    """Send from a thread; return the Thread."""
    def send():
        for piece in pieces:
            peer.sock.sendall(piece)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


# --------------------------------------------------- Helpers: bytes on the wire

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3


def request(method=b"GET", target=b"/", *fields, **more):
    """Return the bytes of a request; body=... adds Content-Length."""
    body = more.get("body")
    lines = [method + b" " + target + b" HTTP/1.1"]
    if not any(line.lower().startswith(b"host:") for line in fields):
        lines.append(b"Host: gate.test")
    lines += fields
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def handshake(target=b"/", *fields):
    """Return the bytes of a WebSocket handshake."""
    return request(b"GET", target, b"Upgrade: websocket", b"Connection: Upgrade",
                   b"Sec-WebSocket-Key: " + KEY, b"Sec-WebSocket-Version: 13", *fields)


def custom_handshake(start=b"GET / HTTP/1.1", upgrade=b"Upgrade: websocket",
                     connection=b"Connection: Upgrade", key=b"Sec-WebSocket-Key: " + KEY,
                     version=b"Sec-WebSocket-Version: 13", more=b"", body=b""):
    """Return a handshake in which each line can be replaced, or left out with b""."""
    lines = (start, b"Host: gate.test", upgrade, connection, key, version, more)
    return b"\r\n".join(line for line in lines if line) + b"\r\n\r\n" + body


BOTH_WAYS = pytest.mark.parametrize(
    "raw", [lambda target, *fields: request(b"GET", target, *fields), handshake],
    ids=["http", "handshake"])


def basic(user, password):
    """Return the Authorization field for HTTP Basic."""
    return b"Authorization: Basic " + base64.b64encode(user + b":" + password)


def sha1_line(user, password, salt=b""):
    """Return an htpasswd line, {SSHA} with a salt."""
    kind = "{SSHA}" if salt else "{SHA}"
    digest = hashlib.sha1(password + salt).digest() + salt
    return "%s:%s%s\n" % (user, kind, base64.b64encode(digest).decode())


def proxy_v2(command, family, data):
    """Return a PROXY protocol header, version 2."""
    return b"\r\n\r\n\0\r\nQUIT\n" + bytes((command, family)) + struct.pack("!H", len(data)) + data


def switching(*fields):
    """Return a valid 101 response to handshake()."""
    lines = (b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade",
             b"Sec-WebSocket-Accept: " + ACCEPT)
    return b"\r\n".join(lines + fields) + b"\r\n\r\n"


def ok(body=b"ok", *fields):
    """Return a 200 response with Content-Length."""
    lines = (b"HTTP/1.1 200 OK",) + fields + (b"Content-Length: %d" % len(body),)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked_body(*pieces):
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces + (b"",))


BODY_300K = random.Random(1).getrandbits(8 * 300000).to_bytes(300000, "big")


def field(head, name):
    """Return the values of a field in the bytes of a head."""
    return [line.partition(b":")[2].strip() for line in head.split(b"\r\n")[1:]
            if line.partition(b":")[0].lower() == name.lower()]


def head_lines(head):
    return head[:-4].split(b"\r\n")


def malformed_head(head):
    """Return whether a request head is one that no backend may receive."""
    lines = head_lines(head)
    names = [line.partition(b":")[0].lower() for line in lines[1:]]
    return (re.search(br"[\r\n\0]", b"".join(lines))
            or not re.fullmatch(br"[^ ]+ [^ ]+ HTTP/1\.1", lines[0])
            or not all(re.fullmatch(br"[!#-'*+.^`|~0-9A-Za-z-]+", name) for name in names)
            or names.count(b"host") != 1 or names.count(b"connection") != 1
            or names.count(b"content-length") + names.count(b"transfer-encoding") > 1
            or b"keep-alive" in names)


HOST_LINE = b"\r\nHost: gate.test\r\n"
CHUNKED_POST = b"POST / HTTP/1.1" + HOST_LINE + b"Transfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

CHUNKED_IN = (b"5;a=b;c=\"d\"\r\nhello\r\n007 ;e\r\n, world\r\nA\r\n0123456789\r\n0;last\r\n"
              b"X-Checksum: 1\r\nHost: evil\r\nContent-Length: 9\r\nTransfer-Encoding: x\r\n"
              b"X_Y: 1\r\nX-Forwarded-For: 1\r\nAuthorization: x\r\nCookie: a\r\n"
              b"Connection: x\r\nUpgrade: h2c\r\n\r\n")
CHUNKED_OUT = b"5\r\nhello\r\n7\r\n, world\r\na\r\n0123456789\r\n0\r\nX-Checksum: 1\r\n\r\n"


def frame(opcode, payload=b"", mask=None, fin=True, rsv=0):
    """Return a WebSocket frame (RFC 6455 5.2), made without code of wsgate."""
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
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return head + mask + masked.to_bytes(len(payload), "big")


def frames_in(data, masked):
    """Decode without code of wsgate; return ([(first byte, payload)], incomplete rest)."""
    frames, position = [], 0
    while True:
        if len(data) < position + 2:
            return frames, data[position:]
        first, second = data[position], data[position + 1]
        assert bool(second & 0x80) == masked
        wide = {126: 2, 127: 8}.get(second & 0x7F, 0)
        begin = position + 2 + wide + (4 if masked else 0)
        length = second & 0x7F
        if wide:
            length = int.from_bytes(data[position + 2:position + 2 + wide], "big")
        if len(data) < begin + length:
            return frames, data[position:]
        payload = data[begin:begin + length]
        if masked:
            payload = frame(0, payload, data[begin - 4:begin])[-length:] if length else b""
        frames.append((first, payload))
        position = begin + length


def wire(masked, *parts):
    """Encode (opcode, payload, fin) ...; return (bytes, set of the positions of their ends)."""
    data, ends = b"", {0}
    for opcode, payload, fin in parts:
        data += frame(opcode, payload, b"\x81\x02\xff\x00" if masked else None, fin)
        ends.add(len(data))
    return data, ends


def random_frames(rng, total, masked):
    """Return frames of all sizes, at least total bytes."""
    data = []
    while total > 0:
        size = rng.choice((0, 1, rng.randint(2, 125), rng.randint(126, 5000), 65535, 65536,
                           rng.randint(20000, 400000)))
        data.append(frame(rng.choice((1, 2)), os.urandom(size), os.urandom(4) if masked else None))
        total -= size
    return b"".join(data)


def random_messages(rng, count):
    """Yield (first byte, payload) of frames: messages, also fragmented, pings, pongs, a Close."""
    inside = False
    for number in range(count):
        if rng.random() < 0.15:
            yield rng.choice((0x89, 0x8A)), b"%d" % number
            continue
        last = rng.random() < 0.6
        size = rng.choice((0, 1, 7, 8, 125, 126, 127, rng.randint(128, 3000),
                           rng.choice((65535, 65536, 150000))))
        payload = (rng.getrandbits(8 * size) if size else 0).to_bytes(size, "big")
        yield last << 7 | (0 if inside else rng.choice((1, 2))), payload
        inside = not last
    yield 0x80 if inside else 0x81, b"end"
    yield 0x88, b"\x03\xe8"


# --------------------------------------------- Helpers: one end of a connection


class Peer:
    """One end of a connection, for bytes; reads wait for at most five (scaled) seconds."""

    def __init__(self, sock):
        self.sock = sock
        self.sock.settimeout(5000 * MS)
        self.buffer = b""
        self.was_reset = False  # rest() ended by a reset

    def send(self, *parts):
        self.sock.sendall(b"".join(parts))
        return self

    def read(self, size):
        """Read exactly size bytes."""
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
        """Read to the end of the stream; a reset ends it too."""
        try:
            while True:
                data = self.sock.recv(65536)
                if not data:
                    break
                self.buffer += data
        except ConnectionError:
            self.was_reset = True
        data, self.buffer = self.buffer, b""
        return data

    def head(self):
        """Read a head; return its bytes with the empty line."""
        return self.read_until(b"\r\n\r\n")

    def response(self, method=b"GET"):
        """Read a final response; return a Response."""
        return read_response(self, method)

    def ended(self, within=5000 * MS):
        """Discard what arrives; return whether the peer ends the stream (FIN or RST) in time."""
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
        """Return whether nothing arrives and nothing ends for this many seconds."""
        return not self.buffer and not select_readable(self.sock, seconds)

    def finish(self):
        """Shut down the sending direction."""
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


def connect(port, host="127.0.0.1"):
    """Connect to a port; return a Peer."""
    return Peer(socket.create_connection((host, port), 5000 * MS))


def unix_peer(path):
    """Connect to a Unix socket; return a Peer."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return Peer(sock)


class Response:
    """A response as a client sees it; fields is a list of (lower-case name, value)."""

    def __init__(self, head, body):
        lines = head.split(b"\r\n")
        self.head = head
        self.status = int(lines[0].split(b" ")[1])
        fields = (line.partition(b":") for line in lines[1:-2])
        self.fields = [(name.lower(), value.strip()) for name, _, value in fields]
        self.body = body

    def get(self, name):
        """Return the value of a field or None."""
        return dict(self.fields).get(name)

    @property
    def reason(self):
        """The reason word in X-Wsgate-Reason."""
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
        response.body, _ = read_chunked_body(peer)
    elif length is not None:
        response.body = peer.read(int(length))
    else:
        response.body = peer.rest()
    return response


def read_chunked_body(peer):
    """Read a chunked body; return (payload, trailer lines)."""
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


def read_request(peer):
    """Read a request; return (head, body)."""
    head = peer.head()
    length = field(head, b"content-length")
    if field(head, b"transfer-encoding"):
        return head, read_chunked_body(peer)[0]
    return head, peer.read(int(length[0])) if length else b""


def read_frame(peer):
    """Read a frame; return (opcode, unmasked payload)."""
    first, second = peer.read(2)
    length = second & 0x7F
    if length > 125:
        length = int.from_bytes(peer.read(2 if length == 126 else 8), "big")
    mask = peer.read(4) if second & 0x80 else b"\0\0\0\0"
    payload = peer.read(length)
    return first & 0x0F, bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


def read_ping(peer, masked):
    """Read a frame that must be a ping of the gate; return its payload."""
    head = peer.read(2)
    assert head == (b"\x89\x88" if masked else b"\x89\x08")
    mask = peer.read(4) if masked else b"\0\0\0\0"
    return bytes(byte ^ mask[place % 4] for place, byte in enumerate(peer.read(8)))


def closing_code(peer, masked, before=b""):
    """Read the rest, which must be before and at most one Close; return its code or None."""
    rest = peer.rest()
    assert rest.startswith(before)
    frames, rest = frames_in(rest[len(before):], masked)
    assert rest == b"" and [first for first, _ in frames] in ([], [0x88])
    return struct.unpack("!H", frames[0][1][:2])[0] if frames else None


def fill(peer, block=b"x" * 65536, most=64 << 20):
    """Send block repeatedly until nothing is accepted for 30 ms; return the number of bytes."""
    sent = 0
    poll = select.poll()
    poll.register(peer.sock, select.POLLOUT)
    with contextlib.suppress(ConnectionError):  # a timeout of the gate, on a slow machine
        while sent < most and poll.poll(30 * MS * 1000):
            place = sent % len(block)
            sent += peer.sock.send(block[place:place + min(65536, most - sent)])
    return sent


def fill_to_the_last_byte(sock):
    """The same for a non-blocking socket, which then takes no small frame either."""
    sent = refused = 0
    while refused < 20:
        try:
            sent += sock.send(bytes(1 << 16))
            refused = 0
        except BlockingIOError:
            refused += 1
            time.sleep(5 * MS)
    return sent


def receives(peer, count):
    """Return whether this many bytes arrive."""
    count -= len(peer.buffer)
    while count > 0:
        data = peer.sock.recv(min(count, 1 << 20))
        if not data:
            return False
        count -= len(data)
    return True


def ends_by_reset(peer):
    """Return whether the stream ends with a reset."""
    try:
        while peer.sock.recv(65536):
            pass
    except ConnectionError:
        return True
    return False


def send_slowly(peer, data):
    """Send one byte every 20 ms until something comes back."""
    for place in range(len(data)):
        if not peer.silent(20 * MS):
            return
        peer.send(data[place:place + 1])


def send_and_receive(sock, out, size):
    """Send out, then read size bytes, reading only when sending stalls; return the bytes."""
    sock.settimeout(0)
    out, got, reading, end = memoryview(out), bytearray(), False, time.monotonic() + 10000 * MS
    while out or len(got) < size:
        assert time.monotonic() < end, "%d to send, %d to read" % (len(out), size - len(got))
        moved = 0
        try:
            if out:
                moved = sock.send(out[:65536])
                out = out[moved:]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        try:
            if reading and len(got) < size:
                data = sock.recv(min(20011, size - len(got)))
                assert data, "ended after %d bytes" % len(got)
                got += data
                moved += len(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        if not moved:
            reading = select_readable(sock, 20 * MS) or not out
    sock.settimeout(5000 * MS)
    return bytes(got)


class PongThread:
    """A thread that reads frames to the end and responds to pings."""

    def __init__(self, peer, mask):
        self.peer, self.mask = peer, mask
        self.codes, self.pings = [], 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            while True:
                opcode, payload = read_frame(self.peer)
                if opcode == 8:
                    self.codes.append(struct.unpack("!H", payload[:2])[0])
                elif opcode == 9:
                    self.pings += 1
                    self.peer.send(frame(10, payload, self.mask))
        except (OSError, AssertionError):  # the end
            pass


class RandomPeer:
    """One end of a tunnel that sends random frames in random pieces and stalls at times.

    It responds to the pings of the gate: those with a payload of 8 bytes, its own are shorter.
    """

    def __init__(self, peer, rng, masked):
        self.peer, self.rng, self.masked = peer, rng, masked
        self.talk = list(random_messages(rng, 40))
        self.messages = len([first for first, _ in self.talk if first in (0x80, 0x81, 0x82)])
        self.received = []     # frames, without the pings of the gate
        self.pongs = []        # to be sent
        self.pings = self.sent = 0
        self.poll = select.poll()

    def encode(self, first, payload):
        mask = self.rng.choice((b"abcd", b"\0\0\0\0")) if self.masked else None
        return frame(first & 15, payload, mask, first > 127)

    def run(self):
        queue, wire, unread = list(self.talk), b"", b""
        closed = False
        while queue or wire or not closed:
            closed = bool(self.received) and self.received[-1][0] == 0x88
            held = int(self.pings < 3 and not closed)  # its Close waits for some pings
            while queue and self.pongs or len(queue) > held and len(wire) < 1000:
                wire += self.pongs.pop() if self.pongs else self.encode(*queue.pop(0))
            chance = self.rng.random()
            writing = select.POLLOUT if wire and chance > 0.5 else 0
            self.poll.register(self.peer.sock, select.POLLIN | writing if chance > 0.1 else 0)
            for _, event in self.poll.poll(1 * MS * 1000):
                if event & select.POLLIN:
                    unread += self.peer.sock.recv(self.rng.choice((3, 100, 200000)))
                    frames, unread = frames_in(unread, not self.masked)
                    for first, payload in frames:
                        if first == 0x89 and len(payload) == 8:
                            self.pings += 1
                            # A pong for the latest ping is enough (RFC 6455 5.5.3).
                            self.pongs = [self.encode(0x8A, payload)]
                        else:
                            self.received.append((first, payload))
                elif event & select.POLLOUT:
                    count = self.peer.sock.send(wire[:self.rng.choice((1, 5, 300, 500000))])
                    wire, self.sent = wire[count:], self.sent + count
        assert not unread


# ------------------------------------------------------------ Helpers: backends


class ScriptedBackend:
    """A listener on port 0 that runs script(peer) for each connection, in a thread.

    Without a script, connection(n) returns the Peer of the connection number n.
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
        self.connections = []  # a Peer for every connection accepted
        self.errors = []       # exceptions of scripts
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            peer = Peer(sock)
            self.connections.append(peer)
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

    def connection(self, number=0):
        """Wait for the connection of this number; return its Peer."""
        return eventually(lambda: len(self.connections) > number and self.connections[number])

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
        for peer in self.connections:
            peer.close()


@contextlib.contextmanager
def refusing_port():
    """Yield a Peer with a port that refuses connections until its sock listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        peer = Peer(sock)
        peer.where = "127.0.0.1:%d" % sock.getsockname()[1]
        yield peer


def respond(*raw):
    """Return a script that reads one request and sends these bytes."""
    def script(peer):
        read_request(peer)
        peer.send(*raw)
        peer.finish()
        peer.ended()
    return script


def respond_status(line, *fields):
    """Return a script that sends a response without a body: respond_status(b"404 Not Found")."""
    return respond(b"\r\n".join((b"HTTP/1.1 " + line, b"Content-Length: 0") + fields) + b"\r\n\r\n")


def respond_by_row(table):
    """Return a script that responds to /N/... with row N, byte by byte to /N/drip."""
    def script(peer):
        _, number, how = read_request(peer)[0].split(b" ")[1].split(b"/")
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw = table[int(number)][0]
        pieces = [raw]
        if how == b"drip":
            pieces = [raw[i:i + 1] for i in range(min(300, len(raw)))] + [raw[300:]]
        for piece in pieces:
            peer.send(piece)
        peer.finish()
        peer.ended()
    return script


def echo_bytes(peer):
    """A script: 101, then every byte is sent back."""
    peer.head()
    peer.send(switching())
    data, peer.buffer = peer.buffer, b""
    while True:
        if data:
            peer.sock.sendall(data)
        data = peer.sock.recv(65536)
        if not data:
            return


def echo_frames(peer):
    """Echo frames up to a Close, Pings as Pongs."""
    opcode = None
    while opcode != 8:
        opcode, payload = read_frame(peer)
        peer.send(frame({9: 10}.get(opcode, opcode), payload))


def echo_service(peer):
    """A script: a handshake becomes a tunnel that echoes frames, any other request gets 200."""
    head, _ = read_request(peer)
    if not field(head, b"upgrade"):
        return peer.send(ok())
    peer.send(switching())
    while True:
        peer.send(frame(*read_frame(peer)))


def tunnel_works(peer):
    """Return whether a tunnel to echo_service() works."""
    peer.send(frame(1, b"alive?", b"abcd"))
    return read_frame(peer) == (1, b"alive?")


def upgrade_then(then=None, *fields):
    """Return a script: a valid 101 for any key, then then(peer), by default echo_frames."""
    def script(peer):
        key = field(peer.head(), b"sec-websocket-key")[0]
        digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        peer.send(switching(*fields).replace(ACCEPT, base64.b64encode(digest)))
        (then or echo_frames)(peer)
    return script


class SignOn:
    """What oauth2-proxy and Authelia do: /auth knows a cookie, /login gives one."""

    def __init__(self):
        self.heads = []
        self.backend = ScriptedBackend(self.script)

    def script(self, peer):
        head = peer.head()
        self.heads.append(head)
        target = head.split(b" ")[1]
        cookies = b"".join(field(head, b"cookie"))
        if target.startswith(b"/auth") and b"session=alice" in cookies:
            peer.send(ok(b"", b"Remote-User: alice", b"Remote-Groups: admin, staff",
                         b"X-Secret: no", b"Set-Cookie: session=alice; refreshed",
                         b"Set-Cookie: other=1"))
        elif target.startswith(b"/auth") and b"session=bob" in cookies:
            peer.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        elif target.startswith(b"/auth"):
            peer.send(b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\n"
                      b"Set-Cookie: csrf=1\r\nLocation: https://sso.test/?x\r\n"
                      b"X-Secret: no\r\nContent-Length: 0\r\n\r\n")
        elif target.startswith(b"/login"):
            back = re.search(br"rd=([^&]*)", target).group(1)
            url = re.sub(br"%(..)", lambda match: bytes([int(match.group(1), 16)]), back)
            peer.send(b"HTTP/1.1 302 Found\r\nSet-Cookie: session=alice\r\nLocation: %s\r\n"
                      b"Content-Length: 0\r\n\r\n" % url)


@contextlib.contextmanager
def signed_on(tmp_path, *lines):
    """-> (RunningGate, SignOn, heads that reached the application)"""
    sign_on, heads = SignOn(), []

    def application(peer):
        heads.append(peer.head())
        if field(heads[-1], b"transfer-encoding"):
            heads[-1] += peer.read_until(b"0\r\n") + peer.read_until(b"\r\n\r\n")
        peer.send(switching() if field(heads[-1], b"upgrade") else ok(b"secret page"))
        peer.finish()
        peer.ended()

    with sign_on.backend, ScriptedBackend(application) as backend:
        ini = ("[server]\n%s\n[location /]\nproxy_pass = http://%s\nauth_request = http://%s/auth\n"
               "auth_request_headers = Remote-User Remote-Groups Remote-Email\n"
               "auth_request_login = https://sso.test/login?rd=$escaped_url\n"
               % ("\n".join(lines), backend.where, sign_on.backend.where))
        with running(ini, tmp_path) as gate:
            yield gate, sign_on, heads


def read_nothing(peer):
    """Discard everything: no Pong, no Close."""
    peer.ended()


def read_until_close(peer):
    """Discard all frames up to a Close, which is not sent back."""
    while read_frame(peer)[0] != 8:
        pass


# ------------------------------------------------------ Helpers: configurations

# Lines of a configuration.
PASS = "proxy_pass = http://127.0.0.1:9\n"
SERVER = "[server]\n" + PASS  # two lines
SAMPLE = os.path.join(HERE, "wsgate.ini")

CHEAP_SCRYPT = {"n": 1 << 8, "r": 8, "p": 1}

PROXY_INI = """[server]
listen = 127.0.0.1:0 proxy_protocol%s
set_real_ip_from = %s
real_ip_header = proxy_protocol
return = 200 $remote_addr
"""


def write_file(tmp_path, name, text):
    """Write a file; return its path."""
    path = os.path.join(str(tmp_path), name)
    with open(path, "w") as file:
        file.write(text)
    return path


def load_text(tmp_path, text, overrides=None):
    """Load a configuration from str or bytes; return the Config."""
    path = os.path.join(str(tmp_path), "wsgate.ini")
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return wsgate.load_config(path, overrides)


def errors_of(tmp_path, text):
    """Load a wrong configuration; return its error messages, without the folder of the file."""
    with pytest.raises(wsgate.ConfigError) as caught:
        load_text(tmp_path, text)
    return [line.replace(str(tmp_path) + os.sep, "") for line in caught.value.errors]


def location_of(config, name="/"):
    return next(each for each in config.locations if each.name == name)


def ini_for(backend, *lines):
    """Return the configuration of a gate with one backend; lines go into [server]."""
    return "[server]\n%s\nproxy_pass = http://%s\n" % ("\n".join(lines), backend.where)


def ini_for_pool(servers, *lines, balance="round_robin"):
    """Return the configuration of a gate with these servers; lines go into [server]."""
    return ("[server]\n%s\nproxy_pass = http://pool\n"
            "[upstream pool]\nbalance = %s\nserver =\n    %s\n") % (
                "\n".join(lines), balance, "\n    ".join(servers))


def ini_ms(number):
    """Return a duration for wsgate.ini, in scaled milliseconds."""
    return "%dms" % (number * MS * 1000)


SHORT_TIMES = ["%s = %s" % (key, ini_ms(150)) for key in (
    "client_header_timeout", "client_body_timeout", "keepalive_timeout", "send_timeout",
    "proxy_read_timeout", "proxy_send_timeout")]


def pool(*lines, balance="round_robin", name="pool"):
    """Return an Upstream of these server lines."""
    return wsgate.Upstream(name, wsgate.parse_servers("\n".join(lines)), balance)


def pick(upstream, client="10.0.0.1", tried=(), fields=wsgate.Headers()):
    """Return the Server that an Upstream picks for a client, counted as active, or None."""
    return upstream.pick(upstream.servers_for(client, fields), tried)


# ---------------------------------------------- Helpers: a gate in this process


def open_tunnel(port, backend, raw):
    """Open a tunnel through a port to a backend without a script; return (client, backend Peer)."""
    count = len(backend.connections)
    client = connect(port).send(raw)
    peer = backend.connection(count)
    peer.head()
    peer.send(switching())
    assert client.response().status == 101
    return client, peer


class ListHandler(logging.Handler):
    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def emit(self, record):
        self.lines.append(record.getMessage())


class RunningGate:
    """A gate in this process, on port 0, with the lines of its logs."""

    def __init__(self, gate):
        self.gate = gate
        self.port = gate.listeners[0].server_address[1]
        self.access = []       # lines of the access log
        self.errors = []       # lines of the error log

    # The only access to the inside of a gate.
    connections = property(lambda self: self.gate.connections)
    in_use = property(lambda self: self.gate.in_use)
    state = property(lambda self: self.gate.state)
    listeners = property(lambda self: self.gate.listeners)
    config = property(lambda self: self.gate.config)

    def traffic(self):
        """Return (open tunnels, bytes up, bytes down), those under way included."""
        return self.gate.counters.traffic(self.gate.connections.tunnels())

    def signal(self, name):
        """Act as if the process had received this signal."""
        self.gate.signals.append(getattr(signal, name))
        with contextlib.suppress(OSError):  # the gate has ended
            self.gate.signal_wakeup.set()

    def connect(self):
        return connect(self.port)

    def fetch(self, raw, method=b"GET"):
        """Send a request on a connection of its own; return the Response."""
        with contextlib.closing(self.connect()) as peer:
            return peer.send(raw).response(method)

    def tunnel(self, backend, *fields):
        """Open a tunnel to a backend without a script; return (client Peer, backend Peer)."""
        return open_tunnel(self.port, backend, handshake(b"/", *fields))

    def line(self, *marks):
        """Wait for a line of the access log with all these texts in it; return it."""
        return eventually(lambda: next((line for line in list(self.access)
                                        if all(mark in line for mark in marks)), None))


def with_listen(ini):
    """Add `listen = 127.0.0.1:0` to a configuration that has no listen."""
    if "\nlisten =" in ini:
        return ini
    return ini.replace("[server]", "[server]\nlisten = 127.0.0.1:0", 1)


@contextlib.contextmanager
def running(ini, tmp_path):
    """Run a gate with this configuration; yield a RunningGate. Fail if it logs a traceback."""
    path = write_file(tmp_path, "wsgate.ini", with_listen(ini))
    gate = wsgate.Gate(wsgate.load_config(path), lambda: wsgate.load_config(path))
    gate.apply_config(gate.config)
    here = RunningGate(gate)
    here.path = path
    handlers = [(wsgate.access_log, ListHandler(here.access)),
                (wsgate.log, ListHandler(here.errors))]
    for logger, handler in handlers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    thread = threading.Thread(target=gate.run, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        # A gate that still has connections looks again only after 50 ms.
        with contextlib.suppress(AssertionError):
            eventually(lambda: not gate.connections, 15 * MS)
        here.signal("SIGTERM")
        thread.join(5000 * MS)
        for logger, handler in handlers:
            logger.removeHandler(handler)
        assert not thread.is_alive(), "the gate did not stop"
    unexpected = [line for line in here.errors if "Traceback" in line or "internal error" in line]
    assert not unexpected, here.errors


@contextlib.contextmanager
def gate_and_backend(tmp_path, script=None, *lines):
    """Yield (RunningGate, ScriptedBackend); lines go into [server]."""
    with ScriptedBackend(script) as backend:
        with running(ini_for(backend, *lines), tmp_path) as gate:
            yield gate, backend


@contextlib.contextmanager
def http_exchange(tmp_path, raw, *lines):
    """Send a request; yield (RunningGate, client Peer, backend Peer, head at the backend)."""
    with nothing_left():
        with gate_and_backend(tmp_path, None, *lines) as (gate, backend):
            client = gate.connect().send(raw)
            peer = backend.connection()
            try:
                yield gate, client, peer, peer.head()
            finally:
                peer.close()
                client.close()


@contextlib.contextmanager
def tunnel(tmp_path, *lines):
    """Open a WebSocket tunnel; yield (RunningGate, client Peer, backend Peer)."""
    with nothing_left(), gate_and_backend(tmp_path, None, *lines) as (gate, backend):
        client, server = gate.tunnel(backend)
        try:
            yield gate, client, server
        finally:
            client.close()
            server.close()


@contextlib.contextmanager
def raw_tunnel(tmp_path, *lines):
    """The same for a protocol other than WebSocket: bytes without frames."""
    lines = ("upgrade = any",) + lines
    with nothing_left(), gate_and_backend(tmp_path, None, *lines) as (gate, backend):
        raw = custom_handshake(upgrade=b"Upgrade: raw/1", key=b"", version=b"")
        client = gate.connect().send(raw)
        server = backend.connection()
        server.head()
        server.send(b"HTTP/1.1 101 Go\r\nUpgrade: raw/1\r\nConnection: upgrade\r\n\r\n")
        assert client.response().status == 101
        try:
            yield gate, client, server
        finally:
            client.close()
            server.close()


@contextlib.contextmanager
def with_status(tmp_path, backend, *lines):
    """Yield (RunningGate, fetch), where fetch(path) returns the Response of the status page."""
    lines = ("listen = 127.0.0.1:0", "status_listen = 127.0.0.1:0") + lines
    with running(ini_for(backend, *lines), tmp_path) as gate:
        port = gate.listeners[1].server_address[1]

        def fetch(path, method=b"GET"):
            with contextlib.closing(connect(port)) as peer:
                raw = request(method, path).replace(b"gate.test", b"localhost")
                response = peer.send(raw).response(method)
                assert peer.rest() == b""
                return response

        yield gate, fetch


def line_of(gate, *peers):
    """Close both ends of a tunnel; return its line in the access log."""
    for peer in peers:
        peer.close()
    return gate.line("101 closed")


def reload(gate, ini):
    """Rewrite the file, send HUP and wait for its end; return the new lines of the error log."""
    count = len(gate.errors)
    with open(gate.path, "w") as file:
        file.write(with_listen(ini))
    gate.signal("SIGHUP")
    eventually(lambda: any(line.startswith(("reloaded", "reload failed"))
                           for line in gate.errors[count:]))
    return gate.errors[count:]


def wait_for_end(gate):
    """Wait until the gate has ended by itself; it gets no more signals."""
    eventually(lambda: gate.gate.signal_wakeup.fileno() < 0)
    gate.signal = lambda name: None


@contextlib.contextmanager
def requests_meanwhile(port):
    """Send requests one after another in a thread; yield the list of statuses and exceptions."""
    results, end = [], threading.Event()

    def ask():
        while not end.is_set():
            try:
                with contextlib.closing(connect(port)) as peer:
                    results.append(peer.send(request()).response().status)
            except (OSError, AssertionError) as error:
                results.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield results
    finally:
        end.set()
        thread.join(6000 * MS)


def targets_at_backend(tmp_path, ini, requests):
    """Send requests; return their targets at the backend. BACKEND in ini is its address."""
    seen = []

    def script(peer):
        seen.append(read_request(peer)[0].split(b" ")[1])
        peer.send(ok())

    with ScriptedBackend(script) as backend:
        with running(ini.replace("BACKEND", backend.where), tmp_path) as gate:
            for raw in requests:
                assert gate.fetch(raw).status == 200, raw
    return seen


def small_buffers(gate, *peers):
    """Make the socket buffers small at both ends and in the gate."""
    tunnels = [each.tunnel for each in gate.connections if each.tunnel]
    streams = [flow.source for tunnel in tunnels for flow in (tunnel.up, tunnel.down)]
    for each in peers + tuple(streams):
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            each.sock.setsockopt(socket.SOL_SOCKET, option, 131072)


def send_bytewise(gate, client, data):
    """Send byte by byte, each when the gate has read the previous one."""
    for place in range(len(data)):
        before = gate.traffic()[1]
        client.send(data[place:place + 1])
        eventually(lambda: gate.traffic()[1] > before)


@pytest.fixture(params=["splice", "copy", "select"])
def relay_mode(request, monkeypatch):
    """Run the test with splice, without it, and with select() in place of poll() as on Windows."""
    if request.param == "splice":
        if not wsgate.CAN_SPLICE:
            pytest.skip("no splice here")
        return request.param
    monkeypatch.setattr(wsgate, "CAN_SPLICE", False)
    if request.param == "select":
        monkeypatch.setattr(wsgate, "Poll", wsgate.SelectPoll)
    return request.param


@contextlib.contextmanager
def no_descriptor_free():
    """Use up the descriptors of this process."""
    resource, taken = wsgate.resource, []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 8, limits[1]))
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(socket.socket())
        yield
    finally:
        for each in taken:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def own_logging():
    """Restore all loggers at the end: the block may set up logging as the program does."""
    before = [(logger, list(logger.handlers), logger.level, logger.propagate)
              for logger in (wsgate.log, wsgate.access_log)]
    loud = logging.raiseExceptions
    try:
        yield
    finally:
        logging.raiseExceptions = loud
        for logger, handlers, level, propagate in before:
            for handler in set(logger.handlers) - set(handlers):
                logger.removeHandler(handler)
                handler.close()
            for handler in handlers:
                logger.addHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def log_to_files(tmp_path, *lines):
    """Log to access.log and error.log in this folder; return (paths, function to reopen them)."""
    paths = [os.path.join(str(tmp_path), name) for name in ("access.log", "error.log")]
    first = SERVER + "access_log = %s\nerror_log = %s" % tuple(paths)
    server = load_text(tmp_path, "\n".join((first,) + lines)).server
    wsgate.open_logs(server)
    return paths, lambda: wsgate.open_logs(server)


def lines_in(path):
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


# --------------------------------------------------------- Helpers: the program


@contextlib.contextmanager
def process(*arguments, **more):
    """Run wsgate.py as a process; yield its Popen with .lines and .logged(text)."""
    environ = dict(os.environ, PYTHONUNBUFFERED="1", **more.get("environ", {}))
    child = subprocess.Popen(
        [sys.executable, PROGRAM] + list(arguments), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
        env=environ, cwd=more.get("cwd"), preexec_fn=more.get("before"))
    child.lines = []

    def collect():
        for line in child.stdout:
            child.lines.append(line.rstrip("\n"))

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    child.logged = child.logged = lambda text: any(text in line for line in list(child.lines))
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        collector.join(5000 * MS)
        child.stdout.close()


def run_program(*arguments, **more):
    """Run wsgate.py to its end; return (exit status, output)."""
    done = subprocess.run(
        [sys.executable, more.pop("file", PROGRAM)] + list(arguments), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
        timeout=20000 * MS, **more)
    return done.returncode, done.stdout


def write_gate_ini(tmp_path, *lines):
    """Write gate.ini for a process on a free port; return (port, path)."""
    port = free_port()
    return port, write_file(
        tmp_path, "gate.ini", "[server]\nlisten = 127.0.0.1:%d\npid = %s\n%s\n" % (
            port, tmp_path / "pid", "\n".join(lines)))


def rewrite(child, old, new):
    """Replace a text in the configuration of program()."""
    with open(child.path) as file:
        text = file.read()
    assert old in text
    with open(child.path, "w") as file:
        file.write(text.replace(old, new))


@contextlib.contextmanager
def unread_program(tmp_path, *lines):
    """Run wsgate.py with an output that nothing reads; yield its Popen with .port."""
    port, path = write_gate_ini(tmp_path, *lines)
    with subprocess.Popen([sys.executable, PROGRAM, "-c", path], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        try:
            child.port = port
            eventually(lambda: listening(port))
            yield child
        finally:
            child.kill()


@contextlib.contextmanager
def program(tmp_path, *lines, **more):
    """Run wsgate.py on a free port; yield its Popen with .port, .path and .pid_file."""
    port, path = write_gate_ini(tmp_path, *lines)
    with process("-c", path, **more) as child:
        child.port, child.path, child.pid_file = port, path, str(tmp_path / "pid")
        eventually(lambda: child.logged("up to") or child.poll() is not None)
        assert child.poll() is None, child.lines
        yield child


def port_of(child):
    """Wait for the port that a process listens on; return it."""
    def found():
        assert child.poll() is None, child.lines
        text = "\n".join(list(child.lines))
        return re.search(r"listening on http://127\.0\.0\.1:(\d+)/", text)
    return int(eventually(found, 20000 * MS).group(1))


def free_port():
    """Return a port that is free now, for a process that needs a fixed one."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def has_ipv6():
    """Return whether this machine has the address ::1."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True


def listening(port):
    """Return whether this port accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), 1000 * MS).close()
        return True
    except OSError:
        return False


def control(child, name):
    """Do wsgate.py -c FILE -s NAME."""
    assert wsgate.main(["-c", child.path, "-s", name]) == 0


def pid_in(child):
    """Return the pid in the pid file, 0 while it is empty."""
    with open(child.pid_file) as file:
        return int(file.read() or "0")


@contextlib.contextmanager
def successor_of(child):
    """Kill the process that has taken over, at the end of the block."""
    try:
        yield
    finally:
        for number in re.findall(r"upgrade: process (\d+) has taken over", "\n".join(child.lines)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)


@contextlib.contextmanager
def flooded(tmp_path, backend, count, environ=None):
    """Open count silent connections to a gate with 64 descriptors; yield (Popen, client Peer)."""
    port = free_port()
    ini = tmp_path / "flood.ini"
    ini.write_text(ini_for(backend, "listen = 127.0.0.1:%d" % port,
                           "client_header_timeout = 60s", "drain_timeout = 1s"))
    with process("-c", str(ini), before=limit_descriptors(64), environ=environ or {}) as child:
        eventually(lambda: child.logged("up to"))
        client = connect(port)
        assert client.send(request()).response().status == 200  # connected before the flood
        silent = [connect(port) for _ in range(count)]
        try:
            yield child, client
        finally:
            for peer in silent + [client]:
                peer.close()


def limit_descriptors(descriptors):
    """Return a function that limits the descriptors of a child process."""
    def before():
        wsgate.resource.setrlimit(wsgate.resource.RLIMIT_NOFILE, (descriptors, descriptors))
    return before


def log_lines(output):
    """Return the lines of an output, which must all begin with "wsgate: "."""
    assert "Traceback" not in output
    lines = output.splitlines()
    assert all(line.startswith("wsgate: ") for line in lines), output
    return lines


needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="no such signals here")
needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


def run_main(capsys, *arguments):
    """Run wsgate in this process; return (exit status, output)."""
    try:
        status = wsgate.main(list(arguments))
    except SystemExit as end:
        status = end.code
    return status, "".join(capsys.readouterr())


def run_probe(capsys, *arguments):
    """Run --probe; return (exit status, reason word of the verdict, report)."""
    status, report = run_main(capsys, "--probe", *arguments)
    words = re.findall(r"^verdict   (\w+): ", report, re.M)
    return status, words[-1] if words else None, report


# ----------------------------------------------------------------- Helpers: TLS


@pytest.fixture
def tls(tmp_path):
    """Write the PEM files; return an object with their paths: ca, server, client."""
    class Files:
        ca = write_file(tmp_path, "ca.pem", pem(CA))
        server = write_file(tmp_path, "server.pem", SERVER_PEM)
        client = write_file(tmp_path, "client.pem", CLIENT_PEM)
    return Files


def tls_ini(tls, *lines):
    lines = ("[server]", "listen = 127.0.0.1:0 ssl", "ssl_certificate = " + tls.server) + lines
    return "\n".join(lines) + "\n"


def tls_backend(tls, clients=False):
    """Return the SSLContext of a backend; with clients, it requires a client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.server)
    if clients:
        context.load_verify_locations(tls.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def tls_connect(gate, tls, name="gate.test", version=None, certificate=None):
    """Connect to a gate by TLS; return a Peer, on which an end without close_notify raises."""
    context = ssl.create_default_context(cafile=tls.ca)
    if certificate:
        context.load_cert_chain(certificate)
    if version and hasattr(ssl, "TLSVersion"):
        number = getattr(ssl.TLSVersion, version.replace(".", "_"))
        context.minimum_version = context.maximum_version = number
    sock = socket.create_connection(("127.0.0.1", gate.port), 5000 * MS)
    try:
        return Peer(context.wrap_socket(sock, server_hostname=name, suppress_ragged_eofs=False))
    except OSError:
        sock.close()
        raise


def certificate_shown(gate, tls, name):
    """Return the first name in the certificate that a client with this server name gets."""
    context = ssl.create_default_context(cafile=tls.ca)
    context.check_hostname = False
    with socket.create_connection(("127.0.0.1", gate.port), 5000 * MS) as sock:
        with context.wrap_socket(sock, server_hostname=name) as wrapped:
            return wrapped.getpeercert()["subjectAltName"][0][1]


# ------------------------------------------------- Helpers: parsers and sources


def table_rows(*tables, default="400 bad_request"):
    """Join (prefix, table, suffix) ...; return [(bytes, what is wrong, "status reason")]."""
    return [(before + row[0] + behind, row[1], row[2] if len(row) > 2 else default)
            for before, table, behind in tables for row in table]


def table_params(table):
    """Return the rows of a table as parameters of pytest; their ids are what is wrong."""
    return [pytest.param(raw, verdict, id=why) for raw, why, verdict in table]


def head_verdicts(data, limit=16384):
    """Parse a head in all chunkings; return a set of (head, tail) or "status reason"."""
    verdicts = set()
    for pieces in some_chunkings(data):
        here, there = socket.socketpair()
        with here, there:
            stream, head = wsgate.Stream(here), None
            try:
                for piece in pieces:
                    there.sendall(piece)
                    while select_readable(here, 0):
                        stream.read_more(wsgate.Deadline(5000 * MS))
                        head = head or wsgate.take_head(stream, limit)
                if head:
                    wsgate.parse_request_head(head)
                verdicts.add((head, stream.buffer))
            except wsgate.HTTPError as error:
                verdicts.add("%d %s" % (error.status, error.reason))
    return verdicts


def body_through(make, data, tail=b""):
    """Feed a body in all chunkings; check where it ends; return what it passes on."""
    results = set()
    for pieces in all_chunkings(data + tail):
        body, used, passed = make(), 0, b""
        for piece in pieces:
            if not body.done:
                passed += body.feed(piece, 0)
                used += len(piece) - len(body.rest)
        assert used == len(data) and (body.done or body.at_end())
        results.add(passed)
    assert len(results) == 1
    return results.pop()


def scan(pieces, masked=False, extensions=False):
    """Feed pieces to a FrameScanner, which must pass every byte; return it."""
    scanner = wsgate.FrameScanner(masked, extensions, 0, 0.0)
    for piece in pieces:
        assert scanner.feed(piece, 1.0) == piece
        if scanner.lost:
            break
    return scanner


def readme():
    """Return the text of README."""
    with open(os.path.join(HERE, "README"), encoding="ascii") as file:
        return file.read()


def source_lines():
    with open(WSGATE, "rb") as file:
        return file.read().splitlines()


@functools.lru_cache(maxsize=None)
def source_tree():
    return ast.parse(b"\n".join(source_lines()))


def map_of_the_file():
    """Return the map in the module docstring: [(section, text)]."""
    entries = []
    for title, text in re.findall(r"(?m)^    (\S.{20} | {22})(\S.*)$", wsgate.__doc__):
        if title.strip():
            entries.append((title.strip(), text))
        else:
            entries[-1] = entries[-1][0], entries[-1][1] + " " + text
    return entries


# ------------------------------------------------- Helpers: clients of the soak


class Fuzzing:
    """Clients and a script that send mutated bytes until end; wrong is what must not happen."""

    def __init__(self, seed, end):
        self.seed, self.end = seed, end
        self.wrong = []
        self.clients = self.backends = 0

    def script(self, peer):
        self.backends += 1
        rng = random.Random(self.seed * 1000003 + self.backends)
        peer.sock.settimeout(100 * MS)
        head = peer.head()
        if malformed_head(head):
            self.wrong.append(head)
        peer.send(fuzzed(rng, FUZZ_RESPONSES))
        if rng.random() < 0.3:
            peer.reset()
        elif rng.random() < 0.5:
            peer.ended(50 * MS)

    def run(self, number, gate):
        rng = random.Random(self.seed + number)
        while time.monotonic() < self.end and not self.wrong:
            self.clients += 1
            client, data = gate.connect(), fuzzed(rng, FUZZ_REQUESTS)
            with contextlib.suppress(OSError):  # reset, or nothing in time
                half = len(data) // 2 if rng.random() < 0.3 else len(data)
                for piece in (data[:half], data[half:]):
                    client.send(piece)
                if rng.random() < 0.7:
                    client.finish()
                client.sock.settimeout(20 * MS)
                first = client.sock.recv(9)
                if first and first != b"HTTP/1.1 "[:len(first)]:
                    self.wrong.append((data, first))
            end = client.reset if rng.random() < 0.3 else client.close
            end()


def behave_by_target(peer):
    """A script: the target selects how the backend behaves and how it ends."""
    head, body = read_request(peer)
    mood = head.split(b" ", 2)[1]
    if mood in (b"/late", b"/cut"):
        return peer.ended() if mood == b"/late" else peer.send(ok(BODY_300K)[:70000])
    if not field(head, b"upgrade"):
        return peer.send(ok(body))
    peer.send(switching(), frame(2, BODY_300K) if mood == b"/bulk" else b"")
    ends = {b"/vanish": peer.close, b"/reset": peer.reset, b"/deaf": peer.ended}.get(mood)
    opcode = None
    while opcode != 8:
        opcode, payload = read_frame(peer)
        if ends:
            return ends()
        peer.send(frame(8, b"\x03\xe8") if mood == b"/bye" else frame(opcode, payload))


def client_with_requests(peer, rng):
    for size in rng.sample((0, 10, 5000, 300000), 3):
        response = peer.send(request(b"POST", b"/", body=BODY_300K[:size])).response()
        assert response.body == BODY_300K[:size]
    raw, status = rng.choice(((request(b"GET", b"/../"), 400), (request(b"GET", b"/late"), 504),
                              (b"nonsense\r\n\r\n", 400)))
    assert peer.send(raw).response().status == status


def client_that_stalls(peer, rng):
    assert peer.send(request(b"POST", b"/", body=b"x" * 100)[:rng.randint(1, 120)]).ended()


def client_that_aborts(peer, rng):
    raw = rng.choice((handshake(b"/echo") + frame(2, b"x" * 300, b"abcd"),
                      request(b"GET", b"/cut")))
    size = rng.choice((rng.randint(0, len(raw)), len(raw)))
    peer.send(raw[:size]).ended(rng.choice((1, 20)) * MS)


def client_with_tunnel(peer, rng):
    mood = rng.choice((b"/echo", b"/echo", b"/bulk", b"/bye", b"/vanish", b"/reset", b"/deaf"))
    assert peer.send(handshake(mood)).response().status == 101
    assert mood != b"/bulk" or peer.read(len(BODY_300K) + 10)[10:] == BODY_300K
    for size in (0, 10, 2000) if mood in (b"/echo", b"/bulk") else ():
        assert read_frame(peer.send(frame(1, BODY_300K[:size], b"abcd"))) == (1, BODY_300K[:size])
    peer.send(frame(rng.choice((2, 8)), b"\x03\xe8", b"abcd")[:rng.choice((8, 3))])
    assert rng.random() < 0.5 or peer.ended()  # by a Close, by the backend, or by idle_timeout


class Soak:
    """Clients of all kinds in twelve threads; what must not happen is in wrong."""

    WAYS = (client_with_requests, client_that_stalls, client_that_aborts, client_with_tunnel,
            client_with_tunnel)

    def __init__(self, ports, tls):
        self.ports, self.tls = ports, tls  # of HTTP and of TLS
        self.wrong = []

    def connect(self, way, rng):
        if rng.random() < 0.2:
            return tls_connect(self, self.tls)
        stall = way is client_that_stalls and rng.random() < 0.3  # in the TLS handshake
        return connect(self.ports[1] if stall else self.ports[0])

    port = property(lambda self: self.ports[1])

    def client(self, number, end):
        rng = random.Random(number)
        while time.monotonic() < end and not self.wrong:
            number += 1
            way = self.WAYS[number % len(self.WAYS)]
            peer = self.connect(way, rng)
            try:
                way(peer, rng)
                rng.choice((peer.close, peer.reset))()
            except Exception as error:  # a client that aborts may be aborted first
                if way is not client_that_aborts:
                    self.wrong.append((way.__name__, error))

    def run(self, seconds):
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(number * 10 ** 6, end))
                   for number in range(12)]
        for step in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                step(thread)
        assert not self.wrong


# ----------------------------------------------------------------------- Errors


def test_every_reason_is_in_the_table():
    """All words that an exchange can end with have a meaning and a remedy."""
    with open(WSGATE) as file:
        source = file.read()
    raised = set(re.findall(r'(?:HTTPError|BackendError)\(\s*[\w.]+,\s*"(\w+)"', source))
    raised |= set(re.findall(r'(?:ClientGone\(|\.finish\(\s*|make_response\(\d+, |self\.\w+_at, '
                             r')"(\w+)"', source))
    assert len(raised) > 30 and not {word for word in raised if wsgate.reason_row(word) is None}
    assert all(row.meaning and row.remedy for row in wsgate.REASONS.values())


def test_readme_has_every_reason():
    """Its two tables have the words of REASONS with their status, and no other words."""
    refused, ended = re.split("Why a (?:request|tunnel) ", readme().partition("ACCESS LOG")[0])[1:]
    words, statuses = {}, []
    for numbers, row in re.findall(r"(?m)^    ([45][0-9 ]{12}| {13})(\w+(?: \w+)*)(?:  .+)?$",
                                   refused):
        statuses = [int(number) for number in numbers.split()] or statuses
        row = row.split()
        words.update(zip(row, statuses if len(statuses) > 1 else statuses * len(row)))
    for row in re.findall(r"(?m)^    (\w+(?: \w+)*)  +[-1]", ended):
        words.update(dict.fromkeys(row.split()))
    assert words == {word: reason.status for word, reason in wsgate.REASONS.items()}


# -------------------------------------------------------- Configuration: values


@pytest.mark.parametrize("key, text, value", [
    ("client_body_timeout", "500ms", 0.5), ("client_body_timeout", "30s", 30),
    ("client_body_timeout", "10m", 600),
    ("client_body_timeout", "2h", 7200), ("client_body_timeout", "1d", 86400),
    ("client_body_timeout", "1.5s", 1.5),
    ("client_body_timeout", "45", 45), ("keepalive_timeout", "0", 0),
    ("client_header_size", "512", 512), ("client_header_size", "16k", 16384),
    ("client_header_size", "1m", 1 << 20),
    ("client_header_size", "1G", 1 << 30), ("max_connections", "auto", None),
    ("max_connections", "7", 7),
    ("set_real_ip_from", "10.0.0.0/8, ::1\n  192.0.2.1", ["10.0.0.0/8", "::1/128", "192.0.2.1/32"]),
    ("set_real_ip_from", "unix: ::1", ["unix:", "::1/128"]),
    ("status_allow", "all", ["0.0.0.0/0", "::/0", "all"]),
    ("ssl_protocols", "TLSv1.2,TLSv1.3", ("TLSv1.2", "TLSv1.3")),
    ("client_body_timeout", "3650d", 3650 * 86400), ("idle_timeout", "never", math.inf),
    ("deny", "::ffff:127.0.0.0/104, ::ffff:1.2.3.4, ::/0", ["127.0.0.0/8", "1.2.3.4/32", "::/0"]),
    ("proxy_ssl_name", "::1", "::1"), ("access_log", "syslog:", "syslog:"),
    ("log_format", "json", "json"), ("pid", "", None),
    ("pid", "/run/wsgate %d.pid", "/run/wsgate %d.pid"),
])
def test_values(tmp_path, key, text, value):
    read = getattr(load_text(tmp_path, "[server]\n%s%s = %s\n" % (PASS, key, text)).server, key)
    assert ([str(each) for each in read] if isinstance(value, list) else read) == value


def test_special_characters_in_values(tmp_path):
    config = load_text(tmp_path,
                       SERVER + "proxy_set_header = X-A: 50%(of)s %d ; # it = all\n  X-B: b\n")
    assert [(name, template.text) for name, template in location_of(config).proxy_set_header] == [
        (b"X-A", "50%(of)s %d ; # it = all"), (b"X-B", "b")]


@pytest.mark.parametrize("text", ["status_listen =", "status_listen = off",
                                  "access_log = off\nerror_log = off"])
def test_off_and_empty_values(tmp_path, text):
    with running("[server]\nlisten = 127.0.0.1:0\nreturn = 204\n" + text, tmp_path) as gate:
        assert len(gate.listeners) == 1
        assert gate.fetch(request()).status == 204


@pytest.mark.parametrize("lines, seconds", [
    ("", 60), ("proxy_read_timeout = 5s", 5), ("idle_timeout = 9s", 9),
    ("proxy_read_timeout = 5s\nidle_timeout = 9s", 9)])
def test_idle_timeout_is_proxy_read_timeout_unless_it_is_set(tmp_path, lines, seconds):
    assert location_of(load_text(tmp_path, SERVER + lines)).idle_timeout == seconds
    assert location_of(load_text(tmp_path, SERVER + "[location /a]\n" + lines),
                       "/a").idle_timeout == seconds


@pytest.mark.parametrize("line, error", [
    ("add_header = Content-Length: 1", "Content-Length is managed by wsgate"),
    ("add_header = Connection: close", "Connection is managed"),
    ("add_header = sec-websocket-accept: x", "managed"),
    ("add_header = X-A: $nothing", "unknown variable $nothing"),
    ("add_header = no colon", "invalid header field"),
    ("proxy_redirect = http://a/ /", "default, off"),
    ("proxy_pass_websocket = localhost:3000", "invalid"),
    ("proxy_pass_websocket = http://a:99999", "99999"),
    ("underscores_in_headers = yes", "on or off"),
    ("auth_request_headers = a:b", "invalid field name 'a:b'"),
    ("auth_request_headers = Host", "invalid field name 'Host'"),
    ("auth_request_headers = Content-Length", "invalid field name"),
    ("auth_request_headers = \u00e9", "invalid field name"),
    ("auth_request_login = //evil", "invalid URL '//evil'"),
    ("auth_request_login = login", "invalid URL"),
    ("auth_request_login = https://$host/", "invalid URL"),
    ("auth_request_login = https://a@b/", "invalid URL"),
    ("auth_request_login = /\\evil", "invalid URL"),
    ("auth_request_login = /x y", "invalid URL"),
    ("auth_request_login = /?rd=$escaped_uri",
     "unknown variable $escaped_uri (did you mean 'escaped_url'?)"),
])
def test_bad_values_of_the_keys_of_forwarding(tmp_path, line, error):
    ini = "[server]\n[location /]\nproxy_pass = http://127.0.0.1:1\n%s\n" % line
    errors = errors_of(tmp_path, ini)
    assert len(errors) == 1 and error in errors[0]
    assert "wsgate.ini:4: [location /] %s: " % line.split(" ")[0] in errors[0]


# --------------------------------------------------------- Configuration: hosts


@pytest.mark.parametrize("text, listens", [
    ("127.0.0.1:8080", [("127.0.0.1", 8080, None, "")]), ("8080", [("0.0.0.0", 8080, None, "")]),
    (":8080", [("0.0.0.0", 8080, None, "")]), ("[::1]:80", [("::1", 80, None, "")]),
    ("[::]:0", [("::", 0, None, "")]),
    ("gate.test:443 ssl", [("gate.test", 443, None, "ssl")]),
    ("unix:/run/a", [(None, None, "/run/a", "")]),
    ("1 ssl proxy_protocol reuseport", [("0.0.0.0", 1, None, "ssl proxy_protocol reuseport")]),
    ("1, [::1]:2 ssl\n\nunix:/a proxy_protocol",
     [("0.0.0.0", 1, None, ""), ("::1", 2, None, "ssl"), (None, None, "/a", "proxy_protocol")]),
])
def test_listen(text, listens):
    assert [each.address + (
        " ".join(name for name in ("ssl", "proxy_protocol", "reuseport") if getattr(each, name)),)
            for each in wsgate.parse_listen(text)] == listens


@pytest.mark.parametrize("text, target", [
    ("http://127.0.0.1:9000", (False, "127.0.0.1:9000", None)),
    ("https://name", (True, "name", None)),
    ("ws://name/", (False, "name", "/")), ("wss://[::1]:443/a/b?c=%20",
                                           (True, "[::1]:443", "/a/b?c=%20")),
    ("http://unix:/run/app.sock", (False, "unix:/run/app.sock", None)),
    ("http://unix:/run/app.sock:/uri/", (False, "unix:/run/app.sock", "/uri/")),
])
def test_proxy_pass(text, target):
    assert wsgate.parse_proxy_pass(text) == target


@pytest.mark.parametrize("text", [
    "http://0x7f000001", "http://127.0x1:80", "http://1.2.3.4.:80", "http://3000.", "http://a:0",
    "http://[::1]:0", "http://a:65536", "http://unix:/run/a:b", "http://unix:a", "http://a/b#c"])
def test_a_backend_address_is_checked_whole(text):
    """getaddrinfo() would take 0x7f000001 for 127.0.0.1, and 3000 for 0.0.11.184."""
    with pytest.raises(ValueError, match="invalid"):
        wsgate.parse_proxy_pass(text)


@pytest.mark.parametrize("line, values", [
    ("a.test", ("a.test:80", 1, 1, 10, 0, False,
                False)), ("[::1]:9001", ("[::1]:9001", 1, 1, 10, 0, False, False)),
    ("unix:/a backup", ("unix:/a", 1, 1, 10, 0, True, False)),
    ("a:1 down", ("a:1", 1, 1, 10, 0, False, True)),
    ("a:1 weight=3 max_fails=0 fail_timeout=500ms max_conns=9",
     ("a:1", 3, 0, 0.5, 9, False, False)),
])
def test_server_lines(line, values):
    server, = wsgate.parse_servers("\n  %s\n" % line)
    assert (server.name, server.weight, server.max_fails, server.fail_timeout, server.max_conns,
            server.backup, server.down) == values


def test_servers_are_separated_by_commas_or_lines():
    servers = wsgate.parse_servers("a.test:1 weight=2, b.test:2 backup\nc.test:3,")
    assert [(each.name, each.weight, each.backup) for each in servers] == [
        ("a.test:1", 2, False), ("b.test:2", 1, True), ("c.test:3", 1, False)]


def test_a_location_has_several_hosts(tmp_path):
    """Its counters are those of one location, whichever host a request names."""
    config = load_text(tmp_path,
                       SERVER + "[location a.test, B.test,*.c.test/x]\nmax_connections = 1\n")
    location = location_of(config, "a.test, B.test,*.c.test/x")
    assert location.hosts == ("a.test", "b.test", "*.c.test")
    assert [config.route(host, "/x/y") is location
            for host in ("a.test", "b.test", "d.c.test", "c.test")] == [
        True, True, True, False]


def test_a_name_that_does_not_resolve_is_a_warning(tmp_path):
    warning, = load_text(tmp_path, "[server]\nproxy_pass = http://no-such-host.invalid:1").warnings
    assert "no-such-host.invalid cannot be resolved now" in warning
    assert "did you mean" not in warning  # the address itself


# ---------------------------------------------------------- Configuration: keys


@pytest.mark.parametrize("key, near", [
    ("proxy_pas", "proxy_pass"), ("Listen", "listen"), ("idle_timout", "idle_timeout"),
    ("listne", "listen"), ("proxy_connection_timeout", "proxy_connect_timeout"),
    ("ssl_protocol", "ssl_protocols"), ("alow", "allow"), ("log_file", None), ("websocket", None),
    ("set_header", None),
    ("read_timeout", None), ("proxy", None), ("cert", None), ("port", None)])
def test_only_a_key_that_is_near_is_suggested(tmp_path, key, near):
    error, = errors_of(tmp_path, SERVER + key + " = 1")
    assert error == "wsgate.ini:3: [server] %s: unknown key%s" % (
        key, " (did you mean %r?)" % near if near else "")


NGINX = (
    "absolute_redirect alias auth_basic autoindex brotli chunked_transfer_encoding "
    "client_body_buffer_size client_header_buffer_size daemon error_page etag events expires "
    "fastcgi_pass geo gzip gzip_types gzip_vary hash http http2 if include index internal "
    "ip_hash keepalive keepalive_requests large_client_header_buffers least_conn limit_conn "
    "limit_conn_zone limit_rate limit_req limit_req_zone load_module map memcached_pass "
    "merge_slashes mirror multi_accept proxy_bind proxy_buffer_size proxy_buffering "
    "proxy_buffers proxy_busy_buffers_size proxy_cache proxy_cache_bypass proxy_cache_path "
    "proxy_cookie_path proxy_hide_header proxy_http_version proxy_max_temp_file_size "
    "proxy_next_upstream proxy_no_cache proxy_request_buffering proxy_socket_keepalive "
    "proxy_ssl_server_name real_ip_recursive resolver rewrite root satisfy sendfile "
    "server_name server_tokens set ssl ssl_dhparam ssl_prefer_server_ciphers "
    "ssl_session_cache ssl_session_tickets ssl_session_timeout ssl_stapling "
    "ssl_trusted_certificate ssl_verify_client stub_status sub_filter tcp_nodelay tcp_nopush "
    "try_files types uwsgi_pass worker_connections worker_processes worker_rlimit_nofile zone "
    "proxy_intercept_errors proxy_pass_header client_body_temp_path limit_conn_status sticky "
    "worker_shutdown_timeout ssl_password_file health_check http2_push_preload gzip_static "
    "proxy_cache_lock fastcgi_read_timeout copy_headers tls_insecure_skip_verify health_uri")


def test_foreign_directives(tmp_path):
    """Built in, written differently here (then the key that is named exists), or out of scope."""
    keys = {key for table in TABLES.values() for key in table}
    values = {"ip_hash", "least_conn", "round_robin"}.union(wsgate.SERVER_OPTIONS)
    errors = errors_of(tmp_path, SERVER + "".join(name + " = 1\n" for name in NGINX.split()))
    assert len(errors) == len(NGINX.split()) > 60
    for error in errors:
        assert re.search(r": unknown key \((built in: remove it|out of scope: .+|expected .+|one "
                         r"process .+|set it .+)\)$",
                         error), error
    for advice, names in wsgate.FOREIGN:
        assert not keys & set(names.split())
        assert set(re.findall(r"\b[a-z]+_[a-z_]+\b", advice)) <= keys | values, advice


TABLES = {"server": wsgate.SERVER_KEYS, "location /": wsgate.LOCATION_KEYS,
          "upstream NAME": wsgate.UPSTREAM_KEYS}


def test_the_sample_lists_every_key_once_with_its_default():
    with open(SAMPLE) as file:
        text = file.read()
    listed, table = [], None
    for line in text.splitlines():
        section, key = re.fullmatch(r"#?\[(.+)\]", line), re.fullmatch(r"#?([a-z_]+) =(.*)", line)
        if section:
            table = section.group(1)
        elif key:
            listed.append((table, key.group(1), key.group(2).strip()))
    in_server = "ssl_certificate", "ssl_certificate_key"  # of a location only with a host name
    wanted = [("server" if name in in_server else table, name, key.default)
              for table in TABLES for name, key in TABLES[table].items()]
    assert sorted(each for each in listed if each[1]
                  != "proxy_pass") == sorted(each for each in wanted if each[1] != "proxy_pass")
    assert ("location /", "proxy_pass", "http://127.0.0.1:9000") in listed


def test_the_sample_configuration(tmp_path):
    """It is valid, and uncommenting its defaults changes nothing."""
    with open(SAMPLE) as file:
        text = file.read()
    config = load_text(tmp_path, text)
    spelled = load_text(tmp_path, re.sub(r"(?m)^#(?=[a-z_]+ =)", "",
                                         text.partition("#[upstream")[0]))
    assert config.server.__dict__ == spelled.server.__dict__
    assert config.warnings == spelled.warnings == []
    for name in wsgate.LOCATION_KEYS:
        assert getattr(location_of(config), name,
                       None) == getattr(location_of(spelled), name, None), name


@pytest.mark.parametrize("table", sorted(TABLES))
def test_keys_have_meanings_and_valid_defaults(table):
    for name, key in TABLES[table].items():
        assert len(key.meaning) > 6 and "\n" not in key.meaning, name
        if name != "server":
            key.parse(key.default)


# ---------------------------------------------------------- Configuration: file

BAD_CONFIGURATIONS = [
    # What the file says, then marks of its only error.
    (SERVER + "worker_cpu_affinity = one", ":3:", "invalid CPU 'one'"),
    (SERVER + "client_body_timeout = 5 s",
     "wsgate.ini:3: [server] client_body_timeout: invalid duration '5 s'"),
    (SERVER + "client_body_timeout = -5", ":3:", "invalid duration"),
    (SERVER + "client_body_timeout = 0", ":3:", "expected more than 0"),
    (SERVER + "client_body_timeout = \u0665s", ":3:", "invalid duration"),
    (SERVER + "client_header_size = 16kb", ":3:", "invalid size"),
    (SERVER + "max_connections_per_ip = 1_0", ":3:", "invalid number"),
    (SERVER + "strict_handshake = yes", ":3:",
     "[server] strict_handshake: invalid value 'yes' (expected on or off)"),
    (SERVER + "upgrade = h2c", ":3:", "websocket, none, any"),
    (SERVER + "listen =", ":3:", "no address"),
    (SERVER + "listen = 127.0.0.1", ":3:", "port"),
    (SERVER + "listen = 70000", ":3:", "65535"),
    (SERVER + "listen = ::1:8080", ":3:", "[v6]:port"),
    (SERVER + "listen = unix:a.sock", ":3:", "unix:/absolute/path"),
    (SERVER + "listen = 8080 tls", ":3:", "'tls'"),
    (SERVER + "listen = 127.0.0.1:0 ssl", "[server]", "ssl_certificate_key"),
    (SERVER + "status_listen = a:b:c", ":3: [server] status_listen:", "'a:b:c'"),
    (SERVER + "ssl_protocols = SSLv3", ":3:", "TLSv1.2"),
    (SERVER + "ssl_ciphers = NONSENSE", ":3: [server] ssl_ciphers: no cipher matches 'NONSENSE'"),
    (SERVER + "proxy_ssl_ciphers = a b", ":3: [server] proxy_ssl_ciphers: no cipher matches 'a b'"),
    (SERVER + "proxy_ssl_protocols = TLSv9",
     ":3: [server] proxy_ssl_protocols: unknown TLS version 'TLSv9'"),
    (SERVER + "proxy_next_upstream_tries = -1", ":3:", "invalid number '-1'"),
    (SERVER + "proxy_next_upstream_timeout = x", ":3:", "invalid duration 'x'"),
    (SERVER + "[upstream u]\nserver = a:1\nbalance = cookie", ":5: [upstream u] balance:",
     "cookie NAME"),
    (SERVER + "[upstream u]\nserver = a:1\nbalance = cookie a;b", ":5: [upstream u] balance:",
     "cookie NAME"),
    (SERVER + "ssl_certificate = /no/such/file",
     ":3: [server] ssl_certificate: cannot open /no/such/file (No such file"),
    (SERVER + "allow = 10.0.0.1/8", ":3: [server] allow:", "10.0.0.1/8"),
    (SERVER + "allowed_origins = example.com", ":3:", "https://example.com"),
    (SERVER + "user = nobody_by_this_name", ":3:", "unknown user"),
    (SERVER + "proxy_set_header = X-A", ":3:", "invalid header field 'X-A' (expected Name: value)"),
    (SERVER + "proxy_set_header = X A: b", ":3:", "invalid header field 'X A: b'"),
    (SERVER + "proxy_set_header = X-A: $hots", ":3:",
     "unknown variable $hots (did you mean 'host'?)"),
    (SERVER + "add_header = X-A: $proxy_host", ":3:",
     "unknown variable $proxy_host (expected one of: $host, $remote_addr, ", ", $http_NAME)"),
    (SERVER + "auth_request_headers = $upstream_http_remote_user", ":3:",
     "invalid field name '$upstream_http_remote_user'"),
    (SERVER + "[upstream u]\nserver = a:1\nbalance = cookie $cookie_io", ":5:", "cookie NAME"),
    (SERVER + "idle_timeout = 0", ":3:", "invalid duration '0' (expected more than 0, or never)"),
    (SERVER + "idle_timeout = off", ":3:", "invalid duration 'off' (expected more than 0, or nev"),
    (SERVER + "proxy_set_header = X-A: a\x01b", ":3:", "control character in the value of X-A"),
    (SERVER + "proxy_set_header = X-A: a\x7f", ":3:", "control character in the value of X-A"),
    (SERVER + "proxy_set_header = Connection: close", ":3:", "Connection is managed by wsgate"),
    ("[server]\nproxy_pass = ftp://a", ":2: [server] proxy_pass:", "http://host:port"),
    ("[server]\nproxy_pass = 127.0.0.1:80", ":2:", "http://host:port"),
    ("[server]\nproxy_pass = http://a:99999", ":2:", "65535"),
    ("[server]\nproxy_pass = http://me:pw@a/", ":2:", "Authorization"),
    ("[location /]\nreturn = abc", ":2: [location /] return: invalid response 'abc'"),
    ("[location /]\nreturn = 301", ":2:", "missing URL of the redirect"),
    ("[location /]\nreturn = 200\n" + PASS, ":2: [location /] return:", "proxy_pass"),
    (SERVER + "[location /a]\nreturn = 99", ":4: [location /a] return:"),
    (SERVER + "proxy_pas = x", ":3: [server] proxy_pas: unknown key (did you mean 'proxy_pass'?)"),
    (SERVER + "Upgrade = any", ":3: [server] Upgrade: unknown key (did you mean 'upgrade'?)"),
    (SERVER + "[location /a]\n\n# a comment\nlisten = 80",
     ":6: [location /a] listen: not allowed in this section (expected in [server])"),
    (SERVER + "[locaton /]", ":3: [locaton /]", "did you mean 'location'?"),
    (SERVER + "[DEFAULT]", ":3: [DEFAULT]: unknown section"),
    (SERVER + "[ ]", ":3:", "unknown section"),
    (SERVER + "[location chat]", ":3: [location chat]", "[location HOST/path]"),
    (SERVER + "[location]", ":3: [location]: invalid location (expected [location /path]"),
    (SERVER + "[upstream]\nserver = a:1", ":3: [upstream]", "NAME"),
    (SERVER + "[server]", "wsgate.ini:3: [server]: duplicate section (first in line 1)"),
    (SERVER + PASS, "wsgate.ini:3: [server] proxy_pass: duplicate key (first in line 2)"),
    (SERVER + "[upstream u]\nserver = a:1\nserver = a:2", ":5: [upstream u] server: duplicate key"
     " (first in line 4; further values go on indented lines below it)"),
    (SERVER + "[location /a]\n[location  /a]",
     ":4: [location /a]: duplicate section (first in line 3)"),
    (SERVER + "[location a.test/]\n[location A.test/]",
     ":4: [location A.test/]: duplicate location"),
    (SERVER + "[location = /a]\n[location =/a]", ":4: [location =/a]: duplicate location"),
    (SERVER + "[upstream u]\nbalance = ip_hash", ":3: [upstream u] server:", "no server"),
    (SERVER + "[upstream u]\nserver =\n  a:1\n  a:2 wieght=2", ":4: [upstream u] server:",
     "unknown server parameter 'wieght=2'"),
    (SERVER + "[upstream u]\nserver = a:1 weight=0", ":4:", "invalid weight '0'"),
    (SERVER + "[upstream u]\nserver = a:1\nbalance = random", ":5: [upstream u] balance:",
     "least_conn"),
    ("[server]\n  " + PASS + "  proxy_pas = x", "wsgate.ini:3: [server] proxy_pas: unknown key"),
    ("[server]\n  " + PASS + "  [location /a]\n    x = 1",
     "wsgate.ini:4: [location /a] x: unknown key"),
    (SERVER + "\x0c\nproxy_pas = x", "wsgate.ini:4: [server] proxy_pas: unknown key"),
    (SERVER + "# a\u2028b\x1cc\x85\nproxy_pas = x",
     "wsgate.ini:4: [server] proxy_pas: unknown key"),
    ("[server]\nlisten = x\nreturn = 200 some text\n  listen = is more of it",
     "wsgate.ini:2: [server] listen:"),
    ("[server]\nreturn = 200 some text\n  [location /a]\nlisten = x",
     "wsgate.ini:4: [server] listen:"),
    (PASS, "wsgate.ini:1: proxy_pass: outside of a section (expected [server] above it)"),
    (SERVER + "nonsense", "wsgate.ini:3: invalid line: nonsense"),
    ("[server]\n", "wsgate.ini: no location", "proxy_pass"),
    ("", "wsgate.ini: no location"),
    ("[location /a]\n", "wsgate.ini:1: [location /a]: missing proxy_pass or return"),
    # What is left in a value by mistake: the sentence says to remove just that.
    (SERVER + "keepalive_timeout = 75s;",
     ":3: [server] keepalive_timeout: unexpected semicolon in '75s;' (remove it)"),
    (SERVER + "max_connections = 0", ":3:", "invalid number '0' (expected auto, or at least 1)"),
    (SERVER + "max_connections = 5 # five", ":3:", "unexpected comment in '5 # five' (remove it)"),
    (SERVER + "log_format = 'json'; ; both", ":3:",
     "unexpected comment and semicolon and quotes in", "(remove them)"),
    (SERVER + "pid = \"wsgate.pid\"", ":3:", "unexpected quotes in"),
    (SERVER + "keepalive_timeout = `75s`", ":3:", "unexpected quotes in '`75s`' (remove them)"),
    (SERVER + "ssl_certificate = \"/no/file\"", ":3:", "unexpected quotes in '\"/no/file\"'"),
    (SERVER + "ssl_certificate = /no/file;", ":3:", "unexpected semicolon in '/no/file;'"),
    (SERVER + "allow = 10.0.0.0/8; 127.0.0.1", ":3:", "unexpected semicolon in"),
    (SERVER + "max_connections = 5 // five", ":3:", "unexpected comment in '5 // five'"),
    (SERVER + "max_connections = 5 /* five */", ":3:", "unexpected comment in"),
    (SERVER + "max_connections = 5 ;", ":3:", "unexpected semicolon in '5 ;'"),
    ("[server]\nreturn = 301 \"https://a.test/\"", ":2:",
     "unexpected quotes in '301 \"https://a.test/\"' (remove them)"),
    ("[server]\nreturn = 301 https://a.test/ # moved", ":2:", "unexpected comment in"),
    ("[server]\nreturn = 301 https://a.test/ b", ":2:", "one without spaces and quotes"),
    ("[location /]\nproxy_pass = http://127.0.0.1:9/#text", ":2:", "invalid URL"),
    (SERVER + "keepalive_timeout = \u201c75s\u201d", ":3:", "unexpected quotes in"),
    (SERVER + "access_log = access.log combined", ":3:",
     "log_format and log_level are keys of their own"),
    (SERVER + "access_log = access.log; # text", ":3:", "unexpected comment and semicolon in"),
    (SERVER + "[upstream u]\nserver =\n  a:1\n  a:2;", ":4:", "unexpected semicolon in 'a:2;'"),
    ("[server] # main\n" + PASS,
     "wsgate.ini:1: invalid line: [server] # main (expected [section] and nothing after it)"),
    (SERVER + "[location = /] ; x\nreturn = 200", "wsgate.ini:3: invalid line: [location = /] ; x"),
    # A line that is indented by mistake, or not.
    ("[server]\nlisten = 1\n  " + PASS,
     ":2: [server] listen: line 3 is indented, so it continues listen of line 2"
     " (remove the indentation)"),
    ("[server]\npid = wsgate.pid\n\n # comment\n\tuser = root\n" + PASS,
     "line 5 is indented, so it continues pid of line 2"),
    ("[server]\nlisten = 1\n  [location /a]\n  return = 200",
     "line 3 is indented, so it continues listen of line 2"),
    ("[server]\nlisten = 1\n  server_name = a.test\n" + PASS,
     "line 3 is indented, so it continues listen of line 2"),
    ("[server]\nlisten = 1\n  Pid = wsgate.pid\n" + PASS,
     "line 3 is indented, so it continues listen of line 2"),
    (SERVER + "ssl_certificate = /no/file\n  listen 80;",
     ":3: [server] ssl_certificate: cannot open /no/file listen 80;"),
    (SERVER + "[upstream u]\nserver =\na:1", "wsgate.ini:5: invalid line: a:1",
     "a line that continues a value is indented"),
    # Lines of another program's configuration.
    ("[server]\nproxy_pass \thttp://127.0.0.1:9;", ":2: invalid line:",
     "(expected proxy_pass = http://127.0.0.1:9)"),
    ("[server]\nproxy_pass: http://127.0.0.1:9", ":2: invalid line:",
     "(expected proxy_pass = http://127.0.0.1:9)"),
    (SERVER + "location /ws/ {",
     "wsgate.ini:3: invalid line: location /ws/ { (expected [location /ws/])"),
    (SERVER + "location ~ \\.php$ {", "{ (regular expressions are not supported; expected"),
    (SERVER + "location ^~ /ws/ {", "(expected [location /ws/])"),
    (SERVER + "proxy_set_header Connection $connection_upgrade;", "(built in: remove it)"),
    (SERVER + "proxy_set_header Content-Length \"\";", "(built in: remove it)"),
    (SERVER + "server app1 10.0.0.1:80 check", "(expected server = 10.0.0.1:80)"),
    (SERVER + "location = /a {", "unknown key (expected [location /path] or [location = /path])"),
    (SERVER + "http-request set-path /a", "(out of scope: use return, or a /uri in proxy_pass)"),
    (SERVER + "proxy_set_header Host $host;", "(expected proxy_set_header = Host: $host)"),
    (SERVER + "add_header Referrer-Policy \"same-origin\" always;",
     "(expected add_header = Referrer-Policy: same-origin)"),
    (SERVER + "if ($http_upgrade = \"websocket\") {",
     "unknown key (expected proxy_pass_websocket)"),
    (SERVER + "http-request set-header X-A b", "(expected proxy_set_header)"),
    (SERVER + "server { listen 80; }", "(expected [server])"),
    (SERVER + "}",
     "wsgate.ini:3: invalid line: } (remove it: a section ends where the next one begins)"),
    (SERVER + "gzip on;",
     "wsgate.ini:3: invalid line: gzip on; (out of scope: let the backend compress)"),
    (SERVER + "timeout tunnel = 1h",
     ":3: [server] timeout tunnel: unknown key (expected idle_timeout)"),
    (SERVER + "[upstream u]\nserver = a:1\nserver a:2 weight=2;", ":5:", "missing = after server"),
    (SERVER + "[http]", ":3: [http]: unknown section (built in: remove it)"),
    (SERVER + "[location ~ ^/a]",
     ":3: [location ~ ^/a]: regular expressions and modifiers are not supported"),
    # An address, a name, a size, a path and a time are checked whole.
    (SERVER + "listen = *:80", ":3:", "invalid host '*' (expected :80 for every IPv4 address"),
    (SERVER + "listen = [::zz]:80", ":3:", "invalid host '[::zz]'"),
    (SERVER + "listen = [1.2.3.4]:80", ":3:", "invalid host '[1.2.3.4]'"),
    (SERVER + "listen = 1.2.3:80", ":3:", "invalid host '1.2.3'"),
    (SERVER + "listen = 256.1.1.1:80", ":3:", "invalid host '256.1.1.1'"),
    (SERVER + "listen = a..b:80", ":3:", "invalid host 'a..b'"),
    (SERVER + "listen = -a:80", ":3:", "invalid host '-a'"),
    (SERVER + "listen = 8080\n  8080", ":3:", "duplicate address 0.0.0.0:8080"),
    (SERVER + "listen = unix:/no/folder/s", ":3: [server] listen: no such directory: /no/folder"),
    (SERVER + "status_listen = unix:/no/folder/s",
     ":3: [server] status_listen: no such directory: /no/folder"),
    (SERVER + "pid = /no/folder/pid", ":3: [server] pid: no such directory: /no/folder"),
    (SERVER + "error_log = /no/folder/log",
     ":3: [server] error_log: no such directory: /no/folder"),
    (SERVER + "access_log = /", ":3: [server] access_log: / is a directory"),
    (SERVER + "client_header_size = 0", ":3:", "invalid size '0' (expected at least 128)"),
    (SERVER + "proxy_read_timeout = 3651d", ":3:",
     "duration '3651d' is too long (expected at most 3650d)"),
    (SERVER + "idle_timeout = Never", ":3:", "invalid duration 'Never'"),
    (SERVER + "proxy_ssl_name = a b", ":3:", "invalid host 'a b'"),
    ("[server]\nproxy_pass = http://$host:3000",
     ":2: [server] proxy_pass: variables are not allowed in the host"),
    ("[server]\nproxy_pass = http://3000", ":2:", "invalid host '3000'"),
    (SERVER + "[upstream a b]\nserver = a:1", ":3: [upstream a b]: invalid name 'a b'"),
    (SERVER + "allow = ::ffff:10.0.0.1/104", ":3:", "has host bits set (expected ::ffff:"),
    (SERVER + "allowed_origins = https://a.test/", ":3:",
     "invalid origin 'https://a.test/' (expected e.g."),
    # Locations that no request can reach.
    (SERVER + "[location /a%20b/]", ":3:",
     "/a%20b/ never matches (expected the decoded path, /a b/)"),
    (SERVER + "[location /a%2Fb]", ":3:", "(expected the decoded path, /a/b)"),
    (SERVER + "[location //x/]", ":3:", "//x/ never matches (expected the decoded path, /x/)"),
    (SERVER + "[location /x/../y/]", ":3:", "never matches (expected a path without dot segments)"),
    (SERVER + "[location /x/.]", ":3:", "never matches (expected a path without dot segments)"),
    (SERVER + "[location /x?y]", ":3:", "invalid path /x?y"),
    (SERVER + "[location / {]", ":3:", "invalid path / {"),
    (SERVER + "[location a.test:80/]", ":3:",
     "invalid host 'a.test:80' (expected a name without a port"),
    (SERVER + "[location a.*.test/]", ":3:", "invalid host 'a.*.test'"),
    (SERVER + "[location b\u00fccher.test/]", ":3:", "in ASCII"),
    (SERVER + "[location a.test,b.test/]\n[location b.test/]", ":4:",
     "duplicate location (first in line 3"),
    (SERVER.encode() + b"pid = \xff", "wsgate.ini: not UTF-8 (invalid byte at offset %d)"
     % (len(SERVER) + 6)),
]


@pytest.mark.parametrize("case", BAD_CONFIGURATIONS, ids=lambda case: repr(case[0])[-45:])
def test_bad_configurations(tmp_path, case):
    """Each is one error with file, line, section and key."""
    error, = errors_of(tmp_path, case[0])
    assert "\n" not in error and not error.endswith("\\n")
    for mark in case[1:]:
        assert mark in error


def test_errors_in_the_order_of_lines(tmp_path):
    """Each is reported once."""
    errors = errors_of(tmp_path, "[server]\nlisten = a:b:c\nstatus_listen = a:b:c\n"
                                 "proxy_read_timeout = soon\n"
                                 "proxy_pas = x\n[location /a]\nreturn = x\nallow = me\n"
                                 "[location /b]\nreturn = 200\n"
                                 "[upsteam u]\n[upstream v]\nserver = a:1 b\n")
    assert [int(error.split(":")[1]) for error in errors] == [2, 3, 4, 5, 7, 8, 11, 13]


def test_duplicates(tmp_path):
    errors = errors_of(tmp_path, SERVER + PASS
                       + "[location /a]\nreturn = 200\nreturn = 201\n[server]\n[location /a]\n")
    assert errors == ["wsgate.ini:3: [server] proxy_pass: duplicate key (first in line 2)",
                      "wsgate.ini:6: [location /a] return: duplicate key (first in line 5)",
                      "wsgate.ini:7: [server]: duplicate section (first in line 1)",
                      "wsgate.ini:8: [location /a]: duplicate section (first in line 4)"]


def test_invalid_lines(tmp_path):
    """All of them are reported."""
    errors = errors_of(tmp_path, SERVER + "one\nreturn = 200\ntwo\n")
    assert [error.split(":")[1] for error in errors] == ["3", "5"]


@pytest.mark.parametrize("text", [SERVER, SERVER.rstrip("\n"), SERVER.replace("\n", "\r\n"),
                                  b"\xef\xbb\xbf" + SERVER.encode(), "\n; comment\n" + SERVER])
def test_smallest_file(tmp_path, text):
    """Two lines, also with a BOM or CRLF."""
    config = load_text(tmp_path, text)
    assert [each.name for each in config.locations] == ["/"]
    assert location_of(config).proxy.upstream.servers[0].name == "127.0.0.1:9"
    assert config.server.listen[0].address == ("127.0.0.1", 8080, None)


def test_a_line_of_a_list_can_be_commented_out(tmp_path):
    config = load_text(tmp_path,
                       "[server]\nproxy_pass = http://u\n[upstream u]\nserver =\n  127.0.0.1:1\n"
                                 "  # 127.0.0.1:2\n#  127.0.0.1:3\n  127.0.0.1:4\n")
    assert [server.name for server in location_of(config).proxy.upstream.servers] == [
        "127.0.0.1:1", "127.0.0.1:4"]


def test_settings_are_frozen(tmp_path):
    server = load_text(tmp_path, SERVER).server
    with pytest.raises(AttributeError):
        server.listen = ()
    assert server.listen


def test_inheritance(tmp_path):
    """A location has the values of [server] unless it sets its own."""
    config = load_text(tmp_path,
                       SERVER + "proxy_send_timeout = 7s\nupgrade = none\nmax_connections = 5\n"
                                          "[location /a]\nupgrade = any\n"
                                          "[location /b]\nproxy_pass = http://[::1]:7/x\n")
    names = ["/", "/a", "/b"]
    assert [location_of(config, name).upgrade for name in names] == ["none", "any", "none"]
    assert [location_of(config, name).proxy_send_timeout for name in names] == [7, 7, 7]
    assert [location_of(config, name).proxy.upstream.name
            for name in names] == ["127.0.0.1:9", "127.0.0.1:9", "[::1]:7"]
    # that of [server] is the gate's
    assert [location_of(config, name).max_connections for name in names] == [0, 0, 0]


def test_return_and_proxy_pass_replace_each_other(tmp_path):
    """Of those in [server], a location keeps only the one it does not replace."""
    config = load_text(tmp_path, SERVER + "[location /a]\nreturn = 200 hello\n")
    assert location_of(config, "/a").return_.status == 200
    assert location_of(config, "/a").proxy is None
    config = load_text(tmp_path, "[server]\nreturn = 404\n[location /a]\n" + PASS)
    assert location_of(config, "/a").return_ is None and location_of(config).return_.status == 404


def test_command_line_overrides_the_file(tmp_path):
    config = load_text(tmp_path, SERVER + "listen = 1\n",
                       {"listen": "127.0.0.1:0", "proxy_pass": "http://127.0.0.1:8"})
    assert config.server.listen[0].address.port == 0
    assert location_of(config).proxy.upstream.name == "127.0.0.1:8"
    assert wsgate.load_config(None, {"proxy_pass": "http://127.0.0.1:8"}).locations[0].path == "/"


# -------------------------------------------------------- Configuration: checks

MISTAKES = [
    # What is valid, then marks of its only warning.
    ("[location /chat/]\n[location a.test/]",
     ":3: [location /chat/]: hidden by [location a.test/] for requests to"
     " a.test (expected [location a.test/chat/] too)"),
    ("[location *.test/chat/]\n[location a.test/]",
     ":3: [location *.test/chat/]: hidden by [location a.test/]"),
    ("[location = /chat/]\n[location a.test,b.test/]", ":3:",
     "hidden by [location a.test,b.test/] for requests to a.test"
     " (expected [location = a.test/chat/] too)"),
    ("[location = /]\n[location a.test/]", ":3:", "(expected [location = a.test/] too)"),
    ("listen = 127.0.0.1:1 redirect",
     ":3: [server] listen: redirect to https, but no listener has the option ssl"),
    ("ssl_certificate = CERTIFICATE",
     ":3: [server] ssl_certificate: unused: no listener has the option ssl"),
    ("[location a.test/]\nssl_certificate = CERTIFICATE",
     ":4: [location a.test/] ssl_certificate: unused"),
    ("ssl_client_certificate = CERTIFICATE",
     ":3: [server] ssl_client_certificate: unused: no listener has the option ssl"),
    ("[location /a]\nproxy_pass = http://127.0.0.1:9/",
     ":4: [location /a] proxy_pass: requests for /a/x are forwarded as //x"),
    ("[location /a]\nproxy_pass = http://127.0.0.1:9/$request_uri", ":4:",
     "no variables in /$request_uri"),
    ("[location /a]\nproxy_pass = https://127.0.0.1:9\nproxy_ssl_verify = off",
     ":5: [location /a] proxy_ssl_verify: off"),
    ("[location /a]\nauth_request_login = /login",
     ":4: [location /a] auth_request_login: unused: the location has no auth_request"),
    ("listen = 127.0.0.1:1 ssl\nssl_certificate = CERTIFICATE\n"
     "[location /a]\nssl_certificate = CERTIFICATE",
     ":6: [location /a] ssl_certificate: unused: the certificate of a connection is chosen by its"
     " host name (expected in [server], or in [location HOST/])"),
    ("ping_interval = 60s", ":3: [server] ping_interval: not less than idle_timeout"),
    ("listen = 127.0.0.1:1 proxy_protocol",
     ":3: [server] listen: proxy_protocol: every connection is closed"),
    ("[location /a]\nproxy_pass_websocket = http://127.0.0.1:9/$uri",
     ":4: [location /a] proxy_pass_websocket: no variables in /$uri"),
    ("auth_request = http://127.0.0.1:9/verify?rd=$scheme",
     ":3: [server] auth_request: no variables in /verify?rd=$scheme"),
    ("[location /a]\nupgrade = none\nproxy_pass_websocket = http://127.0.0.1:9",
     ":5: [location /a] proxy_pass_websocket: unused: upgrade is none"),
    ("add_header = X-A: b always", ":3: [server] add_header: always is sent as a part"),
    ("deny = all\n[location /a]\nallow = 10.0.0.0/8 all",
     ":4: [location /a] deny: a network is in allow too, so deny decides"),
    ("proxy_set_header = X-A: b;",
     ":3: [server] proxy_set_header: unexpected semicolon in 'X-A: b;' (remove it)"),
    ("[location /a]\nreturn = 200 text\n  listen = 1", ":4:",
     "line 5 is indented, so it continues return of line 4"),
    ("[location /a]\nproxy_pass = http://[fe80::1%nosuch0]:9", ":4:",
     "host fe80::1%nosuch0 cannot be resolved now"),
    ("[upstream u.invalid]\nserver = 127.0.0.1:9\n[location /a]\nproxy_pass = http://u.invalid:9",
     ":6:", "at every connect ([upstream u.invalid] is written without a port)"),
    ("[location /a]\nping_peers = client", ":4: [location /a] ping_peers: unused: ping_interval"),
]


@pytest.mark.parametrize("text, marks", [(case[0], case[1:]) for case in MISTAKES],
                         ids=lambda each: repr(each)[-45:])
def test_warnings(tmp_path, text, marks):
    """What is valid but probably a mistake is a warning."""
    path = write_file(tmp_path, "server.pem", SERVER_PEM)
    warning, = load_text(tmp_path, SERVER + text.replace("CERTIFICATE", path) + "\n").warnings
    for mark in marks:
        assert mark in warning


@pytest.mark.parametrize("text", [
    "[location a.test/]\n[location a.test/chat/]\n[location /chat/]\n[location b.test/chat/]",
    "[location *.test/]\n", "[location = /a]\nproxy_pass = http://127.0.0.1:9/",
    "[location /chat/]\n[location www.test/]\nreturn = 301 https://test$request_uri",
    "[location /a]\nreturn = 302 /x?a=\"b\"&c=<d>", "[location /a]\nping_peers = both",
    "[location /a]\nreturn = 200 /* style */\n  // text\n  a { b: c };",
    "[location /a]\nauth_request_headers =\nauth_request_login =\nproxy_pass_websocket =",
    "[location /a]\nproxy_pass = http://127.0.0.1:9/x", "ping_interval = 25s",
    "idle_timeout = never\nping_interval = 1d",
    "[location /a/]\nproxy_pass = http://127.0.0.1:9/", "proxy_ssl_verify = off",
    "[location /a]\nreturn = 200 a;b #5", "[location /a]\nreturn = 200 a\n  b = c",
    "proxy_set_header = X-A: #fff", "deny = all\n[location /a]\nallow = all\ndeny =",
    "listen = 127.0.0.1:1 proxy_protocol\nset_real_ip_from = all"])
def test_no_warnings(tmp_path, text):
    assert load_text(tmp_path, SERVER + text + "\n").warnings == []


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0,
                    reason="only root gives files to others")
@pytest.mark.parametrize("mode, folder, readable",
                         [(0o600, 0o755, False), (0o644, 0o755, True), (0o644, 0o700, False)])
def test_a_key_that_the_user_cannot_read_is_a_warning(tmp_path, mode, folder, readable):
    """It is read as root at start, but neither a reload nor a renewal could read it again."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, folder)
        path = os.path.join(parent, "server.pem")
        with open(path, "w") as file:
            file.write(SERVER_PEM)
        os.chmod(path, mode)
        warnings = load_text(tmp_path,
                             SERVER + "user = nobody\nlisten = 1 ssl\nssl_certificate = %s\n"
                             % path).warnings
    assert [warning.partition("wsgate.ini")[2] for warning in warnings] == ([] if readable else [
        ":5: [server] ssl_certificate: %s is not readable for user nobody: restart wsgate after "
        "each change of it, or let that user read it" % path])


def test_a_missing_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(wsgate.ConfigError) as caught:
        wsgate.load_config(os.path.join(str(tmp_path), "none.ini"))
    assert "none.ini: cannot be read (No such file" in str(caught.value)


# ------------------------------------------------------------------ The process


@pytest.mark.parametrize("host, text", [("0.0.0.0", "127.0.0.1 and every other IPv4 address"),
                                        ("[::]", "[::1] and every other IPv6 address"),
                                        ("127.0.0.1", "127.0.0.1")])
def test_the_log_names_where_the_gate_listens(tmp_path, host, text):
    if host == "[::]" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with running("[server]\nlisten = %s:0\nreturn = 200\n" % host, tmp_path) as gate:
        wsgate.announce(gate.config, gate.gate)
        line, = [line for line in gate.errors if "listening on" in line]
        assert re.sub(r":[0-9]+/", "", line).endswith("listening on http://" + text)


@pytest.mark.skipif(not wsgate.ALLOWED_PROCESSORS, reason="this system has no affinity")
def test_worker_cpu_affinity_names_an_existing_cpu(tmp_path):
    error, = errors_of(tmp_path, SERVER + "worker_cpu_affinity = 999999999\n")
    assert error.endswith("CPU 999999999 is not available (expected one of: %s)" % ", ".join(
        map(str, sorted(os.sched_getaffinity(0)))))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
                    reason="there is one processor only")
@pytest.mark.parametrize("value", ["auto", "off", "number"])
def test_worker_cpu_affinity(tmp_path, value):
    allowed = os.sched_getaffinity(0)
    line = "worker_cpu_affinity = %s" % (max(allowed) if value == "number" else value)
    with program(tmp_path, "return = 200",
                 line) as child, contextlib.closing(connect(child.port)) as peer:
        assert peer.send(request()).response().status == 200
        tasks = [os.sched_getaffinity(int(task))
                 for task in os.listdir("/proc/%d/task" % child.pid)]
        assert len(tasks) > 1  # the connection's thread too
        if value == "auto" and not FREE_THREADED:  # there, pinning has no advantage
            expected = {sorted(allowed)[child.pid % len(allowed)]}
        else:
            expected = {max(allowed)} if value == "number" else allowed
        assert tasks == [expected] * len(tasks)


@needs_signals
def test_a_reload_that_cannot_open_a_listener_changes_nothing(tmp_path):
    log, pid = [str(tmp_path / name) for name in ("access.log", "pid2")]
    with ScriptedBackend() as other, program(tmp_path, "return = 200 old",
                                             "access_log = " + log) as child:
        write_file(tmp_path, "gate.ini",
                   "[server]\nreturn = 200 new\naccess_log = %s.new\npid = %s\nlisten = %s\n" % (
            log, pid, other.where))
        os.kill(child.pid, signal.SIGHUP)
        eventually(lambda: child.logged("reload failed, keeping the current configuration"))
        with contextlib.closing(connect(child.port).send(request(b"GET", b"/after"))) as peer:
            assert peer.response().body == b"old"
        eventually(lambda: "/after " in "\n".join(lines_in(log)))
        assert pid_in(child) == child.pid and not os.path.exists(pid)
        assert not os.path.exists(log + ".new")


@needs_signals
def test_reload_with_an_unwritable_log_or_pid_file(tmp_path):
    """It keeps the current one and does the rest."""
    log, loop = [str(tmp_path / name) for name in ("access.log", "loop")]
    os.symlink(loop, loop)
    with program(tmp_path, "return = 200 old", "access_log = " + log) as child:
        for old, new in ((child.pid_file, loop), (log, loop), ("200 old", "200 new")):
            rewrite(child, old, new)
        os.kill(child.pid, signal.SIGHUP)
        eventually(lambda: child.logged("reloaded"))
        assert child.logged("access_log: cannot write %s (Too many levels of symbolic links); "
                            "keeping" % loop)
        assert child.logged("pid: cannot write %s (Too many levels" % loop)
        with contextlib.closing(connect(child.port).send(request(b"GET", b"/after"))) as peer:
            assert peer.response().body == b"new"
        eventually(lambda: "/after " in "\n".join(lines_in(log)))
        assert pid_in(child) == child.pid


@needs_signals
def test_reload_moves_the_pid_file(tmp_path):
    with program(tmp_path, "return = 200") as child:
        old, child.pid_file = child.pid_file, str(tmp_path / "pid2")
        rewrite(child, old, child.pid_file)
        os.kill(child.pid, signal.SIGHUP)
        eventually(lambda: child.logged("reloaded"))
        assert pid_in(child) == child.pid and not os.path.exists(old)
        control(child, "stop")
        assert child.wait(5000 * MS) == 0 and not os.path.exists(child.pid_file)


@needs_signals
@needs_unix
def test_systemd(tmp_path):
    """A socket is taken over; READY, RELOADING, WATCHDOG and STOPPING are sent."""
    with socket.socket() as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        told.bind(str(tmp_path / "notify"))
        told.settimeout(5000 * MS)
        port = listener.getsockname()[1]
        early = connect(port).send(request())  # a client that comes before the gate runs
        path = write_file(tmp_path, "gate.ini",
                          "[server]\nlisten = 127.0.0.1:%d\nreturn = 200 activated\n" % port)

        def as_systemd_does():
            os.dup2(listener.fileno(), 3)
            os.set_inheritable(3, True)
            os.execve(sys.executable, [sys.executable, WSGATE, "-c", path], dict(
                os.environ, LISTEN_PID=str(os.getpid()), LISTEN_FDS="1",
                NOTIFY_SOCKET=str(tmp_path / "notify")))

        def hears(word):
            while True:
                message = told.recv(4096).decode()
                if message.startswith(word):
                    return message

        with process(before=as_systemd_does) as child:
            assert hears("READY=1")
            assert early.response().body == b"activated"
            for option in ((socket.IPPROTO_TCP, socket.TCP_NODELAY),
                           (socket.SOL_SOCKET, socket.SO_KEEPALIVE)):
                assert listener.getsockopt(*option)  # the same socket: connections have what it has
            os.kill(child.pid, signal.SIGHUP)
            assert re.match(r"RELOADING=1\nMONOTONIC_USEC=\d+$", hears("RELOADING=1"))
            assert hears("READY=1")
            os.kill(child.pid, signal.SIGTERM)
            assert hears("STOPPING=1")
            assert child.wait(5000 * MS) == 0
        early.close()


needs_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0,
                                reason="only root can become another user")


@needs_signals
@needs_root
def test_reload_reopen_and_upgrade_work_after_root_was_dropped(tmp_path):
    """The logs and the pid file belong to the user, so that they can be opened again."""
    os.chmod(str(tmp_path), 0o755)
    paths = [str(tmp_path / name) for name in ("access.log", "error.log", "pid")]
    lines = ("return = 200", "user = nobody", "access_log = " + paths[0], "error_log = " + paths[1])

    def logged(text):
        with open(paths[1]) as file:
            return file.read().count(text)

    with unread_program(tmp_path, *lines) as child:
        eventually(lambda: os.path.exists(paths[1]) and logged("up to"))
        uid = wsgate.pwd.getpwnam("nobody").pw_uid
        assert [os.stat(path).st_uid for path in paths] == [uid] * 3
        orders = [(signal.SIGHUP, "reloaded")] * 2 + [(signal.SIGUSR1, "SIGUSR1")]
        for count, (number, text) in enumerate(orders, 1):
            os.kill(child.pid, number)
            eventually(lambda: logged(text) >= min(count, 2) - (text == "SIGUSR1"))
        if not can_run_as("nobody", sys.executable, PROGRAM, "-v"):
            return
        os.kill(child.pid, signal.SIGUSR2)
        eventually(lambda: logged("has taken over"))
        assert child.wait(5000 * MS) == 0
        with open(paths[2]) as file:
            successor = int(file.read())
        try:
            with contextlib.closing(connect(child.port).send(request())) as peer:
                assert peer.response().status == 200
            assert not logged("ERROR")
        finally:
            os.kill(successor, signal.SIGTERM)


def can_run_as(user, *command):
    """Whether this user could run the command: its files may lie where only root gets."""
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: os.setuid(wsgate.pwd.getpwnam(user).pw_uid)) == 0
    except OSError:
        return False


@needs_root
def test_chown_of_logs(tmp_path):
    """Otherwise a link made by the user would give it the target of the link."""
    victim, link, hard = [str(tmp_path / name) for name in ("victim", "link", "hard")]
    write_file(tmp_path, "victim", "")
    os.symlink(victim, link)
    with open(link, "a") as file:
        wsgate.give_to("nobody", link, file.fileno())
    assert os.stat(victim).st_uid == 0
    os.link(victim, hard)
    with open(hard, "a") as file:
        wsgate.give_to("nobody", hard, file.fileno())
    assert os.stat(victim).st_uid == 0
    os.unlink(hard)
    with open(victim, "a") as file:
        wsgate.give_to("nobody", victim, file.fileno())
    assert os.stat(victim).st_uid != 0


def test_the_pid_file_of_a_running_gate_is_left_alone(tmp_path):
    with program(tmp_path, "return = 200") as child:
        other = write_file(tmp_path, "other.ini",
                           "[server]\nreturn = 200\nlisten = 127.0.0.1:%d\npid = %s\n" % (
            free_port(), child.pid_file))
        status, output = run_program("-c", other)
        assert status == 1
        assert output == (
            "wsgate: %s:4: [server] pid: %s belongs to the running wsgate process %d"
            " (expected a file of its own for each process)\n") % (other, child.pid_file, child.pid)
        assert pid_in(child) == child.pid
        control(child, "stop")
        assert child.wait(5000 * MS) == 0 and not os.path.exists(child.pid_file)


@pytest.mark.parametrize("command, is_gate", [
    ("python3 -u -X dev /usr/lib/wsgate.py -c f", True), ("/usr/bin/python3.11 -m wsgate", True),
    ("/usr/bin/wsgate -c f", True), ("python3 -W error wsgate", True), ("pypy3 wsgate.py", True),
    ("python3 backup.py wsgate", False), ("python3 -c pass wsgate.py", False),
    ("python3 /opt/wsgate/other.py wsgate.py", False), ("vim wsgate.py", False),
    ("/opt/wsgate/sleep 5", False), ("python3 -m http.server wsgate", False)])
def test_what_counts_as_a_gate(command, is_gate):
    """A signal to anything else could end it: HUP does, where it is not handled."""
    words = b"".join(word.encode() + b"\0" for word in command.split())
    assert bool(wsgate.GATE_COMMAND.match(words)) == is_gate


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "99999999999999999999", "%d" % os.getppid()])
def test_the_pid_file_of_anything_else_is_replaced(tmp_path, text):
    """Among them the file of a process that has the number of a gate that died."""
    path, pid_file = write_file(tmp_path, "pid", text), wsgate.PidFile()
    pid_file.write(path, "")
    with open(path) as file:
        assert file.read() == "%d\n" % os.getpid()
    pid_file.remove()
    assert not os.path.exists(path)


# --------------------------------------------------------------------- The gate


def test_a_reload_takes_new_locations_at_once_and_tunnels_stay(tmp_path):
    with ScriptedBackend(echo_service) as backend:
        old = ini_for(backend)
        with running(old,
                     tmp_path) as gate, contextlib.closing(
                         gate.connect().send(handshake())) as tunnel:
            assert tunnel.response().status == 101
            kept = gate.connect()
            assert kept.send(request()).response().body == b"ok"
            reload(gate, "[server]\nreturn = 200 new\n")
            assert gate.fetch(request()).body == b"new"
            assert kept.send(request()).response().body == b"new"
            assert tunnel_works(tunnel)
            kept.close()


def test_a_reload_opens_and_closes_the_status_page(tmp_path):
    with running("[server]\nreturn = 200\n", tmp_path) as gate:
        reload(gate, "[server]\nreturn = 200\nlisten = 127.0.0.1:0\nstatus_listen = localhost:0\n")
        port = eventually(lambda: next((each.server_address[1] for each in gate.listeners
                                        if each.listen.address.host == "localhost"), None),
                          500 * MS)
        with contextlib.closing(connect(port)) as peer:
            raw = request(b"GET", b"/healthz", b"Host: localhost")
            assert peer.send(raw).response().status == 200
        reload(gate, "[server]\nreturn = 200\n")
        eventually(lambda: not listening(port), 500 * MS)


def test_a_reload_keeps_what_is_known_of_the_servers(tmp_path):
    with refusing_port() as dead, ScriptedBackend(echo_service) as backend:
        ini = ini_for_pool([dead.where + " weight=9", backend.where])
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"/1")).status == 200
            assert gate.line("/1 ", "failed=1")
            reload(gate, ini.replace("[server]", "[server]\nsend_timeout = 7s"))
            assert gate.fetch(request(b"GET", b"/2")).status == 200
            assert "failed=" not in gate.line("/2 ")


@pytest.mark.parametrize("broken, said", [
    ("[server]\nretrun = 200\n", "did you mean 'return'"), ("rubbish", "invalid line: rubbish"),
    ("[server]\nlisten = OTHER\nreturn = 200\n", "another program"),
    ("[server]\nreturn = 200\nlisten = 127.0.0.1:0 ssl\n", "ssl_certificate"),
    ("[server]\nreturn = 200\nauth_basic_user_file = BCRYPT\n", "--hash-password")])
def test_reload_with_errors(tmp_path, broken, said):
    """Nothing changes; the log has the error."""
    bcrypt = write_file(tmp_path, "users", "bob:$2y$05$bvIG6Nmid91Mu9RcmmWZfO\n")
    with ScriptedBackend() as other, running("[server]\nreturn = 200 old\n", tmp_path) as gate:
        lines = reload(gate, broken.replace("OTHER",
                                            "127.0.0.1:0, "
                                            + other.where).replace("BCRYPT", bcrypt))
        assert any(line.startswith("reload: ") and said in line for line in lines), lines
        assert lines[-1] == "reload failed, keeping the current configuration"
        assert gate.fetch(request()).body == b"old" and len(gate.listeners) == 1


def test_quit_closes_tunnels_over_drain_timeout(tmp_path, constants):
    """The tunnels that have been idle for longest are first."""
    constants(QUIET=50 * MS)
    window = 600 * MS
    with gate_and_backend(tmp_path, echo_service,
                          "drain_timeout = %dms" % (window * 1000)) as (gate, _):
        clients = [gate.connect().send(handshake()) for _ in range(20)]
        for peer in clients:
            assert peer.response().status == 101
        # a tunnel that was busy just now looks up a little later
        assert clients[-1].silent(80 * MS)
        assert tunnel_works(clients[0])
        poll, ends, begun = select.poll(), [], time.monotonic()
        waiting = {peer.sock.fileno(): peer for peer in clients}
        for number in waiting:
            poll.register(number, select.POLLIN)
        gate.signal("SIGQUIT")
        while waiting:
            for number, _ in poll.poll(5000):
                poll.unregister(number)
                ends.append(time.monotonic() - begun)
                last = waiting.pop(number)
                assert read_frame(last) == (8, struct.pack("!H", 1001) + b"drain")
        assert last is clients[0] and not listening(gate.port)
        assert ends[0] < 300 * MS and 450 * MS < ends[-1] < window + 400 * MS
        assert all(sum(place * window / 4 < end for end in ends) <= 20 - 4 * place
                   for place in (1, 2, 3)), ends
        for peer in clients:
            peer.close()
        wait_for_end(gate)
        assert sum("close=gate:1001 reason=drain" in line for line in gate.access) == 20


def test_quit_finishes_requests_and_closes_idle_connections(tmp_path):
    go = threading.Event()

    def script(peer):
        peer.head()
        assert go.wait(5000 * MS)
        peer.send(ok(b"whole"))

    with gate_and_backend(tmp_path, script, "[location /idle]", "return = 200",
                          "[location /]") as (gate, backend):
        idle, fresh, late, busy = [gate.connect() for _ in range(4)]
        assert idle.send(request(b"GET", b"/idle")).response().status == 200
        busy.send(request())
        backend.connection()
        gate.signal("SIGQUIT")
        assert idle.ended(500 * MS) and not listening(gate.port)
        assert busy.silent(50 * MS)
        # accepted before, so it must be served here
        response = fresh.send(request(b"GET", b"/idle")).response()
        assert (response.status, response.get(b"connection")) == (200, b"close")
        assert late.send(handshake()).response().reason == "draining"
        go.set()
        response = busy.response()
        assert (response.status, response.body,
                response.get(b"connection")) == (200, b"whole", b"close")
        for peer in (idle, fresh, late, busy):
            peer.close()
        wait_for_end(gate)


def test_end_before_the_last_peer(tmp_path, constants):
    """The drain is over, but a client has not closed yet: running() looks for tracebacks."""
    constants(QUIET=50 * MS)
    with gate_and_backend(tmp_path, echo_service, "drain_timeout = 0") as (gate, _):
        client = gate.connect().send(handshake())
        assert client.response().status == 101
        gate.signal("SIGQUIT")
        assert read_frame(client)[0] == 8
        wait_for_end(gate)
        client.close()
        assert "close=gate:1001 reason=drain" in gate.line("101 closed")


@pytest.mark.parametrize("first, second", [
    ("SIGQUIT", "SIGQUIT"), ("SIGQUIT", "SIGTERM"), ("SIGTERM", None)])
def test_a_second_quit_stops_as_term_does(tmp_path, constants, first, second):
    constants(QUIET=50 * MS)
    with gate_and_backend(tmp_path, echo_service, "drain_timeout = 60s") as (gate, _):
        client = gate.connect().send(handshake())
        assert client.response().status == 101
        begun = time.monotonic()
        gate.signal(first)
        if second:
            eventually(lambda: gate.state == "draining")
            assert client.silent(20 * MS)
            gate.signal(second)
        assert read_frame(client) == (8, struct.pack("!H", 1001) + b"shutdown")
        client.close()
        wait_for_end(gate)
        assert time.monotonic() - begun < 1500 * MS


@pytest.mark.parametrize("name, reason", [("SIGQUIT", b"drain"), ("SIGTERM", b"shutdown")])
def test_tunnel_opened_while_draining(tmp_path, name, reason):
    """It is closed too."""
    with gate_and_backend(tmp_path, None, "drain_timeout = " + ini_ms(800)) as (gate, backend):
        client = gate.connect().send(handshake())
        peer = backend.connection()
        peer.head()
        gate.signal(name)
        eventually(lambda: not listening(gate.port))
        with takes(0, 700):
            peer.send(switching())
            assert client.response().status == 101
            assert read_frame(client) == read_frame(peer) == (8, b"\x03\xe9" + reason)
        assert "close=gate:1001 reason=" + reason.decode() in line_of(gate, client, peer)
        wait_for_end(gate)


def test_a_tunnel_that_is_never_quiet_is_ended_too(tmp_path, constants):
    constants(QUIET=100 * MS)  # it looks up now and then, and polls no wakeup
    with gate_and_backend(tmp_path, echo_service) as (gate, _):
        client = gate.connect().send(handshake())
        assert client.response().status == 101
        assert tunnel_works(client)
        gate.signal("SIGTERM")
        eventually(lambda: read_frame(client.send(frame(1, b"more", b"abcd")))
                   == (8, b"\x03\xe9shutdown"), 800 * MS)
        client.close()
        wait_for_end(gate)


@needs_signals
def test_drained_tunnels_are_logged(tmp_path, impatient):
    """Even if their peers do not close."""
    with ScriptedBackend(echo_service) as backend, program(
            tmp_path, "proxy_pass = http://" + backend.where,
            "drain_timeout = " + ini_ms(100)) as child:
        with contextlib.closing(connect(child.port).send(handshake())) as client:
            assert client.response().status == 101
            control(child, "quit")
            assert child.wait(5000 * MS) == 0 and eventually(lambda: child.logged("reason=drain"))


@needs_signals
def test_s_reopen_reload_stop(tmp_path):
    log = str(tmp_path / "access.log")
    with program(tmp_path, "return = 200 old", "access_log = " + log) as child:
        assert pid_in(child) == child.pid
        os.rename(log, log + ".1")
        control(child, "reopen")
        eventually(lambda: os.path.exists(log))
        rewrite(child, "200 old", "200 new")
        control(child, "reload")
        eventually(lambda: child.logged("reloaded"))
        peer = connect(child.port).send(request(b"GET", b"/somewhere"))
        assert peer.response().body == b"new"
        with open(log) as file:
            eventually(lambda: "/somewhere" in file.read())
        control(child, "stop")
        assert child.wait(5000 * MS) == 0 and child.logged("stopped")
        assert not os.path.exists(child.pid_file)
        peer.close()


TELL_WHO_IS_ASKED_FOR = """
import socket
def asked(host, *more, real=socket.getaddrinfo, **options):
    print("asked for", host)
    return real(host, *more, **options)
socket.getaddrinfo = asked
"""


@needs_signals
def test_a_reload_asks_no_name_server(tmp_path):
    write_file(tmp_path, "sitecustomize.py", TELL_WHO_IS_ASKED_FOR)
    # The name of an interface that is not there: no name server is really asked.
    with program(tmp_path, "proxy_pass = http://[fe80::1%nosuch0]:9",
                 environ={"PYTHONPATH": str(tmp_path)}) as child:
        assert child.logged("asked for fe80::1%nosuch0") and child.logged("cannot be resolved now")
        rewrite(child, "fe80::1", "fe80::2")
        os.kill(child.pid, signal.SIGHUP)
        eventually(lambda: child.logged("reloaded"))
        assert not child.logged("asked for fe80::2")
        with contextlib.closing(connect(child.port).send(request())) as peer:
            assert peer.response().reason == "backend_unresolved"
        eventually(lambda: child.logged("asked for fe80::2"))


@needs_signals
def test_repeated_ctrl_c(tmp_path):
    """The second ends at once; a third prints no traceback."""
    def pid_file_is_read():
        with contextlib.suppress(OSError):  # ENXIO until then
            return os.open(child.pid_file, os.O_WRONLY | os.O_NONBLOCK)

    with ScriptedBackend() as backend, program(
            tmp_path, "proxy_pass = http://" + backend.where) as child:
        client = connect(child.port).send(request())
        backend.connection().head()
        os.unlink(child.pid_file)
        # reading the pid file, the ending gate blocks until a writer opens it
        os.mkfifo(child.pid_file)
        child.send_signal(signal.SIGINT)
        eventually(lambda: not listening(child.port))
        with takes(0, 600):  # a backend that does not answer would hold it up for a second
            child.send_signal(signal.SIGINT)
            writing = eventually(pid_file_is_read)
        child.send_signal(signal.SIGINT)
        os.write(writing, b"%d\n" % child.pid)
        os.close(writing)
        assert child.wait(5000 * MS) == 0 and not os.path.exists(child.pid_file)
        eventually(lambda: child.logged("stopped"))
        assert not child.logged("Traceback") and not child.logged("Exception")
        client.close()


def test_a_signal_to_a_gate_that_does_not_run_is_an_error(tmp_path, capsys):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    for text in ("%d\n" % done.pid, "%d\n" % (1 << 22 | 1), "", None):
        if text is not None:
            write_file(tmp_path, "pid", text)
        else:
            os.unlink(str(tmp_path / "pid"))
        path = write_file(tmp_path, "gate.ini",
                          "[server]\nreturn = 200\npid = %s\n" % (tmp_path / "pid"))
        assert wsgate.main(["-c", path, "-s", "reload"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("wsgate: ") and str(tmp_path / "pid") in said
        assert said.count("\n") == 1


def test_signals_are_coalesced(tmp_path):
    """A hundred HUPs in a row are a few reloads."""
    with running("[server]\nreturn = 200\n", tmp_path) as gate:
        signals = [signal.SIGHUP, signal.SIGUSR1] * 50 + [signal.SIGHUP]
        gate.gate.signals.extend(signals)
        gate.gate.signal_wakeup.set()
        eventually(lambda: any("SIGUSR1" in line for line in gate.errors))
        assert gate.fetch(request()).status == 200
        assert sum(line.startswith("reloaded") for line in gate.errors) == 1


@needs_signals
@pytest.mark.parametrize("names", [("SIGHUP", "SIGUSR1"), ("SIGUSR1", "SIGHUP")])
def test_signals_that_are_pending_together_keep_their_order(tmp_path, names):
    """A reload after the start of an upgrade would open listeners that the successor wants."""
    with running("[server]\nreturn = 200\n", tmp_path) as gate:
        gate.gate.signals.extend([getattr(signal, name) for name in names])
        gate.gate.signal_wakeup.set()
        eventually(lambda: all(any(name in line for line in gate.errors) for name in names))
        assert [line.split(":")[0] for line in gate.errors if "SIG" in line] == list(names)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc here")
def test_soak_leaves_threads_descriptors_and_memory_flat(tmp_path, tls, impatient):
    """SOAK_SECONDS in the environment changes its length."""
    seconds = float(os.environ.get("SOAK_SECONDS", "0.6"))
    soak, sizes = Soak((free_port(), free_port()), tls), []
    lines = [line.replace(ini_ms(150), ini_ms(500)) for line in SHORT_TIMES]
    with ScriptedBackend(behave_by_target) as backend:
        path = write_file(tmp_path, "gate.ini", ini_for(
            backend, "listen =\n 127.0.0.1:%d\n 127.0.0.1:%d ssl" % soak.ports,
            "ssl_certificate = " + tls.server, "access_log = " + os.devnull,
            "idle_timeout = " + ini_ms(500), *lines))
        # With one heap, its size is the memory in use.
        with process("-c", path, environ={"MALLOC_ARENA_MAX": "1"}) as child:
            eventually(lambda: child.logged("up to"))
            before = resources_of(child.pid)[:2]
            for share in (0.25, 0.75):  # the first one to warm up
                soak.run(share * seconds)
                sizes.append(resources_of(child.pid)[2])
            eventually(lambda: all(now <= then for now, then in zip(
                resources_of(child.pid), before)))
            assert sizes[1] - sizes[0] < 3, sizes
            os.kill(child.pid, signal.SIGTERM)
            assert child.wait(5000 * MS) == 0
            assert not child.logged("internal error"), child.lines[-5:]


# ------------------------------------------------------------- Upgrade in place


@needs_signals
def test_upgrade_refuses_no_connection(tmp_path, impatient):
    with ScriptedBackend(echo_service) as backend:
        lines = "drain_timeout = %dms" % (100 * MS * 1000), "proxy_pass = http://" + backend.where
        with program(tmp_path, *lines) as child:
            tunnel = connect(child.port).send(handshake())
            assert tunnel.response().status == 101
            with successor_of(child), requests_meanwhile(child.port) as results:
                control(child, "upgrade")
                assert read_frame(tunnel) == (8, struct.pack("!H", 1001) + b"drain")
                tunnel.close()
                assert child.wait(5000 * MS) == 0
                count = len(results)
                eventually(lambda: len(results) > count + 2)
                assert pid_in(child) != child.pid and set(results) == {200}
                control(child, "quit")
                eventually(lambda: not os.path.exists(child.pid_file))
                eventually(lambda: not listening(child.port))


@needs_signals
def test_a_broken_upgrade_leaves_the_old_process_as_it_was(tmp_path, monkeypatch):
    copy = shutil.copy(PROGRAM, str(tmp_path / "wsgate.py"))
    monkeypatch.setitem(globals(), "PROGRAM", copy)  # what process() runs
    with ScriptedBackend(echo_service) as backend, program(
            tmp_path, "proxy_pass = http://" + backend.where) as child:
        tunnel = connect(child.port).send(handshake())
        assert tunnel.response().status == 101
        for text in ("this is no Python", "import sys\nsys.exit(3)\n"):
            write_file(tmp_path, "wsgate.py", text)
            count = sum("upgrade failed, this process continues: the new process ended" in line
                        for line in child.lines)
            control(child, "upgrade")
            eventually(lambda: sum(
                "upgrade failed, this process continues: the new process ended" in line
                for line in list(child.lines)) > count)
            assert pid_in(child) == child.pid and child.poll() is None
            peer = connect(child.port).send(request())
            assert peer.response().status == 200
            peer.close()
        assert tunnel_works(tunnel)
        tunnel.close()


@needs_signals
@pytest.mark.parametrize("code, words", [
    ("import time\ntime.sleep(60)", "s; it was killed"),
    ("import os, time\nos.close(int(os.environ['WSGATE_READY']))\ntime.sleep(60)",
     "before it was ready; it was killed"),
    ("raise SystemExit(3)", "ended with status 3")])
def test_failed_upgrade(tmp_path, monkeypatch, code, words):
    monkeypatch.setattr(wsgate, "__file__", write_file(tmp_path, "broken.py", code))
    monkeypatch.setattr(wsgate.Successor, "TIMEOUT",
                        60 if "status" in words or "before" in words else 0.1)
    monkeypatch.setattr(wsgate.Successor, "GRACE", 50 * MS)
    with running("[server]\nreturn = 200\n", tmp_path) as gate, nothing_left():
        gate.signal("SIGUSR2")

        def failed():
            assert gate.fetch(request()).status == 200  # and it looks at the time
            return any("upgrade failed, this process continues" in line and words in line
                       for line in gate.errors)

        eventually(failed, 10000 * MS)
        assert gate.gate.successor is None


@needs_signals
@pytest.mark.parametrize("name", ["SIGTERM", "SIGQUIT"])
def test_a_stop_during_an_upgrade_ends_both(tmp_path, monkeypatch, name):
    code = "import time\ntime.sleep(60)"
    monkeypatch.setattr(wsgate, "__file__", write_file(tmp_path, "slow.py", code))
    with running("[server]\nreturn = 200\n", tmp_path) as gate, nothing_left():
        gate.signal("SIGUSR2")
        successor = eventually(lambda: gate.gate.successor)
        gate.signal(name)
        wait_for_end(gate)
        assert successor.process.wait(5000 * MS) == -signal.SIGKILL


# ---------------------------------------------------------- Limits and counters


def test_silent_connections_leave_descriptors_for_backends(tmp_path):
    with ScriptedBackend(respond(ok())) as backend, flooded(
            tmp_path, backend, 60) as (child, client):
        eventually(lambda: child.logged("conn_limit") or child.logged("cannot accept")
                   or len(os.listdir("/proc/%d/fd" % child.pid)) > 20)
        # While the flood arrives, a request may find no descriptor left and get a 503.
        eventually(lambda: client.send(request()).response().status == 200)
        assert not child.logged("cannot accept")


def test_no_descriptor_for_a_backend_is_503(tmp_path):
    """It does not count as a failure of the server."""
    location = location_of(load_text(tmp_path, "[server]\nproxy_pass = http://127.0.0.1:9\n"))
    with no_descriptor_free(), pytest.raises(wsgate.HTTPError) as caught:
        wsgate.Attempts(location.proxy, location, "127.0.0.1", wsgate.Headers()).connect()
    assert (caught.value.status, caught.value.reason) == (503, "conn_limit")
    health = location.proxy.upstream.servers[0].health
    assert (health.fails, health.active) == (0, 0) and not health.down_until


def test_an_idle_connection_gives_its_place_to_a_new_one(tmp_path):
    """The one that has been idle longest; one with a request under way does not."""
    with gate_and_backend(tmp_path, None, "max_connections = 3") as (gate, backend):
        def served(client, number):
            client.send(request())
            peer = backend.connection(number)
            peer.head()
            peer.send(ok())
            assert client.response().status == 200

        oldest, idle, busy = gate.connect(), gate.connect(), gate.connect()
        for number, client in enumerate((oldest, idle)):
            served(client, number)
            eventually(lambda: len(gate.gate.connections.idle) == 3)  # it waits again
        busy.send(request())
        peer = backend.connection(2)
        peer.head()
        new = gate.connect()
        served(new, 3)
        assert oldest.ended() and idle.silent(50 * MS)
        peer.send(ok())
        assert busy.response().status == 200
        served(idle, 4)
        for client in (oldest, idle, busy, new):
            client.close()


def test_a_connection_with_a_request_under_way_keeps_its_place(tmp_path):
    with gate_and_backend(tmp_path, None, "max_connections = 1") as (gate, backend):
        busy = gate.connect().send(request())
        peer = backend.connection()
        peer.head()
        assert gate.fetch(request()).status == 503
        peer.send(ok())
        assert busy.response().status == 200
        busy.close()


def test_silent_connections(tmp_path, monkeypatch):
    """One without a place is closed for a new one, however many there are."""
    monkeypatch.setattr(wsgate, "REFUSAL_HEADROOM", 2)
    with running("[server]\nmax_connections = 1\nreturn = 200\n", tmp_path) as gate:
        idle = gate.connect().send(request())
        assert idle.response().status == 200
        silent = [gate.connect() for _ in range(20)]
        assert eventually(lambda: gate.fetch(request()).status == 200)
        assert sum(peer.silent(0) for peer in silent) <= 3
        for peer in silent + [idle]:
            peer.close()


def test_lingering_holds_no_place(tmp_path):
    with gate_and_backend(tmp_path, respond(ok()), "max_connections = 1",
                          "client_max_body_size = 1") as (gate, _):
        slow = gate.connect().send(request(b"POST", b"/", b"Content-Length: 5000000"))
        assert slow.response().status == 413
        assert eventually(lambda: gate.fetch(request()).status == 200)
        slow.send(bytes(1000))
        slow.close()


@pytest.mark.parametrize("first", [b"", request()])
def test_max_connections_per_ip(tmp_path, first):
    """Silent and idle ones count too; a refused one is closed and does not count."""
    with running("[server]\nmax_connections_per_ip = 1\nreturn = 200\n", tmp_path) as gate:
        client = gate.connect().send(first)
        if first:
            client.response()
        eventually(lambda: gate.connections.in_use)
        other = gate.connect().send(request())
        assert other.response().status == 429
        assert other.ended()
        other.close()
        assert client.send(request()).response().status == 200
        client.close()
        eventually(lambda: gate.fetch(request()).status == 200)


def test_max_connections_per_ip_behind_a_proxy(tmp_path):
    """Its connections carry requests of many clients."""
    with gate_and_backend(tmp_path, None, "max_connections_per_ip = 1",
                          "set_real_ip_from = 127.0.0.1") as (gate, backend):
        def asked(address):
            client = gate.connect()
            return client.send(request(b"GET", b"/", b"X-Forwarded-For: " + address))

        busy, other = asked(b"192.0.2.7"), asked(b"192.0.2.8")
        for number in range(2):
            backend.connection(number).head()
        refused = asked(b"192.0.2.7")
        assert refused.response().status == 429
        for number in range(2):
            backend.connection(number).send(ok())
        for client in (busy, other):
            assert client.response().status == 200
        eventually(lambda: not gate.connections.in_use)  # the client is faster than the end
        refused.send(request(b"GET", b"/", b"X-Forwarded-For: 192.0.2.7"))
        peer = backend.connection(2)
        peer.head()
        peer.send(ok())
        assert refused.response().status == 200
        for client in (busy, other, refused):
            client.close()


def test_max_connections_per_ip_and_the_proxy_header(tmp_path):
    ini = PROXY_INI % ("", "127.0.0.1")
    ini = ini.replace("[server]", "[server]\nmax_connections_per_ip = 1")
    with running(ini, tmp_path) as gate:
        clients = [gate.connect().send(b"PROXY TCP4 192.0.2.%d 127.0.0.1 1 2\r\n" % last, request())
                   for last in (7, 8)]
        assert [client.response().status for client in clients] == [200, 200]
        again = b"PROXY TCP4 192.0.2.7 127.0.0.1 1 2\r\n" + request()
        assert gate.fetch(again).status == 429
        for client in clients:
            client.close()


@pytest.mark.parametrize("where, line, status, reason", [
    ("server", "max_connections = 1", 503, "conn_limit"),
    ("server", "max_connections_per_ip = 1", 429, "conn_limit_per_ip"),
    ("location", "max_connections = 1", 503, "conn_limit")])
@BOTH_WAYS
def test_a_limit_refuses_until_a_place_is_free(tmp_path, raw, where, line, status, reason):
    with ScriptedBackend(echo_service) as backend:
        ini = "[server]\n%s\n[location /]\nproxy_pass = http://%s\n%s\n" % (
            line if where == "server" else "", backend.where, line if where == "location" else "")
        with running(ini, tmp_path) as gate:
            with contextlib.closing(gate.connect().send(handshake())) as inside:
                assert inside.response().status == 101
                for _ in range(3):
                    response = gate.fetch(raw(b"/"))
                    assert (response.status, response.reason) == (status, reason)
                    assert response.get(b"retry-after").isdigit() and len(backend.connections) == 1
            assert gate.line("101 closed")
            assert eventually(lambda: gate.fetch(raw(b"/")).status in (101, 200))


# -------------------------------------------------------------------- Listening


@needs_unix
@pytest.mark.parametrize("option, mode", [("", 0o666), (" mode=0660", 0o660),
                                          (" mode=600 proxy_protocol", 0o600)])
def test_the_mode_of_a_unix_socket_is_an_option_of_listen(tmp_path, option, mode):
    path = str(tmp_path / "socket")
    ini = "[server]\nlisten = unix:%s%s\nreturn = 200\n"
    with running(ini % (path, option), tmp_path) as gate:
        assert os.stat(path).st_mode & 0o777 == mode
        reload(gate, ini % (path, " mode=0606"))
        assert os.stat(path).st_mode & 0o777 == 0o606


def test_reload_changes_listeners(tmp_path):
    """Those that stay refuse no connection meanwhile."""
    def ini(*addresses):
        return "[server]\nlisten = %s\nreturn = 200\n" % ", ".join(addresses)

    def ports():
        return {each.listen.address.host: each.server_address[1] for each in gate.listeners}

    with running(ini("127.0.0.1:0"), tmp_path) as gate, requests_meanwhile(gate.port) as results:
        for _ in range(3):
            reload(gate, ini("127.0.0.1:0", "localhost:0"))
            port = ports()["localhost"]
            assert ports()["127.0.0.1"] == gate.port and listening(port)
            reload(gate, ini("127.0.0.1:0"))
            eventually(lambda: "localhost" not in ports())
            assert not listening(port)
        count = len(results)
        eventually(lambda: len(results) > count + 1)
    assert set(results) == {200}


@pytest.mark.skipif(not os.path.exists("/proc/self/stat") or wsgate.resource is None,
                    reason="this system has no /proc")
def test_out_of_descriptors(tmp_path):
    """Connections are refused without a busy loop, and served again later."""
    def few_descriptors():
        wsgate.resource.setrlimit(wsgate.resource.RLIMIT_NOFILE, (64, 64))

    with program(tmp_path, "max_connections = 1000", "return = 200",
                 before=few_descriptors) as child:
        clients = [connect(child.port) for _ in range(70)]
        eventually(lambda: child.logged("accept() failed"))
        before = processor_seconds(child.pid)
        assert clients[-1].silent(120 * MS)
        assert processor_seconds(child.pid) - before < 50 * MS
        assert {peer.send(request()).response().status for peer in clients[:20]} == {200}
        for peer in clients:
            peer.close()

        def served():
            with contextlib.closing(connect(child.port)) as peer:
                return peer.send(request()).response().status == 200

        with takes(0, 800):  # ACCEPT_PAUSE, and no whole second
            eventually(served)
        assert all(served() for _ in range(20))
        assert sum("accept() failed" in line for line in child.lines) == 1


def test_systemd_without_a_free_descriptor(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with no_descriptor_free():
            wsgate.notify("WATCHDOG=1")


@pytest.mark.parametrize("name", ["\0peer", "\0", "\n"])
def test_clients_of_a_unix_socket_have_no_address(tmp_path, monkeypatch, name):
    """The name that a client has bound is not taken for one."""
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "gate.sock")
    with ScriptedBackend(respond(ok())) as backend:
        with running(ini_for(backend, "listen = 127.0.0.1:0, unix:%s" % path,
                             "proxy_protocol = on"), tmp_path):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(name + ("%d" % os.getpid() if name == "\0peer" else ""))
            sock.connect(path)
            client = Peer(sock).send(request())
            peer = backend.connection()
            assert client.response().status in (200, 502)
            client.close()
            assert peer is not None


@needs_unix
def test_unix_sockets(tmp_path):
    """A stale one is replaced."""
    front, back = str(tmp_path / "front"), str(tmp_path / "back")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(front)
    with ScriptedBackend(echo_service, path=back) as backend:
        with running("[server]\nlisten = unix:%s\nproxy_pass = http://unix:%s:\n" % (front, back),
                     tmp_path) as gate:
            peer = unix_peer(front).send(handshake())
            assert peer.response().status == 101
            assert tunnel_works(peer)
            peer.close()
            assert gate.line("101 closed", " unix: ", " %s " % backend.where)
    assert not os.path.exists(front)


@needs_unix
@pytest.mark.parametrize("flag, lines, before, client", [
    (" proxy_protocol", ("set_real_ip_from = unix:", "real_ip_header = proxy_protocol"),
     b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n", b"203.0.113.9"),
    (" proxy_protocol", ("set_real_ip_from = 127.0.0.1", "real_ip_header = proxy_protocol"),
     b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n", None),
    ("", ("set_real_ip_from = unix:",), b"", b"6.6.6.6"),
    ("", ("set_real_ip_from = 127.0.0.1",), b"", b""),
])
def test_trusted_unix_socket(tmp_path, flag, lines, before, client):
    path = str(tmp_path / "front")
    ini = "[server]\nlisten = unix:%s%s\nreturn = 200 $remote_addr\n%s\n" % (
        path, flag, "\n".join(lines))
    with running(ini, tmp_path), contextlib.closing(unix_peer(path)) as peer:
        # the gate may have closed it already
        with contextlib.suppress(ConnectionError):
            peer.send(before, request(b"GET", b"/", b"X-Forwarded-For: 6.6.6.6"))
        assert peer.ended() if client is None else peer.response().body == client


@needs_unix
def test_a_dual_stack_peer_is_ipv4_in_the_error_log_too(tmp_path):
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.socket(socket.AF_INET6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", 0))
        port = sock.getsockname()[1]

        path = write_file(tmp_path, "wsgate.ini", "[server]\nreturn = 200\nlisten = [::]:%d"
                          " proxy_protocol\nset_real_ip_from = 192.0.2.1\n" % port)

        def as_systemd_does():
            os.dup2(sock.fileno(), 3)
            os.set_inheritable(3, True)
            os.execve(sys.executable, [sys.executable, PROGRAM, "-c", path], dict(
                os.environ, LISTEN_PID=str(os.getpid()), LISTEN_FDS="1"))

        with process(before=as_systemd_does) as child:
            eventually(lambda: child.logged("every other address"))
            with contextlib.closing(connect(port)) as peer:
                assert peer.ended()
            eventually(lambda: child.logged("INFO 127.0.0.1: connection closed: PROXY header"))


@needs_unix
def test_unix_socket_in_use(tmp_path):
    with ScriptedBackend(echo_service, path=str(tmp_path / "front")) as owner:
        with pytest.raises(wsgate.ConfigError, match="another program"):
            with running("[server]\nlisten = %s\nreturn = 200\n" % owner.where, tmp_path):
                pass
        assert unix_peer(str(tmp_path / "front")).send(request()).response().status == 200


# --------------------------------------------------------------- One connection

FUZZ_REQUESTS = (
    request(), request(b"POST", body=b"hello"), CHUNKED_POST + CHUNKED_IN, handshake(),
    request() + request(), b"\r\n\r\n", handshake() + frame(1, b"hi", b"abcd"),
    request(b"HEAD", b"http://gate.test/a%20b?c"), b"GET / HTTP/1.0\r\n\r\n",
    request(b"POST", b"/", b"Expect: 100-continue", b"Content-Length: 2"),
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Connection: host\r\n")

FUZZ_RESPONSES = (
    ok(), ok(BODY_300K[:70000]), switching(), switching() + frame(1, b"hi") + frame(8, b"\x03\xe8"),
    OK + b"\r\nhello", OK + CHUNKED + CHUNKED_IN, b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + ok(),
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n")


def test_no_bytes_of_either_side_confuse_the_gate(tmp_path):
    """FUZZ_SECONDS and FUZZ_SEED in the environment change its length and its bytes."""
    seconds = float(os.environ.get("FUZZ_SECONDS", "0.5"))
    fuzzing = Fuzzing(int(os.environ.get("FUZZ_SEED", "1")), time.monotonic() + seconds)
    lines = ("idle_timeout = 300ms",) + tuple(SHORT_TIMES)
    with nothing_left(), gate_and_backend(tmp_path, fuzzing.script, *lines) as (gate, backend):
        threads = [threading.Thread(target=fuzzing.run, args=(number, gate))
                   for number in range(3)]
        for step in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                step(thread)
        assert not fuzzing.wrong and min(fuzzing.clients, fuzzing.backends) > 20 * min(seconds, 1)
        eventually(lambda: not gate.connections)
        assert not gate.connections.in_use
        assert not [line for line in gate.errors if "internal error" in line]
        backend.script = respond(ok(b"alive"))
        eventually(lambda: gate.fetch(request()).body == b"alive")


def test_quit_and_connections_that_become_idle(tmp_path):
    """The drain does not wait for them."""
    with gate_and_backend(tmp_path, None, "drain_timeout = 20s") as (gate, backend):
        client = gate.connect().send(request())
        peer = backend.connection()
        peer.head()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na")
        client.read_until(b"\r\n\r\na")
        gate.signal("SIGQUIT")
        eventually(lambda: gate.state == "draining" and not gate.listeners)
        peer.send(b"b")
        assert client.read(1) == b"b"
        assert client.ended(1000 * MS)


def test_deny_all_holds_for_unix_sockets_too(tmp_path):
    path = str(tmp_path / "gate.sock")
    with ScriptedBackend(respond(ok())) as backend:
        with running(ini_for(backend, "listen = 127.0.0.1:0, unix:%s" % path, "deny = all"),
                     tmp_path):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            client = Peer(sock).send(request())
            assert client.response().status == 403
            client.close()


@pytest.mark.parametrize("secure", [False, True])
def test_refusal_of_a_large_upload(tmp_path, tls, secure):
    """A client that sends all before it reads, as Python's http.client does, gets the 413."""
    ini = tls_ini(tls) if secure else "[server]\n"
    ini += "proxy_pass = http://127.0.0.1:9\nclient_max_body_size = 1m\n"
    with running(ini, tmp_path) as gate:
        client = tls_connect(gate, tls) if secure else gate.connect()
        client.send(request(b"POST", b"/", b"Content-Length: 48000000"))
        for _ in range(480):
            client.send(bytes(100000))
        assert client.response().status == 413
        assert client.ended()
        client.close()


def test_early_response_to_a_large_upload(tmp_path):
    with gate_and_backend(tmp_path, None) as (gate, backend):
        client = gate.connect()
        client.send(request(b"POST", b"/", b"Content-Length: 48000000"))
        peer = backend.connection()
        peer.head()
        peer.send(ok(b"no, thanks"))
        peer.close()
        for _ in range(480):
            client.send(bytes(100000))
        assert client.response().body == b"no, thanks"
        client.close()


@pytest.mark.parametrize("drips", [True, False])
def test_reading_on_after_a_refusal_has_an_end(tmp_path, constants, drips):
    """LINGERING_TIME while a client keeps sending, LINGERING_TIMEOUT once it is silent."""
    constants(LINGERING_TIME=(120 if drips else 100000) * MS)
    constants(LINGERING_TIMEOUT=(100000 if drips else 120) * MS)
    with gate_and_backend(tmp_path, None, "client_max_body_size = 1") as (gate, _):
        client = gate.connect().send(request(b"POST", b"/", b"Content-Length: 48000000"))
        assert client.response().status == 413
        with takes(90, 4000):
            if drips:
                with pytest.raises(OSError):
                    while True:
                        client.send(b"x")
                        client.silent(20 * MS)
            else:
                eventually(lambda: not gate.connections)
        client.close()


def test_a_silent_connection_gives_its_place_to_a_request(tmp_path):
    with running("[server]\nmax_connections = 1\nreturn = 200\n", tmp_path) as gate:
        silent = gate.connect()
        eventually(lambda: gate.connections.idle)
        assert gate.fetch(request()).status == 200
        assert silent.ended()
        silent.close()


def test_client_header_timeout(tmp_path):
    with gate_and_backend(tmp_path, None, *SHORT_TIMES) as (gate, backend):
        client = gate.connect()
        with takes(140, 700):
            send_slowly(client, request(b"GET", b"/" + b"a" * 100))
            response = client.response()
        assert (response.status, response.reason,
                response.get(b"connection")) == (408, "header_timeout", b"close")
        assert client.ended() and not backend.connections
        client.close()


def test_time_limits_of_heads(tmp_path):
    """Each head has its own; a silent connection is closed without a response."""
    with gate_and_backend(tmp_path, respond(ok()), *SHORT_TIMES) as (gate, _):
        client = gate.connect()
        assert client.silent(60 * MS) and client.send(request()).response().status == 200
        assert client.silent(70 * MS)
        send_slowly(client, b"GET /")
        assert client.send(request()[5:]).response().status == 200
        with takes(140, 700):
            assert client.rest() == b""
        assert client.send(b"G").ended()
        client.close()
        client = gate.connect()
        with takes(140, 700):
            assert client.rest() == b""
        client.close()


def test_empty_line_after_a_body(tmp_path):
    lines = ["client_header_timeout = " + ini_ms(50), "keepalive_timeout = " + ini_ms(200)]
    with gate_and_backend(tmp_path, respond(ok()), *lines) as (gate, _):
        client = gate.connect()
        for behind in (b"\r\n", b"\r", b""):
            assert client.send(request(b"POST", body=b"hello"), behind).response().status == 200
            assert client.silent(70 * MS)
            client.send(b"\n" if behind == b"\r" else b"")
        with takes(120, 900):  # of keepalive_timeout
            assert client.rest() == b""
        client.close()


def test_keepalive_timeout_0(tmp_path):
    lines = "keepalive_timeout = 0", "[location /own]", "return = 200 own", "[location /]"
    with gate_and_backend(tmp_path, respond(ok()), *lines) as (gate, _):
        for target in (b"/", b"/own"):
            client = gate.connect().send(request(b"GET", target))
            assert client.response().get(b"connection") == b"close" and client.ended()
            client.close()


# ----------------------------------------------------------------- One exchange


def kept_alive(peer):
    """A script: 200 to every request on the connection, whose number of requests is the body."""
    count = 0
    while True:
        read_request(peer)
        count += 1
        peer.send(ok(b"%d" % count))


def show_head(peer):
    """A script: 200 with the head of the request as its body, to every request."""
    while True:
        peer.send(ok(read_request(peer)[0]))


# What one location has and another has not must not pass to the next request with equal fields.
REPEATING = """\
[server]
set_real_ip_from = 127.0.0.1
proxy_keepalive = 60s
proxy_set_header = X-User: $remote_user
[location /]
proxy_pass = http://%s
[location /prefix/]
proxy_pass = http://%s/
[location /set/]
proxy_pass = http://%s
proxy_set_header = X-Path: $request_uri
    Cookie:
underscores_in_headers = on
[location /user/]
proxy_pass = http://%s
proxy_set_header = X-User: $remote_user
auth_basic_user_file = %s
[location /identity/]
proxy_pass = http://%s
auth_request = http://%s/auth
auth_request_headers = X-Team
"""
PASSWORD = b"Authorization: Basic " + base64.b64encode(b"anna:secret")


@pytest.mark.parametrize("fields", [
    (PASSWORD,), (b"Cookie: a=1", b"X_A: 1", PASSWORD), (b"X-Forwarded-For: 192.0.2.1", PASSWORD),
    (b"Connection: x-a", b"X-A: 1", b"X-Team: b", PASSWORD), (b"X-Long: " + b"x" * 3000, PASSWORD)],
    ids=["few", "cookie", "forwarded", "listed", "long"])
def test_a_connection_repeats_its_fields(tmp_path, fields):
    """The backend receives what it would if each request came on a connection of its own."""
    (tmp_path / "users").write_text(sha1_line("anna", b"secret"))
    targets = b"/", b"/set/a?b", b"/user/", b"/prefix/a", b"/identity/", b"//x/identity/"
    requests = [request(method, target, *fields, **more)
                for method, more in ((b"GET", {}), (b"POST", {"body": b"x"}))
                for pair in itertools.product(targets, repeat=2) for target in pair]
    requests += [raw.replace(b"HTTP/1.1", b"HTTP/1.0") for raw in requests[1:9:2]]
    with ScriptedBackend(show_head) as backend, ScriptedBackend(
            respond(ok(b"", b"X-Team: a"))) as service:
        ini = REPEATING % ((backend.where,) * 4 + (tmp_path / "users", backend.where,
                                                   service.where))
        with running(ini, tmp_path) as gate:
            client, seen = gate.connect(), []
            for raw in requests:
                seen.append(client.send(raw).response(raw.split()[0]).body)
                if b"HTTP/1.0" in raw:
                    client.close()
                    client = gate.connect()
            client.close()
            alone = {raw: gate.fetch(raw, raw.split()[0]).body for raw in set(requests)}
            assert seen == [alone[raw] for raw in requests]


def test_a_connection_repeats_its_head_after_a_reload(tmp_path):
    """The user and the team that the old configuration has found are not those of the new one."""
    (tmp_path / "users").write_text(sha1_line("anna", b"secret"))
    with ScriptedBackend(show_head) as backend, ScriptedBackend(
            respond(ok(b"", b"X-Team: a"))) as service:
        new = ini_for(backend, "proxy_set_header = X-User: $remote_user")
        old = new + "auth_basic_user_file = %s\nauth_request = http://%s/\n" % (
            tmp_path / "users", service.where) + "auth_request_headers = X-Team\n"
        with running(old, tmp_path) as gate:
            client = gate.connect()
            head = client.send(request(b"GET", b"/", PASSWORD)).response().body
            assert b"X-User: anna\r\n" in head and b"X-Team: a\r\n" in head
            reload(gate, new)
            head = client.send(request(b"GET", b"/", PASSWORD)).response().body
            assert b"X-User" not in head and b"X-Team" not in head
            client.close()


def test_a_repeated_head_is_held_to_the_limit_of_a_new_configuration(tmp_path):
    raw = request(b"GET", b"/", b"X-Long: " + b"x" * 1500)
    with gate_and_backend(tmp_path, show_head) as (gate, backend), contextlib.closing(
            gate.connect()) as client:
        assert client.send(raw).response().status == 200
        reload(gate, ini_for(backend, "client_header_size = 1k"))
        assert client.send(raw).response().status == 431


# What a head becomes for a client depends on the location and on the request.
REPEATED = """\
[server]
set_real_ip_from = 127.0.0.1
underscores_in_headers = on
[location /]
proxy_pass = http://%s
[location /prefix/]
proxy_pass = http://%s/app/
[location /strip/]
proxy_pass = http://%s/
[location /off/]
proxy_pass = http://%s
proxy_redirect = off
[location /set/]
proxy_pass = http://%s
add_header =
    X-Path: $request_uri
    Set-Cookie: a=$http_x_name
    Location:
[location /hide/]
proxy_pass = http://%s
add_header = Server: hidden
"""


@pytest.mark.parametrize("kept", ["proxy_keepalive = 60s", "proxy_keepalive = 0s"])
@pytest.mark.parametrize("head", [
    b"200 OK\r\nContent-Length: 0\r\nServer: x\r\nDate: Fri, 27 Nov 2026 00:00:00 GMT",
    b"302 Found\r\nContent-Length: 2\r\nLocation: http://%s/app/a\r\nServer: x\r\nX-A: 1"
    b"\r\nContent-Location: /outer/strip/",
    b"200 OK\r\nTransfer-Encoding: chunked\r\nContent-Location: /app/b\r\nConnection: x-a"
    b"\r\nX-A: 1",
    b"304 Not Modified\r\nETag: 1\r\nX-Long: " + b"x" * 3000, b"426 Other\r\nUpgrade: a",
    b"204 No Content\r\nConnection: close\r\nSet-Cookie: a=1"],
    ids=["length", "redirect", "chunked", "long", "until close", "close"])
def test_a_backend_repeats_its_head(tmp_path, head, kept):
    """A client gets what it would if each response came on a connection of its own."""
    def script(peer):
        try:
            while True:
                method = read_request(peer)[0].split()[0]
                raw = head.replace(b"%s", backend.where.encode())
                body = b"2\r\nab\r\n0\r\n\r\n" if b"chunked" in head else b"ab" * (b": 2" in head)
                peer.send(b"HTTP/1.1 " + raw + b"\r\n\r\n" + body * (method != b"HEAD"))
                if b"close" in head or b"426" in head:
                    peer.close()
        except OSError:
            pass

    targets = b"/", b"/prefix/a", b"/strip/", b"/off/a", b"/set/a?b", b"/set/c", b"/hide/"
    fields = (), (b"X-Name: n",), (b"X-Forwarded-Prefix: /outer",)
    requests = [request(method, target, *lines) for target in targets
                for method in (b"GET", b"HEAD") for lines in fields]
    requests += [request(b"GET", target, *lines) for lines in fields for target in targets]
    requests += [raw.replace(b"HTTP/1.1", version) for raw in requests[::5]
                 for version in (b"HTTP/1.1", b"HTTP/1.0")]
    with ScriptedBackend(script) as backend:
        ini = REPEATED.replace("[server]", "[server]\n" + kept) % ((backend.where,) * 6)
        with running(ini, tmp_path) as gate:
            client, seen = gate.connect(), []
            for raw in requests:
                answer = client.send(raw).response(raw.split()[0])
                seen.append((answer.head, answer.body))
                if b"HTTP/1.0" in raw or b"426" in head:
                    client.close()
                    client = gate.connect()
            client.close()
            alone = {raw: gate.fetch(raw, raw.split()[0]) for raw in set(requests)}
            for raw, before in zip(requests, seen):
                assert (alone[raw].head, alone[raw].body) == before, raw


def memory_of_idle_connections(gate, raw):
    """Return how much more memory a connection keeps after this request than after a short one."""
    used = []
    tracemalloc.start()
    try:
        for each in (request(), raw):
            clients = [gate.connect().send(each) for _ in range(10)]
            assert [client.response().status for client in clients] == [200] * 10
            eventually(lambda: len(gate.connections.idle) == 10)
            gc.collect()  # free-threaded Python frees some objects only then
            used.append(tracemalloc.get_traced_memory()[0])
            for client in clients:
                client.close()
            eventually(lambda: not gate.connections)
    finally:
        tracemalloc.stop()
    return (used[1] - used[0]) / 10


@pytest.mark.parametrize("fields", [
    b"".join(b"%c%c:\r\n" % pair for pair in itertools.product(range(97, 123), range(97, 111))),
    b"Connection: " + b"ab," * 660 + b"\r\n", b"X: " + b"x" * 14000 + b"\r\n", b""],
    ids=["fields", "elements", "large", "target"])
def test_memory_of_idle_connections(tmp_path, fields):
    """Parsed, each field line of five bytes takes 400."""
    target = b"/" if fields else b"/%41" + b"x;y" * 4000
    raw = b"GET %s HTTP/1.1\r\nHost: gate.test\r\n%s\r\n" % (target, fields)
    with running("[server]\n[location /]\nreturn = 200\n", tmp_path) as gate:
        used = memory_of_idle_connections(gate, raw)
        assert used < (24000 if FREE_THREADED else 16000)


@pytest.mark.parametrize("lines, line", [
    ("add_header = X-Echo: $http_x_long", b"X-Long: " + b"x" * 14000),
    ("set_real_ip_from = 127.0.0.1", b"X-Forwarded-Prefix: /" + b"x" * 14000),
    ("auth_request = http://AUTH\nauth_request_headers = X-User", b"Cookie: X-User"),
    ("auth_request = http://AUTH", b"Cookie: Set-Cookie")],
    ids=["add_header", "prefix", "identity", "cookie"])
def test_memory_of_idle_connections_after_short_heads(tmp_path, lines, line):
    """What was made of a head, or for it, is not kept either where it is long."""
    def auth(peer):
        names = field(peer.head(), b"cookie")
        peer.send(ok(b"", *[name + b": " + b"u" * 14000 for name in names]))

    with ScriptedBackend(auth) as service, gate_and_backend(
            tmp_path, echo_service, lines.replace("AUTH", service.where)) as (gate, _):
        used = memory_of_idle_connections(gate, request(b"GET", b"/", line))
        assert used < (12000 if FREE_THREADED else 8000)


KEPT = "proxy_keepalive = 60s"


def test_a_repeated_head_that_arrives_in_two_parts(tmp_path):
    head, rest = ok(b"", b"X-Long: " + b"x" * 200), threading.Event()

    def script(peer):
        read_request(peer)
        peer.send(head)
        read_request(peer)
        peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n", head[:150])
        assert rest.wait(5000 * MS)
        peer.send(head[150:])
        read_request(peer)
        peer.send(b"HTTP/1.1 204 No Content\r\n\r\n")  # shorter than the first part

    with gate_and_backend(tmp_path, script, KEPT) as (gate, _):
        client = gate.connect().send(request())
        assert client.response().status == 200
        assert client.send(request()).head().startswith(b"HTTP/1.1 103 ")  # so the part is read
        rest.set()
        assert client.response().status == 200
        assert client.send(request()).response().status == 204
        client.close()


def test_backend_connections_are_not_kept_by_default(tmp_path):
    with gate_and_backend(tmp_path, None) as (gate, backend):
        client = gate.connect()
        for number in range(2):
            client.send(request())
            peer = backend.connection(number)
            assert field(peer.head(), b"connection") == [b"close"]
            peer.send(ok())
            assert client.response().status == 200 and peer.ended()
        client.close()


def test_proxy_keepalive(tmp_path):
    """Not those of another client, nor the last one of a connection or what HTTP/1.0 asks for."""
    with gate_and_backend(tmp_path, kept_alive, KEPT) as (gate, backend):
        first, second = gate.connect(), gate.connect()
        for number in b"123":
            for client, method in ((first, b"GET"), (second, b"OPTIONS")):
                assert client.send(request(method)).response().body == b"%c" % number
        assert len(backend.connections) == 2
        assert first.send(request(b"GET", b"/", b"Connection: close")).response().body == b"1"
        first.close()
        second.close()
        eventually(lambda: all(peer.sock.fileno() < 0 for peer in backend.connections))
        assert not any(server.health.active for server in
                       location_of(gate.config).proxy.upstream.servers)


@pytest.mark.parametrize("raw", [
    request(b"POST", body=b"hello"), request(b"POST"), request(b"PUT", body=b""),
    request(b"GET", body=b"hello"), request(b"GET", b"/", b"Transfer-Encoding: chunked")
    + chunked_body(b"hello"), handshake()])
def test_requests_that_are_not_repeatable(tmp_path, raw):
    """They get a backend connection of their own."""
    with gate_and_backend(tmp_path, None, KEPT) as (gate, backend):
        client = gate.connect().send(request())
        kept = backend.connection()
        assert not field(kept.head(), b"connection")
        kept.send(ok())
        client.response()
        client.send(raw)
        other = backend.connection(1)
        head, _ = read_request(other)
        assert field(head, b"connection") in ([b"close"], [b"upgrade"], [b"Upgrade"])
        other.send(ok())
        client.response()
        assert other.ended()
        if field(head, b"connection") == [b"close"]:
            client.send(request())
            assert kept.head()
        client.reset()


@pytest.mark.parametrize("lines, raw, kept", [
    ("upgrade = none", handshake(), False),
    ("", handshake().replace(b"GET", b"POST"), False),
    ("", request(b"GET", b"/", b"Connection: upgrade", b"Upgrade: raw/1"), False),
    ("strict_handshake = off", custom_handshake(upgrade=b""), False),
    ("", request(b"GET", b"/", b"Connection: upgrade", b"Upgrade: h2c"), True)])
def test_no_request_after_an_upgrade_that_is_not_passed_on(tmp_path, lines, raw, kept):
    """What follows may be frames of a client that did not wait; not so after h2c."""
    with gate_and_backend(tmp_path, respond(ok()), lines) as (gate, backend):
        client = gate.connect().send(raw)
        assert client.response().status == 200
        with contextlib.suppress(ConnectionError):  # it may be closed already
            client.send(request(b"GET", b"/", b"Connection: close"))
        assert client.rest().count(b"HTTP/1.1 200") == kept
        assert len(backend.connections) == 1 + kept
        client.close()


@pytest.mark.parametrize("response", [
    (ok(b"first"), ok(b"late")), (ok(b"first") + ok(b"late"),),
    (OK + b"Content-Length: 5\r\n" + CHUNKED + chunked_body(b"first"),)])
def test_no_request_over_a_connection_that_is_out_of_step(tmp_path, response):
    """Bytes after a response, or two lengths: what comes next may be no response to a request."""
    with gate_and_backend(tmp_path, None, KEPT) as (gate, backend):
        client = gate.connect().send(request())
        first = backend.connection()
        first.head()
        first.send(response[0])
        assert client.response().body == b"first"
        first.send(*response[1:])
        client.send(request())
        second = backend.connection(1)
        second.head()
        second.send(ok(b"second"))
        assert client.response().body == b"second"
        client.close()


def test_no_request_after_a_head_that_was_not_sent_whole(tmp_path):
    """The backend has responded without it; the next request would be in the middle of it."""
    with gate_and_backend(tmp_path, None, KEPT, "client_header_size = 8m") as (gate, backend):
        backend.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client = gate.connect().send(request(b"GET", b"/", b"A: " + b"x" * 6000000))
        first = backend.connection()
        first.read_until(b"x" * 100)
        first.send(ok(b"first"))
        assert client.response().body == b"first"
        client.send(request())
        second = backend.connection(1)
        second.head()
        second.send(ok(b"second"))
        assert client.response().body == b"second"
        client.close()


def test_kept_connection_and_tls(tmp_path):
    """One without TLS is not for a location with https to the same server."""
    ini = ("[server]\n%s\n[location /]\nproxy_pass = http://pool\n[location /tls/]\n"
           "proxy_pass = https://pool\n[upstream pool]\nserver = %s\n")
    with ScriptedBackend() as backend:
        with running(ini % (KEPT, backend.where), tmp_path) as gate:
            client = gate.connect().send(request())
            backend.connection().send(ok())
            client.response()
            client.send(request(b"GET", b"/tls/"))
            assert backend.connection(1).read(1) == b"\x16"
            backend.connection(1).close()
            assert client.response().status == 502
            client.close()


@pytest.mark.parametrize("method, line, kept", [
    (b"HEAD", b"200 OK\r\nContent-Length: 5", 0), (b"HEAD", b"200 OK\r\nContent-Length: 0", 1),
    (b"HEAD", b"200 OK\r\nTransfer-Encoding: chunked", 0), (b"HEAD", b"200 OK", 1),
    (b"GET", b"204 No Content\r\nContent-Length: 5", 0), (b"GET", b"204 No Content", 1),
    (b"GET", b"304 Not Modified\r\nContent-Length: 5", 0), (b"GET", b"304 Not Modified", 1)])
def test_no_request_after_a_body_that_cannot_be_there(tmp_path, method, line, kept):
    """Servers that send it all the same would have it taken for the next response."""
    with gate_and_backend(tmp_path, None, KEPT) as (gate, backend):
        client = gate.connect().send(request(method))
        first = backend.connection()
        first.head()
        first.send(b"HTTP/1.1 ", line, b"\r\n\r\n")
        client.response(method)
        client.send(request())
        second = first if kept else backend.connection(1)
        second.head()
        second.send(ok(b"second"))
        assert client.response().body == b"second"
        client.close()


@pytest.mark.parametrize("how", ["between", "at the request", "reset"])
def test_kept_connection_closed_by_the_backend(tmp_path, how):
    """The client notices nothing, and the server has not failed."""
    with gate_and_backend(tmp_path, None, KEPT) as (gate, backend):
        client = gate.connect().send(request())
        kept = backend.connection()
        kept.head()
        kept.send(ok())
        client.response()
        if how == "between":
            kept.close()
        client.send(request(b"GET", b"/again"))
        if how == "at the request":
            kept.head()
            kept.close()
        elif how == "reset":
            kept.head()
            kept.reset()
        other = backend.connection(1)
        assert other.head().startswith(b"GET /again ")
        other.send(ok(b"new"))
        assert client.response().body == b"new"
        assert not any("failed" in line for line in gate.errors)
        assert not any("failed=" in line for line in gate.access)
        client.close()


@pytest.mark.parametrize("response, status", [
    (ok(b"ok", b"Connection: close"), 200),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200), (ok() + b"more", 200),
    (ok() + ok(), 200), (OK + b"\r\nuntil close", 200), (OK + b"Content-Length: 9\r\n\r\ncut", 200),
    (b"nonsense\r\n\r\n", 502), (switching(), 502)])
def test_a_backend_connection_is_not_kept_after(tmp_path, response, status):
    """Close, HTTP/1.0, more bytes than the response has, a response that is cut or none."""
    with gate_and_backend(tmp_path, None, KEPT) as (gate, backend):
        client = gate.connect().send(request())
        peer = backend.connection()
        peer.head()
        peer.send(response)
        if b"cut" in response or b"until" in response:
            peer.finish()
        assert client.read_until(b"\r\n\r\n").split(b" ")[1] == b"%d" % status
        if status == 200 and b"cut" not in response and b"until" not in response:
            client.read(2)
            client.send(request())
            assert backend.connection(1).head()
        assert peer.ended()
        client.reset()


def test_a_tls_connection_to_a_backend_is_kept_too(tmp_path, tls):
    """For requests with the same proxy_ssl_name only."""
    with ScriptedBackend(kept_alive, tls=tls_backend(tls)) as backend:
        ini = ("[server]\nproxy_pass = https://%s\nproxy_ssl_trusted_certificate = %s\n"
               "proxy_ssl_name = back.test\n%s\n[location /other/]\nproxy_ssl_name = 127.0.0.1\n"
               % (backend.where, tls.ca, KEPT))
        with running(ini, tmp_path) as gate:
            client = gate.connect()
            for number in b"123":
                assert client.send(request()).response().body == b"%c" % number
            assert client.send(request(b"GET", b"/other/")).response().body == b"1"
            client.close()


def test_kept_connection_with_a_proxy_header(tmp_path):
    """A trusted proxy sends requests of several clients over one connection."""
    def script(peer):
        peer.read_until(b"\r\n")
        kept_alive(peer)

    with gate_and_backend(tmp_path, script, KEPT, "proxy_protocol = on",
                          "set_real_ip_from = 127.0.0.1") as (gate, _):
        client = gate.connect()
        for last, body in ((7, b"1"), (7, b"2"), (8, b"1"), (8, b"2"), (7, b"1")):
            client.send(request(b"GET", b"/", b"X-Forwarded-For: 192.0.2.%d" % last))
            assert client.response().body == body
        client.close()


def test_a_tunnel_keeps_no_other_connection(tmp_path):
    """Nor does a connection that is being closed."""
    with gate_and_backend(tmp_path, None, KEPT) as (gate, backend):
        for number, last in ((0, handshake()), (2, request(b"GET", b"/", b"Connection: close"))):
            client = gate.connect().send(request())
            kept = backend.connection(number)
            kept.head()
            kept.send(ok())
            client.response()
            client.send(last)
            peer = backend.connection(number + 1)
            peer.head()
            peer.send(switching() if number == 0 else ok())
            assert client.head() and kept.ended()
            client.reset()


def test_kept_connections_expire(tmp_path):
    with gate_and_backend(tmp_path, None, "proxy_keepalive = " + ini_ms(120)) as (gate, backend):
        client = gate.connect().send(request())
        peer = backend.connection()
        peer.head()
        peer.send(ok())
        client.response()
        with takes(100, 2000):
            assert peer.ended()
        assert gate.connections
        client.close()


REDIRECTING = """[server]
listen = 127.0.0.1:0 redirect, localhost:0 ssl
ssl_certificate = %s
[location gate.test/]
return = 200 secure
[location other.test/.well-known/acme-challenge/]
return = 200 token
"""


@pytest.mark.parametrize("raw, status, location", [
    (request(), 301, b"https://gate.test:%d/"),
    (request(b"HEAD", b"/a//b?c=%0d%0a&d"), 301, b"https://gate.test:%d/a//b?c=%%0d%%0a&d"),
    (request(b"POST", b"/a", body=b"hello"), 308, b"https://gate.test:%d/a"),
    (request(b"GET", b"/", b"Host: GATE.test.:8080"), 301, b"https://gate.test:%d/"),
    (request(b"GET", b"http://gate.test?x"), 301, b"https://gate.test:%d/?x"),
    (request(b"GET", b"//evil.test/x"), 301, b"https://gate.test:%d//evil.test/x"),
    (request(b"OPTIONS", b"*"), 308, b"https://gate.test:%d/"),
    (handshake(b"/chat"), 301, b"https://gate.test:%d/chat"),
    (request(b"GET", b"/", b"Host: other.test"), 301, b"https://other.test:%d/"),
    (request(b"GET", b"/", b"Host: evil.test"), 404, None),
    (request(b"GET", b"/", b"Host: evil.test@gate.test"), 400, None),
    (request(b"GET", b"/", b"Host: gate.test/evil.test"), 400, None),
    (request(b"GET", b"/", b"Host: gate.test\\evil.test"), 400, None),
    (request(b"GET", b"/", b"Host: gate.test", b"Host: evil.test"), 400, None),
    (request(b"GET", b"/a\0b"), 400, None), (request(b"GET", b"/\\evil.test"), 400, None),
    (b"GET / HTTP/1.0\r\n\r\n", 404, None),
])
def test_a_redirect_listener_sends_every_request_to_https(tmp_path, tls, raw, status, location):
    """Only to a name that a location is for; the bytes of the request cannot change the host."""
    with running(REDIRECTING % tls.server, tmp_path) as gate:
        response = gate.fetch(raw, raw.split(b" ")[0])
        assert response.status == status
        port = gate.listeners[1].server_address[1]
        assert response.get(b"location") == (location and location % port)


def test_a_redirect_leads_to_the_first_ssl_listener_of_the_file(tmp_path, tls):
    """Also if a reload has put another one in front of it."""
    with running(REDIRECTING % tls.server, tmp_path) as gate:
        reload(gate, REDIRECTING.replace(" localhost", " 127.0.0.2:0 ssl, localhost") % tls.server)
        port = next(listener.server_address[1] for listener in gate.listeners
                    if listener.listen.address.host == "127.0.0.2")
        assert gate.fetch(request()).get(b"location") == b"https://gate.test:%d/" % port


def test_redirect_without_host(tmp_path, tls):
    ini = REDIRECTING.replace("gate.test", "") % tls.server
    with running(ini, tmp_path) as gate:
        assert gate.fetch(b"GET / HTTP/1.0\r\n\r\n").status == 400


def test_a_redirect_listener_serves_challenges_of_acme(tmp_path, tls):
    """For certbot as a backend (RFC 8555 8.3)."""
    with running(REDIRECTING % tls.server, tmp_path) as gate:
        path = b"/.well-known/acme-challenge/x"
        assert gate.fetch(request(b"GET", path, b"Host: other.test")).body == b"token"
        assert gate.fetch(request(b"GET", path)).status == 301


def test_redirect_listener_limits(tmp_path, tls):
    ini = REDIRECTING.replace(" redirect", " redirect proxy_protocol") % tls.server
    ini = ini.replace("[server]", "[server]\nset_real_ip_from = 127.0.0.1\nmax_connections = 1\n"
                      "real_ip_header = proxy_protocol", 1)
    header = b"PROXY TCP4 192.0.2.7 127.0.0.1 1 2\r\n"
    with running(ini, tmp_path) as gate, contextlib.closing(gate.connect()) as inside:
        eventually(lambda: gate.connections)
        assert gate.fetch(header + request()).status == 503
        assert gate.line("192.0.2.7", "reason=conn_limit")
        assert inside.send(header + request()).response().status == 301


def test_forwarding_fields_after_a_proxy_header(tmp_path):
    """A balancer that passes bytes through adds none, so none is trusted."""
    with ScriptedBackend() as backend:
        ini = (PROXY_INI % ("", "127.0.0.1, 192.0.2.0/24")).replace(
            "return = 200 $remote_addr", "proxy_pass = http://" + backend.where)
        with running(ini, tmp_path) as gate:
            client = gate.connect().send(b"PROXY TCP4 192.0.2.7 127.0.0.1 1 2\r\n" + request(
                b"GET", b"/", b"X-Forwarded-For: 10.1.1.1", b"X-Forwarded-User: root",
                b"X-Forwarded-Proto: https", b"X-Forwarded-Host: a.test",
                b"Forwarded: for=10.1.1.1"))
            head = backend.connection().head()
            assert field(head, b"x-forwarded-for") == [b"192.0.2.7"]
            assert field(head, b"x-forwarded-proto") == [b"http"]
            assert field(head, b"x-forwarded-host") == [b"gate.test"]
            assert not field(head, b"x-forwarded-user") + field(head, b"forwarded")
            client.reset()


@pytest.mark.parametrize("line, raw, status, reason, detail, kept", [
    ("", request(b"GET", b"/other/"), b"404 Not Found", "no_route",
     b"no [location] for host gate.test and path /other/\n", True),
    ("", request(b"HEAD", b"/other/"), b"404 Not Found", "no_route", b"", True),
    ("", request(b"POST", b"/other/", body=b"x"), b"404 ", "no_route",
     b"no [location] for host gate.test and path /other/\n", False),
    ("deny = all", request(b"GET", b"/app/"), b"403 ", "access_denied",
     b"access denied by allow/deny\n", True),
    ("client_max_body_size = 1", request(b"POST", b"/app/", body=b"xy"), b"413 ", "body_too_large",
     b"client_max_body_size is 1\n", False),
    ("", request(b"GET", b"/app/"), b"502 Bad Gateway", "backend_refused", b"", True)])
def test_responses_of_the_gate(tmp_path, line, raw, status, reason, detail, kept):
    """The reason is in the body, in X-Wsgate-Reason and in the log."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        ini = "[server]\n%s\n[location /app]\nproxy_pass = http://127.0.0.1:%d" % (
            line, closed.getsockname()[1])
        with running(ini, tmp_path) as gate:
            client = gate.connect().send(raw)
            response = client.response(raw.partition(b" ")[0])
            assert response.head.startswith(b"HTTP/1.1 " + status) and response.reason == reason
            assert raw.startswith(
                b"HEAD") or re.fullmatch(b"%d [A-Za-z ]+: %s\n" % (response.status, reason.encode())
                                                           + re.escape(detail), response.body)
            assert response.get(b"content-type") == b"text/plain; charset=utf-8"
            assert response.get(b"date")
            assert response.get(b"connection") == (None if kept else b"close")
            assert client.silent(10 * MS) == kept
            client.close()
            assert gate.line(" %d " % response.status, "reason=" + reason)


# ---------------------------------------------------------------------- Streams


@pytest.mark.parametrize("tail", [b"", b"\r\n", b"GET /next HTTP/1.1\r\n", b"\x81\x85 a frame\n\n"])
def test_a_head_ends_at_its_empty_line(tail):
    assert head_verdicts(request() + tail) == {(request(), tail)}


def test_empty_line_before_a_request():
    """One is ignored (RFC 9112 2.2); an incomplete head is waited for."""
    assert head_verdicts(b"\r\n" + request()) == {(request(), b"")}
    assert head_verdicts(request()[:-1]) == {(None, request()[:-1])}


def test_read_head_waits():
    here, there = socket.socketpair()
    with here, there:
        stream = wsgate.Stream(here)
        there.sendall(b"GET / HT")
        with pytest.raises(wsgate.TimedOut):
            wsgate.read_head(stream, 1024, wsgate.Deadline(30 * MS))
        there.sendall(b"TP/1.1\r\n\r\ntail")
        assert wsgate.read_head(stream, 1024,
                                wsgate.Deadline(5000 * MS)) == b"GET / HTTP/1.1\r\n\r\n"
        there.close()
        with pytest.raises(EOFError):
            wsgate.read_head(stream, 1024, wsgate.Deadline(5000 * MS))
        assert stream.buffer == b"tail"


@pytest.mark.parametrize("line", [b"PROXY TCP6 fe80::1%a\nX-Evil:1 ::1 1 2\r\n",
                                  b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n"])
def test_a_proxy_header_with_a_scope_in_its_address_is_refused(tmp_path, line):
    lines = ("listen = 127.0.0.1:0 proxy_protocol", "set_real_ip_from = 127.0.0.1",
             "real_ip_header = proxy_protocol")
    with gate_and_backend(tmp_path, respond(ok()), *lines) as (gate, backend):
        client = gate.connect().send(line, request())
        assert client.rest() == b""
        assert not backend.connections


def greedy_kinds():
    """Yield what keeps a thread busy without a wait: (name, [server] lines, bytes, turns)."""
    one = request(b"GET", b"/")
    return [
        ("pipelined", "return = 200 ok", one * 300, 300),
        ("flood of pings", "", frame(9, b"", b"abcd") * 30000, 100),
        ("tiny frames", "", b"".join(frame(1, b"x" * (size % 7), b"abcd") for size in range(30000)),
         100),
    ]


def test_a_thread_that_gave_way_reads_the_response_without_a_poll(tmp_path, monkeypatch):
    relays, waits, begin = [], [], wsgate.HTTPRelay.begin

    def took(turns, now, work):
        """Give way until the response is there."""
        if relays and relays[-1].down.scanner is relays[-1].collector:
            assert select_readable(relays[-1].backend.sock, 5000 * MS)
        return True

    monkeypatch.setattr(wsgate.HTTPRelay, "begin",
                        lambda relay, *args: (begin(relay, *args), relays.append(relay)))
    monkeypatch.setattr(wsgate.HTTPRelay, "wait", lambda relay, seconds: waits.append(1) or [])
    monkeypatch.setattr(wsgate.Turns, "took", took)
    with gate_and_backend(tmp_path, show_head) as (gate, _), contextlib.closing(
            gate.connect()) as client:
        for _ in range(3):
            assert client.send(request()).response().status == 200
    assert len(relays) == 3 and not waits


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_thread_that_gave_way_reads_the_answer_without_a_poll(tmp_path, monkeypatch, tls, secure):
    polls = []

    class CountingPoll(wsgate.SelectPoll):
        def poll(self, milliseconds=None):
            polls.append(1)
            return super().poll(milliseconds)

    def took(turns, now, work):
        """Give way until one side has sent something."""
        for tunnel in gate.connections.tunnels():
            select.select([tunnel.up.source, tunnel.down.source], [], [], 5000 * MS)
        return True

    monkeypatch.setattr(wsgate, "Poll", CountingPoll)
    monkeypatch.setattr(wsgate.Turns, "PERIOD", 1)
    monkeypatch.setattr(wsgate.Turns, "took", took)
    with ScriptedBackend() as backend:
        ini = ini_for(backend)
        if secure:
            ini = tls_ini(tls, "proxy_pass = http://" + backend.where)
        with running(ini, tmp_path) as gate:
            client = (tls_connect(gate, tls) if secure else gate.connect()).send(handshake())
            peer = backend.connection(0)
            peer.head()
            peer.send(switching())
            assert client.response().status == 101
            del polls[:]
            for _ in range(20):
                client.send(frame(1, b"question", b"abcd"))
                assert peer.read(14)
                peer.send(frame(1, b"answer"))
                assert client.read(8)
            assert len(polls) < 10
            client.close()
            peer.close()


@pytest.mark.parametrize("kind, line, data, turns", greedy_kinds(),
                         ids=[row[0] for row in greedy_kinds()])
def test_a_thread_that_never_waits_gives_way(tmp_path, monkeypatch, kind, line, data, turns):
    """Counted, not timed: now and then, even while no other thread is busy."""
    given = []
    monkeypatch.setattr(wsgate, "give_way", lambda: given.append(1))
    lines = [line] if line else []
    with ScriptedBackend() as backend:
        ini = "[server]\n%s\n" % line if line else ini_for(backend)
        with running(ini, tmp_path) as gate:
            if line:
                client = gate.connect()
                thread = send_in_thread(client, [data])
                for _ in range(turns):
                    assert client.response().status == 200
            else:
                client, server = gate.tunnel(backend)
                thread = send_in_thread(client, [data])
                assert server.read(len(data)) == data
                server.close()
            thread.join()
            client.close()
    assert len(given) >= turns // (4 if lines else 16)


def test_tiny_chunks_give_way(tmp_path, monkeypatch):
    """What takes long to scan is read in smaller pieces, so that each turn stays short."""
    given, sizes = [], []
    monkeypatch.setattr(wsgate, "give_way", lambda: given.append(1))
    feed = wsgate.ChunkedBody.feed
    monkeypatch.setattr(wsgate.ChunkedBody, "feed", lambda body, data, now: (
        sizes.append(len(data)) or feed(body, data, now)))
    data = chunked_body(*[b"x"] * 30000)
    head = request(b"POST", b"/", b"Transfer-Encoding: chunked")
    with http_exchange(tmp_path, head) as (_, client, peer, _):
        thread = send_in_thread(client, [data])
        assert peer.read(len(data)) == data
        thread.join()
        peer.send(ok())
        assert client.response().status == 200
    assert len(given) > 5 and max(sizes) <= wsgate.SMALL_READ


@pytest.fixture
def gave_way(monkeypatch):
    """Return a function that lets a thread's Turns take one, and returns whether it gave way."""
    given = []
    monkeypatch.setattr(wsgate, "give_way", lambda: given.append(1))
    monkeypatch.setattr(wsgate.Turns, "crowd", wsgate.Crowd())

    def took(turns, work=1, now=100.0):
        before = len(given)
        turns.took(now, work)
        return len(given) > before
    return took


def test_equals_give_way_to_each_other(gave_way):
    """The luckier ones of many chats would be served again and again."""
    period, chats = wsgate.Turns.PERIOD, [wsgate.Turns() for _ in range(20)]
    rounds = [[gave_way(chat) for chat in chats] for _ in range(4 * period)]
    assert not any(sum(rounds[:period - 1], [])) and all(sum(rounds[2 * period:], []))
    assert [gave_way(chats[0]) for _ in range(20)] == [True] * 20


def test_a_greedy_thread_gives_way_and_a_chat_beside_it_does_not(gave_way):
    """A chat that gave way too would wait for all of the greedy ones."""
    greedy, chats = wsgate.Turns(), [wsgate.Turns() for _ in range(20)]
    for chat in chats * wsgate.Turns.PERIOD:
        gave_way(chat)  # they share the work equally
    for number in range(2 * wsgate.Turns.PERIOD):
        for chat in chats:
            assert all([gave_way(greedy, wsgate.Turns.LARGE) for _ in range(20)][2:])
            assert not gave_way(chat) or number < wsgate.Turns.PERIOD


def test_a_thread_that_is_alone_gives_way_now_and_then(gave_way):
    """Nobody may be there to give way to, and each time costs a system call."""
    alone, other, period = wsgate.Turns(), wsgate.Turns(), wsgate.Turns.PERIOD
    assert sum(gave_way(alone) for _ in range(10 * period)) == 10
    for _ in range(period):
        gave_way(other)
    assert all([gave_way(alone) for _ in range(10 * period)][period:])
    later = 100.0 + 3 * wsgate.Crowd.WINDOW
    assert 9 <= sum(gave_way(alone, now=later) for _ in range(10 * period)) < 10 + period


def test_each_gives_way_where_many_do_little(gave_way):
    """What wakes them all at once is a broadcast."""
    crowd, tunnel = wsgate.Turns.crowd, wsgate.Turns()
    crowd.look(100.0, 5000)
    assert gave_way(tunnel)
    crowd.work += 1000
    crowd.look(100.5, 100)
    assert gave_way(tunnel)  # too early for another look
    crowd.look(101.0, 100)
    assert not gave_way(tunnel)


def test_chats_are_known_to_bulk(gave_way):
    """By a whole period of their turns; a turn of bulk is shorter then."""
    crowd, bulk, chat = wsgate.Turns.crowd, wsgate.Turns(), wsgate.Turns()
    for _ in range(3):
        gave_way(bulk, wsgate.Turns.BULK)
    gave_way(chat, wsgate.Turns.PERIOD - 1)
    assert crowd.brief_until < 100.0
    gave_way(chat)
    assert crowd.brief_until == 100.0 + wsgate.Crowd.WINDOW


def test_short_connections_are_no_crowd(gave_way):
    """One at a time, each of a turn: a chat beside them has its share, however many there were."""
    chat = wsgate.Turns()
    for _ in range(1000):
        for _ in range(10):
            short = wsgate.Turns()
            gave_way(short, wsgate.Turns.LARGE)
            short.end()
        assert not gave_way(chat)


@pytest.fixture
def one_processor():
    """Keep this thread, and what it starts, on one processor."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(processors)])
    yield
    os.sched_setaffinity(0, processors)


@pytest.mark.parametrize("path, data", [
    (b"/ok", request(b"GET", b"/ok") * 50),
    (b"/sink", frame(9, b"", b"abcd") * 10000),
    (b"/sink", b"".join(frame(1, b"x" * (size % 7), b"abcd") for size in range(10000))),
], ids=["pipelined", "flood of pings", "tiny frames"])
def test_no_chat_waits_for_many_turns_of_a_greedy_client(tmp_path, one_processor, path, data):
    """Twenty chats beside it, in a process: counted in the turns of the greedy one, not timed.

    On one processor, or those turns would go on while a busy machine keeps this process waiting.
    """
    turns, over = [0], []

    def echo_or_sink(peer):
        head = peer.head()
        peer.send(switching())
        while not head.startswith(b"GET /sink"):
            peer.sock.sendall(peer.sock.recv(100) or b"end")
        while peer.sock.recv(65536):
            turns[0] += 1

    def send():
        with contextlib.suppress(OSError):  # the test is over
            while not over:
                greedy.sock.sendall(data)

    def receive():
        with contextlib.suppress(OSError):
            while not over:
                turns[0] += greedy.sock.recv(65536).count(b"HTTP/1.1 200")

    with ScriptedBackend(echo_or_sink) as backend, program(
            tmp_path, "[location /]", "proxy_pass = http://" + backend.where,
            "[location = /ok]", "return = 200") as gate:
        chats = [connect(gate.port).send(handshake(b"/")) for _ in range(20)]
        greedy = connect(gate.port)
        if path == b"/sink":
            greedy.send(handshake(path))
        for peer in chats + [greedy] * (path == b"/sink"):
            assert peer.response().status == 101
        threads = [threading.Thread(target=each, daemon=True) for each in (send, receive)]
        for thread in threads[:1 if path == b"/sink" else 2]:
            thread.start()
        waited = []
        for chat in chats * 5:
            before = turns[0]
            chat.send(frame(1, b"hi", b"abcd"))
            chat.read(8)
            waited.append(turns[0] - before)
        over.append(True)
        for peer in chats + [greedy]:
            peer.close()
    assert turns[0] > 5 and sorted(waited)[95] <= 16, waited


@pytest.mark.skipif(ssl.OPENSSL_VERSION_INFO < (3,),
                    reason="older versions of OpenSSL have ciphers for TLS 1.0")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1.1"])
def test_versions_refused_by_openssl(tmp_path, tls, version):
    error, = errors_of(tmp_path,
                       "[server]\nreturn = 200\nlisten = 127.0.0.1:0 ssl\nssl_certificate = %s\n"
                                 "ssl_client_certificate = %s\nssl_protocols = %s TLSv1.2\n"
                       % (tls.server, tls.ca, version))
    assert error.startswith("wsgate.ini:6: [server] ssl_protocols: %s is refused by OpenSSL 3"
                            % version)
    assert error.endswith("(remove it, or set ssl_ciphers = DEFAULT@SECLEVEL=0)")


# -------------------------------------------------------------------------- TLS


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_clients_are_served_by_tls(tmp_path, tls, version):
    if version == "TLSv1.3" and not (getattr(ssl, "HAS_TLSv1_3", False)
                                     and hasattr(ssl, "TLSVersion")):
        pytest.skip("this Python has no TLS 1.3")
    with ScriptedBackend(echo_service) as backend:
        with running(tls_ini(tls, "proxy_pass = http://" + backend.where), tmp_path) as gate:
            peer = tls_connect(gate, tls, version=version)
            assert not hasattr(ssl, "TLSVersion") or peer.sock.version() == version
            for _ in range(2):
                assert peer.send(request()).response().status == 200
            assert peer.send(handshake()).response().status == 101
            assert tunnel_works(peer)
            peer.close()


def test_ssl_protocols(tmp_path, tls):
    if not getattr(ssl, "HAS_TLSv1_3", False) or not hasattr(ssl, "TLSVersion"):
        pytest.skip("this Python has no TLS 1.3")
    with running(tls_ini(tls, "ssl_protocols = TLSv1.3", "return = 200"), tmp_path) as gate:
        with pytest.raises(OSError):
            tls_connect(gate, tls, version="TLSv1.2")
        peer = tls_connect(gate, tls, version="TLSv1.3")
        assert peer.send(request()).response().status == 200
        peer.close()


def test_plain_http_on_a_tls_port(tmp_path, tls):
    """It gets a readable response, and a line in the log."""
    with running(tls_ini(tls, "return = 200"), tmp_path) as gate:
        response = gate.fetch(request())
        assert response.status == 400 and b"https://" in response.body
        assert response.body.startswith(b"400 Bad Request: http_on_tls_port\n")
        assert gate.line("400 done - - ", "reason=http_on_tls_port")


@pytest.mark.parametrize("asked", [False, True], ids=["before a request", "after one"])
def test_garbage_after_a_tls_handshake(tmp_path, tls, asked):
    with running(tls_ini(tls, "return = 200"), tmp_path) as gate:
        peer = tls_connect(gate, tls)
        if asked:
            assert peer.send(request()).response().status == 200
        os.write(peer.sock.fileno(), b"this is no TLS record " * 10)
        with contextlib.suppress(ssl.SSLError):  # the alert
            peer.sock.recv(1)
        eventually(lambda: not gate.connections)  # and running() looks for tracebacks
        peer.close()


def test_close_notify_of_kept_connections(tmp_path, tls):
    with running(tls_ini(tls, "return = 200", "keepalive_timeout = " + ini_ms(120)),
                 tmp_path) as gate:
        with contextlib.closing(tls_connect(gate, tls)) as peer:
            assert peer.send(request()).response().status == 200
            with takes(100, 1000):
                assert peer.sock.recv(1) == b""  # without a close_notify this raises


def test_stalled_tls_handshake(tmp_path, tls):
    """It is closed in time and delays no other client."""
    with running(tls_ini(tls, "return = 200", "client_header_timeout = " + ini_ms(200)),
                 tmp_path) as gate:
        begun = time.monotonic()
        stalled = [gate.connect(), gate.connect().send(b"\x16"),
                   gate.connect().send(b"\x16\x03\x01\x02\x00\x01")]
        peer = tls_connect(gate, tls)
        assert peer.send(request()).response().status == 200
        assert time.monotonic() - begun < 200 * MS
        peer.close()
        for each in stalled:
            assert each.ended(1000 * MS)
            assert 200 * MS - 0.02 <= time.monotonic() - begun < 800 * MS


def test_ssl_client_certificate(tmp_path, tls):
    """Its subject is passed on and cannot be forged."""
    heads = []

    def script(peer):
        heads.append(peer.head())
        peer.send(ok())

    forged = request(b"GET", b"/", b"X-SSL-Client-S-DN: CN=root", b"X_SSL_Client_S_DN: CN=root")
    with ScriptedBackend(script) as backend:
        proxy = "proxy_pass = http://" + backend.where
        with running(tls_ini(tls, "ssl_client_certificate = " + tls.ca, proxy), tmp_path) as gate:
            peer = tls_connect(gate, tls, certificate=tls.client)
            assert peer.send(forged).response().status == 200
            peer.close()
            with pytest.raises(OSError):  # TLS 1.3 tells the client after the handshake
                tls_connect(gate, tls).send(request()).response()
        with running(tls_ini(tls, proxy), tmp_path) as gate:
            assert tls_connect(gate, tls).send(forged).response().status == 200
    assert [field(head, b"x-ssl-client-s-dn")
            for head in heads] == [[b"CN=client,O=Test\\, Inc"], []]
    assert not any(b"root" in head for head in heads)


def test_sni(tmp_path, tls):
    ini = tls_ini(tls,
                  "return = 200")
    ini += "[location OTHER.test/]\nreturn = 200\nssl_certificate = %s\n" % tls.client
    with running(ini, tmp_path) as gate:
        for asked, shown in (("gate.test", "localhost"), ("other.test", "other.test"),
                             ("Other.Test", "other.test"), ("x.test", "localhost"),
                             (None, "localhost")):
            assert certificate_shown(gate, tls, asked) == shown


def test_changed_certificates(tmp_path, tls):
    with running(tls_ini(tls, "return = 200"), tmp_path) as gate:
        assert certificate_shown(gate, tls, "x.test") == "localhost"
        old = tls_connect(gate, tls)
        write_file(tmp_path, "server.pem", CLIENT_PEM)
        gate.config.certificates.refresh()
        assert certificate_shown(gate, tls, "x.test") == "other.test"
        for broken in ("rubbish", pem(SERVER_CERT) + pem(CLIENT_KEY, "PRIVATE KEY"), None):
            write_file(tmp_path, "server.pem", broken) if broken else os.unlink(tls.server)
            gate.config.certificates.refresh()
            assert certificate_shown(gate, tls, "x.test") == "other.test"
            assert "new certificate not loaded" in gate.errors[-1]
        assert old.send(request()).response().status == 200
        old.close()


def test_a_stream_after_close_notify_both_ways(tls):
    """SSLSocket.read() fails then; to the Stream it is the end, as close_notify alone is."""
    ours, theirs = socket.socketpair()
    context = ssl.create_default_context(cafile=tls.ca)

    def client():
        with context.wrap_socket(theirs, server_hostname="gate.test") as peer:
            peer.unwrap()

    stream, thread = wsgate.Stream(ours), threading.Thread(target=client)
    thread.start()
    stream.start_tls(tls_backend(tls), wsgate.Deadline(5000 * MS), server_side=True)
    eventually(lambda: stream.read() == b"")
    stream.end()
    assert stream.read() == b""
    thread.join()
    stream.close()


def test_reload_that_removes_tls(tmp_path, tls):
    """Connections from before are served by TLS or closed."""
    with running(tls_ini(tls, "return = 200"), tmp_path) as gate:
        sock = socket.create_connection(("127.0.0.1", gate.port), 5000 * MS)
        eventually(lambda: gate.connections)
        certificates = gate.config.certificates
        # The switch is half done: there is still a listener with TLS.
        vars(gate.config)["certificates"] = None
        with contextlib.closing(gate.connect()) as peer:
            assert peer.rest() == b""
        vars(gate.config)["certificates"] = certificates
        reload(gate, "[server]\nreturn = 200 new\n")
        assert gate.fetch(request()).body == b"new"
        context = ssl.create_default_context(cafile=tls.ca)
        with contextlib.closing(
                Peer(context.wrap_socket(sock, server_hostname="gate.test"))) as peer:
            assert peer.send(request()).response().body == b"new"


@pytest.mark.skipif(not hasattr(ssl, "OP_NO_RENEGOTIATION"),
                    reason="this Python has no such option")
def test_no_client_of_a_tls_port_may_negotiate_again(tmp_path, tls):
    ini = tls_ini(tls,
                  "return = 200")
    ini += "[location other.test/]\nreturn = 200\nssl_certificate = %s\n" % tls.client
    with running(ini, tmp_path) as gate, contextlib.closing(tls_connect(gate, tls)) as peer:
        assert peer.send(request()).response().status == 200
        connection, = gate.connections
        contexts = gate.config.certificates.contexts.values()
        assert connection.stream.sock.context in contexts and len(contexts) > 1
        assert all(context.options & ssl.OP_NO_RENEGOTIATION for context in contexts)


def test_a_certificate_without_a_key_is_a_configuration_error(tmp_path):
    pem = SERVER_PEM[SERVER_PEM.index("-----BEGIN CERTIFICATE"):]
    path = write_file(tmp_path, "cert.pem", pem[:pem.index("-----END CERTIFICATE") + 26])
    error, = errors_of(tmp_path, SERVER + "listen = 127.0.0.1:0 ssl\nssl_certificate = " + path)
    assert "cert.pem (it must contain the key too, because no key file is set): " in error


def test_a_key_of_another_certificate_is_a_configuration_error(tmp_path, tls):
    error, = errors_of(tmp_path, tls_ini(tls, "return = 200",
                                         "ssl_certificate_key = " + tls.client))
    assert "ssl_certificate" in error and "is not the private key of" in error
    error, = errors_of(tmp_path, "[server]\nlisten = 127.0.0.1:0 ssl\nreturn = 200\n")
    assert "needs ssl_certificate" in error


def test_proxy_header_before_tls(tmp_path, tls):
    ini = PROXY_INI % (" ssl", "127.0.0.1") + "ssl_certificate = %s\n" % tls.server
    with running(ini, tmp_path) as gate:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=tls.ca)
        client = context.wrap_bio(incoming, outgoing, server_hostname="gate.test")
        peer = gate.connect()
        peer.sock.settimeout(1000 * MS)
        header = b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n"

        def run(step):
            nonlocal header
            while True:
                try:
                    result = step()
                except ssl.SSLWantReadError:
                    result = None
                data = outgoing.read()
                if data:
                    peer.send(header + data)
                    header = b""
                if result is not None:
                    return result
                incoming.write(peer.sock.recv(65536))

        run(lambda: client.do_handshake() or True)
        run(lambda: client.write(request()))
        assert run(lambda: client.read(65536)).startswith(b"HTTP/1.1 200")
        peer.close()


@pytest.mark.parametrize("trust, name, works", [
    ("proxy_ssl_trusted_certificate = CA", None, True),
    ("proxy_ssl_trusted_certificate = CA", "back.test", True),
    ("proxy_ssl_trusted_certificate = CA", "evil.test", False), ("", "back.test", False),
    ("proxy_ssl_verify = off", "evil.test", True)],
    ids=["address", "name", "wrong name", "wrong CA", "unchecked"])
@BOTH_WAYS
def test_backend_certificates_are_verified(tmp_path, tls, raw, trust, name, works):
    """Before a byte of the request is sent."""
    heads, names = [], []

    def script(peer):
        peer.buffer = peer.sock.recv(65536)
        heads.append(peer.buffer)
        echo_service(peer)

    context = tls_backend(tls)
    context.set_servername_callback(lambda sock, name, context: names.append(name))
    with ScriptedBackend(script, tls=context) as backend:
        ini = "[server]\nproxy_pass = https://%s\n%s\nproxy_ssl_name = %s\n" % (
            backend.where, trust.replace("CA", tls.ca), name or "")
        with running(ini, tmp_path) as gate:
            response = gate.fetch(raw(b"/"))
            if works:
                assert response.status in (101, 200)
            else:
                assert (response.status, response.reason) == (502, "backend_tls")
                eventually(lambda: backend.errors or heads)
                assert not any(heads)
            assert names == [name] or not name


def test_proxy_ssl_verify_off_warns(tmp_path, capsys):
    path = write_file(tmp_path, "x.ini",
                      "[server]\nproxy_pass = https://127.0.0.1:9\nproxy_ssl_verify = off\n")
    assert wsgate.main(["-t", "-c", path]) == 0
    assert "warning" in capsys.readouterr().err and wsgate.load_config(path).warnings


def test_proxy_ssl_certificate(tmp_path, tls):
    subjects = []

    def script(peer):
        subjects.append(dict(pair for group in peer.sock.getpeercert()["subject"]
                             for pair in group))
        echo_service(peer)

    with ScriptedBackend(script, tls=tls_backend(tls, clients=True)) as backend:
        ini = "[server]\nproxy_pass = https://%s\nproxy_ssl_trusted_certificate = %s\n" % (
            backend.where, tls.ca)
        with running(ini + "proxy_ssl_certificate = %s\n" % tls.client, tmp_path) as gate:
            assert gate.fetch(request()).status == 200
        assert subjects == [{"organizationName": "Test, Inc", "commonName": "client"}]
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request()).status == 502 and len(subjects) == 1


@pytest.mark.parametrize("front, back", [(True, False), (False, True), (True, True)],
                         ids=["client", "backend", "both"])
def test_tunnel_over_tls_with_stalls(tmp_path, tls, front, back):
    rng = random.Random(7)
    sizes = [0, 1, 125, 126, 65535, 65536, 1000000] + [rng.randint(0, 40000) for _ in range(40)]
    noise = bytes(rng.getrandbits(8) for _ in range(4099)) * 250
    up, down = (b"".join(frame(2, noise[size % 4099:][:size], mask) for size in sizes)
                for mask in (b"k3y!", None))
    received = []

    def script(peer):
        peer.head()
        peer.send(switching())
        received.append(send_and_receive(peer.sock, down, len(up)))
        peer.ended()

    with ScriptedBackend(script, tls=tls_backend(tls) if back else None) as backend:
        ini = (tls_ini(tls) if front else "[server]\n") + "proxy_pass = %s://%s\n" % (
            "https" if back else "http",
            backend.where) + "proxy_ssl_trusted_certificate = %s\n" % tls.ca
        with running(ini, tmp_path) as gate:
            peer = (tls_connect(gate, tls) if front else gate.connect()).send(handshake())
            assert peer.head().startswith(b"HTTP/1.1 101")
            early, peer.buffer = peer.buffer, b""
            assert early + send_and_receive(peer.sock, up, len(down) - len(early)) == down
            peer.close()
            line = gate.line("101 closed")
            assert received == [up] and backend.errors == []
            assert "up=%d/" % len(sizes) in line and "down=%d/" % len(sizes) in line


def test_pending_bytes_of_tls(tmp_path, tls, constants):
    """Smaller reads than TLS records: poll() does not report the rest of a record."""
    constants(SMALL_READ=1000)
    constants(BIG_READ=2000)
    with ScriptedBackend(echo_service, tls=tls_backend(tls)) as backend:
        ini = tls_ini(tls, "proxy_pass = https://" + backend.where,
                      "proxy_ssl_trusted_certificate = " + tls.ca)
        with running(ini, tmp_path) as gate, contextlib.closing(
                tls_connect(gate, tls).send(handshake())) as client:
            assert client.response().status == 101
            for size in (900, 9000, 1000):  # one record each
                client.send(frame(2, b"x" * size, b"abcd"))
                assert read_frame(client) == (2, b"x" * size)


def test_close_notify_of_tunnels(tmp_path, tls):
    seen = []

    def script(peer):
        peer.head()
        peer.send(switching())
        peer.sock.suppress_ragged_eofs = False
        seen.append(read_frame(peer))
        seen.append(peer.sock.recv(1))

    with ScriptedBackend(script, tls=tls_backend(tls)) as backend:
        ini = tls_ini(tls, "proxy_pass = https://" + backend.where,
                      "proxy_ssl_trusted_certificate = " + tls.ca)
        with running(ini + "idle_timeout = %dms\n" % (100 * MS * 1000), tmp_path) as gate:
            begun = time.monotonic()
            peer = tls_connect(gate, tls).send(handshake())
            assert peer.response().status == 101
            assert read_frame(peer) == (8, struct.pack("!H", 1001) + b"idle_timeout")
            assert peer.sock.recv(1) == b""  # without a close_notify this raises
            assert 100 * MS <= time.monotonic() - begun < 1200 * MS
            peer.close()
            eventually(lambda: len(seen) == 2 or backend.errors)
            assert seen == [(8, struct.pack("!H", 1001) + b"idle_timeout"), b""]


def test_close_notify_after_both_closes(tmp_path, tls):
    """A plain connection is just closed then."""
    with ScriptedBackend() as backend:
        ini = tls_ini(tls, "proxy_pass = http://" + backend.where)
        with running(ini, tmp_path) as gate:
            peer = tls_connect(gate, tls).send(handshake())
            server = backend.connection()
            server.head()
            server.send(switching())
            assert peer.response().status == 101
            peer.send(frame(8, b"\x03\xe8", b"abcd"))
            server.send(frame(8, b"\x03\xe8"))
            assert read_frame(server) == read_frame(peer) == (8, b"\x03\xe8")
            server.close()
            assert peer.sock.recv(1) == b""  # without a close_notify this raises
            peer.close()


def test_a_subject_cannot_end_its_field():
    subject = ((("commonName", "me\r\nX-Real-IP: 1.2.3.4\x7f"),),)
    assert wsgate.distinguished_name({"subject": subject}) == "CN=me\\0D\\0AX-Real-IP: 1.2.3.4\\7F"


def test_locations_with_the_same_tls_keys_share_one_context(tmp_path, tls):
    """A reload keeps it too, until a key or file changes."""
    path = write_file(tmp_path, "many.ini", "".join(
        "[location /%d/]\nproxy_pass = https://127.0.0.1:9\nproxy_ssl_trusted_certificate = %s\n"
        "proxy_ssl_verify = %s\n"
        % (number, tls.ca, "off" if number == 7 else "on") for number in range(20)))
    configs = [wsgate.load_config(path), wsgate.reload_config(path)]
    contexts = {location.proxy.context for config in configs for location in config.locations}
    assert len(contexts) == 2
    assert [context.verify_mode for context in contexts].count(ssl.CERT_NONE) == 1
    write_file(tmp_path, "ca.pem", pem(CA) * 2)
    assert wsgate.reload_config(path).locations[0].proxy.context not in contexts
    del configs, contexts
    gc.collect()
    assert not wsgate.TLS_IN_USE


def test_one_certificate_of_many_names_is_one_context(tmp_path, tls):
    lines = ["[location %s.test/]\nreturn = 200\nssl_certificate = %s" % (name, tls.client)
             for name in "abc"]
    store = load_text(tmp_path, tls_ini(tls, "return = 200", *lines)).certificates
    assert len(store.contexts) == 4 and len(set(store.contexts.values())) == 2


needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                                reason="only root can drop privileges")


@needs_root
def test_a_reload_works_though_user_cannot_read_the_key(tls):
    """The loaded certificates stay; a renewed file that cannot be read is logged once."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        key = write_file(folder, "key.pem", SERVER_PEM)
        os.chmod(key, 0o600)
        ini = ["[server]", "listen = 127.0.0.1:%d ssl" % free_port(), "ssl_certificate = " + key,
               "user = nobody", "proxy_pass = https://127.0.0.1:9",
               "proxy_ssl_certificate = " + key, "[location gate.test/]", "return = 200 one",
               "ssl_certificate = " + key]
        path = write_file(folder, "gate.ini", "\n".join(ini))
        with process("-c", path) as child:
            eventually(lambda: child.logged("up to"))
            assert child.logged("is not readable for user nobody")
            child.port = int(ini[1].split(":")[1].split()[0])
            ini[7] = "return = 200 two"
            write_file(folder, "gate.ini", "\n".join(ini))
            child.send_signal(signal.SIGHUP)
            eventually(lambda: child.logged("reload"))
            with contextlib.closing(tls_connect(child, tls)) as peer:
                assert peer.send(request()).response().body == b"two", child.lines
            write_file(folder, "key.pem", SERVER_PEM + "\n")
            for count in (1, 2):
                child.send_signal(signal.SIGHUP)
                eventually(lambda: len([line for line in child.lines if "reloaded" in line])
                           == count + 1)
            said = [line for line in child.lines if "new certificate not loaded" in line]
            assert len(said) == 1 and key + ": Permission denied" in said[0], child.lines
            with contextlib.closing(tls_connect(child, tls)) as peer:
                assert peer.send(request()).response().body == b"two"


def test_unreadable_certificate_is_one_line(tmp_path, tls):
    """As for `user`, whose key only root can read; they are loaded once they can be read."""
    with running(tls_ini(tls, "return = 200"), tmp_path) as gate:
        store, away = gate.config.certificates, str(tmp_path / "away.pem")
        os.rename(tls.server, away)
        for _ in range(3):
            store.refresh()
        assert len([line for line in gate.errors if "new certificate not loaded" in line]) == 1
        os.rename(away, tls.server)
        store.refresh()
        assert gate.errors[-1] == "certificates reloaded"


def test_ciphers_of_a_listener_are_the_ones_offered(tmp_path, tls):
    lines = ("return = 200", "ssl_protocols = TLSv1.2",
             "ssl_ciphers = ECDHE-ECDSA-AES128-GCM-SHA256")
    with running(tls_ini(tls, *lines),
                 tmp_path) as gate, contextlib.closing(tls_connect(gate, tls)) as peer:
        assert peer.sock.cipher()[0] in lines[2]


@pytest.mark.parametrize("line, version", [("proxy_ssl_protocols = TLSv1.2", "TLSv1.2"), (
    "proxy_ssl_protocols = TLSv1.2\nproxy_ssl_ciphers = ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES128-GCM-SHA256")])
def test_protocols_and_ciphers_towards_a_backend(tmp_path, tls, line, version):
    shown = []

    def script(peer):
        shown.extend((peer.sock.version(), peer.sock.cipher()[0]))
        echo_service(peer)

    with ScriptedBackend(script, tls=tls_backend(tls)) as backend:
        with running("[server]\nproxy_pass = https://%s\nproxy_ssl_verify = off\n%s\n"
                     % (backend.where, line),
                     tmp_path) as gate:
            assert gate.fetch(request()).status == 200 and version in shown


@pytest.mark.skipif(ssl.OPENSSL_VERSION_INFO < (3,), reason="this OpenSSL has TLS 1.0")
@pytest.mark.parametrize("prefix", ["ssl", "proxy_ssl"])
def test_version_refused_by_this_openssl(tmp_path, tls, prefix):
    ini = tls_ini(tls, "proxy_pass = https://127.0.0.1:9", prefix + "_protocols = TLSv1 TLSv1.2")
    error, = errors_of(tmp_path, ini)
    assert "%s_protocols: TLSv1 is refused by OpenSSL 3" % prefix in error
    assert "set %s_ciphers = DEFAULT@SECLEVEL=0" % prefix in error
    load_text(tmp_path, ini + "%s_ciphers = DEFAULT@SECLEVEL=0\n" % prefix)


@pytest.mark.skipif(not hasattr(ssl, "TLSVersion"), reason="tls_connect cannot choose a version")
def test_a_version_between_two_others_is_not_allowed_with_them(tmp_path, tls):
    lines = ("return = 200", "ssl_protocols = TLSv1.1 TLSv1.3", "ssl_ciphers = DEFAULT@SECLEVEL=0")
    with running(tls_ini(tls, *lines), tmp_path) as gate:
        with pytest.raises(
                OSError), contextlib.closing(tls_connect(gate, tls, version="TLSv1.2")) as peer:
            peer.send(request()).response()
        with contextlib.closing(tls_connect(gate, tls)) as peer:
            assert peer.send(request()).response().status == 200
            assert peer.sock.version() == "TLSv1.3"


@pytest.mark.skipif(ssl.OPENSSL_VERSION_INFO < (3,), reason="this OpenSSL has TLS 1.0")
def test_an_old_version_works_with_the_remedy(tmp_path, tls):
    lines = ("return = 200", "ssl_protocols = TLSv1", "ssl_ciphers = DEFAULT@SECLEVEL=0")
    with running(tls_ini(tls, *lines), tmp_path) as gate:
        context = ssl.create_default_context(cafile=tls.ca)
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        wsgate.set_protocols(context, ["TLSv1"])
        with socket.create_connection(("127.0.0.1", gate.port), 5000 * MS) as sock:
            assert context.wrap_socket(sock, server_hostname="gate.test").version() == "TLSv1"


@pytest.mark.skipif(sys.version_info < (3, 7), reason="this Python has no minimum_version")
def test_error_of_a_backend_of_another_tls_version(tmp_path, tls):
    context = tls_backend(tls)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with ScriptedBackend(echo_service, tls=context) as backend:
        ini = ("[server]\nproxy_pass = https://%s\nproxy_ssl_verify = off\n"
               "proxy_ssl_protocols = TLSv1.2\n" % backend.where)
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request()).reason == "backend_tls"
            assert gate.line("(set proxy_ssl_protocols to a TLS version that it supports)")


@pytest.mark.parametrize("lines, marks", [
    ("", "(set proxy_ssl_trusted_certificate to its CA, or proxy_ssl_verify = off)"),
    ("proxy_ssl_trusted_certificate = CA\nproxy_ssl_name = evil.test",
     "(set proxy_ssl_name to a name of its certificate,"),
], ids=["self-signed", "name"])
def test_error_of_an_untrusted_backend(tmp_path, tls, lines, marks):
    with ScriptedBackend(echo_service, tls=tls_backend(tls)) as backend:
        lines = lines.replace("CA", tls.ca)
        ini = "[server]\nproxy_pass = https://%s\n%s\n" % (backend.where, lines)
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request()).reason == "backend_tls"
            line = eventually(lambda: next(line for line in gate.errors if "backend_tls" in line))
            assert re.search("certificate verify failed|doesn't match", line)
            assert marks in line and "_ssl.c" not in line
            assert gate.line("reason=backend_tls", "proxy_ssl_")


@needs_unix
def test_backend_tls_on_a_unix_socket(tmp_path, tls):
    """There is no host to verify the certificate for, so the error names proxy_ssl_name."""
    with ScriptedBackend(echo_service, tls=tls_backend(tls),
                         path=str(tmp_path / "back")) as backend:
        ini = "[server]\nproxy_pass = https://%s:\nproxy_ssl_trusted_certificate = %s\n" % (
            backend.where, tls.ca)
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request()).reason == "backend_tls"
            assert gate.line("set proxy_ssl_name to a name")
        with running(ini + "proxy_ssl_name = gate.test\n", tmp_path) as gate:
            assert gate.fetch(request()).status == 200


def test_error_of_a_backend_without_tls(tmp_path):
    with ScriptedBackend(lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as backend:
        with running("[server]\nproxy_pass = https://%s\n" % backend.where, tmp_path) as gate:
            assert gate.fetch(request()).reason == "backend_tls"
            assert gate.line("use http:// in proxy_pass")


@pytest.mark.parametrize("side", ["client", "backend"])
def test_a_tunnel_through_tls_survives_its_pings(tmp_path, tls, side):
    """A pong that is not passed on leaves nothing to write, and nothing must not be written."""
    with ScriptedBackend(echo_service, tls=tls_backend(tls) if side
                         == "backend" else None) as backend:
        ini = tls_ini(tls, PINGING) if side == "client" else "[server]\n%s\n" % PINGING
        ini += "proxy_ssl_name = gate.test\n"
        ini += "proxy_pass = %s://%s\nproxy_ssl_trusted_certificate = %s\n" % (
            "https" if side == "backend" else "http", backend.where, tls.ca)
        with running(ini, tmp_path) as gate:
            client = tls_connect(gate, tls) if side == "client" else gate.connect()
            client.send(handshake())
            assert client.response().status == 101
            for _ in range(2):
                client.send(frame(10, read_ping(client, False), b"abcd"), frame(1, b"on", b"abcd"))
                received = read_frame(client)
                while received[0] == 9:  # a busy machine: the next ping was faster
                    received = read_frame(client.send(frame(10, received[1], b"abcd")))
                assert received == (1, b"on")
            client.close()


# ------------------------------------------------------------ HTTP/1.1 messages
#
# What is refused: rows of (bytes, what is wrong, response), where the response is
# `400 bad_request` unless given.

# Request lines, followed by a valid Host.
BAD_REQUEST_LINES = (
    (b"GET /", "HTTP/0.9"),
    (b"GET", "a method alone"),
    (b"/ HTTP/1.1", "no method"),
    (b"GET HTTP/1.1", "no target"),
    (b"GET  / HTTP/1.1", "two spaces"),
    (b"GET /  HTTP/1.1", "two spaces before the version"),
    (b"GET / HTTP/1.1 ", "space at the end"),
    (b" GET / HTTP/1.1", "space at the start"),
    (b"GET\t/ HTTP/1.1", "tab for space"),
    (b"GET\x0b/ HTTP/1.1", "vertical tab for space"),
    (b"GET /a b HTTP/1.1", "space in the target"),
    (b"GET / http/1.1", "version in lower case"),
    (b"GET / HTTP/11", "version without a dot"),
    (b"GET / HTTP/1.", "half a version"),
    (b"GET / HTTP/1.10", "long version"),
    (b"GET / HTTP/+1.1", "sign in the version"),
    (b"GET / HTTP/1.1x", "something after the version"),
    (b"GET / ICAP/1.0", "another protocol"),
    (b"GET / HTTP/0.9", "version before HTTP/1", "505 bad_version"),
    (b"GET / HTTP/2.0", "version after HTTP/1", "505 bad_version"),
    (b"GET / HTTP/9.9", "version unknown", "505 bad_version"),
    (b"PRI * HTTP/2.0", "HTTP/2 preface", "505 bad_version"),
    (b"G@T / HTTP/1.1", "@ in the method"),
    (b"GET: / HTTP/1.1", "colon in the method"),
    (b"G\xc3\x8bT / HTTP/1.1", "letters beyond ASCII in the method"),
    (b"\xef\xbb\xbfGET / HTTP/1.1", "byte order mark"),
    (b"GET /\x00 HTTP/1.1", "NUL in the target"),
    (b"GET /\x1f HTTP/1.1", "control byte in the target"),
    (b"GET /\x7f HTTP/1.1", "DEL in the target"),
    (b"GET /\rX: y HTTP/1.1", "bare CR in the target"),
    (b"GET /\nX: y HTTP/1.1", "bare LF in the target"),
    (b"GET /#a HTTP/1.1", "fragment"),
    (b"GET /?a#b HTTP/1.1", "fragment after a query"),
    (b"GET a HTTP/1.1", "no slash"),
    (b"GET ?a HTTP/1.1", "query alone"),
    (b"GET /.. HTTP/1.1", "dot segment at the end"),
    (b"GET /a/../b HTTP/1.1", "dot segments"),
    (b"GET /%2e%2E/a HTTP/1.1", "encoded dot segments"),
    (b"GET /a/.%2e HTTP/1.1", "half encoded dot segment"),
    (b"GET /a/./b HTTP/1.1", "single dot"),
    (b"GET //../a HTTP/1.1", "dot segments after two slashes"),
    (b"GET /a/..%2Fb HTTP/1.1", "dot segment before an encoded slash"),
    (b"GET /a%2f../b HTTP/1.1", "dot segment after an encoded slash"),
    (b"GET /a/..?x HTTP/1.1", "dot segment before a query"),
    (b"GET /.%5C HTTP/1.1", "dot segment before an encoded backslash"),
    (b"GET /a/.%FF./b HTTP/1.1", "invalid UTF-8 inside of a dot segment"),
    (b"GET /a%7F HTTP/1.1", "encoded DEL"),
    (b"GET /a%u0041 HTTP/1.1", "escape of IIS"),
    (b"GET /public/..;/admin HTTP/1.1", "dot segment with an empty parameter"),
    (b"GET /public/..;x=1/admin HTTP/1.1", "dot segment with a parameter"),
    (b"GET /public/..%3b/admin HTTP/1.1", "dot segment with an encoded semicolon"),
    (b"GET /.;/admin HTTP/1.1", "single dot with a parameter"),
    (b"GET /a\\..\\b HTTP/1.1", "backslashes"),
    (b"GET /a%5c..%5cb HTTP/1.1", "encoded backslashes"),
    (b"GET /%00 HTTP/1.1", "encoded NUL"),
    (b"GET /%0d%0aX:%20y HTTP/1.1", "encoded CRLF"),
    (b"GET /% HTTP/1.1", "% alone"),
    (b"GET /%4 HTTP/1.1", "half an escape"),
    (b"GET /%zz HTTP/1.1", "escape that is none"),
    (b"GET /%%32%65 HTTP/1.1", "double escape"),
    (b"GET * HTTP/1.1", "* for another method than OPTIONS"),
    (b"OPTIONS *a HTTP/1.1", "* and something"),
    (b"OPTIONS a HTTP/1.1", "OPTIONS without slash"),
    (b"GET gate.test:80 HTTP/1.1", "authority-form without CONNECT"),
    (b"CONNECT gate.test:443 HTTP/1.1", "CONNECT", "405 method_not_allowed"),
    (b"CONNECT / HTTP/1.1", "CONNECT with a path", "405 method_not_allowed"),
    (b"GET http://other.test/ HTTP/1.1", "absolute-form for another host than Host"),
    (b"GET http://gate.test:81/ HTTP/1.1", "absolute-form for another port than Host"),
    (b"GET https://gate.test:80/ HTTP/1.1", "absolute-form for the port of another scheme"),
    (b"GET http://gate.test.other.test/ HTTP/1.1", "absolute-form with a longer host"),
    (b"GET http://user@gate.test/ HTTP/1.1", "user in absolute-form"),
    (b"GET http://gate.test@other.test/ HTTP/1.1", "Host as user of another host"),
    (b"GET http://gate.test\\@other.test/ HTTP/1.1", "backslash in the authority"),
    (b"GET http://gate.test#@other.test/ HTTP/1.1", "fragment in the authority"),
    (b"GET http://gate.test/#a HTTP/1.1", "absolute-form with fragment"),
    (b"GET http://gate.test/../a HTTP/1.1", "absolute-form with dot segments"),
    (b"GET http:///a HTTP/1.1", "absolute-form without authority"),
    (b"GET http:/gate.test/ HTTP/1.1", "absolute-form with one slash"),
    (b"GET ftp://gate.test/ HTTP/1.1", "another scheme"),
    (b"GET /%s HTTP/1.1" % (b"a" * 16384), "line over 16k", "414 uri_too_long"),
    (b"G" * 16390, "method over 16k", "414 uri_too_long"))

# Lines in a POST / HTTP/1.1 with a valid Host.
BAD_REQUEST_FIELDS = (
    (b"Content-Length: +5", "plus sign"),
    (b"Content-Length: -5", "minus sign"),
    (b"Content-Length: -0", "minus zero"),
    (b"Content-Length: 0x5", "hexadecimal"),
    (b"Content-Length: 5_0", "underscore"),
    (b"Content-Length: 5 0", "space inside"),
    (b"Content-Length: 5.0", "fraction"),
    (b"Content-Length: 1e1", "exponent"),
    (b"Content-Length: 5;", "parameter"),
    (b"Content-Length: '5'", "quotes"),
    (b"Content-Length: five", "word"),
    (b"Content-Length:", "empty"),
    (b"Content-Length: \xd9\xa5", "Arabic digit"),
    (b"Content-Length: \xef\xbc\x95", "full-width digit"),
    (b"Content-Length: \x0b5", "vertical tab before the number"),
    (b"Content-Length: 5\x00", "NUL after the number"),
    (b"Content-Length: 18446744073709551621", "2^64 + 5"),
    (b"Content-Length: " + b"9" * 400, "400 digits"),
    (b"Content-Length: 5, 5", "list of equals"),
    (b"Content-Length: 5, 6", "list"),
    (b"Content-Length: 5\r\nContent-Length: 5", "twice the same"),
    (b"Content-Length: 5\r\nContent-Length: 6", "twice"),
    (b"Content-Length: 5\r\ncontent-length: 6", "twice in two cases"),
    (b"Content-Length : 5", "space before the colon"),
    (b"Content-Length\t: 5", "tab before the colon"),
    (b"Content-Length: 5\r\nTransfer-Encoding: chunked", "CL.TE"),
    (b"Transfer-Encoding: chunked\r\nContent-Length: 5", "TE.CL"),
    (b"Transfer-Encoding: identity\r\nContent-Length: 5", "identity with a length"),
    (b"Transfer-Encoding:\r\nContent-Length: 5", "empty coding with a length"),
    (b"Transfer-Encoding : chunked", "coding, space before the colon"),
    (b"Transfer-Encoding\t: chunked", "coding, tab before the colon"),
    (b"Transfer-Encoding\x00: chunked", "coding, NUL in the name"),
    (b"Transfer\xa0Encoding: chunked", "coding, no-break space in the name"),
    (b"Transfer Encoding: chunked", "coding, space in the name"),
    (b" Transfer-Encoding: chunked", "coding, folded after Host"),
    (b"\tTransfer-Encoding: chunked", "coding, folded by a tab"),
    (b"X: y\r\n Transfer-Encoding: chunked", "coding, folded after another field"),
    (b"X: y\rTransfer-Encoding: chunked", "coding after a bare CR"),
    (b"X: y\nTransfer-Encoding: chunked", "coding after a bare LF"),
    (b"X: y\r\rTransfer-Encoding: chunked", "coding after two CR"),
    (b"X: y\n\nGET /admin HTTP/1.1", "request after two LF"),
    (b"X: y\r\n\nGET /admin HTTP/1.1", "request after CRLF LF"),
    (b"Transfer-Encoding:\r\n chunked", "coding, folded value"),
    (b"Transfer-Encoding: chunked\x00", "coding, NUL in the value"),
    (b"Transfer-Encoding:\x0bchunked", "coding, vertical tab"),
    (b"Transfer-Encoding:\x0cchunked", "coding, form feed"),
    (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "coding twice",
     "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", "two codings",
     "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: chunked, chunked", "chunked twice", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: gzip, chunked", "another coding before", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: chunked, identity", "another coding after", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: gzip", "another coding", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: identity", "no coding", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: xchunked", "nearly chunked", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: chunked;q=1", "parameter to chunked", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: \"chunked\"", "chunked in quotes", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: ,chunked", "empty element before", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: chunked,", "empty element after", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: chunked x", "word after chunked", "501 bad_transfer_encoding"),
    (b"Transfer-Encoding: c\xc5\xbfunked", "letter that folds to another",
     "501 bad_transfer_encoding"),
    (b"Transfer-Encoding:", "empty coding", "501 bad_transfer_encoding"),
    (b"X", "no colon"),
    (b": y", "no name"),
    (b"X y: z", "space in a name"),
    (b"X(y): z", "bracket in a name"),
    (b"X\xc3\xa4: z", "letters beyond ASCII in a name"),
    (b"\"X\": z", "quotes in a name"),
    (b"X: \x00", "NUL in a value"),
    (b"X: \x01", "control byte in a value"),
    (b"X: \x7f", "DEL in a value"),
    (b"X: y\r\n z", "folded line"),
    (b"X: y\r\n\tz", "line folded by a tab"),
    (b"Host: gate.test", "Host twice"),
    (b"host: other.test", "two hosts"),
    (b"Connection: close, Host", "Connection names Host"),
    (b"Connection: content-length\r\nContent-Length: 0", "Connection names Content-Length"),
    (b"Connection: Transfer-Encoding", "Connection names Transfer-Encoding"),
    (b"Connection: authorization", "Connection names Authorization"),
    (b"Connection: close\r\nConnection: x, COOKIE", "second Connection names Cookie"),
    (b"Connection: origin", "Connection names Origin"),
    (b"Connection: X-Forwarded-For", "Connection names X-Forwarded-For"),
    (b"Connection: ,x-real-ip ,", "Connection names X-Real-IP"),
    (b"Connection: Sec-WebSocket-Key", "Connection names Sec-WebSocket-Key"),
    (b"\r\n".join([b"X: y"] * 3000), "fields over 16k", "431 header_too_large"),
    (b"X: " + b"y" * 16384, "field over 16k", "431 header_too_large"))

# A value of Host in a GET / HTTP/1.1.
BAD_HOSTS = (b"", b" ", b":80", b"a b", b"a/b", b"a?b", b"a#b", b"a\\b", b"user@a", b"<a>", b"a\"",
             b"a\x00", b"\xc3\xa4", b"a:b", b"a:-1", b"a:+80", b"a:80:80", b"a:65536", b"a:999999",
             b"http://a", b"::1", b"[::1", b"::1]", b"[::1]a", b"[zz]", b"[::1%25lo]")

# Everything a client sends.
BAD_OPENINGS = (
    (b"GET / HTTP/1.1\r\n\r\n", "no Host"),
    (b"GET http://gate.test/ HTTP/1.1\r\n\r\n", "absolute-form without Host"),
    (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     "chunked in HTTP/1.0"),
    (b"GET / HTTP/1.1\nHost: a\n\n", "bare LF everywhere"),
    (b"GET / HTTP/1.1\nHost: a\r\n\r\n", "bare LF after the request line"),
    (b"GET / HTTP/1.1\r\nHost: a\n\r\n", "bare LF after a field"),
    (b"GET / HTTP/1.1\r\nHost: a\r\n\n", "bare LF for the empty line"),
    (b"GET / HTTP/1.1\rHost: a\r\r\n\r\n", "bare CR"),
    (b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "two empty lines before"),
    (b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "LF before"),
    (b"\x00GET / HTTP/1.1\r\nHost: a\r\n\r\n", "NUL before"),
    (b"\r\n" * 4, "nothing but empty lines"),
    (b"HTTP/1.1 200 OK\r\n\r\n", "an answer"),
    (b"PROXY TCP4 1.2.3.4 1.2.3.5 1 2\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
     "PROXY header that is not expected"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2 preface, whole", "505 bad_version"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS on a plain port",
     "400 tls_on_http_port"),
    (b"GET /" + b"a" * 16400, "line that does not end", "414 uri_too_long"),
    (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 3000, "head that does not end", "431 header_too_large"))

BAD_REQUESTS = table_rows((b"", BAD_REQUEST_LINES, HOST_LINE + b"\r\n"), (b"", BAD_OPENINGS, b""),
                    (b"POST / HTTP/1.1" + HOST_LINE, BAD_REQUEST_FIELDS, b"\r\n\r\n"),
                    (b"GET / HTTP/1.1\r\nHost:", [(host, "Host: %r" % host) for host in BAD_HOSTS],
                     b"\r\n\r\n"))


@pytest.mark.parametrize("raw, verdict", table_params(BAD_REQUESTS))
def test_malformed_requests(raw, verdict):
    """They are refused in all chunkings."""
    assert head_verdicts(raw) == {verdict}


def test_malformed_requests_reach_no_backend(tmp_path):
    """The response has the reason."""
    with gate_and_backend(tmp_path) as (gate, backend):
        for raw, why, verdict in BAD_REQUESTS:
            client = gate.connect().send(raw)
            response = client.response()
            assert (why, "%d %s" % (response.status, response.reason)) == (why, verdict)
            assert response.body.startswith(b"%d " % response.status)
            assert verdict[4:].encode() in response.body
            assert response.get(b"connection") == b"close" and client.ended(), why
            client.close()
        assert not backend.connections


@pytest.mark.parametrize("raw, verdict", table_params(table_rows(
    (b"", [row for row in BAD_REQUEST_LINES
           if not re.match(br"GET https?://(?!gate\.test[/#])[^/]", row[0])], b"\r\n"))))
def test_a_bad_request_line_is_refused_once_it_is_complete(raw, verdict):
    """Not after client_header_timeout; only the authority of absolute-form waits for Host."""
    assert head_verdicts(raw) == {verdict}


# Responses of a backend; the client gets 502 backend_bad_response unless given.
BAD_RESPONSE_HEADS = (
    (b"hello\r\n\r\n", "no HTTP"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
    (b"\x15\x03\x03\x00\x02\x02\x28", "TLS alert"),
    (b"\x16\x03\x03\x00\x7a\x02", "TLS hello"),
    (b"<html>\r\n\r\n</html>", "HTTP/0.9"),
    (b"ICY 200 OK\r\n\r\n", "Shoutcast"),
    (b"\r\nHTTP/1.1 200 OK\r\n\r\n", "empty line before"),
    (b"http/1.1 200 OK\r\n\r\n", "lower case"),
    (b"HTTPS/1.1 200 OK\r\n\r\n", "HTTPS for HTTP"),
    (b"HTTP/1.1\r\n\r\n", "no status"),
    (b"HTTP/1.1 \r\n\r\n", "empty status"),
    (b"HTTP/1.1 20 OK\r\n\r\n", "status of two digits"),
    (b"HTTP/1.1 2000 OK\r\n\r\n", "status of four digits"),
    (b"HTTP/1.1 099 OK\r\n\r\n", "status below 100"),
    (b"HTTP/1.1 600 OK\r\n\r\n", "status above 599"),
    (b"HTTP/1.1 +20 OK\r\n\r\n", "status with a sign"),
    (b"HTTP/1.1 2_0 OK\r\n\r\n", "status with an underscore"),
    (b"HTTP/1.1 200OK\r\n\r\n", "no space after the status"),
    (b"HTTP/1.1  200 OK\r\n\r\n", "two spaces"),
    (b"HTTP/1.1\t200 OK\r\n\r\n", "tab for space"),
    (b"HTTP/1.1 200 O\x00K\r\n\r\n", "NUL in the phrase"),
    (b"HTTP/1.1 200 O\rK\r\n\r\n", "bare CR in the phrase"),
    (b"HTTP/0.9 200 OK\r\n\r\n", "version 0.9"),
    (b"HTTP/2 200 OK\r\n\r\n", "version 2"),
    (b"HTTP/2.0 200 OK\r\n\r\n", "version 2.0"),
    (b"HTTP/1.10 200 OK\r\n\r\n", "version 1.10"),
    (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     "chunked in an answer of HTTP/1.0"),
    (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 33 + b"HTTP/1.1 200 OK\r\n\r\n", "33 interim answers"),
    (b"HTTP/1.1 101 OK\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "101 unasked for",
     "502 backend_bad_101"),
    (b"", "nothing", "502 backend_closed"))

# Behind `HTTP/1.1 200 OK`.
BAD_RESPONSE_FIELDS = (
    (b"X: y\rSet-Cookie: a=b\r\n\r\n", "bare CR in a field"),
    (b"X: y\r\n z\r\n\r\n", "folded field"),
    (b"X : y\r\n\r\n", "space before the colon in an answer"),
    (b"X y: z\r\n\r\n", "space in the name"),
    (b"X\r\n\r\n", "field without colon"),
    (b"X: \x00\r\n\r\n", "NUL in a field"),
    (b"X: y\r\n" * 3000 + b"\r\n", "fields of 18k in an answer"),
    (b"X: y\n z\n\n", "folded field after LF"),
    (b"X: " + b"y" * 17000 + b"\r\n\r\n", "head of 17k"),
    (b"X: y", "end in the head"),
    (b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok", "length twice"),
    (b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok", "two lengths"),
    (b"Content-Length: 2, 3\r\n\r\nok", "list of lengths"),
    (b"Content-Length: +2\r\n\r\nok", "length with a sign"),
    (b"Content-Length: -2\r\n\r\nok", "negative length"),
    (b"Content-Length: 0x2\r\n\r\nok", "hexadecimal length"),
    (b"Content-Length: 0_2\r\n\r\nok", "length with an underscore"),
    (b"Content-Length:\r\n\r\nok", "empty length"),
    (b"Content-Length: 18446744073709551618\r\n\r\nok", "length of 2^64 + 2"),
    (b"Transfer-Encoding: gzip\r\n\r\nok", "gzip"),
    (b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "gzip and chunked"),
    (b"Transfer-Encoding: identity\r\n\r\nok", "identity"),
    (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     "chunked in two fields"))

# Responses that are malformed only in the body: the client connection is reset.
BAD_RESPONSE_BODIES = (
    (b"Content-Length: 9\r\n\r\nhello", "shorter than its length", "backend_truncated"),
    (CHUNKED + b"5\r\nhel", "end in a chunk", "backend_truncated"),
    (CHUNKED + b"5\r\nhello\r\n", "end before the last chunk", "backend_truncated"),
    (CHUNKED + b"5\r\nhello\r\n0\r\n", "end before the empty line", "backend_truncated"),
    (CHUNKED + b"5\r\nhello\r\n0\r\nX: y\r\n", "end in the trailers", "backend_truncated"),
    (CHUNKED + b"hello", "not chunked", "backend_truncated"),
    (CHUNKED + b"5\nhello\n0\n\n", "bare LF in chunks", "backend_bad_response"),
    (CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n", "negative chunk", "backend_bad_response"),
    (CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n", "chunk longer than said", "backend_bad_response"),
    (CHUNKED + b"10000000000000005\r\nhello\r\n0\r\n\r\n", "chunk beyond 64 bits",
     "backend_bad_response"),
    (CHUNKED + b"5;" + b"a" * 9000 + b"\r\nhello\r\n0\r\n\r\n", "9000 bytes of extension",
     "backend_bad_response"),
    (CHUNKED + b"0\r\nX y: z\r\n\r\n", "bad trailer", "backend_bad_response"))


@pytest.mark.parametrize("how", [b"whole", b"drip"])
def test_malformed_responses(tmp_path, how):
    table = table_rows((b"", BAD_RESPONSE_HEADS, b""), (OK, BAD_RESPONSE_FIELDS, b""),
                       default="502 backend_bad_response")
    with gate_and_backend(tmp_path, respond_by_row(table)) as (gate, _):
        for number, (_, why, verdict) in enumerate(table):
            response = gate.fetch(request(b"GET", b"/%d/%s" % (number, how)))
            assert (why, "%d %s" % (response.status, response.reason)) == (why, verdict)


UNUSUAL_REQUESTS = (
    b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost:gate.test\r\n\r\n",
    b"GET / HTTP/1.1\r\nhOST: \t gate.test \t\r\n\r\n",
    b"get.it!#$%&'*+-^_`|~ / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /|\"<>{}^`'()*;=:@!$&,~%2F%c3%a4?\\/.. HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /.../..a/a../.well-known HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://A:80/b HTTP/1.1\r\nHost: a:80\r\n\r\n",
    b"GET HTTPS://a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:8080\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a_b.test.:\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX:\r\nX: \r\n!#$%&'*+-.^_`|~09Az: \t\xe4\xff \"\\\t;\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 000000000000000000\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \tChunked \r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: ,close , X-Y,,\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 2700 + b"\r\n",
    b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * (16384 - 27)),
    b"GET / HTTP/1.1\r\nHost: a\r\nX: %s\r\n\r\n" % (b"y" * (16384 - 32)))


@pytest.mark.parametrize("raw", UNUSUAL_REQUESTS, ids=lambda raw: repr(raw[:40]))
def test_unusual_requests(raw):
    assert head_verdicts(raw + b"tail", len(raw)) == {(raw, b"tail")}


@pytest.mark.parametrize("line, host, target, path", [
    (b"http://gate.test/a?b=/c", b"gate.test", b"/a?b=/c", "/a"),
    (b"http://gate.test", b"GATE.test", b"/", "/"),
    (b"http://gate.test?a=/b", b"gate.test", b"/?a=/b", "/"),
    (b"http://gate.test:8080//a", b"gate.test:8080", b"//a", "/a"),
    (b"ws://gate.test:80/a", b"gate.test", b"/a", "/a"),  # RFC 9110 4.2.3
    (b"WSS://Gate.test/a", b"gate.test:443", b"/a", "/a"),
    (b"/%61%2Fb%20", b"gate.test", b"/%61%2Fb%20", "/a/b "),
    (b"/a?b/../c", b"gate.test", b"/a?b/../c", "/a")])
def test_target_and_path(line, host, target, path):
    """The target is unchanged, the path is decoded for routing."""
    parsed = wsgate.parse_request_head(b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (line, host))
    assert (parsed.target, parsed.path, parsed.authority) == (target, path, host)
    assert parsed.host == "gate.test"


def test_fields_keep_their_case():
    raw = request(b"GET", b"/", b"X-a: 1", b"x-A:2 ", b"Connection: Close ,x-a,", b"connection: y")
    fields = wsgate.parse_request_head(raw).fields
    assert fields == [(b"Host", b"gate.test"), (b"X-a", b"1"), (b"x-A", b"2"),
                      (b"Connection", b"Close ,x-a,"), (b"connection", b"y")]
    assert fields.get_all(b"x-a") == [b"1", b"2"] and fields.get(b"x-a") is None
    assert fields.get(b"host") == b"gate.test"
    assert fields.tokens(b"connection") == (b"close", b"x-a", b"y")
    assert not fields.get_all(b"z") and fields.get(b"z") is None


@pytest.mark.parametrize("raw, status, reason, length, is_chunked", [
    (b"HTTP/1.1 200 OK\r\n\r\n", 200, b"OK", None, False),
    (b"HTTP/1.0 404 \r\nContent-Length: 007\r\n\r\n", 404, b"", 7, False),
    (b"HTTP/1.1 599\r\nTransfer-Encoding: CHUNKED\r\n\r\n", 599, b"", None, True),
    (b"HTTP/1.1 200 Tr\xc3\xa8s bien\r\ncontent-length: 0\r\n\r\n", 200, b"Tr\xc3\xa8s bien", 0,
     False)])
def test_response_head(raw, status, reason, length, is_chunked):
    response = wsgate.parse_response_head(raw)
    assert (response.status, response.reason, response.length,
            response.chunked) == (status, reason, length, is_chunked)


@pytest.mark.parametrize("line, status", [
    (b"GET /x", 400), (b"GET /x HTTP/3.0", 505), (b"GET /x HTTP/1.1 ", 400), (b"", 400),
    (b"\x00", 400), (b"GET x\n", 400)])
def test_wrong_request_line_is_refused_at_once(tmp_path, line, status):
    """Not after client_header_timeout, as if the rest of the head could make it valid."""
    with gate_and_backend(tmp_path, None) as (gate, _):
        peer = gate.connect().send(b"\r\n" + line + b"\r\n")
        assert peer.response().status == status
        peer.close()
        peer = gate.connect().send(line + b"\r\nHost: gate.test\r\n")
        assert peer.response().status == status
        peer.close()


class CountedBytes(bytes):
    """Bytes that count how many of them find() has been told to look at."""

    looked = 0

    def find(self, what, start=0, end=None):
        end = len(self) if end is None else min(end, len(self))
        CountedBytes.looked += max(0, end - start)
        return bytes.find(self, what, start, end)

    def __add__(self, other):
        return CountedBytes(bytes.__add__(self, other))


def test_a_head_that_comes_byte_by_byte_is_looked_at_once():
    """Otherwise each byte of a slow client costs as much as its whole head so far."""
    here, there = socket.socketpair()
    with here, there:
        stream, CountedBytes.looked = wsgate.Stream(here), 0
        stream.buffer = CountedBytes()
        head = b"GET /%s HTTP/1.1\r\nHost: gate.test\r\nX: %s\r\n\r\n" % (b"a" * 900, b"y" * 900)
        for place in range(len(head)):
            assert wsgate.take_head(stream, 4096) is None
            stream.buffer += head[place:place + 1]
        assert wsgate.take_head(stream, 4096) == head
        assert CountedBytes.looked < 12 * len(head)


@pytest.mark.parametrize("size", [20000, 60000])
def test_client_header_size_is_the_only_limit_of_a_head(tmp_path, size):
    """Of a request line, of a field, of a number of fields; and of the head of a response."""
    head = b"HTTP/1.1 200 OK\r\n" + b"X-%d: y\r\n" * 2000 % tuple(
        range(2000)) + b"Content-Length: 0\r\n\r\n"
    with ScriptedBackend(respond(head)) as backend:
        ini = ini_for(backend, "client_header_size = 64k")
        with running(ini, tmp_path) as gate:
            for raw in (request(b"GET", b"/" + b"a" * size),
                        request(b"GET", b"/", b"X: " + b"y" * size),
                        request(b"GET", b"/",
                                *[b"X-%d: y" % number for number in range(size // 12)])):
                assert gate.fetch(raw).status == 200


@pytest.mark.parametrize("head", [
    b"HTTP/1.0 200 OK\nContent-Length: 2\nX-A: 1\n\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\nX-A: 1\r\n\n",
    b"HTTP/1.1 200 OK\nContent-Length: 2\r\nX-A: 1\n\r\n"])
def test_lines_of_a_response_head_may_end_with_lf(tmp_path, head):
    """Device servers write them so; the client gets CRLF."""
    for pieces in all_chunkings(head + b"ok"):
        def script(peer):
            peer.head()
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                peer.send(piece)

        with gate_and_backend(tmp_path, script) as (gate, _):
            response = gate.fetch(request())
            assert (response.status, response.body, response.get(b"x-a")) == (200, b"ok", b"1")
            assert response.head.count(b"\n") == response.head.count(b"\r\n")


# -------------------------------------------------------------- HTTP/1.1 bodies

# A chunked request body.
BAD_CHUNKS = table_rows((b"", (
    (b"5\nhello\r\n0\r\n\r\n", "bare LF after the size"),
    (b"5\rhello\r\n0\r\n\r\n", "bare CR after the size"),
    (b"5\r\r\nhello\r\n0\r\n\r\n", "CR CRLF after the size"),
    (b"5\r\nhello0\r\n\r\n", "no CRLF after the payload"),
    (b"5\r\nhello\n0\r\n\r\n", "bare LF after the payload"),
    (b"5\r\nhello\r0\r\n\r\n", "bare CR after the payload"),
    (b"5\r\nhello!\r\n0\r\n\r\n", "more payload than said"),
    (b"5\r\nhell\r\n0\r\n\r\n", "less payload than said"),
    (b"+5\r\nhello\r\n0\r\n\r\n", "plus sign"),
    (b"-5\r\nhello\r\n0\r\n\r\n", "minus sign"),
    (b"0x5\r\nhello\r\n0\r\n\r\n", "0x"),
    (b"0_5\r\nhello\r\n0\r\n\r\n", "underscore"),
    (b" 5\r\nhello\r\n0\r\n\r\n", "space before the size"),
    (b"\t5\r\nhello\r\n0\r\n\r\n", "tab before the size"),
    (b"5 5\r\nhello\r\n0\r\n\r\n", "two numbers"),
    (b"5,\r\nhello\r\n0\r\n\r\n", "comma"),
    (b"5h\r\nhello\r\n0\r\n\r\n", "h after the number"),
    (b"g\r\nhello\r\n0\r\n\r\n", "no hexadecimal digit"),
    (b"\xd9\xa5\r\nhello\r\n0\r\n\r\n", "chunk of an Arabic size"),
    (b"\r\nhello\r\n0\r\n\r\n", "no size"),
    (b";a=b\r\nhello\r\n0\r\n\r\n", "extension without size"),
    (b"10000000000000005\r\nhello\r\n0\r\n\r\n", "2^64 + 5"),
    (b"ffffffffffffffff\r\nhello\r\n0\r\n\r\n", "2^64 - 1"),
    (b"0" * 5000 + b"5\r\nhello\r\n0\r\n\r\n", "5000 zeros"),
    (b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n", "extension of 5000 bytes"),
    (b"5;" + b"a" * 5000, "extension that does not end"),
    (b"5;a\nhello\r\n0\r\n\r\n", "extension, bare LF"),
    (b"5;a\rb\r\nhello\r\n0\r\n\r\n", "extension, bare CR"),
    (b"5;a=\x00\r\nhello\r\n0\r\n\r\n", "extension, NUL"),
    (b"0\n\r\n", "last chunk, bare LF"),
    (b"0\r\n\n", "empty line, bare LF"),
    (b"0\r\nX: y\n\r\n", "trailer, bare LF"),
    (b"0\r\nX\r\n\r\n", "trailer without colon"),
    (b"0\r\n: y\r\n\r\n", "trailer without name"),
    (b"0\r\nX : y\r\n\r\n", "trailer, space before the colon"),
    (b"0\r\nX: y\r\n z\r\n\r\n", "trailer, folded"),
    (b"0\r\nX: \x00\r\n\r\n", "trailer, NUL"),
    (b"0\r\nGET / HTTP/1.1\r\n\r\n", "request for a trailer"),
    (b"0\r\n" + b"X: y\r\n" * 3000 + b"\r\n", "18k of trailers")), b""))


@pytest.mark.parametrize("raw, verdict", table_params(BAD_CHUNKS))
def test_malformed_chunked_bodies(raw, verdict):
    for pieces in some_chunkings(raw):
        body, passed = wsgate.ChunkedBody(), b""
        with pytest.raises(ValueError):
            for piece in pieces:
                passed += body.feed(piece, 0)
        assert not body.done and not passed.endswith(b"0\r\n\r\n")


def test_malformed_chunked_bodies_stay_incomplete(tmp_path):
    """No backend may take them for complete."""
    complete = []
    with gate_and_backend(tmp_path, lambda peer: complete.append(read_request(peer))) as (gate, _):
        for raw, why, verdict in BAD_CHUNKS:
            response = gate.fetch(CHUNKED_POST + raw)
            assert (why, "%d %s" % (response.status, response.reason)) == (why, verdict)
        assert not complete


@pytest.mark.parametrize("how", [b"whole", b"drip"])
def test_malformed_response_bodies(tmp_path, how):
    """The client must see that they are incomplete."""
    table = [(OK + row[0],) for row in BAD_RESPONSE_BODIES]
    with gate_and_backend(tmp_path, respond_by_row(table)) as (gate, _):
        for number, (_, why, reason) in enumerate(BAD_RESPONSE_BODIES):
            client = gate.connect().send(request(b"GET", b"/%d/%s" % (number, how)))
            with pytest.raises((ConnectionError, AssertionError)):
                client.response()
                pytest.fail("complete: " + why)
            assert "reason=" in gate.line("/%d/" % number, "reason=" + reason)
            client.close()


@pytest.mark.parametrize("tail", [b"GET / HTTP/1.1\r\n", b"\r\n", b"0\r\n\r\n"])
def test_ends_of_bodies(tail):
    assert body_through(lambda: wsgate.LengthBody(5), b"hello", tail) == b"hello"
    assert body_through(wsgate.ChunkedBody, b"0\r\n\r\n", tail) == b"0\r\n\r\n"
    assert body_through(wsgate.ChunkedBody, CHUNKED_IN, tail) == CHUNKED_OUT
    assert body_through(lambda: wsgate.ChunkedBody(decode=True), CHUNKED_IN,
                        tail) == b"hello, world0123456789"
    assert body_through(wsgate.UntilClose, b"hello" + tail) == b"hello" + tail


@pytest.mark.parametrize("body, cut", [(wsgate.LengthBody(5), b"hell"),
                                       (wsgate.ChunkedBody(), b"5\r\nhello\r\n"),
                                       (wsgate.ChunkedBody(), b"0\r\n"),
                                       (wsgate.UntilClose(), b"hell")])
def test_only_a_body_without_framing_may_end_with_the_stream(body, cut):
    body.feed(cut, 0)
    assert not body.done and body.at_end() == isinstance(body, wsgate.UntilClose)


def test_client_max_body_size_of_a_chunk():
    """A chunk is refused by its announced size."""
    body = wsgate.ChunkedBody(limit=8)
    assert body.feed(b"8\r\n12345678\r\n", 0) == b"8\r\n12345678\r\n"
    with pytest.raises(wsgate.HTTPError) as caught:
        body.feed(b"1\r\n", 0)
    assert (caught.value.status, caught.value.reason) == (413, "body_too_large")


@pytest.mark.parametrize("length", [b"7", b"0", b"2, 3", b"x"])
def test_chunked_wins_over_content_length_in_a_response(tmp_path, length):
    raw = OK + b"Content-Length: " + length + b"\r\n" + CHUNKED + b"2\r\nok\r\n0\r\n\r\n"
    with gate_and_backend(tmp_path, respond(raw)) as (gate, _):
        response = gate.fetch(request())
        assert (response.status, response.body) == (200, b"ok")
        assert not response.get(b"content-length")
        assert response.get(b"transfer-encoding") == b"chunked"
        assert gate.fetch(request().replace(b"HTTP/1.1", b"HTTP/1.0")).body == b"ok"


@pytest.mark.parametrize("name, line", [
    (b"X-Real-Ip", ""), (b"X-Forwarded-Anything", ""), (b"Authorization", ""), (b"X-Listed", ""),
    (b"X_Underscored", ""),
    (b"X-Set", "proxy_set_header = X-Set: 1"),
    (b"X-Identity", "auth_request = http://BACKEND\nauth_request_headers = X-Identity")])
def test_a_trailer_that_would_be_trusted_is_dropped(tmp_path, name, line):
    bodies = []

    def script(peer):
        head = peer.head()
        if b"chunked" in head:
            bodies.append(peer.read_until(b"\r\n\r\n"))
        peer.send(ok())

    with ScriptedBackend(script) as backend:
        with running(("[server]\n[location /]\nproxy_pass = http://BACKEND\n"
                      + line).replace("BACKEND", backend.where),
                     tmp_path) as gate:
            raw = request(b"POST", b"/", b"Transfer-Encoding: chunked", b"Connection: X-Listed")
            assert gate.fetch(raw + b"0\r\n" + name + b": me\r\nX-Sum: 7\r\n\r\n").status == 200
            assert bodies == [b"0\r\nX-Sum: 7\r\n\r\n"]


def test_chunked_bodies_are_rewritten(tmp_path):
    """Without extensions and without forbidden trailers."""
    with http_exchange(tmp_path, CHUNKED_POST + CHUNKED_IN) as (_, client, peer, head):
        assert field(head, b"transfer-encoding") == [b"chunked"]
        assert peer.read(len(CHUNKED_OUT)) == CHUNKED_OUT
        peer.send(b"HTTP/1.1 200 OK\r\nTrailer: X-Checksum\r\nTransfer-Encoding: chunked\r\n\r\n"
                  + CHUNKED_IN)
        head = client.head()
        assert (field(head, b"transfer-encoding"),
                field(head, b"trailer")) == ([b"chunked"], [b"X-Checksum"])
        assert client.read(len(CHUNKED_OUT)) == CHUNKED_OUT and client.silent(20 * MS)


@pytest.mark.parametrize("raw, status", [
    (request(b"POST", body=b"x" * 8), 200), (request(b"POST", body=b"x" * 9), 413),
    (CHUNKED_POST + chunked_body(b"x" * 4, b"y" * 4), 200),
    (CHUNKED_POST + chunked_body(b"x" * 4, b"y" * 5), 413),
    (CHUNKED_POST + b"fffffffffffffff\r\n", 413)])
def test_client_max_body_size_holds_for_both_framings(tmp_path, raw, status):
    complete = []

    def script(peer):
        complete.append(read_request(peer)[1])
        peer.send(ok())

    with gate_and_backend(tmp_path, script, "client_max_body_size = 8") as (gate, backend):
        response = gate.fetch(raw)
        assert (response.status, response.reason) == (status,
                                                      "body_too_large" if status == 413 else "")
        assert len(complete) == (status == 200)
        assert (b"Content-Length: 9" not in raw or not backend.connections)


def test_dropped_trailers(tmp_path):
    head = request(b"POST", b"/", b"Transfer-Encoding: chunked", b"Connection: X-Hop")
    lines = ["proxy_set_header = X-User: none"]
    with http_exchange(tmp_path, head + chunked_body(b"x")[:-2] + b"X-User: root\r\nX-Hop: 1\r\n"
                       b"X-Forwarded-User: root\r\nX-Sum: 1\r\n\r\n",
                       *lines) as (_, client, peer, head):
        assert peer.read_until(b"0\r\n") == b"1\r\nx\r\n0\r\n"
        assert peer.read_until(b"\r\n\r\n") == b"X-Sum: 1\r\n\r\n"
        peer.send(ok())
        assert client.response().status == 200


# ---------------------------------------------------------------------- Routing

ROUTES = ["/", "/chat", "/chat/deep/", "= /exact", "/exact/", "host.test/", "host.test/chat/",
          "= host.test/exact", "*.test/", "*.sub.test/", "[::1]/v6", "/caf\u00e9/", "/a+b/"]


@pytest.mark.parametrize("host, path, name", [
    ("any", "/", "/"), ("any", "/chatter", "/"), ("any", "/chat", "/chat"),
    ("any", "/chat/", "/chat"), ("any", "/chat/x", "/chat"), ("any", "/chat/deep", "/chat"),
    ("any", "/chat;x=1", "/chat"), ("any", "/chat/deep/x", "/chat/deep/"),
    ("any", "/exact", "= /exact"), ("any", "/exact/", "/exact/"), ("any", "/exactly", "/"),
    ("any", "/CHAT", "/"), ("host.test", "/", "host.test/"), ("host.test", "/chat", "host.test/"),
    ("host.test", "/chat/", "host.test/chat/"), ("host.test", "/exact", "= host.test/exact"),
    ("HOST.test.", "/", "host.test/"), ("a.test", "/", "*.test/"), ("b.a.test", "/", "*.test/"),
    ("a.sub.test", "/", "*.sub.test/"), ("sub.test", "/", "*.test/"), ("test", "/", "/"),
    ("attest", "/chat", "/chat"), ("a.test:80", "/", "*.test/"), ("any", "/%63hat/x", "/chat"),
    ("any", "//chat///x", "/chat"), ("any", "/chat%2Fdeep%2Fx", "/chat/deep/"),
    ("any", "/%2fchat%2fdeep%2f", "/chat/deep/"), ("any", "/chat%3Bx", "/chat"),
    ("any", "/chat%5Cx", "/"), ("any", "/chat/%64eep//x", "/chat/deep/"),
    ("any", "/chat?/chat/deep/", "/chat"), ("any", "/caf%C3%A9/x", "/caf\u00e9/"),
    ("any", "/caf%E9/x", "/"), ("any", "/a%2Bb/", "/a+b/"), ("[::1]", "/v6", "[::1]/v6"),
    ("[::1]:80", "/v6/x", "[::1]/v6"), ("[::1]", "/v", "/"), ("any", "/x/y/", "/"),
])
def test_most_specific_location(tmp_path, host, path, name):
    config = load_text(tmp_path, SERVER + "".join(
        "[location %s]\n" % ("= " + each[2:] if each.startswith("=") else each) for each in ROUTES))
    message = wsgate.parse_request_head(request(b"GET", path.encode(), b"Host: " + host.encode()))
    assert config.route(message.host, message.path).name == name


def test_a_host_without_the_path(tmp_path):
    """The next host group takes the request."""
    config = load_text(tmp_path, "".join("[location %s]\n%s" % (name, PASS) for name in
                                         ("a.b.test/x", "*.b.test/y", "*.test/z", "/w")))
    assert [config.route("a.b.test", path).name for path in ("/x", "/y", "/z", "/w")] == [
        "a.b.test/x", "*.b.test/y", "*.test/z", "/w"]
    assert config.route("a.b.test", "/other") is None and config.route("other", "/x") is None


def test_a_location_of_a_wildcard_host_may_be_the_only_one(tmp_path):
    config = load_text(tmp_path, "[location *.b.test/]\n" + PASS)
    assert config.route("a.b.test", "/x").name == "*.b.test/"
    assert config.route("b.test", "/x") is None and config.route("ab.test", "/x") is None


def test_exact_root(tmp_path):
    config = load_text(tmp_path, SERVER + "[location = /]\nreturn = 200 here\n")
    assert config.route("any", "/").name == "= /" and config.route("any", "/x").name == "/"


def test_unknown_path_is_404(tmp_path):
    with ScriptedBackend(respond(ok())) as backend:
        with running("[server]\n[location /a/]\nproxy_pass = http://%s\n" % backend.where,
                     tmp_path) as gate:
            response = gate.fetch(request(b"GET", b"/a/%2e%2e/b"))
            assert (response.status, response.reason) == (400, "bad_request")
            response = gate.fetch(request(b"GET", b"/b"))
            assert (response.status, response.reason) == (404, "no_route")
            assert response.body.startswith(b"404 Not Found: no_route")
            assert not backend.connections
            assert gate.fetch(request(b"GET", b"/a/")).status == 200


def test_the_bytes_of_a_target_reach_the_backend_unchanged(tmp_path):
    targets = [b"/", b"//a///b", b"/%7Euser/%c3%A9", b"/a%2Fb", b"/a%5Cb", b"/caf\xe9\xff?\x80",
               b"/a?", b"/a?b=%zz&../..\\\"<>|^", b"/a;b=c/...x/..y", b"/a?x=/../y", b"/a%252e",
               b"/a?b?c", b"/" + b"x" * 4000]
    assert targets_at_backend(tmp_path, "[server]\nproxy_pass = http://BACKEND\n",
                              [request(b"GET", target) for target in targets]) == targets


def test_absolute_form_and_asterisk_form(tmp_path):
    """The first is sent in origin-form, the second stays (RFC 9112 3.2)."""
    absolute = {b"ws://gate.test/a": b"/a", b"WSS://gate.test?b": b"/?b", b"http://gate.test": b"/",
                b"http://gate.test/": b"/", b"HTTP://Gate.test/a//b?c//d": b"/a//b?c//d",
                b"https://gate.test?a=b": b"/?a=b",
                b"http://gate.test?back=/home/x": b"/?back=/home/x"}
    options = {b"*": b"*", b"/": b"/", b"http://gate.test": b"*", b"http://gate.test/": b"/",
               b"http://gate.test?a": b"/?a"}
    raw = [request(b"GET", target) for target in absolute] + [
        request(b"OPTIONS", target) for target in options]
    ini = "[server]\n[location /]\nproxy_pass = http://BACKEND\n"
    assert targets_at_backend(tmp_path, ini,
                              raw) == list(absolute.values()) + list(options.values())


@pytest.mark.parametrize("location, uri, targets", [
    ("/chat/", "/", {b"/chat/": b"/", b"/chat/a/b?c": b"/a/b?c", b"/%63hat/%41": b"/%41",
                     b"//chat//a": b"/a"}),
    ("/chat/", "/v2/x", {b"/chat/a": b"/v2/xa", b"/chat/": b"/v2/x"}),
    ("/chat", "/app", {b"/chat": b"/app", b"/chat/a": b"/app/a", b"/chat?a=b": b"/app?a=b",
                       b"/ch%61t/%2Fa": b"/app/%2Fa"}),
    ("/caf\u00e9/", "/x/", {b"/caf%C3%A9/%c3%a9": b"/x/%c3%a9"}),
    ("/", "/sub/", {b"/": b"/sub/", b"/a": b"/sub/a", b"//a": b"/sub/a"}),
    ("= /one", "/other", {b"/one": b"/other", b"/one?a": b"/other?a", b"/%6fne": b"/other"}),
])
def test_a_uri_in_proxy_pass_replaces_the_matched_prefix(tmp_path, location, uri, targets):
    config = load_text(tmp_path, "[location %s]\nproxy_pass = http://127.0.0.1:9%s\n"
                       % (location, uri))
    for target, wanted in targets.items():
        message = wsgate.parse_request_head(request(b"GET", target))
        location = config.route("any", message.path)
        assert location.rewrite(message, location.proxy.uri) == wanted


def test_uri_after_a_unix_socket(tmp_path):
    path = os.path.join(str(tmp_path), "app.sock")
    with ScriptedBackend(respond(ok(b"by unix")), path=path) as backend:
        with running("[location /a/]\nproxy_pass = http://%s:/b/\n[server]\n" % backend.where,
                     tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"/a/x")).body == b"by unix"
            assert " unix:%s " % path in gate.line("/a/x")


def test_return(tmp_path):
    ini = ("[server]\n"
           "[location /code]\nreturn = 204\n"
           "[location /text]\nreturn = 200 hello $http_user_agent, 100%\n"
           "[location /gone]\nreturn = 410 no longer here\n"
           "[location /go/]\nreturn = 308 https://$host:8443$request_uri\n")
    with running(ini, tmp_path) as gate:
        assert gate.fetch(request(b"GET", b"/code")).status == 204
        response = gate.fetch(request(b"GET", b"/text", b"User-Agent: me"))
        assert (response.status, response.body) == (200, b"hello me, 100%")
        response = gate.fetch(request(b"GET", b"/gone"))
        assert (response.status, response.body) == (410, b"no longer here")
        response = gate.fetch(request(b"GET", b"/go/%7Ea?b=c", b"Host: gate.test:80"))
        assert (response.status, response.body) == (308, b"")
        assert response.get(b"location") == b"https://gate.test:8443/go/%7Ea?b=c"
        assert " 308 done /go/ - " in gate.line("/go/")
        first = gate.connect().send(request(b"GET", b"/code"), request(b"GET", b"/text"))
        assert [first.response().status for _ in range(2)] == [204, 200]  # the connection stays
        first.close()


def test_braces_in_a_text_with_variables(tmp_path):
    """${name} is $name; a brace without its other half is text, as in JSON."""
    ini = '[server]\nreturn = 200 {"is": ${scheme}s, ${, "${host": {$host}}\n'
    with running(ini, tmp_path) as gate:
        assert gate.fetch(request()).body == b'{"is": https, ${, "${host": {gate.test}}'


def test_proxy_set_header_sets_and_removes_fields(tmp_path):
    lines = ["proxy_set_header =", "X-Host: $host", "X-Client: $remote_addr", "X-Scheme: $scheme",
             "X-Uri: $request_uri", "X-Port: $server_port", "X-Chain: $proxy_add_x_forwarded_for",
             "X-Agent: <${http_user_agent}>", "Host: inner.test", "Accept-Encoding:",
             "X-Absent: $http_absent", "X-Real-IP: 192.0.2.9", "Origin: http://$host"]
    with gate_and_backend(tmp_path, respond(ok()), "\n  ".join(lines)) as (gate, backend):
        heads = []
        backend.script = lambda peer: (heads.append(peer.head()), peer.send(ok()))
        gate.fetch(request(b"GET", b"/a%20b?c", b"Host: Gate.test:123", b"User-Agent: me",
                           b"accept-encoding: br",
                           b"X-HOST: lie", b"Origin: http://evil.test",
                           b"X-Forwarded-For: 192.0.2.1"))
    wanted = {b"X-Host": b"gate.test", b"X-Client": b"127.0.0.1", b"X-Scheme": b"http",
              b"X-Uri": b"/a%20b?c",
              b"X-Port": b"%d" % gate.port, b"X-Chain": b"127.0.0.1", b"X-Agent": b"<me>",
              b"Host": b"inner.test",
              b"X-Real-IP": b"192.0.2.9", b"Origin": b"http://gate.test"}
    for name, value in wanted.items():
        assert field(heads[0], name) == [value]
    assert not field(heads[0], b"accept-encoding") and not field(heads[0], b"x-absent")


GUARDED = ("[server]\n[location /]\nproxy_pass = http://%s\n"
           "[location /admin/]\nproxy_pass = http://%s\n%s\n")
WAYS_TO_ADMIN = [
    b"/admin/", b"/admin/x", b"/admin", b"/admin?x", b"/admin%2Fx", b"/%2fadmin/x",
    b"/%2Fadmin%2fx", b"/admin%2f", b"//admin/x", b"///admin///x", b"/%2f%2Fadmin/x", b"/%61dmin/x",
    b"/%61%64%6D%69%6e/x", b"http://gate.test/admin%2Fx", b"ws://gate.test//admin/x",
    b"//x/admin/x", b"///x/admin/x", b"//me@x:80/admin", b"//x/%61dmin/", b"//x%2Fy/admin/x",
    b"/%2Fx/admin/x", b"//x%2Fadmin/x", b"http://gate.test//x/admin/x", b"/admin;a=b",
    b"/admin;a=b/x", b"/;a/admin/x", b"/;a%2Fb/admin/x", b"/admin/;a", b"/admin%5Cx",
    b"/%5Cadmin/x", b"/%5Cadmin%5Cx", b"/adm%FFin/x", b"/admin\xff/x", b"/%C0%AFadmin/x",
    b"//x;y/admin/x", b"/admin%3Fx", b"/admin%23"]


@pytest.mark.parametrize("target", WAYS_TO_ADMIN)
def test_guard_of_a_prefix(tmp_path, target):
    """It holds for every spelling that a backend may decode to the prefix."""
    with ScriptedBackend(respond(ok())) as backend:
        with running(GUARDED % (backend.where, backend.where, "deny = all"), tmp_path) as gate:
            response = gate.fetch(request(b"GET", target))
            assert (response.status, response.reason) == (403, "access_denied")
            assert not backend.connections


@pytest.mark.parametrize("target", [b"/administrator", b"/x/admin/", b"/%252Fadmin/",
                                    b"/admin%252Fx", b"/x?/admin/", b"/x//admin/", b"/x;/admin/",
                                    b"/ADMIN/x"])
def test_a_guard_leaves_other_paths_alone(tmp_path, target):
    with ScriptedBackend(respond(ok())) as backend:
        with running(GUARDED % (backend.where, backend.where, "deny = all"), tmp_path) as gate:
            assert gate.fetch(request(b"GET", target)).status == 200
            assert backend.connections


def test_target_with_two_readings(tmp_path):
    """It must pass the guards of both."""
    users = write_file(tmp_path, "users", sha1_line("ann", b"one"))
    with ScriptedBackend(
            respond(ok(b"root"))) as root, ScriptedBackend(respond(ok(b"admin"))) as admin:
        ini = GUARDED % (root.where, admin.where, "auth_basic_user_file = " + users)
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"//x/admin/y")).status == 401
            assert gate.fetch(request(b"GET", b"//x/admin/y",
                                      basic(b"ann", b"one"))).body == b"root"
            assert gate.fetch(request(b"GET", b"//x/other")).body == b"root"
        with running(GUARDED % (root.where, admin.where, "[location /admin/x/]\nreturn = 403"),
                     tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"//x/admin/x")).status == 403
            assert gate.fetch(request(b"GET", b"/admin/x")).status == 403
            assert gate.fetch(request(b"GET", b"//admin/y")).body == b"admin"


@pytest.mark.parametrize("key", ["auth_request_headers = X-User",
                                 "proxy_set_header = X-User: $remote_user"])
def test_fields_that_another_guard_sets(tmp_path, key):
    """//x/admin/y is served by [location /], but may be /admin/y to the backend."""
    raw = [b"X-User: root", b"x-USER: root", b"Transfer-Encoding: chunked"]
    with ScriptedBackend(respond(ok())) as auth, ScriptedBackend() as backend:
        lines = "auth_request = http://%s/\n%s" % (auth.where, key)
        with running(GUARDED % (backend.where, backend.where, lines), tmp_path) as gate:
            for number, (target, known) in enumerate(((b"//x/admin/y", 0), (b"/x", 1))):
                client = gate.connect().send(request(b"GET", target, *raw),
                                             b"0\r\nX-User: root\r\n\r\n")
                peer = backend.connection(number)
                assert len(field(peer.head(), b"x-user")) == 2 * known
                assert read_chunked_body(peer) == (b"", [b"X-User: root"] * known)
                peer.send(ok())
                assert client.response().status == 200
                client.close()


def test_return_guards_unless_the_first_location_is_below_it(tmp_path):
    """Whatever their lengths: //application/in/x is /in/x to backends that take it for a host."""
    ini = ("[server]\n[location /]\nreturn = 404\n[location /in/]\nreturn = 403\n"
           "[location /application/]\nproxy_pass = http://%s\n")
    with ScriptedBackend(respond(ok())) as backend:
        with running(ini % backend.where, tmp_path) as gate:
            statuses = [gate.fetch(request(b"GET", target)).status for target in (
                b"//application/in/x", b"//application/x", b"/application/in/x")]
            assert statuses == [403, 200, 200]


def test_prefix_without_its_slash(tmp_path):
    """It is forwarded as it came, without a redirect: some backends redirect the other way."""
    ini = ("[server]\n[location /app/]\nproxy_pass = http://BACKEND\n[location /both/]\n"
           "return = 204\n"
           "[location /both]\nproxy_pass = http://BACKEND\n[location /only/]\n"
           "proxy_pass = http://BACKEND\n"
           "[location = /only]\nproxy_pass = http://BACKEND/exact\n[location a.test/]\n"
           "proxy_pass = http://BACKEND\n"
           "[location a.test/x/]\nproxy_pass = http://127.0.0.1:1\n")
    assert targets_at_backend(tmp_path, ini, [request(b"GET", target) for target in (
        b"/app", b"/app?a=b", b"/%61pp", b"/both",
        b"/only")] + [request(b"GET", b"/x", b"Host: a.test")]) == [
            b"/app", b"/app?a=b", b"/%61pp", b"/both", b"/exact", b"/x"]


@pytest.mark.parametrize("target, location", [
    (b"/caf\xc3\xa9", b"/caf%C3%A9/"), (b"/caf%c3%a9?", b"/caf%C3%A9/?"),
    (b"//caf%c3%a9", b"/caf%C3%A9/"),
    (b"http://gate.test/caf%c3%a9?next=//evil.test/%0d%0a&x=\xe9",
     b"/caf%C3%A9/?next=//evil.test/%0d%0a&x=%E9")])
def test_a_replaced_prefix_without_its_slash_is_redirected(tmp_path, target, location):
    ini = ("[server]\n[location /caf\u00e9/]\nproxy_pass = http://127.0.0.1:1/\n"
           "[location /]\nreturn = 204\n")
    with running(ini, tmp_path) as gate:
        response = gate.fetch(request(b"GET", target))
        assert (response.status, response.get(b"location")) == (301, location)
        assert gate.line(" 301 done ")


# --------------------------------------------------------------- Access control


@BOTH_WAYS
def test_order_of_refusals(tmp_path, raw):
    """None of them reaches the backend."""
    passwords = write_file(tmp_path, "users", sha1_line("ann", b"secret"))
    with ScriptedBackend() as backend, refusing_port() as dead:
        plain = "[server]\n[location /in/]\nproxy_pass = http://%s\n" % backend.where
        hurdles = [("max_connections = 1", 503, "conn_limit"), ("deny = all", 403, "access_denied"),
                   ("allowed_origins = same", 403, "origin_denied"),
                   ("auth_basic_user_file = " + passwords, 401, "auth_required"),
                   ("auth_request = http://" + dead.where, 502, "auth_unavailable")]
        with running(plain, tmp_path) as gate:
            inside = gate.connect().send(handshake(b"/in/"))  # takes the only place
            backend.connection()
            answer = gate.fetch(raw(b"/out/"))
            assert (answer.status, answer.reason) == (404, "no_route")
            for place, (_, status, reason) in enumerate(hurdles):
                reload(gate, plain + "\n".join(line for line, _, _ in hurdles[place:]))
                answer = gate.fetch(raw(b"/in/", b"Origin: https://evil.test"))
                assert (answer.status, answer.reason) == (status, reason)
                assert len(backend.connections) == 1
            reload(gate, plain)
            with contextlib.closing(
                    gate.connect().send(raw(b"/in/", b"Origin: https://evil.test"))):
                assert backend.connection(1).head()
            for peer in backend.connections + [inside]:
                peer.close()


@pytest.mark.parametrize("address, networks, expected", [
    ("127.0.0.1", "127.0.0.0/8", True), ("128.0.0.1", "127.0.0.0/8", False),
    ("10.0.0.7", "10.0.0.7", True), ("::ffff:127.0.0.1", "127.0.0.0/8", True),
    ("::ffff:128.0.0.1", "127.0.0.0/8", False), ("2001:db8::1", "2001:db8::/32 10.0.0.0/8", True),
    ("2001:db9::1", "2001:db8::/32", False), ("fe80::1%eth0", "fe80::/10", True),
    ("10.1.1.1", "all", True), ("::1", "all", True), ("::1", "", False), ("unix:", "all", True),
    ("nonsense", "all", False), ("::ffff:10.0.0.9", "::ffff:10.0.0.0/104", True),
    ("10.0.0.9", "::ffff:10.0.0.9", True), ("unix:", "10.0.0.1 unix:", True),
    ("unix:", "10.0.0.1", False), ("nonsense", "unix:", False), ("10.0.0.1", "unix:", False),
    ("10.0.0.1", "unix: 10.0.0.1", True)])
def test_an_address_is_trusted_if_a_network_has_it(address, networks, expected):
    assert wsgate.trusted(wsgate.parse_networks(networks), address) is expected


@pytest.mark.parametrize("allow, deny, address, passes", [
    ("", "", "10.0.0.1", True), ("10.0.0.0/8", "", "10.0.0.1", True),
    ("10.0.0.0/8", "", "11.0.0.1", False), ("10.0.0.0/8", "10.0.0.1", "10.0.0.1", False),
    ("", "10.0.0.1", "10.0.0.2", True), ("", "10.0.0.1", "::ffff:10.0.0.1", False),
    ("10.0.0.0/8", "", "::ffff:10.0.0.1", True), ("", "all", "::1", False),
    ("unix:", "", "unix:", True), ("all", "", "unix:", True), ("10.0.0.0/8", "", "unix:", False),
    ("", "", "unix:", True), ("", "all", "unix:", False), ("all", "unix:", "unix:", False),
    ("", "::ffff:127.0.0.0/104", "127.0.0.1", False), ("::ffff:10.0.0.0/104", "", "10.0.0.1", True),
    ("10.0.0.0/8", "all", "10.0.0.1", True), ("10.0.0.0/8", "all", "11.0.0.1", False),
    ("10.0.0.0/8", "all", "::1", False), ("all", "10.0.0.0/8", "10.0.0.1", False),
    ("all", "10.0.0.0/8", "11.0.0.1", True), ("10.0.0.1", "10.0.0.1", "10.0.0.1", False),
    ("10.0.0.0/8 10.1.1.1", "10.1.0.0/16", "10.1.1.1", True),
    ("10.0.0.0/8 10.1.1.1", "10.1.0.0/16", "10.1.1.2", False), ("unix:", "all", "unix:", True),
    ("unix:", "all", "10.0.0.1", False), ("all", "all", "unix:", False),
    ("::ffff:10.0.0.0/104", "all", "10.0.0.1", True)])
def test_allow_and_deny(allow, deny, address, passes):
    """The narrowest network decides; allow refuses all others."""
    rules = wsgate.Settings({"allow": wsgate.parse_networks(allow),
                             "deny": wsgate.parse_networks(deny)})
    with contextlib.ExitStack() as stack:
        caught = None if passes else stack.enter_context(pytest.raises(wsgate.HTTPError))
        wsgate.check_address(rules, address)
    assert passes or (caught.value.status, caught.value.reason) == (403, "access_denied")


@pytest.mark.parametrize("allowed, host, origins, passes", [
    ("any", "gate.test", ["https://evil.test"], True),
    ("any", "gate.test", ["a", "b"], True),
    ("same", "gate.test", [], True),
    ("https://a.test", "gate.test", [], True),
    ("same", "gate.test", ["http://gate.test"], True),
    ("same", "gate.test", ["https://GATE.test"], True),
    ("same", "gate.test:8080", ["http://gate.test:8080"], True),
    ("same", "gate.test", ["https://gate.test:8443"], False),
    ("same", "gate.test:443", ["https://gate.test"], True),
    ("same", "gate.test:80", ["https://gate.test"], False),
    ("same", "gate.test", ["https://evil.test"], False),
    ("same", "gate.test", ["null"], False),
    ("same", "gate.test", ["http://gate.test.evil.test"], False),
    ("same", "gate.test", ["http://gate.test", "http://gate.test"], False),
    ("null", "gate.test", ["null"], True),
    ("https://a.test, https://b.test", "gate.test", ["https://b.test"], True),
    ("https://a.test", "gate.test", ["http://a.test"], False),
    ("https://a.test", "gate.test", ["https://a.test:444"], False),
    ("https://a.test", "gate.test", ["https://axtest"], False),
    ("https://a.test:*", "gate.test", ["https://a.test:444"], True),
    ("https://*.a.test", "gate.test", ["https://x.a.test"], True),
    ("https://*.a.test", "gate.test", ["https://a.test"], False),
    ("https://*.a.test", "gate.test", ["https://evil-a.test"], False),
    ("https://*.a.test", "gate.test", ["https://evil.test/.a.test"], False),
    ("https://*.a.*", "gate.test", ["https://x.a.test"], True),
    ("https://*a*b.test", "gate.test", ["https://ab.test"], True),
    ("https://*ab*b.test", "gate.test", ["https://ab.test"], False),
    ("https://*", "gate.test", ["https://" + "x" * 504], True),
    ("https://*", "gate.test", ["https://" + "x" * 505], False),
    ("same", "gate.test", ["chrome-extension://gate.test"], False),
    ("same", "gate.test", ["file://gate.test"], False),
    ("same", "gate.test", ["gate.test"], False)])
def test_origins(allowed, host, origins, passes):
    location = origins_allowed(allowed)
    fields = [b"Host: " + host.encode()] + [b"Origin: " + origin.encode() for origin in origins]
    message = wsgate.parse_request_head(request(b"GET", b"/", *fields))
    with contextlib.ExitStack() as stack:
        if not passes:
            stack.enter_context(pytest.raises(wsgate.HTTPError, match="Origin"))
        assert wsgate.check_origin(location, message, wsgate.Settings({"trusted": False})) is None


def origins_allowed(text):
    return wsgate.Settings({"allowed_origins": wsgate.parse_origins(text)})


def test_origins_are_compiled_with_the_configuration(monkeypatch):
    """To compile hundreds of them for each handshake took 40 ms."""
    location = origins_allowed(" ".join("https://a%d.test" % number for number in range(600)))
    monkeypatch.setattr(wsgate, "pattern_of", None)
    for origin, passes in ((b"https://a599.test", True), (b"https://b.test", False)):
        message = wsgate.parse_request_head(request(b"GET", b"/", b"Origin: " + origin))
        with contextlib.ExitStack() as stack:
            if not passes:
                stack.enter_context(pytest.raises(wsgate.HTTPError, match="Origin"))
            wsgate.check_origin(location, message, wsgate.Settings({"trusted": False}))


def test_an_origin_is_compared_in_linear_time():
    """Each literal of a glob is looked for once: no text can be tried in every combination."""
    pattern, begun = wsgate.pattern_of("*a" * 20 + "*b"), time.monotonic()
    assert not pattern.fullmatch("a" * 500)
    assert time.monotonic() - begun < 500 * MS


@pytest.mark.parametrize("believed, public, private",
                         [("127.0.0.1", 101, 403), ("10.0.0.1", 403, 101)])
def test_same_origin_and_x_forwarded_host(tmp_path, believed, public, private):
    lines = "allowed_origins = same", "set_real_ip_from = " + believed
    with gate_and_backend(tmp_path, echo_service, *lines) as (gate, _):
        assert gate.fetch(handshake(b"/", b"Origin: https://public.test:8443",
                                    b"X-Forwarded-Host: public.test:8443")).status == public
        assert gate.fetch(handshake(b"/", b"Origin: https://public.test",
                                    b"X-Forwarded-Host: public.test, b.test")).status == public
        assert gate.fetch(handshake(b"/", b"Origin: https://gate.test",
                                    b"X-Forwarded-Host: public.test")).status == private


def test_denied_origin_in_the_log(tmp_path):
    """With the host that it was compared to."""
    with gate_and_backend(tmp_path, None, "allowed_origins = same") as (gate, backend):
        answer = gate.fetch(handshake(b"/", b"Origin: https://evil.test"))
        assert (answer.status, answer.reason) == (403, "origin_denied") and not backend.connections
        assert gate.line("reason=origin_denied", "https://evil.test", "Host is gate.test")


@pytest.mark.skipif(not hasattr(hashlib, "scrypt"), reason="this Python has no scrypt")
def test_passwords_of_every_scheme_are_checked(tmp_path):
    salt = b"0123456789abcdef"
    digest = hashlib.scrypt(b"three", salt=salt, n=1 << 14, r=8, p=1)
    scrypt = base64.b64encode(salt + digest).decode()
    users = write_file(tmp_path, "users",
                       "# people\n" + sha1_line("ann", b"one") + sha1_line("bob", b"two", b"salt")
                       + "eve:{SCRYPT}%s\n" % scrypt)
    with running("[server]\nreturn = 200 in\nauth_basic_user_file = %s\n" % users,
                 tmp_path) as gate:
        for user, password in ((b"ann", b"one"), (b"bob", b"two"), (b"eve", b"three"),
                               (b"eve", b"three")):
            assert gate.fetch(request(b"GET", b"/", basic(user, password))).status == 200
        for line in (basic(b"ann", b"two"), basic(b"bob", b"one"), basic(b"eve", b"one"),
                     basic(b"zoe", b"one"), basic(b"", b""), b"X-None: 1",
                     b"Authorization: Basic ?", b"Authorization: Bearer one"):
            answer = gate.fetch(request(b"GET", b"/", line))
            assert (answer.status, answer.reason) == (401, "auth_required"), line
            assert answer.get(b"www-authenticate").startswith(b'Basic realm="')


def test_password_hash_of_a_python_without_scrypt(tmp_path, monkeypatch):
    """It is one that the same Python can check."""
    monkeypatch.delattr(hashlib, "scrypt", raising=False)
    users = write_file(tmp_path, "users", "ann:%s\n" % wsgate.hash_password(b"one").decode())
    with running("[server]\nreturn = 200\nauth_basic_user_file = %s\n" % users,
                 tmp_path) as gate:
        for password, status in ((b"one", 200), (b"two", 401)):
            assert gate.fetch(request(b"GET", b"/", basic(b"ann", password))).status == status


def test_changed_password_file(tmp_path):
    """A broken one is ignored."""
    users = write_file(tmp_path, "users", sha1_line("ann", b"old"))
    with running("[server]\nreturn = 200 in\nauth_basic_user_file = %s\n" % users,
                 tmp_path) as gate:
        def status(password):
            return gate.fetch(request(b"GET", b"/", basic(b"ann", password))).status
        assert (status(b"old"), status(b"newer")) == (200, 401)
        write_file(tmp_path, "users", sha1_line("ann", b"newer", b"salt"))
        assert (status(b"old"), status(b"newer")) == (401, 200)
        write_file(tmp_path, "users", "ann:broken\n")
        assert (status(b"old"), status(b"newer")) == (401, 200)
        assert any("auth_basic_user_file" in line for line in gate.errors)
        os.unlink(users)
        assert status(b"newer") == 200


def test_bcrypt_is_an_error(tmp_path):
    users = write_file(tmp_path, "users",
                       sha1_line("ann", b"one") + "bob:$2y$05$bvIG6Nmid91Mu9RcmmWZfO\n")
    error, = errors_of(tmp_path,
                       "[server]\nproxy_pass = http://127.0.0.1:1\nauth_basic_user_file = %s\n"
                       % users)
    assert "users:2" in error and "--hash-password" in error


@pytest.mark.parametrize("said, status, reason", [
    (ok(), 200, ""),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 200, ""),
    (b"HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer\r\nSet-Cookie: a=1\r\nX-Other: 1\r\n\r\n", 401,
     "auth_denied"),
    (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", 403, "auth_denied"),
    (b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n", 502,
     "auth_unavailable"),
    (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", 502, "auth_unavailable"),
    (b"", 502, "auth_unavailable"),
    (b"rubbish\r\n\r\n", 502, "auth_unavailable")],
    ids=["200", "204", "401", "403", "302", "500", "closed", "rubbish"])
@BOTH_WAYS
def test_auth_request(tmp_path, raw, said, status, reason):
    """A failure of the service refuses the request."""
    with ScriptedBackend(respond(said)) as asked:
        with gate_and_backend(tmp_path, echo_service,
                              "auth_request = http://" + asked.where) as (gate, backend):
            response = gate.fetch(raw(b"/"))
            passed = 101 if raw is handshake else 200
            assert (response.status, response.reason) == (passed if status == 200 else status,
                                                          reason)
            assert len(backend.connections) == (status == 200) and len(asked.connections) == 1
            if b"Bearer" in said:
                assert (response.get(b"www-authenticate"),
                        response.get(b"set-cookie")) == (b"Bearer", b"a=1")
                assert response.get(b"x-other") is None


def test_request_to_the_auth_service(tmp_path):
    """It has neither the handshake nor the body."""
    heads = []

    def yes(peer):
        heads.append(peer.head())
        assert not peer.buffer
        peer.send(ok())

    with ScriptedBackend(yes) as asked:
        with gate_and_backend(tmp_path, echo_service,
                              "auth_request = http://%s/check" % asked.where) as (gate, _):
            assert gate.fetch(handshake(b"/chat?a=1", b"Cookie: id=7", b"Origin: https://a.test",
                                        b"X-Original-URI: /forged")).status == 101
            assert gate.fetch(request(b"POST", b"/form", b"Content-Type: text/plain",
                                      body=b"12345")).status == 200
    for head, uri in zip(heads, (b"/chat?a=1", b"/form")):
        assert head.startswith(b"GET /check HTTP/1.1\r\n")
        assert field(head, b"x-original-uri") == [uri] and field(head, b"connection") == [b"close"]
        for name in (b"upgrade", b"sec-websocket-key", b"content-length", b"transfer-encoding",
                     b"expect"):
            assert not field(head, name), name
    assert field(heads[0], b"cookie") == [b"id=7"]
    assert field(heads[0], b"origin") == [b"https://a.test"]
    assert field(heads[1], b"x-original-method") == [b"POST"]


@pytest.mark.parametrize("header, believed, fields, client", [
    ("X-Forwarded-For", "127.0.0.1", [b"X-Forwarded-For: 203.0.113.9"], b"203.0.113.9"),
    ("X-Forwarded-For", "127.0.0.1", [b"X-Forwarded-For: 6.6.6.6, 203.0.113.9"], b"203.0.113.9"),
    ("X-Forwarded-For", "127.0.0.0/8 10.0.0.1",
     [b"X-Forwarded-For: 6.6.6.6, 203.0.113.9, 10.0.0.1"], b"203.0.113.9"),
    ("X-Forwarded-For", "127.0.0.0/8 10.0.0.1",
     [b"X-Forwarded-For: 6.6.6.6, 203.0.113.9", b"X-Forwarded-For: 10.0.0.1"], b"203.0.113.9"),
    ("X-Forwarded-For", "127.0.0.0/8 10.0.0.1", [b"X-Forwarded-For: 6.6.6.6, rubbish, 10.0.0.1"],
     b"10.0.0.1"),
    ("X-Forwarded-For", "127.0.0.1", [b"X-Forwarded-For: rubbish"], b"127.0.0.1"),
    ("X-Forwarded-For", "127.0.0.1", [b"X-Forwarded-For: 203.0.113.9:51234"], b"203.0.113.9"),
    ("X-Forwarded-For", "127.0.0.1", [b"X-Forwarded-For: [2001:db8::7]:443"], b"2001:db8::7"),
    ("X-Forwarded-For", "127.0.0.1", [b"X-Forwarded-For: [2001:db8::7]"], b"2001:db8::7"),
    ("X-Forwarded-For", "127.0.0.1 10.0.0.1", [b"X-Forwarded-For: 203.0.113.9:1, 10.0.0.1:2"],
     b"203.0.113.9"),
    ("X-Forwarded-For", "127.0.0.1", [b"X-Real-IP: 6.6.6.6"], b"127.0.0.1"),
    ("X-Forwarded-For", "10.0.0.0/8", [b"X-Forwarded-For: 6.6.6.6"], b"127.0.0.1"),
    ("X-Forwarded-For", "", [b"X-Forwarded-For: 6.6.6.6", b"X-Real-IP: 6.6.6.6"], b"127.0.0.1"),
    ("X-Real-IP", "127.0.0.1", [b"X-Real-IP: 2001:db8::7", b"X-Forwarded-For: 6.6.6.6"],
     b"2001:db8::7"),
    ("X-Real-IP", "10.0.0.0/8", [b"X-Real-IP: 6.6.6.6"], b"127.0.0.1")])
def test_client_address_from_trusted_proxies(tmp_path, header, believed, fields, client):
    ini = "[server]\nset_real_ip_from = %s\nreal_ip_header = %s\nreturn = 200 $remote_addr\n" % (
        believed, header)
    with running(ini, tmp_path) as gate:
        assert gate.fetch(request(b"GET", b"/", *fields)).body == client
        assert gate.line(" %s gate.test " % client.decode())


@pytest.mark.parametrize("named", [b"203.0.113.9", b"203.0.113.9:51234", b"[2001:db8::7]:443",
                                   b"[2001:db8::7]"])
def test_addresses_with_ports_in_x_forwarded_for(tmp_path, named):
    lines = "set_real_ip_from = 127.0.0.1", "allow = 127.0.0.1"
    with gate_and_backend(tmp_path, None, *lines) as (gate, backend):
        assert gate.fetch(request(b"GET", b"/",
                                  b"X-Forwarded-For: " + named)).reason == "access_denied"
        assert not backend.connections


V2_TCP4 = bytes((203, 0, 113, 9, 10, 0, 0, 1)) + struct.pack("!HH", 4711, 80)
V2_TCP6 = bytes.fromhex("20010db8000000000000000000000009") * 2 + struct.pack("!HH", 4711, 80)


@pytest.mark.parametrize("header, client", [
    (b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n", b"203.0.113.9"),
    (b"PROXY TCP6 2001:db8::9 ::1 4711 80\r\n", b"2001:db8::9"),
    (b"PROXY UNKNOWN\r\n", b"127.0.0.1"), (b"PROXY UNKNOWN rest of the line\r\n", b"127.0.0.1"),
    (proxy_v2(0x21, 0x11, V2_TCP4), b"203.0.113.9"),
    (proxy_v2(0x21, 0x11, V2_TCP4 + b"\x04\0\x01x"), b"203.0.113.9"),
    (proxy_v2(0x21, 0x21, V2_TCP6), b"2001:db8::9"), (proxy_v2(0x20, 0x00, b""), b"127.0.0.1"),
    (proxy_v2(0x20, 0x11, V2_TCP4), b"127.0.0.1"), (proxy_v2(0x21, 0x00, b""), b"127.0.0.1")])
def test_client_address_from_the_proxy_protocol(tmp_path, header, client):
    with running(PROXY_INI % ("", "127.0.0.1"), tmp_path) as gate:
        for pieces in all_chunkings(header + request()):
            peer = gate.connect()
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                peer.send(piece)
            assert peer.response().body == client
            peer.close()


@pytest.mark.parametrize("header", [
    b"", b"PROXY \r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n", b"PROXY TCP4 ::1 ::1 1 2\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n",
    b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n", b"PROXY " + b"x" * 200 + b"\r\n",
    b"PROXY TCP4 1.2.3.\xff 1.2.3.4 1 2\r\n", proxy_v2(0x31, 0x11, V2_TCP4),
    proxy_v2(0x22, 0x11, V2_TCP4), proxy_v2(0x21, 0x11, V2_TCP4[:8]), proxy_v2(0x21, 0x77, V2_TCP4),
    proxy_v2(0x21, 0x11, b"x" * 4000)])
def test_malformed_proxy_header(tmp_path, header):
    """The connection is closed without a response."""
    with running(PROXY_INI % ("", "127.0.0.1"), tmp_path) as gate:
        assert gate.connect().send(header + request()).rest() == b""
        assert any("invalid PROXY header" in line for line in gate.errors) and not gate.access


def test_a_proxy_header_of_a_stranger_closes(tmp_path):
    with running(PROXY_INI % ("", "10.0.0.0/8"), tmp_path) as gate:
        assert gate.connect().send(b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 80\r\n"
                                   + request()).rest() == b""


@pytest.mark.parametrize("raw", [request(), handshake()], ids=["http", "handshake"])
def test_proxy_protocol_to_the_backend(tmp_path, raw):
    lines = []

    def script(peer):
        lines.append(peer.read_until(b"\r\n"))
        echo_service(peer)

    with gate_and_backend(tmp_path, script, "proxy_protocol = on") as (gate, _):
        peer = gate.connect().send(raw)
        assert peer.response().status in (101, 200)
        assert lines == [b"PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n"
                         % (peer.sock.getsockname()[1], gate.port)]
        peer.close()


@pytest.mark.skipif(not hasattr(wsgate.hashlib, "scrypt"), reason="this Python has no scrypt")
def test_memory_of_wrong_passwords(tmp_path):
    """A flood of them costs the memory of a few hashes."""
    (tmp_path / "passwords").write_bytes(b"me:" + wsgate.hash_password(b"right") + b"\n")
    port = free_port()
    (tmp_path / "hash.ini").write_text("[server]\nlisten = 127.0.0.1:%d\nreturn = 200\n"
                                       "auth_basic_user_file = %s\n"
                                       % (port, tmp_path / "passwords"))
    with process("-c", str(tmp_path / "hash.ini")) as child:
        eventually(lambda: listening(port))
        before = peak_memory(child.pid)
        wrong = request(b"GET", b"/", b"Authorization: Basic " + base64.b64encode(b"me:wrong"))
        clients = [connect(port) for _ in range(8 + 4 * (os.cpu_count() or 1))]
        for client in clients:
            client.send(wrong)
        assert {client.response().status for client in clients} == {401}
        more = peak_memory(child.pid) - before
        for client in clients:
            client.close()
    most = 32 + 16 * (os.cpu_count() or 1)
    if FREE_THREADED:
        most += 64  # threads have heaps of their own
    assert more < most * 1024, "%d KiB" % more


@pytest.mark.skipif(not hasattr(wsgate.hashlib, "scrypt"), reason="this Python has no scrypt")
def test_password_checked_while_the_file_changes(tmp_path, constants, monkeypatch):
    constants(SCRYPT=CHEAP_SCRYPT)
    path = tmp_path / "passwords"
    path.write_bytes(b"me:" + wsgate.hash_password(b"old") + b"\n")
    passwords = wsgate.PasswordFile(str(path))
    old, verify = base64.b64encode(b"me:old"), wsgate.verify_password

    def verify_slowly(*arguments):
        right = verify(*arguments)
        path.write_bytes(b"me:" + wsgate.hash_password(b"new password") + b"\n")
        passwords.refresh()  # as by another request
        monkeypatch.undo()
        return right

    monkeypatch.setattr(wsgate, "verify_password", verify_slowly)
    assert passwords.accepts(old)  # it was right when it was asked
    assert not passwords.accepts(old)


def test_single_sign_on_from_login_to_socket(tmp_path):
    """Redirect to the login, back with a cookie, page and socket with the user's name."""
    with signed_on(tmp_path) as (gate, sign_on, heads):
        target = b"/room%20one?a=1&b=%2F"
        response = gate.fetch(request(b"GET", target, b"Host: app.test:8080"))
        url = response.get(b"location")
        assert (response.status, response.reason) == (302, "auth_denied") and not heads
        assert url == (b"https://sso.test/login?rd=http%3A%2F%2Fapp.test%3A8080"
                       b"%2Froom%2520one%3Fa%3D1%26b%3D%252F")
        assert field(response.head, b"set-cookie") == [b"csrf=1"] and not response.get(b"x-secret")
        with contextlib.closing(connect(sign_on.backend.port)) as browser:
            back = browser.send(request(b"GET", url.replace(b"https://sso.test", b""))).response()
        assert back.get(b"location") == b"http://app.test:8080" + target
        cookie = b"Cookie: " + back.get(b"set-cookie")
        for raw in (request(b"GET", target, cookie), handshake(target, cookie)):
            response = gate.fetch(raw)
            assert response.status == (101 if raw.count(b"Upgrade") > 1 else 200)
            assert field(response.head, b"set-cookie") == [b"session=alice; refreshed", b"other=1"]
            assert field(heads[-1], b"remote-user") == [b"alice"]
            assert field(heads[-1], b"remote-groups") == [b"admin, staff"]
            assert not field(heads[-1], b"remote-email") and not field(heads[-1], b"x-secret")


def test_url_for_the_auth_service(tmp_path):
    lines = "set_real_ip_from = 127.0.0.1",
    with signed_on(tmp_path, *lines) as (gate, sign_on, heads):
        gate.fetch(request(b"POST", b"/a?b", b"X-Forwarded-Proto: https",
                           b"X-Forwarded-Host: app.test",
                           b"X-Original-URL: http://evil/", body=b"xyz"))
        head = sign_on.heads[0]
        assert field(head, b"x-original-url") == [b"https://app.test/a?b"]
        assert field(head, b"x-original-uri") == [b"/a?b"]
        assert field(head, b"x-original-method") == [b"POST"]
        assert field(head, b"x-forwarded-host") == [b"app.test"]
        assert not field(head, b"content-length")


@pytest.mark.parametrize("raw", [handshake(), request(b"GET", b"/", b"Cookie: session=bob")])
def test_a_socket_or_a_403_is_not_redirected_to_the_login(tmp_path, raw):
    with signed_on(tmp_path) as (gate, _, heads):
        response = gate.fetch(raw)
        assert response.status == (403 if b"bob" in raw else 401) and not heads
        if response.status == 401:
            assert response.get(b"www-authenticate") == b"Bearer"
            assert response.get(b"location") == b"https://sso.test/?x"
            assert response.get(b"set-cookie") == b"csrf=1"


SPELLINGS = [b"Remote-User", b"remote-user", b"REMOTE_USER", b"Remote_User", b"Remote.User",
             b"remote~user", b"Remote-Email", b"remote_email"]


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("line", [
    "", "underscores_in_headers = on", "set_real_ip_from = 127.0.0.1"])
def test_auth_request_headers_from_clients(tmp_path, name, line):
    """Not in any spelling, not as a trailer, and not by naming it in Connection either."""
    with signed_on(tmp_path, line) as (gate, sign_on, heads):
        cookie = b"Cookie: session=alice"
        gate.fetch(request(b"GET", b"/", cookie, name + b": mallory",
                           b"Connection: Remote-User, remote_user, " + name))
        chunked = b"Transfer-Encoding: chunked"
        gate.fetch(request(b"POST", b"/", cookie, chunked)
                   + b"1\r\nx\r\n0\r\nX-Sum: 1\r\n%s: mallory\r\n\r\n" % name)
        assert b"X-Sum" in heads[-1]
        assert len(heads) == 2
        for head in heads + sign_on.heads:
            assert b"mallory" not in head
        for head in heads:
            assert field(head, b"remote-user") == [b"alice"]


def test_auth_request_headers_in_variables(tmp_path):
    """$http_NAME is what auth_request says, never what the client does."""
    lines = "proxy_set_header =\n  X-User: $http_remote_user\n  X-Email: $http_remote_email"
    with signed_on(tmp_path, lines) as (gate, _, heads):
        gate.fetch(request(b"GET", b"/", b"Cookie: session=alice", b"Remote-User: mallory",
                           b"Remote-Email: mallory"))
        assert field(heads[0], b"x-user") == field(heads[0], b"remote-user") == [b"alice"]
        assert b"mallory" not in heads[0]


@pytest.mark.parametrize("line, status", [
    ("", 302), ("deny = all", 403), ("listen = 127.0.0.1:0\nmax_connections_per_ip = 1", 429)])
def test_auth_request_headers_in_variables_of_a_refusal(tmp_path, line, status):
    """$http_NAME is not what the client says before auth_request has been asked either."""
    with signed_on(tmp_path, line + "\nadd_header = X-User: $http_remote_user") as (gate, _, _):
        first = gate.connect()
        eventually(lambda: gate.connections.idle)
        response = gate.fetch(request(b"GET", b"/", b"Remote-User: mallory"))
        assert response.status == status and b"mallory" not in response.head
        first.close()


def test_auth_request_headers_of_the_request_before(tmp_path):
    """The same field lines on the same connection have other values in another location."""
    lines = ("proxy_set_header = X-User: $http_remote_user\n"
             "[location /own/]\nauth_request =\nauth_request_headers =\nproxy_pass = http://%s")
    with ScriptedBackend(lambda peer: peer.send(ok(peer.head()))) as backend:
        with signed_on(tmp_path, lines % backend.where) as (gate, _, heads):
            client = gate.connect()
            for path, user in ((b"/", b"alice"), (b"/own/", b"mallory"), (b"/", b"alice")):
                raw = request(b"GET", path, b"Cookie: session=alice", b"Remote-User: mallory")
                response = client.send(raw).response()
                head = response.body if path == b"/own/" else heads[-1]
                assert field(head, b"x-user") == [user]
            client.close()


def test_credentials_reach_auth_request_though_it_replaces_them(tmp_path):
    """As for API clients with a token: the service has a token of its own for the backend."""
    heads = []

    def service(peer):
        heads.append(peer.head())
        peer.send(b"HTTP/1.1 200 OK\r\nAuthorization: Bearer inner\r\n\r\n")

    def application(peer):
        heads.append(peer.head())
        peer.send(ok())

    with ScriptedBackend(service) as sso, ScriptedBackend(application) as backend:
        ini = ("[server]\nauth_request = http://%s\nproxy_pass = http://%s\n"
               "auth_request_headers = Authorization\n" % (sso.where, backend.where))
        with running(ini, tmp_path) as gate:
            gate.fetch(request(b"GET", b"/", b"Authorization: Bearer outer"))
            assert [field(head, b"authorization") for head in heads] == [
                [b"Bearer outer"], [b"Bearer inner"]]


def test_auth_request_off(tmp_path):
    """It undoes that of [server], as no value does: for the login page."""
    with ScriptedBackend(respond(ok())) as backend, refusing_port() as dead:
        ini = ("[server]\nauth_request = http://%s\nproxy_pass = http://%s\n"
               "[location /off/]\nauth_request = off\n[location /none/]\nauth_request =\n"
               % (dead.where, backend.where))
        with running(ini, tmp_path) as gate:
            assert [gate.fetch(request(b"GET", path)).status
                    for path in (b"/", b"/off/", b"/none/")] == [502, 200, 200]


def test_the_login_url_cannot_be_turned_into_another_host(tmp_path):
    with ScriptedBackend(respond(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")) as asked:
        ini = ("[server]\nauth_request = http://%s\nproxy_pass = http://127.0.0.1:1\n"
               "auth_request_login = /sso$request_uri\n"
               "[location /b/]\nauth_request_login = /$http_x\n" % asked.where)
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request(b"GET",
                                      b"//evil.test/")).get(b"location") == b"/sso//evil.test/"
            for value, url in ((b"/evil.test", b"/evil.test"), (b"\\evil.test", b"/evil.test"),
                               (b"a b\xe9", b"/a%20b%E9"), (b"\t/x", b"/x"), (b"a\t/x", b"/a%09/x"),
                               (b"@evil", b"/@evil")):
                assert gate.fetch(request(b"GET", b"/b/", b"X: " + value)).get(b"location") == url


@pytest.mark.skipif(not hasattr(wsgate.hashlib, "scrypt"), reason="this Python has no scrypt")
def test_time_of_wrong_passwords(tmp_path, constants, monkeypatch):
    """Else the time of a refusal would show which users there are."""
    constants(SCRYPT=CHEAP_SCRYPT)
    users = write_file(tmp_path, "users", sha1_line("ann", b"one") + "eve:%s\n"
                       % wsgate.hash_password(b"two").decode())
    passwords, computed, scrypt = wsgate.PasswordFile(users), [], hashlib.scrypt
    monkeypatch.setattr(hashlib, "scrypt", lambda *args, **more: computed.append(1)
                        or scrypt(*args, **more))
    for user, password, right, count in ((b"ann", b"one", True, 0), (b"ann", b"x", False, 1),
                                         (b"eve", b"two", True, 1), (b"eve", b"x", False, 1),
                                         (b"zoe", b"x", False, 1), (b"", b"", False, 1)):
        computed.clear()
        assert passwords.accepts(base64.b64encode(user + b":" + password)) is right
        assert len(computed) == count, user


@pytest.mark.skipif(not hasattr(wsgate.hashlib, "scrypt"), reason="this Python has no scrypt")
def test_queue_of_wrong_passwords(tmp_path, constants, monkeypatch):
    """Beyond it 503; known passwords pass."""
    constants(SCRYPT=CHEAP_SCRYPT)
    users = write_file(tmp_path, "users", "eve:%s\n" % wsgate.hash_password(b"two").decode())
    begun, released, verify = threading.Event(), threading.Event(), wsgate.verify_password

    def wait_and_verify(*arguments):
        begun.set()
        assert released.wait(5000 * MS)
        return verify(*arguments)

    with running("[server]\nreturn = 200 in\nauth_basic_user_file = %s\n" % users,
                 tmp_path) as gate:
        right, wrong = [request(b"GET", b"/", basic(b"eve", each)) for each in (b"two", b"no")]
        assert gate.fetch(right).status == 200
        monkeypatch.setattr(wsgate, "HASHES_PENDING", threading.BoundedSemaphore(1))
        monkeypatch.setattr(wsgate, "verify_password", wait_and_verify)
        first = gate.connect().send(wrong)
        assert begun.wait(5000 * MS)
        response = gate.fetch(wrong)
        assert (response.status, response.reason) == (503, "auth_unavailable")
        assert response.get(b"retry-after") and gate.fetch(right).status == 200
        released.set()
        assert first.response().status == gate.fetch(wrong).status == 401
        first.close()


def test_password_file_with_bom_and_comments(tmp_path):
    lines = "\ufeff" + sha1_line("ann", b"one",
                                 b"salt").strip() + ":a comment\r\n\n#x\n" + sha1_line(
                                     "bob", b"two")
    passwords = wsgate.PasswordFile(write_file(tmp_path, "users", lines))
    assert passwords.accepts(base64.b64encode(b"ann:one"))
    assert passwords.accepts(base64.b64encode(b"bob:two"))
    assert not passwords.accepts(base64.b64encode(b"ann:one:a comment"))


@pytest.mark.parametrize("line", ["ann", "ann:", "ann:{SHA}", "ann:{SHA}????", "ann:{SSHA}c2hvcnQ=",
                                  "ann:{MD5}x", "ann:{SHA}" + base64.b64encode(bytes(24)).decode(),
                                  "ann:{SCRYPT}c2hvcnQ="])
def test_unknown_hashes(tmp_path, line):
    with pytest.raises(ValueError, match="users:2: "):
        wsgate.PasswordFile(write_file(tmp_path, "users", "# one\n%s\n" % line))


# -------------------------------------------------------------------- Upstreams

CLIENTS = ["10.%d.%d.%d" % (number >> 16, number >> 8 & 255, number & 255)
           for number in range(10000)]
WEIGHTS = {"a:1": 1, "b:1": 2, "c:1": 3}


@pytest.mark.parametrize("balance", ["round_robin", "ip_hash"])
def test_ten_thousand_picks_are_shared_by_weight(balance):
    upstream = pool(*["%s weight=%d" % pair for pair in WEIGHTS.items()], balance=balance)
    for client in CLIENTS:
        upstream.release(pick(upstream, client))
    for server in upstream.servers:
        expected = len(CLIENTS) * WEIGHTS[server.name] / sum(WEIGHTS.values())
        assert abs(server.health.selected - expected) < 0.05 * expected, server.name


def test_least_conn_never_differs_by_more_than_one_per_weight():
    upstream = pool(*["%s weight=%d" % pair for pair in WEIGHTS.items()], balance="least_conn")
    for client in CLIENTS[:300]:
        pick(upstream, client)
        loads = [server.load() for server in upstream.servers]
        assert max(loads) - min(loads) <= 1
    assert [server.health.active for server in upstream.servers] == [50, 100, 150]
    for _ in range(10):
        upstream.release(upstream.servers[0])
    assert [pick(upstream).name for _ in range(10)] == ["a:1"] * 10


def test_ip_hash():
    """All processes agree, and a failed server moves only its own clients."""
    def choices(*lines):
        upstream = pool(*lines, balance="ip_hash")
        return [pick(upstream, client).name for client in CLIENTS[:1000]]

    before = choices("a:1", "b:1", "c:1")
    assert choices("c:1", "a:1", "b:1") == before
    for old, new in zip(before, choices("a:1", "c:1")):
        assert old == new if old != "b:1" else new in ("a:1", "c:1")


def test_backup_and_down():
    upstream = pool("a:1", "b:1 backup", "c:1 down")
    assert {pick(upstream).name for _ in range(5)} == {"a:1"}
    upstream.failed(upstream.servers[0], wsgate.BackendError(502, "backend_refused"))
    assert {pick(upstream).name for _ in range(5)} == {"b:1"}
    upstream.failed(upstream.servers[1], wsgate.BackendError(502, "backend_refused"))
    tried = []
    for _ in range(2):
        tried.append(pick(upstream, tried=tried))
    assert {server.name for server in tried} == {"a:1", "b:1"}
    assert pick(upstream, tried=tried) is None


def test_max_fails():
    upstream = pool("a:1 max_fails=3 fail_timeout=10s", "b:1 max_fails=0")
    error = wsgate.BackendError(502, "backend_refused")
    for count in range(1, 4):
        assert upstream.servers[0].available(time.monotonic())
        upstream.failed(upstream.servers[0], error)
        upstream.failed(upstream.servers[1], error)
    now = time.monotonic()
    assert not upstream.servers[0].available(now + 9) and upstream.servers[0].available(now + 10)
    assert upstream.servers[1].available(now)


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_failed_server(tmp_path, method):
    """It is skipped, unavailable for fail_timeout, then used again."""
    with refusing_port() as dead, ScriptedBackend(echo_service) as backend:
        ini = ini_for_pool([dead.where + " fail_timeout=" + ini_ms(150), backend.where])
        with running(ini, tmp_path) as gate:
            begun = time.monotonic()
            assert gate.fetch(request(method, b"/1",
                                      body=b"x" if method == b"POST" else None)).status == 200
            rests = time.monotonic()
            assert " %s " % backend.where in gate.line("/1 ", "failed=1")
            assert gate.fetch(request(method, b"/2")).status == 200
            assert "failed=" not in gate.line("/2 ")
            dead.sock.listen(5)
            asked = []

            def returned():
                asked.append(gate.connect().send(request()))
                return select_readable(dead.sock, 0)

            eventually(returned, 2000 * MS)
            assert 150 * MS <= time.monotonic() - begun and time.monotonic() - rests < 600 * MS
            for peer in asked + [dead]:
                peer.close()


def test_all_servers_unavailable(tmp_path):
    """Servers that close without a byte: a GET is sent to the next, a POST is not."""
    with ScriptedBackend(
            lambda peer: peer.head()) as one, ScriptedBackend(lambda peer: peer.head()) as two:
        with running(ini_for_pool([one.where, two.where]), tmp_path) as gate:
            for count in (1, 2):
                response = gate.fetch(request())
                assert (response.status, response.reason) == (502, "backend_closed")
                assert (len(one.connections), len(two.connections)) == (count, count)
            assert gate.fetch(request(b"POST", body=b"x")).status == 502
            assert len(one.connections) + len(two.connections) == 5
            assert gate.fetch(handshake()).status == 502
            assert len(one.connections) + len(two.connections) == 7


def test_get_is_retried_after_an_empty_response(tmp_path):
    with ScriptedBackend(
            lambda peer: peer.head()) as mute, ScriptedBackend(echo_service) as backend:
        with running(ini_for_pool([mute.where + " weight=100", backend.where]), tmp_path) as gate:
            assert gate.fetch(request()).status == 200
            assert gate.line("failed=1", backend.where)


def test_no_retry_after_half_a_head(tmp_path):
    with ScriptedBackend(
            respond(b"HTTP/1.1 200")) as half, ScriptedBackend(echo_service) as backend:
        with running(ini_for_pool([half.where + " weight=100", backend.where]), tmp_path) as gate:
            assert gate.fetch(request()).status == 502
            assert not backend.connections and " %s " % half.where in gate.line("502")


def test_max_conns_everywhere_is_503(tmp_path):
    with ScriptedBackend(echo_service) as one, ScriptedBackend(echo_service) as two:
        with running(ini_for_pool([one.where + " max_conns=1", two.where + " max_conns=1"]),
                     tmp_path) as gate:
            inside = [gate.connect().send(handshake()) for _ in range(2)]
            assert [peer.response().status for peer in inside] == [101, 101]
            response = gate.fetch(request())
            assert (response.status, response.reason) == (503, "conn_limit")
            assert response.get(b"retry-after")
            inside[0].close()
            assert gate.line("101 closed")
            assert eventually(lambda: gate.fetch(request()).status == 200)
            inside[1].close()


def test_all_servers_refuse(tmp_path):
    with refusing_port() as one, refusing_port() as two, running(
            ini_for_pool([one.where, two.where]), tmp_path) as gate:
        for raw in (request(), handshake(), request(b"POST", body=b"x")):
            response = gate.fetch(raw)
            assert (response.status, response.reason) == (502, "backend_refused")
        assert all(any("backend %s of pool failed" % dead.where in line for line in gate.errors)
                   for dead in (one, two))


def test_a_backend_killed_under_live_tunnels_ends_only_its_own(tmp_path):
    with ScriptedBackend() as one, ScriptedBackend(echo_service) as two:
        with running(ini_for_pool([one.where, two.where]), tmp_path) as gate:
            clients = []
            for place in range(4):
                clients.append(gate.connect().send(handshake()))
                if place % 2 == 0:
                    one.connection(place // 2).head()
                    one.connection(place // 2).send(switching())
                assert clients[-1].response().status == 101
            one.close()
            for peer in one.connections:
                peer.reset()
            assert all(peer.rest() == b"" and peer.was_reset for peer in clients[::2])
            assert all(tunnel_works(peer) for peer in clients[1::2])
            for peer in clients:
                peer.close()


def test_log_of_a_failed_server(tmp_path):
    """Refused requests are lines of the access log only; the second line has their number."""
    with refusing_port() as dead:
        with running("[server]\nproxy_pass = http://%s\n" % dead.where, tmp_path) as gate:
            for _ in range(5):
                assert gate.fetch(request()).reason == "backend_refused"
            dead.sock.listen(5)
            asked = gate.connect().send(request())
            with contextlib.closing(dead.sock.accept()[0]) as sock:
                sock.sendall(ok())
                assert asked.response().status == 200
            eventually(lambda: len(lines_about(gate, dead)) == 2)
            assert "failed: backend_refused" in lines_about(gate, dead)[0]
            assert re.search(r"is up again after [0-9.]+s \(failures: 5\)",
                             lines_about(gate, dead)[1])


def lines_about(gate, server):
    """The lines of the error log about a server."""
    return [line for line in gate.errors if line.startswith("backend %s " % server.where)]


def test_unavailable_server():
    upstream = pool("a:1 fail_timeout=100s", "b:1")
    server = upstream.servers[0]
    upstream.failed(server, wsgate.BackendError(502, "backend_refused"))
    server.health.down_until = time.monotonic()
    chosen = [pick(upstream).name for _ in range(8)]
    assert chosen.count("a:1") == 1
    upstream.succeeded(wsgate.Backend(upstream, server, None))
    assert [pick(upstream).name for _ in range(8)].count("a:1") == 4


def test_response_from_before_the_failure():
    """A backend that restarts finishes old requests while it refuses new connections."""
    upstream = pool("a:1", "b:1")
    server = upstream.servers[0]
    old = wsgate.Backend(upstream, server, None)
    upstream.failed(server, wsgate.BackendError(502, "backend_refused"))
    upstream.succeeded(old)
    assert not server.available(time.monotonic())
    upstream.succeeded(wsgate.Backend(upstream, server, None))
    assert server.available(time.monotonic())


def test_failure_while_unavailable():
    upstream = pool("a:1 max_fails=3 fail_timeout=10s", "b:1")
    server, error = upstream.servers[0], wsgate.BackendError(502, "backend_refused")
    for _ in range(3):
        upstream.failed(server, error)
    server.health.down_until = server.health.first_fail = time.monotonic() - 1
    upstream.failed(server, error)
    assert not server.available(time.monotonic() + 9)


def test_the_servers_tried_for_one_request_are_bounded(tmp_path):
    with contextlib.ExitStack() as stack:
        dead = [stack.enter_context(refusing_port()) for _ in range(6)]
        with running(ini_for_pool([each.where for each in dead], "proxy_next_upstream_tries = 3"),
                     tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"/1")).reason == "backend_refused"
            assert gate.line("/1 ", "failed=3")
        with running(ini_for_pool([each.where for each in dead], "proxy_next_upstream_tries = 0"),
                     tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"/2")).reason == "backend_refused"
            assert gate.line("/2 ", "failed=6")
        with running(ini_for_pool([each.where for each in dead],
                                  "proxy_next_upstream_timeout = 1ms",
                                  "proxy_next_upstream_tries = 0"), tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"/3")).reason == "backend_refused"
            assert 1 <= int(re.search("failed=([0-9]+)", gate.line("/3 ")).group(1)) <= 6


COOKIES = {b"Cookie: a=1; io=%s": True, b"Cookie: io=%s; a=1": True, b"Cookie: IO=%s": False,
           b"Cookie: xio=%s": False}


@pytest.mark.parametrize("field_, counts", COOKIES.items())
def test_balance_by_cookie(field_, counts):
    """By address where the cookie is absent."""
    upstream = pool("a:1", "b:1", "c:1", balance="cookie io")

    def choose(value, client="10.0.0.1"):
        fields = wsgate.parse_fields((field_ % value if value else b"A: b") + b"\r\n")
        return pick(upstream, client, (), fields).name

    names = {choose(b"v%d" % number) for number in range(50)}
    assert names == ({"a:1", "b:1", "c:1"} if counts else {choose(None)})
    assert choose(b"v1", "10.9.9.9") == choose(b"v1") or not counts
    assert choose(None) == pick(pool("c:1", "a:1", "b:1", balance="ip_hash")).name


def test_session_begun_by_a_response(tmp_path):
    """The cookie that a server sets leads to that server, whatever its value hashes to."""
    started = []

    def server():
        """Return the script of a server that knows only the sessions that it has begun."""
        mine = []

        def script(peer):
            head, _ = read_request(peer)
            if b"Cookie: " not in head:
                mine.append(b"io=s%d" % len(started))
                started.append(mine[-1])
                return peer.send(ok(b"begun", b"Set-Cookie: " + mine[-1] + b"; Path=/"))
            known = any(b"Cookie: %s\r\n" % session in head for session in mine)
            return peer.send(ok(b"known" if known else b"unknown"))
        return script

    with ScriptedBackend(server()) as one, ScriptedBackend(server()) as two:
        ini = ini_for_pool([one.where, two.where]).replace("round_robin", "cookie io")
        with running(ini, tmp_path) as gate:
            for number in range(16):
                assert gate.fetch(request(b"GET", b"/")).body == b"begun"
                raw = request(b"GET", b"/", b"Cookie: io=s%d" % number)
                assert gate.fetch(raw).body == b"known"


def test_a_session_of_one_cookie_stays_with_its_server(tmp_path):
    """Polling of socket.io: one address, two servers, each session with one of them."""
    with ScriptedBackend(echo_service) as one, ScriptedBackend(echo_service) as two:
        ini = ini_for_pool([one.where, two.where]).replace("round_robin", "cookie io")
        with running(ini, tmp_path) as gate:
            number = 0
            while number < 6 or not (one.connections and two.connections):  # by their ports
                assert number < 50
                raw = request(b"GET", b"/%d" % number, b"Cookie: io=s%d" % number)
                for _ in range(3):
                    assert gate.fetch(raw).status == 200
                assert len(one.connections) % 3 == len(two.connections) % 3 == 0
                number += 1


# -------------------------------------------------------- Resolving, connecting


def test_a_unix_socket_whose_queue_is_full_is_504(tmp_path):
    path = os.path.join(str(tmp_path), "deaf.sock")
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
        deaf.bind(path)
        deaf.listen(0)
        result = 0
        while not result:
            sock = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
            sock.setblocking(False)
            result = sock.connect_ex(path)
        with running("[server]\nproxy_pass = http://unix:%s:\n" % path, tmp_path) as gate:
            response = gate.fetch(request())
            assert (response.status, response.reason) == (504, "backend_timeout")


def test_a_server_that_does_not_accept_in_time_is_504(tmp_path):
    with refusing_port() as deaf:
        deaf.sock.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for sock in fillers:  # the queue of the deaf server is full now
            sock.setblocking(False)
            sock.connect_ex(deaf.sock.getsockname())
        if select_readable(fillers[-1],
                           0) or fillers[-1].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            pytest.skip("this system refuses when the queue is full")
        ini = "[server]\nproxy_pass = http://%s\nproxy_connect_timeout = %dms\n" % (
            deaf.where, 150 * MS * 1000)
        with running(ini, tmp_path) as gate:
            begun = time.monotonic()
            response = gate.fetch(request())
            assert (response.status, response.reason) == (504, "backend_timeout")
            assert 150 * MS <= time.monotonic() - begun < 900 * MS
        for sock in fillers:
            sock.close()


def test_unresolvable_backend(tmp_path):
    """A warning at load, 502 later."""
    # The name of an interface that is not there: no name server is asked.
    ini = "[server]\nproxy_pass = http://[fe80::1%nosuch0]:9\n"
    with running(ini, tmp_path) as gate:
        assert any("cannot be resolved" in line for line in gate.config.warnings)
        response = gate.fetch(handshake())
        assert (response.status, response.reason) == (502, "backend_unresolved")


def test_all_addresses_of_a_name_are_tried():
    with refusing_port() as dead, ScriptedBackend() as backend:
        server = wsgate.parse_server_line("name.test:80")
        addresses = dead.sock.getsockname(), backend.listener.getsockname()
        server.addresses = lambda deadline: [(socket.AF_INET, address) for address in addresses]
        server.connect(5.0).close()
        assert backend.connection().ended()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["127.0.0.1", "::1"])
def test_localhost_is_found_on_either_address(tmp_path, family):
    if family not in [
            found[0] for found in socket.getaddrinfo("localhost", 80, 0, socket.SOCK_STREAM)]:
        pytest.skip("localhost has no such address here")
    with ScriptedBackend(echo_service, family=family) as backend:
        with running("[server]\nproxy_pass = http://localhost:%d\n" % backend.port,
                     tmp_path) as gate:
            assert gate.fetch(request()).status == 200


def test_a_backend_on_ipv6(tmp_path):
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with ScriptedBackend(echo_service, family=socket.AF_INET6) as backend, running(
            ini_for(backend), tmp_path) as gate:
        assert gate.fetch(request()).status == 200 and gate.line(" %s " % backend.where)


@pytest.mark.parametrize("count", [1, 5])
def test_hanging_resolver(tmp_path, monkeypatch, count):
    """Requests for one name wait for one lookup, which runs in one thread until it ends."""
    release, asked = threading.Event(), []

    def hangs(host, *more, real=socket.getaddrinfo, **options):
        if host == "hangs.test":
            asked.append(threading.current_thread())
            release.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return real(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    ini = "[server]\nproxy_pass = http://hangs.test:9\nproxy_connect_timeout = %dms\n" % (
        100000 * MS)
    monkeypatch.setattr(wsgate, "RESOLVE_TIMEOUT", 10 * MS)
    with running(ini, tmp_path) as gate:
        peers = [gate.connect().send(request()) for _ in range(count)]
        for peer in peers:
            response = peer.response()
            assert (response.status, response.reason) == (502, "backend_unresolved")
        assert len(asked) == 1 and gate.line("the resolver did not respond in time")
        release.set()
        eventually(lambda: not asked[0].is_alive())
        assert not wsgate.resolver.lookups


def test_a_resolver_that_hangs_delays_the_start_once(tmp_path, monkeypatch):
    """All names share one time limit; the first is warned of, the others are not known."""
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: release.wait(60) and [])
    monkeypatch.setattr(wsgate, "RESOLVE_TIMEOUT", 20 * MS)
    ini = "".join("[location /%d/]\nproxy_pass = http://a%d.test:9\n" % (number, number)
                  for number in range(9))
    warnings = load_text(tmp_path, ini).warnings
    assert len(wsgate.resolver.lookups) == 1
    assert "host a0.test cannot be resolved now" in "".join(warnings)
    assert len(warnings) == 1
    release.set()
    eventually(lambda: not wsgate.resolver.lookups)


def test_lookups_are_bounded_and_a_free_thread_takes_the_next(monkeypatch):
    release = threading.Event()
    found = [(2, 1, 6, "", ("127.0.0.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: release.wait(60) and found)
    monkeypatch.setattr(wsgate.Resolver, "THREADS", 2)
    resolver = wsgate.Resolver()
    for host in ("a.test", "b.test", "c.test"):
        with pytest.raises(wsgate.TimedOut):
            resolver.resolve(host, 9, wsgate.Deadline(10 * MS))
    assert sorted(resolver.lookups) == [("a.test", 9), ("b.test", 9)]
    release.set()
    assert resolver.resolve("c.test", 9, wsgate.Deadline(5)) == [(socket.AF_INET, ("127.0.0.1", 9))]
    eventually(lambda: not resolver.lookups)


def test_order_of_addresses():
    """The one that worked is first, those that failed are last."""
    with refusing_port() as dead, ScriptedBackend() as backend:
        server = wsgate.parse_server_line("name.test:80")
        where = [dead.sock.getsockname(), backend.listener.getsockname()]
        server.addresses = lambda deadline: [(socket.AF_INET, address) for address in where]
        server.connect(5.0).close()
        assert backend.connection().ended()
        dead.sock.listen(5)  # it would accept now
        server.connect(5.0).close()
        assert backend.connection(1).ended() and not select_readable(dead.sock, 0)
        assert [address for _, address in server.in_order(server.addresses(None))] == where[::-1]
        server.health.failed_addresses = {}
        assert [address for _, address in server.in_order(server.addresses(None))] == where[::-1]
        server.health.last_address = None
        assert [address for _, address in server.in_order(server.addresses(None))] == where


@pytest.mark.parametrize("script, scheme, status", [
    (Peer.close, "http", 502), (Peer.close, "https", 502), (Peer.rest, "http", 504)])
def test_an_address_that_accepts_and_fails_is_the_last_one_next_time(tmp_path, monkeypatch, tls,
                                                                     script, scheme, status):
    """It closes before a response, fails at TLS or is silent; the other of the name works."""
    with ScriptedBackend(script) as bad, ScriptedBackend(
            respond(ok(b"good")), tls=tls_backend(tls) if scheme == "https" else None) as other:
        found = [(socket.AF_INET, each.listener.getsockname()) for each in (bad, other)]
        monkeypatch.setattr(wsgate.Server, "addresses", lambda *_: found)
        ini = ("[server]\nproxy_pass = %s://name.test\nproxy_ssl_verify = off\n"
               "proxy_read_timeout = %s\n" % (scheme, ini_ms(300)))
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request(b"POST", b"/", body=b"x")).status == status
            for _ in range(2):
                assert gate.fetch(request(b"POST", b"/", body=b"x")).body == b"good"
        assert len(bad.connections) == 1


# ------------------------------------------------------------------- Forwarding

HOP_BY_HOP_LINES = (b"Keep-Alive: timeout=5", b"Proxy-Connection: keep-alive", b"TE: trailers",
                    b"Upgrade: h2c", b"HTTP2-Settings: AAMA", b"X-Named: 1", b"x-named: 2")


def test_request_fields_for_the_backend(tmp_path):
    """All but hop-by-hop fields are unchanged."""
    raw = request(b"GET", b"/%61//?b=c&&%zz", b"x-Lower: 1", b"Host: App.example:8080",
                  b"X-UPPER:2",
                  b"Connection: keep-alive , X-NAMED", b"Accept-Encoding:", b"X_Under: 1",
                  b"Content_Length: 9",
                  b"Sec-Fetch-Site: \t a  b ", b"x-lower: 3", b"Cookie: a=b", b"Cookie: c=\xe4",
                  b"Origin: http://a",
                  b"Authorization: Basic eDp5", b"Proxy-Authorization: x", b"Trailer: X-Checksum",
                  *HOP_BY_HOP_LINES)
    with http_exchange(tmp_path, raw) as (_, _, _, head):
        assert head_lines(head) == [
            b"GET /%61//?b=c&&%zz HTTP/1.1", b"x-Lower: 1", b"Host: App.example:8080",
            b"X-UPPER: 2", b"Accept-Encoding: ", b"Sec-Fetch-Site: a  b", b"x-lower: 3",
            b"Cookie: a=b", b"Cookie: c=\xe4", b"Origin: http://a", b"Authorization: Basic eDp5",
            b"Connection: close", b"X-Forwarded-For: 127.0.0.1", b"X-Forwarded-Proto: http",
            b"X-Forwarded-Host: App.example:8080", b"X-Real-IP: 127.0.0.1"]


def test_response_fields_for_the_client(tmp_path):
    """All but hop-by-hop fields are unchanged."""
    with http_exchange(tmp_path, request()) as (_, client, peer, _):
        peer.send(ok(b"ok", b"set-cookie: a=1; Expires=Thu, 01 Jan 2026 00:00:00 GMT", b"X-b:1",
                     b"X_Under: 1",
                     b"Connection: close,X-Named", b"Set-Cookie: b=2", b"x-B: \xe4",
                     *HOP_BY_HOP_LINES))
        assert head_lines(client.response().head) == [
            b"HTTP/1.1 200 OK", b"set-cookie: a=1; Expires=Thu, 01 Jan 2026 00:00:00 GMT",
            b"X-b: 1", b"X_Under: 1", b"Set-Cookie: b=2", b"x-B: \xe4", b"Content-Length: 2"]


FORWARDED_LINES = (b"X-Forwarded-For: 9.9.9.9, 10.0.0.1", b"X-Forwarded-For: 10.0.0.2",
                   b"X-Forwarded-Proto: https", b"X-Forwarded-Host: app.example",
                   b"X-Real-IP: 8.8.8.8", b"Forwarded: for=9.9.9.9", b"X-Forwarded-Prefix: /app",
                   b"X-Forwarded-Unheard: 1")


@pytest.mark.parametrize("lines, fields, expected", [
    ((), FORWARDED_LINES, (b"127.0.0.1", b"http", b"gate.test", b"127.0.0.1", None, None)),
    (("set_real_ip_from = 10.0.0.0/8",), FORWARDED_LINES,
     (b"127.0.0.1", b"http", b"gate.test", b"127.0.0.1", None, None)),
    (("set_real_ip_from = 127.0.0.0/8 10.0.0.0/8",), FORWARDED_LINES,
     (b"9.9.9.9, 10.0.0.1, 10.0.0.2, 127.0.0.1", b"https", b"app.example", b"9.9.9.9",
      b"for=9.9.9.9", b"/app")),
    (("set_real_ip_from = 127.0.0.1",), FORWARDED_LINES,
     (b"9.9.9.9, 10.0.0.1, 10.0.0.2, 127.0.0.1", b"https", b"app.example", b"10.0.0.2",
      b"for=9.9.9.9", b"/app")),
    (("set_real_ip_from = 127.0.0.1", "real_ip_header = X-Real-IP"), FORWARDED_LINES,
     (b"9.9.9.9, 10.0.0.1, 10.0.0.2, 127.0.0.1", b"https", b"app.example", b"8.8.8.8",
      b"for=9.9.9.9", b"/app")),
    (("set_real_ip_from = 127.0.0.1",), (b"X-Forwarded-For: 9.9.9.9, unknown",),
     (b"9.9.9.9, unknown, 127.0.0.1", b"http", b"gate.test", b"127.0.0.1", None, None)),
    (("set_real_ip_from = 127.0.0.1",), (), (b"127.0.0.1", b"http", b"gate.test", b"127.0.0.1",
                                             None, None))])
def test_forwarding_fields_of_trusted_proxies(tmp_path, lines, fields, expected):
    with http_exchange(tmp_path, request(b"GET", b"/", *fields), *lines) as (_, _, _, head):
        names = (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-real-ip",
                 b"forwarded", b"x-forwarded-prefix")
        found = [field(head, name) for name in names]
        assert found == [[value] if value else [] for value in expected]
        assert len(field(head, b"x-forwarded-unheard")) == bool(expected[4])


def test_host_of_a_request_without_host(tmp_path):
    """It is the name of the backend."""
    with http_exchange(tmp_path, b"GET / HTTP/1.0\r\nX: y\r\n\r\n") as (_, client, peer, head):
        assert field(head, b"host") == [b"127.0.0.1:%d" % peer.sock.getsockname()[1]]
        assert not field(head, b"x-forwarded-host") and head.startswith(b"GET / HTTP/1.1\r\n")


def test_host_for_a_unix_socket(tmp_path):
    """Without Host it is localhost."""
    with ScriptedBackend(
            lambda peer: peer.send(ok(peer.head())), path=str(tmp_path / "back")) as backend:
        with running(ini_for(backend), tmp_path) as gate:
            assert field(gate.fetch(b"GET / HTTP/1.0\r\n\r\n").body, b"host") == [b"localhost"]


ADDED = ("add_header = Strict-Transport-Security: max-age=63072000", "    Server:",
         "    X-Up: $remote_addr", "    Set-Cookie: edge=1")


def test_add_header(tmp_path):
    answered = ok(b"ok", b"Server: secret/1", b"x-up: backend", b"Set-Cookie: a=1",
                  b"strict-transport-security: no")
    with gate_and_backend(tmp_path, respond(answered), *ADDED) as (gate, _):
        head = gate.fetch(request()).head
    assert field(head, b"strict-transport-security") == [b"max-age=63072000"]
    assert field(head, b"x-up") == [b"127.0.0.1"] and not field(head, b"server")
    assert sorted(field(head, b"set-cookie")) == [b"a=1", b"edge=1"]


@pytest.mark.parametrize("line, raw, status", [
    ("deny = all", request(), 403), ("deny = all", handshake(), 403),
    ("return = 204", request(), 204), ("return = 302 /x", request(), 302), ("", request(), 502)])
def test_add_header_is_in_responses_of_wsgate_too(tmp_path, line, raw, status):
    proxy_pass = "" if "return" in line else "proxy_pass = http://127.0.0.1:1"
    ini = "[server]\n[location /]\n%s\n" % "\n".join((line, proxy_pass) + ADDED)
    with running(ini, tmp_path) as gate:
        response = gate.fetch(raw)
        assert response.status == status
        assert response.get(b"strict-transport-security") == b"max-age=63072000"
        assert field(response.head, b"set-cookie") == [b"edge=1"]


def test_add_header_of_server_is_in_responses_of_no_location(tmp_path):
    ini = "[server]\nadd_header = X-A: $host\n[location /a]\nreturn = 200\nadd_header = X-B: b\n"
    with running(ini, tmp_path) as gate:
        response = gate.fetch(request(b"GET", b"/nowhere"))
        assert (response.status, response.get(b"x-a")) == (404, b"gate.test")
        response = gate.fetch(request(b"GET", b"/a"))
        assert (response.get(b"x-a"), response.get(b"x-b")) == (None, b"b")
        assert gate.fetch(b"rubbish\r\n\r\n").status == 400


@pytest.mark.parametrize("raw", [b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
                                 request(b"GET", b"/" + b"x" * 300)])
def test_add_header_of_server_is_in_responses_to_malformed_requests(tmp_path, raw):
    """Of the fields those without variables, whose values come from a request."""
    ini = ("[server]\nreturn = 200\nclient_header_size = 256\n"
           "add_header =\n  X-A: 1\n  X-B: $host\n  Date:\n")
    with running(ini, tmp_path) as gate:
        response = gate.fetch(raw)
        assert response.status in (400, 414)
        assert response.get(b"x-a") == b"1" and response.get(b"x-b") is None


def test_add_header_gives_a_return_its_content_type(tmp_path):
    ini = "[server]\n[location /]\nreturn = 200 {}\nadd_header = Content-Type: application/json\n"
    with running(ini, tmp_path) as gate:
        assert field(gate.fetch(request()).head, b"content-type") == [b"application/json"]


def test_add_header_is_in_a_101(tmp_path):
    with gate_and_backend(tmp_path, respond(switching(b"Server: x")), *ADDED) as (gate, _):
        head = gate.fetch(handshake()).head
        assert field(head, b"x-up") == [b"127.0.0.1"] and not field(head, b"server")


@pytest.mark.parametrize("location, uri, sent, wanted", [
    ("/app/", "/", b"/login", b"/app/login"), ("/app/", "/", b"/app/login", b"/app/login"),
    ("/app/", "/", b"http://BACKEND/login?a=/b", b"/app/login?a=/b"),
    ("/app/", "/", b"http://BACKEND", b"/app/"), ("/app/", "/", b"next", b"next"),
    ("/app/", "/", b"//evil.test/x", b"//evil.test/x"),
    ("/app/", "/", b"/\\evil.test", b"/\\evil.test"),
    ("/app/", "/", b"https://other.test/login", b"https://other.test/login"),
    ("/app/", "/", b"http://BACKEND.evil.test/", b"http://BACKEND.evil.test/"),
    ("/app/", "/", b"http://BACKEND@evil.test/", b"http://BACKEND@evil.test/"),
    ("/app/", "/base/", b"/base/x", b"/app/x"), ("/app/", "/base/", b"/other", b"/other"),
    ("/app", "/base", b"/base?x", b"/app?x"), ("/app", "/base", b"/basement", b"/basement"),
    ("/app/", "", b"/login", b"/login"), ("/app/", "", b"http://BACKEND/app/x", b"/app/x"),
    ("/", "", b"http://BACKEND//evil.test/", b"http://BACKEND//evil.test/"),
    ("/", "/base/", b"/base//evil.test", b"/base//evil.test"),
    ("/", "/base/", b"/base/\\evil", b"/base/\\evil"),
    ("/", "/base/", b"/base/\t/evil.test", b"/base/\t/evil.test"),
    ("= /one", "/other", b"/other?x", b"/one?x"), ("= /one", "/other", b"/other/x", b"/other/x"),
    ("/caf\u00e9/", "/", b"/x", b"/caf%C3%A9/x"),
])
def test_proxy_redirect(tmp_path, location, uri, sent, wanted):
    """And never to another host, whatever the client made the backend put into it."""
    with ScriptedBackend() as backend:
        here = backend.where.encode()
        sent, wanted = sent.replace(b"BACKEND", here), wanted.replace(b"BACKEND", here)
        backend.script = respond(b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Location: %s\r\n"
                                 b"Refresh: 3; url=%s\r\nX-Location: %s\r\nContent-Length: 0\r\n"
                                 b"\r\n"
                                 % (sent, sent, sent, sent))
        target = location.replace("= ", "").encode("utf-8").replace(b"\xc3\xa9", b"%C3%A9")
        ini = "[server]\n[location %s]\nproxy_pass = http://%s%s\n" % (location, backend.where, uri)
        with running(ini, tmp_path) as gate:
            response = gate.fetch(request(b"GET", target))
        assert response.get(b"location") == wanted and response.get(b"content-location") == wanted
        assert response.get(b"x-location") == sent
        if b"\t" not in sent:
            assert response.get(b"refresh") == b"3; url=" + wanted


def test_proxy_redirect_off_leaves_redirects_alone(tmp_path):
    with ScriptedBackend(respond(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n"
                                 b"\r\n")) as backend:
        ini = "[server]\n[location /app/]\nproxy_redirect = off\nproxy_pass = http://%s/\n"
        ini %= backend.where
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"/app/")).get(b"location") == b"/x"


@pytest.mark.parametrize("location, uri, lines, sent, prefix", [
    ("/app/", "/", "", (), [b"/app"]), ("/app", "/", "", (), [b"/app"]),
    ("/app/", "/base/", "", (), [b"/app"]), ("/a/b/", "/b/", "", (), [b"/a"]),
    ("/app/", "/app/", "", (), []), ("/app/", "", "", (), []),
    ("/", "/base/", "", (), []), ("= /app", "/", "", (), []),
    ("/app/", "/", "", (b"X-Forwarded-Prefix: /evil",), [b"/app"]),
    ("/app/", "", "", (b"X-Forwarded-Prefix: /evil",), []),
    ("/app/", "/", "set_real_ip_from = 127.0.0.1", (b"X-Forwarded-Prefix: /outer",),
     [b"/outer/app"]),
    ("/app/", "", "set_real_ip_from = 127.0.0.1", (b"X-Forwarded-Prefix: /outer",), [b"/outer"]),
])
def test_x_forwarded_prefix_is_what_was_replaced(tmp_path, location, uri, lines, sent, prefix):
    with ScriptedBackend(lambda peer: peer.send(ok(peer.head()))) as backend:
        ini = "[server]\n%s\n[location %s]\nproxy_pass = http://%s%s\n" % (
            lines, location, backend.where, uri)
        with running(ini, tmp_path) as gate:
            head = gate.fetch(request(b"GET", location.replace("= ", "").encode(), *sent)).body
            assert field(head, b"x-forwarded-prefix") == prefix


def test_a_redirect_below_the_prefix_of_two_proxies_is_not_prefixed_again(tmp_path):
    """The application was told /outer/app, and has put it before its path."""
    script = respond_status(b"302 Found", b"Location: /outer/app/login")
    with ScriptedBackend(script) as backend:
        ini = ("[server]\nset_real_ip_from = 127.0.0.1\n[location /app/]\nproxy_pass = http://%s/\n"
               % backend.where)
        with running(ini, tmp_path) as gate:
            raw = request(b"GET", b"/app/", b"X-Forwarded-Prefix: /outer")
            assert gate.fetch(raw).get(b"location") == b"/outer/app/login"


def test_proxy_pass_websocket(tmp_path):
    with ScriptedBackend(respond(ok(b"page"))) as pages, ScriptedBackend(echo_service) as sockets:
        ini = ("[server]\n[location /live/]\nproxy_pass = http://%s\n"
               "proxy_pass_websocket = http://%s/sub/\n" % (pages.where, sockets.where))
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request(b"GET", b"/live/x")).body == b"page"
            assert gate.fetch(handshake(b"/live/x")).status == 101
            assert (len(pages.connections), len(sockets.connections)) == (1, 1)
            assert gate.line("/live/ " + sockets.where) and gate.line("/live/ " + pages.where)


def test_proxy_pass_websocket_beside_return(tmp_path):
    """A location for sockets alone: everything else gets the return."""
    with ScriptedBackend(echo_service) as sockets:
        ini = ("[server]\n[location /]\nreturn = 404\nproxy_pass_websocket = http://%s\n"
               % sockets.where)
        with running(ini, tmp_path) as gate:
            assert gate.fetch(request()).status == 404 and gate.fetch(handshake()).status == 101


def test_long_names_of_fields_are_not_remembered(tmp_path):
    with gate_and_backend(tmp_path, respond(ok())) as (gate, _):
        count = wsgate.passes.cache_info().currsize
        assert gate.fetch(request(b"GET", b"/", b"X-%s: 1" % (b"a" * 9000))).status == 200
        assert wsgate.passes.cache_info().currsize == count


@pytest.mark.parametrize("line, names", [
    ("", []), ("underscores_in_headers = on", [b"x_token"]), ("underscores_in_headers = off", [])])
def test_fields_with_underscores_pass_only_if_allowed(tmp_path, line, names):
    """But never what an application could take for a field that wsgate vouches for."""
    sent = (b"X_Token: 1", b"X_Forwarded_For: 6.6.6.6", b"Content_Length: 9",
            b"X-Real_IP: 6.6.6.6", b"Transfer_Encoding: chunked", b"Set-By_Us: forged")
    lines = (line, "proxy_set_header = Set_By-Us: real", "   S_S: on")
    with gate_and_backend(tmp_path, lambda peer: peer.send(ok(peer.head())), *lines) as (gate, _):
        head = gate.fetch(request(b"GET", b"/", *sent)).body
        for name in (b"x_forwarded_for", b"content_length", b"x-real_ip", b"transfer_encoding",
                     b"set-by_us"):
            assert not field(head, name), name
        assert [name for name in (b"x_token",) if field(head, name)] == names
        assert field(head, b"set_by-us") == [b"real"] and field(head, b"s_s") == [b"on"]


@pytest.mark.parametrize("spelling", [
    b"X.Forwarded.For", b"X!Forwarded!For", b"x-forwarded_for", b"X-Forwarded.Proto", b"X.Real.IP",
    b"Forwarded", b"X-Original-URL", b"X-Original.URI", b"X-Rewrite-URL"])
def test_forwarding_fields_of_clients(tmp_path, spelling):
    """They are dropped, in every spelling."""
    with gate_and_backend(tmp_path, lambda peer: peer.send(ok(peer.head()))) as (gate, _):
        assert b"6.6.6.6" not in gate.fetch(request(b"GET", b"/", spelling + b": 6.6.6.6")).body


@pytest.mark.parametrize("target, host", [
    (b"/a\rb", b"gate.test"), (b"/a\nb", b"gate.test"), (b"/a\0b", b"gate.test"),
    (b"/\\evil", b"gate.test"), (b"/", b"a\rb"), (b"/", b"a\nX: y"), (b"/", b"a\0b"),
    (b"/", b"user@evil.test"), (b"/", b"evil.test/"), (b"/", b"a b"), (b"/", b"evil.test\\x"),
    (b"http://evil.test/", b"gate.test"), (b"//evil.test/", b"gate.test"),
    (b"/%0d%0aSet-Cookie:x", b"gate.test"), (b"/?%0d%0aSet-Cookie:x", b"gate.test"),
    (b"/ok?\xe9", b"gate.test"),
    (b"/", b"evil.test"),
])
def test_redirects_are_safe(tmp_path, target, host):
    """No byte of Host or URI splits a response or names another host."""
    ini = ("[server]\nadd_header = X-Host: $host\n  X-URI: $request_uri\n"
           "[location /]\nreturn = 302 $request_uri\n"
           "[location /ok]\nreturn = 301 https://$host$request_uri\n")
    with running(ini, tmp_path) as gate:
        raw = b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, host)
        response = gate.fetch(raw)
        assert not field(response.head, b"set-cookie") and not field(response.head, b"x")
        url = response.get(b"location")
        if response.status == 302:
            assert re.fullmatch(br"/(?![/\\])[\x21-\x7e]*", url), url
        elif response.status == 301:
            assert url.startswith(b"https://gate.test/ok")
        else:
            assert response.status == 400


def test_remote_user_and_request_id_are_variables(tmp_path):
    line = b"ann:{SHA}" + base64.b64encode(hashlib.sha1(b"pw").digest())
    (tmp_path / "users").write_bytes(line + b"\n")
    lines = ("auth_basic_user_file = %s" % (tmp_path / "users"),
             "proxy_set_header = X-User: $remote_user", "   X-ID: $request_id",
             "add_header = X-ID: $request_id")
    with gate_and_backend(tmp_path, lambda peer: peer.send(ok(peer.head())), *lines) as (gate, _):
        response = gate.fetch(request(b"GET", b"/",
                                      b"Authorization: Basic " + base64.b64encode(b"ann:pw"),
                                      b"X-User: x"))
        assert field(response.body, b"x-user") == [b"ann"]
        number = response.get(b"x-id")
        assert field(response.body, b"x-id") == [number]
        assert number.decode() in gate.line(" 200 done")


def test_a_peer_on_a_unix_socket_is_not_in_forwarding_fields(tmp_path):
    path = str(tmp_path / "gate")
    with ScriptedBackend(lambda peer: peer.send(ok(peer.head()))) as backend:
        ini = ("[server]\nlisten = unix:%s\n  127.0.0.1:0\nset_real_ip_from = unix:\n"
               "proxy_set_header = X-Address: $remote_addr\nproxy_pass = http://%s\n" % (
                   path, backend.where))
        with running(ini, tmp_path):
            for sent, wanted in (((b"X-Forwarded-For: 192.0.2.7",), [b"192.0.2.7"]), ((), []),
                                 ((b"X-Forwarded-For: unix:, 192.0.2.7, unix:",), [b"192.0.2.7"]),
                                 ((b"X-Forwarded-For: unix:",), []),
                                 ((b"X-Forwarded-For: ::ffff:192.0.2.7",), [b"192.0.2.7"]),
                                 ((b"X-Forwarded-For: [::ffff:192.0.2.7]:80", b"X-Forwarded-For:"),
                                  [b"192.0.2.7"])):
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(path)
                peer = Peer(sock)
                head = peer.send(request(b"GET", b"/", *sent)).response().body
                assert field(head, b"x-forwarded-for") == wanted
                assert field(head, b"x-real-ip") == field(head, b"x-address") == wanted
                assert b"unix:" not in head
                peer.close()


# ------------------------------------------------------------------ The upgrade


@pytest.mark.parametrize("raw", [
    handshake(),
    custom_handshake(connection=b"Connection: keep-alive, Upgrade"),  # Firefox
    custom_handshake(connection=b"Connection: keep-alive\r\nConnection: Upgrade"),
    custom_handshake(connection=b"Connection: ,\tUpgrade , ,keep-alive,"),
    custom_handshake(upgrade=b"UPGRADE: WebSocket", connection=b"connection: uPGRADE",
                     key=b"SEC-WEBSOCKET-KEY: " + KEY),
    custom_handshake(upgrade=b"Upgrade: other/2, websocket"),
    custom_handshake(more=b"Sec-WebSocket-Protocol: chat, v2\r\nsec-websocket-PROTOCOL: v3\r\n"
                b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"),
])
def test_handshake_for_the_backend(tmp_path, raw):
    """Upgrade and Connection appear once."""
    with gate_and_backend(tmp_path) as (gate, backend):
        client = gate.connect().send(raw)
        head = backend.connection().head()
        assert [value.lower() for value in field(head, b"upgrade")] == [b"websocket"]
        assert [value.lower() for value in field(head, b"connection")] == [b"upgrade"]

        def own(data):
            return [line for line in data.split(b"\r\n")
                    if line.lower().startswith(b"sec-websocket-")]

        assert own(head) == own(raw)
        backend.connection().send(switching())
        assert client.response().status == 101
        line_of(gate, client, backend.connection())


@pytest.mark.parametrize("raw", [
    custom_handshake(b"POST / HTTP/1.1", key=b"", body=b"", more=b"Content-Length: 0"),
    custom_handshake(b"POST / HTTP/1.1"),
    custom_handshake(b"HEAD / HTTP/1.1"),
    custom_handshake(b"GET / HTTP/1.0", key=b""),
    custom_handshake(upgrade=b"", key=b""),
    custom_handshake(connection=b"Connection: keep-alive", key=b""),
    custom_handshake(upgrade=b"Upgrade: h2c", key=b"", more=b"HTTP2-Settings: AAMAAABkAARAAAAA"),
    custom_handshake(upgrade=b"Upgrade: TLS/1.0", key=b""),
    custom_handshake(upgrade=b"Upgrade: websockets", key=b""),
])
def test_upgrade_without_a_handshake(tmp_path, raw):
    """It is forwarded as plain HTTP, without Upgrade."""
    with gate_and_backend(tmp_path, lambda peer: peer.send(ok(peer.head()))) as (gate, backend):
        method = raw.split(b" ")[0]
        response = gate.fetch(raw, method)
        assert response.status == 200
        if method != b"HEAD":
            assert field(response.body, b"connection") == [b"close"]
            assert not field(response.body, b"upgrade")
            assert not field(response.body, b"http2-settings")


@pytest.mark.parametrize("raw, status, reason, text", [
    (custom_handshake(upgrade=b""), 426, "upgrade_missing",
     b"proxy_set_header Upgrade $http_upgrade"),
    (custom_handshake(connection=b"Connection: close"), 426, "upgrade_missing", b"hop-by-hop"),
    (custom_handshake(connection=b""), 426, "upgrade_missing", b"hop-by-hop"),
    (custom_handshake(b"GET / HTTP/1.0"), 426, "upgrade_missing", b"proxy_http_version 1.1"),
    (custom_handshake(key=b""), 400, "bad_handshake", b"Sec-WebSocket-Key"),
    (custom_handshake(key=b"Sec-WebSocket-Key:"), 400, "bad_handshake", b"Sec-WebSocket-Key"),
    (custom_handshake(key=b"Sec-WebSocket-Key: " + base64.b64encode(bytes(15))), 400,
     "bad_handshake", b"24 char"),
    (custom_handshake(key=b"Sec-WebSocket-Key: " + base64.b64encode(bytes(19))), 400,
     "bad_handshake", b"24 char"),
    (custom_handshake(key=b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j!Q=="), 400, "bad_handshake",
     b"base64"),
    (custom_handshake(more=b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="), 400, "bad_handshake",
     b"Sec-WebSocket-Key"),
    (custom_handshake(version=b""), 426, "bad_handshake", b"13"),
    (custom_handshake(version=b"Sec-WebSocket-Version: thirteen"), 426, "bad_handshake", b"13"),
    (custom_handshake(more=b"Content-Length: 3", body=b"abc"), 400, "bad_handshake", b"body"),
    (custom_handshake(more=b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, "bad_handshake",
     b"body"),
])
def test_invalid_handshakes(tmp_path, raw, status, reason, text):
    """They are refused with an explanation and reach no backend."""
    with gate_and_backend(tmp_path) as (gate, backend):
        client = gate.connect().send(raw, frame(1, b"early", b"abcd"))
        response = client.response()
        assert (response.status, response.reason) == (status, reason) and text in response.body
        assert response.get(b"sec-websocket-version") == (
            b"13" if (status, reason) == (426, "bad_handshake") else None)
        assert response.get(b"upgrade") == (b"websocket" if status == 426 else None)
        assert response.get(b"connection") == (b"close, upgrade" if status == 426 else b"close")
        assert client.ended() and not backend.connections
        client.close()
        line = gate.line(" %d done" % status)
        assert "reason=" + reason in line and "\n" not in line


def test_another_version_is_for_the_backend_to_refuse(tmp_path):
    refusal = (b"HTTP/1.1 426 Upgrade Required\r\nSec-WebSocket-Version: 13, 8\r\n"
               b"Content-Length: 0\r\n\r\n")
    with gate_and_backend(tmp_path, respond(refusal)) as (gate, backend):
        response = gate.fetch(custom_handshake(version=b"Sec-WebSocket-Version: 99"))
        assert response.status == 426 and response.get(b"sec-websocket-version") == b"13, 8"


UNASKED = request()


@pytest.mark.parametrize("raw, answered", [
    (handshake(), switching().replace(ACCEPT, b"AAAAAAAAAAAAAAAAAAAAAAAAAAA=")),
    (handshake(), switching().replace(ACCEPT, ACCEPT.swapcase())),
    (handshake(), switching().replace(b"Sec-WebSocket-Accept", b"X-Accept")),
    (handshake(), switching(b"Sec-WebSocket-Accept: " + ACCEPT)),
    (handshake(), switching().replace(b"Upgrade: websocket\r\n", b"")),
    (handshake(), switching().replace(b"Upgrade: websocket", b"Upgrade: h2c")),
    (handshake(), switching().replace(b"Upgrade: websocket", b"Upgrade: websocket, h2c")),
    (handshake(), switching().replace(b"Connection: Upgrade\r\n", b"")),
    (handshake(), switching().replace(b"Connection: Upgrade", b"Connection: close")),
    (handshake(), switching(b"Sec-WebSocket-Protocol: chat")),
    (handshake(b"/", b"Sec-WebSocket-Protocol: chat, v2"),
     switching(b"Sec-WebSocket-Protocol: v3")),
    (handshake(b"/", b"Sec-WebSocket-Protocol: chat, v2"),
     switching(b"Sec-WebSocket-Protocol: chat, v2")),
    (handshake(b"/", b"Sec-WebSocket-Protocol: a"), switching(b"Sec-WebSocket-Protocol: A")),
    (custom_handshake(version=b"Sec-WebSocket-Version: 8"), switching()),
    (UNASKED, switching()),
    (request(b"POST", b"/", b"Upgrade: websocket", b"Connection: Upgrade", body=b"abc"),
     switching()),
])
def test_invalid_101(tmp_path, raw, answered):
    with nothing_left(), gate_and_backend(tmp_path) as (gate, backend):
        client = gate.connect().send(raw)
        server = backend.connection()
        server.head()
        server.send(answered, frame(1, b"hidden"))
        response = client.response()
        assert (response.status, response.reason) == (502, "backend_bad_101")
        client.finish()
        assert b"hidden" not in response.head + response.body + client.rest()
        assert server.rest() in (b"", b"abc")
        assert "reason=backend_bad_101" in gate.line(" 502 done")
        client.close()


def test_a_subprotocol_that_was_offered_is_chosen(tmp_path):
    with gate_and_backend(tmp_path, respond(switching(b"Sec-WebSocket-Protocol: v2"))) as (gate, _):
        response = gate.fetch(handshake(b"/", b"Sec-WebSocket-Protocol: chat, v2"))
        assert response.status == 101 and response.get(b"sec-websocket-protocol") == b"v2"


@pytest.mark.parametrize("line, raw, status, reaches", [
    ("upgrade = none", handshake(), 200, None),
    ("upgrade = any", custom_handshake(upgrade=b"Upgrade: other/2", key=b"", version=b""), 101,
     b"other/2"),
    ("upgrade = any", handshake(), 101, b"websocket"),
    ("upgrade = any", custom_handshake(upgrade=b"Upgrade: other/2, WebSocket"), 101, b"WebSocket"),
    ("upgrade = any", custom_handshake(upgrade=b"Upgrade: h2c", key=b"",
                                       more=b"HTTP2-Settings: AAMA"), 200, None),
    ("upgrade = any", custom_handshake(upgrade=b"Upgrade: other/2, H2C", key=b""), 200, None),
    ("upgrade = any", custom_handshake(b"POST / HTTP/1.1", upgrade=b"Upgrade: other/2", key=b""),
     101, b"other/2"),
    ("upgrade = any", custom_handshake(b"POST / HTTP/1.1"), 200, None),
    ("upgrade = any", custom_handshake(upgrade=b"Upgrade: other/2", connection=b"", key=b""), 200,
     None),
    ("strict_handshake = off", custom_handshake(key=b"", version=b""), 101, b"websocket"),
    ("strict_handshake = off", custom_handshake(key=b"Sec-WebSocket-Key: short"), 101,
     b"websocket"),
    ("strict_handshake = off", custom_handshake(upgrade=b""), 200, None),
])
def test_upgrade(tmp_path, line, raw, status, reaches):
    heads = []

    def script(peer):
        heads.append(peer.head())
        asked = field(heads[0], b"upgrade")
        if not asked:
            peer.send(ok())
        elif line == "strict_handshake = off":
            peer.send(b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: %s\r\n\r\n" % asked[0])
        else:
            peer.send(switching().replace(b"websocket", asked[0], 1))

    with gate_and_backend(tmp_path, script, line) as (gate, _):
        assert gate.fetch(raw).status == status
        assert field(heads[0], b"upgrade") == ([reaches] if reaches else [])


LIST_OF_TWO = custom_handshake(upgrade=b"Upgrade: foo/1, bar", key=b"", version=b"")
TWO_LINES = custom_handshake(upgrade=b"Upgrade: foo/1\r\nupgrade: bar", key=b"", version=b"")


@pytest.mark.parametrize("raw, chosen, status", [
    (LIST_OF_TWO, b"foo/1", 101), (LIST_OF_TWO, b"Bar", 101), (TWO_LINES, b"bar", 101),
    (LIST_OF_TWO, b"foo/1, bar", 101), (LIST_OF_TWO, b"other", 502),
    (LIST_OF_TWO, b"foo/1, other", 502), (LIST_OF_TWO, b"", 502),
])
def test_upgrade_to_one_of_several_protocols(tmp_path, raw, chosen, status):
    with gate_and_backend(tmp_path, None, "upgrade = any") as (gate, backend):
        client = gate.connect().send(raw)
        server = backend.connection()
        assert field(server.head(), b"upgrade") == [b"foo/1, bar"]
        server.send(b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: %s\r\n\r\nhello" % chosen)
        response = client.response()
        reason = "" if status == 101 else "backend_bad_101"
        assert (response.status, response.reason) == (status, reason)
        if status == 101:
            assert client.read(5) == b"hello" and server.silent(10 * MS)
        client.close()
        server.close()


def test_upgrade_any_checks_websocket(tmp_path):
    with gate_and_backend(tmp_path, None, "upgrade = any") as (gate, backend):
        raw = custom_handshake(upgrade=b"Upgrade: websocket, foo", key=b"Sec-WebSocket-Key: short")
        response = gate.fetch(raw)
        assert (response.status, response.reason) == (400, "bad_handshake")
        assert not backend.connections


REFUSALS = [
    (200, ok(b"the page " * 400)),
    (302, b"HTTP/1.1 302 Found\r\nLocation: /login?next=%2Fws\r\nContent-Length: 0\r\n\r\n"),
    (401, b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x, y\"\r\n"
          b"Content-Length: 2\r\n\r\nno"),
    (403, b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nyou\r\n0\r\n\r\n"),
    (404, b"HTTP/1.1 404 Not Found\r\n\r\n" + b"n" * 50000),
    (426, b"HTTP/1.1 426 No\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
          b"Content-Length: 1\r\n\r\n!"),
    (503, b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nbusy"),
]


@pytest.mark.parametrize("status, answered", REFUSALS, ids=[str(status) for status, _ in REFUSALS])
def test_handshake_refused_by_the_backend(tmp_path, status, answered):
    """Its response is passed on, then both sides are closed."""
    seen = []

    def script(peer):
        peer.head()
        peer.send(answered)
        peer.finish()
        seen.append(peer.rest())

    with nothing_left(), gate_and_backend(tmp_path, script) as (gate, backend):
        early = frame(1, b"early", b"abcd")
        client = gate.connect().send(handshake(), early)
        response = client.response()
        assert response.status == status
        for name in (b"location", b"www-authenticate", b"retry-after", b"upgrade",
                     b"sec-websocket-version"):
            assert response.get(name) == (field(answered, name) or [None])[0]
        assert response.body == (b"you" if status == 403 else answered.partition(b"\r\n\r\n")[2])
        client.send(request(b"GET", b"/next"))
        assert client.rest() == b""
        client.close()
        eventually(lambda: seen)
        # neither the early bytes nor /next went anywhere
        assert seen == [b""] and len(backend.connections) == 1
        assert "reason=backend_said_%d" % status in gate.line(" %d done" % status)


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n",
                                     b"HTTP/1.1 103 Hints\r\nLink: </a>\r\n\r\n" * 2])
def test_interim_response_before_the_101(tmp_path, interim):
    with gate_and_backend(tmp_path) as (gate, backend):
        client = gate.connect().send(handshake())
        server = backend.connection()
        server.head()
        server.send(interim)
        server.send(switching(), frame(1, b"first"))
        assert client.response().status == 101
        assert client.read(7) == frame(1, b"first")
        client.send(frame(1, b"both", b"abcd"))
        assert server.read(10) == frame(1, b"both", b"abcd")  # a tunnel both ways
        line_of(gate, client, server)


def test_early_bytes(tmp_path):
    """They wait for the 101; bytes after it belong to the tunnel."""
    with gate_and_backend(tmp_path) as (gate, backend):
        early, behind = frame(1, b"early", b"abcd"), frame(2, b"behind")
        client = gate.connect().send(handshake(), early)
        server = backend.connection()
        server.head()
        assert server.silent(100 * MS)
        server.send(switching(), behind)
        assert client.response().status == 101
        assert client.read(len(behind)) == behind and server.read(len(early)) == early
        assert "up=1/11B down=1/8B" in line_of(gate, client, server)


def test_much_early_data(tmp_path, relay_mode):
    early = frame(2, os.urandom(300000), b"abcd")
    with nothing_left(), gate_and_backend(tmp_path) as (gate, backend):
        client = gate.connect()
        thread = send_in_thread(client, [handshake() + early])
        server = backend.connection()
        server.head()
        assert server.silent(30 * MS)
        server.send(switching())
        assert client.response().status == 101
        assert server.read(len(early)) == early
        thread.join()
        line_of(gate, client, server)


def test_fields_of_the_101(tmp_path):
    """Hop-by-hop fields are removed, cookies stay separate."""
    answered = switching(b"Set-Cookie: a=1, b", b"Keep-Alive: timeout=5", b"X-Private: 1",
                         b"Proxy-Connection: x",
                         b"Content-Length: 5", b"Set-Cookie: c=2", b"X-Kept: yes",
                         b"Connection: x-private")
    with gate_and_backend(tmp_path, respond(answered)) as (gate, _):
        head = gate.fetch(handshake()).head
        assert field(head, b"set-cookie") == [b"a=1, b", b"c=2"]
        assert field(head, b"x-kept") == [b"yes"]
        assert field(head, b"connection") == [b"Upgrade"]
        assert field(head, b"upgrade") == [b"websocket"]
        assert field(head, b"sec-websocket-accept") == [ACCEPT]
        for name in (b"keep-alive", b"x-private", b"proxy-connection", b"content-length",
                     b"transfer-encoding"):
            assert not field(head, name)


@pytest.mark.parametrize("origin, answered, code, reason", [
    (b"good", b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", 4403, b"backend_said_403"),
    (b"good", b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", 4503, b"backend_said_503"),
    (b"good", b"nonsense\r\n\r\n", 4502, b"backend_bad_response"),
    (b"evil", b"", 4403, b"origin_denied"),
])
def test_reject_with_close(tmp_path, origin, answered, code, reason):
    lines = "reject_with = close", "allowed_origins = https://good.test"
    with gate_and_backend(tmp_path, respond(answered), *lines) as (gate, _):
        client = gate.connect().send(handshake(b"/", b"Origin: https://%s.test" % origin))
        head = client.head()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert field(head, b"sec-websocket-accept") == [ACCEPT]
        assert client.rest() == frame(8, struct.pack("!H", code) + reason)
        client.close()
        assert "reason=" + reason.decode() in gate.line("done")


def test_reject_with_close_holds_for_max_connections_and_drain(tmp_path):
    """What refuses a request before its location is entered is refused as the location says."""
    lines = "reject_with = close", "max_connections = 1", "drain_timeout = 1s"
    with gate_and_backend(tmp_path, None, *lines) as (gate, backend):
        client = gate.connect().send(handshake())
        server = backend.connection()
        refused = gate.connect().send(handshake())
        assert refused.head().startswith(b"HTTP/1.1 101 ")
        assert refused.rest() == frame(8, struct.pack("!H", 4503) + b"conn_limit")
        refused.close()
        server.send(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
        client.close()
        eventually(lambda: not gate.gate.connections)
        late = gate.connect().send(handshake()[:-2])
        eventually(lambda: gate.gate.connections)
        gate.signal("SIGQUIT")
        eventually(lambda: gate.gate.state == "draining")
        assert late.send(b"\r\n").head().startswith(b"HTTP/1.1 101 ")
        assert late.rest() == frame(8, struct.pack("!H", 4503) + b"draining")
        late.close()


HIDDEN = [b"h2c", b"H2C", b"h2", b"TLS/1.0", b"tls", b"HTTP/2.0", b"h2c;x", b'"h2c"', b"h2c-17",
          b"h2c/1", b"raw/1, h2c;q=1", b"h2c x", b"(h2c)", b'raw/1, "h2c', b"http2", b"raw/1/2",
          b"ra w"]


@pytest.mark.parametrize("protocol", HIDDEN)
def test_http_and_tls_are_never_tunnelled(tmp_path, protocol):
    """HTTP/2 inside of a tunnel would bypass every rule of the location."""
    def script(peer):
        peer.send(ok(peer.head()))

    with gate_and_backend(tmp_path, script, "upgrade = any") as (gate, _):
        response = gate.fetch(custom_handshake(upgrade=b"Upgrade: " + protocol, key=b""))
        assert response.status == 200 and not field(response.body, b"upgrade")
        assert field(response.body, b"connection") == [b"close"]


DOCKER = request(b"POST", b"/exec/1/start", b"Connection: Upgrade", b"Upgrade: tcp",
                 body=b'{"Tty":true}')
DOCKER_CHUNKED = (b"POST /exec/1/start HTTP/1.1\r\nHost: gate.test\r\nConnection: Upgrade\r\n"
                  b"Upgrade: tcp\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")


@pytest.mark.parametrize("raw, body, protocol", [
    (DOCKER, b'{"Tty":true}', b"tcp"),
    (DOCKER_CHUNKED, b"5\r\nhello\r\n0\r\n\r\n", b"tcp"),
    (request(b"POST", b"/exec", b"Connection: upgrade", b"Upgrade: SPDY/3.1",
             b"Content-Length: 0"), b"", b"SPDY/3.1"),
    (request(b"POST", b"/ts2021", b"Connection: upgrade", b"Upgrade: tailscale-control-protocol"),
     b"", b"tailscale-control-protocol"),
    (request(b"PUT", b"/", b"Connection: x, UPGRADE", b"Upgrade: a/1", b"Upgrade: B"),
     b"", b"a/1, B"),
])
def test_upgrade_of_a_request_with_a_body(tmp_path, raw, body, protocol):
    """docker exec, kubectl exec and headscale upgrade a POST; its body is not of the tunnel."""
    with nothing_left(), gate_and_backend(tmp_path, None, "upgrade = any") as (gate, backend):
        client = gate.connect().send(raw, b"early")
        peer = backend.connection()
        head = peer.head()
        assert field(head, b"upgrade") == [protocol]
        assert field(head, b"connection") == [re.search(b"(?i)upgrade(?=\r)", raw).group()]
        assert peer.read(len(body)) == body and peer.silent(30 * MS)
        peer.send(b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/x\r\n"
                  b"Connection: Upgrade\r\nUpgrade: %s\r\n\r\nhi" % protocol.split(b",")[0])
        assert client.response().status == 101
        assert client.read(2) == b"hi" and peer.read(5) == b"early"
        line_of(gate, client, peer)


def test_a_101_before_the_end_of_the_body_waits_for_it(tmp_path):
    """The backend may switch as soon as it has the head; the rest of the body still comes first."""
    with nothing_left(), gate_and_backend(tmp_path, None, "upgrade = any") as (gate, backend):
        client = gate.connect().send(DOCKER[:-5])
        peer = backend.connection()
        peer.head()
        peer.send(b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhi")
        assert client.silent(50 * MS)
        client.send(DOCKER[-5:], b"raw")
        assert client.response().status == 101 and client.read(2) == b"hi"
        assert peer.read(15) == b'{"Tty":true}raw'
        line_of(gate, client, peer)


def test_a_refused_upgrade_of_a_post_is_forwarded_whole(tmp_path):
    def script(peer):
        peer.head()
        peer.read(12)
        peer.send(b"HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\nno")

    with gate_and_backend(tmp_path, script, "upgrade = any") as (gate, _):
        client = gate.connect().send(DOCKER)
        response = client.response()
        assert (response.status, response.body) == (409, b"no") and client.ended()
        client.close()


@pytest.mark.parametrize("upgrade, connection", [
    (b"websocket", b"Upgrade"), (b"WebSocket", b"upgrade"), (b"WEBSOCKET", b"UPGRADE")])
def test_upgrade_and_connection_keep_their_spelling(tmp_path, upgrade, connection):
    """Some devices compare both values byte by byte."""
    raw = custom_handshake(upgrade=b"Upgrade: " + upgrade,
                           connection=b"Connection: keep-alive, " + connection)
    with gate_and_backend(tmp_path) as (gate, backend):
        client = gate.connect().send(raw)
        peer = backend.connection()
        head = peer.head()
        assert field(head, b"upgrade") == [upgrade] and field(head, b"connection") == [connection]
        peer.send(switching().replace(b"Upgrade: websocket", b"Upgrade: " + upgrade)
                  .replace(b"Connection: Upgrade", b"Connection: Keep-Alive," + connection))
        response = client.response()
        assert (response.get(b"upgrade"), response.get(b"connection")) == (upgrade, connection)
        line_of(gate, client, peer)


def test_upgrade_twice_in_a_101_becomes_one_field(tmp_path):
    """Browsers fail a handshake whose 101 has the field twice."""
    with gate_and_backend(tmp_path, respond(switching(b"Upgrade: WebSocket"))) as (gate, _):
        response = gate.fetch(handshake())
        assert response.status == 101 and len(field(response.head, b"upgrade")) == 1


@pytest.mark.parametrize("key", [b"A" * 22 + b"==", b"/+" * 11 + b"Zz", b"abcdefghijklmnopqrstuvw=",
                                 b"abcdefghijklmnopqrstux=="])
def test_24_characters_of_base64_are_a_key(tmp_path, key):
    """Proxies exist that make keys of 17 or 18 bytes; the backend decides."""
    answered = switching().replace(ACCEPT, wsgate.accept_for(key))
    with gate_and_backend(tmp_path, respond(answered)) as (gate, backend):
        assert gate.fetch(custom_handshake(key=b"Sec-WebSocket-Key: " + key)).status == 101


WITHOUT_CONNECTION = switching().replace(b"Connection: Upgrade\r\n", b"")


@pytest.mark.parametrize("line, raw, answered, status", [
    ("strict_handshake = off", custom_handshake(connection=b""), switching(), 101),
    ("strict_handshake = off", custom_handshake(connection=b"Connection: keep-alive"),
     switching(), 101),
    ("strict_handshake = off", handshake(), WITHOUT_CONNECTION, 101),
    ("strict_handshake = off", handshake(), switching().replace(b"Upgrade: websocket\r\n", b""),
     502),
    ("strict_handshake = on", handshake(), WITHOUT_CONNECTION, 502),
])
def test_a_lenient_handshake_may_lack_connection(tmp_path, line, raw, answered, status):
    with gate_and_backend(tmp_path, None, line) as (gate, backend):
        client = gate.connect().send(raw)
        peer = backend.connection()
        head = peer.head()
        assert field(head, b"connection") == [b"Upgrade"]
        assert field(head, b"upgrade") == [b"websocket"]
        peer.send(answered)
        response = client.response()
        assert response.status == status
        if status == 101:
            assert response.get(b"connection") == b"Upgrade"
        client.close()
        peer.close()


@pytest.mark.parametrize("offered, selected", [
    ((b"Sec-WebSocket-Protocol: graphql-ws",), b"graphql-ws"),
    ((b"Sec-WebSocket-Protocol: , a\"b, Graphql-WS, chat",), b"Graphql-WS"),
    ((b"Sec-WebSocket-Protocol:", b"Sec-WebSocket-Protocol: v1"), b"v1"),
    ((), None),
])
def test_reject_with_close_selects_an_offered_subprotocol(tmp_path, offered, selected):
    """Clients fail a handshake without it, and would not see the close code."""
    with gate_and_backend(tmp_path, None, "reject_with = close", "deny = all") as (gate, _):
        client = gate.connect().send(handshake(b"/", *offered))
        head = client.head()
        assert head.startswith(b"HTTP/1.1 101 ") and field(head, b"sec-websocket-protocol") == (
            [selected] if selected else [])
        assert client.rest() == frame(8, struct.pack("!H", 4403) + b"access_denied")
        client.close()


# --------------------------------------------------------------------- Relaying


def test_a_slow_reader_is_not_buffered_for(tmp_path):
    most = 192 << 20
    with http_exchange(tmp_path, request()) as (_, client, peer, _):
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % most)
        sent = fill(peer, most=most)
        assert sent < most // 2  # more than all socket buffers (tcp_rmem, tcp_wmem)
        client.head()
        assert receives(client, sent)


def test_a_slow_backend_is_not_buffered_for(tmp_path):
    most = 192 << 20
    with http_exchange(tmp_path, request(b"POST", b"/",
                                         b"Content-Length: %d" % most)) as (_, client, peer, _):
        sent = fill(client, most=most)
        assert sent < most // 2  # more than all socket buffers (tcp_rmem, tcp_wmem)
        assert receives(peer, sent)


def test_no_cpu_for_a_broken_backend(tmp_path):
    with http_exchange(tmp_path, request()) as (_, client, peer, _):
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 << 20))
        fill(peer)
        peer.reset()
        assert cpu_while_waiting(100) < 20 * MS
        client.head()
        assert not ends_by_reset(client)


def test_bytes_before_a_reset_reach_a_slow_reader(tmp_path):
    script = respond(OK + b"Content-Length: 900000\r\n\r\n" + b"x" * 600000)
    with gate_and_backend(tmp_path, script) as (gate,
                                                _), contextlib.closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", gate.port))
        client = Peer(sock).send(request())
        client.head()
        assert client.read(600000) == b"x" * 600000 and not ends_by_reset(client)


def test_no_cpu_for_a_stalled_upload(tmp_path):
    with http_exchange(tmp_path, request(b"POST", b"/",
                                         b"Content-Length: %d"
                                         % (64 << 20))) as (gate, client, peer, _):
        held = next(iter(gate.connections)).request
        while not all(select_readable(held, 0) and client.silent(5 * MS) for _ in range(3)):
            # until the gate does not take it any more, and a little of it waits
            client.send(b"x" * 150000)
        client.finish()
        assert cpu_while_waiting(100) < 20 * MS


@pytest.mark.parametrize("what", ["up", "down"])
def test_large_bodies_are_spliced(tmp_path, monkeypatch, what):
    if not wsgate.CAN_SPLICE:
        pytest.skip("no os.splice here")
    spliced, splice = [], os.splice
    monkeypatch.setattr(os, "splice", lambda *some, **more: spliced.append(1)
                        or splice(*some, **more))
    body = os.urandom(3 << 20)
    up, down = (body, b"ok") if what == "up" else (b"", body)

    def script(peer):
        for _ in range(2):
            assert read_request(peer)[1] == up
            peer.send(ok(down))

    with nothing_left(), gate_and_backend(tmp_path, script) as (gate, backend):
        client = gate.connect()
        for _ in range(2):
            thread = send_in_thread(client,
                                    [request(b"POST", b"/", b"Content-Length: %d" % len(up)) + up])
            assert client.response().body == down
            thread.join()
            before = descriptors()
        assert len(spliced) > 4 and descriptors() <= before
        client.close()


# ---------------------------------------------------------------- Relaying HTTP


@pytest.mark.parametrize("down", ["length", "chunked", "close"])
@pytest.mark.parametrize("up", ["length", "chunked"])
def test_bodies_pass_whole_in_every_framing(tmp_path, up, down):
    def mirror(peer):
        body = read_request(peer)[1]
        peer.send({"length": ok(body), "close": b"HTTP/1.0 200 OK\r\n\r\n" + body,
                   "chunked": OK + CHUNKED + chunked_body(body[:9], body[9:])}[down])

    with gate_and_backend(tmp_path, mirror) as (gate, backend):
        raw = CHUNKED_POST + chunked_body(BODY_300K[:70000], BODY_300K[70000:])
        response = gate.fetch(request(b"POST", body=BODY_300K) if up == "length" else raw)
        assert response.body == BODY_300K and not backend.errors
        names = b"content-length", b"transfer-encoding", b"connection"
        assert [response.get(name) for name in names] == {
            "length": [b"300000", None, None], "chunked": [None, b"chunked", None],
            "close": [None, None, b"close"]}[down]
        assert gate.line("up=0/3000", "down=0/3000")


@pytest.mark.parametrize("method, raw, kept", [
    (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"5"),
    (b"HEAD", OK + CHUNKED, None),
    (b"HEAD", b"HTTP/1.1 200 OK\r\n\r\n", None),
    (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", None),
    (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"5"),
    (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"0")])
def test_responses_without_a_body(tmp_path, method, raw, kept):
    def script(peer):
        peer.send(raw if read_request(peer)[0].split(b" ")[1] == b"/first" else ok(b"second"))
        peer.ended()

    with gate_and_backend(tmp_path, script) as (gate, _):
        client = gate.connect().send(request(method, b"/first"), request(b"GET", b"/second"))
        assert client.response(method).get(b"content-length") == kept
        assert client.response().body == b"second"
        client.close()


@pytest.mark.parametrize("raw, body", [(OK + CHUNKED + CHUNKED_IN, b"hello, world0123456789"),
                                       (ok(b"hello"), b"hello"),
                                       (b"HTTP/1.1 200 OK\r\n\r\nhello", b"hello")])
def test_http_1_0_clients(tmp_path, raw, body):
    """No chunks, no interim responses, one response."""
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    with gate_and_backend(tmp_path, respond(early + raw)) as (gate, _):
        client = gate.connect().send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        head = client.head()
        assert head.startswith(OK) and field(head, b"connection") == [b"close"]
        assert not field(head, b"transfer-encoding")
        assert client.rest() == body
        client.close()


def test_interim_responses(tmp_path):
    """The body follows when the backend sends 100."""
    raw = request(b"POST", b"/", b"Expect: 100-continue", b"Content-Length: 5")
    with http_exchange(tmp_path, raw) as (_, client, peer, head):
        assert field(head, b"expect") == [b"100-continue"] and peer.silent(20 * MS)
        assert client.silent(20 * MS)
        peer.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nConnection: x\r\n\r\n"
                  b"HTTP/1.1 100 Continue\r\n\r\n")
        assert client.head() == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        assert client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"hello")
        assert peer.read(5) == b"hello"
        peer.send(ok())
        assert client.response().body == b"ok"


def test_removed_fields_are_not_in_interim_responses(tmp_path):
    script = respond(b"HTTP/1.1 103 Early Hints\r\nServer: secret\r\nLink: </a>\r\n\r\n", ok())
    with gate_and_backend(tmp_path, script, "add_header = server:") as (gate, _):
        client = gate.connect().send(request())
        assert client.head() == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        assert client.response().body == b"ok"
        client.close()


def test_at_most_32_interim_responses(tmp_path):
    hints = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    with gate_and_backend(tmp_path, respond(hints * 32, ok())) as (gate, _):
        client = gate.connect().send(request())
        assert [client.head() for _ in range(32)] == [hints] * 32
        assert client.response().body == b"ok"
        client.close()


def test_final_response_in_place_of_100(tmp_path):
    raw = request(b"POST", b"/", b"Expect: 100-continue", b"Content-Length: 5")
    with http_exchange(tmp_path, raw) as (_, client, peer, _):
        peer.send(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")
        response = client.response()
        assert (response.status, response.get(b"connection")) == (417, b"close") and client.ended()


def test_upload_and_download_run_at_once(tmp_path):
    with http_exchange(tmp_path, CHUNKED_POST) as (_, client, peer, _):
        peer.send(OK + CHUNKED)
        client.head()
        for word in (b"one", b"two", b"three"):
            client.send(b"%x\r\n%s\r\n" % (len(word), word))
            assert peer.read(len(word) + 5) == b"%x\r\n%s\r\n" % (len(word), word)
            peer.send(b"4\r\necho\r\n")
            assert client.read(9) == b"4\r\necho\r\n"
        client.send(b"0\r\n\r\n")
        peer.send(b"0\r\n\r\n")
        assert (peer.read(5), client.read(5)) == (b"0\r\n\r\n", b"0\r\n\r\n")


def test_response_before_the_end_of_the_upload(tmp_path):
    """It closes the connection."""
    with http_exchange(tmp_path, request(b"POST", b"/", b"Content-Length: 1000")
                       + b"begun") as (_, client, peer, _):
        peer.send(ok(b"enough"))
        response = client.response()
        assert (response.body, response.get(b"connection")) == (b"enough", b"close")
        client.send(request(b"GET", b"/smuggled"))
        assert client.ended()


def test_rest_of_an_upload_is_no_request(tmp_path):
    def script(peer):
        peer.read_until(b"x" * 100)
        peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        peer.reset()

    with gate_and_backend(tmp_path, script) as (gate, _):
        for _ in range(25):
            client = gate.connect().send(request(b"POST", b"/", b"Content-Length: 400001") + b"x"
                                         * 1000)
            with contextlib.suppress(ConnectionError):
                client.send(b"x" * 399000)
            with contextlib.suppress(ConnectionError):
                response = client.response()
                assert response.get(b"connection") == b"close"
            client.close()


def test_pipelined_requests(tmp_path):
    """Each has a backend connection of its own."""
    targets = [b"/%d" % number for number in range(5)]

    def script(peer):
        head, body = read_request(peer)
        peer.send(ok(head.split(b" ")[1] + body))

    with gate_and_backend(tmp_path, script) as (gate, backend):
        client = gate.connect()
        for target in targets[:2]:
            assert client.send(request(b"GET", target)).response().body == target
        posts = [request(b"POST", target, body=b" and body") for target in targets[:2]]
        gets = [request(b"GET", target) for target in targets]
        client.send(*posts + gets + [request(b"GET", b"/last", b"Connection: close")])
        bodies = [client.response().body for _ in range(7)]
        assert bodies == [b"/0 and body", b"/1 and body"] + targets
        last = client.response()
        assert (last.body, last.get(b"connection")) == (b"/last", b"close") and client.ended()
        assert len(backend.connections) == 10
        client.close()


@pytest.mark.parametrize("raw", [ok(b"right"), OK + CHUNKED + chunked_body(b"right")])
def test_bytes_after_a_response(tmp_path, raw):
    """They are not the next response."""
    with gate_and_backend(tmp_path, respond(raw, ok(b"wrong"))) as (gate, _):
        client = gate.connect()
        for _ in range(3):
            assert client.send(request()).response().body == b"right"
        assert client.silent(20 * MS)
        client.close()


@pytest.mark.parametrize("begun", [b"Content-Length: 9\r\n\r\nhell", CHUNKED + b"9\r\nhell",
                                   b"\r\nhell"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_truncated_response(tmp_path, begun, how):
    with http_exchange(tmp_path, request()) as (gate, client, peer, _):
        peer.send(b"HTTP/1.1 200 OK\r\n" + begun)
        client.read_until(b"hell")
        getattr(peer, how)()
        # Without any framing, only a reset shows that the body is incomplete.
        assert ends_by_reset(client) == (how == "reset" and begun.startswith(b"\r\n"))
        client.close()
        assert gate.line(" 200 ", "reason=" + ("-" if not begun.strip(b"hel\r\n")
                                               and how == "close" else "backend_"))


def test_backend_closes_before_responding(tmp_path):
    """502, and the client connection stays open."""
    with http_exchange(tmp_path, request()) as (_, client, peer, _):
        peer.reset()
        response = client.response()
        assert (response.status, response.reason,
                response.get(b"connection")) == (502, "backend_closed", None)
        assert response.body == b"502 Bad Gateway: backend_closed\n" and client.silent(20 * MS)


def test_client_body_timeout(tmp_path):
    """A slow body is not refused."""
    with http_exchange(tmp_path, request(b"POST", b"/", b"Content-Length: 20"),
                       *SHORT_TIMES) as (_, client, peer, _):
        with takes(200, 2000):
            send_slowly(client, b"x" * 10)
        assert peer.read(10) == b"x" * 10
        with takes(120, 700):
            response = client.response()
        assert (response.status, response.reason) == (408, "body_timeout") and peer.ended()


def test_backend_timeout(tmp_path):
    with http_exchange(tmp_path, request(), *SHORT_TIMES) as (_, client, peer, _):
        with takes(130, 700):
            response = client.response()
        assert (response.status, response.reason) == (504, "backend_timeout") and peer.ended()


def test_backend_that_stops_in_a_body(tmp_path):
    """One that is slow is not cut."""
    with http_exchange(tmp_path, request(), *SHORT_TIMES) as (gate, client, peer, _):
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n")
        client.head()
        for _ in range(10):
            assert peer.silent(20 * MS)
            peer.send(b"x")
        assert client.read(10) == b"x" * 10
        with takes(120, 700):
            assert not ends_by_reset(client)
        assert peer.ended() and gate.line(" 200 ", "reason=backend_timeout")


def test_proxy_send_timeout(tmp_path):
    raw = request(b"POST", b"/", b"Content-Length: %d" % (64 << 20))
    with http_exchange(tmp_path, raw, *SHORT_TIMES) as (_, client, _, _):
        with takes(140, 4000):
            fill(client)
            with takes(0, 700):
                response = client.response()
        assert (response.status, response.reason) == (504, "backend_timeout")


def test_send_timeout(tmp_path):
    with http_exchange(tmp_path, request(), *SHORT_TIMES) as (gate, client, peer, _):
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 << 20))
        with takes(140, 4000):
            fill(peer)
            with takes(0, 700):
                gate.line(" 499 ", "reason=send_timeout")
        assert ends_by_reset(client) and peer.ended()


def test_client_gone_closes_the_backend(tmp_path, constants):
    constants(HALF_CLOSED_CLIENT=100 * MS)
    cases = [(how, raw, begun) for how in ("close", "finish", "reset") for raw, begun in (
        (request(), b""), (request(b"POST", body=b"hello"), b""), (CHUNKED_POST + b"5\r\nhel", b""),
        (request(), b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhell"))]
    with gate_and_backend(tmp_path) as (gate, backend):
        waiting = []
        for how, raw, begun in cases:
            waiting.append((gate.connect().send(raw), backend.connection(len(waiting))))
            waiting[-1][1].send(begun)
            waiting[-1][0].read(len(begun))
        for (how, _, _), (client, _) in zip(cases, waiting):
            getattr(client, how)()
        with takes(0, 1000):
            assert [case for case,
                    (_, peer) in zip(cases, waiting) if not peer.ended(1000 * MS)] == []
        eventually(lambda: len([line for line in gate.access if "reason=client_gone" in line])
                   == len(cases))
        for client, _ in waiting:
            client.close()


def test_half_closed_client(tmp_path):
    """It gets a response that comes soon."""
    with http_exchange(tmp_path, request(b"POST", body=b"hello")) as (_, client, peer, _):
        client.finish()
        assert peer.read(5) == b"hello" and peer.silent(50 * MS)
        peer.send(ok())
        assert client.response().body == b"ok"


def test_half_closed_client_of_a_slow_response(tmp_path, constants):
    """The time is that without a byte for it."""
    constants(HALF_CLOSED_CLIENT=180 * MS)
    with http_exchange(tmp_path, request()) as (_, client, peer, _):
        client.finish()
        assert peer.silent(110 * MS)
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
        assert peer.silent(110 * MS)
        peer.send(b"cd")
        assert client.response().body == b"abcd"


def test_a_refused_upgrade_with_a_body_leaves_no_pipe(tmp_path):
    """reject_with = close is for handshakes; any other refusal passes as it came."""
    def refuse(peer):
        peer.head()
        peer.read(200000)
        peer.send(ok().replace(b"200 OK", b"403 Forbidden"))

    with nothing_left(), gate_and_backend(tmp_path, refuse, "upgrade = any",
                                          "reject_with = close",
                                          "client_max_body_size = 0") as (gate, _):
        client = gate.connect().send(
            request(b"POST", b"/", b"Connection: Upgrade", b"Upgrade: tcp",
                    b"Content-Length: 10000000"), b"x" * 400000)
        response = client.response()
        assert (response.status, response.body) == (403, b"ok")
        client.close()


def test_refused_upload(tmp_path):
    with gate_and_backend(tmp_path, None, "client_max_body_size = 1m") as (gate, _):
        client = gate.connect().send(request(b"POST", b"/", body=b"x" * (3 << 20)))
        response = client.response()
        assert (response.status, response.reason,
                response.get(b"connection")) == (413, "body_too_large", b"close")
        assert not ends_by_reset(client)
        client.close()


def test_slow_response_head(tmp_path):
    """The time is that of the whole head: a byte now and then does not extend it."""
    with http_exchange(tmp_path, request(), "proxy_read_timeout = " + ini_ms(150)) as (
            gate, client, peer, _):
        with takes(100, 1500):
            send_slowly(peer, b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 10000)
            response = client.response()
        assert (response.status, response.reason) == (504, "backend_timeout")


# ------------------------------------------------------------------- The tunnel


@pytest.mark.parametrize("kind", ["bytes", "frames", "lost"])
def test_bytes_pass_unchanged(tmp_path, relay_mode, kind):
    """Both ways at once, in any pieces."""
    rng = random.Random(kind)
    with (raw_tunnel if kind == "bytes" else tunnel)(tmp_path) as (gate, client, server):
        if kind == "frames":
            up, down = random_frames(rng, 2500000, True), random_frames(rng, 2500000, False)
        else:
            up, down = b"\xff" + os.urandom(2500000), b"\xff" + os.urandom(2500000)
        threads = [send_in_thread(client, random_pieces(rng, up, 300000)),
                   send_in_thread(server, random_pieces(random.Random(2), down, 300000))]
        got = []
        threads.append(
            threading.Thread(target=lambda: got.append(server.read(len(up))), daemon=True))
        threads[-1].start()
        assert hashlib.sha256(client.read(len(down))).digest() == hashlib.sha256(down).digest()
        for thread in threads:
            thread.join()
        assert hashlib.sha256(got[0]).digest() == hashlib.sha256(up).digest()
        assert client.silent(0) and server.silent(0)
        line = line_of(gate, client, server)
        assert "/%dB" % len(up) in line and "/%dB" % len(down) in line
        assert ("frames=lost" in line) == (kind == "lost")


def test_back_pressure_both_ways(tmp_path, relay_mode):
    with raw_tunnel(tmp_path) as (gate, client, server):
        small_buffers(gate, client, server)
        block = os.urandom(65521)
        up, down = fill(client, block), fill(server, block)
        up += fill(client, block[up % len(block):] + block[:up % len(block)])
        flows = [flow for each in gate.connections for flow in (each.tunnel.up, each.tunnel.down)]
        assert len(flows) == 2 and all(len(flow.pending) <= wsgate.BIG_READ for flow in flows)
        # the other side still reads nothing
        assert client.read(down) == (block * (down // len(block) + 1))[:down]
        assert server.read(up) == (block * (up // len(block) + 1))[:up]


@pytest.mark.parametrize("first", ["client", "backend"])
@pytest.mark.parametrize("kind", ["bytes", "frames"])
def test_all_bytes_before_the_end(tmp_path, relay_mode, first, kind):
    """Whichever side ends first."""
    with (raw_tunnel if kind == "bytes" else tunnel)(tmp_path) as (gate, client, server):
        ending, other = (client, server) if first == "client" else (server, client)
        mask = b"abcd" if first == "client" else None
        data = frame(2, os.urandom(1500000), mask) + frame(8, struct.pack("!H", 1000), mask)
        thread = send_in_thread(ending, [data])
        eventually(lambda: gate.traffic()[1:] != (0, 0))
        received = other.read(100000)
        thread.join()
        ending.close()
        assert received + other.rest() == data
        assert "close=%s:%s " % (first,
                                 "eof" if kind == "bytes"
                                 else "1000") in line_of(gate, client, server)


@pytest.mark.parametrize("first", ["client", "backend"])
def test_half_close(tmp_path, relay_mode, first):
    with raw_tunnel(tmp_path) as (gate, client, server):
        ending, other = (client, server) if first == "client" else (server, client)
        ending.send(b"last words").finish()
        assert other.rest() == b"last words"
        other.send(b"an answer " * 50000)
        assert ending.read(500000) == b"an answer " * 50000
        assert ending.silent(20 * MS)
        other.close()
        assert ending.rest() == b""
        assert "close=%s:eof reason=%s_gone" % (first, first) in line_of(gate, client, server)


@pytest.mark.parametrize("first", ["client", "backend"])
def test_half_closed_tunnel_of_another_protocol(tmp_path, constants, first):
    """It is a way to use a stream (docker exec), so only idle_timeout limits what remains."""
    constants(HALF_CLOSE=50 * MS)
    with raw_tunnel(tmp_path, "idle_timeout = " + ini_ms(120)) as (gate, client, server):
        ending, other = (client, server) if first == "client" else (server, client)
        with takes(110, 1400):
            ending.finish()
            assert other.rest() == b""
            assert ending.rest() == b""


@pytest.mark.parametrize("first", ["client", "backend"])
def test_a_reset_of_one_side_ends_the_other_at_once(tmp_path, relay_mode, first):
    with raw_tunnel(tmp_path) as (gate, client, server):
        ending, other = (client, server) if first == "client" else (server, client)
        ending.send(b"x")
        assert other.read(1) == b"x"
        with takes(0, 1000):
            ending.reset()
            assert other.rest() == b""
        assert "close=%s:rst reason=%s_gone" % (first, first) in line_of(gate, client, server)


@pytest.mark.parametrize("who", ["reader", "sender"])
@pytest.mark.parametrize("first", ["client", "backend"])
def test_a_reset_is_noticed_while_the_tunnel_is_stalled(tmp_path, constants, first, who):
    constants(LINGER=100 * MS)
    with raw_tunnel(tmp_path) as (gate, client, server):
        small_buffers(gate, client, server)
        ending, other = (client, server) if first == "client" else (server, client)
        fill(other if who == "reader" else ending, os.urandom(65536))
        ending.reset()
        # though the other one has read nothing yet
        eventually(lambda: not gate.connections, within=1200 * MS)
        assert other.ended()
        assert "close=" + first in line_of(gate, client, server)


def test_idle_timeout(tmp_path):
    """Any byte in either direction restarts it."""
    http = ["%s = %s" % (name, ini_ms(70))
            for name in ("client_header_timeout", "keepalive_timeout")]
    with tunnel(tmp_path, "idle_timeout = " + ini_ms(160), *http) as (gate, client, server):
        for sender, other in ((client, server), (server, client)):
            sender.send(b"x")
            other.read(1)
            assert client.silent(90 * MS)  # 180 ms altogether
        with takes(160, 1300):
            client.send(b"x")
            server.read(1)
            assert client.ended() and server.ended()
        assert "reason=idle_timeout" in line_of(gate, client, server)


def test_idle_timeout_of_a_location(tmp_path):
    with nothing_left(), ScriptedBackend() as backend:
        ini = ini_for(backend,
                      "idle_timeout = 10s") + "[location /short]\nidle_timeout = %s\n[location /]\n"
        with running(ini % ini_ms(120), tmp_path) as gate:
            peers = {}
            with takes(120, 1300):
                for path in (b"/long", b"/short"):
                    peers[path] = gate.connect().send(handshake(path))
                    backend.connection(len(peers) - 1).send(switching())
                    assert peers[path].response().status == 101
                assert peers[b"/short"].ended()
            assert peers[b"/long"].silent(30 * MS)
            for peer in list(peers.values()) + backend.connections:
                peer.close()


@pytest.mark.skipif(not wsgate.CAN_SPLICE, reason="no splice here")
def test_bulk_has_a_pipe_and_only_while_it_lasts(tmp_path, constants):
    constants(QUIET=10 * MS, PIPE_KEEP=50 * MS)
    with tunnel(tmp_path) as (gate, client, server):
        before = pipe_ends()
        for data in (frame(2, b"x" * 100), frame(2, b"x" * 10000)):
            server.send(data)
            assert client.read(len(data)) == data
        assert pipe_ends() == before
        big = frame(2, os.urandom(2 << 20))
        thread = send_in_thread(server, [big])
        assert client.read(len(big)) == big
        thread.join()
        assert pipe_ends() == before + 2
        with takes(0, 3000):
            eventually(lambda: pipe_ends() == before)
        server.send(big)
        assert client.read(len(big)) == big


def test_descriptors_above_1024(tmp_path):
    resource = pytest.importorskip("resource")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 3500:
        pytest.skip("only %d descriptors allowed" % hard)
    with nothing_left(), contextlib.ExitStack() as spare, gate_and_backend(tmp_path) as (
            gate, backend):
        for _ in range(1100 // 2):
            for sock in socket.socketpair():
                spare.enter_context(sock)
        clients = [gate.connect().send(handshake(b"/%d" % number)) for number in range(50)]
        eventually(lambda: len(backend.connections) == 50)
        assert sum(peer.sock.fileno() > 1100 for peer in clients + backend.connections) > 90
        numbers = []
        for server in backend.connections:
            numbers.append(server.head().split()[1][1:])
            server.send(switching(), frame(1, numbers[-1]))
        for number, client in enumerate(clients):
            assert client.response().status == 101
            assert read_frame(client) == (1, b"%d" % number)
            client.send(frame(1, b"%d" % number, b"abcd"))
        for number, server in zip(numbers, backend.connections):
            assert read_frame(server) == (1, number)
        for peer in clients + backend.connections:
            peer.close()


def test_stalled_clients_do_not_delay_others(tmp_path):
    with gate_and_backend(tmp_path) as (gate, backend):
        idle = [gate.connect() for _ in range(20)] + [gate.connect().send(b"GET / HT")]
        stalled, flooding = gate.tunnel(backend)
        small_buffers(gate, stalled, flooding)
        fill(flooding, b"\x7f" * 65536)
        client, server = gate.tunnel(backend)
        with takes(0, 500):
            for _ in range(20):
                client.send(frame(1, b"ping", b"abcd"))
                server.read(10)
                server.send(frame(1, b"pong"))
                client.read(6)
        for peer in idle + [client, server, stalled, flooding]:
            peer.close()


@pytest.mark.parametrize("name", ["check_101", "Tunnel.check_timers"])
def test_internal_error(tmp_path, constants, monkeypatch, name):
    constants(QUIET=50 * MS)

    def broken(*arguments):
        raise RuntimeError("a defect")

    monkeypatch.setattr("wsgate." + name, broken)
    with gate_and_backend(tmp_path) as (gate, backend), nothing_left():
        client = gate.connect().send(handshake())
        backend.connection().send(switching())
        if name == "check_101":
            response = client.response()
            assert (response.status, response.reason) == (500, "internal_error")
        assert client.ended() and backend.connection().ended()
        client.close()
        backend.connection().close()
        assert "reason=internal_error" in gate.line("reason=internal_error")
        assert any("internal error" in line for line in gate.errors)
        eventually(lambda: not gate.connections and not gate.connections.in_use)
        gate.errors.clear()


@pytest.mark.parametrize("who", ["client", "backend"])
def test_half_closed_tunnel_lasts_until_silence(tmp_path, constants, who):
    """One side has ended; the other may go on for longer than HALF_CLOSE while frames come."""
    constants(HALF_CLOSE=100 * MS)
    with tunnel(tmp_path) as (gate, client, server):
        ending, other = (client, server) if who == "client" else (server, client)
        more = frame(1, b"more", b"abcd" if who == "backend" else None)
        ending.finish()
        assert other.rest() == b""
        for _ in range(3):
            other.send(more)
            assert ending.read(len(more)) == more
            assert ending.silent(40 * MS)
        with takes(50, 1200):
            assert ending.rest() == b""
        assert "close=%s:eof reason=%s_gone" % (who, who) in line_of(gate, client, server)


def test_times_longer_than_poll_takes_are_kept(tmp_path):
    """poll(2) takes 31 bits of milliseconds, 24.8 days."""
    keys = ("idle_timeout", "proxy_read_timeout", "proxy_send_timeout", "proxy_connect_timeout",
            "send_timeout", "client_header_timeout", "client_body_timeout", "keepalive_timeout",
            "ping_interval", "ping_timeout")
    with gate_and_backend(tmp_path, None, *["%s = 3650d" % key for key in keys]) as (gate, backend):
        client, server = gate.tunnel(backend)
        client.send(frame(1, b"there", b"abcd"))
        assert read_frame(server) == (1, b"there")
        server.send(frame(1, b"and back"))
        assert read_frame(client) == (1, b"and back")
        asker = gate.connect().send(request(b"POST", b"/", b"Content-Length: 2"))
        assert asker.silent(20 * MS)
        asker.send(b"hi")
        second = backend.connection(1)
        second.read_until(b"hi")
        second.send(ok())
        assert asker.response().status == 200
        for peer in (client, server, asker):
            peer.close()


@pytest.mark.parametrize("peers", ["client", "backend"])
def test_ping_peers_pings_one_side_alone(tmp_path, peers):
    with tunnel(tmp_path, PINGING, "ping_peers = " + peers) as (_, client, server):
        read_ping(client if peers == "client" else server, peers == "backend")
        assert (server if peers == "client" else client).silent(120 * MS)


@pytest.mark.parametrize("pending", [b"", b"before"], ids=["move", "flush"])
@pytest.mark.parametrize("end, how", [("reset", "rst"), ("close", "eof")])
def test_how_the_peer_of_a_broken_sink_has_ended(end, how, pending):
    """It decides the close= of the log when the other side is read first."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(socket.socket()))
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        peer = Peer(socket.create_connection(listener.getsockname()))
        ours, theirs = [stack.enter_context(contextlib.closing(sock))
                        for sock in socket.socketpair()]
        sink = stack.enter_context(contextlib.closing(wsgate.Stream(listener.accept()[0])))
        flow = wsgate.Flow(wsgate.Stream(ours), sink)
        flow.begin(wsgate.UntilClose(), 0.0)
        getattr(peer, end)()
        while flow.sink_state is wsgate.OPEN:  # the first write to a closed socket brings the RST
            assert select_readable(sink.sock, 5000 * MS)
            theirs.send(b"x")
            if pending:
                flow.pending = pending
                flow.flush(0.0)
            else:
                flow.move(0.0)
        assert flow.sink_state is wsgate.BROKEN and flow.broken_by == how


# ------------------------------------------------------------- WebSocket frames


def test_close_in_pieces_after_bulk():
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(contextlib.closing(end))
                for end in socket.socketpair() + socket.socketpair()]
        streams = [wsgate.Stream(end) for end in ends]
        flow = wsgate.Flow(streams[0], streams[1])
        flow.begin(wsgate.FrameScanner(False, False, 0, 0.0), 0.0)
        data = frame(2, b"x" * wsgate.SPLICE_MINIMUM)
        flow.scanner.feed(data, 1.0)
        assert flow.can_splice()
        close = frame(8, b"\x03\xe8bye")
        flow.scanner.feed(close[:4], 1.0)
        assert not flow.can_splice()
        flow.scanner.feed(close[4:], 1.0)
        assert flow.scanner.close == (1000, b"bye")


@pytest.mark.parametrize("begun", [b"\x82", b"\x82\x7f\0\0\0", b"\x8a", b"\x8a\4ga"], ids=repr)
def test_splice_stops_before_headers_and_pongs(begun):
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(contextlib.closing(end))
                for end in socket.socketpair() + socket.socketpair()]
        streams = [wsgate.Stream(end) for end in ends]
        flow = wsgate.Flow(streams[0], streams[1])
        flow.begin(wsgate.FrameScanner(False, False, 0, 0.0), 0.0)
        flow.scanner.expect_pong(b"gate", 1.0)
        flow.scanner.feed(frame(2, b"x" * wsgate.SPLICE_MINIMUM), 1.0)
        assert flow.can_splice()
        flow.scanner.feed(begun, 1.0)
        assert not flow.can_splice()


@pytest.mark.skipif(not wsgate.CAN_SPLICE, reason="no splice here")
@pytest.mark.parametrize("beside, turns", [(False, 1), (True, 10)], ids=["alone", "beside chats"])
def test_a_turn_of_bulk_is_short_beside_chats(monkeypatch, constants, beside, turns):
    """Or each chat would wait for a whole pipe of each of the bulk streams."""
    constants(SHORT_TURN=5000)
    monkeypatch.setattr(wsgate.Turns, "crowd", wsgate.Crowd())
    wsgate.Turns.crowd.brief_until = 100.0
    data = os.urandom(50000)
    with contextlib.ExitStack() as stack:
        source, ours, sink, theirs = [
            stack.enter_context(contextlib.closing(end))
            for end in socket.socketpair() + socket.socketpair()]
        flow = wsgate.Flow(wsgate.Stream(ours), wsgate.Stream(sink))
        flow.begin(wsgate.UntilClose(), 0.0)
        stack.callback(flow.close_pipe)
        source.sendall(data)
        for _ in range(turns):
            assert flow.bytes < len(data)
            flow.bulk = True
            assert flow.splice(99.0 if beside else 100.0)
        assert flow.bytes == len(data) and Peer(theirs).read(len(data)) == data


@pytest.mark.parametrize("upload", [False, True], ids=["download", "upload"])
@pytest.mark.parametrize("upgrade", [False, True], ids=["http", "tunnel"])
def test_bulk_is_counted_as_bulk(tmp_path, monkeypatch, upgrade, upload):
    works, took = [], wsgate.Turns.took
    monkeypatch.setattr(wsgate.Turns, "took", lambda turns, now, work: (
        works.append(work), took(turns, now, work))[1])
    data = b"x" * (2 << 20)
    with gate_and_backend(tmp_path) as (gate, backend):
        if upgrade:
            client, peer = gate.tunnel(backend)
            sender, receiver = (client, peer) if upload else (peer, client)
            data = frame(2, data, b"abcd" if upload else None)
        else:
            length = b"Content-Length: %d" % len(data)
            client = gate.connect().send(request(b"POST", b"/", length) if upload
                                         else request(b"GET", b"/"))
            peer = backend.connection(0)
            peer.head()
            sender, receiver = (client, peer) if upload else (peer, client)
            if not upload:
                peer.send(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n\r\n")
                client.head()
        thread = send_in_thread(sender, [data])
        assert receiver.read(len(data)) == data
        thread.join()
        assert max(works) >= wsgate.Turns.BULK > wsgate.Turns.PERIOD
        client.close()
        peer.close()


@pytest.mark.parametrize("masked", [False, True])
def test_frame_scanner(masked):
    """It finds the ends of frames and counts messages in all chunkings."""
    data, ends = wire(masked, (1, b"hello", True), (1, b"", True), (2, b"x" * 125, True),
                      (2, b"y" * 126, True),
                      (1, b"one", False), (9, b"ping", True), (0, b"two" * 100, False),
                      (0, b"", True), (10, b"", True),
                      (2, b"\x81\x05hello" * 10, True), (2, b"z" * 65536, True), (1, b"end", True))
    for pieces in all_chunkings(data):
        scanner, position = wsgate.FrameScanner(masked, False, 0, 0.0), 0
        for piece in pieces:
            assert scanner.feed(piece, 1.0) == piece
            position += len(piece)
            assert scanner.between() == (position in ends)
        assert scanner.messages == 8 and not scanner.lost and scanner.close is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("payload, close", [
    (b"", (1005, b"")),
    (b"\x03\xe8", (1000, b"")),
    (b"\x03\xf3\xc3\xbcber", (1011, b"\xc3\xbcber")),
    (b"\x10\xe1" + b"r" * 123, (4321, b"r" * 123)),
])
def test_the_scanner_reads_the_code_and_reason_of_a_close(masked, payload, close):
    data, _ = wire(masked, (1, b"before", True), (8, payload, True))
    for pieces in all_chunkings(data):
        scanner = scan(pieces, masked)
        assert scanner.close == close and scanner.between() and scanner.messages == 1


@pytest.mark.parametrize("masked, data", [
    (False, frame(3, b"data")), (True, frame(7, b"data", b"abcd")), (False, frame(11)),
    (True, frame(15, b"", b"abcd")), (False, frame(9, b"ping", fin=False)),
    (True, frame(8, b"\x03\xe8", b"abcd", fin=False)), (False, frame(10, b"x" * 126)),
    (True, frame(9, b"x" * 126, b"abcd")), (False, frame(8, b"x" * 70000)),
    (False, frame(1, b"x", rsv=4)), (False, frame(2, b"x", rsv=2)),
    (True, frame(0, b"x", b"abcd", rsv=1)), (False, frame(1, b"masked", b"abcd")),
    (True, frame(1, b"not masked")), (False, b"\x82\xff" + b"\0" * 12),
    (False, b"\x82\x7f\x80" + b"\0" * 7), (True, b"\x82\xff\xff" + b"\0" * 11),
    (False, b"GET / HTTP/1.1\r\n"),
    (True, b"raw bytes and no frames"),
], ids=lambda value: repr(value)[:40])
def test_frame_scanner_gives_up(masked, data):
    good = frame(1, b"good", b"abcd" if masked else None)
    for before in (b"", good, good * 3):
        for pieces in all_chunkings(before + data):
            scanner = scan(pieces, masked)
            assert scanner.lost and scanner.notable and not scanner.between()


def test_an_extension_may_use_the_reserved_bits():
    data = frame(1, b"deflated", rsv=4) + frame(2, b"x" * 200, rsv=7,
                                                fin=False) + frame(0, rsv=1) + frame(9, rsv=2)
    for pieces in all_chunkings(data):
        scanner = scan(pieces, extensions=True)
        assert not scanner.lost and scanner.between() and scanner.messages == 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 5, 100, 125, 126, 300, 5000])
def test_burst_of_equal_frames(masked, size):
    one = frame(2, os.urandom(size), b"\x82\x05ab" if masked else None)
    for count in (2, 3, 17, 64, 200):
        scanner = scan([one * count], masked)
        assert scanner.messages == count and scanner.between() and not scanner.lost
        scanner = scan([one * count + one[:-1] or one[:1]], masked)
        assert (scanner.messages >= count) and not scanner.between()
        scanner = scan([one * count + frame(8, b"\x03\xe8", b"abcd" if masked else None) + one[:1]],
                       masked)
        assert scanner.messages == count and scanner.close == (1000, b"") and not scanner.between()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [101, 201])
def test_no_close_after_half_a_header(masked, size):
    one = frame(2, b"x" * size, b"\x82\x05ab" if masked else None)
    for half in range(len(one) - size):
        scanner = wsgate.FrameScanner(masked, False, 100, 0.0)
        assert scanner.feed(one[:half], 1.0) == one[:half]
        assert scanner.feed(one[half:] + one * 3, 1.0) == b""
        assert scanner.too_big and scanner.between() == (half == 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_burst_of_mixed_frames(masked, seed):
    rng = random.Random(seed)
    sizes = [rng.choice((0, 1, 5, 7, 124, 125, 126, 127, 400)) for _ in range(3)]
    for _ in range(60):
        data, ends, messages = b"", {0}, 0
        for _ in range(rng.randint(1, 60)):
            kind = rng.choice((0x81, 0x81, 0x81, 0x82, 0x02, 0x80, 0x89))
            size = min(rng.choice(sizes), 125 if kind == 0x89 else 1000)
            payload = rng.choice((b"\x81\x05", b"\x00", b"\x82\x85")) * size  # looks like headers
            data += frame(kind & 15, payload[:size], b"\x81\x85\x00\x01" if masked else None,
                          fin=kind > 127)
            ends.add(len(data))
            messages += 0x80 < kind + 1 and kind != 0x89
        cut = rng.randint(0, len(data))
        scanner = scan([data[:cut]], masked)
        assert scanner.between() == (cut in ends) and not scanner.lost
        assert scanner.feed(data[cut:], 1.0) == data[cut:]
        assert scanner.between() and scanner.messages == messages


@pytest.mark.parametrize("masked, extensions, limit", [
    (False, False, 0), (True, False, 0), (False, True, 0), (True, True, 0), (True, False, 100)])
def test_a_short_frame_read_alone(masked, extensions, limit):
    """feed() takes it in one step: with the result of scan(), whatever its first two bytes are."""
    for first, length, bit, more in itertools.product(
            range(256), (0, 1, 4, 8, 125, 126, 127), (0, 0x80), (-1, 0, 1)):
        header = 6 if bit else 2
        data = bytes((first, bit | length)) + bytes(4) + bytes(range(200))
        data = data[:header + length + more]
        results = []
        for take in wsgate.FrameScanner.feed, wsgate.FrameScanner.scan:
            scanner = wsgate.FrameScanner(masked, extensions, limit, 0.0)
            scanner.expect_pong(data[header:], 0.0)
            passed = take(scanner, data, 1.0)
            results.append((passed, [getattr(scanner, name) for name in scanner.__slots__]))
        assert results[0] == results[1], data


PINGING = "ping_interval = " + ini_ms(60)


def test_a_ping_that_cannot_be_written_at_once(tmp_path):
    """It is written as soon as the backend reads, and not only when the tunnel ends."""
    lines = ("ping_interval = " + ini_ms(300), "ping_timeout = " + ini_ms(20000),
             "ping_peers = backend")
    with gate_and_backend(tmp_path, None, *lines) as (gate, backend):
        client, server = gate.tunnel(backend)
        flow = gate.gate.connections.tunnels()[0].up
        sent = fill_to_the_last_byte(flow.sink.sock)  # without the tunnel
        eventually(flow.writing)
        server.read(sent)
        server.send(frame(10, read_ping(server, True)))
        client.send(frame(1, b"alive?", b"abcd"))
        assert server.read(12) == frame(1, b"alive?", b"abcd")
        client.close()
        server.close()


def test_ping_interval(tmp_path):
    """The pong is not passed on."""
    with tunnel(tmp_path, PINGING) as (gate, client, server):
        with takes(30, 600):
            to_client = read_ping(client, False)
        to_server = read_ping(server, True)
        assert to_client != to_server
        client.send(frame(10, to_client, b"wxyz"), frame(1, b"up", b"wxyz"))
        server.send(frame(1, b"down"), frame(10, to_server), frame(9, b"own"))
        assert server.read(8) == frame(1, b"up", b"wxyz")
        assert client.read(11) == frame(1, b"down") + frame(9, b"own")
        line = line_of(gate, client, server)
        assert "up=1/%dB down=1/%dB" % (6 + 8 + 6 + 2, 2 + 4 + 2 + 8 + 2 + 3) in line
        assert 0 < float(re.search(r" rtt=(\S+)", line).group(1)) < 1


def test_pongs_in_pieces(tmp_path):
    """Those for the gate are removed, others pass."""
    with tunnel(tmp_path, PINGING) as (gate, client, server):
        payload = read_ping(client, False)
        read_ping(server, True)  # no pong, so no second ping
        text, empty = frame(1, b"text", b"abcd"), frame(10, b"", b"wxyz")
        foreign = frame(10, b"mine", b"wxyz") + text + frame(10, bytes(8), b"wxyz") + empty
        client.send(foreign)
        assert server.read(len(foreign)) == foreign
        send_bytewise(gate, client, foreign + frame(10, payload, b"wxyz"))
        assert server.read(len(foreign)) == foreign and server.silent(20 * MS)
        payload = read_ping(client, False)
        pong = frame(10, payload, b"\0\x8a\x88\xff")
        client.send(text, pong, text, pong)  # the second one is unsolicited
        assert server.read(20 + 14) == text + text + pong


@pytest.mark.parametrize("glued", ["alone", "before bulk", "after bulk"])
def test_pong_next_to_bulk(tmp_path, glued):
    with tunnel(tmp_path, PINGING) as (gate, client, server):
        payload = read_ping(client, False)
        read_ping(server, True)
        big, text, pong = frame(2, os.urandom(1 << 20),
                                b"abcd"), frame(1, b"on", b"wxyz"), frame(10, payload, b"wxyz")
        if glued != "after bulk":
            thread = send_in_thread(client, [big])
            assert server.read(len(big)) == big
            thread.join()
        sent = {"alone": [pong], "before bulk": [pong + big], "after bulk": [big + pong]}[glued]
        thread = send_in_thread(client, sent + [text])
        expected = (b"" if glued == "alone" else big) + text
        assert server.read(len(expected)) == expected
        thread.join()
        assert read_ping(client, False) != payload


def test_pings_go_between_frames_only(tmp_path):
    with tunnel(tmp_path, PINGING) as (gate, client, server):
        data = frame(2, b"one half and the other half", b"abcd")
        client.send(data[:3])
        read_ping(client, False)
        assert server.read(3) == data[:3] and server.silent(90 * MS)
        client.send(data[3:15])
        assert server.read(12) == data[3:15] and server.silent(90 * MS)
        client.send(data[15:])
        assert server.read(len(data) - 15) == data[15:]
        read_ping(server, True)


def test_ping_timeout(tmp_path):
    with tunnel(tmp_path, PINGING, "ping_timeout = " + ini_ms(100)) as (gate, client, server):
        with takes(100, 1400):
            read_ping(client, False)
            assert closing_code(client, False) is not None
        line = line_of(gate, client, server)
        assert "reason=ping_timeout" in line and "close=gate:" in line


def test_ping_timeout_of_the_backend(tmp_path):
    with tunnel(tmp_path, PINGING, "ping_timeout = " + ini_ms(100)) as (gate, client, server):
        with takes(100, 1400):
            answering = PongThread(client, b"abcd")
            read_ping(server, True)
            answering.thread.join()
        assert answering.codes == [1011]
        assert "close=gate:1011 reason=ping_timeout" in line_of(gate, client, server)


def test_pings_keep_a_tunnel_alive_beyond_idle_timeout(tmp_path):
    lines = PINGING, "ping_timeout = " + ini_ms(250), "idle_timeout = " + ini_ms(150)
    with tunnel(tmp_path, *lines) as (gate, client, server):
        answering = [PongThread(client, b"abcd"), PongThread(server, None)]
        with takes(200, 3000):
            eventually(lambda: min(each.pings for each in answering) >= 4)
        assert not any(each.codes for each in answering)
        for peer in (client, server):
            peer.sock.shutdown(socket.SHUT_RDWR)
        for each in answering:
            each.thread.join()


def test_random_frames_among_pings(tmp_path, relay_mode):
    """They arrive unchanged."""
    with tunnel(tmp_path, "ping_interval = " + ini_ms(3)) as (gate, client, server):
        one, two = RandomPeer(client, random.Random(relay_mode),
                              True), RandomPeer(server, random.Random(6455), False)
        thread = threading.Thread(target=one.run, daemon=True)
        thread.start()
        two.run()
        thread.join(5000 * MS)
        assert two.received == one.talk and one.received == two.talk
        assert max(one.pings, two.pings) >= 3
        line = line_of(gate, client, server)
        assert "up=%d/%dB down=%d/%dB close=" % (one.messages, one.sent, two.messages,
                                                 two.sent) in line
        assert ":1000 reason=-" in line and " rtt=" in line


ENDINGS = {
    # what happens: (Close code at the client, at the backend; None: no Close frame; "-": has gone),
    # log line
    "idle": (1001, 1001, "close=gate:1001 reason=idle_timeout"),
    "SIGTERM": (1001, 1001, "close=gate:1001 reason=shutdown"),
    "backend ends": (None, "-", "close=backend:eof reason=backend_gone"),
    "backend resets": (None, "-", "close=backend:rst reason=backend_gone"),
    "client ends": ("-", None, "close=client:eof reason=client_gone"),
    "client resets": ("-", None, "close=client:rst reason=client_gone"),
}


@pytest.mark.parametrize("what", sorted(ENDINGS))
def test_only_the_gate_ends_a_tunnel_with_a_close_frame(tmp_path, constants, what):
    """Between frames, or inside a frame of either direction, after which no Close may be sent."""
    constants(QUIET=50 * MS)
    at_client, at_backend, logged = ENDINGS[what]
    idle = "idle_timeout = " + ini_ms(150 if what == "idle" else 60000)
    with nothing_left(), gate_and_backend(tmp_path, None, idle) as (gate, backend):
        plain, up, down = [gate.tunnel(backend) for _ in range(3)]
        halves = b"\x81\x8fabcdefg", b"\x81\x0fcut off"
        up[0].send(halves[0])
        down[1].send(halves[1])
        eventually(lambda: gate.traffic()[1:] == (9, 9))
        with takes(0, 1500):
            if what == "SIGTERM":
                gate.signal(what)
                gate.signal = lambda name: None  # once is enough
            elif what != "idle":
                who, does = what.split()
                for pair in (plain, up, down):
                    getattr(pair[who == "backend"], {"ends": "finish", "resets": "reset"}[does])()
            if at_client != "-":
                for each, before in ((plain, b""), (up, b""), (down, halves[1])):
                    assert closing_code(each[0], False, before) == (None if before else at_client)
                    assert each[0].was_reset == (what == "backend resets")
            if at_backend != "-":
                for each, before in ((plain, b""), (down, b""), (up, halves[0])):
                    assert closing_code(each[1], True, before) == (None if before else at_backend)
                    assert each[1].was_reset == (what == "client resets")
        for peer in plain + up + down:
            peer.close()
        eventually(lambda: sum("101 closed" in line for line in list(gate.access)) == 3)
        assert sum(logged in line for line in gate.access) == 3, gate.access


@pytest.mark.parametrize("who", ["client", "backend"])
def test_no_second_close(tmp_path, who):
    with tunnel(tmp_path, "idle_timeout = " + ini_ms(100)) as (gate, client, server):
        saying, other, mask = (client, server,
                               b"abcd") if who == "client" else (server, client, None)
        farewell = frame(8, b"\x0f\xa1bye", mask)
        saying.send(farewell)
        assert closing_code(other, who == "client", farewell) is None
        assert closing_code(saying, who == "backend") == 1001
        assert "close=%s:4001 reason=idle_timeout" % who in line_of(gate, client, server)


@pytest.mark.parametrize("who, code", [("client", 1000), ("backend", 1011), ("client", 1005)])
def test_close_and_counters_in_the_log(tmp_path, who, code):
    with tunnel(tmp_path) as (gate, client, server):
        client.send(frame(1, b"a", b"abcd"), frame(2, b"", b"abcd"), frame(9, b"", b"abcd"))
        server.send(frame(1, b"part", fin=False), frame(0, b"part"))
        server.read(7 + 6 + 6)
        client.read(6 + 6)
        saying, other = (client, server) if who == "client" else (server, client)
        payload = b"" if code == 1005 else struct.pack("!H", code)
        saying.send(frame(8, payload, b"abcd" if who == "client" else None))
        assert read_frame(other) == (8, payload)
        other.send(frame(8, payload, b"abcd" if who == "backend" else None))
        assert read_frame(saying) == (8, payload)
        server.close()
        assert client.rest() == b""
        ending = "up=2/%dB down=1/%dB close=%s:%d reason=-" % (25 + len(payload), 14 + len(payload),
                                                               who, code)
        assert ending in line_of(gate, client)


@pytest.mark.parametrize("quiet", [False, True])
def test_sockets_close_after_both_closes(tmp_path, constants, quiet):
    """Also if no timer was due for a long time."""
    constants(HALF_CLOSE=100 * MS)
    with tunnel(tmp_path) as (gate, client, server):
        if quiet:
            eventually(lambda: gate.gate.connections.tunnels()[0].wakeup)
        assert not quiet or client.silent(60 * MS)  # each pause longer than QUIET / 10
        client.send(frame(8, b"\x03\xe8", b"abcd"))
        assert read_frame(server) == (8, b"\x03\xe8")
        assert not quiet or client.silent(60 * MS)
        with takes(100, 1200):
            server.send(frame(8, b"\x03\xe8"))
            assert read_frame(client) == (8, b"\x03\xe8")
            assert client.rest() == b"" and server.rest() == b""


@pytest.mark.parametrize("first", ["client", "backend"])
def test_both_closes_and_one_fin_end_a_tunnel(tmp_path, first):
    with tunnel(tmp_path) as (gate, client, server):
        client.send(frame(8, b"\x03\xe8", b"abcd"))
        server.send(frame(8, b"\x03\xe8"))
        assert read_frame(server) == read_frame(client) == (8, b"\x03\xe8")
        (client if first == "client" else server).finish()
        eventually(lambda: not gate.gate.connections.tunnels(), within=2000 * MS)
        assert client.rest() == server.rest() == b""


def test_both_closes_and_a_fin_before_a_close_is_written(tmp_path):
    with tunnel(tmp_path) as (gate, client, server):
        flow = gate.gate.connections.tunnels()[0].up
        filled = fill_to_the_last_byte(flow.sink.sock)  # without the tunnel
        client.send(frame(8, b"\x03\xe8", b"abcd"))
        eventually(flow.writing)
        server.send(frame(8, b"\x03\xe8"))
        server.finish()
        assert read_frame(client) == (8, b"\x03\xe8") and client.rest() == b""
        server.read(filled)
        assert read_frame(server) == (8, b"\x03\xe8") and server.rest() == b""
        eventually(lambda: not gate.gate.connections.tunnels(), within=2000 * MS)


@pytest.mark.parametrize("who", ["client", "backend"])
@pytest.mark.parametrize("shape", ["whole", "fragments", "header in pieces", "bulk"])
def test_max_message_size(tmp_path, who, shape):
    with tunnel(tmp_path, "max_message_size = "
                + ("2m" if shape == "bulk" else "200")) as (gate, client, server):
        saying, other, mask = (client, server,
                               b"abcd") if who == "client" else (server, client, None)
        passing = {"fragments": frame(2, b"x" * 100, mask, fin=False) + frame(9, b"x" * 125, mask),
                   "bulk": frame(2, b"x" * (2 << 20), mask)}.get(shape, frame(2, b"x" * 200, mask))
        large = {"fragments": frame(0, b"y" * 101, mask),
                 "bulk": frame(2, b"y" * ((2 << 20) + 1),
                               mask)}.get(shape, frame(2, b"y" * 201, mask))
        thread = send_in_thread(saying, [passing])
        assert other.read(len(passing)) == passing
        thread.join()
        if shape == "header in pieces":
            saying.send(large[:1])
            assert other.read(1) == large[:1]
        saying.send(large[shape == "header in pieces":][:300])
        assert closing_code(saying, who == "backend") == 1009
        assert closing_code(other,
                            who == "client") == (None if shape == "header in pieces" else 1001)
        line = line_of(gate, client, server)
        assert "reason=message_too_big" in line and "close=gate:" in line


def test_close_to_unresponsive_peers(tmp_path, monkeypatch):
    """Their sockets are closed in a limited time."""
    monkeypatch.setattr(wsgate, "LINGER", 120 * MS)
    monkeypatch.setattr(wsgate, "HALF_CLOSE", 120 * MS)
    monkeypatch.setattr(wsgate.Tunnel.finish, "__defaults__", (120 * MS,))  # its `seconds`: LINGER
    with nothing_left(), gate_and_backend(tmp_path, None,
                                          "idle_timeout = " + ini_ms(120)) as (gate, backend):
        with takes(120, 1300):
            idle, left = gate.tunnel(backend), gate.tunnel(backend)
            left[1].finish()
            assert closing_code(left[0], False) is None
            assert closing_code(idle[0], False) == 1001
            assert closing_code(idle[1], True) == 1001
        eventually(lambda: len(gate.connections) < 2)
        eventually(lambda: not gate.connections, 1600 * MS)
        gate.line("reason=idle_timeout")
        gate.line("reason=backend_gone")
        for peer in idle + left:
            peer.close()


@pytest.mark.parametrize("size", [200, 20000])
def test_max_message_size_inside_a_message(size):
    """A frame that is like the last message counts for the message that has begun all the same."""
    whole, begun = frame(2, bytes(size)), frame(2, bytes(size - 1), fin=False)
    scanner = wsgate.FrameScanner(False, False, 2 * size - 2, 0.0)
    assert scanner.feed(whole + begun, 0.0) == whole + begun
    assert scanner.peek(lambda size, flags: whole[:size], 0.0) == 0
    assert scanner.feed(whole, 0.0) == b"" and scanner.too_big


def test_max_message_size_and_invalid_frames(tmp_path):
    with gate_and_backend(tmp_path, None, "max_message_size = 1k") as (gate, backend):
        client, peer = gate.tunnel(backend)
        client.send(frame(2, b"unmasked, as some backends accept"))
        assert read_frame(client) == (8, b"\x03\xeabad_frames")
        assert peer.ended()
        assert "close=gate:1002 reason=bad_frames" in line_of(gate, client, peer)


@pytest.mark.parametrize("data, code, reason", [
    (frame(2, b"x" * 1025, b"abcd", rsv=4), 1009, b"message_too_big"),
    (b"these are no frames", 1002, b"bad_frames")])
def test_max_message_size_and_extensions(tmp_path, data, code, reason):
    with gate_and_backend(tmp_path, None, "max_message_size = 1k") as (gate, backend):
        client = gate.connect().send(handshake(b"/", b"Sec-WebSocket-Extensions: x-unknown"))
        peer = backend.connection()
        peer.head()
        peer.send(switching(b"Sec-WebSocket-Extensions: x-unknown"))
        assert client.response().status == 101
        fits = frame(2, b"x" * 1024, b"abcd", rsv=4)
        client.send(fits, data)
        assert peer.read(len(fits)) == fits
        assert read_frame(client) == (8, struct.pack("!H", code) + reason)
        assert "reason=" + reason.decode() in line_of(gate, client, peer)


def test_a_refusal_in_a_close_frame_is_only_for_a_handshake(tmp_path):
    with gate_and_backend(tmp_path, respond(ok()), "reject_with = close",
                          "deny = all") as (gate, _):
        key = b"Sec-WebSocket-Key: " + KEY
        assert gate.fetch(request(b"GET", b"/", key)).status == 403
        assert gate.fetch(request(b"POST", b"/", key, b"Upgrade: websocket", b"Connection: upgrade",
                                  body=b"x")).status == 403


def frame_of_any_form(rng, opcode, payload, mask, fin=True):
    """A frame whose length is written in 7, 16 or 64 bits, as small as it is or not."""
    length = len(payload)
    plain = frame(opcode, payload, mask, fin)
    forms = [width for width in (2, 8) if opcode < 8 and length < 1 << (8 * width)]
    if not forms or rng.random() < 0.5:
        return plain
    width, bit = rng.choice(forms), 0x80 if mask else 0
    header = bytes((plain[0], bit | {2: 126, 8: 127}[width])) + length.to_bytes(width, "big")
    return header + (mask or b"") + plain[len(plain) - length:]


def any_frames(rng, masked, pings):
    """Frames with or without order in their sizes -> [(bytes, True if they pass)], messages."""
    sizes = [rng.choice((0, 1, 5, 10, 24, 125, 126, 127, 300, 20000)) for _ in range(3)]
    if rng.random() < 0.4:
        sizes = sizes[:1]
    frames, messages, inside = [], 0, False
    for _ in range(rng.randint(1, 40)):
        mask = bytes(rng.getrandbits(8) for _ in range(4)) if masked else None
        chance = rng.random()
        if chance < 0.1:
            payload = b"p" * rng.randint(0, 125)
            frames.append((frame(rng.choice((9, 10)), payload, mask), True))
        elif chance < 0.15 and pings:
            frames.append((frame(10, pings.pop(), mask), False))
        else:
            size, fin = rng.choice(sizes), rng.random() < 0.7
            payload = (rng.choice((b"\x82\xff", b"\x81\x05", b"\x8a\x88")) * size)[:size]
            opcode = 0 if inside else rng.choice((1, 2))
            frames.append((frame_of_any_form(rng, opcode, payload, mask, fin), True))
            inside, messages = not fin, messages + fin
    return frames, messages


def fed_and_skipped(rng, scanner, data, bounds):
    """Feed data in random pieces, skip what may be spliced -> the bytes that passed."""
    position, passed = 0, b""
    while position < len(data):
        size = rng.choice((1, 2, 3, 7, 50, 1000, 16384, 100000))
        if scanner.bulk() and rng.random() < 0.5:
            spliced = scanner.remaining or scanner.peek(
                lambda size, flags: data[position:position + size], 1.0)
            spliced = min(spliced, rng.randint(1, 60000), len(data) - position)
            scanner.skip(spliced)
            passed += data[position:position + spliced]
            position += spliced
        else:
            passed += scanner.feed(data[position:position + size], 1.0)
            position += size
        assert not scanner.lost and scanner.between() == (len(passed) in bounds)
        assert len(scanner.partial) <= 139
    return passed + scanner.release()


@pytest.mark.parametrize("tenth", range(10))
def test_any_frames_in_any_pieces_pass_and_are_counted(tenth):
    """Random sequences, all forms of lengths, pings of the gate's own, spliced or not."""
    sequences = int(os.environ.get("FRAME_SEQUENCES", "300")) // 10
    for seed in range(tenth * sequences, (tenth + 1) * sequences):
        rng = random.Random(seed)
        masked = rng.random() < 0.5
        pings = [b"%08d" % number for number in range(2)]
        scanner = wsgate.FrameScanner(masked, False, 0, 0.0)
        for payload in pings:
            scanner.expect_pong(payload, 0.0)
        frames, messages = any_frames(rng, masked, pings)
        bounds = set(itertools.accumulate([0] + [len(data) for data, passes in frames if passes]))
        passed = fed_and_skipped(rng, scanner, b"".join(data for data, _ in frames), bounds)
        assert passed == b"".join(data for data, passes in frames if passes), seed
        assert scanner.messages == messages, seed


@pytest.mark.parametrize("masked", [False, True])
def test_max_message_size_and_similar_headers(masked):
    """Two small frames with 64-bit lengths, then a large one whose payload repeats a header."""
    mask = b"abcd" if masked else b""
    header = bytes((0x82, 0xFF if masked else 0x7F))
    small = header + (10).to_bytes(8, "big") + mask + b"x" * 10
    step = len(small)
    size = step * 4200 - len(mask) - 10
    large = bytearray(header + size.to_bytes(8, "big") + mask + b"x" * size)
    for place in range(step, len(large), step):
        large[place:place + 2] = header
    scanner = wsgate.FrameScanner(masked, False, 1000, 0.0)
    assert scanner.feed(small * 2, 1.0) == small * 2
    assert scanner.feed(bytes(large), 1.0) == b"" and scanner.too_big and scanner.messages == 2


def test_held_pong_passes_after_invalid_frames(tmp_path):
    with tunnel(tmp_path, PINGING) as (gate, client, server):
        payload = read_ping(client, False)
        read_ping(server, True)
        pong = frame(10, payload, b"abcd")
        client.send(pong[:5])
        assert server.silent(20 * MS)
        server.send(b"these are not frames")
        assert client.read(20) == b"these are not frames"
        assert server.read(5) == pong[:5]
        client.send(pong[5:])
        assert server.read(len(pong) - 5) == pong[5:]


# ------------------------------------------------------------------- Access log


def test_access_log_of_a_tunnel(tmp_path):
    """Two lines with one ID."""
    with ScriptedBackend() as backend:
        ini = "[location /chat/]\nproxy_pass = http://%s\n[server]\n" % backend.where
        with running(ini, tmp_path) as gate:
            raw = handshake(b"/chat/?token=secret&room")
            client, peer = open_tunnel(gate.port, backend, raw)
            opened = gate.line(" open ")
            client.send(frame(1, b"hello", b"mask"), frame(8, b"\x03\xe8", b"mask"))
            assert [read_frame(peer) for _ in range(2)] == [(1, b"hello"), (8, b"\x03\xe8")]
            peer.send(frame(2, b"x" * 300), frame(8, b"\x03\xe8"))
            peer.close()
            assert client.ended()
            client.close()
            closed = gate.line(" closed ")
            assert len(gate.access) == 2
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ([0-9a-f]{6,8}) 127\.0\.0\.1 gate\.test "
    where = re.escape(backend.where)
    first = re.fullmatch(stamp + r"open /chat/ %s hs=\d+\.\d+" % where, opened)
    last = re.fullmatch(stamp + r'"GET /chat/\?token=\.\.\.&room HTTP/1\.1" 101 closed /chat/ %s '
                        r"dur=\d+\.\d+ hs=\d+\.\d+ up=[12]/19B down=[12]/308B close=client:1000 "
                        r"reason=-"
                        % where, closed)
    assert first and last, (opened, closed)
    assert first.group(1) == last.group(1)
    assert opened.split()[0] == closed.split()[0]


def test_access_log_of_requests(tmp_path):
    """One line each, with an ID of its own."""
    with gate_and_backend(tmp_path, respond(ok(b"12345"))) as (gate, backend):
        gate.fetch(request(b"POST", b"/one", body=b"abc"))
        gate.fetch(request(b"GET", b"/two"))
        line = gate.line("/one")
        assert re.fullmatch(r'\S+Z [0-9a-f]{6,8} 127\.0\.0\.1 gate\.test "POST /one HTTP/1\.1" 200 '
                            r'done / %s '
                            r"dur=\d+\.\d+ up=0/3B down=0/\d+B reason=-" % re.escape(backend.where),
                            line), line
        assert line.split()[1] != gate.line("/two").split()[1]


@pytest.mark.parametrize("target, shown", [
    (b"/?token=secret&a=b;c=d", "/?token=...&a=...;c=..."),
    (b"/?flag&empty=&x=", "/?flag&empty=&x="), (b"/?0123456789012345678901234567", "/?..."),
    (b"/path=secret", "/path=secret"), (b"/?a=b=c", "/?a=..."), (b"/?", "/?"),
])
def test_the_values_of_a_query_are_not_logged(tmp_path, target, shown):
    with running("[server]\nreturn = 204\n", tmp_path) as gate:
        gate.fetch(request(b"GET", target))
        assert '"GET %s HTTP/1.1" 204 ' % shown in gate.line(" 204 ")


@pytest.mark.parametrize("raw", [
    request(b"GET", b'/"x"?\\n', b'Origin: http://e"v\til\\\xff\x9b'),
    handshake(b'/"', b'Origin: http://\t"\x80'),
    b'GET / HTTP/1.1" 200\r\n\r\n', b"GET /\x1b[2J HTTP/1.1\r\n\r\n",
    request(b"GET", b"/", b"Host: a b\xe9"), request(b"GET", b"/", b'X"Y: 1'),
    request(b"GET", b"/", b"Sec-WebSocket-Key: " + KEY),
])
def test_what_a_peer_sends_cannot_forge_a_line(tmp_path, raw):
    with running("[server]\nallowed_origins = same\n%s" % PASS, tmp_path) as gate:
        assert gate.fetch(raw).status in (400, 403, 426)
        line = gate.line("reason=")
        assert re.fullmatch("[ -~]*", line) and line.count('"') in (2, 4), line
        assert "\\" not in line or "\\x" in line


@pytest.mark.parametrize("line", [
    b"Authorization : Bearer REDACTED_FIELDS", b"Authorization: Bearer REDACTED_FIELDS\x01",
    b"Authorization Bearer REDACTED_FIELDS", b"Authorization: Bearer\r\n REDACTED_FIELDS:",
    b"REDACTED_FIELDS", b"X: y\nSECRET: z"])
def test_malformed_field_lines_are_not_logged(tmp_path, line):
    with running("[server]\nreturn = 204\n", tmp_path) as gate:
        response = gate.fetch(request(b"GET", b"/", line))
        assert response.status == 400 and b"REDACTED_FIELDS" not in response.head + response.body
        assert "REDACTED_FIELDS" not in gate.line(" 400 done")


def test_a_client_that_goes_away_is_499_and_client_gone(tmp_path):
    with gate_and_backend(tmp_path) as (gate, backend):
        client = gate.connect().send(request(b"GET", b"/slow"))
        backend.connection().head()
        client.reset()
        assert re.search(r' 499 done / .* reason=client_gone$', gate.line("/slow"))
        assert backend.connection().ended(1000 * MS)
        gate.connect().send(b"GET /half HTTP/1.1\r\n").close()
        assert ' "-" 499 done - - ' in gate.line('"-"')


@pytest.mark.parametrize("raw, marks", [
    (b"HTTP/1.1 302 Found\r\nLocation: https://sso.test/login?next=%2F&key=secret\r\n"
     b"Content-Length: 0\r\n\r\n",
     (" 302 ", "reason=backend_said_302",
      'note="redirected to https://sso.test/login?next=...&key=..."')),
    (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
     (" 403 ", "reason=backend_said_403", 'note="Origin https://page.test, Host gate.test"')),
    (ok(), (" 200 ", "reason=backend_said_200")),
])
def test_a_handshake_that_the_backend_refuses_is_explained(tmp_path, raw, marks):
    with gate_and_backend(tmp_path, respond(raw)) as (gate, _):
        assert gate.fetch(handshake(b"/", b"Origin: https://page.test")).status == int(marks[0])
        line = gate.line("reason=")
        assert all(mark in line for mark in marks), line


def test_a_location_of_two_words_stays_one_field(tmp_path):
    with running("[server]\n[location = /a]\nreturn = 200\n", tmp_path) as gate:
        gate.fetch(request(b"GET", b"/a"))
        assert " 200 done =\\x20/a - dur=" in gate.line("/a")


def test_log_format_json(tmp_path):
    """One object per line, with the same values."""
    with own_logging(), ScriptedBackend() as backend:
        (path, _), _ = log_to_files(tmp_path, "log_format = json")
        with running(ini_for(backend), tmp_path) as gate:
            client, peer = gate.tunnel(backend)
            client.send(frame(1, b"hello", b"mask"))
            read_frame(peer)
            peer.close()
            client.ended()
            client.close()
            gate.fetch(request(b"GET", b'/a/../"?token=secret'))
            eventually(lambda: len(lines_in(path)) == 3)
        lines = [json.loads(line) for line in lines_in(path)]
    events = {line["event"]: line for line in lines}
    assert events["open"]["id"] == events["closed"]["id"] != events["done"]["id"]
    assert "request" not in events["open"]
    closed, done = events["closed"], events["done"]
    assert (closed["status"], closed["up_messages"], closed["up_bytes"],
            closed["down_bytes"]) == (101, 1, 11, 0)
    assert (closed["host"], closed["client"],
            closed["server"]) == ("gate.test", "127.0.0.1", backend.where)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", closed["time"])
    assert done["status"] == 400 and done["reason"] == "bad_request"
    assert "secret" not in json.dumps(lines)


def test_logs_reopen_after_a_rename(tmp_path):
    with own_logging():
        paths, reopen = log_to_files(tmp_path)
        for round_ in ("one", "two", "three"):
            wsgate.access_log.info("access %s", round_)
            wsgate.log.warning("error %s \u00e9", round_)
            wsgate.log.debug("not at level info")
            if round_ == "one":
                for path in paths:
                    os.rename(path, path + ".1")
            else:
                reopen()
        wsgate.close_logs()
        assert lines_in(paths[0] + ".1") == ["access one", "access two"]
        assert lines_in(paths[0]) == ["access three"]
        line, = lines_in(paths[1])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING error three \u00e9",
                            line)
        assert [line.split(" ", 1)[1] for line in lines_in(paths[1] + ".1")] == [
            "WARNING error one \u00e9", "WARNING error two \u00e9"]


def test_a_log_that_cannot_be_opened_leaves_the_old_ones(tmp_path):
    with own_logging():
        paths, _ = log_to_files(tmp_path)
        folder = os.path.join(str(tmp_path), "gone")
        os.mkdir(folder)
        server = load_text(tmp_path, SERVER + "access_log = %s\n"
                           % os.path.join(folder, "log")).server
        os.rmdir(folder)
        before = descriptors()
        assert wsgate.open_logs(server)["access_log"].endswith("(No such file or directory)")
        wsgate.access_log.info("still here")
        assert descriptors() == before
        wsgate.close_logs()
        assert lines_in(paths[0]) == ["still here"]


def test_log_level_and_off_are_obeyed(tmp_path):
    with own_logging():
        (_, path), _ = log_to_files(tmp_path, "log_level = error")
        wsgate.log.warning("no")
        wsgate.log.error("yes")
        wsgate.close_logs()
        assert len(lines_in(path)) == 1
        wsgate.open_logs(load_text(tmp_path, SERVER + "access_log = off\nerror_log = off\n").server)
        wsgate.log.error("nowhere")
        assert not wsgate.access_log.isEnabledFor(logging.INFO) and len(lines_in(path)) == 1


def test_syslog(tmp_path):
    with own_logging(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as syslogd:
        syslogd.bind(("127.0.0.1", 0))
        syslogd.settimeout(5000 * MS)
        where = "syslog:127.0.0.1:%d" % syslogd.getsockname()[1]
        wsgate.open_logs(load_text(tmp_path, SERVER + "access_log = %s\nerror_log = %s\n"
                                   % (where, where)).server)
        wsgate.access_log.info("GET /")
        wsgate.log.warning("beware")
        # and no NUL at their ends
        lines = sorted((syslogd.recv(4096).decode() for _ in range(2)), reverse=True)
    assert lines[0] == "<30>wsgate: GET /"
    assert re.fullmatch("<28>wsgate: [-0-9T:.]+Z WARNING beware", lines[1])


def test_readyz_while_draining(tmp_path):
    with ScriptedBackend(echo_service) as backend, with_status(tmp_path, backend,
                                                               "drain_timeout = 60s") as (
                                                                   gate, fetch):
        client = gate.connect().send(handshake())
        assert client.response().status == 101
        gate.signal("SIGQUIT")
        eventually(lambda: not listening(gate.port))
        response = fetch(b"/readyz")
        assert (response.status, response.body) == (503, b"draining\n")
        assert fetch(b"/healthz").status == 200
        client.close()
        wait_for_end(gate)


# ------------------------------------------------------------------ Log writers


@needs_signals
def test_stalled_reader_of_stdout(tmp_path):
    """Lines are dropped, counted in log and metrics; TERM ends the process."""
    errors, status = str(tmp_path / "error.log"), free_port()
    with unread_program(tmp_path, "return = 200", "error_log = " + errors,
                    "status_listen = 127.0.0.1:%d" % status) as child:
        with contextlib.closing(connect(child.port)) as peer:
            for _ in range(400):  # of 8 kB each: a pipe takes 64 KiB, the queue 1 MiB, twice
                assert peer.send(request(b"GET", b"/" + b"x" * 8000)).response().status == 200
        with contextlib.closing(connect(status)) as peer:
            body = peer.send(request(b"GET", b"/metrics", b"Host: 127.0.0.1")).response().body
        assert int(re.search(br'log_lines_dropped_total\{log="access_log"\} (\d+)',
                             body).group(1)) > 50
        begun = time.monotonic()
        child.terminate()
        assert child.wait(5000 * MS) == 0 and time.monotonic() - begun < 2000 * MS
        assert re.search(r"access_log: \d+ lines dropped", "\n".join(lines_in(errors)))


@needs_unix
def test_stalled_syslogd(tmp_path, monkeypatch):
    monkeypatch.setattr(wsgate.LogWriter, "LIMIT", 1000)
    monkeypatch.setattr(wsgate.LogWriter, "PATIENCE", 100 * MS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd, own_logging():
        syslogd.bind(str(tmp_path / "log"))
        writer = wsgate.LogWriter("syslog:", wsgate.SyslogSink(str(tmp_path / "log"), "daemon"))
        wsgate.log.addHandler(writer)
        for number in range(2000):
            wsgate.log.warning("line %d", number)
        assert writer.dropped > 0 and writer.size <= 1000
        syslogd.settimeout(5000 * MS)
        first = syslogd.recv(4096)
        assert first == b"<28>wsgate: line 0"
        begun = time.monotonic()
        writer.close()
        assert time.monotonic() - begun < 2000 * MS
        syslogd.settimeout(50 * MS)
        with contextlib.suppress(socket.timeout):
            while syslogd.recv(4096):
                pass
        eventually(lambda: not writer.thread.is_alive())


@needs_unix
def test_two_logs_that_stall_cost_the_patience_of_one(tmp_path, monkeypatch):
    """A container runtime that hangs reads neither stdout nor stderr."""
    monkeypatch.setattr(wsgate.LogWriter, "PATIENCE", 500 * MS)
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with own_logging():
        wsgate.open_logs(load_text(
            tmp_path, "[server]\nreturn = 200\naccess_log = %s\nerror_log = %s\n" % (
                path, path)).server)
        writers = list(wsgate.log_writers().values())
        for writer in writers:
            writer.handle(logging.makeLogRecord({"msg": "x" * 200000}))
        with takes(500, 900):
            wsgate.close_logs()
        os.close(reader)
        eventually(lambda: not any(writer.thread.is_alive() for writer in writers))


def test_lines_that_cannot_be_written_are_counted(tmp_path):
    with own_logging(), open("/dev/full", "w") as full:
        writer = wsgate.LogWriter("/dev/full", wsgate.FileSink(os.dup(full.fileno()), "w"))
        wsgate.access_log.addHandler(writer)
        wsgate.access_log.setLevel(logging.INFO)
        for _ in range(3):
            wsgate.access_log.info("lost")
        eventually(lambda: writer.dropped == 3)


def test_lines_lost_while_a_log_is_replaced_are_counted(tmp_path):
    """A full disk, then USR1: the writer that ends has lost what it had queued."""
    with own_logging():
        text = "[server]\nreturn = 200\nerror_log = %s\naccess_log = " % (tmp_path / "log")
        wsgate.open_logs(load_text(tmp_path, text + "/dev/full\n").server)
        for _ in range(3):
            wsgate.log_writers()["access_log"].handle(logging.makeLogRecord({"msg": "lost"}))
        wsgate.open_logs(load_text(tmp_path, text + "off\n").server)
        assert wsgate.log_writers()["access_log"].dropped == 3


def test_dropped_lines_are_reported_meanwhile(tmp_path):
    with own_logging():
        (_, path), _ = log_to_files(tmp_path)
        wsgate.log_writers()["access_log"].dropped = 3
        with running("[server]\nreturn = 200\n", tmp_path) as gate:
            gate.gate.next_sample = 0
            gate.fetch(request())  # wakes it up
            eventually(lambda: "access_log: 3 lines dropped" in "\n".join(lines_in(path)))


def test_log_writers_survive_a_reload(tmp_path):
    """Otherwise each reload beside a stalled reader would leave a thread."""
    with own_logging():
        text = "[server]\nreturn = 200\naccess_log = syslog:127.0.0.1:9\nerror_log = %s\n" % (
            tmp_path / "log")
        server = load_text(tmp_path, text).server
        wsgate.open_logs(server)
        writer = wsgate.log_writers()["access_log"]
        wsgate.log_writers()["error_log"].dropped = 5
        wsgate.open_logs(server)
        assert wsgate.log_writers()["access_log"] is writer
        assert wsgate.log_writers()["error_log"].dropped == 5


# ----------------------------------------------------------------------- Status

LABEL = r'[a-z_]+="([^"\\]|\\["\\n])*"'
METRIC_SAMPLE = re.compile(r"[a-z_]+(\{%s(,%s)*\})? [0-9.]+(e[-+]?[0-9]+)?" % (LABEL, LABEL))
COMMENT = re.compile(r"# (HELP [a-z_]+ \S.*|TYPE [a-z_]+ (counter|gauge|histogram))")


def test_status_pages(tmp_path):
    with ScriptedBackend(echo_service) as backend, with_status(tmp_path, backend) as (gate, fetch):
        client = gate.connect().send(handshake())
        assert client.response().status == 101
        assert tunnel_works(client)
        assert gate.fetch(request()).status == 200 and gate.line(" 200 done ")
        assert gate.fetch(request(b"GET", b"/../")).status == 400
        assert gate.line("reason=bad_request")
        facts = json.loads(fetch(b"/status.json").body.decode())
        assert (facts["tunnels_open"], facts["tunnels"], facts["state"]) == (1, 1, "running")
        assert facts["refusals"] == {"bad_request": 1}
        server, = facts["servers"]
        assert (server["server"], server["state"], server["active"]) == (backend.where, "up", 1)
        tunnel, = facts["live"]
        assert (tunnel["client"], tunnel["up_messages"], tunnel["up_bytes"]) == ("127.0.0.1", 1, 12)
        page = fetch(b"/")
        assert page.get(b"content-type").startswith(b"text/html")
        assert b"<svg" in page.body and backend.where.encode() in page.body
        samples = {}
        for line in fetch(b"/metrics").body.decode().splitlines():
            assert COMMENT.fullmatch(line) or METRIC_SAMPLE.fullmatch(line), line
            name, _, value = line.rpartition(" ")
            samples[name] = value
        assert samples["wsgate_tunnels"] == "1"
        assert samples['wsgate_requests_total{status="200"}'] == "1"
        assert samples['wsgate_refusals_total{reason="bad_request"}'] == "1"
        assert samples['wsgate_handshake_seconds_bucket{le="+Inf"}'] == samples[
            "wsgate_handshake_seconds_count"] == "1"
        assert samples['wsgate_bytes_total{direction="up"}'] == "12"
        client.close()


@pytest.mark.parametrize("path, method, status, body", [
    (b"/healthz", b"GET", 200, b"ok\n"), (b"/readyz", b"GET", 200, b"ready\n"),
    (b"/healthz", b"HEAD", 200, b""), (b"/nothing", b"GET", 404, b"no_route: no such page\n"),
    (b"/nothing", b"HEAD", 404, b""), (b"/", b"POST", 405, b"method_not_allowed\n")])
def test_status_paths(tmp_path, path, method, status, body):
    with ScriptedBackend() as backend, with_status(tmp_path, backend) as (_, fetch):
        response = fetch(path, method)
        assert (response.status, response.body) == (status, body)
        assert response.get(b"allow") == (b"GET, HEAD" if status == 405 else None)


def test_status_allow(tmp_path):
    with ScriptedBackend() as backend, with_status(tmp_path, backend,
                                                   "status_allow = 10.0.0.0/8") as (_, fetch):
        assert fetch(b"/healthz").status == fetch(b"/status.json").status == 403


@pytest.mark.parametrize("host, status", [
    (b"127.0.0.1", 200), (b"127.0.0.1:80", 200), (b"[::1]:9", 200), (b"LOCALHOST", 200),
    (b"rebind.test", 403), (b"127.0.0.1.rebind.test", 403), (b"0x7f.1", 403)])
def test_status_host(tmp_path, host, status):
    """Else a web page could read it by DNS rebinding (a name of its own for this address)."""
    with ScriptedBackend() as backend, with_status(tmp_path, backend) as (gate, _):
        with contextlib.closing(connect(gate.listeners[1].server_address[1])) as peer:
            response = peer.send(request(b"GET", b"/status.json", b"Host: " + host)).response()
        assert response.status == status
        assert response.get(b"x-frame-options") == b"DENY"
        assert b"default-src 'none'" in response.get(b"content-security-policy")


def test_status_host_names(tmp_path):
    with running("[server]\nreturn = 200\nlisten = 127.0.0.1:0\nstatus_listen = 127.0.0.1:0\n",
                 tmp_path) as gate:
        listener = gate.listeners[1]
        listener.listen = listener.listen._replace(address=wsgate.Address("Status.test", 1, None))
        with contextlib.closing(connect(listener.server_address[1])) as peer:
            assert peer.send(request(b"GET", b"/", b"Host: status.test:1")).response().status == 200


@needs_unix
@pytest.mark.parametrize("name", [None, "bound", b"\0wsgate-test-abstract"])
def test_status_page_on_a_unix_socket(tmp_path, name):
    """Who may connect is decided by the permissions of the socket; a client may have any name."""
    path = str(tmp_path / "status")
    with running("[server]\nreturn = 200\nstatus_listen = unix:%s\n" % path, tmp_path), \
            socket.socket(socket.AF_UNIX) as sock:
        if name:
            sock.bind(str(tmp_path / name) if isinstance(name, str) else name)
        sock.settimeout(5000 * MS)
        sock.connect(path)
        sock.sendall(request(b"GET", b"/readyz", b"Host: anything.test"))
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_silent_connections_do_not_shut_the_status_page(tmp_path, monkeypatch):
    monkeypatch.setattr(wsgate, "STATUS_TIMEOUT", 600)
    with ScriptedBackend(echo_service) as backend, with_status(tmp_path, backend) as (gate, fetch):
        port = gate.listeners[1].server_address[1]
        silent = [connect(port) for _ in range(100)]
        assert fetch(b"/healthz").status == 200
        eventually(lambda: gate.gate.workers.busy <= 16)
        assert silent[0].ended() and gate.fetch(request()).status == 200
        for peer in silent:
            peer.close()


def test_metrics_do_not_build_the_table_of_tunnels(tmp_path, monkeypatch):
    with ScriptedBackend(echo_service) as backend, with_status(tmp_path, backend) as (gate, fetch):
        client = gate.connect().send(handshake())
        assert client.response().status == 101
        monkeypatch.setattr(wsgate, "describe_tunnel", None)
        assert b"\nwsgate_tunnels 1\n" in fetch(b"/metrics").body
        client.close()


# ----------------------------------------------------------------- Command line


def test_t_of_a_valid_file(tmp_path):
    load_text(tmp_path, SERVER + "[location /a]\nproxy_pass = http://127.0.0.1:9/\n")
    status, output = run_program("-t", cwd=str(tmp_path))
    assert status == 0
    warning, good = log_lines(output)
    assert "warning: " in warning and "[location /a/]" in warning
    assert good == "wsgate: configuration file wsgate.ini test is successful"


def test_t_of_a_wrong_file(capsys, tmp_path):
    assert len(errors_of(tmp_path, SERVER + "listen = x\nlisten_on = 1\n")) == 2
    path = os.path.join(str(tmp_path), "wsgate.ini")
    status, output = run_main(capsys, "-t", "-c", path)
    assert status == 1
    assert [line.partition(": [")[0] for line in sorted(log_lines(output))] == [
        "wsgate: %s:%d" % (path, number) for number in (3, 4)]
    assert run_main(capsys, "-c", path) == (1, output)  # it does not start either


@pytest.mark.parametrize("backend, where", [
    ("3000", "127.0.0.1:3000"), (":3000", "127.0.0.1:3000"), ("a.test", "a.test:80"),
    ("3000/x/", "127.0.0.1:3000"), ("[::1]:9", "[::1]:9"), ("https://a.test:9/x", "a.test:9"),
    ("unix:/run/a", "unix:/run/a")])
def test_a_port_alone_is_a_backend_on_this_machine(backend, where):
    config = wsgate.reload_config(
        *wsgate.find_config(wsgate.parse_arguments(["--backend", backend])))
    assert config.upstreams[0].servers[0].name == where


@pytest.mark.parametrize("option, value", [
    ("--backend", "ftp://a"), ("--backend", ""), ("--listen", "a:b:c"), ("--listen", "")])
def test_an_error_of_an_option_names_the_option(capsys, option, value):
    line, = log_lines(run_main(capsys, "--listen", "127.0.0.1:0", "--backend", "127.0.0.1:9",
                               option, value, "-t")[1])
    assert re.match("wsgate: %s: (invalid|no address) " % option, line) and value in line


@pytest.mark.parametrize("arguments", [("--nonsense",), ("-s", "nonsense"), ("-c",), ("file.ini",),
                                       ("--count", "x")])
def test_misuse_is_exit_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        wsgate.main(arguments)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("usage: wsgate.py")


def test_no_configuration_file(tmp_path):
    status, output = run_program(cwd=str(tmp_path))
    assert status == 1
    lines = log_lines(output)
    assert len([line for line in lines if "no wsgate.ini" in line]) == 1
    assert "proxy_pass" in lines[-1] and len(lines) <= 2


def test_default_configuration_files(capsys, tmp_path, monkeypatch):
    assert errors_of(tmp_path, "[server]\nreturn = 200\nhere = 1\n")
    monkeypatch.chdir(tmp_path)
    assert "wsgate.ini:3: [server] here: unknown key" in run_main(capsys, "-t")[1]


def test_listen_and_backend_options(impatient):
    with ScriptedBackend() as backend, process("--listen", "127.0.0.1:0", "--backend",
                                               backend.where) as child:
        port = port_of(child)
        client, peer = open_tunnel(port, backend, handshake())
        client.send(frame(1, b"hello", b"mask"))
        assert read_frame(peer) == (1, b"hello")
        begun = time.monotonic()
        child.send_signal(signal.SIGTERM)
        eventually(lambda: not listening(port), 700 * MS)
        assert read_frame(client)[0] == 8 and read_frame(peer)[0] == 8
        client.close()
        peer.close()
        eventually(lambda: child.poll() is not None)
        assert time.monotonic() - begun < 2000 * MS
        assert child.returncode == 0 and child.lines
        assert not child.logged("Traceback")


def test_a_port_in_use_is_one_line_that_helps():
    with ScriptedBackend() as other:
        status, output = run_program("--listen", other.where, "--backend", "127.0.0.1:9")
    line, = log_lines(output)
    assert status == 1 and other.where in line and "already in use by another program" in line


def test_print_options(capsys):
    assert re.fullmatch(r"wsgate %s, Python 3\.\d+\.\S+\n" % re.escape(wsgate.VERSION),
                        run_main(capsys, "-v")[1])
    status, output = run_main(capsys, "-h")
    assert status == 0
    assert not [option for option in ("-c", "-t", "-s", "--listen", "--backend", "--demo",
                                      "--probe", "--print-unit", "--print-config", "-v",
                                      "-h") if not re.search(r"(?m)^  .*%s\b" % option, output)]
    with open(SAMPLE) as file:
        assert run_main(capsys, "--print-config") == (0, file.read())


def test_hash_password_takes_a_password_from_a_pipe():
    done = subprocess.run(
        [sys.executable, PROGRAM, "--hash-password", "bob"], input="secret\n",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
        timeout=20000 * MS)
    assert done.returncode == 0 and re.fullmatch(r"bob:\{\w+\}\S+\n", done.stdout)
    assert run_program("--hash-password", "bob") == (1, "wsgate: no password given\n")


def test_print_unit_prints_a_unit_for_this_file(capsys):
    status, output = run_main(capsys, "--print-unit")
    unit = configparser.RawConfigParser()
    unit.optionxform = str
    unit.read_string(
        "".join(line for line in output.splitlines(True)
                if not line.startswith("wsgate: the unit")))
    assert status == 0 and unit.sections() == ["Unit", "Service", "Install"]
    assert unit["Service"]["ExecStart"].split()[1] == WSGATE and unit["Service"]["Type"] == "notify"


def test_s_stop_ends_the_gate_of_the_pid_file(tmp_path):
    load_text(tmp_path, "[server]\nlisten = 127.0.0.1:0\nreturn = 200 hello\npid = gate.pid\n")
    pid = os.path.join(str(tmp_path), "gate.pid")
    with process(cwd=str(tmp_path)) as child:
        assert connect(port_of(child)).send(request()).response().body == b"hello"
        with open(pid) as file:
            assert int(file.read()) == child.pid
        assert run_program("-s", "stop", cwd=str(tmp_path)) == (0, "")
        eventually(lambda: child.poll() is not None)
        assert child.returncode == 0 and not os.path.exists(pid)
    status, output = run_program("-s", "stop", cwd=str(tmp_path))  # no process
    line, = log_lines(output)
    assert status == 1 and "gate.pid" in line


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="only Linux tells what a process is")
def test_s_signals_no_process_that_is_another_program(capsys, tmp_path, monkeypatch):
    """A pid file may outlive its process, and the number may then be that of another process."""
    monkeypatch.chdir(tmp_path)
    load_text(tmp_path, SERVER + "pid = gate.pid\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        write_file(tmp_path, "gate.pid", "%d\n" % other.pid)
        status, output = run_main(capsys, "-s", "stop")
        assert (status, output) == (1, "wsgate: no wsgate process with the PID in gate.pid\n")
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0


def test_s_needs_a_pid_in_the_configuration(capsys, tmp_path, monkeypatch):
    load_text(tmp_path, SERVER)
    monkeypatch.chdir(tmp_path)
    assert run_main(capsys, "-s", "reload") == (1, "wsgate: -s needs pid = FILE in [server]\n")


def test_an_old_python_gets_one_sentence():
    old = next((path for path in (os.path.expanduser("~/.pyenv/versions/2.7.18/bin/python"),
                                  "/usr/bin/python2.7")
                if os.path.exists(path)), None)
    if old is None:
        pytest.skip("no Python 2.7 here")
    done = subprocess.run([old, WSGATE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    assert (done.returncode, done.stdout) == (1,
                                              "wsgate needs Python 3.6 or later, this is Python "
                                              "2.7\n")


# ------------------------------------------------------------------------- Demo


def test_demo():
    """The socket is at every path, so that --probe works with the URL of the page too."""
    port = free_port()
    with process("--demo", "--listen", "127.0.0.1:%d" % port) as child:
        assert port_of(child) == port
        eventually(lambda: child.logged("open http://127.0.0.1:%d/ in a browser" % port))
        page = connect(port).send(request()).response()
        assert page.status == 200 and page.get(b"content-type") == b"text/html; charset=utf-8"
        assert b"new WebSocket" in page.body
        client = connect(port).send(handshake(b"/", b"Origin: http://gate.test"))
        assert client.response().status == 101
        client.send(frame(1, b"head", b"mask"))
        opcode, head = read_frame(client)
        assert opcode == 1 and head.startswith(b"GET / HTTP/1.1\r\nHost: gate.test\r\n")
        assert field(head, b"connection") == [b"Upgrade"]
        assert field(head, b"x-forwarded-for") == [b"127.0.0.1"]
        for payload in (b"hello", b"x" * 200, b"y" * 70000):
            client.send(frame(2, payload, b"mask"))
            assert read_frame(client) == (2, payload)
        client.send(frame(9, b"are you there", b"mask"))
        assert read_frame(client) == (10, b"are you there")
        client.send(frame(8, b"\x03\xe8", b"mask"))
        assert read_frame(client) == (8, b"\x03\xe8") and client.ended(1000 * MS)
        child.send_signal(signal.SIGINT)
        eventually(lambda: child.poll() is not None)
        assert child.returncode == 0 and not child.logged("Traceback")


def test_demo_shows_round_trips(tmp_path):
    backend = wsgate.DemoBackend()
    try:
        with running("[server]\nping_interval = 50ms\nproxy_pass = http://127.0.0.1:%d\n"
                     % backend.server_address[1],
                     tmp_path) as gate:
            backend.gate = gate.gate
            assert gate.fetch(request(b"GET", b"/rtt")).body == b""
            client = gate.connect().send(handshake(b"/socket"))
            assert client.response().status == 101
            body = eventually(lambda: gate.fetch(request(b"GET", b"/rtt")).body)
            assert re.fullmatch(br"The last ping of wsgate took \d+\.\d ms\.", body)
            client.close()
    finally:
        backend.socket.shutdown(socket.SHUT_RDWR)  # else it would look up to 0.5 s later
        backend.shutdown()
        backend.server_close()


# -------------------------------------------------------------- Probe: verdicts


@pytest.mark.parametrize("word, script, options", [
    ("works", upgrade_then(), ()),
    ("works", upgrade_then(None, b"Sec-WebSocket-Protocol: chat"), ("--subprotocol", "chat")),
    ("page", respond(b"HTTP/1.1 103 Early Hints\r\n\r\n" + ok()), ()),
    ("wrong_accept", respond(switching()), ()),
    ("not_upgraded", respond(switching().replace(b"Connection: Upgrade\r\n", b"")), ()),
    ("wrong_choice", upgrade_then(None, b"Sec-WebSocket-Protocol: chat"),
     ("--subprotocol", "soap")),
    ("wrong_choice", upgrade_then(), ("--subprotocol", "chat")),
    ("wrong_choice", upgrade_then(None, b"Sec-WebSocket-Extensions: permessage-deflate"), ()),
    ("page", respond_status(b"200 OK"), ()),
    ("redirected", respond_status(b"302 Found", b"Location: /login"), ()),
    ("headers_lost", respond_status(b"400 Bad Request"), ()),
    ("tls_port", respond(b"HTTP/1.1 400 Bad Request\r\n\r\n"
                         b"The plain HTTP request was sent to HTTPS port"), ()),
    ("tls_port", respond(b"\x15\x03\x01\x00\x02\x02\x46"), ()),
    ("login_needed", respond_status(b"401 Unauthorized"), ()),
    ("origin_denied", respond_status(b"403 Forbidden"), ()),
    ("wrong_path", respond_status(b"404 Not Found"), ()),
    ("upgrade_missing", respond_status(b"426 Upgrade Required"), ()),
    ("wrong_version", respond_status(b"426 Upgrade Required", b"Sec-WebSocket-Version: 13"), ()),
    ("bad_gateway", respond_status(b"502 Bad Gateway"), ()),
    ("backend_refused", respond_status(b"502 Bad Gateway", b"X-Wsgate-Reason: backend_refused"),
     ()),
    ("auth_required", respond_status(b"401 Unauthorized", b"X-Wsgate-Reason: auth_required"), ()),
    ("bad_gateway", respond_status(b"502 Bad Gateway", b"X-Wsgate-Reason: works"), ()),
    ("headers_lost", respond_status(b"400 Bad Request", b"X-Wsgate-Reason: cut"), ()),
    ("unavailable", respond_status(b"503 Service Unavailable"), ()),
    ("gateway_timeout", respond_status(b"504 Gateway Timeout"), ()),
    ("other_status", respond_status(b"418 Teapot"), ()),
    ("garbage", respond(b"SSH-2.0-OpenSSH_9.2\r\n"), ()),
    ("garbage", respond(b"HTTP/1.1 101 \x1b[31m\r\n\r\n"), ()),
    ("garbage", upgrade_then(lambda peer: peer.send(frame(5, b"x"))), ()),
    ("closed", respond(), ()),
    ("cut", upgrade_then(lambda peer: peer.send(frame(8, b"\x03\xe9bye"))), ()),
    ("cut", upgrade_then(lambda peer: peer.finish()), ()),
    ("cut", upgrade_then(lambda peer: peer.reset()), ("--count", "3")),
    ("backend_said_502",
     upgrade_then(lambda peer: peer.send(frame(8, b"\x03\xf6backend_said_502"))), ()),
    ("origin_denied", upgrade_then(lambda peer: peer.send(frame(8, b"\x11\x33origin_denied"))), ()),
])
def test_a_probe_ends_in_one_verdict(capsys, word, script, options):
    with ScriptedBackend(script) as backend:
        result, said, report = run_probe(capsys, "http://%s/path?query" % backend.where, *options)
    assert (said, result) == (word, 0 if word == "works" else 1), report
    assert "sent      GET /path?query HTTP/1.1\n          Host: %s\n" % backend.where in report
    assert report.count("verdict ") == 1
    assert all(" " <= char <= "~" or char == "\n" for char in report)


def test_probe_hints(capsys):
    """Origin, Host and redirects are named, secrets hidden."""
    with ScriptedBackend(respond_status(b"403 Forbidden", b"Set-Cookie: hidden")) as backend:
        _, _, report = run_probe(capsys, "ws://" + backend.where, "--origin", "https://a.test",
                                 "--header", "Host: b.test",
                                 "--header", "Cookie: hidden")
    assert "Origin (https://a.test) does not match Host (b.test)" in report
    assert "hidden" not in report
    with ScriptedBackend(respond_status(b"301 Moved", b"Location: /new/")) as backend:
        assert "301: redirect to /new/" in run_probe(capsys, "ws://" + backend.where)[2]


# ------------------------------------------------------------------------ Probe


def test_probe_without_a_connection(capsys):
    with ScriptedBackend(read_nothing) as backend:
        began = time.monotonic()
        assert run_probe(capsys, "ws://" + backend.where, "--timeout",
                         ini_ms(60))[:2] == (1, "timeout")
        assert 59 * MS <= time.monotonic() - began < 2000 * MS
        assert run_probe(capsys, "wss://" + backend.where, "--timeout",
                         ini_ms(60))[:2] == (1, "timeout")
    assert run_probe(capsys, "ws://" + backend.where)[:2] == (1, "refused")
    assert run_probe(capsys, "ws://[fe80::1%nosuch0]/")[:2] == (1, "unresolved")
    with ScriptedBackend(lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as backend:
        assert run_probe(capsys, "wss://" + backend.where)[:2] == (1, "plain_port")


def test_a_probe_of_an_untrusted_certificate_names_the_keys(capsys, tls):
    with ScriptedBackend(upgrade_then(), tls=tls_backend(tls)) as backend:
        result, word, report = run_probe(capsys, "wss://" + backend.where)
        assert (result, word) == (1, "certificate") and "_ssl.c" not in report
        assert all(name in report for name in ("--cafile", "proxy_ssl_trusted_certificate",
                                               "proxy_ssl_verify = off"))
        assert run_probe(capsys, "wss://" + backend.where, "--cafile", tls.ca)[1] == "works"


def test_probe_tries_every_address(capsys, monkeypatch):
    with ScriptedBackend(upgrade_then()) as backend:
        both = [(socket.AF_INET, (host, backend.port)) for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(wsgate.Server, "addresses", lambda self, deadline: both)
        result, _, report = run_probe(capsys, "ws://localhost:%d/" % backend.port)
    assert result == 0 and "is 127.0.0.2, 127.0.0.1" in report
    assert "127.0.0.2: Connection refused" in report and "connected to 127.0.0.1" in report


def test_probe_measures_echoes(capsys):
    with ScriptedBackend(upgrade_then()) as backend:
        result, _, report = run_probe(capsys, "ws://" + backend.where, "--count", "3", "--message",
                                      "x" * 200)
        assert result == 0
        assert re.search(r"3 of 3 echoed: min [0-9.]+, median [0-9.]+, max [0-9.]+ ms", report)
    with ScriptedBackend(upgrade_then(read_until_close)) as backend:
        result, _, report = run_probe(capsys, "ws://" + backend.where, "--count", "1", "--timeout",
                                      "%dms" % (100000 * MS))
        assert result == 0 and "0 of 1 echoed; is it an echo server?" in report


def test_idle_probe(capsys, tmp_path):
    """It reports who closed, when and how."""
    with gate_and_backend(tmp_path, upgrade_then(read_nothing),
                          "idle_timeout = " + ini_ms(120)) as (gate, _):
        url = "ws://127.0.0.1:%d/" % gate.port
        result, word, report = run_probe(capsys, url, "--idle", "%ds" % (5000 * MS))
        match = re.search(r"after ([0-9.]+) s: Close 1001 idle_timeout", report)
        assert (result, word) == (1,
                                  "cut") and match and 90 * MS < float(
                                      match.group(1)) < 1500 * MS, report
        result, word, report = run_probe(capsys, url, "--idle", ini_ms(30))
        assert (result, word) == (0, "works") and "survived" in report


def test_an_idle_probe_answers_pings(capsys, tmp_path):
    """A tunnel that pings keep open is not reported as cut."""
    lines = "ping_peers = client", PINGING, "ping_timeout = " + ini_ms(150)
    with gate_and_backend(tmp_path, upgrade_then(read_until_close), *lines) as (gate, _):
        _, word, report = run_probe(capsys, "ws://127.0.0.1:%d/" % gate.port,
                                    "--idle", ini_ms(250))
    assert word == "works" and report.count("answered") > 1 and "survived" in report, report


def test_probe_of_a_flood(capsys, monkeypatch):
    """It extends neither the silence nor the wait for a Close."""
    deadline = wsgate.Deadline
    monkeypatch.setattr(wsgate, "Deadline", lambda seconds: deadline(min(seconds, 100 * MS)))

    def floods(peer):
        while True:
            peer.send(frame(2, b"x" * 100) * 100)

    with ScriptedBackend(upgrade_then(floods)) as backend:
        began = time.monotonic()
        _, word, report = run_probe(capsys, "ws://" + backend.where, "--idle", "60s")
    assert word == "works" and "survived" in report and "no Close received" in report
    assert 199 * MS < time.monotonic() - began < 4000 * MS


def test_probe_of_a_configuration(capsys, tmp_path):
    with ScriptedBackend(upgrade_then()) as backend:
        ini = "[server]\nlisten = 127.0.0.1:%d\n[location /app/]\nproxy_pass = http://%s/x/\n"
        with running(ini % (free_port(), backend.where), tmp_path) as gate:
            result, _, report = run_probe(capsys, "/app/ws?a=b", "-c", gate.path)
            assert result == 0 and "Everything works." in report, report
        heads = [line for line in report.splitlines() if "HTTP/1.1" in line and "GET" in line]
        assert ["GET /x/ws?a=b" in heads[0], "GET /app/ws?a=b" in heads[1]] == [True, True]
        assert report.count(" Host: 127.0.0.1:%d\n" % gate.port) == 2
        assert "X-Forwarded-For: 127.0.0.1" in report
        result, word, report = run_probe(capsys, "/app/ws", "-c", gate.path)
        assert (result, word) == (1, "refused") and "The backends work, wsgate does not" in report
        assert re.search(r"^status +101 +-$", report, re.M)
        assert re.search(r"^verdict +works +refused$", report, re.M)
    result, _, report = run_probe(capsys, "/app/ws", "-c", gate.path)
    assert result == 1
    assert "Start with the backend; by itself it does not work: " + backend.where in report
    assert "no [location]" in run_probe(capsys, "/other", "-c", gate.path)[2]


def test_probe_of_a_configuration_with_a_redirect_listener(capsys, tmp_path):
    """The probe goes to the first listener that serves requests."""
    with ScriptedBackend(upgrade_then()) as backend:
        ini = "[server]\nlisten = localhost:%d redirect, 127.0.0.1:%d\nproxy_pass = http://%s\n"
        with running(ini % (free_port(), free_port(), backend.where), tmp_path) as gate:
            result, _, report = run_probe(capsys, "/ws", "-c", gate.path)
            assert result == 0 and "Everything works." in report, report


@pytest.mark.parametrize("arguments", [
    ("nonsense",), ("ws://",), ("ws://h:99999",), ("ws://u:p@h/",),
    ("ws://h", "--header", "no colon"), ("ws://h", "--header", "A: b\r\nC: d"),
    ("wss://h", "--cafile", "/nowhere"), ("/x", "-c", "/nowhere")])
def test_probe_that_cannot_begin(capsys, arguments):
    result, word, output = run_probe(capsys, *arguments)
    assert (result, word) == (1,
                              None) and output.startswith(
                                  "wsgate: ") and output.count("\n") == 1, output


def test_probe_exit_status():
    with ScriptedBackend(upgrade_then()) as backend:
        assert run_program("--probe", "ws://" + backend.where)[0] == 0
    result, output = run_program("--probe", "ws://" + backend.where)
    assert result == 1 and "Traceback" not in output and "refused" in output


# --------------------------------------------------------------------- The file


def test_ascii_and_100_columns():
    for name in ("wsgate.py", "test_wsgate.py"):
        with open(os.path.join(HERE, name), encoding="ascii") as file:
            assert not [line for line in file if len(line.rstrip("\n")) > 100]


def test_plain_english():
    """Marks of translated English; say it as RFC 9110 or the manual of nginx would."""
    marks = re.compile(r"stands? (here|beside|behind|in)\b|\b(is|are) no [a-z]|\bmay stand\b"
                       r"|whoever|nobody|somebody|\bso (many|long)\b|\banew\b|\bafresh\b"
                       r"|\b(is|are) needed\b|\bcan go\b|\bgo(es|ing) on\b")
    text = b"\n".join(source_lines()).decode() + readme()
    assert not [line for line in text.splitlines() if marks.search(line)]


def test_bodies_and_sections_are_short():
    """A body has at most 40 lines (its docstring is a part of it), a section about 400."""
    functions = [node for node in ast.walk(source_tree())
                 if isinstance(node, ast.FunctionDef)]
    for node in functions:
        last = max(part.lineno for part in ast.walk(node) if hasattr(part, "lineno"))
        assert last - node.body[0].lineno < 40, node.name
    banners = [number for number, line in enumerate(source_lines())
               if re.match(br"# -{5,} .", line)]
    ends = banners[1:] + [len(source_lines())]
    assert max(end - begin for begin, end in zip(banners, ends)) <= 420


def test_no_name_of_the_module_is_bound_twice():
    names = [name.id for node in source_tree().body
             if isinstance(node, ast.Assign) for target in node.targets
             for name in ast.walk(target) if isinstance(name, ast.Name)]
    assert sorted(names) == sorted(set(names))


def test_the_map_names_the_sections_in_order():
    banners = [line.decode().lstrip("#- ") for line in source_lines()
               if re.match(br"# -{5,} .", line)]
    titles = [title for title, _ in map_of_the_file()]
    assert len(titles) > 10
    assert [banner[:len(title)] for banner, title in zip(banners, titles)] == titles
    assert len(banners) == len(titles)


def test_sections_are_those_of_wsgate():
    """The tests are in the order of wsgate.py, after the helpers."""
    def titles(path):
        with open(path, encoding="ascii") as file:
            found = re.findall(r"(?m)^# -{5,} (.+)$", file.read())
        return [title.partition(" (RFC")[0] for title in found]

    tests = [title for title in titles(os.path.join(HERE, "test_wsgate.py"))
             if not title.startswith("Helpers: ")]
    assert tests[-2:] == ["The file", "Certificates"]
    assert tests[:-2] == [title for title in titles(WSGATE) if title in tests]


def test_readme_names_every_key():
    words = set(re.findall(r"[a-z_]+", readme()))
    keys = set(wsgate.SERVER_KEYS) | set(wsgate.LOCATION_KEYS) | set(wsgate.UPSTREAM_KEYS)
    assert not keys - words


def test_readme_examples(tmp_path, tls):
    """The configurations in README load without a warning."""
    blocks = re.findall(r"(?m)^    \[(?:server|location \S+)\]\n(?:    .*\n)+", readme())
    assert len(blocks) >= 2
    for block in blocks:
        ini = re.sub(r"/etc/ssl/\w+\.pem", tls.server, re.sub(r"(?m)^    ", "", block))
        assert not load_text(tmp_path, ini if "[server]" in ini else "[server]\n" + ini).warnings


def test_readme_format():
    lines = readme().splitlines()
    assert max(map(len, lines)) <= 80
    first = "\n".join(lines[:20])
    assert "python3 wsgate.py --demo" in first and "make test" in first


def test_every_name_on_the_map_exists():
    names = set()
    for _, text in map_of_the_file():
        names.update(re.findall(r"\b(?:[A-Z]+[a-z]\w*|[a-z]+_\w+|main)(?:\.[a-z_]\w*)?", text))
    names |= set(re.findall(r"\b[A-Z]\w*[a-z][A-Z]\w*(?:\.\w+)?", wsgate.__doc__))
    names -= {"WebSocket", *wsgate.LOCATION_KEYS}
    assert len(names) > 20
    missing = []
    for name in names:
        thing = wsgate
        for part in name.split("."):
            thing = getattr(thing, part, getattr(thing, part[:-1] if part.endswith("s") else part,
                                                 None))
        if thing is None:
            missing.append(name)
    assert not missing


# ----------------------------------------------------------------- Certificates
#
# A CA, a server's and a client's certificate, made once and valid until 2120, with this ca.cnf:
#   [ca]
#   default_ca = all
#   [all]
#   new_certs_dir = .
#   database = index
#   serial = serial
#   policy = names
#   default_md = sha256
#   default_startdate = 20200101000000Z
#   default_enddate = 21200101000000Z
#   [names]
#   organizationName = optional
#   commonName = supplied
#   [ca_extensions]
#   basicConstraints = critical,CA:TRUE
#   keyUsage = critical,keyCertSign,cRLSign
#   subjectKeyIdentifier = hash
#   [server]
#   subjectAltName = DNS:localhost,IP:127.0.0.1,DNS:gate.test,DNS:back.test
#   authorityKeyIdentifier = keyid
#   [client]
#   subjectAltName = DNS:other.test
#   authorityKeyIdentifier = keyid
# and, for the subjects "/CN=Test CA", "/CN=gate.test" and "/O=Test, Inc/CN=client" (the last line
# not for the CA):
#   touch index; echo 01 > serial
#   openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj SUBJECT \
#       -keyout NAME.key -out NAME.csr
#   openssl ca -batch -notext -config ca.cnf -selfsign -extensions ca_extensions \
#       -keyfile ca.key -in ca.csr -out ca.pem
#   openssl ca -batch -notext -config ca.cnf -extensions NAME -cert ca.pem -keyfile ca.key \
#       -in NAME.csr -out NAME.pem

CA = (
    "MIIBVjCB/aADAgECAgEBMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB1Rlc3QgQ0EwIBcNMjAwMTAxMDAwMDAwWhgPMjEy"
    "MDAxMDEwMDAwMDBaMBIxEDAOBgNVBAMMB1Rlc3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATany1cXYLCzQ/C"
    "d6cUpScIQbUYgyG2W9EhTB5OvqcI04n6jknyiub3Y0WYISs4IfP4hEBVw+HeqENJU3zKl3zAo0IwQDAPBgNVHRMBAf8E"
    "BTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQUAvsApeijIBhTnsNykWCF1JHF1qYwCgYIKoZIzj0EAwIDSAAw"
    "RQIgfz3mObBpeHrI5MI3JSeaHDHrWMgwAd3ALHN9Um1USh4CIQDlkvwnp3tTZzd15QJ4MTAa1e4hUAv1rHbFrwnKPCgn"
    "rQ==")

SERVER_CERT = (
    "MIIBijCCATGgAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMCAXDTIwMDEwMTAwMDAwMFoYDzIx"
    "MjAwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAlnYXRlLnRlc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARaD6O2G7xR"
    "tdnwIvgPfegE3O3KjzYM5v+3xNhUh0faOcOGRVHD05L7xlJGQwZ/oImkVU54kZFPpcIjkxBEdQKjo3QwcjAwBgNVHREE"
    "KTAngglsb2NhbGhvc3SHBH8AAAGCCWdhdGUudGVzdIIJYmFjay50ZXN0MB8GA1UdIwQYMBaAFAL7AKXooyAYU57DcpFg"
    "hdSRxdamMB0GA1UdDgQWBBTENrqSXMgnj/22PXUAUQbdC5NNlDAKBggqhkjOPQQDAgNHADBEAiAwF7NCXk1N6DvCslgp"
    "dMJlGNx6mLotQXKWD1URmw+gHgIgXQOXF6fgjltZ56zxkkYa8d/WQhvGTBl7vQ7OKzgw3Ks=")

SERVER_KEY = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgU6Q6mI8ofbUyzzrZ33ZEHGpWh+VoTLxskDIOKRQuiOah"
    "RANCAARaD6O2G7xRtdnwIvgPfegE3O3KjzYM5v+3xNhUh0faOcOGRVHD05L7xlJGQwZ/oImkVU54kZFPpcIjkxBEdQKj")

CLIENT = (
    "MIIBgTCCASegAwIBAgIBAzAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMCAXDTIwMDEwMTAwMDAwMFoYDzIx"
    "MjAwMTAxMDAwMDAwWjAlMRIwEAYDVQQKDAlUZXN0LCBJbmMxDzANBgNVBAMMBmNsaWVudDBZMBMGByqGSM49AgEGCCqG"
    "SM49AwEHA0IABObTGrwAHw5wWz3kZfxlW1BtF9uUmV5v0BhZ7Bklpp8H5JYAz7FTJ4MhECBF8KSd990ihsiqIBYeyOTv"
    "u22FSJqjWTBXMBUGA1UdEQQOMAyCCm90aGVyLnRlc3QwHwYDVR0jBBgwFoAUAvsApeijIBhTnsNykWCF1JHF1qYwHQYD"
    "VR0OBBYEFPZGxuDkbe9WBEd9mD3qVTtuxfHtMAoGCCqGSM49BAMCA0gAMEUCICF0hflvoQknva4mxWbRv21Mw1NDO1Uo"
    "+L9Ik2rWllcGAiEAvDPJ94i7hWrNe8alMrJUZ4fV+yZdeAzEU7cwjAE1Ono=")

CLIENT_KEY = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgQdVKbHkqT1x3FGn+I58cks8uX7p4BnPyKrqPS2iTrB6h"
    "RANCAATm0xq8AB8OcFs95GX8ZVtQbRfblJleb9AYWewZJaafB+SWAM+xUyeDIRAgRfCknffdIobIqiAWHsjk77tthUia")


def pem(encoded, kind="CERTIFICATE"):
    """Return base64 data as PEM."""
    lines = "\n".join(encoded[place:place + 64] for place in range(0, len(encoded), 64))
    return "-----BEGIN %s-----\n%s\n-----END %s-----\n" % (kind, lines, kind)


SERVER_PEM = pem(SERVER_CERT) + pem(SERVER_KEY, "PRIVATE KEY")  # certificate and key in one file
CLIENT_PEM = pem(CLIENT) + pem(CLIENT_KEY, "PRIVATE KEY")
