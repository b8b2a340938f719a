#!/usr/bin/env python3
"""bench_wsgate: what wsgate costs, beside nginx, haproxy and no proxy at all.

    python3 bench_wsgate.py                     everything; four to five minutes
    python3 bench_wsgate.py --quick             everything once and short; about 15 seconds
    python3 bench_wsgate.py --scenario echo-100,bulk-down --proxy wsgate,nginx --rounds 5
    python3 bench_wsgate.py --json out.json     keep every single measurement
    python3 bench_wsgate.py --pin               proxies on one core: Python threads on several cost more

Backend and load generator run in processes of their own, on loopback. In each round every
scenario goes through every proxy in turn (A B C, A B C), so that what else the machine does
hits all alike. nginx (one worker) and haproxy (one thread) take part if installed, with their
default buffers: nginx moves bulk about three times as fast with `proxy_buffer_size 64k`.
wsgate runs under the Python that runs this file. How to read the tables, medians of the rounds:

    CPU          time of the proxy's processes, user and system, children included, as the
                 kernel counts it. THE figure to look at: a slow generator does not change it.
    echoes/s ... by the clock on the wall. The generator is written in Python, so before a
                 fast proxy they say more about the generator than about the proxy.
    generator    share of a core used by the busier one of generator and backend. From about
                 90 % on, the figures by the clock are their limit, not the proxy's.
    x nginx      ratio within a round to the figure before it of nginx (without nginx: of direct);
                 less is better for CPU and KiB, more for rates.

An echo is a round trip of 64 bytes, a GB is 10^9 bytes in frames of 64 KiB, a handshake is
connect, upgrade, one echo, closing handshake, end. Every byte is compared; if one is wrong, the
exit status is 1. Differences under 15 % mean little; on a busy machine look only at
large ones, and at those that --pin confirms.
"""

import argparse
import base64
import collections
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

PATIENCE = 20  # seconds without progress after which anything counts as broken
CHUNK = 256 * 1024
MIB = 2 ** 20

clock = time.perf_counter


class Wrong(Exception):
    """A measurement is worthless; str() says why."""


def check(condition, sentence):
    """Raise Wrong unless the condition holds."""
    if not condition:
        raise Wrong(sentence)


# ------------------------------------------------------------------ What is sent


def xor(data, key):
    """Mask or unmask with a key of four bytes."""
    mask = (key * (len(data) // 4 + 1))[:len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")).to_bytes(len(data), "big")


def frame(payload, key=b"", opcode=2):
    """A WebSocket frame (RFC 6455 5.2), masked if there is a key."""
    size = bytes([len(payload)]) if len(payload) < 126 else b"\x7f" + len(payload).to_bytes(8, "big")
    if key:
        size, payload = bytes([size[0] | 128]) + size[1:], xor(payload, key)
    return bytes([128 | opcode]) + size + key + payload


def random_bytes(source, size):
    """Bytes that are the same in every process whose source has the same seed."""
    return source.getrandbits(8 * size).to_bytes(size, "big")


class Bulk:
    """A MiB in sixteen different frames, sent or expected over and over; the socket blocks."""

    def __init__(self, key):
        source = random.Random(2)
        mebibyte = b"".join(frame(random_bytes(source, MIB // 16), key) for _ in range(16))
        self.size, self.twice = len(mebibyte), mebibyte * 2  # a chunk may begin anywhere in the first

    def send(self, sock, mebibytes):
        """Send so many MiB of payload."""
        view, position, end = memoryview(self.twice), 0, mebibytes * self.size
        while position < end:
            start = position % self.size
            position += sock.send(view[start:start + min(CHUNK, end - position)])

    def arrives(self, sock, mebibytes):
        """Receive so many MiB of payload -> whether every byte was right."""
        position, end, right = 0, mebibytes * self.size, True
        while position < end:
            data = receive(sock, min(CHUNK, end - position))
            right = right and self.twice.startswith(data, position % self.size)
            position += len(data)
        return right


def echo_pairs():
    """(frame to send, frame that comes back), 4,093 different ones."""
    source = random.Random(1)
    payloads = [random_bytes(source, 64) for _ in range(4093)]
    return [(frame(data, random_bytes(source, 4)), frame(data)) for data in payloads]


def accept_value(key):
    """The Sec-WebSocket-Accept that belongs to a Sec-WebSocket-Key."""
    return base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())


MASK = b"\x12\xf4\x56\x9a"
UP, DOWN = Bulk(MASK), Bulk(b"")
GO, GOOD, BAD = frame(b"go", MASK), frame(b"good"), frame(b"bad!")
CLOSE = frame(b"\x03\xe8", MASK, opcode=8), frame(b"\x03\xe8", opcode=8)
PAIRS, NUMBERS = itertools.cycle(echo_pairs()), itertools.count()

# ----------------------------------------------------------------------- Scripts


def drive(scripts, patience=PATIENCE):
    """Run scripts, generators that yield the socket they want to read, until all have ended.

    What they add to the list meanwhile runs too.
    """
    poll, waiting = select.epoll(), {}
    while scripts or waiting:
        ready, scripts[:] = [(None, script) for script in scripts], []
        if not ready:
            ready = [waiting.pop(descriptor) for descriptor, _ in poll.poll(patience)]
            check(ready, "nothing moved for %d seconds" % patience)
        for before, script in ready:
            sock = next(script, None)
            if sock is not None:
                waiting[sock.fileno()] = sock, script
                if sock is not before:
                    poll.register(sock.fileno(), select.EPOLLIN)


def receive(sock, size=CHUNK):
    """What has arrived; the end of the connection would be an error."""
    data = sock.recv(size)
    check(data, "a connection was closed too early")
    return data


# ----------------------------------------------------------------------- Backend


def backend(listener):
    """Job of the backend's process: serves until it is ended."""
    scripts = []
    scripts.append(accept(listener, scripts))
    drive(scripts, patience=-1)


def accept(listener, scripts):
    """Script of the listener: adds one for each connection."""
    while True:
        yield listener
        sock = listener.accept()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        scripts.append(serve(sock))


def serve(sock):
    """Script of a connection; a client that leaves too early knows itself what was wrong."""
    with sock, contextlib.suppress(OSError, Wrong):
        key = None
        while not key:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                yield sock
                head += receive(sock)
            target = head.split(b" ", 2)[1]
            key = re.search(rb"\r\nsec-websocket-key: *(\S+)", head, re.I)
            if not key:
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nhello %s"
                             % (len(target) + 6, target))
                if re.search(rb"\r\nconnection: *close", head, re.I):
                    return
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     b"Sec-WebSocket-Accept: %s\r\n\r\n" % accept_value(key.group(1)))
        yield sock
        _, service, mebibytes = (target + b"/").split(b"/")[:3]
        if service == b"echo":
            yield from echo(sock)
            return
        sock.settimeout(PATIENCE)  # from here on it blocks: bulk has the backend to itself
        if service == b"down" and sock.recv(len(GO)) == GO:
            DOWN.send(sock, int(mebibytes))
        elif service == b"up":
            sock.sendall(GOOD if UP.arrives(sock, int(mebibytes)) else BAD)
        sock.recv(1)  # the client ends first


def echo(sock):
    """Script: echoes small frames up to a Close."""
    data, opcode = b"", 0
    while opcode != 8:
        while len(data) < 6 or len(data) < 6 + (data[1] & 127):
            yield sock
            data += receive(sock)
        opcode, size = data[0] & 15, data[1] & 127
        sock.sendall(bytes([data[0], size]) + xor(data[6:6 + size], data[2:6]))
        data = data[6 + size:]


# -------------------------------------------------------------------------- Load
#
# A job yields twice: when it is ready, and its result when nothing is under way any
# more. The parent reads the proxy's accounts at both points.


def connect(port):
    """A connected socket that does not block."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


def upgrade(sock, target=b"/echo"):
    """Script: asks for a WebSocket and checks the answer."""
    key = base64.b64encode(os.urandom(16))
    sock.sendall(b"GET %s HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n" % (target, key))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        yield sock
        head += receive(sock)
        check(head.startswith(b"HTTP/1.1 101 "), "a handshake was answered by %r" % head[:40])
    check(accept_value(key) in head, "a handshake has a wrong Sec-WebSocket-Accept")


def echoed(sock, pair=None):
    """Script: sends a frame and compares what comes back."""
    message, answer = pair or next(PAIRS)
    sock.sendall(message)
    got = b""
    while got != answer:
        yield sock
        got += receive(sock)
        check(answer.startswith(got), "an echo differs from what was sent")


def requested(sock):
    """Script: sends a request without upgrade and checks the response, which repeats the target."""
    target = b"/hello/%d" % next(NUMBERS)
    sock.sendall(b"GET %s HTTP/1.1\r\nHost: bench\r\n\r\n" % target)
    got = b""
    while len(got.partition(b"\r\n\r\n")[2]) < 6 + len(target):
        yield sock
        got += receive(sock)
    right = got.startswith(b"HTTP/1.1 200 ") and got.endswith(b"\r\n\r\nhello " + target)
    check(right, "an HTTP response differs from what was sent")


def shaken(port):
    """Script: connect, upgrade, one echo, closing handshake, end."""
    with connect(port) as sock:
        yield from upgrade(sock)
        yield from echoed(sock)
        yield from echoed(sock, CLOSE)
        yield sock
        check(sock.recv(1) == b"", "bytes came behind the closing handshake")


def open_tunnels(port, number, target=b"/echo"):
    """Open so many tunnels, 50 at a time -> their sockets."""
    tunnels, tickets = [], iter(range(number))

    def script():
        for _ in tickets:
            tunnels.append(connect(port))
            yield from upgrade(tunnels[-1], target)

    drive([script() for _ in range(50)])
    return tunnels


def repeat(exchanges, seconds):
    """Run scripts side by side, each again and again -> the result of a job."""
    times, began = [], clock()

    def script(exchange):
        start = began
        while start < began + seconds:
            start = clock()
            yield from exchange()
            times.append(clock() - start)

    drive([script(exchange) for exchange in exchanges])
    result = {"count": len(times), "seconds": clock() - began}
    times.sort()
    result.update({"p%d ms" % p: 1e3 * times[len(times) * p // 100] for p in (50, 99)})
    return result


def load_echo(port, number, seconds):
    """Every tunnel sends its next message when the one before has come back."""
    tunnels = open_tunnels(port, number)
    yield
    yield repeat([functools.partial(echoed, sock) for sock in tunnels], seconds)


def load_http(port, number, seconds):
    """Every connection sends its next request when the one before is answered."""
    connections = [connect(port) for _ in range(number)]
    yield
    yield repeat([functools.partial(requested, sock) for sock in connections], seconds)


def load_handshakes(port, number, seconds):
    """So many at a time."""
    yield
    yield repeat([functools.partial(shaken, port)] * number, seconds)


def load_bulk(up, port, mebibytes, seconds):
    """So many MiB through one tunnel, fewer if the time is short."""
    mebibytes = int(mebibytes * min(seconds, 1))
    sock, = open_tunnels(port, 1, b"/%s/%d" % (b"up" if up else b"down", mebibytes))
    sock.settimeout(PATIENCE)
    yield
    began = clock()
    if up:
        UP.send(sock, mebibytes)
        right = sock.recv(len(GOOD)) == GOOD
    else:
        sock.sendall(GO)
        right = DOWN.arrives(sock, mebibytes)
    check(right, "the bulk stream differs from what was sent")
    yield {"count": mebibytes * MIB / 1e9, "seconds": clock() - began}


def load_idle(port, number, _):
    """Opens tunnels, tries each once and leaves them alone; ten more come before, as a warm-up."""
    tunnels = open_tunnels(port, 10)
    yield
    began = clock()
    tunnels += open_tunnels(port, number)
    drive([echoed(sock) for sock in tunnels[10:]])
    yield {"count": number, "seconds": clock() - began}


# ----------------------------------------------------------------------- Proxies

WSGATE = """[server]
listen = 127.0.0.1:{port}
proxy_pass = http://127.0.0.1:{backend}
idle_timeout = 5m
access_log = off
"""

NGINX = """daemon off; worker_processes 1; worker_rlimit_nofile {files}; pid {folder}/pid;
error_log stderr crit; events {{ worker_connections {files}; }}
http {{
    access_log off; keepalive_requests 1000000000; proxy_temp_path {folder}/1; client_body_temp_path
    {folder}/2; fastcgi_temp_path {folder}/3; uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
    upstream backend {{ server 127.0.0.1:{backend}; keepalive 64; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port};
        proxy_http_version 1.1; proxy_read_timeout 5m; location / {{ proxy_pass http://backend; }}
        proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
    }}
}}
"""

HAPROXY = """global
    nbthread 1
    maxconn {connections}
defaults
    mode http
    http-reuse always
    timeout connect 5s
    timeout client 5m
    timeout server 5m
listen gate
    bind 127.0.0.1:{port}
    server backend 127.0.0.1:{backend}
"""

SCRIPT = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "wsgate.py")]

# name -> configuration, command in front of its path, command that says the version
PROXIES = collections.OrderedDict([
    ("direct", None),
    ("wsgate", (WSGATE, SCRIPT + ["-c"], SCRIPT + ["-v"])),
    ("nginx", (NGINX, ["nginx", "-c"], ["nginx", "-v"])),
    ("haproxy", (HAPROXY, ["haproxy", "-db", "-q", "-f"], ["haproxy", "-v"])),
])

Proxy = collections.namedtuple("Proxy", "name port pid")


@contextlib.contextmanager
def running(name, folder, backend_port, files, pin):
    """Run a proxy in front of the backend; `direct` is the backend itself."""
    if name == "direct":
        yield Proxy(name, backend_port, None)
        return
    text, command, _ = PROXIES[name]
    port = free_port()
    path = os.path.join(folder, "%s-%d" % (name, port))
    with open(path, "w") as file:
        file.write(text.format(port=port, backend=backend_port, folder=folder, files=files,
                               connections=files // 2 - 50))
    with open(path + ".log", "wb") as output:
        process = subprocess.Popen(command + [path], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True, preexec_fn=functools.partial(end_with_parent, pin))
    try:
        deadline = clock() + PATIENCE
        while not answers(port):
            if process.poll() is not None or clock() > deadline:
                with open(path + ".log", errors="replace") as file:
                    raise Wrong("%s did not start: %s" % (name, file.read()[-500:].strip()))
            time.sleep(0.02)
        yield Proxy(name, port, process.pid)
    finally:
        for number in signal.SIGTERM, signal.SIGKILL:  # to its children too: the session is theirs alone
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(3)


def free_port():
    """A port below those that outgoing connections take."""
    while True:
        port = random.randrange(10000, 30000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def answers(port):
    """Whether a request comes through."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as sock:
        sock.sendall(b"GET /ready HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        return sock.recv(4096).startswith(b"HTTP/1.1 200 ")


def end_with_parent(pin=False, libc=ctypes.CDLL(None)):
    """Have Linux end this process when its parent dies, in whatever way; pin it to one core."""
    libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if pin:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


# -------------------------------------------------------- What the kernel counts


def family(pid):
    """A process and its descendants."""
    found = [pid]
    for member in found:  # which grows meanwhile
        for task in os.listdir("/proc/%d/task" % member):
            with contextlib.suppress(OSError), open("/proc/%d/task/%s/children" % (member, task)) as file:
                found += map(int, file.read().split())
    return found


def cpu_seconds(pid):
    """CPU time of a process and its children, also of those that have ended."""
    total = 0.0
    for member in family(pid):
        with open("/proc/%d/stat" % member) as file:
            ended = map(int, file.read().rpartition(")")[2].split()[13:15])
        total += sum(ended) / os.sysconf("SC_CLK_TCK")
        total += time.clock_gettime((~member << 3) | 2)  # utime + stime, but in nanoseconds
    return total


def pss_kib(pid):
    """Memory of a process and its children, shared pages in proportion."""
    total = 0
    for member in family(pid):
        with open("/proc/%d/smaps_rollup" % member) as file:
            total += int(re.search(r"^Pss:\s+(\d+)", file.read(), re.M).group(1))
    return total


def descriptor_limit():
    """Raise the limit of open files as far as possible -> how many there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 65536 if soft == resource.RLIM_INFINITY else min(soft, 65536)


# --------------------------------------------------------------------- Measuring

# scale: from CPU seconds to the unit of the cost
Scenario = collections.namedtuple("Scenario", "title job size rate cost scale")

DOWNLOAD, UPLOAD = functools.partial(load_bulk, False), functools.partial(load_bulk, True)

SCENARIOS = collections.OrderedDict([
    ("echo-1", Scenario("64-byte echoes, 1 tunnel", load_echo, 1, "echoes/s", "CPU us/echo", 1e6)),
    ("echo-100", Scenario("64-byte echoes, 100 tunnels", load_echo, 100, "echoes/s", "CPU us/echo", 1e6)),
    ("echo-1000", Scenario("64-byte echoes, 1,000 tunnels", load_echo, 1000, "echoes/s", "CPU us/echo", 1e6)),
    ("bulk-down", Scenario("64 KiB frames from the backend", DOWNLOAD, 512, "GB/s", "CPU s/GB", 1)),
    ("bulk-up", Scenario("64 KiB frames to the backend", UPLOAD, 512, "GB/s", "CPU s/GB", 1)),
    ("handshakes", Scenario("20 at a time", load_handshakes, 20, "handshakes/s", "CPU us/each", 1e6)),
    ("http", Scenario("20 keep-alive connections", load_http, 20, "requests/s", "CPU us/each", 1e6)),
    ("memory", Scenario("PSS, 1,000 idle tunnels", load_idle, 1000, "opened/s", "KiB/tunnel", 1)),
])


@contextlib.contextmanager
def worker(job, *arguments):
    """Run a job in a process of its own -> (pid, function that has it go on to its next value)."""
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, job) + arguments, daemon=True)
    process.start()
    theirs.close()

    def go_on():
        pipe.send(None)
        check(pipe.poll(3 * PATIENCE), "no result within %d seconds" % (3 * PATIENCE))
        value = pipe.recv()
        if isinstance(value, Wrong):
            raise value
        return value

    try:
        yield process.pid, go_on
    finally:
        process.terminate()
        process.join(PATIENCE)


def work(pipe, job, *arguments):
    """Main function of a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    try:
        values = job(*arguments)  # the backend stays in there
        while True:
            pipe.recv()
            pipe.send(next(values))
    except Exception as error:  # Wrong, or a reset connection, say
        pipe.send(error if isinstance(error, Wrong) else Wrong("%s: %s" % (type(error).__name__, error)))


def measure(scenario, proxy, backend_pid, seconds):
    """One measurement -> its figures."""
    count = pss_kib if scenario.job is load_idle else cpu_seconds

    def read_accounts():
        time.sleep(0.05)  # what is done behind the last byte counts as well
        return count(proxy.pid) if proxy.pid else 0, cpu_seconds(load), cpu_seconds(backend_pid)

    with worker(scenario.job, proxy.port, scenario.size, seconds) as (load, go_on):
        go_on()
        before = read_accounts()
        figures = go_on()
        used, *generator = (after - earlier for earlier, after in zip(before, read_accounts()))
    figures["rate"] = figures["count"] / figures["seconds"]
    figures["generator"] = 100 * max(generator) / figures["seconds"]
    if proxy.pid:
        figures["cost"] = used * scenario.scale / figures["count"]
    return figures


def measure_all(names, scenarios, files, rounds, seconds, pin):
    """All rounds -> a list of dicts; a measurement that failed has `wrong` in it."""
    results = []
    with contextlib.ExitStack() as stack:
        stack.callback(progress)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_wsgate-"))
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(4096)
        echoer, _ = stack.enter_context(worker(backend, listener))
        run = functools.partial(running, folder=folder, backend_port=listener.getsockname()[1], files=files,
                                pin=pin)
        proxies = [stack.enter_context(run(name)) for name in names]
        steps = list(itertools.product(range(1, rounds + 1), scenarios, proxies))
        for number, (turn, name, proxy) in enumerate(steps, 1):
            progress("[%d/%d] round %d: %s, %s" % (number, len(steps), turn, name, proxy.name))
            results.append({"round": turn, "scenario": name, "proxy": proxy.name})
            try:
                with contextlib.ExitStack() as own:
                    if scenarios[name].job is load_idle:  # memory once used is not given back: a fresh one
                        proxy = own.enter_context(run(proxy.name))
                    results[-1].update(measure(scenarios[name], proxy, echoer, seconds))
            except (Wrong, OSError, EOFError) as error:  # OSError: a process has gone
                results[-1]["wrong"] = str(error) or "a process has ended too early"
    return results


# --------------------------------------------------------------------- Reporting


def progress(text=""):
    """Where the run is: one line that changes, on anything but a terminal plain lines."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + text, end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def machine(names):
    """What is measured, on what."""
    yield "%s %s, %d cores, load average %.2f, Python %s" % (
        platform.system(), platform.release(), os.cpu_count(), os.getloadavg()[0], platform.python_version())
    for name in filter(PROXIES.get, names):
        output = subprocess.check_output(PROXIES[name][2], stderr=subprocess.STDOUT, timeout=PATIENCE)
        yield output.decode("utf-8", "replace").split("\n")[0].split(" - ")[0]


def median(results, proxy, key, reference):
    """Median of a figure over the rounds, or of its ratio to the reference's in the same round."""
    found = {(r["round"], r["proxy"]): r[key] for r in results if key in r}
    values = [value / found.get((turn, reference), float("nan")) if reference else value
              for (turn, name), value in found.items() if name == proxy]
    values = [value for value in values if value == value]  # without those that have no reference
    return statistics.median(values) if values else None


def text(value):
    """A figure with about three digits."""
    if value is None:
        return "-"
    return "{:,.{}f}".format(value, 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3)


def table(name, scenario, names, results):
    """The lines of a scenario's table."""
    results = [r for r in results if r["scenario"] == name]
    reference = "nginx" if "nginx" in names else names[0]
    ratio = "x " + reference
    columns = [(scenario.rate, "rate", None), (ratio, "rate", reference), ("p50 ms", "p50 ms", None),
               ("p99 ms", "p99 ms", None), ("generator %", "generator", None), (scenario.cost, "cost", None),
               (ratio, "cost", reference)]
    yield "%-21s" % name + scenario.title
    yield " " * 8 + "".join("%13s" % title for title, _, _ in columns)
    for proxy in names:
        wrong = "  WRONG" * any("wrong" in r for r in results if r["proxy"] == proxy)
        yield "%-8s" % proxy + "".join("%13s" % text(median(results, proxy, *c[1:])) for c in columns) + wrong
    yield ""


# ------------------------------------------------------------------ Command line


def main():
    """Measure, print -> exit status, or what was wrong."""
    args, names = arguments()
    files = descriptor_limit()
    scenarios = collections.OrderedDict((name, SCENARIOS[name]) for name in args.scenario)
    for name, scenario in scenarios.items():
        most = (files - 160) // 2  # a proxy takes two descriptors for a tunnel
        if scenario.size > most and scenario.job in (load_echo, load_idle):
            print("note: %s with %d tunnels, as only %d files may be open" % (name, most, files))
            scenarios[name] = scenario._replace(size=most, title="%s, but %d" % (scenario.title, most))
    about = list(machine(names))
    print("\n".join(about), end="\n\n", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))  # so that all is cleaned up
    try:
        results = measure_all(names, scenarios, files, args.rounds, args.seconds, args.pin)
    except KeyboardInterrupt:
        return "interrupted"
    except Wrong as error:
        return "error: %s" % error
    for name, scenario in scenarios.items():
        print("\n".join(table(name, scenario, names, results)))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": about, "pinned": args.pin, "results": results}, file, indent=1)
    wrong = ["%(proxy)s, %(scenario)s, round %(round)d: %(wrong)s" % r for r in results if "wrong" in r]
    return "error: not everything was right:\n  " + "\n  ".join(wrong) if wrong else 0


def arguments():
    """The command line -> its options, the names of the proxies to measure."""
    everything, everyone = ",".join(SCENARIOS), ",".join(PROXIES)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenario", metavar="A,B", default=everything, help="of " + everything)
    parser.add_argument("--proxy", metavar="A,B", help="of %s; default: those installed" % everyone)
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="short measurements, about 15 seconds in all")
    parser.add_argument("--pin", action="store_true", help="every proxy on one core, always the same")
    parser.add_argument("--json", metavar="FILE", help="keep every measurement there")
    args = parser.parse_args()
    args.scenario, names = args.scenario.split(","), (args.proxy or everyone).split(",")
    for name, known in [(n, SCENARIOS) for n in args.scenario] + [(n, PROXIES) for n in names]:
        if name not in known:
            parser.error("%r is not one of %s" % (name, ", ".join(known)))
    args.rounds, args.seconds = args.rounds or (1 if args.quick else 3), 0.15 if args.quick else 2.0
    missing = [n for n in names if PROXIES[n] and not shutil.which(PROXIES[n][1][0])]
    if missing and args.proxy:
        parser.error("%s is not installed" % missing[0])
    return args, [n for n in names if n not in missing]


if __name__ == "__main__":
    if not hasattr(select, "epoll"):
        sys.exit("bench_wsgate needs Linux: epoll for the load, /proc for the accounts")
    sys.exit(main())
