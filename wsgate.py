#!/usr/bin/env python3
"""wsgate: a WebSocket reverse proxy in one file, on the standard library alone.

Upgrade and Connection are hop-by-hop fields (RFC 9110 7.6.1, 7.8): a proxy does
not pass them on by itself, so a backend never learns that the client wants a
WebSocket. wsgate passes both on explicitly, joins client and backend when the
backend answers 101, and closes the tunnel when no byte passed for a while.

The file reads from top to bottom as a connection lives:

    Errors                HTTPError ends an exchange, BackendError tries another server
    Configuration: values parse_*: the text of a value -> what it means; Template
    Configuration: hosts  parse_listen, parse_networks, parse_proxy_pass, parse_location
    Configuration: keys   SERVER_KEYS, LOCATION_KEYS, UPSTREAM_KEYS: the reference
    Configuration: file   load_config: wsgate.ini -> one immutable Config, by a ConfigReader
    Configuration: checks warn_of_mistakes, warn_of_machine: valid but surely not meant
    The process           run_gate: from a configuration to a running Gate; PidFile
    The gate              Gate.run accepts, handles signals, reloads, drains; Wakeup
    Upgrade in place      Successor, inherited_sockets: USR2 hands the sockets over
    Limits and counters   Connections.enter, acquire; Counters for the status page
    Listening             Listener gives each connection a thread, from Workers
    One connection        ClientConnection.handle: begin (PROXY protocol, TLS), then serve
    One exchange          Exchange.run for each request: receive, admit, respond, finish
    Streams               Stream and Deadline: bytes within a time; read_proxy_header
    Fairness              Turns.took: a thread that takes more than its share gives way
    TLS                   certificate_store for clients, backend_context for backends
    HTTP/1.1 messages     read_head, parse_request_head, parse_response_head, make_response
    HTTP/1.1 fields       parse_fields, Headers
    HTTP/1.1 bodies       Scanner, the interface of what looks at relayed bytes; ChunkedBody
    Routing               read_path, Config.locations_of, Location.rewrite
    Access control        check_address, check_origin, check_password
    Upstreams             Upstream.pick and their health; Server.connect
    Resolving, connecting Resolver.resolve has a deadline; connect_socket
    Forwarding            request_head_for_backend, response_head_for_client
    The upgrade           requested_upgrade and check_101: the handshake, both ways
    Relaying              Relay: two Flows, one each way, with back-pressure
    Relaying HTTP         HTTPRelay: a request and its response
    The tunnel            Tunnel: a Relay after a 101, pings and endings
    WebSocket frames      frame_header, FrameScanner; make_frame, close_frame
    Access log            AccessLogEntry and its LogLine, as text or JSON
    Log writers           LogWriter: a queue and a thread, so that no log holds up traffic
    Status                StatusConnection: the status page and metrics
    Command line          main and what its options do
    Demo                  demo: a gate, an echo backend and a page
    Probe: verdicts       VERDICTS: what a handshake can end with, and what to do
    Probe                 probe: one handshake, explained

Three rules hold everywhere. An exchange that cannot continue raises HTTPError, and
Exchange.run turns it into a response, the end of the connection and a line in the log.
A Stream, and what is built on it, belongs to one thread. What threads share is few
things, each with its lock or the reason why it needs none: Gate.state and Gate.config,
Connections, Counters, Workers, Crowd, Upstream and the Health of its servers, Resolver,
PasswordFile, CertificateStore, LogWriter, and what lru_cache keeps, which is never changed.
No lock is held over I/O.
"""

import sys

if sys.version_info < (3, 6):  # so that old Pythons can say it, the file parses on them
    sys.exit("wsgate needs Python 3.6 or later, this is Python %d.%d" % sys.version_info[:2])

import _thread
import argparse
import base64
import bisect
import collections
import concurrent.futures
import configparser
import contextlib
import difflib
import email.utils
import errno
import functools
import getpass
import hashlib
import hmac
import html
import http
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import operator
import os
import random
import re
import select
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import textwrap
import threading
import time
import urllib.parse
import warnings
import weakref

try:
    import fcntl
    import grp
    import pwd
    import resource
except ImportError:  # Windows
    fcntl = grp = pwd = resource = None

VERSION = "1.0"

log = logging.getLogger("wsgate")


# ----------------------------------------------------------------------- Errors


Reason = collections.namedtuple("Reason", "status meaning remedy")
REASONS = {  # word: (status, or None where it has none of its own; what it means; what to do)
    "bad_request": Reason(
        400, "malformed HTTP/1.1 request", "see the detail in the response body and the log"),
    "bad_handshake": Reason(
        400, "invalid WebSocket handshake", "see the detail in the response body and the log"),
    "http_on_tls_port": Reason(
        400, "plain HTTP request to a TLS port", "use https:// or wss://"),
    "tls_on_http_port": Reason(
        400, "TLS handshake on a plain HTTP port", "use http:// or ws://, or add ssl to listen"),
    "auth_required": Reason(
        401, "missing or wrong credentials", "send a user of auth_basic_user_file"),
    "auth_denied": Reason(
        401, "rejected by the auth_request service", "log in; see the log of that service"),
    "access_denied": Reason(
        403, "client address rejected by allow/deny",
        "check allow and deny; behind a proxy, set_real_ip_from"),
    "origin_denied": Reason(
        403, "Origin not in allowed_origins",
        "add it to allowed_origins; a proxy in front must pass Host unchanged"),
    "no_route": Reason(
        404, "no location for this host and path", "add a [location]; check Host and prefix"),
    "method_not_allowed": Reason(
        405, "method not supported (CONNECT)", "wsgate is not a forward proxy"),
    "header_timeout": Reason(
        408, "request head not complete in time", "check the network; client_header_timeout"),
    "body_timeout": Reason(
        408, "request body stalled", "check the network; client_body_timeout"),
    "body_too_large": Reason(
        413, "request body over the limit", "raise client_max_body_size"),
    "uri_too_long": Reason(
        414, "request line over the limit", "shorten the URL, or raise client_header_size"),
    "upgrade_missing": Reason(
        426, "Upgrade or Connection lost in front of wsgate",
        "each proxy in front must set both headers, over HTTP/1.1"),
    "conn_limit_per_ip": Reason(
        429, "too many connections from this address", "raise max_connections_per_ip"),
    "header_too_large": Reason(
        431, "request head over the limit", "raise client_header_size"),
    "internal_error": Reason(
        500, "bug in wsgate", "report the traceback in the error log"),
    "bad_transfer_encoding": Reason(
        501, "unsupported Transfer-Encoding", "send chunked or Content-Length"),
    "backend_refused": Reason(
        502, "backend refused the connection",
        "start it, check its port; use 127.0.0.1 for localhost (which may be ::1)"),
    "backend_unresolved": Reason(
        502, "backend host name not resolved", "check proxy_pass and DNS on that machine"),
    "backend_unreachable": Reason(
        502, "cannot connect to the backend", "check proxy_pass, route and firewall"),
    "backend_tls": Reason(
        502, "TLS to the backend failed",
        "check http or https in proxy_pass, proxy_ssl_name, proxy_ssl_trusted_certificate and"
        " proxy_ssl_verify"),
    "backend_closed": Reason(
        502, "backend closed before responding", "see its log; check http or https in proxy_pass"),
    "backend_truncated": Reason(
        502, "backend closed during the response", "see its log"),
    "backend_bad_response": Reason(
        502, "backend response is not valid HTTP",
        "see the error log; check port and http or https in proxy_pass"),
    "backend_bad_101": Reason(
        502, "backend's 101 does not match the handshake",
        "probe the backend directly; is there a cache or proxy in front of it?"),
    "auth_unavailable": Reason(
        502, "auth_request failed, or password queue full",
        "probe that service; see the error log; passwords (503): retry"),
    "conn_limit": Reason(
        503, "connection limit reached",
        "raise max_connections or max_conns, or find out why connections stay open"),
    "draining": Reason(
        503, "wsgate is shutting down", "retry"),
    "no_backend": Reason(
        503, "no server of the upstream available", "start one; see [upstream]"),
    "backend_timeout": Reason(
        504, "backend timed out",
        "is it stuck? see its log, proxy_connect_timeout and proxy_read_timeout"),
    "bad_version": Reason(
        505, "unsupported HTTP version", "use HTTP/1.1"),
    "backend_said_NNN": Reason(
        None, "backend refused the handshake with status NNN", "see its log; probe it directly"),
    "idle_timeout": Reason(
        None, "no data within idle_timeout", "set ping_interval = 25s"),
    "ping_timeout": Reason(
        None, "no data after a ping", "check the network, or whether the peer is stuck"),
    "drain": Reason(
        None, "closed to drain wsgate", "nothing; the client should reconnect"),
    "shutdown": Reason(
        None, "wsgate was stopped", "nothing; the client should reconnect"),
    "message_too_big": Reason(
        None, "message over max_message_size", "raise max_message_size, or fix the sender"),
    "bad_frames": Reason(
        None, "invalid frames while max_message_size is set", "fix the peer (RFC 6455 5.2)"),
    "send_timeout": Reason(
        None, "client accepted no data within send_timeout", "check the client and its network"),
    "client_gone": Reason(
        None, "client disconnected without a Close", "check the network in front of wsgate"),
    "backend_gone": Reason(
        None, "backend disconnected without a Close", "see its log"),
}


def reason_row(word):
    """Return the Reason of a word, or None; backend_said_404 has that of backend_said_NNN."""
    row = REASONS.get(re.sub("(?<=backend_said_)[0-9]{3}", "NNN", word))
    if row and word not in REASONS:
        status = word[-3:]
        row = row._replace(status=int(status), meaning=row.meaning.replace("NNN", status))
    return row


class ConfigError(Exception):
    """Invalid configuration. errors: every problem found, one line each."""

    def __init__(self, errors):
        super().__init__("\n".join(errors))
        self.errors = errors


class SettingError(ValueError):
    """The value of a key, valid in itself, cannot be used; key names it."""

    def __init__(self, key, message):
        super().__init__(message)
        self.key = key


class HTTPError(Exception):
    """Ends the exchange with a response of wsgate's own; answered in Exchange.refuse only.

    reason: a word of REASONS, for the log, the body and X-Wsgate-Reason.
    detail: one sentence for people. fields: (name, value) pairs of bytes to add to the response.
    """

    def __init__(self, status, reason, detail="", fields=()):
        super().__init__(detail or reason_row(reason).meaning)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.fields = fields


class BackendError(HTTPError):
    """A server failed to respond.

    sent: whether it may have received the request. retry: whether no byte of a response was
    received, so that a repeatable request may be sent to another server.
    """

    def __init__(self, status, reason, detail="", sent=False, retry=False):
        super().__init__(status, reason, detail)
        self.sent = sent
        self.retry = retry


class ClientGone(Exception):
    """The client disconnected; no response can be sent. str() is the reason word."""


class TimedOut(Exception):
    """A Deadline expired."""


def describe_error(error):
    """Return an exception as text, in the words of the operating system or OpenSSL."""
    if getattr(error, "verify_message", ""):  # Python 3.7
        return "certificate verify failed: " + error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError):
        text = error.reason or re.sub(r"^\[\w+\] | \(_ssl\.c:.*", "", str(error))
        return text.replace("_", " ").lower()
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    file = getattr(error, "filename", None)
    return "%s: %s" % (file, text) if file else text


# -------------------------------------------------------- Configuration: values
#
# A parser takes the text of a value and returns what it means. It raises ValueError,
# with the value, what is wrong with it and, in parentheses, what was expected.

Return = collections.namedtuple("Return", "status text")

TIME_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}
SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
LONGEST = 3650 * 86400  # seconds; far below what overflows the C types of any timeout
REDIRECTS = (301, 302, 303, 307, 308)


def require(condition, message, *values):
    """Return condition if it is true; else raise ValueError with message % values."""
    if not condition:
        raise ValueError(message % values)
    return condition


def optional(parse, word="", value=None):
    """Return a parser that returns value for this word, and calls parse for all others."""
    return lambda text: value if text == word else parse(text)


def positive(parse, message):
    """Return a parser that calls parse; message: of the ValueError if that returns zero."""
    return lambda text: require(parse(text), message, text)


def matching(pattern, message):
    """Return a decorator: a parser that calls the function with the groups of this pattern.

    message: of the ValueError for a text that does not match. Keywords are passed on.
    """
    def decorate(make):
        return lambda text, **options: make(
            *require(re.fullmatch(pattern, text), message, text).groups(), **options)
    return decorate


def choice(*words):
    """Return a parser that accepts these words only."""
    return matching("(%s)" % "|".join(words),
                    "invalid value %%r (expected one of: %s)" % ", ".join(words))(str)


def list_of(split, parse):
    """Return a parser of a list, as a tuple; split(text) makes the list of texts."""
    return lambda text: tuple(parse(item) for item in split(text))


def words_of(text):
    """Return the words of a list, separated by commas, spaces or lines."""
    return re.findall(r"[^,\s]+", text)


def lines_of(text):
    """Return the lines of a text that are not blank, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


@matching(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|[smhd]?)",
          "invalid duration %r (expected e.g. 500ms, 30s, 10m, 2h or 1d)")
def parse_seconds(number, unit):
    """Return a duration ('500ms', '30s', '10m', '2h', '1d' or '30') in seconds, as float."""
    seconds = float(number) * TIME_UNITS[unit]
    require(seconds <= LONGEST, "duration '%s%s' is too long (expected at most 3650d)",
            number, unit)
    return seconds


parse_timeout = positive(parse_seconds, "invalid duration %r (expected more than 0)")


@matching(r"([0-9]{1,9})([kmgKMG]?)", "invalid size %r (expected e.g. 512, 16k, 1m or 1g)")
def parse_size(number, unit, minimum=0):
    """Return a size ('512', '16k', '1m' or '1g') in bytes."""
    size = int(number) * SIZE_UNITS[unit.lower()]
    require(size >= minimum, "invalid size '%s%s' (expected at least %d)", number, unit, minimum)
    return size


parse_count = matching(
    r"([0-9]{1,9})", "invalid number %r (expected a non-negative integer)")(int)
parse_flag = matching(r"(on)|off", "invalid value %r (expected on or off)")(bool)


@matching(r"([0-9]{1,9})", "invalid CPU %r (expected auto, off or the number of a CPU)")
def parse_cpu(number):
    """Return the number of a CPU that this process may use."""
    require(not ALLOWED_PROCESSORS or int(number) in ALLOWED_PROCESSORS,
            "CPU %s is not available (expected one of: %s)",
            number, ", ".join(map(str, sorted(ALLOWED_PROCESSORS))))
    return int(number)


def parse_log(text):
    """Return the destination of a log as it is written: path, -, off or syslog:[HOST[:PORT]]."""
    if re.fullmatch(r"-|off|syslog:([^\s:]+(:[0-9]{1,5})?)?", text):
        return text
    require(text and not text.startswith("syslog:"), "invalid log destination %r (expected a path,"
            " -, off, syslog: or syslog:HOST:PORT)", text)
    require(not re.search(r"\.log\s", text),  # nginx: access_log PATH FORMAT, error_log PATH LEVEL
            "invalid path %r (log_format and log_level are keys of their own)", text)
    return parse_path(text)


def parse_path(text):
    """Return the path of a file to write; raise ValueError if its directory does not exist."""
    require(not re.search(r"[\n\0\"']|;$|\s[#;]", text), "invalid path %r", text)
    require(not os.path.isdir(text), "%s is a directory (expected a file)", text)
    check_directory(text)
    return text


def check_directory(path):
    """Raise ValueError unless the directory of this path exists.

    Where only root can look it is not checked: after a start as root, a reload is done by user.
    """
    directory = os.path.dirname(path) or "."
    try:
        os.stat(os.path.join(directory, ""))
    except PermissionError:
        pass
    except OSError:
        raise ValueError("no such directory: %s (expected an existing one)" % directory)


def parse_pem(text):
    """Return the path of a file; raise OSError if it does not exist.

    Permissions are checked where it is loaded: what is loaded already need not be readable.
    """
    with contextlib.suppress(PermissionError):
        open(text, "rb").close()
    return text


TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
parse_tls_version = matching(
    "(%s)" % "|".join(map(re.escape, TLS_VERSIONS)),
    "unknown TLS version %%r (expected some of: %s)" % " ".join(TLS_VERSIONS))(str)


def parse_protocols(text):
    """Return a list of TLS versions, a tuple of str."""
    return require(tuple(map(parse_tls_version, words_of(text))),
                   "no TLS version (expected some of: %s)", " ".join(TLS_VERSIONS))


def parse_ciphers(text):
    """Return an OpenSSL cipher list."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).set_ciphers(text)
    except ssl.SSLError:
        raise ValueError("no cipher matches %r (expected an OpenSSL cipher list such as"
                         " ECDHE+AESGCM:!aNULL)" % text)
    return text


@matching(r"(?s)([2-5][0-9]{2})(?:\s+(\S.*))?",
          "invalid response %r (expected CODE, CODE TEXT or 30x URL)")
def parse_return(status, body):
    """Return 'CODE', 'CODE TEXT' or '30x URL' as a Return."""
    require(body or int(status) not in REDIRECTS,
            "missing URL of the redirect (expected e.g. %s https://example.com/)", status)
    require(int(status) not in REDIRECTS or not re.search(r"\s|^[\"'`<]", body),
            "invalid URL %r (expected one without spaces and quotes)", body)
    return Return(int(status), Template(body or ""))


def parse_header_line(line):
    """Return a header field ('Name: value') as (name bytes, Template)."""
    name, colon, value = (part.strip() for part in line.partition(":"))
    require(colon and TOKEN.fullmatch(name.encode()),
            "invalid header field %r (expected Name: value)", line)
    require(name.lower().encode() not in MANAGED_FIELDS,
            "%s is managed by wsgate (remove this line)", name)
    require(not re.search("[\x00-\x08\x0a-\x1f\x7f]", value),
            "control character in the value of %s", name)
    return name.encode(), Template(value)


def parse_field_name(word):
    """Return the name of a field that auth_request may set, as bytes."""
    name = word.encode()
    require(TOKEN.fullmatch(name) and b"$" not in name  # a variable of nginx
            and name.lower() not in MANAGED_FIELDS | HANDSHAKE_FIELDS | {b"host"},
            "invalid field name %r (expected e.g. Remote-User)", word)
    return name


def parse_user(text):
    """Return the name of a user of this system."""
    require(pwd, "user is not supported on this platform")
    try:
        pwd.getpwnam(text)
    except KeyError:
        raise ValueError("unknown user %r" % text)
    return text


class Template:
    """Text with $variables, compiled once (proxy_set_header, add_header, return)."""

    VARIABLES = {  # (Request, ClientInfo) -> bytes; $http_NAME is a field of the request
        "host": lambda request, client: request.host.encode(),
        # As in the generated fields, a peer on a Unix socket has no address.
        "remote_addr": lambda request, client: client.address.replace("unix:", "").encode(),
        "remote_user": lambda request, client: request.user,
        "scheme": lambda request, client: client.scheme,
        "request_uri": lambda request, client: request.target,
        "request_id": lambda request, client: request.id.encode(),
        "server_port": lambda request, client: b"%d" % client.server_port,
        "proxy_add_x_forwarded_for": lambda request, client: forwarded_for(request, client),
        "escaped_url": lambda request, client: percent_encode(public_url(request, client),
                                                              RESERVED),
    }

    def __init__(self, text):
        self.text = text
        parts = re.split(r"\$(\w+|\{\w+\})", text)  # text and names of variables by turns
        # Bytes, or functions as in VARIABLES.
        self.parts = [self.variable(part.strip("{}")) if place % 2 else part.encode()
                      for place, part in enumerate(parts) if part]

    def variable(self, name):
        """Return the function for a variable. Raise ValueError if it is unknown."""
        if name in self.VARIABLES:
            return self.VARIABLES[name]
        require(name.startswith("http_"), "unknown variable $%s%s", name,
                nearest(name, self.VARIABLES) or " (expected one of: %s)" % VARIABLE_NAMES)
        field = name[len("http_"):].lower().replace("_", "-").encode()
        return lambda request, client: b", ".join(
            request.known[field] if field in request.known else request.fields.get_all(field))

    def render(self, request, client):
        """Return the text as bytes, with the values of the variables for this request."""
        return b"".join([part if isinstance(part, bytes) else part(request, client)
                         for part in self.parts])


VARIABLE_NAMES = ", ".join("$" + name for name in list(Template.VARIABLES) + ["http_NAME"])
parse_login_url = matching(  # variables stand after the host only
    r"(https?://[^\s/?#$@\\]+(?:[/?#]\S*)?|/(?![/\\])\S*)",
    "invalid URL %r (expected https://HOST/... or /path)")(Template)


# --------------------------------------------------------- Configuration: hosts

Address = collections.namedtuple("Address", "host port path")  # path: of a Unix socket
Listen = collections.namedtuple(
    "Listen", "address ssl proxy_protocol reuseport redirect mode status")
PLAIN_LISTEN = Listen(None, False, False, False, False, mode=0o666, status=False)
Target = collections.namedtuple("Target", "tls authority uri")  # a parsed proxy_pass


def parse_address(text, default_port=None, default_host=None):
    """Return host:port, [v6]:port or unix:/path as an Address.

    A host or a port may be left out only if there is a default for it.
    """
    if text.startswith("unix:"):
        require(re.fullmatch(r"unix:/.*[^/]", text) and len(text.encode()) <= 108,
                "invalid address %r (expected unix:/absolute/path, a path of at most 103 bytes)",
                text)
        return Address(None, None, text[len("unix:"):])
    host, port = require(
        re.fullmatch(r"(\[[^\[\]]+\]|[^\s:\[\]/]*)(?::([0-9]+))?", text),
        "invalid address %r (expected host:port, [v6]:port or unix:/path)", text).groups()
    require(host or default_host, "missing host in %r (expected host:port)", text)
    check_host(host or default_host)
    require(port or default_port, "missing port in %r (expected host:port)", text)
    lowest = 0 if default_host else 1  # for a listener the system may choose the port
    require(lowest <= int(port or 1) <= 65535, "invalid port %r (expected 1 to 65535)", port)
    return Address(host.strip("[]") or default_host, int(port or default_port), None)


HOST_NAME = re.compile(r"(?!-)[\w-]{1,63}(?:\.(?!-)[\w-]{1,63})*\.?")


def check_host(host):
    """Raise ValueError unless this is a host name, an IPv4 address or [IPv6 address]."""
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(re.sub(r"%[\w.-]+\]$|\]$", "", host[1:]))  # %: interface
        elif re.search(r"(?:^|\.)(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?$", host):  # to inet_aton(3), too
            ipaddress.IPv4Address(host)
        else:
            require(HOST_NAME.fullmatch(host), "not a name")
    except ValueError:
        raise ValueError("invalid host %r (expected a host name or an IP address)" % host)


def parse_server_name(text):
    """Return a host name or an IP address, as it is written."""
    check_host("[%s]" % text if ":" in text else text)
    return text


def show_address(address):
    """Return an Address as it is written in wsgate.ini."""
    if address.path:
        return "unix:" + address.path
    return ("[%s]:%d" if ":" in address.host else "%s:%d") % (address.host, address.port)


def parse_options(words, options, message):
    """Return what follows an address, NAME or NAME=VALUE, as {name: value}.

    options: {name: the parser of its value, or None if it has none; then it is True}.
    message: of the ValueError for another word.
    """
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        require(name in options and bool(equals) == bool(options[name]), message, word)
        values[name] = options[name](text) if equals else True
    return values


def parse_listen_address(text, default_host="127.0.0.1"):
    """Return the Address of a listener, also [:]PORT; the directory of a Unix socket must exist."""
    host, _, port = text.partition(":")
    require(host != "*", "invalid host '*' (expected :%s for every IPv4 address, [::]:%s for every"
                         " IPv6 address)", port or "PORT", port or "PORT")
    address = parse_address(re.sub(r"^([0-9]+)$", r":\1", text), default_host=default_host)
    if address.path:
        check_directory(address.path)
    return address


LISTEN_OPTIONS = {
    "ssl": None, "proxy_protocol": None, "reuseport": None, "redirect": None,
    "mode": matching("0?([0-7]{3})", "invalid mode %r (expected e.g. 0660)")(
        functools.partial(int, base=8))}


def parse_listener(line):
    """Return 'ADDRESS [OPTION ...]' as a Listen."""
    words = line.split()
    address = parse_listen_address(words[0], "0.0.0.0")
    options = parse_options(words[1:], LISTEN_OPTIONS,
                            "unknown listen option %r (expected one of: ssl, proxy_protocol,"
                            " reuseport, redirect, mode=0660)")
    require("ssl" not in options or "redirect" not in options,
            "redirect leads from http to https, so it cannot be combined with ssl")
    require(address.path or "mode" not in options, "mode= is for unix: addresses only")
    return PLAIN_LISTEN._replace(address=address, **options)


def parse_listen(text):
    """Return the listeners, one per line or by commas, as a tuple of Listen."""
    listens = tuple(map(parse_listener, lines_of(text.replace(",", "\n"))))
    require(listens, "no address (expected at least one, e.g. 127.0.0.1:8080)")
    addresses = [show_address(each.address) for each in listens]
    require(len(set(addresses)) == len(addresses),
            "duplicate address %s", max(addresses, key=addresses.count))
    return listens


NETWORK_WORDS = {  # unix: is a peer on a Unix socket; all is every address, and "all" for these
    "all": [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"), "all"],
    "unix:": ["unix:"]}


def parse_networks(text):
    """Return a list of addresses and CIDRs as a tuple of ip_network, or str of NETWORK_WORDS."""
    return tuple(network for word in words_of(text)
                 for network in NETWORK_WORDS.get(word) or [parse_network(word)])


def parse_network(word):
    """Return an address or CIDR as ip_network; an IPv4-mapped one (::ffff:0:0/96) as IPv4."""
    try:
        network = ipaddress.ip_network(word, strict=False)
    except ValueError:
        raise ValueError("invalid network %r (expected an address, a CIDR such as 10.0.0.0/8,"
                         " all or unix:)" % word)
    require(ipaddress.ip_address(word.partition("/")[0]) == network.network_address,
            "network %r has host bits set (expected %s)", word, network)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped and network.prefixlen >= 96:
        return ipaddress.ip_network("%s/%d" % (mapped, network.prefixlen - 96))
    return network


@matching(r"(?:http|ws)(s?)://(unix:/[^:\s]+(?=:|$)|(?!unix:)[^/?#\s]+):?(/[\x21\x22\x24-\x7e]*)?",
          "invalid URL %r (expected http://host:port, https://host:port or http://unix:/path)")
def parse_proxy_pass(secure, authority, uri):
    """Return the URL of a backend as a Target.

    scheme://NAME, scheme://host[:port] or scheme://unix:/path: , then an optional /uri;
    the scheme is http or https (ws and wss mean the same).
    """
    require("@" not in authority, "credentials are not allowed in a backend URL (expected"
                                  " proxy_set_header = Authorization: ...)")
    require("$" not in authority, "variables are not allowed in the host %r (expected host:port or"
                                  " the name of an [upstream])", authority)
    parse_address(authority, default_port=80)  # raises ValueError
    return Target(bool(secure), authority, uri)


parse_origin = matching(
    r"(any|same|null|\*[^/]*|[a-z*][a-z0-9+.*-]*://[^/?#@]*)",
    "invalid origin %r (expected e.g. https://example.com)")(str)


def parse_origins(text):
    """Return the word 'same' and the patterns of scheme://host[:port] as a tuple, 'any' as None."""
    words = list(map(parse_origin, words_of(text.lower())))
    if not words or "any" in words:
        return None
    return tuple(word if word == "same" else pattern_of(word) for word in words)


SERVER_OPTIONS = {
    "weight": positive(
        parse_count, "invalid weight %r (expected at least 1; down takes a server out)"),
    "max_fails": parse_count, "fail_timeout": parse_seconds, "max_conns": parse_count,
    "backup": None, "down": None}


def parse_server_line(line):
    """Return 'ADDRESS [weight=1] [max_fails=1] [fail_timeout=10s] ... [down]' as a Server."""
    words = line.split()
    return Server(parse_address(words[0], default_port=80), **parse_options(
        words[1:], SERVER_OPTIONS,
        "unknown server parameter %%r (expected any of: %s; servers are separated by commas or"
        " lines)" % ", ".join(SERVER_OPTIONS)))


def parse_servers(text):
    """Return the servers of an upstream, one per line or by commas, as a tuple of Server."""
    return require(tuple(map(parse_server_line, lines_of(text.replace(",", "\n")))),
                   "no server (expected at least one address)")


def parse_balance(text):
    """Return 'least_conn', 'round_robin', 'ip_hash' or 'cookie NAME'."""
    token = TOKEN.pattern.decode()
    require(re.fullmatch(r"least_conn|round_robin|ip_hash|cookie\s+(?!\$)" + token, text),
            "invalid method %r (expected least_conn, round_robin, ip_hash or cookie NAME)", text)
    return " ".join(text.split())


parse_upstream_name = matching(
    r"([\w.-]+)", "invalid name %r (expected [upstream NAME])")(str)
LOCATION_HOST = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]")


def parse_location(title):
    """Return the title of a [location ...] as (hosts, path, True for an exact match).

    hosts: lower case, '*.suffix', or None for any. The path is compared with decoded paths
    without // and dot segments; one that cannot be equal to any of these raises ValueError.
    """
    exact, hosts, path = require(
        re.fullmatch(r"location ?(= ?)?([^/]*)(/.*)", title), "invalid location (expected"
        " [location /path], [location HOST/path] or [location = /path])").groups()
    hosts = tuple(words_of(hosts.lower()))
    for host in hosts:
        require(host.strip("^~*"), "regular expressions and modifiers are not supported (expected"
                                   " [location /prefix] or [location = /path])")
        require(LOCATION_HOST.fullmatch(host), "invalid host %r (expected a name without a port,"
                                               " in ASCII; * only as the first label)", host)
    plain = re.sub("//+", "/", urllib.parse.unquote(path))
    require(plain == path, "%s never matches (expected the decoded path, %s)", path, plain)
    require(not re.search(r"/\.\.?(?:[/;]|$)", path),
            "%s never matches (expected a path without dot segments)", path)
    require(not re.search(r"[\\?#\x00-\x1f\x7f]|\{$", path),
            "invalid path %s (expected one without \\, ?, # and control characters)", path)
    return hosts or (None,), path, bool(exact)


# ---------------------------------------------------------- Configuration: keys
#
# One table per kind of section: it parses, and it is the reference that wsgate.ini
# repeats (a test compares the two). A key that is not in its table is an error.

Key = collections.namedtuple("Key", "parse default meaning")

SERVER_KEYS = {
    "listen": Key(
        parse_listen, "127.0.0.1:8080",
        "addresses to accept connections on, one per line: host:port, [v6]:port, :port, port or"
        " unix:/path, then options: ssl, proxy_protocol (expect a PROXY header), reuseport,"
        " redirect (respond with a redirect to https:// on the first ssl listener), mode=0660"
        " (permissions of a Unix socket)"),
    "ssl_client_certificate": Key(
        optional(parse_pem), "",
        "CA file (PEM); if set, TLS clients must present a certificate signed by it"),
    "ssl_protocols": Key(
        parse_protocols, "TLSv1.2 TLSv1.3", "TLS versions offered to clients"),
    "ssl_ciphers": Key(
        optional(parse_ciphers, value=""), "",
        "ciphers up to TLSv1.2, an OpenSSL cipher list; if unset, the default of Python"),
    "client_header_timeout": Key(
        parse_timeout, "10s",
        "time limit for the TLS handshake and the whole request head, however slowly it comes"),
    "client_header_size": Key(
        functools.partial(parse_size, minimum=128), "16k",
        "maximum size of a head in bytes, 431 beyond, or 502 if it is that of a response"),
    "client_body_timeout": Key(
        parse_timeout, "60s", "time limit between two reads of a request body, 408 beyond"),
    "keepalive_timeout": Key(
        parse_seconds, "75s",
        "close a client connection that is idle between two requests for this long;"
        " 0: one request per connection"),
    "send_timeout": Key(
        parse_timeout, "60s", "close a client that accepts no data for this long"),
    "max_connections": Key(
        optional(positive(parse_count, "invalid number %r (expected auto, or at least 1)"),
                 "auto"), "auto",
        "maximum number of client connections; beyond, the longest idle one is closed for a new"
        " one, or if none is idle, 503; auto: what RLIMIT_NOFILE and the thread limits allow"),
    "max_connections_per_ip": Key(
        parse_count, "0", "maximum number of connections per client address, 429 beyond;"
        " 0: no limit"),
    "set_real_ip_from": Key(
        parse_networks, "",
        "addresses and CIDRs of trusted proxies (unix: for Unix sockets), whose forwarding fields"
        " and PROXY headers are honored"),
    "real_ip_header": Key(
        choice("X-Forwarded-For", "X-Real-IP", "proxy_protocol"), "X-Forwarded-For",
        "where trusted proxies put the client address: X-Forwarded-For, X-Real-IP or"
        " proxy_protocol"),
    "drain_timeout": Key(
        parse_seconds, "30s", "time over which SIGQUIT closes the open tunnels"),
    "access_log": Key(
        parse_log, "-",
        "destination of the access log: path, - (stdout), off, syslog: or syslog:HOST:PORT"),
    "error_log": Key(
        parse_log, "-",
        "destination of the error log: path, - (stderr), off, syslog: or syslog:HOST:PORT"),
    "log_level": Key(
        choice("debug", "info", "warning", "error"), "info",
        "minimum severity in the error log: debug, info, warning or error"),
    "log_format": Key(
        choice("text", "json"), "text", "format of the access log: text or json"),
    "status_listen": Key(
        optional(optional(parse_listen_address), "off"), "off",
        "address of the status page and metrics: host:port, unix:/path or off"),
    "status_allow": Key(
        parse_networks, "127.0.0.0/8 ::1",
        "addresses and CIDRs that may read the status page"),
    "worker_cpu_affinity": Key(
        optional(optional(parse_cpu, "off"), "auto", "auto"), "auto",
        "auto: pin the process to one CPU, since GIL contention across CPUs costs more than it"
        " gains; off: do not pin; N: pin to CPU N"),
    "user": Key(
        optional(parse_user), "",
        "user to switch to after binding the listeners, when started as root"),
    "pid": Key(
        optional(parse_path), "", "file for the process ID; -s needs it"),
}

LOCATION_KEYS = {
    "proxy_pass": Key(
        optional(parse_proxy_pass), "",
        "backend: http(s)://UPSTREAM, http(s)://host:port or http(s)://unix:/path: , then an"
        " optional /uri that replaces the matched prefix"),
    "proxy_pass_websocket": Key(
        optional(parse_proxy_pass), "",
        "backend of WebSocket connections, as in proxy_pass; if unset, proxy_pass takes them too"),
    "return": Key(
        optional(parse_return), "",
        "respond without a backend, instead of proxy_pass: CODE, CODE TEXT, or 30x URL"),
    "proxy_set_header": Key(
        list_of(lines_of, parse_header_line), "",
        "request header fields for the backend, one 'Name: value' per line; an empty value"
        " removes the field; variables: " + VARIABLE_NAMES),
    "add_header": Key(
        list_of(lines_of, parse_header_line), "",
        "response header fields for the client, one 'Name: value' per line, also on errors; each"
        " replaces the backend's field (Set-Cookie: is added); an empty value removes it; variables"
        " as in proxy_set_header"),
    "proxy_redirect": Key(
        choice("default", "off"), "default",
        "rewrite Location, Refresh and Content-Location where they name the backend or a path below"
        " the /uri of proxy_pass: default or off"),
    "underscores_in_headers": Key(
        parse_flag, "off",
        "pass request header fields with _ in their names; applications may take _ for -"),
    "proxy_keepalive": Key(
        parse_seconds, "0",
        "keep the connection to a server for the next request of the same client connection, for"
        " this long; only GET, HEAD and OPTIONS without a body use it; 0: one request each"),
    "proxy_connect_timeout": Key(
        parse_timeout, "5s",
        "time limit for DNS lookup, connect and TLS handshake with one server"),
    "proxy_read_timeout": Key(
        parse_timeout, "60s", "time limit between two reads of an HTTP response"),
    "proxy_send_timeout": Key(
        parse_timeout, "60s", "time limit between two writes of an HTTP request"),
    "idle_timeout": Key(
        optional(positive(optional(parse_seconds, "off", 0),
                          "invalid duration %r (expected more than 0, or never)"),
                 "never", math.inf), "60s",
        "close a tunnel without a byte in either direction for this long, or never; if unset,"
        " proxy_read_timeout applies"),
    "ping_interval": Key(
        parse_seconds, "0",
        "send a WebSocket ping to a peer that has been silent for this long; 0: never"),
    "ping_peers": Key(choice("both", "client", "backend"), "both",
                      "which sides are pinged: both, client or backend"),
    "ping_timeout": Key(
        parse_timeout, "20s",
        "close the tunnel if a peer sends nothing for this long after a ping"),
    "upgrade": Key(
        choice("websocket", "none", "any"), "websocket",
        "protocols to switch to: websocket, none, or any (what client and backend agree on,"
        " except h2c)"),
    "strict_handshake": Key(
        parse_flag, "on",
        "check Sec-WebSocket-Key, -Version and -Accept; off: accept non-standard devices"),
    "allowed_origins": Key(
        parse_origins, "any",
        "Origin of WebSocket handshakes and other requests, if they have one: any, same (as Host),"
        " or a list of scheme://host[:port] with * globs; 403 for others"),
    "allow": Key(
        parse_networks, "",
        "addresses and CIDRs (or unix:, all) with access; if set, all others get 403"),
    "deny": Key(
        parse_networks, "",
        "addresses and CIDRs (or unix:, all) that get 403; of allow and deny, the narrowest network"
        " that has the address decides, deny if both have it"),
    "auth_basic_user_file": Key(
        optional(parse_pem), "",
        "htpasswd file for Basic authentication, of {SCRYPT}, {SSHA} or {SHA} lines as printed"
        " by --hash-password"),
    "auth_request": Key(
        optional(optional(parse_proxy_pass), "off"), "",
        "URL of an authorization service, as in proxy_pass, or off; 2xx lets a request pass, 401"
        " and 403 refuse it"),
    "auth_request_headers": Key(
        list_of(words_of, parse_field_name), "",
        "names of fields in the response of auth_request that are passed to the backend, and are"
        " $http_NAME in proxy_set_header; a client cannot set them"),
    "auth_request_login": Key(
        optional(parse_login_url), "",
        "where to redirect to (302) after 401 from auth_request, unless an upgrade is requested:"
        " http(s)://HOST/... or /path, with variables such as $escaped_url"),
    "reject_with": Key(
        choice("http", "close"), "http",
        "how to refuse a WebSocket handshake: http (an HTTP error), or close (101, then a Close"
        " frame)"),
    "client_max_body_size": Key(
        parse_size, "0", "maximum size of a request body in bytes, 413 beyond; 0: no limit"),
    "max_message_size": Key(
        parse_size, "0",
        "maximum size of a WebSocket message in bytes; a larger one closes the tunnel with 1009;"
        " 0: no limit"),
    "max_connections": Key(
        parse_count, "0",
        "maximum number of requests and tunnels of this location at a time, 503 beyond;"
        " 0: no limit"),
    "proxy_next_upstream_tries": Key(
        parse_count, "16", "number of servers to try for one request; 0: all"),
    "proxy_next_upstream_timeout": Key(
        parse_seconds, "15s",
        "time after which a request is not passed to another server; 0: no limit"),
    "proxy_ssl_verify": Key(
        parse_flag, "on", "verify the certificate of a https backend and its name"),
    "proxy_ssl_trusted_certificate": Key(
        optional(parse_pem), "",
        "CA file (PEM) to verify backends with; if unset, the system's CA store"),
    "proxy_ssl_name": Key(
        optional(parse_server_name), "",
        "server name for SNI and verification; if unset, the host of proxy_pass"),
    "proxy_ssl_protocols": Key(
        parse_protocols, "TLSv1.2 TLSv1.3", "TLS versions offered to https backends"),
    "proxy_ssl_ciphers": Key(
        optional(parse_ciphers, value=""), "", "the same as ssl_ciphers, for https backends"),
    "proxy_ssl_certificate": Key(
        optional(parse_pem), "", "client certificate (PEM) to present to backends"),
    "proxy_ssl_certificate_key": Key(
        optional(parse_pem), "", "private key (PEM) of proxy_ssl_certificate"),
    "proxy_protocol": Key(
        parse_flag, "off", "send a PROXY protocol v1 header to the backend"),
    "ssl_certificate": Key(
        optional(parse_pem), "",
        "certificate chain (PEM) of the ssl listeners; in [location HOST/...]: for that host name"
        " (SNI)"),
    "ssl_certificate_key": Key(
        optional(parse_pem), "", "private key (PEM, no passphrase) of ssl_certificate"),
}

LISTS = ("listen", "set_real_ip_from", "server", "proxy_set_header", "add_header", "allow", "deny",
         "allowed_origins")
PROXY_PASS_KEYS = ("proxy_pass", "proxy_pass_websocket", "auth_request")

UPSTREAM_KEYS = {
    "server": Key(
        parse_servers, "",
        "servers, one per line or by commas: address, then weight=1 max_fails=1 fail_timeout=10s"
        " max_conns=0 backup down"),
    "balance": Key(
        parse_balance, "least_conn",
        "how to choose a server: least_conn, round_robin, ip_hash, or cookie NAME (by the value of"
        " that cookie; ip_hash for requests without it)"),
}

SECTIONS = (("server", SERVER_KEYS), ("location /path", LOCATION_KEYS),
            ("upstream NAME", UPSTREAM_KEYS))

# What is pasted from nginx, HAProxy and Caddy: what to do with it, and its directives; one with _
# at its end stands for all that begin so.
FOREIGN = (
    ("built in: remove it",
     "client_body_temp_path client_body_in_single_buffer proxy_temp_path"
     " proxy_temp_file_write_size proxy_force_ranges proxy_ignore_headers proxy_headers_hash"
     " server_name_in_redirect proxy_pass_header port_in_redirect postpone_output output_buffers"
     " server_names_hash_max_size accept_mutex connection_pool_size request_pool_size"
     " timeout_client-fin timeout_server-fin timeout_queue timeout_check hash-type auto_https"
     " transport send_lowat proxy_send_lowat proxy_http_version proxy_buffering"
     " proxy_request_buffering proxy_buffer_size proxy_buffers proxy_busy_buffers_size"
     " proxy_max_temp_file_size proxy_socket_keepalive tcp_nodelay tcp_nopush sendfile"
     " sendfile_max_chunk aio directio thread_pool chunked_transfer_encoding proxy_cache_bypass"
     " proxy_no_cache proxy_ssl_server_name proxy_ssl_session_reuse proxy_next_upstream"
     " proxy_pass_request_headers proxy_pass_request_body proxy_ignore_client_abort"
     " client_body_buffer_size client_body_in_file_only lingering_close lingering_time"
     " lingering_timeout keepalive_requests real_ip_recursive merge_slashes map resolver"
     " resolver_timeout server_tokens reset_timedout_connection multi_accept use zone"
     " ssl_prefer_server_ciphers ssl_session_cache ssl_session_timeout ssl_session_tickets"
     " ssl_dhparam ssl_ecdh_curve http events mode option global defaults stream_close_delay"
     " flush_interval keepalive_disable types_hash_max_size server_names_hash_bucket_size"
     " variables_hash_max_size proxy_headers_hash_max_size proxy_headers_hash_bucket_size"
     " ssl_buffer_size proxy_ssl_verify_depth absolute_redirect ignore_invalid_headers"),
    ("expected listen = ADDRESS", "bind http_port https_port"),
    ("expected listen = ADDRESS ssl", "ssl"),
    ("expected [location HOST/path]", "server_name"),
    ("expected [location /path] or [location = /path]", "location"),
    ("expected [location /path]", "handle handle_path route acl use_backend"),
    ("expected proxy_pass in [location /path]", "reverse_proxy default_backend"),
    ("expected [upstream NAME]", "upstream backend"),
    ("expected [server]", "frontend"),
    ("expected idle_timeout", "proxy_timeout timeout_tunnel"),
    ("expected proxy_connect_timeout", "timeout_connect dial_timeout"),
    ("expected proxy_read_timeout", "timeout_server response_header_timeout"),
    ("expected client_body_timeout and send_timeout", "timeout_client"),
    ("expected keepalive_timeout", "timeout_http-keep-alive"),
    ("expected client_header_timeout", "timeout_http-request proxy_protocol_timeout"),
    ("expected client_header_size", "large_client_header_buffers client_header_buffer_size"),
    ("expected client_max_body_size", "request_body"),
    ("expected max_connections", "worker_connections maxconn"),
    ("expected max_connections_per_ip or max_connections", "limit_conn limit_conn_zone"),
    ("expected auth_basic_user_file", "auth_basic basic_auth basicauth"),
    ("expected auth_request", "forward_auth"),
    ("expected auth_request_headers", "auth_request_set copy_headers"),
    ("expected ssl_client_certificate, only if clients must present a certificate",
     "ssl_verify_client ssl_trusted_certificate ssl_verify_depth"),
    ("expected ssl_certificate and ssl_certificate_key", "tls crt"),
    ("expected proxy_set_header", "header_up header_upstream request_header more_set_input_headers"
     " http-request_set-header http-request_add-header http-request_del-header"),
    ("expected add_header", "header header_down more_set_headers http-response_set-header"
     " http-response_add-header add_trailer"),
    ("expected add_header with an empty value",
     "proxy_hide_header more_clear_headers http-response_del-header"),
    ("expected proxy_pass_websocket", "if_($http_upgrade"),
    ("expected proxy_ssl_verify = off", "tls_insecure_skip_verify"),
    ("expected proxy_ssl_trusted_certificate", "tls_trusted_ca_certs"),
    ("expected ssl_certificate_key without a passphrase", "ssl_password_file"),
    ("expected proxy_ssl_ciphers or proxy_ssl_protocols", "proxy_ssl_conf_command"),
    ("expected ssl_ciphers or ssl_protocols", "ssl_conf_command ssl-default-bind-ciphers"
     " ssl-default-bind-options"),
    ("expected listen = ADDRESS redirect", "redirect http-request_redirect"),
    ("expected deny", "http-request_deny"),
    ("expected max_fails and fail_timeout in server: health checks are passive",
     "health_check check http-check option_httpchk health_uri health_interval health_port"
     " health_timeout health_status fail_duration max_fails fail_timeout default-server"),
    ("expected max_conns in server", "max_conns queue"),
    ("expected proxy_next_upstream_tries or proxy_next_upstream_timeout",
     "retries lb_try_duration lb_retries"),
    ("expected drain_timeout", "worker_shutdown_timeout hard-stop-after grace_period"),
    ("expected proxy_keepalive in [location /path]", "keepalive keepalive_time"),
    ("expected balance = ip_hash", "ip_hash"),
    ("expected balance = cookie NAME or ip_hash", "hash sticky stick-table stick cookie"),
    ("expected balance in [upstream NAME]", "lb_policy"),
    ("expected balance = least_conn", "least_conn least_time"),
    ("expected balance = round_robin", "random"),
    ("expected return", "redir respond http-request_return"),
    ("expected status_listen", "stub_status stats admin"),
    ("expected log_level", "error_log_level debug_connection"),
    ("expected access_log or error_log", "log"),
    ("expected set_real_ip_from", "trusted_proxies"),
    ("set it where wsgate is started: LimitNOFILE or ulimit -n", "worker_rlimit_nofile"),
    ("one process uses one CPU: start several with listen = ... reuseport",
     "worker_processes nbproc nbthread"),
    ("out of scope: run it under systemd, see --print-unit",
     "daemon master_process chroot group env"),
    ("out of scope: a configuration is one file", "include import load_module"),
    ("out of scope: serve files with nginx or Caddy",
     "root alias index autoindex_ try_files expires etag types default_type file_server errorfile"
     " error_page proxy_intercept_errors recursive_error_pages handle_errors open_file_cache_"
     " log_not_found if_modified_since charset_ disable_symlinks max_ranges mp4_ flv dav_"),
    ("out of scope: get certificates with certbot", "acme_ca acme_dns email"),
    ("out of scope: let the backend compress",
     "gzip_ gunzip brotli_ encode compression"),
    ("out of scope: HTTP/1.1 only", "http2_ http3_ quic_"),
    ("out of scope: use return, or a /uri in proxy_pass",
     "rewrite if set break rewrite_log uri strip_prefix http-request_set-path"
     " http-request_replace-path http-request_replace-uri http-request_set-uri"),
    ("out of scope: cache in nginx or in the backend",
     "proxy_cache_ proxy_store_"),
    ("out of scope: HTTP backends only",
     "fastcgi_ uwsgi_ scgi_ grpc_ memcached_ php_fastcgi stream ssl_preread"),
    ("out of scope: limit rates in nginx, HAProxy or a firewall",
     "limit_req_ limit_rate_ proxy_limit_rate limit_conn_status"
     " limit_conn_log_level limit_conn_dry_run auth_delay"),
    ("out of scope: bodies are not rewritten",
     "sub_filter_ addition_types add_before_body add_after_body slice_ xslt_ image_filter_"),
    ("out of scope: cookies are not rewritten, so set their path in the application",
     "proxy_cookie_path proxy_cookie_domain proxy_cookie_flags"),
    ("out of scope: not supported",
     "satisfy internal mirror_ proxy_bind proxy_method proxy_set_body geo geoip_ geoip2_"
     " split_clients js_ perl_ lua_ limit_except ssl_stapling_ proxy_ssl_crl ssl_crl ssl_ocsp_"
     " ssl_early_data ssl_reject_handshake auth_jwt_ secure_link_ userid_ valid_referers ntlm"
     " post_action stream_timeout http-request http-response"),
)


FOREIGN_WORDS = {name: advice for advice, names in FOREIGN for name in names.split()}
SECTION_OF = {name: section for section, keys in reversed(SECTIONS) for name in keys}


def foreign(words):
    """Return ' (what to do)' with a line of another proxy, given its words, or ''."""
    name = words[0].rstrip(":") + "_"
    names = ["_".join(words[:2]), name[:-1]] + [
        name[:each.end()] for each in re.finditer("_", name)]
    return next((" (%s)" % FOREIGN_WORDS[each] for each in names if each in FOREIGN_WORDS), "")


def unknown_key(name, table):
    """Return what is wrong with a key that is not in the table of its section."""
    if name in SECTION_OF:
        return "not allowed in this section (expected in [%s])" % SECTION_OF[name]
    word, space, _ = name.partition(" ")
    if space and word in SECTION_OF:
        return "missing = after %s" % word
    return "unknown key" + (foreign(name.split() or [name]) or nearest(name, table))


LINE_SHAPES = (  # of a line that is neither [section] nor key = value, and what to do with it
    (r"[\s{};]*", "remove it: a section ends where the next one begins"),
    (r"location\s+~.*", "regular expressions are not supported; expected [location /path]"),
    (r"(location)\s+\^~\s*([^{]*?)\s*\{.*", r"expected [\1 \2]"),
    (r"server\s+\S+\s+(\S+:[0-9]+)\b.*", r"expected server = \1"),  # of HAProxy
    (r"proxy_set_header\s+(?i:upgrade|connection|content-length|transfer-encoding|keep-alive)\s.*",
     "built in: remove it"),
    (r"(proxy_set_header|add_header)\s+([\w-]+)\s+[\"']?(.*?)[\"']?(?:\s+always)?[\s;]*",
     r"expected \1 = \2: \3"),
    (r"((?:server|location|upstream)\b[^{]*?)\s*\{.*", r"expected [\1]"),
    (r"(%s)[\s:]+([^\s:;].*?)[\s:;]*" % "|".join(SECTION_OF), r"expected \1 = \2"),
)


def expected_line(line):
    """Return ' (what to do)' with a line that is neither [section] nor key = value."""
    matches = ((re.fullmatch(shape, line), advice) for shape, advice in LINE_SHAPES)
    return (next((" (%s)" % match.expand(advice) for match, advice in matches if match), "")
            or foreign(re.findall(r"[^\s{};]+", line)) or " (expected [section] or key = value;"
            " a line that continues a value is indented)")


def nearest(word, words):
    """Return ' (did you mean ...?)' with the word of these that is a slip away, or ''.

    A slip is about two characters, or one of seven: a lower cutoff finds words by chance.
    """
    cutoff = min(0.91, 1 - 1.7 / (len(word) + 2))
    near = difflib.get_close_matches(word.lower(), words, 1, cutoff)
    return " (did you mean %r?)" % near[0] if near else ""


# ---------------------------------------------------------- Configuration: file


def load_config(path, overrides=None):
    """Return the Config of the file at path (None: no file, all defaults), for a start or -t.

    Raises ConfigError with every error of the file. overrides: {key: text} for [server].
    Its warnings include what depends on this machine; looking up host names may take long.
    """
    reader = ConfigReader(path, overrides or {})
    config = reader.read()
    warn_of_machine(reader, config)
    return config


def reload_config(path, overrides=None):
    """Return the Config as load_config does, without what may take long: connections wait."""
    return ConfigReader(path, overrides or {}).read()


INVALID = object()  # in place of a value that has an error

# What is often left at the end of a value or around it: name, pattern, what remains.
SLIPS = (("comment", r"(?m)[ \t]+(?:#|;(?!;*$)|//|/\*).*$", ""),
         ("semicolon", r"(?m)[ \t]*;+(?=\s|$)", ""),
         ("quotes", r"(?m)(?:^|(?<=\s))[{0}](.*)[{0}]$".format("\"'`\xab\xbb\u2018-\u201f"), r"\1"))

# A line of a value that looks like a key or a section of its own, with the number of split().
STRAY_LINE = re.compile(r"\n(?:([A-Za-z_]+)\s*|\[(server|location|upstream)\b[^\0\n]*)\0([0-9]+)")


class ConfigReader:
    """Reads and checks one file; collects all errors before it gives up.

    A section is named by its title, 'server', 'location /path' or 'upstream NAME'; its texts
    are {key: text of the value}.
    """

    def __init__(self, path, overrides):
        self.path = path
        self.overrides = overrides
        self.lines = {}      # (title, key or None) -> line number
        self.errors = []     # (line number, text)
        self.warnings = []
        self.sections = {}   # title -> texts
        self.server = None   # Settings
        self.defaults = {}   # the values of [server] that locations inherit
        self.upstreams = {}  # {name of an [upstream], or address: Upstream}: one object, one health
        self.hosts = []      # (title, key, Address) of what is resolved at every connect
        self.places = {}     # (host, path, exact) -> title of the location there
        self.locations = []

    def read(self):
        """Return the Config; raise ConfigError."""
        if self.path is not None:
            self.split(self.read_text())
        self.sections.setdefault("server", {}).update(self.overrides)
        self.read_server(self.sections["server"])
        readers = {"upstream": self.read_upstream, "location": self.read_location}
        titles = [title for title in self.sections if title != "server"]
        for title in sorted(titles, key=lambda title: title.split()[:1] != ["upstream"]):
            readers.get(title.partition(" ")[0], self.unknown_section)(title, self.sections[title])
        self.add_root()
        self.raise_errors()
        certificates = None
        if any(listen.ssl for listen in self.server.listen):
            certificates = self.checked("server", "ssl_certificate", certificate_store, self)
            self.raise_errors()
        config = Config({
            "path": self.path, "server": self.server, "locations": self.locations,
            "upstreams": list(self.upstreams.values()), "certificates": certificates,
            "warnings": self.warnings, "place": self.place})
        warn_of_mistakes(self, config)
        return config

    # ---- errors and warnings

    def place(self, title, key):
        """Return (line number or 0, 'FILE:LINE: [section] key')."""
        title = title if title in self.sections else "server"  # [location /] made by add_root
        if title == "server" and key in self.overrides:
            return 0, {"listen": "--listen", "proxy_pass": "--backend"}.get(key, key)
        line = self.lines.get((title, key)) or self.lines.get((title, None), 0)
        return line, "%s%s: [%s]%s" % (self.path or "command line", ":%d" % line if line else "",
                                       title, " " + key if key else "")

    def error(self, title, key, message):
        """Add an error, FILE:LINE: [section] key: message."""
        line, place = self.place(title, key)
        self.errors.append((line, "%s: %s" % (place, message.replace("\n", " "))))

    def line_error(self, number, message):
        """Add an error of a line that is in no section."""
        self.errors.append((number, "%s:%d: %s" % (self.path, number, message)))

    def warn(self, title, key, message):
        """Add a warning of what is valid but surely not meant, in the form of an error."""
        self.warnings.append("%s: %s" % (self.place(title, key)[1], message))

    def raise_errors(self):
        """Raise ConfigError with all errors in the order of the file, if there are any."""
        if self.errors:
            raise ConfigError([text for _, text in sorted(self.errors, key=lambda each: each[0])])

    def checked(self, title, key, make, *arguments):
        """Return make(*arguments), INVALID after adding the error that it raises."""
        try:
            return make(*arguments)
        except OSError as error:
            self.error(title, key, "cannot open %s (%s)" % (error.filename, error.strerror))
        except ValueError as error:
            self.error(title, getattr(error, "key", key), str(error))
        return INVALID

    # ---- the file

    def read_text(self):
        """Return the text of the file; raise ConfigError."""
        try:
            with open(self.path, encoding="utf-8-sig") as file:  # Notepad writes a BOM
                return file.read()
        except OSError as error:
            raise ConfigError(["%s: cannot be read (%s)" % (self.path, error.strerror)])
        except UnicodeDecodeError as error:
            raise ConfigError(["%s: not UTF-8 (invalid byte at offset %d)" % (
                self.path, error.start)])

    def split(self, text):
        """Fill self.sections and self.lines from the text of a file.

        configparser keeps no line numbers and stops at the first duplicate. So each line gets
        its number, after a NUL, at the end of a header or before the first =: every key and
        every section is then unique and has its line.
        """
        parser = configparser.RawConfigParser(delimiters=("=",), interpolation=None,
                                              default_section="")
        parser.optionxform = str  # keys are case-sensitive
        parser.SECTCRE = re.compile(r"\[(?P<header>.*)")  # add_section takes the ] off
        lines = text.replace("\0", "\N{REPLACEMENT CHARACTER}").split("\n")
        numbered = [re.sub(r"^(\s*\[.*|[^=]*(?==))", r"\g<1>" + "\0%d" % number, line)
                    for number, line in enumerate(lines, 1)]
        try:  # with a section for what is above the first one
            parser.read_string("\n".join(["[]\0000"] + numbered))
        except configparser.ParsingError as error:
            for number, _ in error.errors:
                line = lines[number - 2].strip()
                self.line_error(number - 1, "invalid line: %s%s" % (line, expected_line(line)))
        self.raise_errors()
        for header in parser.sections():
            items = [take_number(key) + (text,) for key, text in parser.items(header)]
            name, line = take_number(header)
            self.add_section(name, line, items)

    def add_section(self, header, line, items):
        """Add a section to self.sections. items: (key, line number, text) of its keys."""
        title = " ".join(header[:-1].split())
        if not line:
            for key, number, _ in items:
                self.line_error(number, "%s: outside of a section (expected [server] above it)"
                                % key)
        elif not header.endswith("]"):
            self.line_error(line, "invalid line: [%s (expected [section] and nothing after it)"
                            % header)
        elif self.is_first((title, None), line, "[%s]: duplicate section" % title):
            self.sections[title] = {
                key: text for key, number, text in items
                if self.is_first((title, key), number, "[%s] %s: duplicate key" % (title, key))}

    def is_first(self, place, line, message):
        """Keep the line number of a (title, key); if it has one, add an error, return False."""
        first = self.lines.setdefault(place, line)
        if first != line:
            self.line_error(line, "%s (first in line %d%s)" % (
                message, first, "; further values go on indented lines below it"
                if place[1] in LISTS else ""))
        return first == line

    # ---- values

    def values(self, title, texts, table):
        """Return {key: value} of what a section gives; INVALID where it has an error."""
        for name in texts:
            if name not in table:
                self.error(title, name, unknown_key(name, table))
        return {name: self.checked(title, name, self.value, title, name, text, table[name].parse)
                for name, text in texts.items() if name in table}

    def value(self, title, name, text, parse):
        """Return the value of a key; raise ValueError or OSError. Its text is that of split()."""
        stray = STRAY_LINE.search(text)
        text = re.sub("\0[0-9]+", "", text).strip()
        slip = find_slip(text, parse)
        if stray:
            slip = "line %s is indented, so it continues %s of line %d (remove the indentation)" % (
                stray.group(3), name, self.lines[title, name])
        try:
            value = parse(text)
        except (OSError, ValueError):
            require(not slip, "%s", slip)
            raise
        if slip and (stray.group(2) or stray.group(1) in SECTION_OF if stray
                     else text.endswith(";") and slip.startswith("unexpected semicolon")):
            self.warn(title, name, slip)
        return value

    # ---- sections

    def unknown_section(self, title, _):
        """Add the error of a section whose title is not known."""
        word = title.partition(" ")[0]
        self.error(title, None, "unknown section%s" % (
            foreign([word]) or nearest(word, ("server", "location", "upstream"))))

    def read_server(self, texts):
        """Read [server], whose values are also the defaults of all locations."""
        table = dict(LOCATION_KEYS, **SERVER_KEYS)
        given = self.values("server", texts, table)
        values = {name: given[name] if name in given else key.parse(key.default)
                  for name, key in table.items()}
        self.defaults = {name: key.parse(key.default) if name in SERVER_KEYS else values[name]
                         for name, key in LOCATION_KEYS.items()}
        self.server = Settings(values)

    def read_upstream(self, title, texts):
        """Add the Upstream of an [upstream NAME]."""
        values = self.values(title, dict({"server": ""}, **texts), UPSTREAM_KEYS)
        name = self.checked(title, None, parse_upstream_name, title.partition(" ")[2])
        if INVALID not in values.values() and name is not INVALID:
            self.hosts += [(title, "server", server.address) for server in values["server"]]
            self.upstreams[name] = Upstream(name, values["server"],
                                            values.get("balance", "least_conn"))

    def read_location(self, title, texts):
        """Add the Location of a [location ...], unless there is an error in it."""
        given = self.values(title, texts, LOCATION_KEYS)
        place = self.checked(title, None, self.take_place, title)
        values = dict(self.defaults, **given)
        if INVALID not in values.values() and place is not INVALID:
            self.checked(title, None, self.add_location, title, place, given)

    def take_place(self, title):
        """Return the title as parse_location; raise ValueError if another location is there."""
        hosts, path, exact = parse_location(title)
        for host in hosts:
            other = self.places.setdefault((host, path, exact), title)
            require(other == title, "duplicate location (first in line %d: [%s])",
                    self.lines.get((other, None), 0), other)
        return hosts, path, exact

    def add_location(self, title, place, given):
        """Add the Location of what a section gives; raise ValueError if it is contradictory."""
        values = dict(self.defaults, **given)
        for key, other in (("proxy_pass", "return"), ("return", "proxy_pass"),
                           ("return", "proxy_pass_websocket")):
            if key in given and other not in given:
                values[other] = None
        if "idle_timeout" not in given and "idle_timeout" not in self.sections["server"]:
            values["idle_timeout"] = values["proxy_read_timeout"]
        if values["proxy_pass"] and values["return"]:
            raise SettingError("return", "cannot be combined with proxy_pass (expected one of"
                                         " them)")
        require(values["proxy_pass"] or values["return"],
                "missing proxy_pass or return (expected one of them)")
        upstreams = [values[key] and self.upstream_for(title, key, values[key])
                     for key in PROXY_PASS_KEYS]
        passwords = values["auth_basic_user_file"] and self.checked(
            title, "auth_basic_user_file", PasswordFile, values["auth_basic_user_file"])
        if given.get("ssl_certificate"):
            self.checked(title, "ssl_certificate", check_pair, values["ssl_certificate"],
                         values["ssl_certificate_key"])
        location = self.checked(title, "proxy_ssl_certificate", Location, values,
                                title.partition(" ")[2], place, upstreams, passwords)
        if location is not INVALID:
            self.locations.append(location)

    def add_root(self):
        """Add the [location /] that proxy_pass or return in [server] makes, if there is none."""
        implied = self.defaults["proxy_pass"] or self.defaults["return"]
        if implied and (None, "/", False) not in self.places:
            self.read_location("location /", {})
        if not self.locations and not self.errors:
            advice = "" if self.path else "; or use --backend http://host:port, or --demo"
            self.errors.append((0, "%s: no location (expected [location /] with proxy_pass ="
                                   " http://host:port%s)" % (self.path or "command line", advice)))

    def upstream_for(self, title, key, target):
        """Return the Upstream that a Target names, or one made for its single address."""
        where = target.authority
        address = parse_address(where, default_port=443 if target.tls else 80)
        name = where if where in self.upstreams else show_address(address)
        if name not in self.upstreams:
            self.hosts.append((title, key, address))
            self.upstreams[name] = Upstream(name, (Server(address),), "round_robin")
        return self.upstreams[name]


def take_number(text):
    """Return the name and the line number that ConfigReader.split has put after it."""
    name, _, number = text.partition("\0")
    return name.strip(), int(number)


def find_slip(text, parse):
    """Return a sentence about what a value is valid without (see SLIPS), or None."""
    names, rest = [], text
    for name, pattern, replacement in SLIPS:
        rest, count = re.subn(pattern, replacement, rest)
        if count:
            names.append(name)
    if not names:
        return None
    try:
        parse(rest.strip())
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or "\n" in rest:
            return None  # else it is at least a path without it
    line = next(line for line, without in zip(text.splitlines(), rest.splitlines() + [""])
                if line != without)
    return "unexpected %s in %r (remove %s)" % (
        " and ".join(names), line, "it" if names in (["comment"], ["semicolon"]) else "them")


class Settings:
    """Values as attributes, named by their keys, as of one section; immutable."""

    def __init__(self, values):
        self.__dict__.update(values)
        self.__dict__["return_"] = values.get("return")  # return is a keyword of Python

    def __setattr__(self, name, value):
        raise AttributeError("the configuration is immutable")


class Config(Settings):
    """One configuration, complete and checked. A reload makes a new one; tunnels keep theirs.

    path: of the file, or None. server: Settings. locations: list of Location. upstreams: list of
    Upstream. certificates: a CertificateStore, if a listener has TLS. warnings: list of lines.
    place: ConfigReader.place, for errors that are found later.
    """

    def __init__(self, values):
        super().__init__(values)
        by_host = {}
        for location in sorted(self.locations, key=lambda each: (not each.exact, -len(each.path))):
            for host in location.hosts:
                by_host.setdefault(host, []).append(location)
        vars(self).update(
            # {host: its Locations: the exact ones, then prefixes by falling length}
            by_host=by_host,
            wildcards=sorted((host for host in by_host if host and host[:2] == "*."),
                             key=len, reverse=True),
            # {(host, path without its last slash): Location}
            without_slash={
                (host, each.path[:-1]): each for each in self.locations for host in each.hosts
                if each.path.endswith("/") and not each.exact and len(each.path) > 1})

    def route(self, host, path):
        """Return the Location that serves this host name and decoded path, or None."""
        return next(iter(self.matching(host, path)), None)

    def matching(self, host, path):
        """Return the Locations that a host name and a decoded path belong to, as a list.

        The first serves the request: host exact, then the longest *.suffix, then locations
        without a host; among these the exact path, then the longest prefix (nginx: server_name,
        location). [location /app/] takes /app as well: it serves it if it redirects to /app/,
        or if no other takes it; else it is second.
        """
        for group in self.hosts_for(host):
            found = next((each for each in self.by_host[group] if each.matches(path)), None)
            slash = self.without_slash.get((group, path))
            if slash and not (found and found.path == path):
                return [found, slash] if found and not slash.adds_slash() else [slash]
            if found:
                return [found]
        return []

    def locations_of(self, request):
        """Return the Locations whose checks a request must pass, as a list; the first serves it.

        There are several where backends may differ in what they make of the path: see read_path.
        """
        found = self.matching(request.host, request.paths[0])
        if not found or len(found) == len(request.paths) == 1:
            return found
        for path in request.paths[1:]:
            found += self.matching(request.host, path)
        # A `return` is a guard too, unless the first is carved out of it.
        guards = [each for each in found
                  if each.return_ and not found[0].path.startswith(each.path)]
        return guards[:1] + found

    def hosts_for(self, host):
        """Return the hosts of locations that cover this host name, the most specific first."""
        found = [host] if host in self.by_host else []
        if self.wildcards:
            found += [name for name in self.wildcards if host.endswith(name[1:])]
        if None in self.by_host:
            found.append(None)
        return found


# -------------------------------------------------------- Configuration: checks
#
# Of what is valid but surely not meant. -t and start print them.

LOCATION_MISTAKES = (  # key; whether a Location, with the texts of its section, is mistaken; why
    ("proxy_ssl_verify",
     lambda location, texts: not location.proxy_ssl_verify and any(
         proxy and proxy.context
         for proxy in (location.proxy, location.websocket_proxy, location.auth)),
     "off: backend TLS is open to man-in-the-middle attacks"),
    ("proxy_pass",
     lambda location, texts: not (location.exact or location.path.endswith("/"))
     and location.proxy_pass and location.proxy_pass.uri == "/",
     "requests for {0.path}/x are forwarded as //x (expected [location {0.path}/])"),
    ("auth_request_headers",
     lambda location, texts: texts.get("auth_request_headers") and not location.auth,
     "unused: the location has no auth_request"),
    ("auth_request_login",
     lambda location, texts: texts.get("auth_request_login") and not location.auth,
     "unused: the location has no auth_request"),
    ("proxy_pass_websocket",
     lambda location, texts: texts.get("proxy_pass_websocket") and location.upgrade == "none",
     "unused: upgrade is none"),
    ("add_header",
     lambda location, texts: any(value.text.endswith(" always")
                                 for _, value in location.add_header),
     "always is sent as a part of the value (remove it: errors have the fields too)"),
    ("deny",
     lambda location, texts: {"allow", "deny"}.intersection(texts)
     and set(location.allow).intersection(location.deny),
     "a network is in allow too, so deny decides (`deny =` removes that of [server])"),
    ("ssl_certificate",
     lambda location, texts: texts.get("ssl_certificate") and None in location.hosts,
     "unused: the certificate of a connection is chosen by its host name (expected in [server],"
     " or in [location HOST/])"),
    ("ping_peers",
     lambda location, texts: texts.get("ping_peers", "both") != "both"
     and not location.ping_interval,
     "unused: ping_interval is 0"),
    ("ping_interval",
     lambda location, texts: location.ping_interval >= location.idle_timeout,
     "not less than idle_timeout: a silent tunnel is closed before its first ping"),
) + tuple(
    (key, lambda location, texts, key=key:
     "$" in (getattr(getattr(location, key), "uri", None) or ""),
     "no variables in {0.%s.uri}; %s" % (key, advice))
    for key, advice in zip(PROXY_PASS_KEYS, (
        "without a URI, the request URI is forwarded unchanged",) * 2 + (
            "the service finds the URL in X-Original-URL",)))


SERVER_MISTAKES = (  # the same of [server]
    ("listen",
     lambda server, texts: not server.set_real_ip_from
     and any(listen.proxy_protocol for listen in server.listen),
     "proxy_protocol: every connection is closed, because set_real_ip_from does not name the"
     " proxy"),
    ("listen",
     lambda server, texts: any(listen.redirect for listen in server.listen)
     and not any(listen.ssl for listen in server.listen),
     "redirect to https, but no listener has the option ssl (expected e.g. listen = :80 redirect,"
     " :443 ssl)"),
)


def warn_of_mistakes(reader, config):
    """Add the warnings that follow from the file alone to a ConfigReader."""
    for title, settings, mistakes in [("server", config.server, SERVER_MISTAKES)] + [
            ("location " + each.name, each, LOCATION_MISTAKES) for each in config.locations]:
        for key, mistaken, message in mistakes:
            if mistaken(settings, reader.sections.get(title, {})):
                reader.warn(title, key, message.format(settings))
    if not any(listen.ssl for listen in config.server.listen):
        for title, texts in reader.sections.items():
            for key in filter(texts.get, ("ssl_certificate", "ssl_client_certificate")):
                reader.warn(title, key, "unused: no listener has the option ssl (expected e.g."
                            " listen = :443 ssl)")
    warn_of_hidden(reader, config)


def warn_of_hidden(reader, config):
    """Warn of a location that one of a more specific host hides.

    The host is chosen before the path: beside [location a.example/], no request for
    a.example reaches [location /chat/]. A `return` hides on purpose: it redirects a host.
    """
    hidden = {}  # Location: (a host, the Location chosen for it)
    for host in filter(None, config.by_host):
        for group in config.hosts_for(host):
            for location in config.by_host[group]:
                chosen = config.route(host, location.path)
                if not chosen.return_ and (len(chosen.path) < len(location.path)
                                           or chosen.exact < location.exact):
                    hidden.setdefault(location, (host, chosen))
    for location, (host, chosen) in hidden.items():
        reader.warn("location " + location.name, None, "hidden by [location %s] for requests to %s"
                    " (expected [location %s%s%s] too)" % (
                        chosen.name, host, "= " if location.exact else "", host, location.path))


def warn_of_machine(reader, config):
    """Add the warnings that depend on this machine: host names and permissions of files."""
    deadline = Deadline(RESOLVE_TIMEOUT)  # for all, or a resolver that hangs delays the start
    groups = [title.partition(" ")[2] for title in reader.sections if title[:9] == "upstream "]
    for title, key, address in reader.hosts:
        if not resolves(address, deadline):
            reader.warn(title, key, "host %s cannot be resolved now; it is resolved again at every"
                        " connect%s" % (
                            address.host, " ([upstream %s] is written without a port)"
                            % address.host if address.host in reader.upstreams
                            else nearest(address.host, groups)))
    for key in ("error_log", "access_log", "pid"):
        file = getattr(config.server, key) or "off"
        place = file if os.path.exists(file) else os.path.dirname(file) or "."
        if not re.match(r"-$|off$|syslog:", file) and not os.access(place, os.W_OK):
            reader.warn("server", key, "%s is not writable for this user" % file)
    user = config.server.user
    for title, texts in reader.sections.items() if user else ():
        for key in FILE_KEYS:
            file = texts.get(key, "").strip()
            if file and not readable_by(user, file):
                reader.warn(title, key, "%s is not readable for user %s: restart wsgate after"
                            " each change of it, or let that user read it" % (file, user))


FILE_KEYS = ("ssl_certificate", "ssl_certificate_key", "ssl_client_certificate",
             "proxy_ssl_trusted_certificate", "proxy_ssl_certificate",
             "proxy_ssl_certificate_key", "auth_basic_user_file")


def resolves(address, deadline):
    """False if the host of an Address has no IP address now; True if time is up before."""
    with contextlib.suppress(OSError, UnicodeError, TimedOut):
        return bool(address.path or time.monotonic() >= deadline.at
                    or resolver.resolve(address.host, address.port, deadline))
    return False


def readable_by(user, path):
    """True if the permissions of a file and its directories let this user read it."""
    entry = pwd.getpwnam(user)
    groups = os.getgrouplist(user, entry.pw_gid)
    path = os.path.realpath(path)

    def permits(path, bit):
        """Return a true value if this bit of rwx is set for the user."""
        status = os.stat(path)
        shift = 6 if status.st_uid == entry.pw_uid else 3 if status.st_gid in groups else 0
        return status.st_mode >> shift & bit or entry.pw_uid == 0

    try:
        return bool(permits(path, 4)) and all(
            permits(path[:slash.start()] or "/", 1) for slash in re.finditer("/", path))
    except OSError:
        return False


# ------------------------------------------------------------------ The process


def run_gate(path, overrides, ready=lambda gate: None):
    """Start the gate, run it to its end and return the exit status.

    path, overrides: as load_config takes them. ready: called with the Gate once it listens.
    Raises ConfigError and OSError.
    """
    threading.stack_size(256 * 1024)  # 10,000 threads of 8 MiB do not fit everywhere
    config = load_config(path, overrides)
    stay_on_one_processor(config.server.worker_cpu_affinity)
    errors = open_logs(config.server)
    if errors:
        raise ConfigError(["%s: %s" % (config.place("server", key)[1], error)
                           for key, error in errors.items()])
    gate = Gate(config, lambda: reload_config(path, overrides), open_logs)
    gate.apply_config(config, inherited_sockets())
    with fatal_for(config, "pid"):
        gate.pid_file.write(config.server.pid, config.server.user)
    if config.server.user:
        with fatal_for(config, "user"):
            drop_privileges(config.server.user)
    gate.catch_signals()
    announce(config, gate)
    ready(gate)
    report_ready()
    gate.run()
    gate.pid_file.remove()
    log.info("stopped")
    close_logs()
    if gate.connections:
        os._exit(0)  # threads that did not end in time must not keep the process
    return 0


@contextlib.contextmanager
def fatal_for(config, key):
    """Raise an OSError of the body as ConfigError, with the line of this key of [server]."""
    try:
        yield
    except OSError as error:
        raise ConfigError(["%s: %s" % (config.place("server", key)[1],
                                       error.strerror or error)])


def announce(config, gate):
    """Log what runs here, and where."""
    log.info("wsgate %s, Python %s, %s", VERSION, sys.version.split()[0],
             config.path or "no configuration file")
    for warning in config.warnings:
        log.warning("%s", warning)
    for listener in gate.listeners:
        log.info("%s %s%s", "status page on" if listener.listen.status else "listening on",
                 listener.url(), listener.others())
    for location in config.locations:
        for kind, target in (("", location.proxy_pass),
                             (" WebSocket", location.proxy_pass_websocket)):
            if target:
                log.info("[location %s]%s -> %s://%s%s", location.name, kind,
                         "https" if target.tls else "http", target.authority, target.uri or "")
        if location.return_:
            log.info("[location %s] -> return %d", location.name, location.return_.status)
    log.info("up to %d connections (%s)", gate.connections.capacity, gate.connections.limited_by)


def drop_privileges(user):
    """Become this user, with its groups, irrevocably; raise OSError if that is not allowed."""
    entry = pwd.getpwnam(user)
    if os.getuid() == entry.pw_uid:
        return
    try:
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except PermissionError:
        raise OSError(errno.EPERM, "changing to %s requires root (expected a start by root, or no"
                                   " user)" % user)


def give_to(user, path, descriptor):
    """Make `user` the owner of a file that root has opened, so that it can be opened again later.

    nginx does the same for its logs. A device or a link is left alone: the user could have
    put it there, to get at the file that it leads to.
    """
    if user and not os.getuid():
        opened, named = os.fstat(descriptor), os.lstat(path)
        if (stat.S_ISREG(opened.st_mode) and opened.st_nlink == 1
                and (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)):
            os.fchown(descriptor, pwd.getpwnam(user).pw_uid, -1)


class PidFile:
    """The file with the process ID, for -s and service managers. Used by the main thread alone."""

    def __init__(self):
        self.path = None  # where it has been written

    def write(self, path, user):
        """Write the file at `path` (None: nowhere), remove it from where it was; raise OSError.

        The file of another running gate is an error, unless that one is being upgraded to this.
        """
        path = path and os.path.abspath(path)
        if path == self.path:
            return
        if path:
            other = (running_gate(path) if os.name == "posix" and os.access(path, os.R_OK)
                     else None)
            predecessor = os.getppid() if "WSGATE_READY" in os.environ else None
            if other not in (None, os.getpid(), predecessor):
                raise OSError(errno.EEXIST, "%s belongs to the running wsgate process %d (expected"
                              " a file of its own for each process)" % (path, other))
            try:
                with open(path, "w") as file:
                    file.write("%d\n" % os.getpid())
                    give_to(user, path, file.fileno())
            except OSError as error:
                raise OSError(error.errno, "cannot write %s (%s)" % (path, error.strerror))
        self.remove()
        self.path = path

    def remove(self):
        """Remove the file, unless another process has written its own."""
        with contextlib.suppress(OSError):  # no permission
            if self.path and running_gate(self.path) == os.getpid():
                os.unlink(self.path)


def running_gate(path):
    """Return the ID of the process that a pid file names, None unless it runs wsgate.

    It may be this one. Without /proc any process counts. Raise OSError if the file cannot be read.
    """
    try:
        with open(path) as file:
            number = int(file.read(32))
        require(number > 0, "kill(2) would signal a group of processes")
        if os.name == "posix":  # elsewhere signal 0 is not harmless
            with contextlib.suppress(PermissionError):  # of another user
                os.kill(number, 0)
    except (FileNotFoundError, ProcessLookupError, ValueError, OverflowError):
        return None
    with contextlib.suppress(OSError), open("/proc/%d/cmdline" % number, "rb") as file:
        if number != os.getpid() and not GATE_COMMAND.match(file.read()):
            return None
    return number


# How /proc/PID/cmdline begins: wsgate ..., or python3 -u wsgate.py ..., with options of Python
# (but for -c), and not python3 backup.py wsgate.
GATE_COMMAND = re.compile(
    br"(?:[^\0]*/)?(?:wsgate[^\0/]*|(?:python|pypy)[^\0/]*\0(?:-[XW]\0[^\0]*\0|-[^c\0][^\0]*\0)*"
    br"(?:[^\0]*/)?(?:wsgate|wsgate\.py|%s))\0" % re.escape(os.path.basename(__file__)).encode())


def stay_on_one_processor(wanted):
    """Keep this thread, and those that it starts, on one processor, if the system can do that.

    Only one thread at a time runs Python. Where two processors pass its lock to and fro, 100
    busy tunnels cost three times as much and get a third of the throughput.
    wanted: worker_cpu_affinity. auto spreads gates by their process IDs.
    """
    if wanted is None or not hasattr(os, "sched_setaffinity"):
        return
    if wanted == "auto":
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            return  # free-threaded Python has no such lock
        wanted = sorted(ALLOWED_PROCESSORS)[os.getpid() % len(ALLOWED_PROCESSORS)]
    try:
        os.sched_setaffinity(0, {wanted})
    except OSError as error:
        log.warning("worker_cpu_affinity: cannot pin to CPU %d (%s)", wanted, error.strerror)


def use_all_processors():
    """Undo stay_on_one_processor for this thread and what it starts."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, ALLOWED_PROCESSORS)


ALLOWED_PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()


def notify(state):
    """Send a state to systemd (sd_notify(3)) if NOTIFY_SOCKET is set; log a failure."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(0.1)
                sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)
        except OSError as error:  # or no descriptor is left for it
            log.warning("sd_notify(%r) failed: %s", state, error)


# --------------------------------------------------------------------- The gate
#
# How the shutdown wake-up works. Threads wait in poll(), for a client's next request or for
# the bytes of a tunnel, and a signal ends none of these waits. So they poll a descriptor too,
# Gate.wakeup. Gate.end sets state and deadline, puts a new Wakeup in place, then makes the
# old one readable, for all threads at once and forever. A thread takes gate.wakeup before it
# looks at the state, so a change in between makes its poll() return at once. A busy tunnel does
# not poll the wakeup: it compares it with the one it has seen, twice a second. A drain may be
# followed by a stop, hence two spare Wakeups, made at the start: at the end there may be no
# descriptor left.


class Gate:
    """The running program: listeners, connections, and what signals demand.

    Connection threads read config, state, deadline and wakeup without a lock: the main thread
    replaces them whole, and each reader copes with the old value or the new one.
    """

    def __init__(self, config, load, open_logs=lambda server: {}):
        """config: the first Config. load(): the next one, raises ConfigError; called by reload.

        open_logs(server): opens the logs again, returns {key: error}.
        """
        self.config = config
        self.load = load
        self.open_logs = open_logs
        self.connections = Connections(config.server.max_connections)
        self.counters = Counters()
        self.workers = Workers()
        self.listeners = []
        self.state = "running"                     # then "draining", "stopping"
        self.deadline = math.inf                   # time.monotonic() at which run() returns
        self.wakeup = Wakeup()                     # set when state changes
        self.spare_wakeups = [Wakeup(), Wakeup()]  # one to drain, one to stop
        self.pid_file = PidFile()
        self.successor = None                      # the Successor that USR2 started
        # time.monotonic() of the next look at certificates, and of the next sample of counters
        self.next_check = self.next_sample = 0.0
        self.turns = Turns()                       # of the thread that accepts
        self.signals = collections.deque()         # numbers; appended to by the signal handler
        self.signal_wakeup = Wakeup()              # written to for each signal
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.signal_wakeup, selectors.EVENT_READ, self.handle_signals)

    def close_listener(self, listener):
        """Accept no more connections of this Listener and close it."""
        self.listeners.remove(listener)
        if not listener.paused_until:
            self.selector.unregister(listener)
        listener.server_close()

    def run(self):
        """Accept connections and handle signals until the gate has been stopped."""
        notify("READY=1")
        wait = 1.0
        while self.state == "running" or (self.connections and time.monotonic() <= self.deadline):
            for key, _ in self.selector.select(wait):
                key.data()
            wait = self.tick(time.monotonic())
        for listener in list(self.listeners):
            self.close_listener(listener)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)  # a second Ctrl-C finds it closed otherwise
        self.selector.close()
        self.signal_wakeup.close()
        if not self.connections:  # else late threads may still poll them
            for wakeup in [self.wakeup] + self.spare_wakeups:
                wakeup.close()

    def tick(self, now):
        """Do what is due; called after each select(), so it costs nothing when nothing is.

        Return the seconds that the next select() may wait.
        """
        for listener in self.listeners:
            listener.resume(now)
        # Each thread that waits for Python's lock wakes once an interval to ask for it: at the
        # usual 5 ms thousands of them (a broadcast, a mass of timeouts) would do nothing else.
        sys.setswitchinterval(0.005 + 0.00005 * len(self.connections))
        Turns.crowd.look(now, len(self.connections))
        if self.successor and now >= self.successor.deadline:
            self.end_upgrade()
        if now >= self.next_check:
            self.next_check = now + 60
            if self.config.certificates:
                self.config.certificates.refresh()
        if now >= self.next_sample:
            self.next_sample = now + 5
            tunnels = self.connections.tunnels()
            self.counters.sample(now, tunnels)
            notify("WATCHDOG=1\nSTATUS=%d tunnels open" % len(tunnels))
            report_dropped_lines()
        return min([1.0 if self.state == "running" else 0.05]
                   + [ACCEPT_PAUSE for listener in self.listeners if listener.paused_until])

    # Signals: the handler only notes the number, and Python writes to its wake-up descriptor,
    # which makes select() return, so that all work is done in run(). No signal is lost when the
    # buffer of that descriptor is full.

    def catch_signals(self):
        """Route the process's signals to this gate (main thread only)."""
        quiet = {"warn_on_full_buffer": False} if sys.version_info >= (3, 7) else {}
        signal.set_wakeup_fd(self.signal_wakeup.writer.fileno(), **quiet)
        for name in SIGNALS:
            if hasattr(signal, name):  # Windows has few of them
                signal.signal(getattr(signal, name),
                              lambda number, frame: self.signals.append(number))

    def handle_signals(self):
        """Do what the signals that have come demand, in their order, each kind once.

        300 HUPs in a row are a few reloads, and clients are accepted between them.
        """
        self.signal_wakeup.reader.recv(4096)
        pending = [self.signals.popleft() for _ in range(len(self.signals))]
        for number in collections.OrderedDict.fromkeys(pending):
            name = signal.Signals(number).name
            log.info("%s: %s", name, SIGNALS[name])
            getattr(self, SIGNALS[name])()

    def stop(self):
        """TERM, INT: end everything within a second; tunnels get a Close 1001 where possible."""
        if self.state == "stopping":
            self.deadline = 0.0
        self.end("stopping", 1.0)

    def quit(self):
        """QUIT: drain; a second signal stops.

        Nothing new is accepted, plain requests are finished, and the tunnels are closed
        one after the other over drain_timeout, the quiet ones first, so that the clients
        do not all come back in the same second (HAProxy: close-spread-time).
        """
        if self.state != "running":
            return self.stop()
        window = self.config.server.drain_timeout
        now = time.monotonic()
        tunnels = sorted(self.connections.tunnels(), key=lambda each: each.last_byte)
        for place, tunnel in enumerate(tunnels):
            tunnel.end_at = now + window * (place + 0.5) / len(tunnels)
        return self.end("draining", window + 0.5)

    def end(self, state, seconds):
        """Accept nothing more and wake all threads; run() returns within `seconds`.

        The status page reports the draining, unless a successor has its socket.
        """
        if self.successor:  # what was about to take over is ended, too
            self.end_upgrade()
        notify("STOPPING=1")
        self.state = state
        for listener in list(self.listeners):
            if not listener.listen.status or listener.handed_over or state == "stopping":
                self.close_listener(listener)
        self.deadline = min(self.deadline, time.monotonic() + seconds)
        wakeup = self.wakeup
        if self.spare_wakeups:
            self.wakeup = self.spare_wakeups.pop()
        wakeup.set()

    def reload(self):
        """HUP: use a new configuration for new requests; tunnels and server health stay.

        What is wrong with the file, or a listener that cannot be opened, changes nothing. A
        log or a pid file that cannot be written stays where it is, and the rest is done.
        """
        if self.state != "running":
            return
        notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        try:
            self.apply_config(self.load())
        except ConfigError as error:
            for line in error.errors:
                log.error("reload: %s", line)
            log.error("reload failed, keeping the current configuration")
        else:
            self.reopen()
            try:
                self.pid_file.write(self.config.server.pid, self.config.server.user)
            except OSError as error:
                log.error("reload: pid: %s; keeping the current file", error.strerror)
            log.info("reloaded %s", self.config.path)
        notify("READY=1")

    def apply_config(self, config, inherited=None):
        """Open the listeners that are new, then switch, then close those that went.

        inherited: see inherited_sockets. Raise ConfigError if a listener cannot be opened.
        """
        current = {(listener.listen.status, listener.listen.address): listener
                   for listener in self.listeners}
        wanted = wanted_listeners(config.server)
        opened = []
        with contextlib.ExitStack() as if_one_fails:
            for listen in [wanted[key] for key in wanted if key not in current]:
                with fatal_for(config, "status_listen" if listen.status else "listen"):
                    listener = Listener(self, listen, take_inherited(inherited or {},
                                                                     listen.address))
                opened.append(if_one_fails.enter_context(listener))  # closes it
            if_one_fails.pop_all()
        before = {upstream.name: upstream for upstream in self.config.upstreams}
        for upstream in config.upstreams:
            upstream.inherit_health(before.get(upstream.name, upstream))
        self.config = config
        self.connections.set_capacity(config.server.max_connections)
        for key, listener in current.items():
            if key in wanted:
                listener.change(wanted[key])
            else:
                self.close_listener(listener)
        for listener in opened:
            self.selector.register(listener, selectors.EVENT_READ, listener.accept_ready)
        order = list(wanted)  # that of the file: a redirect leads to the first with ssl
        self.listeners = sorted(self.listeners + opened, key=lambda listener: order.index(
            (listener.listen.status, listener.listen.address)))

    def reopen(self):
        """USR1: open the log files again, after a rotation."""
        for key, error in self.open_logs(self.config.server).items():
            log.error("%s: %s; keeping the current log", key, error)

    def upgrade(self):
        """USR2: start the wsgate.py on disk on the same sockets, then drain this process."""
        if self.successor or self.state != "running" or not hasattr(os, "fork"):
            return
        use_all_processors()  # the new process chooses for itself
        try:
            self.successor = Successor(self.listeners)
        except OSError as error:
            log.error("upgrade: cannot start the new process: %s", error)
        else:
            self.selector.register(self.successor, selectors.EVENT_READ, self.end_upgrade)
        stay_on_one_processor(self.config.server.worker_cpu_affinity)

    def end_upgrade(self):
        """The successor is ready, has ended, or its time is over: drain, or continue without it."""
        successor, self.successor = self.successor, None
        self.selector.unregister(successor)
        failure = successor.result()
        if failure:
            log.error("upgrade failed, this process continues: %s", failure)
            return
        log.info("upgrade: process %d has taken over", successor.process.pid)
        notify("MAINPID=%d" % successor.process.pid)
        for listener in self.listeners:
            listener.handed_over = True
        self.quit()


SIGNALS = {"SIGINT": "stop", "SIGTERM": "stop", "SIGBREAK": "stop", "SIGQUIT": "quit",
           "SIGHUP": "reload", "SIGUSR1": "reopen", "SIGUSR2": "upgrade"}


class Wakeup:
    """A descriptor to poll that becomes readable when it is set, for all who poll it."""

    def __init__(self):
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)

    def fileno(self):
        return self.reader.fileno()

    def set(self):
        """Make it readable from now on."""
        with contextlib.suppress(BlockingIOError):  # it is
            self.writer.send(b"!")

    def close(self):
        self.reader.close()
        self.writer.close()


# ------------------------------------------------------------- Upgrade in place
#
# USR2 starts the wsgate.py that is on disk now as a child that inherits the listening
# sockets, named in WSGATE_SOCKETS, and the write end of a pipe, named in WSGATE_READY.
# It writes "ready" there once it accepts; until then the predecessor serves, and if the
# child ends or takes too long, the predecessor continues as if nothing had happened.


class Successor:
    """The process that USR2 has started, and the pipe on which it reports that it is ready."""

    TIMEOUT = 30  # seconds until it must be ready
    GRACE = 1     # seconds until it must have ended once it has closed its pipe

    def __init__(self, listeners):
        """Start it with the sockets of these Listeners; raise OSError."""
        self.deadline = time.monotonic() + self.TIMEOUT
        sockets = {show_address(each.listen.address): each.fileno() for each in listeners}
        self.ready, write_end = os.pipe()
        os.set_blocking(self.ready, False)
        try:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__)] + sys.argv[1:],
                pass_fds=[write_end] + list(sockets.values()),
                env=dict(os.environ, WSGATE_READY=str(write_end),
                         WSGATE_SOCKETS=" ".join("%s=%d" % pair for pair in sockets.items())))
        except OSError:
            os.close(self.ready)
            raise
        finally:
            os.close(write_end)

    def fileno(self):
        return self.ready

    def result(self):
        """Return None if it has taken over, else what went wrong; then it is ended."""
        word = None
        with contextlib.suppress(BlockingIOError):  # not a word: its time is over
            word = os.read(self.ready, 16)
        os.close(self.ready)
        if word == b"ready":
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(0 if word is None else self.GRACE)
            return "the new process ended with status %d" % status
        self.process.kill()
        self.process.wait()
        return "the new process %s; it was killed" % (
            "closed its pipe before it was ready" if word is not None else
            "was not ready after %.1f s" % (time.monotonic() - self.deadline + self.TIMEOUT))


def report_ready():
    """In the successor: let the predecessor drain."""
    pipe = os.environ.pop("WSGATE_READY", None)
    if pipe:
        os.write(int(pipe), b"ready")
        os.close(int(pipe))


def inherited_sockets():
    """Return the listening sockets of a predecessor (USR2) or of systemd (sd_listen_fds(3)).

    {Address: socket}; the variables that name them are removed from the environment.
    """
    descriptors = [int(pair.rpartition("=")[2])
                   for pair in os.environ.pop("WSGATE_SOCKETS", "").split()]
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        descriptors += range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))
    found = {}
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        if sys.version_info < (3, 7) and hasattr(socket, "SO_DOMAIN"):  # it takes all for IPv4
            family = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
            sock = socket.socket(family, socket.SOCK_STREAM, 0, sock.detach())
        name = sock.getsockname()
        found[Address(None, None, name) if isinstance(name, str)
              else Address(name[0], name[1], None)] = sock
    return found


def take_inherited(inherited, address):
    """Remove and return the inherited socket for this Address, None if there is none.

    The same address, else the only socket on that port.
    """
    alike = [key for key in inherited if not address.path and key.port == address.port]
    key = alike[0] if len(alike) == 1 and address not in inherited else address
    return inherited.pop(key, None)


# ----------------------------------------------------------- Limits and counters


class Connections:
    """All client connections that have a thread, and the limits that they count against.

    max_connections limits the places. When all are taken, a new connection gets the place of the
    one that has been idle longest (nginx: reusable connections), but only once its request is
    there: connections that send nothing cannot shut out others. Without an idle one: 503.
    """

    def __init__(self, max_connections):
        self.lock = threading.Lock()
        # Guarded by lock; len() and list() of a set are one step each, they need none.
        self.all = set()                            # of ClientConnection
        self.admitted = set()                       # those that have a place
        self.idle = collections.OrderedDict()       # ... and wait for a request
        self.expendable = collections.OrderedDict()  # those that have none, or none any more
        self.in_use = {}                            # by ("ip", address) and ("location", name)
        self.set_capacity(max_connections)

    def __len__(self):
        return len(self.all)

    def __iter__(self):
        return iter(list(self.all))

    def set_capacity(self, max_connections):
        """Set the highest number of connections, and keep in limited_by what limits it."""
        self.capacity, self.limited_by = capacity(max_connections)

    def enter(self, connection):
        """Add a connection. Return False if no place is free."""
        with self.lock:
            self.all.add(connection)
            if len(self.admitted) >= self.capacity:
                self.expendable[connection] = None
                return False
            self.admitted.add(connection)
        return True

    def admit(self, connection):
        """Find a place for a connection whose request is there. Return False if there is none."""
        with self.lock:
            if len(self.admitted) >= self.capacity and not self.cut_first(self.idle):
                return False
            self.expendable.pop(connection, None)
            self.admitted.add(connection)
        return True

    def leave(self, connection):
        """Remove a connection."""
        with self.lock:
            self.all.discard(connection)
            self.admitted.discard(connection)
            self.expendable.pop(connection, None)

    def wait(self, connection):
        """Let others have the place of a connection until resume()."""
        with self.lock:
            if connection in self.admitted:
                self.idle[connection] = None

    def resume(self, connection):
        """Undo wait()."""
        with self.lock:
            self.idle.pop(connection, None)

    def give_up_place(self, connection):
        """Let a connection keep its thread only until another one needs it."""
        with self.lock:
            self.admitted.discard(connection)
            self.expendable[connection] = None

    def make_room(self):
        """Close a connection without a place. Return False if there is none."""
        with self.lock:
            return self.cut_first(self.expendable)

    def cut_first(self, connections):
        """Have the first of idle or expendable closed (lock held). Return False if none is left."""
        if not connections:
            return False
        connection, _ = connections.popitem(last=False)
        self.admitted.discard(connection)
        connection.cut()
        return True

    def tunnels(self):
        """Return the open tunnels, a list of Tunnel."""
        return [tunnel for tunnel in [each.tunnel for each in self] if tunnel]

    def acquire(self, key, limit):
        """Count one more for a key of in_use. Return False if that reaches the limit (0: none)."""
        with self.lock:
            count = self.in_use.get(key, 0)
            if 0 < limit <= count:
                return False
            self.in_use[key] = count + 1
        return True

    def release(self, key):
        """Undo acquire()."""
        with self.lock:
            count = self.in_use.pop(key) - 1
            if count:
                self.in_use[key] = count


def capacity(configured):
    """Return (number of connections, what limits it). configured: max_connections, None: auto.

    auto: what descriptors and threads allow. A connection takes two descriptors and a thread; a
    share is kept back for those that get a 503, for logs and for the pipes of bulk transfers.
    """
    if configured is not None:
        return configured, "configured"
    limits = [(10000, "default")]
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS reports "unlimited" but accepts less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        if soft != resource.RLIM_INFINITY:
            limits = [(max(8, (soft - 48 - min(64, soft // 8)) // 2), "%d descriptors" % soft)]
        processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if processes != resource.RLIM_INFINITY and os.getuid():
            limits.append((max(8, processes - 64),
                           "%d processes and threads of this user" % processes))
    for path in thread_limit_files():
        with contextlib.suppress(OSError, ValueError), open(path) as file:  # not there, or "max"
            limits.append((max(8, int(file.read()) * 9 // 10 - 16), path))
    return min(limits)


def thread_limit_files():
    """Return the files of Linux that limit the number of threads (the last: systemd's TasksMax)."""
    paths = ["/proc/sys/kernel/threads-max"]
    with contextlib.suppress(OSError, ValueError), open("/proc/self/cgroup") as file:
        for line in file:
            controllers, path = line.rstrip("\n").split(":", 2)[1:]
            if not controllers:
                paths.append("/sys/fs/cgroup%s/pids.max" % path)
            elif "pids" in controllers.split(","):
                paths.append("/sys/fs/cgroup/pids%s/pids.max" % path)
    return paths


def retry_after():
    """Return a Retry-After field of 1 to 5 s, by chance: clients shall not return together."""
    return ((b"Retry-After", b"%d" % random.randint(1, 5)),)


HANDSHAKE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Counters:
    """What has ended since the start, for the status page."""

    def __init__(self):
        self.started = time.time()
        self.lock = threading.Lock()
        # Guarded by lock:
        self.statuses = collections.Counter()  # of requests, by status
        self.totals = collections.Counter()    # tunnels, bytes; end_*, refused_*
        self.handshakes = [0] * (len(HANDSHAKE_BUCKETS) + 1)  # how many took how long
        # Changed by the main thread alone: ten minutes of (time.monotonic(), *traffic())
        self.samples = collections.deque(maxlen=121)

    def count_tunnel(self, seconds):
        """Count a tunnel that has begun, after a handshake of `seconds`."""
        with self.lock:
            self.totals["tunnels"] += 1
            self.totals["handshake_sum"] += seconds
            self.handshakes[bisect.bisect_left(HANDSHAKE_BUCKETS, seconds)] += 1

    def count_exchange(self, entry):
        """Count an exchange, or the tunnel it has become, that has ended."""
        with self.lock:
            self.statuses[entry.status] += 1
            if entry.up[1]:
                self.totals["up"] += entry.up[1]
            self.totals["down"] += entry.down[1]
            if entry.handshake is not None:
                self.totals["end_" + (entry.reason or "closed")] += 1
            elif entry.reason:
                self.totals["refused_" + entry.reason] += 1

    def traffic(self, tunnels):
        """Return (number of tunnels, bytes up, bytes down), those of these tunnels included."""
        with self.lock:
            up, down = self.totals["up"], self.totals["down"]
        up += sum(each.up.bytes for each in tunnels)
        return len(tunnels), up, down + sum(each.down.bytes for each in tunnels)

    def sample(self, now, tunnels):
        """Add a sample to the history."""
        self.samples.append((now,) + self.traffic(tunnels))


# -------------------------------------------------------------------- Listening


class Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A listening socket; every connection it accepts gets a thread of its own.

    What is not socketserver's default is so because the default is a trap: a backlog of 5,
    an accept that spins when descriptors run out, a list of threads that grows.
    """

    request_queue_size = 4096                  # the kernel clamps it (net.core.somaxconn)
    allow_reuse_address = os.name == "posix"   # on Windows it would let two programs share a port
    daemon_threads = True
    block_on_close = False

    def __init__(self, gate, listen, inherited=None):
        """Bind and listen, on the inherited socket if given; raise OSError. listen: a Listen."""
        self.gate = gate
        self.listen = listen
        self.paused_until = 0.0   # time.monotonic(); 0: accepting
        self.complained = -math.inf
        self.handed_over = False  # a successor uses the same Unix socket: leave its file
        self.recent = collections.deque()  # sockets of the status page's connections
        address = listen.address
        self.address_family = (socket.AF_UNIX if address.path else
                               socket.AF_INET6 if ":" in address.host else socket.AF_INET)
        super().__init__(address.path or address[:2],
                         StatusConnection if listen.status else ClientConnection,
                         bind_and_activate=False)
        try:
            if inherited:
                self.socket.close()
                self.socket = inherited
                self.server_address = inherited.getsockname()
                if not address.path:
                    set_tcp_options(inherited)  # systemd does not by default
            else:
                self.server_bind()
            self.server_activate()
        except OSError as error:
            self.socket.close()
            why = BIND_ERRORS.get(error.errno) or error.strerror or error
            raise OSError(error.errno, "%s: %s" % (show_address(address), why))
        self.socket.setblocking(False)

    def server_bind(self):
        """Bind with the options for this kind of address; raise OSError."""
        if self.listen.address.path:
            remove_stale_socket(self.listen.address.path)
            self.socket.bind(self.server_address)
            os.chmod(self.server_address, self.listen.mode)
            return
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.listen.reuseport:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        set_tcp_options(self.socket)  # accepted sockets inherit them
        super().server_bind()

    def change(self, listen):
        """Take the options of a new configuration for the same address."""
        if listen.address.path and listen.mode != self.listen.mode:
            try:
                os.chmod(self.server_address, listen.mode)
            except OSError as error:  # it belongs to root, who started this process
                log.error("listen: cannot change the mode of %s (%s)", self.server_address,
                          error.strerror)
        self.listen = listen

    def server_close(self):
        """Close, and remove the file of a Unix socket unless a successor listens on it."""
        super().server_close()
        if self.listen.address.path and not self.handed_over:
            with contextlib.suppress(OSError):  # another process has removed it
                os.unlink(self.listen.address.path)

    def url(self):
        """Return an address that people can use: a URL, or unix:/path."""
        if self.listen.address.path:
            return show_address(self.listen.address)
        address = Address(loopback_for(self.server_address[0]), self.server_address[1], None)
        return "%s://%s/" % ("https" if self.listen.ssl else "http", show_address(address))

    def others(self):
        """Return what else it listens on, as text."""
        host = self.server_address[0]
        both = (host == "::"  # a dual-stack socket of systemd
                and not self.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
        return {"0.0.0.0": " and every other IPv4 address",
                "::": " and every other %saddress" % ("" if both else "IPv6 ")}.get(host, "")

    def port(self):
        """Return the port it is bound to; 443, that of https, for a Unix socket."""
        return 443 if self.listen.address.path else self.server_address[1]

    def get_request(self):
        """Return (socket, address) as socket.accept() does, which spends time on enums."""
        descriptor, address = self.socket._accept()
        return socket.socket(self.address_family, socket.SOCK_STREAM, 0, descriptor), address

    def accept_ready(self):
        """Accept what is waiting, a handful at a time so that signals are not kept waiting."""
        for _ in range(32):
            try:
                request, address = self.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self.pause(error)
                    return
                continue  # that client disconnected already (ECONNABORTED and the like)
            self.process_request(request, address)
        self.gate.turns.took(time.monotonic(), Turns.LARGE)

    def pause(self, error):
        """Out of descriptors or memory: leave clients in the backlog for a moment."""
        now = time.monotonic()
        if now - self.complained >= COMPLAIN_INTERVAL:
            self.complained = now
            log.error("accept() failed: %s; will retry (raise LimitNOFILE or lower"
                      " max_connections)", error)
        self.paused_until = now + ACCEPT_PAUSE
        self.gate.selector.unregister(self)

    def resume(self, now):
        """Accept again when the pause is over."""
        if self.paused_until and now >= self.paused_until:
            self.paused_until = 0.0
            self.gate.selector.register(self, selectors.EVENT_READ, self.accept_ready)

    def process_request(self, request, client_address):
        """Give the connection a thread; if there can be no more, send 503 and close."""
        workers, limit = self.gate.workers, self.gate.connections.capacity + REFUSAL_HEADROOM
        try:
            if self.listen.status:
                self.limit_status_connections(request)
            elif workers.busy >= limit and not self.gate.connections.make_room():
                raise RuntimeError("over the hard connection limit")
            workers.run(self, request, client_address)
        except RuntimeError:
            request.setblocking(False)
            with contextlib.suppress(OSError):  # it would not have read it
                request.send(make_response(503, "conn_limit", fields=retry_after()))
            self.close_request(request)

    def limit_status_connections(self, request):
        """Remember this connection to the status page, and cut the oldest if there are too many.

        So those that send nothing shut out neither a monitoring system nor clients.
        """
        self.recent.append(request)
        if len(self.recent) > STATUS_CONNECTIONS:
            with contextlib.suppress(OSError):  # it has ended
                self.recent.popleft().shutdown(socket.SHUT_RDWR)

    def process_request_thread(self, request, client_address):
        """Serve a connection, in its thread, as socketserver does, but with fewer calls.

        The __init__() of the handler, which calls the others there, would take one more level of
        the C stack, and so a page of memory for each tunnel. The handlers close the connection.
        """
        handler = self.RequestHandlerClass.__new__(self.RequestHandlerClass)
        handler.request, handler.client_address, handler.server = request, client_address, self
        try:
            handler.setup()
            handler.handle()
        except Exception:
            self.handle_error(request, client_address)
            self.close_request(request)

    def handle_error(self, request, client_address):
        log.exception("internal error on a connection from %s", client_address)


BIND_ERRORS = {  # what to do about a listening socket that cannot be opened
    errno.EADDRINUSE: "already in use by another program (ss -ltnp shows which)",
    errno.EACCES: "permission denied; ports below 1024 require root (then set user =) or"
                  " CAP_NET_BIND_SERVICE, Unix sockets a directory that this user can write",
    errno.EADDRNOTAVAIL: "not an address of this machine",
    errno.ENOENT: "the directory of the socket does not exist",
}

EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
ACCEPT_PAUSE = 0.2          # seconds without accept() after one of these
COMPLAIN_INTERVAL = 60      # seconds between two lines of the log about it
REFUSAL_HEADROOM = 32       # connections accepted above max_connections, only to get a 503
STATUS_CONNECTIONS = 16     # open at the same time, on one listener


def wanted_listeners(server):
    """Return {(for the status page?, Address): Listen} of a configuration."""
    wanted = {(False, listen.address): listen for listen in server.listen}
    if server.status_listen:
        wanted[True, server.status_listen] = PLAIN_LISTEN._replace(
            address=server.status_listen, status=True)
    return wanted


def loopback_for(host):
    """Return an address to reach a listener of this machine: loopback if it has all addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def remove_stale_socket(path):
    """Remove the socket file of a gate that died; leave one that accepts connections."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except OSError:  # nothing is there
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:  # bind() will report what is wrong
            pass


def set_tcp_options(sock):
    """No delay for small frames; keep-alive finds peers whose cable was pulled."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class Workers:
    """Threads for connections; an idle one waits a moment for another: starting one costs more."""

    KEEP = 1.0  # seconds

    def __init__(self):
        self.idle = []  # [lock, job] of waiting threads; list.append and list.pop need no lock
        self.lock = threading.Lock()
        self.busy = 0   # threads that have a connection, or are about to; guarded by lock

    def run(self, *job):
        """Let a thread serve a connection, job = (Listener, socket, address).

        Raises RuntimeError if no thread can be started.
        """
        try:
            worker = self.idle.pop()
        except IndexError:
            _thread.start_new_thread(self.work, job)
        else:
            worker[1] = job
            worker[0].release()
        with self.lock:
            self.busy += 1

    def work(self, listener, request, address):
        """Serve this connection and those that follow, until none comes within KEEP."""
        worker = [_thread.allocate_lock(), None]
        worker[0].acquire()
        while True:
            listener.process_request_thread(request, address)
            with self.lock:
                self.busy -= 1
            worker[1] = listener = request = address = None
            self.idle.append(worker)
            if not worker[0].acquire(timeout=self.KEEP):
                try:
                    self.idle.remove(worker)
                    return
                except ValueError:  # it was given a job in this very moment
                    worker[0].acquire()
            listener, request, address = worker[1]


# --------------------------------------------------------------- One connection
#
# What keeps or ends a connection. Another request may follow a response only if the bytes that
# come next are certain to be one: client and configuration keep the connection (HTTP/1.1, no
# "Connection: close", keepalive_timeout), the body of this request was read to its end, the
# response shows where it ends, and no upgrade was requested, because a client that expects
# one sends its frames next (RFC 9931). Otherwise the connection ends by one of
#
#     PLAIN_CLOSE       no response was sent, or the client does not read it, or a tunnel has ended
#     LINGERING_CLOSE   FIN, then read on: bytes that are unread at close() make the kernel send
#                       a reset, which takes the response from the client (RFC 9112 9.6)
#     RESET_CLOSE       the response is cut, and an orderly end would pass for its end

KEEP_ALIVE, PLAIN_CLOSE = "keep-alive", "close"
LINGERING_CLOSE, RESET_CLOSE = "lingering close", "reset"

# What is known of a client. Made once for a connection; a request that names another client,
# through a trusted proxy, has its own copy.
ClientInfo = collections.namedtuple("ClientInfo", (
    "peer",            # address of the peer, or of the source in its PROXY header; or "unix:"
    "address",         # of the real client: that of the peer, unless a trusted proxy names it
    "port",            # of the peer; 0 for a Unix socket
    "scheme",          # b"http" or b"https"
    "subject",         # of the verified client certificate, bytes; empty if there is none
    "trusted",         # the peer's forwarding fields (X-Forwarded-For ...) are believed
    "server_address",  # which the client connected to; "unix:" for a Unix socket
    "server_port",     # 0 for a Unix socket
))


class ClientConnection(socketserver.BaseRequestHandler):
    """A client connection in its own thread: begin, then an Exchange per request, then close."""

    def setup(self):
        """Set the attributes; socketserver calls this before handle()."""
        self.gate = self.server.gate
        self.listen, self.certificates = self.server.listen, self.gate.config.certificates
        self.stream = Stream(self.request, Turns())
        self.client = None           # ClientInfo, once the connection has begun
        self.tunnel = None           # the Tunnel that the connection has become
        self.kept = None             # the Backend kept for the next request (proxy_keepalive)
        self.last_request = None     # a small Request, for parse_request_head()
        self.last_response = None    # a small Response, for HTTPRelay.final_response()
        self.served = 0              # requests so far
        self.key = None              # of Connections.in_use: the address it is counted for
        self.limited = False         # max_connections_per_ip is reached
        self.closing = False         # no request may follow the next one
        # Of what it waits for: the beginning and the first head, the next request, the last bytes.
        self.deadline = Deadline(self.gate.config.server.client_header_timeout)

    def handle(self):
        """Serve the connection until it is closed."""
        connections, end = self.gate.connections, KEEP_ALIVE
        self.admitted = connections.enter(self)
        self.closing = not self.admitted
        try:
            if not self.begin():
                return
            while end is KEEP_ALIVE:
                end = self.serve()
                self.served += 1
                if end is KEEP_ALIVE:
                    self.stream.turns.took(time.monotonic(), Turns.LARGE)
            if end is LINGERING_CLOSE:
                self.linger()
            elif end is RESET_CLOSE:
                self.stream.reset()
            elif self.stream.tls and self.tunnel is None:
                self.stream.end()  # close_notify (RFC 8446 6.1)
        except (ClientGone, TimedOut, OSError) as error:
            log.debug("%s: connection ended: %s", self.client_address, error)
        finally:
            connections.leave(self)
            self.stream.turns.end()
            if self.key:
                connections.release(self.key)
            self.stream.close()
            self.keep_backend(None)

    def linger(self):
        """Read on after the last response, without holding a place of max_connections."""
        self.deadline = Deadline(LINGERING_TIME)
        self.keep_backend(None)
        self.gate.connections.give_up_place(self)
        self.stream.linger(self.deadline)

    def take_place(self):
        """Return True if the connection has a place, or gets one now that its request is there."""
        if not self.admitted:
            self.admitted = self.gate.connections.admit(self)
            self.closing = not self.admitted
        return self.admitted

    def cut(self):
        """Have the connection closed soon; called by another thread, while it waits."""
        self.closing = True
        self.deadline.at = 0.0
        with contextlib.suppress(OSError):  # the client has gone
            socket.socket.shutdown(self.stream.sock, socket.SHUT_RD)

    def begin(self):
        """Read the PROXY header and do the TLS handshake. Return False if either failed."""
        server, address = self.gate.config.server, self.client_address
        # A client on a Unix socket may have any name: text, bytes or none.
        peer, port = address[:2] if isinstance(address, tuple) else ("unix:", 0)
        peer = ipv4_as_ipv4(peer)
        believed = bool(server.set_real_ip_from) and trusted(server.set_real_ip_from, peer)
        if self.listen.proxy_protocol:
            if not believed:
                log.info("%s: connection closed: PROXY header from a peer that is not in"
                         " set_real_ip_from", peer)
                return False
            try:
                source = read_proxy_header(self.stream, self.deadline)
            except ValueError as error:
                log.info("%s: connection closed: invalid PROXY header: %s", peer, error)
                return False
            believed = False  # the bytes after the PROXY header are the client's own
            if source and server.real_ip_header == "proxy_protocol":
                peer, port = ipv4_as_ipv4(source[0]), source[1]
        if not believed:
            self.count(peer)
        if self.listen.ssl and not self.begin_tls(peer):
            return False
        self.client = client_info(self.stream, peer, port, believed)
        return True

    def count(self, address):
        """Count the connection for max_connections_per_ip.

        Those of a trusted proxy are not counted: they carry requests of many clients, and
        Exchange.admit counts each of these.
        """
        key = "ip", address
        if self.gate.connections.acquire(key, self.gate.config.server.max_connections_per_ip):
            self.key = key
        else:
            self.limited = self.closing = True
            self.gate.connections.give_up_place(self)

    def begin_tls(self, peer):
        """Do the TLS handshake, under the deadline of the head. Return False if it failed.

        A client that sends no TLS gets its response from Exchange.receive.
        """
        if self.certificates is None:  # a reload is taking TLS away from this listener
            return False
        first = self.stream.peek(self.deadline)
        if first != b"\x16":
            return bool(first)
        try:
            self.stream.start_tls(self.certificates.contexts[None], self.deadline, server_side=True)
        except (OSError, ValueError) as error:
            log.info("%s: TLS handshake failed: %s", peer, describe_error(error))
            return False
        return True

    def serve(self):
        """Wait for a request and serve it. Return what becomes of the connection."""
        deadline = self.await_request()
        return PLAIN_CLOSE if deadline is None else Exchange(self).run(deadline)

    def await_request(self):
        """Wait for the first byte of a request. Return the Deadline of its head, or None."""
        if self.stream.has_request():
            if self.served:
                self.deadline = Deadline(self.gate.config.server.client_header_timeout)
            return self.deadline
        self.gate.connections.wait(self)
        try:
            if self.served:
                self.deadline = Deadline(self.gate.config.server.keepalive_timeout)
                if not self.await_next(self.deadline):
                    return None
                self.deadline = Deadline(self.gate.config.server.client_header_timeout)
            if not self.stream.buffer and not self.stream.read_more(self.deadline):
                return None
        finally:
            self.gate.connections.resume(self)
        return self.deadline

    def await_next(self, deadline):
        """Wait between two requests. Return False if there will be no other one."""
        wakeup = self.gate.wakeup  # before the state is looked at: Gate.end changes that first
        while b"\r\n".startswith(self.stream.buffer):  # nothing, or the empty line that is ignored
            if self.gate.state != "running":
                return False
            first = deadline
            if self.kept and self.kept.deadline.at < deadline.at:
                first = self.kept.deadline
            try:
                if not self.stream.wait_for_request(first, wakeup):
                    return False
            except TimedOut:
                if first is deadline:
                    return False
                self.keep_backend(None)
        return True

    def usable_backend(self):
        """Return the kept Backend, or None. Close it if it cannot be used any more."""
        if self.kept and not self.kept.alive():
            self.keep_backend(None)
        return self.kept

    def keep_backend(self, backend):
        """Keep a Backend for the next request, or None; close the one that was kept."""
        if self.kept:
            self.kept.stream.close()
        self.kept = backend


def ipv4_as_ipv4(address):
    """Return the address of a peer as it is written everywhere: not as ::ffff:192.0.2.1."""
    return str(parse_ip(address)) if address.startswith("::ffff:") else address


def client_info(stream, peer, port, believed):
    """Return the ClientInfo of a connection that has begun."""
    name = stream.sock.getsockname()
    server_address, server_port = name[:2] if isinstance(name, tuple) else ("unix:", 0)
    scheme, subject = b"http", b""
    if stream.tls:
        name = distinguished_name(stream.sock.getpeercert() or {}) or ""
        scheme, subject = b"https", name.encode("ascii", "backslashreplace")
    return ClientInfo(peer, peer, port, scheme, subject, believed, server_address, server_port)


ACME_CHALLENGE = "/.well-known/acme-challenge/"  # RFC 8555 8.3


def is_challenge(location):
    """Return True for a location below /.well-known/acme-challenge/, which is never redirected."""
    return location is not None and (location.path + "/").startswith(ACME_CHALLENGE)


# ----------------------------------------------------------------- One exchange


class Exchange:
    """One request and its response, from the first byte of the head to the line in the log.

    Nothing else sends a response to a client. Methods that do return what becomes of the
    connection: KEEP_ALIVE, PLAIN_CLOSE, LINGERING_CLOSE or RESET_CLOSE.
    """

    request = None
    location = None
    upgrade = None           # the Upgrade that the client asks for
    backend = None
    keepable = False         # the backend connection may be kept: see may_keep_backend
    cookies = ()             # Set-Cookie fields of auth_request, for the client
    keys = ()                # of Connections.in_use: what the exchange is counted for
    responded = False        # a byte of the response may have been sent

    def __init__(self, connection):
        self.connection = connection
        self.gate = connection.gate
        self.stream = connection.stream
        self.config = connection.gate.config  # of this request, whatever is reloaded meanwhile
        self.client = connection.client
        self.entry = AccessLogEntry(self.gate.counters, self.client.address)

    def run(self, deadline):
        """Serve the request and write its line in the log, whatever happens."""
        try:
            self.receive(deadline)
            guards = self.choose_location()  # before any refusal: reject_with is a key of it
            self.admit()
            if self.connection.listen.redirect and not is_challenge(self.location):
                return self.redirect_to_https()
            self.enter_location(guards)
            end = self.respond()
            tunnel = self.connection.tunnel
            if tunnel:
                self.request = self.upgrade = None  # a tunnel may live for days: keep no head
                tunnel.run()
            return end
        except HTTPError as error:
            return self.refuse(error)
        except ClientGone as gone:
            self.entry.ended(str(gone), 499)  # as nginx calls it
            return RESET_CLOSE
        except Exception:
            log.exception("internal error, request %s", self.entry.id)
            return self.refuse(HTTPError(500, "internal_error"))
        finally:
            self.finish()

    def receive(self, deadline):
        """Read the request head and parse it."""
        if self.connection.listen.ssl and not self.stream.tls:
            raise HTTPError(400, "http_on_tls_port",
                            "this port requires TLS: use https:// or wss://")
        last, self.connection.last_request = self.connection.last_request, None
        if last and last.config is not self.config:  # nothing is kept over a reload
            last = self.connection.last_response = None
        if last and self.stream.buffer == last.head:  # the usual case of a client that polls
            head, self.stream.buffer = last.head, b""
        else:
            head = self.read_head(deadline)
        self.request = parse_request_head(head, last)
        self.request.id, self.request.config = self.entry.id, self.config
        self.entry.take_request(self.request)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s request from %s:\n%s", self.entry.id, self.client.address,
                      show_head(self.request))

    def read_head(self, deadline):
        """Return the next request head as bytes."""
        try:
            return read_head(self.stream, self.config.server.client_header_size, deadline)
        except TimedOut:
            raise HTTPError(408, "header_timeout",
                            "the request head did not arrive within client_header_timeout")
        except EOFError:
            raise ClientGone("client_gone")

    def admit(self):
        """Check what may refuse any request; find the address of the real client.

        max_connections_per_ip is for the connection, or for a request from a trusted proxy.
        """
        request, gate = self.request, self.gate
        if not self.connection.limited and not self.connection.take_place():
            raise HTTPError(503, "conn_limit", "max_connections is reached", retry_after())
        if gate.state == "stopping" or (gate.state == "draining"
                                        and request.fields.get_all(b"upgrade")):
            raise HTTPError(503, "draining", "wsgate is shutting down", retry_after())
        if self.client.trusted:
            self.entry.client = address = real_client(self.config.server, self.client,
                                                      request.fields)
            self.client = self.client._replace(address=address)
            self.acquire(("ip", address), self.config.server.max_connections_per_ip,
                         429, "conn_limit_per_ip", "max_connections_per_ip is reached")
        elif self.connection.limited:
            raise HTTPError(429, "conn_limit_per_ip", "max_connections_per_ip is reached",
                            retry_after())

    def choose_location(self):
        """Find the location and the upgrade. Return the locations that guard it, it among them."""
        request = self.request
        if request.guards is None:
            request.guards = self.config.locations_of(request)
        guards = request.guards
        if guards:
            self.location = guards[0]
            self.entry.location = self.location.name
            self.upgrade = requested_upgrade(request, self.location)
            if self.location.identity:  # also in add_header of a refusal
                request.known = dict.fromkeys(self.location.identity, ())
        return guards

    def acquire(self, key, limit, status, reason, detail):
        """Count the exchange for a key of in_use; raise HTTPError if its limit is reached."""
        if not self.gate.connections.acquire(key, limit):
            raise HTTPError(status, reason, detail, retry_after())
        self.keys += (key,)

    def enter_location(self, guards):
        """Check everything by which the location and its other guards may refuse the request."""
        request, location, address = self.request, self.location, self.client.address
        if location is None:
            raise HTTPError(404, "no_route", "no [location] for host %s and path %s" % (
                printable(request.host or "-"), printable(request.path[:200])))
        self.acquire(("location", location.name), location.max_connections, 503, "conn_limit",
                     "max_connections of [location %s] is reached" % location.name)
        # A backend that reads the path as another guard does believes the fields that it sets.
        request.withheld = location.withheld
        if len(guards) > 1:
            request.withheld = request.withheld.union(*[guard.withheld for guard in guards])
        for guard in guards:
            if not guard.open:
                check_address(guard, address)
                check_origin(guard, request, self.client)
                check_password(guard, request)
                if guard.auth is not None:
                    self.authorize(guard)
        if self.upgrade and self.upgrade.error:
            raise self.upgrade.error
        if request.length and 0 < location.client_max_body_size < request.length:
            raise HTTPError(413, "body_too_large",
                            "client_max_body_size is %d" % location.client_max_body_size)

    def authorize(self, location):
        """Ask the auth_request service; whatever it does, only 2xx lets the request pass."""
        upstream = location.auth.upstream
        try:
            backend = Attempts(location.auth, location, self.client.address,
                               self.request.fields).connect()
            try:
                head = auth_request_head(self.request, location, self.client)
                relay = HTTPRelay(self.stream, backend.stream)
                relay.begin(head, NO_BODY, location, self.config.server)
                response = relay.final_response(False)
                upstream.succeeded(backend)
            finally:
                backend.close()
        except BackendError as error:
            raise HTTPError(502, "auth_unavailable",
                            "auth_request: %s: %s" % (error.reason, error))
        if response.status in (401, 403) or 200 <= response.status < 300:
            self.cookies = [pair for pair in response.fields if pair[0].lower() == b"set-cookie"]
        if response.status in (401, 403):
            raise self.denial(location, response)
        if not 200 <= response.status < 300:
            raise HTTPError(502, "auth_unavailable",
                            "auth_request: status %d" % response.status)
        if location is self.location:  # those of other guards are withheld: see enter_location
            self.request.identity = identity_fields(location, response)
            self.request.known = {name: response.fields.get_all(name)
                                  for name in location.identity}

    def denial(self, location, response):
        """Return the HTTPError for a 401 or 403 of auth_request."""
        login = location.auth_request_login
        if login and response.status == 401 and not self.upgrade:
            url = redirect_target(login, self.request, self.client)
            return HTTPError(302, "auth_denied", "", [(b"Location", url)])
        return HTTPError(response.status, "auth_denied", "", [
            pair for pair in response.fields
            if pair[0].lower() in (b"www-authenticate", b"location")])

    def respond(self):
        """Respond as `return` says or from a backend."""
        request, location = self.request, self.location
        proxy = location.proxy_for(self.upgrade)
        if proxy is None:
            return self.send_return(location.return_)
        slash = location.slash_added(request)
        if slash:
            self.entry.status = 301
            return self.send_response(301, fields=[(b"Location", slash)])
        relay, response = self.ask_backend(proxy)
        self.entry.status = response.status
        if response.status == 101:
            try:
                check_101(request, response, location, self.upgrade)
                relay.finish_request()
            finally:
                relay.close_pipes()
            return self.open_tunnel(relay, response)
        if self.upgrade:
            self.entry.note_refusal(request, response)
            if location.reject_with == "close" and self.is_handshake():
                raise HTTPError(response.status, "backend_said_%d" % response.status)
        return self.forward(relay, response)

    def redirect_to_https(self):
        """Redirect to the https:// URL of the same host and target, on the first ssl listener.

        Only to a host that a location is for. A client without a Host gets no address of
        wsgate's own, which may be an internal one.
        """
        request = self.request
        if not self.config.hosts_for(request.host):
            detail = "no [location] is for host %s" % printable(request.host)
            raise HTTPError(404, "no_route", detail)
        if not request.host:
            raise HTTPError(400, "bad_request", "missing Host header")
        port = next((listener.port() for listener in list(self.gate.listeners)
                     if listener.listen.ssl), 443)
        target = b"/" if request.target == b"*" else request.target
        url = b"https://%s%s%s" % (request.host.encode(), b"" if port == 443 else b":%d" % port,
                                   percent_encode(target, NOT_PRINTABLE))
        # Only GET and HEAD may be repeated as another method by the client (RFC 9110 15.4.2).
        self.entry.status = 301 if request.method in (b"GET", b"HEAD") else 308
        return self.send_response(self.entry.status, fields=((b"Location", url),))

    def send_return(self, return_):
        """Send the response that `return` describes."""
        self.entry.status = return_.status
        if return_.status in REDIRECTS:
            url = redirect_target(return_.text, self.request, self.client)
            return self.send_response(return_.status, fields=[(b"Location", url)])
        text = return_.text.render(self.request, self.client)
        return self.send_response(return_.status, body=text)

    def ask_backend(self, proxy):
        """Return (HTTPRelay, Response) of the first server that responds.

        After a failed connect every request may go to the next server; once a server may have
        seen it, only a GET or HEAD without a body may, and only if not a byte came back.
        """
        request, location, client = self.request, self.location, self.client
        preface = proxy_line(client) if location.proxy_protocol else b""
        attempts = Attempts(proxy, location, client.address, request.fields)
        self.keepable = keep = self.may_keep_backend()
        while True:
            kept = self.connection.usable_backend() if keep else None
            try:
                self.backend = attempts.connect(preface, kept)
            finally:
                self.entry.server, self.entry.failed = attempts.name, attempts.failures
            reused = self.backend is kept
            if reused:
                self.connection.kept = None
            head = request_head_for_backend(request, location, client, self.backend.server,
                                            self.upgrade, keep)
            relay = self.backend.relay or HTTPRelay(self.stream, self.backend.stream)
            relay.begin(head, request.body(location.client_max_body_size), location,
                        self.config.server)
            try:
                response = relay.final_response(request.minor > 0, self.connection.last_response)
                proxy.upstream.succeeded(self.backend)
                proxy.upstream.remember_session(response, self.backend.server)
                return relay, response
            except BackendError as error:
                if error.retry and reused:  # closed while it was kept: not a failure
                    attempts.forget(self.backend.server)
                else:
                    attempts.failed(error)
                if not error.retry or not request.repeatable:
                    raise
            self.drop_backend()

    def forward(self, relay, response):
        """Pass a response on, whole."""
        request = self.request
        body = response.body(request.method, decode=request.minor == 0)
        keep = (self.persistent() and relay.up.scanner.done
                and not isinstance(body, UntilClose))
        self.responded = True
        head = self.response_head(response, keep)
        try:
            relay.pass_response(head, body)
        except BackendError as error:  # the client must see that the response is cut
            self.entry.ended(error.reason)
            framed = response.length is not None or (response.chunked and request.minor > 0)
            return LINGERING_CLOSE if framed else RESET_CLOSE
        finally:
            self.entry.up, self.entry.down = (0, relay.up.bytes), (0, relay.down.bytes)
        # It keeps what its head for the client was made for: the added fields, which are in that
        # head, and X-Forwarded-Prefix of the request.
        size = max(len(response.head), len(head), len(request.head))
        self.connection.last_response = response if response.fields.small(size) else None
        if (keep and self.keepable and response.persistent
                and not (body is NO_BODY and response.announces_body())
                and relay.reusable()):
            self.backend.keep(self.location.proxy_keepalive, relay)
            self.connection.keep_backend(self.backend)
            self.backend = None
        return KEEP_ALIVE if keep else LINGERING_CLOSE

    def may_keep_backend(self):
        """Return whether the request may use, and leave, a kept connection (proxy_keepalive).

        Only one that may be repeated: a server may close the connection at any time, and then
        it cannot be told whether it has seen the request (RFC 9112 9.3.1).
        """
        return (self.location.proxy_keepalive > 0 and self.request.repeatable
                and self.request.persistent)

    def response_head(self, response, keep):
        """Return the head of a backend's response for the client."""
        return response_head_for_client(response, self.request, self.location, self.upgrade, keep,
                                        self.added_fields())

    def added_fields(self):
        """Return add_header and the cookies of auth_request: (name, value) pairs."""
        settings = self.location or self.config.server  # which has the defaults of locations
        if not (settings.add_header or self.cookies):
            return []
        return added_fields(self.request, settings, self.client) + list(self.cookies)

    def open_tunnel(self, relay, response):
        """Send the 101 and make the Tunnel, which run() runs."""
        head = self.response_head(response, keep=True)
        self.responded = True
        if not self.backend.server.address.path:
            set_tcp_options(self.backend.stream.sock)
        # With a limit unknown extensions are scanned too: bytes that are not frames end the tunnel.
        scan = self.upgrade.websocket and bool(
            self.location.max_message_size or extensions_known(response))
        self.connection.tunnel = Tunnel(self, relay, head, scan, extensions_used(response))
        self.connection.keep_backend(None)  # no request follows
        self.connection.last_response = None
        self.entry.tunnel_begins()
        return PLAIN_CLOSE

    def persistent(self):
        """Return True if client, configuration and the gate's state keep the connection."""
        return (self.request.persistent and self.config.server.keepalive_timeout > 0
                and self.gate.state == "running" and not self.connection.closing)

    def refuse(self, error):
        """Send the response for an HTTPError."""
        self.drop_backend()
        self.entry.ended(error.reason, error.status, error.detail)
        if self.responded:
            return RESET_CLOSE
        if self.location and self.location.reject_with == "close" and self.is_handshake():
            return self.refuse_in_band(error)
        text = "%d %s: %s\n" % (error.status, reason_phrase(error.status), error.reason)
        if error.status < 500:  # what is wrong with a backend is for the log alone
            text += "%s\n" % error
        return self.send_response(error.status, error.reason, text.encode("ascii", "replace"),
                                  error.fields)

    def send_response(self, status, reason=None, body=b"", fields=()):
        """Send a response of wsgate's own; reason: the word of X-Wsgate-Reason."""
        request = self.request
        keep = (request is not None and self.persistent() and not request.has_body()
                and status not in (400, 408))
        self.responded = True
        response = make_response(status, reason, body, list(fields) + self.added_fields(),
                                 close=not keep,
                                 head_only=request is not None and request.method == b"HEAD")
        try:
            self.stream.write_all(response, Deadline(self.config.server.send_timeout))
        except (OSError, TimedOut):  # the client does not take it
            return PLAIN_CLOSE
        return KEEP_ALIVE if keep else LINGERING_CLOSE

    def is_handshake(self):
        """Return True if the request may be refused by a 101 and a Close frame."""
        return bool(self.upgrade and self.upgrade.key and not self.upgrade.error)

    def refuse_in_band(self, error):
        """Send 101 and a Close frame: the only refusal that JavaScript can read."""
        data = closing_101(self.request, self.upgrade, 4000 + error.status, error.reason)
        try:
            self.stream.write_all(data, Deadline(5))
        except (OSError, TimedOut):  # the client does not take it
            return PLAIN_CLOSE
        return LINGERING_CLOSE

    def drop_backend(self):
        """Close the backend connection, if there is one."""
        if self.backend:
            self.backend.close()
            self.backend = None

    def finish(self):
        """Give back what the exchange holds, keep a small request, write the line in the log."""
        if self.connection.tunnel:
            self.connection.tunnel.close()
        self.drop_backend()
        for key in self.keys:
            self.gate.connections.release(key)
        request = self.request
        if request is not None and request.fields.small(len(request.head)):
            if request.known:  # of auth_request, and as long as it likes
                request.begin()
            self.connection.last_request = request
        self.entry.write()


# ---------------------------------------------------------------------- Streams

SMALL_READ = 16 * 1024    # for frames and heads
BIG_READ = 256 * 1024     # once a stream has shown that it is bulk
LONGEST_POLL = 1e6        # seconds; poll(2) takes 31 bits of milliseconds
LINGERING_TIME = 30.0     # seconds to read on after the last response, as in nginx
LINGERING_TIMEOUT = 5.0   # seconds without a byte that end this, as in nginx
LINGER = 2.0              # seconds to read on after the last byte of a tunnel
POLLIN = getattr(select, "POLLIN", 1)
POLLOUT = getattr(select, "POLLOUT", 4)
POLLERR = getattr(select, "POLLERR", 8)
POLLHUP = getattr(select, "POLLHUP", 16)
POLLRDHUP = getattr(select, "POLLRDHUP", 0)  # Linux: the peer has closed, its bytes may be unread


class Stream:
    """A non-blocking socket, plain or TLS, and the bytes that were read too far.

    Only the thread of its connection touches it: SSL objects are not safe for threads.
    """

    __slots__ = ("sock", "buffer", "scanned", "tls", "read_event", "write_event", "turns")

    def __init__(self, sock, turns=None):
        """turns: the Turns of the thread, for the stream whose loops call Turns.took()."""
        if sock.gettimeout() != 0.0:
            sock.setblocking(False)
        self.sock = sock
        self.buffer = b""            # read, but not taken yet
        self.scanned = 0             # bytes of buffer in which no head ends: see take_head
        self.tls = False
        self.read_event = POLLIN     # to poll for before the next read: TLS may have to write
        self.write_event = POLLOUT   # and before the next write: TLS may have to read
        self.turns = turns

    def fileno(self):
        """Return the descriptor of the socket, -1 once it is closed."""
        return self.sock.fileno()

    def read(self, size=SMALL_READ):
        """Return at most size bytes, b"" at the end of the stream, None if there are none now.

        Raise OSError.
        """
        try:  # SSLSocket.recv() is two more calls
            return self.sock.read(size) if self.tls else self.sock.recv(size)
        except BlockingIOError:
            return None
        except ssl.SSLWantReadError:
            self.read_event = POLLIN
            return None
        except ssl.SSLWantWriteError:
            self.read_event = POLLOUT
            return None
        except ValueError:  # from SSLSocket, once both sides have sent close_notify
            return b""

    def write(self, data):
        """Return how many bytes were written, 0 if none can be now. Raise OSError."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except ssl.SSLWantWriteError:
            self.write_event = POLLOUT
            return 0
        except ssl.SSLWantReadError:
            self.write_event = POLLIN
            return 0

    def wait(self, events, deadline, wakeup=None):
        """Wait for events of the socket. Return False if the wakeup is set first.

        Raise TimedOut.
        """
        poll = Poll()
        poll.register(self.sock, events)
        if wakeup:
            poll.register(wakeup, POLLIN)
        while True:
            ready = poll.poll(min(deadline.remaining(), LONGEST_POLL) * 1000)
            if ready:
                return wakeup is None or ready[0][0] == self.sock.fileno() or len(ready) > 1

    def read_more(self, deadline, size=SMALL_READ):
        """Read once, at most size bytes, into buffer. Return False at the end of the stream.

        A reset ends a stream as well, and so do bytes that are not TLS. Raise TimedOut.
        """
        try:
            data = self.read(size)
            while data is None:
                self.wait(self.read_event, deadline)
                data = self.read(size)
        except OSError:
            return False
        self.buffer += data
        return bool(data)

    def has_request(self):
        """Return True if a request has begun to arrive; read what is there, without waiting."""
        if b"\r\n".startswith(self.buffer):  # nothing, or the empty line that is ignored
            try:
                self.buffer += self.read() or b""
            except OSError:  # wait_for_request() returns False
                return False
        return not b"\r\n".startswith(self.buffer)

    def wait_for_request(self, deadline, wakeup):
        """Wait for bytes, as between two requests, and read them into buffer.

        Return False at the end of the stream, or if the wakeup is set first. Raise TimedOut.
        """
        try:
            data = self.read() if self.tls else None  # the poll would not show what is decrypted
            while data is None:
                if not self.wait(self.read_event, deadline, wakeup):
                    return False
                data = self.read()
        except OSError:
            return False
        self.buffer += data
        return bool(data)

    def write_all(self, data, deadline):
        """Write all of data. Raise OSError or TimedOut."""
        data = memoryview(data)
        while data:
            sent = self.write(data)
            data = data[sent:]
            if not sent:
                self.wait(self.write_event, deadline)

    def peek(self, deadline):
        """Return the first byte without taking it, b"" if none comes."""
        try:
            self.wait(POLLIN, deadline)
            return self.sock.recv(1, socket.MSG_PEEK)
        except (OSError, TimedOut):
            return b""

    def start_tls(self, context, deadline, server_side=False, server_hostname=None):
        """Do a TLS handshake. Raise OSError, which ssl.SSLError is, also when time is up."""
        self.sock = context.wrap_socket(self.sock, server_side=server_side,
                                        do_handshake_on_connect=False,
                                        server_hostname=server_hostname)
        self.tls = True
        while True:
            try:
                self.sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                event = POLLIN
            except ssl.SSLWantWriteError:
                event = POLLOUT
            try:
                self.wait(event, deadline)
            except TimedOut:
                raise OSError(errno.ETIMEDOUT, "TLS handshake timed out")

    def end(self):
        """Half-close: send close_notify under TLS, then FIN. The peer may still send."""
        if self.tls:
            # unwrap() sends close_notify and raises if that of the peer has not come yet.
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()
        # Not SSLSocket.shutdown, which takes TLS away from the other direction as well.
        with contextlib.suppress(OSError):  # the peer is gone
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def silent(self):
        """Return True if the peer has sent nothing since the last read, neither bytes nor FIN."""
        if self.buffer or (self.tls and self.sock.pending()):
            return False
        try:
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def linger(self, deadline):
        """Send FIN, then read and discard while bytes come within LINGERING_TIMEOUT, and close.

        Bytes that are unread at close() would make the kernel send a reset, which takes the
        response away from a client that sends its request first and reads afterwards.
        """
        self.end()
        with contextlib.suppress(OSError, TimedOut):
            while True:
                self.wait(POLLIN, Deadline(min(LINGERING_TIMEOUT, deadline.remaining())))
                self.turns.took(time.monotonic(), Turns.BULK)
                if not socket.socket.recv(self.sock, BIG_READ):  # nothing has to be decrypted
                    break
        self.close()

    def reset(self):
        """Close with RST, so that the peer does not take what it has received as complete."""
        with contextlib.suppress(OSError):  # the peer was faster
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def abort(self):
        """Close with RST; with FIN while bytes are unsent, since a reset would discard them."""
        if unsent(self.sock):
            self.close()
        else:
            self.reset()

    def close(self):
        """Close the socket, whatever state it is in."""
        try:
            self.sock.close()
        except OSError:  # it is closed all the same
            pass


SIOCOUTQNSD = 0x894B      # linux/sockios.h: the size of the part of the send queue not sent yet


def unsent(sock):
    """Return how many written bytes the kernel has not sent yet; 0 if it is not Linux."""
    try:
        return struct.unpack("i", fcntl.ioctl(sock, SIOCOUTQNSD, bytes(4)))[0]
    except (OSError, AttributeError):
        return 0


class Deadline:
    """A point in time that all waits of one phase share: a byte now and then does not move it."""

    __slots__ = ("at",)

    def __init__(self, seconds):
        self.at = time.monotonic() + seconds

    def remaining(self):
        """Return the seconds until it expires, more than 0. Raise TimedOut if it has."""
        seconds = self.at - time.monotonic()
        if seconds <= 0:
            raise TimedOut("timed out")
        return seconds


class SelectPoll:
    """select.poll() by select(), for Windows, where this has no limit on descriptor numbers."""

    def __init__(self):
        self.events = {}

    def register(self, fd, events):
        """Poll a descriptor, or an object that has one, for these events."""
        self.events[fd if isinstance(fd, int) else fd.fileno()] = events

    def unregister(self, fd):
        """Stop polling a descriptor, or an object that has one."""
        del self.events[fd if isinstance(fd, int) else fd.fileno()]

    def poll(self, milliseconds=None):
        """Return [(descriptor, events)] once there are any, [] when time is up."""
        reading = [fd for fd, events in self.events.items() if events & POLLIN]
        writing = [fd for fd, events in self.events.items() if events & POLLOUT]
        if not reading and not writing:
            time.sleep((milliseconds or 0) / 1000)
            return []
        seconds = None if milliseconds is None else milliseconds / 1000
        readable, writable, broken = select.select(reading, writing, reading + writing, seconds)
        ready = collections.Counter({fd: POLLIN for fd in readable})
        for fd in writable:
            ready[fd] |= POLLOUT
        for fd in broken:
            ready[fd] |= POLLERR
        return list(ready.items())


Poll = getattr(select, "poll", SelectPoll)

# The PROXY protocol, as in HAProxy's proxy-protocol.txt (sections 2.1 and 2.2).
PROXY_V2 = b"\r\n\r\n\x00\r\nQUIT\n"


def read_proxy_header(stream, deadline):
    """Read a PROXY header, version 1 or 2. Return (address, port), None for LOCAL and UNKNOWN.

    Not a byte after it is read: a TLS handshake may follow, which is read by the SSL object.
    Raise ValueError for anything else.
    """
    while True:
        data = stream.buffer
        size = 1
        if data.startswith(PROXY_V2):
            size = 16 - len(data)
            if len(data) >= 16:
                length = struct.unpack_from("!H", data, 14)[0]
                if length > 2048:
                    raise ValueError("header too long (%d bytes)" % length)
                size += length
                if len(data) >= 16 + length:
                    stream.buffer = data[16 + length:]
                    return parse_proxy_v2(data[12], data[13], data[16:16 + length])
        elif data.startswith(b"PROXY "):
            end = data.find(b"\r\n", 0, 107)
            if end >= 0:
                stream.buffer = data[end + 2:]
                return parse_proxy_v1(data[:end])
            if len(data) >= 107:
                raise ValueError("header line too long")
        elif not PROXY_V2.startswith(data[:12]) and not b"PROXY ".startswith(data[:6]):
            raise ValueError("missing header")
        try:
            if not stream.read_more(deadline, size):
                raise ValueError("truncated header")
        except TimedOut:
            raise ValueError("header not complete in time")


def parse_proxy_v1(line):
    """Return (address, port) of b'PROXY TCP4 SOURCE DESTINATION PORT PORT', None for UNKNOWN."""
    words = line.decode("ascii").split(" ")
    if words[1] == "UNKNOWN":
        return None
    if (len(words) != 6 or b"%" in line or words[1] not in ("TCP4", "TCP6")
            or not all(re.fullmatch("[0-9]{1,5}", port) for port in words[4:])):
        raise ValueError(repr(line))
    addresses = [ipaddress.ip_address(word) for word in words[2:4]]
    versions = [address.version for address in addresses]
    if versions != [int(words[1][3])] * 2 or max(map(int, words[4:])) > 65535:
        raise ValueError(repr(line))
    return str(addresses[0]), int(words[4])


def parse_proxy_v2(command, family, data):
    """Return (address, port) of the bytes after the signature, None for LOCAL and UNSPEC."""
    if command not in (0x20, 0x21):
        raise ValueError("unknown version or command 0x%02x" % command)
    size = {0x11: 4, 0x21: 16}.get(family)
    if command == 0x20 or family in (0x00, 0x31):  # LOCAL, AF_UNSPEC, AF_UNIX
        return None
    if size is None or len(data) < 2 * size + 4:
        raise ValueError("unknown family 0x%02x, or too short" % family)
    return str(ipaddress.ip_address(data[:size])), struct.unpack_from("!H", data, 2 * size)[0]


# --------------------------------------------------------------------- Fairness


class Crowd:
    """The work of all threads, and how many threads do it.

    It has no lock: a lost update makes threads give way too often or too rarely for a period.
    """

    __slots__ = ("work", "busy", "counted", "until", "brief_until", "sparse", "looked_at", "before")

    WINDOW = 0.5  # seconds; a thread that completed a period in this or the last one is busy

    def __init__(self):
        self.work = 0       # done by all threads: see Turns
        self.busy = 0       # threads that were busy in the last window, or more in this one
        self.counted = 0    # ... in this one so far
        self.until = 0.0    # time.monotonic() of its end
        self.brief_until = 0.0      # until then a turn of bulk is to be short: see Flow.splice
        self.sparse = False         # little work for the number of connections
        self.looked_at = -math.inf  # time.monotonic() of the last look()
        self.before = 0             # work then

    def look(self, now, connections):
        """Find out, at most once a second, whether work is sparse; connections: their number.

        If many threads wake at once then, one event has woken them, a broadcast: it is over
        soonest if each gives way as soon as it has sent its part.
        """
        if now >= self.looked_at + 1:
            self.sparse = self.work - self.before < 4 * connections
            self.looked_at, self.before = now, self.work

    def count(self, now):
        """Count a thread for the first time in a window; return the end of that."""
        if now >= self.until:
            self.busy = self.counted if now < self.until + self.WINDOW else 0
            self.counted = 0
            self.until = now + self.WINDOW
        self.counted += 1
        self.busy = max(self.busy, self.counted)
        return self.until


class Turns:
    """Makes a thread give way that does not leave their share to the others.

    All threads share Python's lock, and one processor. A thread that is woken does not preempt the
    one that runs, and the kernel prefers those that wait briefly. So a client that pipelines, a
    flood of tiny frames, or the luckier ones of a thousand chats would run for whole slices of the
    scheduler while their neighbours wait. Hence each loop that can run without waiting calls took()
    after its turns. A thread that has lately done more than half of its fair share of the work of
    all busy ones gives way after each turn. A chat beside greedy clients has done far less: if it
    gave way too, it would wait for all of them; nor does a connection that has just begun.
    """

    __slots__ = ("begun", "done", "patience", "counted_until")

    crowd = Crowd()
    PERIOD = 8  # work of a thread until its share is looked at
    LARGE = 4   # work of a turn of HTTP; that of a few frames is 1
    BULK = 16   # work of a turn of bulk; more than a period, which shows that others had none

    def __init__(self):
        self.begun = self.crowd.work  # when the period began
        self.done = 0                 # own work since then
        self.patience = self.PERIOD   # work until took() must be called: 1 for a greedy thread
        self.counted_until = -1.0     # Crowd.until when it was last counted

    def took(self, now, work):
        """Turns have ended, the last one now, time.monotonic(). work: what they have done.

        Return True if the thread has given way.
        """
        self.done += work
        if self.done >= self.PERIOD:
            self.end_period(now)
            if work <= self.PERIOD:  # a chat, or HTTP
                self.crowd.brief_until = now + Crowd.WINDOW
        if self.patience == 1 and now >= self.counted_until + Crowd.WINDOW:  # that was long ago
            self.patience = self.PERIOD
        if self.patience == 1 or self.crowd.sparse:
            give_way()
            return True
        return False

    def end_period(self, now):
        """Find out whether the thread is greedy."""
        crowd = self.crowd
        if now >= self.counted_until:
            self.counted_until = crowd.count(now)
        crowd.work += self.done
        greedy = crowd.work - self.begun < 2 * self.done * crowd.busy
        self.begun, self.done = crowd.work, 0
        self.patience = 1 if greedy and crowd.busy > 1 else self.PERIOD
        if greedy and crowd.busy == 1:  # alone: now and then is enough
            give_way()

    def end(self):
        """No turn follows: the next connection counts instead of this one."""
        self.crowd.work += self.done
        if self.counted_until == self.crowd.until:
            self.crowd.counted -= 1


# Before Python 3.10.8 it keeps Python's lock.
CAN_YIELD = hasattr(os, "sched_yield") and sys.version_info >= (3, 10, 8)


def give_way():
    """Let every thread run that waits for the processor, or for Python's lock."""
    if CAN_YIELD:
        os.sched_yield()
    else:
        time.sleep(50e-6)


# -------------------------------------------------------------------------- TLS
#
# An SSLContext takes up to 1 MiB and 30 ms (the system's CA certificates). So there is one
# for each distinct set of TLS keys, and a reload keeps those whose keys and files are the
# same. It keeps them too when their files cannot be read any more: after `user` took
# effect, a key of root is out of reach, and a reload that has nothing to do with TLS must
# not fail for that.

# What is in use: {keys that it was made of: CertificateStore or SSLContext}. Only the main thread
# makes, looks for and drops configurations.
TLS_IN_USE = weakref.WeakValueDictionary()
TLS_STAMPS = weakref.WeakKeyDictionary()  # {SSLContext: stamps of its files}
ListenerTLS = collections.namedtuple("ListenerTLS", "client_ca protocols ciphers")
BACKEND_TLS_KEYS = (
    "proxy_ssl_verify", "proxy_ssl_trusted_certificate", "proxy_ssl_certificate",
    "proxy_ssl_certificate_key", "proxy_ssl_protocols", "proxy_ssl_ciphers")


class CertificateStore:
    """The SSLContexts of the ssl listeners, by host name; read again when a file changes."""

    def __init__(self, keys):
        """keys: as certificate_store makes them. Raise ValueError or OSError."""
        self.settings, pairs = keys  # ListenerTLS, and the items of pairs
        self.pairs = dict(pairs)     # host or None: (certificate, key)
        self.files = list(filter(None, itertools.chain([self.settings.client_ca],
                                                       *self.pairs.values())))
        self.stamps = list(map(file_stamp, self.files))
        self.contexts = self.load()

    def load(self):
        """Return {host or None: SSLContext}, one per certificate; raise ValueError or OSError.

        A handshake begins with that of None, and switches to that of the host name (SNI).
        """
        made = {pair: self.make_context(*pair) for pair in set(self.pairs.values())}
        contexts = {host: made[pair] for host, pair in self.pairs.items()}
        entry = contexts[None]

        def choose(sock, name, context):
            """Called in the handshake with the host name that the client sent, or None."""
            name = (name or "").lower()
            suffixes = ["*" + name[place:] for place, char in enumerate(name) if char == "."]
            sock.context = next((contexts[each] for each in [name] + suffixes if each in contexts),
                                context)

        if hasattr(entry, "sni_callback"):  # the older way prints a traceback for a name like a..b
            entry.sni_callback = choose
        else:
            entry.set_servername_callback(choose)
        return contexts

    def make_context(self, certificate, key):
        """Return the SSLContext of a certificate; raise ValueError or OSError."""
        client_ca, protocols, ciphers = self.settings
        context = new_context(ssl.PROTOCOL_TLS_SERVER, "ssl", protocols, ciphers)
        load_pair(context, certificate, key)
        if client_ca:
            load_ca(context, "ssl_client_certificate", client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # Python 3.7
        return context

    def refresh(self):
        """Load the files again if they have changed; if that fails, log it once, keep the old."""
        stamps = list(map(file_stamp, self.files))
        if stamps == self.stamps:
            return
        self.stamps = stamps
        try:
            self.contexts = self.load()
            log.info("certificates reloaded")
        except (OSError, ValueError) as error:
            log.error("new certificate not loaded, keeping the current one: %s",
                      describe_error(error))


def certificate_store(config):
    """Return the CertificateStore of a Config: the one in use, if its keys are the same."""
    server = config.server
    default = (server.ssl_certificate, server.ssl_certificate_key)
    pairs = collections.OrderedDict()
    for location in config.locations:
        pair = (location.ssl_certificate, location.ssl_certificate_key)
        for host in filter(None, location.hosts if pair[0] and pair != default else ()):
            pairs.setdefault(host, pair)
    entry = require(default if default[0] else next(iter(pairs.values()), None),
                    "missing (a listener with ssl needs ssl_certificate and ssl_certificate_key"
                    " in [server], or in a location of a host name)")
    keys = (ListenerTLS(server.ssl_client_certificate, server.ssl_protocols, server.ssl_ciphers),
            ((None, entry),) + tuple(pairs.items()))
    store = TLS_IN_USE.get(keys) or CertificateStore(keys)
    TLS_IN_USE[keys] = store
    store.refresh()
    return store


def backend_context(settings):
    """Return the SSLContext for https backends of a location; raise ValueError or OSError.

    It is the one in use, if its keys are the same and no file has changed.
    """
    keys = tuple((name, getattr(settings, name)) for name in BACKEND_TLS_KEYS)
    stamps = [file_stamp(file) for name, file in keys
              if file and name.endswith(("certificate", "_key"))]
    context = TLS_IN_USE.get(keys)
    if context is None or TLS_STAMPS[context] != stamps:
        try:
            context = make_backend_context(settings)
        except PermissionError as error:
            if context is None:
                raise
            log.error("%s; keeping the certificates loaded before", describe_error(error))
        TLS_IN_USE[keys], TLS_STAMPS[context] = context, stamps
    return context


def make_backend_context(settings):
    """Return a new SSLContext; raise ValueError or OSError."""
    context = new_context(ssl.PROTOCOL_TLS_CLIENT, "proxy_ssl", settings.proxy_ssl_protocols,
                          settings.proxy_ssl_ciphers)
    if not settings.proxy_ssl_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif settings.proxy_ssl_trusted_certificate:
        load_ca(context, "proxy_ssl_trusted_certificate", settings.proxy_ssl_trusted_certificate)
    else:
        context.load_default_certs()
    if settings.proxy_ssl_certificate:
        load_pair(context, settings.proxy_ssl_certificate, settings.proxy_ssl_certificate_key)
    return context


def load_pair(context, certificate, key):
    """Load a certificate chain and its key; raise OSError or ValueError that names the file."""
    key = key or certificate
    for file in (certificate, key):
        open(file, "rb").close()  # load_cert_chain() does not say which of them it cannot open
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        if "MISMATCH" in str(error):
            raise ValueError("%s is not the private key of %s" % (key, certificate))
        raise ValueError("invalid certificate %s%s: %s (expected PEM: the certificate first,"
                         " then its chain; a key without passphrase)" % (
                             certificate, " or key " + key if key != certificate
                             else " (it must contain the key too, because no key file is set)",
                             describe_error(error)))


def check_pair(certificate, key):
    """Raise ValueError or OSError if these cannot be loaded; not for lack of permission."""
    with contextlib.suppress(PermissionError):
        load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key)


def load_ca(context, name, file):
    """Load a file of CA certificates, the value of the key `name`.

    Raise OSError or SettingError.
    """
    open(file, "rb").close()  # load_verify_locations() does not say which file it cannot open
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as error:
        raise SettingError(name, "invalid CA file %s: %s (expected PEM)"
                           % (file, describe_error(error)))


def new_context(protocol, prefix, names, ciphers):
    """Return an SSLContext for these TLS versions and ciphers ('': the default of OpenSSL).

    Raise SettingError for prefix_protocols if this OpenSSL refuses one of the versions.
    """
    context = ssl.SSLContext(protocol)
    context.set_alpn_protocols(["http/1.1"])
    for name in names:
        if not version_usable(name, ciphers):
            raise SettingError(prefix + "_protocols", "%s is refused by %s (remove it, or set"
                               " %s_ciphers = DEFAULT@SECLEVEL=0)" % (
                                   name, ssl.OPENSSL_VERSION, prefix))
    set_protocols(context, names, ciphers)
    return context


@functools.lru_cache()
def version_usable(name, ciphers):
    """Return whether a handshake of this TLS version can begin with these ciphers.

    OpenSSL 3 allows TLS 1.0 and 1.1 at security level 0 only; some builds have none of both.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    set_protocols(context, (name,), ciphers)
    try:
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="any").do_handshake()
    except ssl.SSLWantReadError:  # the ClientHello was made
        return (name not in ("TLSv1", "TLSv1.1") or ssl.OPENSSL_VERSION_INFO < (3,)
                or not getattr(context, "security_level", "SECLEVEL=0" not in ciphers))
    except (ssl.SSLError, ValueError):
        return False


def set_protocols(context, names, ciphers=""):
    """Allow these TLS versions, and none between them, and these ciphers ('': the default)."""
    if ciphers:
        context.set_ciphers(ciphers)
    with warnings.catch_warnings():  # TLSv1 and the options are deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        if hasattr(ssl, "TLSVersion"):  # Python 3.7; it also overrides a minimum of openssl.cnf
            versions = sorted(getattr(ssl.TLSVersion, name.replace(".", "_")) for name in names)
            context.minimum_version, context.maximum_version = versions[0], versions[-1]
        for name in TLS_VERSIONS:
            if name not in names:
                context.options |= getattr(ssl, "OP_NO_" + name.replace(".", "_"), 0)


def describe_tls_error(error):
    """Return why a TLS handshake with a backend failed, and the key of wsgate.ini to look at."""
    text, remedy = describe_error(error), TLS_REMEDIES.get(tls_error_kind(error))
    return "%s (%s)" % (text, remedy) if remedy else text


TLS_REMEDIES = {
    "untrusted": "set proxy_ssl_trusted_certificate to its CA, or proxy_ssl_verify = off",
    "host_name": "set proxy_ssl_name to a name of its certificate, or proxy_ssl_verify = off",
    "certificate": "renew it, or set proxy_ssl_verify = off",
    "plain_port": "is it a port without TLS? then use http:// in proxy_pass",
    "version": "set proxy_ssl_protocols to a TLS version that it supports",
}
TLS_ERRORS = (  # words of OpenSSL
    ("untrusted", "CERTIFICATE_VERIFY_FAILED"),  # Python 3.6
    ("version", "PROTOCOL_VERSION|UNSUPPORTED_PROTOCOL"),
    ("plain_port", "WRONG_VERSION_NUMBER|UNKNOWN_PROTOCOL|HTTP_REQUEST|RECORD_LAYER_FAILURE"),
)
# X509_V_ERR_*: self-signed, no issuer certificate, no chain; name or IP address mismatch
UNTRUSTED, MISMATCH = (18, 19, 20, 21), (62, 64)


def tls_error_kind(error):
    """Return what made a handshake fail: a key of TLS_REMEDIES, or 'tls_failed'."""
    text = str(error)
    if isinstance(error, ssl.CertificateError) or "server_hostname" in text:  # none: a Unix socket
        code = getattr(error, "verify_code", MISMATCH[0])  # Python 3.6 has none
        return ("untrusted" if code in UNTRUSTED else
                "host_name" if code in MISMATCH else "certificate")
    return next((kind for kind, words in TLS_ERRORS if re.search(words, text)), "tls_failed")


def distinguished_name(certificate):
    """Return the subject of SSLSocket.getpeercert() as text in RFC 4514 order, or None."""
    short = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU",
             "countryName": "C", "localityName": "L", "stateOrProvinceName": "ST",
             "emailAddress": "emailAddress"}
    parts = ["%s=%s" % (short.get(name, name), re.sub(r'([,+"\\<>;=])', r"\\\1", value))
             for group in certificate.get("subject", ()) for name, value in group]
    return re.sub("[\\x00-\\x1f\\x7f]", lambda char: "\\%02X" % ord(char.group()),
                  ",".join(reversed(parts))) or None


# --------------------------------------- HTTP/1.1 messages (RFC 9110, RFC 9112)
#
# Refuse rather than repair: two parsers that repair differently are how requests are
# smuggled. Every pattern is used with fullmatch, on bytes, and cannot backtrack far.
# Lengths are ASCII digits, because int() also takes '+5', '1_0' and ' 5 '.

TOKEN = re.compile(br"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")               # RFC 9110 5.6.2
REQUEST_LINE = re.compile(  # a target may have raw bytes above 0x7F: some clients send them
    br"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(
    br"HTTP/([0-9])\.([0-9]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
FIELD_LINES = re.compile(                                          # RFC 9112 5
    br"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n)*")
FIELD_LINE = re.compile(br"([^:]+):[\t ]*([^\r]*)\r\n")             # for valid FIELD_LINES
SPACE_AT_END = re.compile(br"[\t ]\r\n")
HOST = re.compile(                                                 # RFC 3986 3.2.2
    br"([A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?")
CHUNK_LINE = re.compile(                                           # RFC 9112 7.1
    br"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
LENGTH = re.compile(br"[0-9]{1,18}")                               # RFC 9110 8.6, within 64 bits
BARE_LF = re.compile(br"(?<!\r)\n|\x00")
END_OF_RESPONSE_HEAD = re.compile(br"\n\r?\n")
PLAIN = re.compile(r"[ !#-\[\]-~]*")                               # needs no escape in a log
CHUNK_LINE_LIMIT = 4096
INTERIM_LIMIT = 32         # 1xx responses before the final one


def read_head(stream, limit, deadline, take=None):
    """Read a head. Return it as bytes; what follows remains in stream.buffer.

    take: take_head for a request, the default, or take_response_head. Raise what it raises,
    TimedOut, or EOFError if the stream ends before the head does.
    """
    take = take or take_head
    while True:
        head = take(stream, limit)
        if head is not None:
            return head
        if not stream.read_more(deadline):
            raise EOFError


def take_head(stream, limit):
    """Take a request head of at most limit bytes, with its empty line, out of stream.buffer.

    Return None while it is incomplete. Only what is new since the last call is looked at, or a
    head that comes byte by byte would cost the square of its length. Raise HTTPError as soon as
    it is certain that no valid head can follow.
    """
    data, seen = stream.buffer, stream.scanned
    start = 2 if data.startswith(b"\r\n") else 0  # one empty line is ignored (RFC 9112 2.2)
    end = data.find(b"\r\n\r\n", max(start, seen - 3))
    if 0 <= end <= start + limit - 4:
        stream.buffer, stream.scanned = data[end + 4:], 0
        return data[start:end + 4]
    stream.scanned = len(data)
    if data.startswith(b"\x16\x03", start):
        raise HTTPError(400, "tls_on_http_port", "this port is plain HTTP: use http:// or ws://")
    if BARE_LF.search(data, seen, end if end >= 0 else len(data)):
        raise HTTPError(400, "bad_request", "invalid line end (expected CRLF)")
    line_end = data.find(b"\r\n", max(start, seen - 1), start + limit)
    if line_end >= 0 and line_end == data.find(b"\r\n", start):  # the request line is complete
        method, target, _ = parse_request_line(data[start:line_end])
        check_target(method, target)
    if len(data) > start + limit:
        detail = "request head over client_header_size, %d bytes" % limit
        if data.find(b"\r\n", start, start + limit) < 0:
            raise HTTPError(414, "uri_too_long", detail)
        raise HTTPError(431, "header_too_large", detail)
    return None


def take_response_head(stream, limit):
    """Take a response head out of stream.buffer, as take_head does for a request.

    Its lines may end with a bare LF (RFC 9112 2.2), as device servers have them. Raise
    BackendError 502.
    """
    data = stream.buffer
    if not b"HTTP/".startswith(data[:5]):
        raise BackendError(502, "backend_bad_response", "not HTTP: %s" % printable(data[:60]),
                           sent=True)
    match = END_OF_RESPONSE_HEAD.search(data, max(0, stream.scanned - 2))
    if match and match.end() <= limit:
        stream.buffer, stream.scanned = data[match.end():], 0
        return data[:match.end()]
    stream.scanned = len(data)
    if len(data) > limit:
        raise BackendError(502, "backend_bad_response",
                           "response head over client_header_size, %d bytes" % limit, sent=True)
    return None


class Request:
    """A parsed request head.

    target: bytes for the backend. paths: see read_path; path: the first of them, for routing.
    minor: 0 or 1. authority: Host as it came, host: its name, lower case. length: of the body,
    None if it is chunked or there is none. attempts_upgrade: there is a trace of an upgrade, so
    frames may follow (RFC 9931). persistent: the client may send another request (RFC 9112 9.3;
    not in HTTP/1.0, nor after such a trace). repeatable: it may be sent once more, though a server
    may have received it. id: of the access log. user: after Basic
    authentication. identity: lines for the backend, from the response of auth_request. known:
    {name: values} of $http_NAME that are from there, never from the client. withheld:
    names of fields, as cgi_name() makes them, that the backend does not get. head, block: all of
    it and the field lines, bytes. config: of its exchange. guards: its locations_of(), or None.
    for_backend: (what they were made for, the lines of fields_for_backend()), or None.
    """

    __slots__ = ("head", "method", "target", "path", "paths", "minor", "block", "fields", "host",
                 "authority", "length", "chunked", "attempts_upgrade", "persistent", "repeatable",
                 "id", "user", "identity", "known", "withheld", "config", "guards", "for_backend")

    def begin(self):
        """Forget what an exchange has found out, since the same head has come once more."""
        self.id, self.user, self.identity, self.withheld = "", b"", (), frozenset()
        self.known = {}

    def parse_block(self, block):
        """Set block and what follows from the field lines. Raise HTTPError."""
        self.block = block
        try:
            self.fields = fields = parse_fields(block)
        except ValueError as error:
            raise HTTPError(400, "bad_request", str(error))
        self.authority, self.host = parse_host(fields, self.minor)
        self.length, self.chunked = request_framing(fields, self.minor)
        listed = fields.tokens(b"connection")
        # Not h2c: its clients wait, and some ask for it in each request (Java's HttpClient).
        self.attempts_upgrade = (b"sec-websocket-key" in fields.index
                                 or not {b"h2c"}.issuperset(fields.tokens(b"upgrade")))
        self.persistent = (self.minor > 0 and b"close" not in listed
                           and not self.attempts_upgrade)
        self.for_backend = None
        if not PROTECTED_FIELDS.isdisjoint(listed):
            name = min(PROTECTED_FIELDS.intersection(listed))
            raise HTTPError(400, "bad_request", "Connection must not list %s" % printable(name))

    def copy_block(self, last):
        """Set what parse_block() has set in the last request."""
        self.block, self.fields, self.for_backend = last.block, last.fields, last.for_backend
        self.authority, self.host = last.authority, last.host
        self.length, self.chunked = last.length, last.chunked
        self.attempts_upgrade, self.persistent = last.attempts_upgrade, last.persistent

    def has_body(self):
        """Return True unless the body is empty."""
        return bool(self.chunked or self.length)

    def body(self, limit):
        """Return the scanner of the request body. limit: client_max_body_size."""
        if self.chunked:
            return ChunkedBody(limit, self.withheld.union(self.fields.tokens(b"connection")))
        return LengthBody(self.length) if self.length else NO_BODY


def parse_request_head(head, last=None):
    """Return a head, the bytes up to and including the empty line, as Request. Raise HTTPError.

    last: the last Request of the connection, if any. Most clients repeat their field lines, some
    the whole head, and the same bytes are not parsed twice.
    """
    if last is not None and last.head == head:
        last.begin()
        return last
    line, _, block = head[:-2].partition(b"\r\n")
    request = Request()
    request.head = head
    request.method, target, request.minor = parse_request_line(line)
    if last is not None and last.block == block and last.minor == request.minor:
        request.copy_block(last)
    else:
        request.parse_block(block)
    if request.method == b"CONNECT":
        raise connect_refused()
    request.target, request.paths = split_target(request.method, target, request.authority)
    request.path, request.guards = request.paths[0], None
    request.repeatable = (request.method in (b"GET", b"HEAD", b"OPTIONS")
                          and not request.has_body())
    request.begin()
    return request


def parse_request_line(line):
    """Return (method, target, minor version) of a request line. Raise HTTPError 400 or 505."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(400, "bad_request",
                        "invalid request line %s" % printable(mask_query(line[:80])))
    method, target, major, minor = match.groups()
    if major != b"1":
        raise HTTPError(505, "bad_version", "HTTP/%s.%s is not supported (expected HTTP/1.1)" % (
            major.decode(), minor.decode()))
    return method, target, min(1, int(minor))  # HTTP/1.2 is understood as 1.1 (RFC 9110 2.5)


def connect_refused():
    """Return the HTTPError for CONNECT."""
    return HTTPError(405, "method_not_allowed", "CONNECT is not supported",
                     ((b"Allow", b"GET, HEAD, POST, PUT, DELETE, OPTIONS"),))


def check_target(method, target):
    """Raise HTTPError 400 or 405 for a request-target that is invalid whatever Host may be."""
    if method == b"CONNECT":
        raise connect_refused()
    absolute = ABSOLUTE_FORM.match(target)
    split_target(method, target, absolute.group(2) if absolute else b"")


def parse_host(fields, minor):
    """Return Host (RFC 9112 3.2) as (as it came, name without port in lower case: str)."""
    values = fields.get_all(b"host")
    if not values and minor == 0:
        return b"", ""
    name = remembered(host_name, values[0]) if len(values) == 1 else None
    if name is None:
        raise HTTPError(400, "bad_request", "missing, duplicate or invalid Host")
    return values[0], name


@functools.lru_cache(1024)
def host_name(value):
    """Return the name in a value of Host, None if the value is invalid."""
    match = HOST.fullmatch(value)
    if not match or int(match.group(2) or 0) > 65535:
        return None
    return match.group(1).decode().lower().rstrip(".")


# How HTTP framing is decided (RFC 9112 6.3). Where a body ends must be certain, or what follows
# could be taken for the next request by one side alone. A request has a body if it has a
# Transfer-Encoding, which must be exactly `chunked`, or one Content-Length; with both, or with
# anything else, it is refused. In a response chunked wins over Content-Length, which is then not
# passed on; a response to HEAD, 1xx, 204 and 304 have no body whatever they say; one with neither
# ends with the connection. Each body is framed again for the other side by its own scanner, and a
# connection serves another request only after both bodies have ended where they should.


def request_framing(fields, minor):
    """Return (length, chunked) of the body of a request; raise HTTPError 400 or 501."""
    codings = fields.get_all(b"transfer-encoding")
    lengths = fields.get_all(b"content-length")
    if not codings and not lengths:
        return None, False
    if not codings:
        length = parse_length(lengths)
        if length is None:
            raise HTTPError(400, "bad_request", "duplicate or invalid Content-Length")
        return length, False
    if lengths or minor == 0:
        raise HTTPError(400, "bad_request",
                        "Transfer-Encoding with Content-Length, or in HTTP/1.0")
    if len(codings) != 1 or codings[0].lower() != b"chunked":
        raise HTTPError(501, "bad_transfer_encoding",
                        "unsupported Transfer-Encoding (expected chunked)")
    return None, True


def parse_length(values):
    """Return the values of Content-Length as int, None unless there is exactly one number."""
    if len(values) == 1 and LENGTH.fullmatch(values[0]):
        return int(values[0])
    return None


class Response:
    """A parsed response head. length: of the body, None if it is chunked or not known.

    persistent: the backend takes another request after it (RFC 9112 9.3, 6.3). head, block: all of
    it and the field lines, bytes. for_client: (what it was made for, the head for the client) by
    response_head_for_client(), or None.
    """

    __slots__ = ("head", "block", "status", "reason", "minor", "fields", "chunked", "length",
                 "persistent", "for_client")

    def announces_body(self):
        """Return True if its fields have a length. Some servers send such a body even where there
        can be none (HEAD, 204, 304), and it would pass for the response to the next request.
        """
        return bool(self.chunked or self.length)

    def body(self, method, decode):
        """Return the scanner of the body. decode: without chunks, for an HTTP/1.0 client."""
        if method == b"HEAD" or self.status in (204, 304):
            return NO_BODY
        if self.chunked:
            return ChunkedBody(0, self.fields.tokens(b"connection"), decode)
        return UntilClose() if self.length is None else LengthBody(self.length)


def parse_response_head(head):
    """Return a head, the bytes up to and including the empty line, as Response.

    Raise BackendError 502.
    """
    response = Response()
    response.head, response.for_client = head, None
    if head.count(b"\n") != head.count(b"\r\n"):
        head = re.sub(br"\r?\n", b"\r\n", head)
    line, _, response.block = head[:-2].partition(b"\r\n")
    try:
        response.minor, response.status, response.reason = remembered(parse_status_line, line)
        response.fields = fields = parse_fields(response.block)
        response.length, response.chunked = response_framing(fields, response.minor)
    except ValueError as error:
        raise BackendError(502, "backend_bad_response", str(error), sent=True, retry=False)
    response.persistent = (response.minor >= 1 and b"close" not in fields.tokens(b"connection")
                           and not (response.chunked and fields.get_all(b"content-length")))
    return response


@functools.lru_cache(1024)
def parse_status_line(line):
    """Return (minor version, status, reason phrase in bytes) of a status line; raise ValueError."""
    match = STATUS_LINE.fullmatch(line)
    if not match or match.group(1) != b"1":
        raise ValueError("invalid status line %s" % printable(line[:80]))
    _, minor, status, reason = match.groups()
    return int(minor), int(status), reason or b""


def response_framing(fields, minor):
    """Return (length, chunked) of the body of a response, if it has one; raise ValueError."""
    codings = fields.get_all(b"transfer-encoding")
    lengths = fields.get_all(b"content-length")
    if codings:
        if len(codings) != 1 or codings[0].lower() != b"chunked" or minor == 0:
            raise ValueError("unsupported or ambiguous Transfer-Encoding")
        return None, True
    length = parse_length(lengths)
    if lengths and length is None:
        raise ValueError("duplicate or invalid Content-Length")
    return length, False


def make_response(status, reason, body=b"", fields=(), close=True, head_only=False,
                  content_type=b"text/plain"):
    """Return a response of wsgate's own as bytes. reason: word of X-Wsgate-Reason, or None."""
    lines = [b"HTTP/1.1 %d %s" % (status, reason_phrase(status).encode())]
    lines += [b"%s: %s" % pair for pair in fields]
    given = {name.lower() for name, _ in fields}  # add_header
    if b"date" not in given:
        lines.append(b"Date: " + email.utils.formatdate(usegmt=True).encode())
    if reason:
        lines.append(b"X-Wsgate-Reason: " + reason.encode())
        body = body or ("%d %s: %s\n" % (status, reason_phrase(status), reason)).encode()
    bodyless = status in (204, 304)
    if not bodyless:
        if b"content-type" not in given:
            lines.append(b"Content-Type: %s; charset=utf-8" % content_type)
        lines.append(b"Content-Length: %d" % len(body))
    if close:
        options = b"close, upgrade" if status == 426 else b"close"  # RFC 9110 7.8
        lines.append(b"Connection: " + options)
    return b"\r\n".join(lines) + b"\r\n\r\n" + (b"" if head_only or bodyless else body)


def reason_phrase(status):
    """Return the phrase of a status: 'Not Found' for 404."""
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def printable(data):
    """Return bytes or text of a peer as text that is safe in a log line and within its quotes."""
    text = data.decode("latin-1") if isinstance(data, bytes) else data
    if PLAIN.fullmatch(text):
        return text
    return "".join(map(escaped, text))


def escaped(char):
    """Return a character, or \\xNN or \\uNNNN for one that is not safe in a log."""
    if " " <= char <= "~" and char not in '"\\':
        return char
    return "\\x%02x" % ord(char) if ord(char) < 256 else "\\u%04x" % ord(char)


# ------------------------------------ HTTP/1.1 fields (RFC 9110 5, RFC 9112 5)


def parse_fields(block):
    """Return the lines between start line and empty line as Headers; raise ValueError."""
    if not FIELD_LINES.fullmatch(block):
        for line in block.split(b"\r\n"):
            if not FIELD_LINES.fullmatch(line + b"\r\n"):  # its value may be a secret
                name = re.match(br"([^\s:]+\s*:)?", line).group()[:40]
                raise ValueError("invalid field line %s" % printable(name or b"without a name"))
    pairs = FIELD_LINE.findall(block)
    if SPACE_AT_END.search(block):
        pairs = [(name, value.rstrip(b"\t ")) for name, value in pairs]
    return Headers(pairs)


class Headers(list):
    """Header fields in their order, as (name, value) pairs of bytes, found in any case.

    index: {lower-case name: its values}. parts: how many field lines, and elements of lists in them
    that were looked at. Made by parse_fields.
    """

    __slots__ = ("index", "lists", "parts")

    # What an idle connection keeps at most of a head, or many of them could fill the memory. A
    # part, which may have two bytes only, takes about 400 once it is parsed.
    KEPT = 2048       # bytes
    KEPT_PARTS = 64

    def __init__(self, pairs=()):
        list.__init__(self, pairs)
        self.lists = {}  # what tokens() has returned, by name
        self.parts = len(self)
        names, values = zip(*pairs) if pairs else ((), ())
        self.index = index = dict(zip(map(bytes.lower, names), zip(values)))
        if len(index) < len(pairs):  # a name more than once
            index.clear()
            for name, value in pairs:
                index.setdefault(name.lower(), []).append(value)

    def get_all(self, name):
        """Return the values of all fields of this lower-case name, in order."""
        return self.index.get(name, ())

    def get(self, name):
        """Return the value of a lower-case name; None if there is none, or more than one."""
        values = self.index.get(name, ())
        return values[0] if len(values) == 1 else None

    def small(self, size):
        """Return True if an idle connection may keep the fields. size: of their head, in bytes."""
        return size <= self.KEPT and self.parts <= self.KEPT_PARTS

    def tokens(self, name):
        """Return the elements of a list field in lower case, in order (RFC 9110 5.6.1)."""
        if name in self.lists:
            return self.lists[name]
        values = self.index.get(name)
        if values is None:
            return ()
        value = values[0] if len(values) == 1 else b",".join(values)
        tokens = self.lists[name] = remembered(list_elements, value)
        self.parts += len(tokens)
        return tokens


@functools.lru_cache(1024)
def list_elements(value):
    """Return the elements of a value in lower case, in order, as a tuple."""
    return tuple(filter(None, map(bytes.strip, value.lower().split(b","))))


def remembered(function, value):
    """Call a function with lru_cache; not with a long value, with which peers could fill it."""
    return function(value) if len(value) <= 128 else function.__wrapped__(value)


# ---------------------------------------------- HTTP/1.1 bodies (RFC 9112 6, 7)


class Scanner:
    """What looks at the bytes of a Flow on their way; the interface, and the default: no limits.

    feed() is given each read and returns what passes on. Bulk need not be seen: `remaining`
    bytes may be spliced past the scanner, and skip() is told how many were.
    """

    __slots__ = ()

    remaining = math.inf  # bytes that may pass unseen, whatever they are
    done = False          # True once the last byte has been fed or skipped
    rest = b""            # fed, but after the last byte: of the next request or response
    notable = False       # True if Tunnel.on_scanner has something to look at

    def feed(self, data, now):
        """Take the bytes of one read, return those that pass on. Raises ValueError, HTTPError."""
        return data

    def skip(self, count):
        """Account for bytes that passed unseen, at most `remaining`."""

    def bulk(self):
        """Return True if so much may pass unseen now that splicing it is worth the calls."""
        return self.remaining >= SPLICE_MINIMUM

    def peek(self, recv, now):
        """Look at what recv(size, flags) has to offer, return how much of it may pass unseen."""
        return 0

    def at_end(self):
        """The stream has ended: return True if it may end here."""
        return self.done

    # What only frames have; without them nothing can be placed, counted or held back.
    close = None          # (code, reason) of a Close frame that passed
    messages = 0
    last_data = None

    def between(self):
        """Return True if a frame may be placed here."""
        return False

    def release(self):
        """Return the bytes that are held back, which then pass as they are."""
        return b""


class UntilClose(Scanner):
    """Bytes that end with the stream: a response body without a length, a tunnel of no frames."""

    __slots__ = ("done",)

    def __init__(self):
        self.done = False

    def at_end(self):
        self.done = True
        return True


class NoBody(Scanner):
    """No byte at all."""

    __slots__ = ()

    remaining = 0
    done = True

    def feed(self, data, now):
        return b""


NO_BODY = NoBody()


class LengthBody(Scanner):
    """A body with Content-Length (RFC 9112 6.2)."""

    __slots__ = ("remaining", "done", "rest")

    def __init__(self, length):
        self.remaining = length
        self.done = not length
        self.rest = b""

    def feed(self, data, now):
        if len(data) > self.remaining:
            data, self.rest = data[:self.remaining], data[self.remaining:]
        self.remaining -= len(data)
        self.done = not self.remaining
        return data

    def skip(self, count):
        self.remaining -= count
        self.done = not self.remaining


class ChunkedBody(Scanner):
    """A chunked body (RFC 9112 7.1): validated, and framed again without chunk extensions.

    limit: of the payload in bytes, 0 for none. withheld: lower-case names of trailer fields that
    are dropped. decode: pass the payload alone, for a client of HTTP/1.0.
    feed() raises ValueError for what is not chunked coding, HTTPError 413 above the limit.
    """

    __slots__ = ("limit", "withheld", "decode", "done", "rest", "remaining", "state", "line",
                 "total", "trailers", "tail")

    def __init__(self, limit=0, withheld=(), decode=False):
        self.limit = limit
        self.withheld = withheld
        self.decode = decode
        self.done = False
        self.rest = b""
        self.remaining = 0    # payload of the current chunk still to come
        # The method that takes the next line: size_line, payload_end or trailer_line; or "payload".
        self.state = "size_line"
        self.line = b""       # the incomplete line
        self.total = 0        # payload so far
        self.trailers = 0     # bytes of trailer lines so far
        self.tail = []        # last chunk and trailers: they pass together

    def feed(self, data, now):
        passed, position = [], 0
        while position < len(data) and not self.done:
            if self.state == "payload":
                piece = data[position:position + self.remaining]
                passed.append(piece)
                position += len(piece)
                self.skip(len(piece))
            else:
                position = self.feed_line(data, position, passed)
        if self.done:
            self.rest = data[position:]
        return b"".join(passed)

    def skip(self, count):
        self.remaining -= count
        if not self.remaining:
            self.state = "payload_end"

    def feed_line(self, data, position, passed):
        """Collect a line up to its CRLF, give it to the state's method; return the new position."""
        end = data.find(b"\n", position)
        stop = len(data) if end < 0 else end + 1
        self.line += data[position:stop]
        if len(self.line) > CHUNK_LINE_LIMIT:
            raise ValueError("chunk line longer than %d bytes" % CHUNK_LINE_LIMIT)
        if self.state == "payload_end" and not b"\r\n".startswith(self.line):
            raise ValueError("chunk longer than its size")
        if end >= 0:
            line, self.line = self.line, b""
            if not line.endswith(b"\r\n"):
                raise ValueError("chunk line without CRLF")
            getattr(self, self.state)(line[:-2], passed)
        return stop

    def size_line(self, line, passed):
        """Take the line before a chunk's payload; the last chunk has size 0."""
        match = CHUNK_LINE.fullmatch(line)
        if not match:
            raise ValueError("invalid chunk size %s" % printable(line[:40]))
        self.remaining = int(match.group(1), 16)
        self.total += self.remaining
        if 0 < self.limit < self.total:
            raise HTTPError(413, "body_too_large", "client_max_body_size is %d" % self.limit)
        size = b"" if self.decode else b"%x\r\n" % self.remaining
        if self.remaining:
            passed.append(size)
            self.state = "payload"
        else:
            self.tail.append(size)
            self.state = "trailer_line"

    def payload_end(self, line, passed):
        """Take the empty line after a chunk's payload."""
        if not self.decode:
            passed.append(b"\r\n")
        self.state = "size_line"

    def trailer_line(self, line, passed):
        """Take a trailer field, or the empty line that ends the body (RFC 9110 6.5)."""
        self.trailers += len(line) + 2
        if self.trailers > SMALL_READ:
            raise ValueError("trailers larger than %d bytes" % SMALL_READ)
        if line and not FIELD_LINES.fullmatch(line + b"\r\n"):
            raise ValueError("invalid trailer %s" % printable(line[:80]))
        self.done = not line
        if not self.decode and (self.done or self.passes(line.partition(b":")[0].lower())):
            self.tail.append(line + b"\r\n")
        if self.done:
            passed.extend(self.tail)

    def passes(self, name):
        """Return True if a trailer field of this name is passed on: none that would be trusted."""
        plain = cgi_name(name)
        return not (plain in PROTECTED_FIELDS or plain in HOP_BY_HOP or plain in self.withheld
                    or name in self.withheld or b"_" in name or plain.startswith(b"x-forwarded-"))


# ---------------------------------------------------------------------- Routing


class Location(Settings):
    """One [location]: which requests it matches and how they are served; immutable.

    Every key of LOCATION_KEYS is an attribute. name: the title of the section. hosts, path,
    exact: see parse_location. passwords: a PasswordFile or None. proxy, websocket_proxy, auth:
    the ProxyPass of proxy_pass, proxy_pass_websocket and auth_request, or None. open: no access
    control applies.

    Sets of field names, as cgi_name() makes them: replaced, by proxy_set_header; identity, of
    auth_request_headers; withheld and auth_withheld, what backend and auth_request do not get
    from the client. In lower case: response_withheld, what the client does not get from the
    backend, and response_examined, what needs a closer look (see examined_lines).
    """

    def __init__(self, values, name, place, upstreams, passwords):
        super().__init__(values)
        hosts, path, exact = place
        proxy, websocket_proxy, auth = [
            upstream and ProxyPass(self, values[key], upstream, path, exact)
            for key, upstream in zip(PROXY_PASS_KEYS, upstreams)]
        replaced = frozenset(cgi_name(name) for name, _ in self.proxy_set_header)
        identity = frozenset(map(cgi_name, self.auth_request_headers))
        withheld = HOP_BY_HOP | GENERATED_FIELDS | identity
        added = {name.lower() for name, value in self.add_header
                 if name.lower() != b"set-cookie" or not value.text}
        response_withheld = (HOP_BY_HOP - PASSED_TO_CLIENT).union(added)
        vars(self).update(
            name=name, hosts=hosts, path=path, exact=exact, passwords=passwords,
            proxy=proxy, websocket_proxy=websocket_proxy or proxy, auth=auth,
            replaced=replaced, identity=identity, withheld=withheld | replaced,
            open=not (self.allow or self.deny or self.allowed_origins is not None
                      or passwords or auth),
            auth_withheld=(withheld | AUTH_REQUEST_FIELDS) - CREDENTIALS,
            response_withheld=response_withheld,
            response_examined=response_withheld | REDIRECT_FIELDS)

    def proxy_for(self, upgrade):
        """Return the ProxyPass for a request with this Upgrade (or None), None for `return`."""
        return self.websocket_proxy if upgrade and upgrade.websocket else self.proxy

    def matches(self, path):
        """Return True if a decoded path is this one, or below it; a segment ends at / or ;."""
        if self.exact:
            return path == self.path
        end = len(self.path)
        return path.startswith(self.path) and (
            self.path.endswith("/") or path[end:end + 1] in ("", "/", ";"))

    def rewrite(self, request, uri):
        """Return the target for the backend as bytes: as it came, or with the prefix replaced.

        uri: of proxy_pass, replaces the matched prefix as in nginx, counted in the raw bytes.
        """
        if uri is None or request.target == b"*":
            return request.target
        path, question, query = request.target.partition(b"?")
        rest = b"" if self.exact else path[raw_length(path, self.path):]
        return uri + rest + question + query

    def adds_slash(self):
        """Return True if a request for /app is redirected to /app/ in this [location /app/].

        Relative links of its page would miss a prefix that a URI replaces (nginx redirects as
        well). Where the path stays, the backend decides: some redirect the other way.
        """
        return bool(self.proxy and self.proxy.uri) and not self.exact

    def slash_added(self, request):
        """Return the target with the / that its path lacks as bytes, None if it lacks none.

        Only the query is the client's.
        """
        if request.path + "/" != self.path or not self.adds_slash():
            return None
        _, question, query = request.target.partition(b"?")
        return urllib.parse.quote(self.path).encode() + percent_encode(
            question + query, NOT_PRINTABLE)


class ProxyPass:
    """The target of a proxy_pass, ready for use.

    context: SSLContext, None for http. uri: bytes that replace the matched prefix, or None.
    prefix: X-Forwarded-Prefix, or b"". redirects: RedirectRewriter, None without proxy_redirect.
    """

    __slots__ = ("upstream", "context", "uri", "prefix", "redirects")

    def __init__(self, settings, target, upstream, path, exact):
        self.upstream = upstream
        self.context = backend_context(settings) if target.tls else None
        self.uri = None if target.uri is None else target.uri.encode()
        self.prefix = forwarded_prefix(path, target.uri) if target.uri and not exact else b""
        self.redirects = (RedirectRewriter(target, upstream.servers, path, exact)
                          if settings.proxy_redirect == "default" else None)


PATH_UNIT = re.compile(br"(?:/|%2[Ff])+|%[0-9A-Fa-f]{2}|[^/%]")  # what makes up a byte of a path
ABSOLUTE_FORM = re.compile(br"(?i)(?:http|ws)(s?)://([^/?#]+)")    # RFC 9112 3.2.2
BAD_ESCAPE = re.compile(br"%(?![0-9A-Fa-f]{2})")
DOT_SEGMENT = re.compile(br"/\.\.?(?:[/;]|\Z)")
CONTROL_BYTE = re.compile(br"[\x00-\x1f\x7f]")
UNUSUAL = re.compile(br"//|/\.|[%;\\\x80-\xff]")  # all other paths can be read in one way only
SLASHES = re.compile(br"//+")
READINGS = (  # what some programs make of a path, and others do not
    (re.compile(br"(?s)[?#].*"), b""),     # those that decode it before they split it
    (re.compile(br"\\"), b"/"),            # Windows
    (re.compile(br";[^/]*"), b""),         # Java servlets: path parameters (RFC 3986 3.3)
    (re.compile(br"\A//+[^/]*"), b""),     # the URL parsers of browsers, Node and Python: a host
)


def split_target(method, target, authority):
    """Return a request-target (RFC 9112 3.2) as (target, paths): for the backend, for routing.

    target: bytes as they came, absolute-form without scheme and authority, which must be that of
    Host. paths: see read_path. Raise HTTPError 400 for what is not a target of this method.
    """
    absolute = not target.startswith(b"/") and ABSOLUTE_FORM.match(target)
    if absolute:
        origin = (b"http%s://%s" % absolute.groups()).decode("latin-1").lower()
        if not same_origin(origin, authority):  # which knows the default ports
            raise HTTPError(400, "bad_request", "the authority of the request-target is not Host")
        target = target[absolute.end():]
        if method == b"OPTIONS" and not target:
            target = b"*"  # RFC 9112 3.2.4
        elif not target.startswith(b"/"):
            target = b"/" + target
    if target == b"*" and method == b"OPTIONS":
        return target, ("/",)
    if not target.startswith(b"/") or b"#" in target:
        raise HTTPError(400, "bad_request", "invalid request-target %s" % printable(
            mask_query(target[:80])))
    return target, read_path(target.partition(b"?")[0])


# The path of a location is compared with the %-decoded path of the request, // and %2F counting
# as /, while the backend gets the bytes that came. Programs disagree on some paths, and each
# disagreement is a way past a guard on /admin/: //x/admin/ to those that take x for a host,
# /;x/admin/ or /admin;x/ to those that drop parameters, /admin%5C on Windows, /adm%FFin/ to those
# that drop bytes that are not UTF-8. So a path has one reading by which its location is chosen,
# and perhaps others: the checks of the locations that these belong to must be passed as well.
# A dot segment is refused in every reading. Not covered are backends that fold case or decode
# twice: they need the guard in [location /].


def read_path(raw):
    """Return the readings of a raw path as a tuple of str; the first is the one for routing.

    They are decoded as UTF-8 with surrogateescape. Raise HTTPError 400 if the path is invalid or
    has a dot segment.
    """
    if not UNUSUAL.search(raw):
        return (raw.decode("ascii"),)
    if BAD_ESCAPE.search(raw):
        raise HTTPError(400, "bad_request", "invalid percent-encoding in the path")
    forms = other_readings(list(map(urllib.parse.unquote_to_bytes, other_readings([raw]))))
    if b"\\" in raw or CONTROL_BYTE.search(forms[0]):
        raise HTTPError(400, "bad_request", "backslash or control character in the path")
    forms += [form.decode("utf-8", "ignore").encode() for form in forms]  # as bottle does
    if any(map(DOT_SEGMENT.search, forms)):
        raise HTTPError(400, "bad_request", "dot segment in the path")
    merged = [SLASHES.sub(b"/", form) or b"/" for form in forms]
    return tuple(dict.fromkeys(form.decode("utf-8", "surrogateescape") for form in merged))


def other_readings(forms):
    """Return forms of a path, followed by what READINGS make of them."""
    for pattern, replacement in READINGS:
        forms = forms + [pattern.sub(replacement, form) for form in forms if pattern.search(form)]
    return forms


def raw_length(raw, prefix):
    """Return how many bytes of a raw path make up this prefix of the decoded path."""
    length = 0
    for unit in itertools.islice(PATH_UNIT.finditer(raw), len(prefix.encode())):
        length = unit.end()
    return length


# --------------------------------------------------------------- Access control

# An address as some proxies write it, with a port: [v6]:port or v4:port.
FORWARDED_PORT = re.compile(r"^\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?$|^([0-9.]+):[0-9]{1,5}$")


def real_client(server, client, fields):
    """Return the address of the real client: the one that a trusted proxy names, else the peer."""
    if server.real_ip_header == "proxy_protocol":
        return client.peer
    named = ([fields.get(b"x-real-ip") or b""] if server.real_ip_header == "X-Real-IP"
             else fields.tokens(b"x-forwarded-for"))
    found = client.peer
    for part in reversed(named):  # from the right: the left end is what the client claims
        address = forwarded_address(part)
        if address is None:
            break
        found = str(address)
        if not trusted(server.set_real_ip_from, found):
            break
    return found


def forwarded_address(element):
    """Return an element of X-Forwarded-For as ip_address or 'unix:', None for anything else.

    nginx writes 'unix:' for a peer on a Unix socket.
    """
    text = element.strip(b" \t").decode("latin-1")
    return "unix:" if text == "unix:" else parse_ip(FORWARDED_PORT.sub(r"\1\2", text))


@functools.lru_cache(1024)
def parse_ip(text):
    """Return an address as ip_address, IPv4-mapped IPv6 as IPv4; None if it is not an address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def narrowest(networks, text):
    """Return the prefix length of the narrowest network that contains an address, or -1.

    networks: see parse_networks. text: the address, or 'unix:', of which 'all' is the wider.
    """
    if not networks:
        return -1
    address = parse_ip(text)
    if address is None:
        words = ("all", "unix:") if text == "unix:" else ()
        return max((words.index(word) for word in words if word in networks), default=-1)
    return max((network.prefixlen for network in networks
                if not isinstance(network, str) and address in network), default=-1)


def trusted(networks, text):
    """Return True if an address (as text, or 'unix:') is in one of these networks."""
    return narrowest(networks, text) >= 0


def check_address(location, address):
    """Raise HTTPError 403 if allow and deny refuse an address.

    The narrowest network that contains it decides, deny on a tie; with allow set, an address
    in none is refused. So `allow = 10.0.0.0/8` with `deny = all` is what it is in nginx.
    """
    if not location.allow and not location.deny:
        return
    allowed = narrowest(location.allow, address)
    if (location.allow and allowed < 0) or narrowest(location.deny, address) >= max(allowed, 0):
        raise HTTPError(403, "access_denied", "access denied by allow/deny")


ORIGIN_LIMIT = 512  # bytes; a host name has 253 at most


def check_origin(location, request, client):
    """Raise HTTPError 403 if the Origin of a request is not in allowed_origins (RFC 6455 10.2).

    Browsers send the origin of the page, and its scripts cannot change that. A request without
    Origin is not a cross-site request of a browser and passes. `same` is http or https with the
    host and port of Host, or of X-Forwarded-Host where a trusted proxy sends it.
    """
    origins = request.fields.get_all(b"origin")
    if location.allowed_origins is None or not origins:
        return
    named = client.trusted and request.fields.get(b"x-forwarded-host")
    host = named.partition(b",")[0].strip() if named else request.authority
    origin = origins[0].decode("latin-1").lower()
    if len(origins) > 1 or len(origin) > ORIGIN_LIMIT or not any(
            same_origin(origin, host) if allowed == "same"
            else allowed.fullmatch(origin)
            for allowed in location.allowed_origins):
        raise HTTPError(403, "origin_denied", "Origin %s is not in allowed_origins; Host is %s" % (
            printable(b", ".join(origins)[:ORIGIN_LIMIT]), printable(host)))


def same_origin(origin, host):
    """Return True if an origin (lower case) is http or https, with this host and port (bytes)."""
    scheme, _, authority = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    host = host.decode("latin-1").lower()
    return port is not None and (
        authority == host or authority + port == host or authority == host + port)


def pattern_of(glob):
    """Return a glob as a compiled pattern; each * is any text without /.

    It matches in linear time: as in fnmatch, a literal between two stars is looked for once, in
    an atomic group, which is (?=(?P<name>...))(?P=name) up to Python 3.10.
    """
    literals = list(map(re.escape, glob.split("*")))
    between = ["(?=(?P<g%d>[^/]*?%s))(?P=g%d)" % (place, literal, place)
               for place, literal in enumerate(literals[1:-1])]
    last = "[^/]*" + literals[-1] if literals[1:] else ""
    return re.compile(literals[0] + "".join(between) + last)


def check_password(location, request):
    """Raise HTTPError 401 without HTTP Basic credentials of auth_basic_user_file (RFC 7617)."""
    if location.passwords is None:
        return
    scheme, _, credentials = (request.fields.get(b"authorization") or b"").partition(b" ")
    if scheme.lower() != b"basic" or not location.passwords.accepts(credentials.strip(b" ")):
        raise HTTPError(401, "auth_required", "", (
            (b"WWW-Authenticate", b'Basic realm="wsgate", charset="UTF-8"'),))
    request.user = base64.b64decode(credentials).partition(b":")[0]


class PasswordFile:
    """An htpasswd file with hashes of the standard library; read again when it changes.

    Checking takes the same time whether the user exists or not. Hashes are slow on purpose, and
    wrong passwords cost a client nothing: a few threads compute them all, and the queue of those
    that wait is bounded.
    """

    def __init__(self, path):
        self.path = path
        self.secret = os.urandom(32)
        # The stamp of the file, {user: PasswordHash}, and of the right passwords what identifies
        # them: a slow hash is computed once for each. Replaced together, so they need no lock.
        self.loaded = None, {}, set()
        self.refresh()

    def refresh(self):
        """Read the file if it has changed. Raise OSError, or ValueError for an invalid line."""
        stamp = file_stamp(self.path)
        if stamp == self.loaded[0]:
            return
        hashes = {}
        with open(self.path, "rb") as file:
            lines = re.sub(br"\A\xef\xbb\xbf", b"", file.read()).splitlines()
        for number, line in enumerate(lines, 1):
            user, _, rest = line.strip().partition(b":")
            if user and not user.startswith(b"#"):
                try:
                    hashes[user] = parse_hash(rest.partition(b":")[0])  # then a comment
                except ValueError as error:
                    raise ValueError("%s:%d: %s" % (self.path, number, error))
        self.loaded = stamp, hashes, set()

    def accepts(self, credentials):
        """Return True if base64 of user:password is right. Raise HTTPError 503 if too busy."""
        try:
            self.refresh()
        except (OSError, ValueError) as error:
            log.error("auth_basic_user_file: %s; keeping the current one", error)
        _, hashes, known = self.loaded
        digest = hmac.new(self.secret, credentials, "sha256").digest()
        if digest in known:
            return True
        try:
            user, _, password = base64.b64decode(credentials, validate=True).partition(b":")
        except ValueError:
            return False
        dearest = max(hashes.values(), default=NO_HASH)
        if not HASHES_PENDING.acquire(blocking=False):
            raise HTTPError(503, "auth_unavailable", "too many passwords to check", retry_after())
        try:
            right = HASHING.submit(verify_password, hashes.get(user), dearest, password).result()
        finally:
            HASHES_PENDING.release()
        if right:
            if len(known) >= 1000:
                known.clear()
            known.add(digest)
        return right


def file_stamp(path):
    """Return what changes when a file does, also when it cannot be read any more."""
    try:
        info = os.stat(path)
    except OSError as error:
        return error.errno
    return info.st_mtime_ns, info.st_size, info.st_ino


SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}  # 16 MiB and about 40 ms
HASHING = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
HASHES_PENDING = threading.BoundedSemaphore(16 * (os.cpu_count() or 1))  # under a second of work


class PasswordHash(collections.namedtuple("PasswordHash", "scrypt digest salt")):
    """The hash in a line of an htpasswd file. scrypt: whether it is {SCRYPT}, which is slow."""

    __slots__ = ()

    def matches(self, password):
        """Return True if this is the hash of a password (bytes)."""
        digest = (hashlib.scrypt(password, salt=self.salt, **SCRYPT) if self.scrypt
                  else hashlib.sha1(password + self.salt).digest())
        return hmac.compare_digest(digest, self.digest)


NO_HASH = PasswordHash(False, bytes(20), b"")  # of a file without users


def parse_hash(text):
    """Return {SCHEME}base64 as a PasswordHash; raise ValueError for what cannot be checked."""
    match = require(re.fullmatch(br"\{(SHA|SSHA|SCRYPT)\}(.*)", text),
                    "unsupported password hash (expected {SCRYPT}, {SSHA} or {SHA}, as printed by"
                    " wsgate.py --hash-password)")
    scheme, scrypt = match.group(1), match.group(1) == b"SCRYPT"
    try:
        data = base64.b64decode(match.group(2), validate=True)
    except ValueError:
        raise ValueError("invalid base64 in the password hash")
    require(not scrypt or hasattr(hashlib, "scrypt"),
            "{SCRYPT} is not supported by this Python (expected {SSHA})")
    digest, salt = (data[16:], data[:16]) if scrypt else (data[:20], data[20:])
    require(len(digest) == (64 if scrypt else 20) and not (scheme == b"SHA" and salt),
            "password hash of the wrong length")
    return PasswordHash(scrypt, digest, salt)


def hash_password(password):
    """Return a hash of a password (bytes) for an htpasswd file, with a new salt.

    It is a {SCRYPT} hash, or {SSHA} where this Python has no scrypt.
    """
    salt = os.urandom(16)
    if not hasattr(hashlib, "scrypt"):
        return b"{SSHA}" + base64.b64encode(hashlib.sha1(password + salt).digest() + salt)
    return b"{SCRYPT}" + base64.b64encode(salt + hashlib.scrypt(password, salt=salt, **SCRYPT))


def verify_password(stored, dearest, password):
    """Return True if a password (bytes) is that of a PasswordHash, or of None.

    What is wrong takes the time of the dearest hash of the file, so that the time does not show
    which users there are.
    """
    use_all_processors()  # hashlib releases the GIL
    right = stored is not None and stored.matches(password)
    if not right and (stored is None or stored.scrypt < dearest.scrypt):
        dearest.matches(password)
    return right


# -------------------------------------------------------------------- Upstreams
#
# As in nginx, max_fails failures within fail_timeout make a server unavailable for
# fail_timeout. After that one request tries it: a failure makes it unavailable again,
# a success ends that. Unavailable servers are used only if no other is left, backups
# only if no server without that mark is available. A name with several addresses is
# treated alike: the address that worked last is tried first, those that failed within
# fail_timeout last.


class Upstream:
    """A group of servers and the method that distributes requests among them."""

    def __init__(self, name, servers, balance):
        self.name = name
        self.servers = servers
        self.balance, _, cookie = balance.partition(" ")
        self.cookie = cookie.encode()  # for balance = cookie NAME
        self.hashed = len(servers) > 1 and self.balance in ("ip_hash", "cookie")
        self.simple = len(servers) == 1 and not (servers[0].down or servers[0].max_conns)
        self.lock = threading.Lock()   # guards the Health of all servers, and sessions
        # {value of the cookie: name of the server that has set it}, the oldest first
        self.sessions = collections.OrderedDict()

    def inherit_health(self, old):
        """Share the Health of the servers that the Upstream of the old configuration has too."""
        self.lock, self.sessions = old.lock, old.sessions
        known = {server.name: server.health for server in old.servers}
        for server in self.servers:
            server.health = known.get(server.name, server.health)

    def hash_key(self, client, fields):
        """Return what ip_hash and cookie hash, as bytes: the cookie, else the client's address."""
        for value in fields.get_all(b"cookie") if self.cookie else ():
            for pair in value.split(b";"):
                name, _, content = pair.strip(b" \t").partition(b"=")
                if name == self.cookie and content:
                    return content
        return client.encode()

    SESSIONS = 10000  # remembered, each of a value of at most 256 bytes

    def remember_session(self, response, server):
        """Send further requests with the cookie that a response sets to the same server.

        A session that a server has begun by a response (socket.io) is known there alone.
        """
        for value in response.fields.get_all(b"set-cookie") if self.cookie else ():
            name, _, content = value.partition(b";")[0].strip(b" \t").partition(b"=")
            if name == self.cookie and 0 < len(content) <= 256:
                with self.lock:
                    self.sessions[content] = server.name
                    while len(self.sessions) > self.SESSIONS:
                        self.sessions.popitem(last=False)

    def servers_for(self, client, fields):
        """Return the servers; for ip_hash and cookie in the order in which this client tries them.

        The first is the one that has begun its session.
        """
        if not self.hashed:
            return self.servers
        key = self.hash_key(client, fields)
        with self.lock:
            begun_at = self.sessions.get(key)
        return sorted(self.servers, key=lambda each: (
            each.name != begun_at, -rendezvous(key, each.name, each.weight)))

    def pick(self, servers, tried, preferred=None):
        """Choose a server that is not in tried and count it as active; return None if none is left.

        servers: those of servers_for().
        """
        with self.lock:
            chosen = (servers[0] if self.simple and not tried
                      else self.choose(servers, tried, preferred))
            if chosen:
                health = chosen.health
                health.active += 1
                health.selected += 1
                if health.down_until:  # others wait for the result of this try
                    health.down_until = time.monotonic() + chosen.fail_timeout
            return chosen

    def choose(self, servers, tried, preferred):
        """Return the server that pick() chooses, None if none is left; the lock is held."""
        group = [each for each in servers
                 if not each.down and each not in tried and not each.full()]
        if len(group) > 1:
            group = self.most_available(group, time.monotonic())
        if not group:
            return None
        if self.hashed or len(group) == 1:
            return group[0]
        return preferred if preferred in group else self.next_in_turn(group)

    def most_available(self, servers, now):
        """Return those of servers that are up, else backups that are up, else all; lock held."""
        up = [each for each in servers if each.available(now)]
        return [each for each in up if not each.backup] or up or servers

    def next_in_turn(self, group):
        """Return the next server of a group by least_conn or round_robin; the lock is held."""
        if self.balance == "least_conn":
            least = min(each.load() for each in group)
            group = [each for each in group if each.load() == least]
        # Smooth weighted round robin, as in nginx: a a b a, not a a a b.
        for each in group:
            each.health.current_weight += each.weight
        chosen = max(group, key=lambda each: each.health.current_weight)
        chosen.health.current_weight -= sum(each.weight for each in group)
        return chosen

    def release(self, server):
        """Count one exchange less."""
        with self.lock:
            server.health.active -= 1

    def failed(self, server, error):
        """Count a failure; log it if it makes the server unavailable. error: a BackendError."""
        health, now = server.health, time.monotonic()
        with self.lock:
            if not health.failures or now - health.first_fail > server.fail_timeout:
                health.fails, health.first_fail = 0, now
            health.fails += 1
            health.failures += 1
            health.last_fail = now
            goes_down = health.down_since is None and health.fails >= max(1, server.max_fails)
            if goes_down:
                health.down_since = now
            if health.down_since is not None and server.max_fails:
                health.down_until = now + server.fail_timeout
        if goes_down:
            alone = len(self.servers) == 1 or not server.max_fails
            log.warning("backend %s failed: %s: %s%s", self.title(server), error.reason, error,
                        "" if alone else "; unavailable for %gs" % server.fail_timeout)

    def succeeded(self, backend):
        """Forget the failures of a server that responded; log it if it was unavailable.

        The response of a connection that is older than the last failure proves nothing.
        """
        health = backend.server.health
        if not health.failures:
            return
        with self.lock:
            if backend.since < health.last_fail:
                return
            failures, since = health.failures, health.down_since
            health.fails = health.failures = 0
            health.down_since, health.down_until = None, 0.0
        if since is not None:
            log.warning("backend %s is up again after %.1fs (failures: %d)",
                        self.title(backend.server), time.monotonic() - since, failures)

    def title(self, server):
        """Return the server's name for the log, with that of its group."""
        return server.name if server.name == self.name else "%s of %s" % (server.name, self.name)


def rendezvous(key, name, weight):
    """Return the score of a server for a key, bytes (highest random weight hashing, weighted).

    wsgates that share no state choose alike, and when a server fails only its clients move.
    """
    digest = hashlib.blake2b(key + b" " + name.encode(), digest_size=8).digest()
    return -weight / math.log((int.from_bytes(digest, "big") + 1) / (2 ** 64 + 1))


class Attempts:
    """The servers tried for one request, at most proxy_next_upstream_tries of them.

    No other is tried once proxy_next_upstream_timeout has passed. Used by one thread.
    """

    tried = ()               # Servers
    server = None            # the last one tried
    name = "-"               # its name, for the access log
    failures = 0             # how many of them failed
    error = None             # the BackendError of the last one that did

    def __init__(self, proxy, location, client, fields):
        """proxy: a ProxyPass. client: its address. fields: the Headers of the request."""
        self.upstream = proxy.upstream
        self.context = proxy.context
        self.location = location
        self.servers = self.upstream.servers_for(client, fields)
        self.begun = time.monotonic()

    def connect(self, preface=b"", kept=None):
        """Connect to the next server, and to another one if that fails; return a Backend.

        preface: bytes to send before TLS. kept: a Backend to use instead where it fits. Raise the
        last BackendError when no server is left, or HTTPError 503 if there was none at all.
        """
        location = self.location
        while True:
            server = self.next_server(kept and kept.server)
            fits = (server, self.context, location.proxy_ssl_name, preface)
            if kept and kept.fits == fits:
                return kept
            try:
                return Backend(self.upstream, server, server.connect(
                    location.proxy_connect_timeout, self.context, location.proxy_ssl_name,
                    preface), fits)
            except BaseException as error:
                self.upstream.release(server)
                if not isinstance(error, BackendError):
                    raise
                self.failed(error)

    def next_server(self, preferred=None):
        """Return the server to try next, counted as active; raise why there is none."""
        server = None
        if not self.tried or self.may_try_another():
            server = self.upstream.pick(self.servers, self.tried, preferred)
        if server:
            self.tried += (server,)
            self.server, self.name = server, server.name
            return server
        if self.error:
            raise self.error
        full = any(each.full() for each in self.upstream.servers)
        raise HTTPError(503, "conn_limit" if full else "no_backend",
                        "all servers of %s are down or have max_conns connections"
                        % self.upstream.name, retry_after())

    def may_try_another(self):
        """Return True while proxy_next_upstream_tries and _timeout allow another server."""
        tries, seconds = (self.location.proxy_next_upstream_tries,
                          self.location.proxy_next_upstream_timeout)
        return ((not tries or len(self.tried) < tries)
                and (not seconds or time.monotonic() < self.begun + seconds))

    def forget(self, server):
        """Let a server be tried again: it had closed a connection that was kept."""
        self.tried = tuple(each for each in self.tried if each is not server)

    def failed(self, error):
        """Count a BackendError of the last server tried.

        A response that is late or invalid counts for the address alone.
        """
        if error.sent:  # it had accepted the connection
            self.server.address_failed(self.server.health.last_address)
        if error.retry or not error.sent:
            self.failures += 1
            self.error = error
            self.upstream.failed(self.server, error)


class Backend:
    """A connection to a server, counted in its Health until it is closed or kept."""

    __slots__ = ("upstream", "server", "stream", "since", "fits", "deadline", "relay")

    def __init__(self, upstream, server, stream, fits=None):
        self.upstream = upstream
        self.server = server
        self.stream = stream
        self.since = time.monotonic()
        self.fits = fits          # what a request must ask for to be sent over it: see Attempts
        self.deadline = None      # while it is kept: until when
        self.relay = None         # once it was kept: its HTTPRelay

    def close(self):
        """Close the connection and count it no longer."""
        self.stream.close()
        self.upstream.release(self.server)

    def keep(self, seconds, relay):
        """Count the connection no longer, but leave it open for the next request."""
        self.upstream.release(self.server)
        self.deadline, self.relay = Deadline(seconds), relay

    def alive(self):
        """Return True if a kept connection can be used: not closed, and no byte left on it."""
        return self.deadline.at > time.monotonic() and self.relay.silent()


class Server:
    """One server of an upstream: its address, its parameters and its Health."""

    ADDRESSES = 16  # addresses of a name to try

    def __init__(self, address, weight=1, max_fails=1, fail_timeout=10.0, max_conns=0,
                 backup=False, down=False):
        self.address = address
        self.name = show_address(address)
        self.fixed = fixed_address(address)
        self.weight = weight
        self.max_fails = max_fails
        self.fail_timeout = fail_timeout
        self.max_conns = max_conns
        self.backup = backup
        self.down = down
        self.health = Health()

    def available(self, now):
        """Return False while max_fails is reached. now: time.monotonic()"""
        return now >= self.health.down_until

    def full(self):
        """Return whether the server has max_conns connections."""
        return 0 < self.max_conns <= self.health.active

    def load(self):
        """Return the connections per weight, which least_conn compares."""
        return self.health.active / self.weight

    def addresses(self, deadline):
        """Return [(family, address)], resolved now; raise OSError, UnicodeError or TimedOut."""
        return self.fixed or resolver.resolve(self.address.host, self.address.port, deadline)

    def connect(self, timeout, context=None, tls_name=None, preface=b""):
        """Resolve, connect and start TLS, all within timeout; return a Stream.

        context: for TLS, verified against tls_name or the host. preface: bytes to send before TLS.
        Raise BackendError, or HTTPError 503 if this process has no descriptor left.
        """
        deadline = Deadline(timeout)
        stream = self.connect_to_any(deadline)
        try:
            if preface:
                stream.write_all(preface, deadline)
            if context:
                stream.start_tls(context, deadline, server_hostname=tls_name or self.address.host)
            return stream
        except (OSError, ValueError, TimedOut) as error:  # ValueError: CertificateError, Python 3.6
            stream.close()
            self.address_failed(self.health.last_address)
            if timed_out(error):
                raise BackendError(504, "backend_timeout", "%s: no TLS handshake within"
                                   " proxy_connect_timeout" % self.name)
            raise BackendError(502, "backend_tls" if context else "backend_closed",
                               "%s: %s" % (self.name, describe_tls_error(error)))

    def connect_to_any(self, deadline):
        """Connect to the first address that accepts; return a Stream. Raise as connect() does."""
        try:
            addresses = self.in_order(self.addresses(deadline))
        except (OSError, UnicodeError, TimedOut) as error:
            raise BackendError(502, "backend_unresolved",
                               "%s: %s" % (self.name, describe_error(error)))
        for place, (family, address) in enumerate(addresses):
            try:
                stream = connect_socket(family, address, deadline, len(addresses) - place)
            except (OSError, TimedOut) as error:
                if getattr(error, "errno", None) in EXHAUSTED:  # not the server's fault
                    raise HTTPError(503, "conn_limit", "cannot connect to a backend: %s"
                                    % describe_error(error), retry_after())
                failure = error
                self.address_failed(address)
            else:
                self.health.last_address = address
                return stream
        if timed_out(failure):
            raise BackendError(504, "backend_timeout",
                               "%s: no connection within proxy_connect_timeout" % self.name)
        refused = isinstance(failure, ConnectionRefusedError)
        raise BackendError(502, "backend_refused" if refused else "backend_unreachable",
                           "%s: %s" % (self.name, describe_error(failure)))

    def in_order(self, addresses):
        """Return the (family, address) pairs to try, the most promising ones first."""
        if len(addresses) == 1:
            return addresses
        health, now = self.health, time.monotonic()
        return sorted(addresses, key=lambda each: (
            health.failed_addresses.get(each[1], 0.0) > now,
            each[1] != health.last_address))[:self.ADDRESSES]

    def address_failed(self, address):
        """Remember that an address failed; it is tried last for fail_timeout."""
        now = time.monotonic()
        failed = {each: until for each, until in self.health.failed_addresses.items()
                  if until > now}
        failed[address] = now + self.fail_timeout
        self.health.failed_addresses = failed


class Health:
    """What is known of a server; shared by old and new configuration.

    Guarded by the lock of the Upstream, except the last two: they only order addresses and
    are replaced as a whole, so that an update that is lost, or meets the address to which
    another thread has connected meanwhile, costs one wrong order.
    """

    __slots__ = ("active", "selected", "fails", "first_fail", "last_fail", "failures",
                 "down_since", "down_until", "current_weight", "last_address", "failed_addresses")

    def __init__(self):
        self.active = 0              # exchanges and tunnels in progress
        self.selected = 0            # how often it was chosen
        self.fails = 0               # within fail_timeout, since first_fail
        self.first_fail = 0.0        # time.monotonic()
        self.last_fail = 0.0         # time.monotonic()
        self.failures = 0            # since the last success
        self.down_since = None       # time.monotonic() at which max_fails was reached, None if up
        self.down_until = 0.0        # time.monotonic() of the next try, 0 if up
        self.current_weight = 0      # of the smooth weighted round robin
        self.last_address = None     # the address that accepted last
        self.failed_addresses = {}   # address: time.monotonic() until which it is tried last


# --------------------------------------------------------- Resolving, connecting


class Resolver:
    """getaddrinfo() with a deadline, in threads of its own, because it cannot be interrupted.

    A thread counts until getaddrinfo() returns, however long that takes. Lookups of the same
    name at the same time share one thread.
    """

    THREADS = 32

    def __init__(self):
        self.free = threading.Semaphore(self.THREADS)
        self.lock = threading.Lock()  # guards lookups
        self.lookups = {}             # (host, port): Future of a lookup in progress

    def resolve(self, host, port, deadline):
        """Return [(family, address)]; raise OSError, UnicodeError, or TimedOut at the deadline."""
        with self.lock:
            lookup = self.lookups.get((host, port))
        try:
            lookup = lookup or self.start(host, port, deadline)
            return lookup.result(min(deadline.remaining(), LONGEST_POLL))
        except (TimedOut, concurrent.futures.TimeoutError):
            raise TimedOut("the resolver did not respond in time")

    def start(self, host, port, deadline):
        """Start a lookup as soon as a thread is free; return its Future."""
        if not self.free.acquire(timeout=min(deadline.remaining(), LONGEST_POLL)):
            raise TimedOut()
        new = concurrent.futures.Future()
        with self.lock:
            lookup = self.lookups.setdefault((host, port), new)
        if lookup is not new:  # another thread was faster
            self.free.release()
            return lookup
        try:
            threading.Thread(target=self.look_up, args=(host, port, lookup), name="resolver",
                             daemon=True).start()
        except RuntimeError:
            self.end(host, port)
            lookup.set_exception(OSError(errno.EAGAIN, "cannot start a thread"))
        return lookup

    def look_up(self, host, port, lookup):
        """Call getaddrinfo() and leave its result in lookup; runs in a thread of its own."""
        found = error = None
        try:
            found = [(family, address) for family, _, _, _, address in socket.getaddrinfo(
                host, port, 0, socket.SOCK_STREAM)]
        except Exception as failure:  # raised where the result is awaited
            error = failure
        self.end(host, port)
        if error:
            lookup.set_exception(error)
        else:
            lookup.set_result(found)

    def end(self, host, port):
        """Remove a lookup and count its thread no longer."""
        with self.lock:
            del self.lookups[host, port]
        self.free.release()


resolver = Resolver()  # for all threads
RESOLVE_TIMEOUT = 5.0  # seconds for all warnings of names at start and in -t


def fixed_address(address):
    """Return [(family, address)] for a Unix socket or an IP address, None for a host name."""
    if address.path:
        return [(socket.AF_UNIX, address.path)]
    if parse_ip(address.host) is None or "%" in address.host:
        return None
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return [(family, (address.host, address.port))]


# Made non-blocking by socket(), where there is SOCK_NONBLOCK, not by another system call.
NON_BLOCKING_STREAM = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
CONNECTING = frozenset((errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK))


def connect_socket(family, address, deadline, ways=1):
    """Return a connected Stream; raise OSError or TimedOut.

    ways: how many addresses share the time until the deadline, with this one, the first of them.
    """
    stream = Stream(socket.socket(family, NON_BLOCKING_STREAM))
    try:
        result = stream.sock.connect_ex(address)
        if result == errno.EAGAIN and isinstance(address, str):  # a Unix socket
            raise TimedOut("the backlog of the socket is full")
        if result in CONNECTING:
            result = stream.sock.connect_ex(address)  # on loopback it is connected by now
        if result in CONNECTING:
            stream.wait(POLLOUT, Deadline(deadline.remaining() / ways))
            result = stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if result and result != errno.EISCONN:
            raise OSError(result, os.strerror(result))
        return stream
    except BaseException:
        stream.close()
        raise


def timed_out(error):
    """Return whether an exception of a connect or TLS handshake means that time was up."""
    return isinstance(error, TimedOut) or getattr(error, "errno", None) == errno.ETIMEDOUT


# ------------------------------------------------------------------- Forwarding
#
# Hop-by-hop fields describe one connection and end here: Connection, the fields that
# it lists, and those of HOP_BY_HOP. wsgate writes its own for the other connection,
# and last the fields that backends trust. A client that lists X-Forwarded-For or
# Authorization in Connection, to have them removed, would be another client to the
# backend (CVE-2022-31813, CVE-2024-45410): such a request is refused when it is
# parsed. Everything else passes as received. What depends on the location alone, such
# as the sets of names, is computed when the configuration is loaded.

HOP_BY_HOP = frozenset(  # fields of one connection, removed in both directions (RFC 9110 7.6.1)
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization"
    b" proxy-authentication-info te trailer transfer-encoding upgrade http2-settings".split())
PASSED_TO_CLIENT = frozenset(  # ... but these of a response concern the client
    b"trailer proxy-authenticate".split())
MANAGED_FIELDS = frozenset(  # what proxy_set_header and add_header cannot set: framing and upgrade
    b"connection keep-alive proxy-connection te trailer transfer-encoding content-length"
    b" upgrade http2-settings sec-websocket-accept".split())
GENERATED_FIELDS = frozenset(  # written for the backend from what wsgate knows of the client
    b"x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-prefix x-real-ip"
    b" x-ssl-client-s-dn".split())
FORWARDED_FIELDS = frozenset(  # believed of trusted proxies only, as is every X-Forwarded-*
    b"x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port x-forwarded-server"
    b" x-forwarded-prefix x-forwarded-ssl x-forwarded-user x-real-ip forwarded"
    b" x-original-url x-original-uri x-original-method x-rewrite-url".split())
HANDSHAKE_FIELDS = frozenset(  # of a WebSocket handshake (RFC 6455 4.1)
    b"sec-websocket-key sec-websocket-version sec-websocket-protocol"
    b" sec-websocket-extensions".split())
PROTECTED_FIELDS = FORWARDED_FIELDS | GENERATED_FIELDS | HANDSHAKE_FIELDS | frozenset(
    # never to be named in Connection, nor sent as trailers
    b"host content-length transfer-encoding authorization cookie origin".split())
CREDENTIALS = frozenset((b"authorization", b"cookie"))  # auth_request decides by them
AUTH_REQUEST_FIELDS = frozenset(  # not for auth_request, which gets no body and no handshake
    b"content-length expect sec-websocket-key sec-websocket-version sec-websocket-extensions"
    b" x-original-url x-original-uri x-original-method".split())

CONNECTION_OPTIONS = frozenset(  # elements of Connection that are not names of fields
    b"keep-alive close upgrade".split())

# Field names as CGI, WSGI and PHP applications see them: without case, and one character for
# whatever is neither letter nor digit. What a client must not set is compared in this form.
CGI_NAME = bytes(ord(chr(each).lower()) if chr(each).isalnum() and each < 128 else ord("-")
                 for each in range(256))


def cgi_name(name):
    """Return a field name (bytes) in the form in which names are compared."""
    return name.translate(CGI_NAME)


def request_head_for_backend(request, location, client, server, upgrade, keep=False):
    """Return the head for a backend server as bytes.

    upgrade: the Upgrade to ask for, or None. keep: whether the connection may be kept.
    """
    proxy = location.proxy_for(upgrade)
    lines = [b"%s %s HTTP/1.1\r\n" % (request.method, location.rewrite(request, proxy.uri))]
    if not request.authority and b"host" not in location.replaced:  # HTTP/1.0 may come without
        name = "localhost" if server.address.path else server.name
        lines.append(b"Host: %s\r\n" % name.encode())
    # A ProxyPass is that of one location in one configuration, by which and by the fields the
    # address of the client was found; the rest of client is that of the connection.
    made_for = proxy, request.withheld, upgrade, keep
    if request.for_backend is None or request.for_backend[0] != made_for:
        request.for_backend = made_for, b"".join(
            fields_for_backend(request, location, client, upgrade, keep))
    lines.append(request.for_backend[1])
    lines += request.identity
    for name, template in location.proxy_set_header:
        value = template.render(request, client)
        if value:
            lines.append(b"%s: %s\r\n" % (name, value))
    lines.append(b"\r\n")
    return b"".join(lines)


def fields_for_backend(request, location, client, upgrade, keep):
    """Return the field lines that depend on nothing but the request and the configuration."""
    lines = end_to_end_fields(request, location, client, request.withheld)
    if request.chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if upgrade:
        lines.append(b"Upgrade: %s\r\nConnection: %s\r\n" % upgrade[:2])
    elif not keep:
        lines.append(b"Connection: close\r\n")
    return lines + forwarded_fields(request, client, location.proxy_for(upgrade).prefix,
                                    location.replaced)


def end_to_end_fields(request, location, client, withheld):
    """Return the client's fields for a backend, as lines. withheld: names that it does not get."""
    believed, underscores = client.trusted, location.underscores_in_headers
    listed = connection_options(request.fields)
    # Long names are not remembered: a client could fill the memory with them.
    may_pass = passes if len(request.block) <= 8192 else passes.__wrapped__
    lines = [b"%s: %s\r\n" % (name, value) for name, value in request.fields
             if may_pass(name, withheld, believed, underscores)]
    if listed:
        lines = [line for line in lines if line.partition(b":")[0].lower() not in listed]
    return lines


@functools.lru_cache(1024)  # clients send the same few dozen names
def passes(name, withheld, believed, underscores):
    """Return whether a client's field of this name is passed on. See end_to_end_fields."""
    plain = name.translate(CGI_NAME)
    if plain in withheld:
        return False
    if not believed and (plain in FORWARDED_FIELDS or plain.startswith(b"x-forwarded-")):
        return False
    # Applications may take it for a field with -.
    return b"_" not in name or (underscores and plain not in PROTECTED_FIELDS)


def connection_options(fields):
    """Return the names of fields that Connection lists, in lower case, as a set."""
    listed = fields.tokens(b"connection")
    return () if CONNECTION_OPTIONS.issuperset(listed) else frozenset(listed)


def forwarded_fields(request, client, prefix, without):
    """Return the GENERATED_FIELDS as lines. without: names of those that are set otherwise."""
    scheme, host = reported_origin(request, client)
    addresses = forwarded_for(request, client)
    if client.trusted:
        prefix = b",".join(request.fields.get_all(b"x-forwarded-prefix")) + prefix
    lines = [b"X-Forwarded-For: %s\r\n" % addresses] if addresses else []
    lines.append(b"X-Forwarded-Proto: %s\r\n" % scheme)
    if host:
        lines.append(b"X-Forwarded-Host: %s\r\n" % host)
    if client.address != "unix:":
        lines.append(b"X-Real-IP: %s\r\n" % client.address.encode())
    if prefix:
        lines.append(b"X-Forwarded-Prefix: %s\r\n" % prefix)
    if client.subject:
        lines.append(b"X-SSL-Client-S-DN: %s\r\n" % client.subject)
    if without:
        return [line for line in lines if line.partition(b":")[0].lower() not in without]
    return lines


def reported_origin(request, client):
    """Return scheme and authority (bytes) of the request, as a trusted proxy reports them."""
    if not client.trusted:
        return client.scheme, request.authority
    return (request.fields.get(b"x-forwarded-proto") or client.scheme,
            request.fields.get(b"x-forwarded-host") or request.authority)


def forwarded_for(request, client):
    """Return X-Forwarded-For: the peer, after what it reports if it is trusted (bytes).

    A peer on a Unix socket, also one of a trusted proxy, has no address: applications would not
    parse it. Nor do all of them take an IPv4-mapped address for what it is.
    """
    peer = b"" if client.peer == "unix:" else client.peer.encode()
    if not client.trusted:
        return peer
    reported = b", ".join(request.fields.get_all(b"x-forwarded-for"))
    if b"unix:" in reported or b"::" in reported:
        reported = b", ".join(filter(None, map(forwarded_element, reported.split(b","))))
    return b", ".join(filter(None, (reported, peer)))


def forwarded_element(element):
    """Return an element of X-Forwarded-For for a backend: no 'unix:', IPv4 as IPv4."""
    address = forwarded_address(element)
    if isinstance(address, ipaddress.IPv4Address) and b"::" in element:
        return str(address).encode()
    return b"" if address == "unix:" else element.strip(b" \t")


def public_url(request, client):
    """Return the absolute URL that was requested, as bytes."""
    scheme, host = reported_origin(request, client)
    if scheme not in (b"http", b"https", b"ws", b"wss"):
        scheme = client.scheme
    if not HOST.fullmatch(host):
        host = request.authority or b"localhost"
    return b"%s://%s%s" % (scheme, host, b"/" if request.target == b"*" else request.target)


def auth_request_head(request, location, client):
    """Return the head of the subrequest to auth_request: no body, no handshake (bytes)."""
    lines = [b"GET %s HTTP/1.1\r\n" % (location.auth.uri or b"/")]
    if not request.authority:
        lines.append(b"Host: localhost\r\n")
    lines += end_to_end_fields(request, location, client, location.auth_withheld)
    lines += forwarded_fields(request, client, b"", ())
    lines += [b"X-Original-URL: %s\r\n" % public_url(request, client),
              b"X-Original-URI: %s\r\n" % request.target,
              b"X-Original-Method: %s\r\n" % request.method, b"Connection: close\r\n\r\n"]
    return b"".join(lines)


def identity_fields(location, response):
    """Return the auth_request_headers in a response of auth_request, as lines for the backend."""
    names = location.identity - location.replaced  # proxy_set_header has the last word
    return [b"%s: %s\r\n" % (name, value) for name, value in response.fields
            if cgi_name(name) in names]


def redirect_target(template, request, client):
    """Return the URL for a Location of wsgate's own (bytes).

    What the client put into it cannot end the field, nor turn a path into another host.
    """
    url = percent_encode(template.render(request, client), NOT_PRINTABLE)
    if url.startswith(b"/") and not template.text.startswith("//"):
        url = b"/" + url.lstrip(b"/\\")
    return url


def proxy_line(client):
    """Return the PROXY v1 line for the backend as bytes."""
    address, server = parse_ip(client.address), parse_ip(client.server_address)
    if address is None:
        return b"PROXY UNKNOWN\r\n"
    if server is None or server.version != address.version:
        server = "::1" if address.version == 6 else "127.0.0.1"
    return b"PROXY TCP%d %s %s %d %d\r\n" % (address.version, str(address).encode(),
                                             str(server).encode(), client.port, client.server_port)


def response_head_for_client(response, request, location, upgrade, keep, added=()):
    """Return the head for the client as bytes.

    keep: whether the connection stays. added: (name, value) of the fields of added_fields.
    """
    prefix = b",".join(request.fields.get_all(b"x-forwarded-prefix"))
    made_for = (location, location.proxy_for(upgrade).redirects, prefix, request.minor, keep, added)
    if response.for_client is None or response.for_client[0] != made_for:
        response.for_client = made_for, b"".join(lines_for_client(response, *made_for))
    return response.for_client[1]


def lines_for_client(response, location, redirects, prefix, minor, keep, added):
    """Return the lines of response_head_for_client().

    redirects: RedirectRewriter or None. prefix: X-Forwarded-Prefix of the request. minor: its
    version.
    """
    status, fields = response.status, response.fields
    examined, listed = location.response_examined, connection_options(fields)
    unsized = response.chunked or status < 200 or status == 204
    lines = [b"HTTP/1.1 %d %s\r\n" % (status, response.reason)]
    if not listed and not unsized and examined.isdisjoint(fields.index):
        lines.append(response.block)  # the usual case: all lines pass as they are
    else:
        lines += examined_lines(fields, listed, location, redirects, prefix, unsized)
    for pair in added:
        lines.append(b"%s: %s\r\n" % pair)
    if response.chunked and minor and status >= 200 and status != 204:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if status == 426:
        lines += [b"Upgrade: %s\r\n" % value for value in fields.get_all(b"upgrade")]
    if status == 101:
        lines += switching_fields(fields)
    elif status >= 200 and not keep:
        lines.append(b"Connection: close\r\n")
    lines.append(b"\r\n")
    return lines


def examined_lines(fields, listed, location, redirects, prefix, unsized):
    """Return the fields of a response for the client, as lines.

    listed: the names that Connection lists. unsized: the response has no length.
    """
    examined, lines = location.response_examined, []
    for name, value in fields:
        lower = name.lower()
        if lower in examined:
            if lower in location.response_withheld:
                continue
            if redirects and lower in REDIRECT_FIELDS:
                value = redirects.rewrite_field(lower, value, prefix)
        elif ((lower in listed and lower not in PROTECTED_FIELDS)
              or (unsized and lower == b"content-length")):
            continue
        lines.append(b"%s: %s\r\n" % (name, value))
    return lines


def added_fields(request, settings, client):
    """Return the fields of add_header, as (name, value) pairs.

    request: None if it could not be parsed; fields with variables are then left out.
    """
    pairs = []
    for name, template in settings.add_header:
        if request is None and "$" in template.text:
            continue
        value = template.render(request, client)
        if value:
            pairs.append((name, value))
    return pairs


REDIRECT_FIELDS = frozenset((b"location", b"content-location", b"refresh"))
# A path that stays on its host: URL parsers take //x and /\x for a host, and drop tabs.
SAFE_PATH = re.compile(br"/(?![/\\])[\x21-\x7e\x80-\xff]*")
REFRESH = re.compile(br"([^;,]*[;,][ \t]*(?:[Uu][Rr][Ll][ \t]*=[ \t]*)?['\"]?)([^'\"\t ]+)(.*)")


class RedirectRewriter:
    """proxy_redirect = default: maps what a backend redirects to into what the client can reach.

    A URL changes if it names the backend itself (proxy_pass or one of its servers), or if its
    path is below the URI that replaced the prefix (nginx: proxy_redirect default). It becomes
    a path, so that nothing of the request gets into it; where a client could take the result
    for another host, the URL stays as it is.
    """

    def __init__(self, target, servers, path, exact):
        scheme, port = (b"https", 443) if target.tls else (b"http", 80)
        names = [target.authority] + [show_address(server.address) for server in servers]
        own = b"|".join(re.escape(name) for name in authorities(names, port))
        # Without a name of its own (Unix sockets) only a path can match.
        self.own = re.compile(br"(?i)(?:%s:)?//(?:%s)(?=[/?#]|$)" % (scheme, own or b"(?!)"))
        self.uri = target.uri and target.uri.encode()
        self.prefix = percent_encode(path.encode(), PATH_BYTES)
        self.exact = exact
        # How the paths of an application begin that prepends X-Forwarded-Prefix itself.
        self.prefixed = b""
        if self.uri:
            self.prefixed = forwarded_prefix(path, target.uri) + self.uri

    def rewrite(self, url, outer):
        """Return the URL (bytes) for the client. outer: X-Forwarded-Prefix of a proxy in front."""
        match = self.own.match(url)
        if match:
            path = url[match.end():]
            path = path if path.startswith(b"/") else b"/" + path
        elif SAFE_PATH.fullmatch(url):
            path = url
        else:
            return url
        if self.uri is not None:
            path = self.restore_prefix(path, outer)
        return path if path and SAFE_PATH.fullmatch(path) else url

    def restore_prefix(self, path, outer):
        """Return the path below the location for a path below the URI, None for another path."""
        if self.prefixed != self.uri and path.startswith((self.prefixed, outer + self.prefixed)):
            return path
        if not path.startswith(self.uri) or b"?" in self.uri:
            return None
        rest = path[len(self.uri):]
        ends = rest[:1] in (b"", b"?", b"#")
        if not ends and self.exact:
            return None
        if not self.prefix.endswith(b"/"):
            if self.uri.endswith(b"/"):
                rest = b"/" + rest
            elif not ends and rest[:1] != b"/":
                return None
        return self.prefix + rest

    def rewrite_field(self, name, value, outer):
        """Return the value of one of REDIRECT_FIELDS for the client."""
        if name != b"refresh":
            return self.rewrite(value, outer)
        match = REFRESH.fullmatch(value)
        if not match:
            return value
        return match.group(1) + self.rewrite(match.group(2), outer) + match.group(3)


def authorities(names, default_port):
    """Return how URLs can write these addresses (text), as a sorted list of bytes."""
    found = set()
    for name in names:
        address = parse_address(name, default_port=default_port)
        if not address.path:
            found.add(show_address(address).encode())
            if address.port == default_port:
                found.add(show_address(address).rpartition(":")[0].encode())
    return sorted(found)


def forwarded_prefix(path, uri):
    """Return X-Forwarded-Prefix of a location whose path is replaced by uri, b"" for none.

    /app/ -> / has the prefix /app, which the application puts before its own paths.
    """
    path = path.rstrip("/") + "/"
    if path.endswith(uri):
        path = path[:-len(uri)]
    return percent_encode(path.rstrip("/").encode(), PATH_BYTES)


PATH_BYTES = re.compile(br"[^A-Za-z0-9._~!$&'()*+,;=:@/-]")  # RFC 3986 3.3: what is not a pchar
RESERVED = re.compile(br"[^A-Za-z0-9._~-]")                  # ... 2.3: not unreserved
NOT_PRINTABLE = re.compile(br"[^\x21-\x7e]")


def percent_encode(data, unsafe):
    """Return bytes with %XX for what the pattern matches."""
    return unsafe.sub(lambda match: b"%%%02X" % ord(match.group()), data)


# ----------------------------------------------------- The upgrade (RFC 6455 4)
#
# Each request is examined once, by requested_upgrade. Its result determines what the
# backend receives, what the 101 is checked against, and whether a refusal may be a
# Close frame. Whatever does not pass is forwarded without Upgrade; a 101 to that is
# unsolicited, and becomes 502. Upgrade and Connection are copied in the spelling of
# the peer, because some device servers compare them byte by byte.

HANDSHAKE_KEY = re.compile(br"[A-Za-z0-9+/]{22}(?:[A-Za-z0-9+/]{2}|[A-Za-z0-9+/]=|==)")
VERSION_NUMBER = re.compile(br"[0-9]{1,3}")                              # RFC 6455 4.1
# RFC 9110 7.8: protocol = token ["/" token]. HTTP and TLS in a tunnel would bypass every
# rule of the locations (h2c smuggling), so no name that begins like theirs passes, nor
# what does not match the grammar: a backend might read h2c in it.
OTHER_PROTOCOL = re.compile(br"(?!h2|http|tls)%s(?:/%s)?" % (TOKEN.pattern, TOKEN.pattern))


class Upgrade(collections.namedtuple("Upgrade", "protocol connection websocket key error")):
    """The upgrade that a request asks for (RFC 9110 7.8).

    protocol, connection: values of Upgrade and Connection, as the client spelled them.
    websocket: whether RFC 6455 applies. key: a valid Sec-WebSocket-Key, or None.
    error: the HTTPError for a handshake that is incomplete, or None.
    """

    __slots__ = ()


def requested_upgrade(request, location):
    """Return the Upgrade that a request asks for, None for plain HTTP (RFC 9110 7.8)."""
    fields, strict = request.fields, location.strict_handshake
    if location.upgrade == "none" or not location.websocket_proxy or not request.attempts_upgrade:
        return None
    names = fields.tokens(b"upgrade") if request.minor else ()  # no upgrade in HTTP/1.0
    connection = as_spelled(fields, b"connection", b"upgrade")
    if connection is None and not strict:
        connection = b"Upgrade"
    if not names or connection is None:
        if strict and request.method == b"GET" and fields.get_all(b"sec-websocket-key"):
            missing = HTTPError(426, "upgrade_missing", UPGRADE_MISSING, UPGRADE_TO_WEBSOCKET)
            return Upgrade(b"", b"", True, None, missing)
        return None
    if b"websocket" in names:
        if request.method != b"GET":
            return None
        key = handshake_key(request)
        return Upgrade(as_spelled(fields, b"upgrade", b"websocket"), connection, True, key,
                       handshake_error(request, key, strict))
    if location.upgrade == "any" and all(map(OTHER_PROTOCOL.fullmatch, names)):
        return Upgrade(b", ".join(fields.get_all(b"upgrade")), connection, False, None, None)
    return None


UPGRADE_TO_WEBSOCKET = ((b"Upgrade", b"websocket"),)
UPGRADE_MISSING = """\
This WebSocket handshake arrived without "Upgrade: websocket" or "Connection: upgrade". Both are
hop-by-hop fields, and a proxy in front of wsgate did not pass them on. nginx needs in its location:
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection "upgrade";"""


def handshake_key(request):
    """Return Sec-WebSocket-Key, None if it is missing or invalid.

    Valid are 24 characters of base64, whatever they decode to: some proxies make keys of
    17 bytes, and the backend decides.
    """
    key = request.fields.get(b"sec-websocket-key")
    return key if key and HANDSHAKE_KEY.fullmatch(key) else None


def handshake_error(request, key, strict):
    """Return the HTTPError for a handshake that is incomplete, else None (RFC 6455 4.2.1)."""
    if request.has_body():
        return HTTPError(400, "bad_handshake", "WebSocket handshake with a body")
    if strict and key is None:
        return HTTPError(400, "bad_handshake", "missing, duplicate or invalid Sec-WebSocket-Key"
                                               " (expected 24 characters of base64)")
    version = request.fields.get(b"sec-websocket-version") or b""
    if strict and not VERSION_NUMBER.fullmatch(version):
        return HTTPError(426, "bad_handshake", "missing, duplicate or invalid"
                                               " Sec-WebSocket-Version (expected 13)",
                         ((b"Sec-WebSocket-Version", b"13"),) + UPGRADE_TO_WEBSOCKET)
    return None


def as_spelled(fields, name, token):
    """Return the element of a list field that is `token` in any case, as its sender wrote it.

    None if it is absent.
    """
    for value in fields.get_all(name):
        if value.lower() == token:
            return value
        for element in value.split(b","):
            element = element.strip(b" \t")
            if element.lower() == token:
                return element
    return None


def accept_for(key):
    """Return Sec-WebSocket-Accept for a key (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())


BAD_101 = {  # word of fault_in_101: for the log; VERDICTS has the words for --probe
    "unsolicited": "unsolicited 101 response",
    "not_upgraded": "101 without the requested Upgrade, or without Connection: upgrade",
    "wrong_version": "101 to a handshake with a Sec-WebSocket-Version other than 13",
    "wrong_accept": "101 with a Sec-WebSocket-Accept that does not match the key"
                    " (is there a cache before the backend?)",
    "wrong_choice": "101 with a Sec-WebSocket-Protocol that was not offered",
}


def check_101(request, response, location, upgrade):
    """Raise BackendError unless a 101 is a valid response to this request (RFC 6455 4.1)."""
    fault = fault_in_101(request.fields, response.fields, upgrade, location.strict_handshake)
    if fault:
        raise BackendError(502, "backend_bad_101", BAD_101[fault], sent=True)


def fault_in_101(sent, received, upgrade, strict=True):
    """Return what is wrong with a 101 as a word of BAD_101, None if it is valid (RFC 6455 4.1).

    sent, received: Headers of request and response. upgrade: the Upgrade requested, or None.
    """
    if upgrade is None:
        return "unsolicited"
    requested, accepted = upgrade.protocol.lower(), received.tokens(b"upgrade")
    if accepted != (requested,):
        names = {name.strip(b" \t") for name in requested.split(b",")}
        if not accepted or not names.issuperset(accepted):
            return "not_upgraded"
    if strict and b"upgrade" not in received.tokens(b"connection"):
        return "not_upgraded"
    if not strict or not upgrade.websocket:
        return None
    if sent.get(b"sec-websocket-version") != b"13":
        return "wrong_version"
    if received.get(b"sec-websocket-accept") != accept_for(sent.get(b"sec-websocket-key") or b""):
        return "wrong_accept"
    chosen = received.get_all(b"sec-websocket-protocol")
    if chosen and (len(chosen) > 1 or chosen[0] not in offered_subprotocols(sent)):
        return "wrong_choice"
    return None


def offered_subprotocols(fields):
    """Return the subprotocols of a handshake, in order; they are compared with case."""
    names = b",".join(fields.get_all(b"sec-websocket-protocol")).split(b",")
    return [name.strip(b" \t") for name in names if name.strip(b" \t")]


def switching_fields(fields):
    """Return Upgrade and Connection of a 101 as lines, each once, as the backend spelled them.

    Browsers refuse a 101 with two Upgrade fields.
    """
    protocol = fields.get(b"upgrade")
    if protocol is None or b"," in protocol:
        elements = b",".join(fields.get_all(b"upgrade")).split(b",")
        names = {name.strip(b" \t").lower(): name.strip(b" \t") for name in elements}
        names.pop(b"", None)
        protocol = b", ".join(names.values())
    connection = as_spelled(fields, b"connection", b"upgrade") or b"Upgrade"
    return [b"Upgrade: %s\r\n" % protocol, b"Connection: %s\r\n" % connection]


def closing_101(request, upgrade, code, reason):
    """Return a 101 and a Close frame as bytes: the only refusal whose reason JavaScript can read.

    It selects one of the offered subprotocols, because clients reject a 101 without.
    """
    lines = [b"HTTP/1.1 101 Switching Protocols", b"Upgrade: " + upgrade.protocol,
             b"Connection: " + upgrade.connection,
             b"Sec-WebSocket-Accept: " + accept_for(upgrade.key)]
    for name in offered_subprotocols(request.fields):
        if TOKEN.fullmatch(name):
            lines.append(b"Sec-WebSocket-Protocol: " + name)
            break
    return b"\r\n".join(lines) + b"\r\n\r\n" + close_frame(code, reason, masked=False)


def extensions_used(response):
    """Return whether the 101 agreed to an extension: then reserved bits are allowed."""
    return bool(response.fields.get_all(b"sec-websocket-extensions"))


def extensions_known(response):
    """Return whether frames keep the shape of RFC 6455 5.2 under the extensions agreed to."""
    return all(name.partition(b";")[0].strip() in (b"permessage-deflate", b"x-webkit-deflate-frame")
               for name in response.fields.tokens(b"sec-websocket-extensions"))


# --------------------------------------------------------------------- Relaying
#
# An exchange moves bytes both ways at once, and so does a tunnel: each is a Relay of two
# Flows, which differ in their scanners alone (a length, chunks, until close, frames). A
# Flow reads its source only when its sink has taken all that came before: that is the
# back-pressure, and a reader that stalls costs kernel buffers and no memory here.
#
# Bulk is spliced: the kernel moves pages from socket to pipe to socket, and no byte is
# copied or seen. So only what a scanner vouches for may be spliced: the rest of a payload,
# or a whole frame whose header was peeked at. TLS cannot be spliced.

OPEN = "open"                                  # of a source or a sink
EOF, RESET = "eof", "rst"                      # of a source: it has ended, or broken off
CLOSING, CLOSED, BROKEN = "closing", "closed", "broken"  # of a sink: it ends once all is written,
                                               # has ended, or cannot be written to
PIPE_SIZE = 1 << 20                            # bytes in the kernel while a stream is bulk
SHORT_TURN = 1 << 18                           # bytes to splice at a time beside chats
CAN_SPLICE = hasattr(os, "splice")             # Linux, Python 3.10
SPLICE_FLAGS = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)


class Flow:
    """One direction of a relay: what is read from source passes scanner and is written to sink."""

    __slots__ = ("source", "sink", "read", "write", "scanner", "source_state", "sink_state",
                 "pending", "pipe", "piped", "size", "bulk", "bytes", "last_read",
                 "last_progress",
                 "broken_by",  # of a sink that is BROKEN: how its peer has ended, EOF or RESET
                 "pinged")     # when Tunnel has sent a ping to sink

    def __init__(self, source, sink):
        self.source = source
        self.sink = sink
        # One call from here to the socket; only TLS needs the Stream, which knows what to poll for.
        self.read = source.read if source.tls else source.sock.recv
        self.write = sink.write if sink.tls else sink.sock.send
        self.source_state = OPEN  # then EOF or RESET
        # Then CLOSING and CLOSED, or BROKEN; unless it is OPEN, what is read is discarded.
        self.sink_state = OPEN
        self.pending = b""        # read, but not written yet
        self.pipe = None          # (read end, write end) while the stream is bulk
        self.piped = 0            # bytes in it; they go before pending

    def begin(self, scanner, now):
        """Begin a message, or a tunnel: what follows passes this scanner."""
        self.scanner = scanner
        self.size = SMALL_READ    # of the next read
        self.bulk = False         # the last read filled its buffer
        self.bytes = 0            # taken from source
        self.last_read = now      # time.monotonic() of the last byte from source
        self.last_progress = now  # ... of the last byte from source or to sink

    def reading(self):
        """Return True if source is to be polled."""
        return not (self.source_state is not OPEN or self.pending or self.piped
                    or self.scanner.done)

    def writing(self):
        """Return True if sink is to be polled."""
        return bool(self.pending or self.piped)

    def decrypted(self):
        """Return True if TLS has bytes ready, which poll does not see: the rest of a record."""
        return (self.bulk and self.source.tls and self.reading()
                and self.source.sock.pending() > 0)

    def move(self, now):
        """Read once and pass it on. Return True if nothing else has to be looked at."""
        if self.bulk and CAN_SPLICE and self.can_splice():
            return self.splice(now)
        try:
            data = self.read(self.size)
        except BlockingIOError:
            return False
        except OSError:
            self.source_state = RESET
            return False
        if not data:
            if data is not None:
                self.source_state = EOF
            return False
        self.last_read = self.last_progress = now
        self.bytes += len(data)
        if self.sink_state is not OPEN:
            return True
        filled = 2 * len(data) > self.size
        data = self.scanner.feed(data, now)
        if filled or self.bulk:
            self.adapt_size(filled, now)
        if data:  # nothing is not written: SSLSocket.send(b"") fails on Python before 3.10
            try:
                sent = self.write(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.break_sink(error)
                return False
            if sent != len(data):
                self.pending = data[sent:]
                return False
        return not self.scanner.notable

    def take(self, data, now):
        """Pass on bytes that were read with a head, as the first ones."""
        self.bytes += len(data)
        self.pending += self.scanner.feed(data, now)

    def adapt_size(self, filled, now):
        """Read more at a time while there is more, but at most a millisecond of scanning."""
        self.bulk = filled
        if not filled:
            self.size = SMALL_READ
        elif time.monotonic() - now > 0.001:
            self.size = max(1024, self.size // 2)
        else:
            self.size = min(BIG_READ, self.size * 2)

    def flush(self, now):
        """Write what is pending, then end sink if it is CLOSING."""
        try:
            while self.piped:
                self.piped -= os.splice(self.pipe[0], self.sink.fileno(), self.piped,
                                        flags=SPLICE_FLAGS)
                self.last_progress = now
            while self.pending:
                sent = self.write(self.pending)
                if not sent:
                    return
                self.pending = self.pending[sent:]
                self.last_progress = now
        except BlockingIOError:
            return
        except OSError as error:
            self.break_sink(error)
        if self.sink_state is CLOSING:
            self.sink_state = CLOSED
            if self.source_state is not RESET:  # else Tunnel.close() resets it
                self.sink.end()

    def can_splice(self):
        """Return True if the next bytes can pass without being looked at."""
        return (self.sink_state is OPEN and not self.source.tls and not self.sink.tls
                and self.scanner.bulk())

    def splice(self, now):
        """move() for bulk, a pipe full at a time; less while the turns of others are short."""
        if self.pipe is None and not self.open_pipe():
            self.bulk = False
            return self.move(now)
        scanner = self.scanner
        room = SHORT_TURN if now < Turns.crowd.brief_until else PIPE_SIZE
        source, recv = self.source.fileno(), self.source.sock.recv
        try:
            while room > 0:
                size = min(room, scanner.remaining or scanner.peek(recv, now))
                if not size:
                    self.bulk = False  # a small frame, or the end of the body: for take()
                    break
                count = os.splice(source, self.pipe[1], size, flags=SPLICE_FLAGS)
                if not count:
                    self.source_state = EOF
                    break
                scanner.skip(count)
                self.piped += count
                room -= count
        except BlockingIOError:  # nothing more to read, or the pipe is full
            pass
        except OSError:
            self.source_state = RESET
        if self.piped:
            self.bytes += self.piped
            if self.piped < SMALL_READ and scanner.remaining == math.inf:
                self.bulk = False  # it was not bulk, or is not any more
            self.last_read = self.last_progress = now
            self.flush(now)
        if scanner.done and not self.piped:
            self.close_pipe()
        return not (self.source_state is not OPEN or self.piped or self.sink_state is not OPEN
                    or scanner.done)

    def open_pipe(self):
        """Open the pipe to splice through. Return False if there can be none: bytes are copied."""
        try:
            self.pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # out of descriptors
            return False
        with contextlib.suppress(OSError):  # above the user's limit: the default size will do
            fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        return True

    def close_pipe(self):
        """Give the two descriptors of the pipe back, once the bulk is over."""
        if self.pipe is not None:
            os.close(self.pipe[0])
            os.close(self.pipe[1])
            self.pipe = None

    def place(self, frame, now):
        """Write a control frame between two frames. Return False if that is not possible now."""
        if self.writing() or self.sink_state is not OPEN or not self.scanner.between():
            return False
        self.pending = frame
        self.flush(now)
        return True

    def end(self, frame, now):
        """Pass nothing more and end sink, after a frame if it can be placed there."""
        if self.sink_state is OPEN:
            if frame and self.scanner.between() and not self.scanner.close:
                self.pending += frame
            self.sink_state = CLOSING
        self.flush(now)

    def release(self):
        """Let the bytes pass that the scanner held back."""
        self.pending += self.scanner.release()

    def break_sink(self, error=None):
        """sink cannot be written to any more; error: the OSError that shows it."""
        self.broken_by = RESET if error and error.errno == errno.ECONNRESET else EOF
        self.pending, self.piped, self.bulk = b"", 0, False
        self.close_pipe()
        self.sink_state = BROKEN


class Relay:
    """Two Flows between a client and a backend, polled by one thread."""

    __slots__ = ("up", "down", "poll", "interest")

    def __init__(self, client, backend):
        self.up = Flow(client, backend)
        self.down = Flow(backend, client)
        self.poll = Poll()
        self.interest = {}  # {descriptor: events registered for it}

    def wait(self, seconds):
        """Return the [(descriptor, events)] that are ready within this time."""
        return self.poll.poll(min(max(0, seconds), LONGEST_POLL) * 1000)

    def watch(self, fd, events):
        """Register interest in a descriptor, if it has changed; events: None for none at all."""
        if events is None:  # poll reports POLLHUP even where no event was asked for
            if self.interest.pop(fd, None) is not None:
                self.poll.unregister(fd)
        elif self.interest.get(fd, 0) != events:
            self.interest[fd] = events
            self.poll.register(fd, events)

    def close_pipes(self):
        if self.up.pipe or self.down.pipe:
            self.up.close_pipe()
            self.down.close_pipe()


# ---------------------------------------------------------------- Relaying HTTP


HALF_CLOSED_CLIENT = 0.5  # seconds without a byte for it that a client is served after its FIN


class HeadScanner(Scanner):
    """Collects a response head, and what comes with it, in the buffer of its Stream."""

    __slots__ = ("stream",)

    def __init__(self, stream):
        self.stream = stream

    def bulk(self):
        return False

    def feed(self, data, now):
        self.stream.buffer += data
        return b""


class HTTPRelay(Relay):
    """Moves requests up and responses down; a response may come before the upload is over.

    For each exchange: begin(), final_response(), pass_response(). Where both connections last,
    the next exchange begins with the same HTTPRelay.
    """

    __slots__ = ("client", "backend", "location", "server", "head_since", "gone_at", "collector")

    def __init__(self, client, backend):
        super().__init__(client, backend)
        self.client = client
        self.backend = backend
        self.collector = HeadScanner(backend)

    def begin(self, head, body, location, server):
        """Begin an exchange. body: the scanner of the request body. server: the Settings."""
        now = time.monotonic()
        self.location = location
        self.server = server
        self.head_since = now    # time.monotonic() since when the response head is due
        self.gone_at = math.inf  # ... at which a client that has closed is given up
        self.up.begin(body, now)
        self.down.begin(self.collector, now)
        self.up.pending = head
        if not body.done:
            self.feed(self.up, now)

    def reusable(self):
        """Return True if both connections are as they were before the exchange."""
        return (self.up.sink_state is self.down.source_state is OPEN and not self.up.writing()
                and not self.backend.buffer)

    def silent(self):
        """Return True if the backend has sent nothing since the last exchange, not even FIN."""
        self.watch(self.backend.sock.fileno(), self.backend.read_event)
        if self.backend.tls or self.poll.poll(0):
            return self.backend.silent()
        return True

    def feed(self, flow, now):
        """Give source.buffer to the scanner of a flow; what it does not take stays there."""
        data, flow.source.buffer = flow.source.buffer, b""
        try:
            if flow.scanner.done:
                flow.source.buffer = data
            elif data:
                flow.take(data, now)
        except ValueError as error:
            raise self.bad_body(flow, error)
        if flow.scanner.rest:
            self.keep_rest(flow)

    def keep_rest(self, flow):
        """Put back what was read after the end of a body."""
        flow.source.buffer, flow.scanner.rest = flow.scanner.rest, b""
        flow.bytes -= len(flow.source.buffer)

    def bad_body(self, flow, error):
        """Return the exception for a body that its scanner refuses."""
        if flow is self.up:
            return HTTPError(400, "bad_request", "request body: %s" % error)
        return BackendError(502, "backend_bad_response", "response body: %s" % error, sent=True)

    def final_response(self, interim, last=None):
        """Read heads up to the final one, return its Response. interim: pass 1xx to the client.

        last: the last Response that the client has got, if any. When its request comes again within
        a second, so do the same bytes, as often as not: they are not parsed twice.

        Raises BackendError, HTTPError, ClientGone.
        """
        try:
            self.up.flush(self.head_since)
            for _ in range(INTERIM_LIMIT + 1):
                response = self.response(last)
                if response.status >= 200 or response.status == 101:
                    return response
                self.head_since = time.monotonic()
                if interim:
                    self.pass_interim(response)
            raise BackendError(502, "backend_bad_response",
                               "more than %d interim responses" % INTERIM_LIMIT, sent=True)
        except BaseException:
            self.close_pipes()
            raise

    def pass_interim(self, response):
        """Pass a 1xx response to the client."""
        lines = [b"HTTP/1.1 %d %s" % (response.status, response.reason)]
        withheld = HOP_BY_HOP.union(response.fields.tokens(b"connection"), (b"content-length",),
                                    self.location.response_withheld)
        lines += [b"%s: %s" % pair for pair in response.fields if pair[0].lower() not in withheld]
        self.down.pending += b"\r\n".join(lines) + b"\r\n\r\n"
        self.down.flush(time.monotonic())

    def response(self, last):
        """Wait for a response head while the request body goes up; return the Response."""
        while True:
            data = self.backend.buffer
            if last and data.startswith(last.head):
                self.backend.buffer, self.backend.scanned = data[len(last.head):], 0
                return last
            if data:
                head = take_response_head(self.backend, self.server.client_header_size)
                if head is not None:
                    return parse_response_head(head)
            up = self.up
            if up.scanner.done and not (up.pending or up.piped or self.down.pending):
                self.await_response()
            else:
                self.turn()

    def await_response(self):
        """turn() while nothing else can move: the request is sent, the response head awaited."""
        client, backend, now = self.client, self.backend, time.monotonic()
        if client.turns.took(now, Turns.LARGE) and self.read_more():
            return
        deadline = max(self.head_since, self.up.last_progress) + self.location.proxy_read_timeout
        if not (backend.tls and backend.sock.pending()):
            client_fd = client.sock.fileno()
            self.watch(client_fd, POLLRDHUP if self.gone_at == math.inf else 0)
            self.watch(backend.sock.fileno(), backend.read_event)
            ready = self.wait(min(deadline, self.gone_at) - now)
            if not ready and time.monotonic() >= min(deadline, self.gone_at):
                raise timeout_error("client_gone" if self.gone_at < deadline else "backend_timeout")
            for fd, event in ready:
                if fd == client_fd:
                    self.check_client(event)
        self.read_more()

    def read_more(self):
        """Read once, while a response head is awaited; it collects in backend.buffer.

        It does what move() does with a HeadScanner, in fewer steps. Return True if there was a
        byte.
        """
        try:
            data = self.backend.read()
        except OSError:
            data = b""
        if data:
            self.backend.buffer += data
            self.down.bulk = 2 * len(data) > SMALL_READ
            if self.gone_at < math.inf:
                self.gone_at = time.monotonic() + HALF_CLOSED_CLIENT
        elif data is not None:
            self.response_ended()
        return bool(data)

    def finish_request(self):
        """Send the rest of the request: a tunnel begins after its body (docker exec)."""
        self.down.scanner = NO_BODY  # what the backend sends from now on belongs to the tunnel
        while self.up.writing() or not self.uploaded():
            self.turn()

    def pass_response(self, head, body):
        """Send a final head and relay its body to the end. Raises BackendError, ClientGone."""
        try:
            down, now = self.down, time.monotonic()
            down.pending += head
            down.last_progress = now
            down.bytes = 0  # those of the head do not count
            down.scanner = body
            self.feed(down, now)
            down.flush(now)
            while down.pending or not body.done or down.piped:
                self.turn()
        finally:
            self.close_pipes()

    def turn(self):
        """Wait until something can move, and move it."""
        up, down = self.up, self.down
        self.client.turns.took(time.monotonic(),
                               Turns.BULK if up.bulk or down.bulk else Turns.LARGE)
        uploading = up.reading() and up.sink_state is OPEN
        responding = down.reading()
        client_events = ((self.client.read_event if uploading else 0)
                         | (self.client.write_event if down.writing() else 0)
                         | (POLLRDHUP if self.uploaded() and self.gone_at == math.inf else 0))
        backend_events = ((self.backend.read_event if responding else 0)
                          | (self.backend.write_event if up.writing() else 0))
        self.watch(self.client.fileno(), client_events)
        self.watch(self.backend.fileno(), backend_events or None)
        if not up.decrypted() and not down.decrypted():
            deadline, awaited = self.next_deadline(uploading, responding)
            ready = self.wait(deadline - time.monotonic())
            if not ready and time.monotonic() >= deadline:
                raise timeout_error(awaited)
            for fd, event in ready:
                if fd == self.client.fileno():
                    self.check_client(event)
        now = time.monotonic()
        if up.writing():
            up.flush(now)
        elif uploading:
            self.move(up, now)
        if down.writing():
            down.flush(now)
        elif responding:
            self.move(down, now)
        if down.sink_state is BROKEN:
            raise ClientGone("client_gone")

    def uploaded(self):
        """Return True if nothing more of the request body is read."""
        return self.up.scanner.done or self.up.sink_state is BROKEN

    def move(self, flow, now):
        """Move bytes of one flow, look at how its source has ended."""
        try:
            flow.move(now)
        except ValueError as error:
            raise self.bad_body(flow, error)
        if flow.scanner.rest:
            self.keep_rest(flow)
        if flow is self.down and self.gone_at < math.inf:
            self.gone_at = max(self.gone_at, flow.last_read + HALF_CLOSED_CLIENT)
        if flow.source_state is OPEN or flow.scanner.done:
            return
        if flow is self.up:  # it has more to send, so an end is not one
            raise ClientGone("client_gone")
        if flow.source_state is RESET or not flow.scanner.at_end():
            self.response_ended()

    def response_ended(self):
        """Raise the BackendError for a response that is incomplete."""
        if self.down.scanner is not self.collector:
            raise BackendError(502, "backend_truncated", "backend closed the connection while"
                               " sending the response", sent=True)
        began = bool(self.backend.buffer)
        raise BackendError(502, "backend_bad_response" if began else "backend_closed",
                           "backend closed the connection before sending a response", sent=True,
                           retry=not began)

    def next_deadline(self, uploading, responding):
        """Return (time.monotonic() at which to give up, what is awaited: for timeout_error())."""
        up, down = self.up, self.down
        deadlines = [(self.gone_at, "client_gone")]
        if responding and not (uploading or up.writing()):
            since = max(self.head_since, up.last_progress)
            if down.scanner is not self.collector:
                since = max(since, down.last_progress)
            deadlines.append((since + self.location.proxy_read_timeout, "backend_timeout"))
        if up.writing():
            deadlines.append((up.last_progress + self.location.proxy_send_timeout,
                              "backend_timeout"))
        if uploading:
            deadlines.append((up.last_progress + self.server.client_body_timeout, "body_timeout"))
        if down.writing():
            deadlines.append((down.last_progress + self.server.send_timeout, "send_timeout"))
        return min(deadlines)

    def check_client(self, event):
        """Raise ClientGone if the client broke off; one that half-closed has a moment (nc -N)."""
        if event & (POLLERR | POLLHUP):
            raise ClientGone("client_gone")
        if event & POLLRDHUP and self.uploaded():
            self.gone_at = time.monotonic() + HALF_CLOSED_CLIENT


def timeout_error(awaited):
    """Return the exception for what an HTTPRelay has awaited for too long."""
    if awaited == "backend_timeout":
        return BackendError(504, awaited, "timed out waiting for the backend (proxy_read_timeout)",
                            sent=True)
    if awaited == "body_timeout":
        return HTTPError(408, awaited, "timed out reading the request body (client_body_timeout)")
    return ClientGone(awaited)


# ------------------------------------------------------------------- The tunnel
#
# How a tunnel ends. A peer's end is passed on as it came, so that the other side sees what
# it would see without a proxy; only the gate's own decisions are told by a Close frame.
#
#   what ended                 the other side gets           the tunnel is over
#   FIN                        what is pending, FIN          after the other FIN, or HALF_CLOSE
#                                                            of silence (idle_timeout if these are
#                                                            not frames: docker exec); with TLS, or
#                                                            after both Close frames, at once
#   RST                        what is pending, RST          when that is written
#   a write failed             -                             LINGER later, what comes is passed on
#   Tunnel.finish(): a timer,  both get a Close, where one   after both FINs, or LINGER later
#   a limit, drain, shutdown   can be placed, and FIN
#
# What a peer sends after its own Close frame, which RFC 6455 5.5.1 forbids, may be lost.

QUIET = 0.5              # seconds without a byte after which a tunnel is quiet
PIPE_KEEP = 1.0          # seconds without a byte after which a pipe is closed
HALF_CLOSE = 10.0        # seconds of silence that one direction may last when the other has ended


class Tunnel(Relay):
    """What a connection is after a 101: two Flows of frames, and a clock."""

    __slots__ = ("gate", "record", "location", "send_timeout", "wakeup", "seen_wakeup", "end_at",
                 "deadline", "over", "rtt", "opened", "tls", "polled")

    def __init__(self, exchange, relay, head, scan, extensions):
        """relay: the HTTPRelay of the handshake, which this one continues."""
        self.up, self.down = up, down = relay.up, relay.down
        self.poll, self.interest = relay.poll, relay.interest
        self.gate = exchange.gate
        self.record = exchange.entry
        self.location = location = exchange.location
        self.send_timeout = exchange.config.server.send_timeout
        self.opened = now = time.monotonic()
        self.end_at = math.inf       # when draining ends this tunnel
        self.deadline = math.inf     # when a tunnel that is ending is closed, whatever its peers do
        self.over = False
        self.rtt = None              # of the last pong, in seconds
        self.tls = up.source.tls or down.source.tls
        self.polled = False          # both peers are polled for bytes, and for nothing else
        self.wakeup = None           # the descriptor of seen_wakeup while it is polled
        self.seen_wakeup = self.gate.wakeup
        down.pending += head
        for flow in (up, down):
            flow.begin(FrameScanner(flow is up, extensions, location.max_message_size, now)
                       if scan else UntilClose(), now)
            flow.pinged = -math.inf
            if flow.source.buffer:   # bytes that came with the heads are the first
                flow.take(flow.source.buffer, now)
                flow.source.buffer = b""

    @property
    def last_byte(self):
        """time.monotonic() of the last byte either way."""
        return max(self.up.last_progress, self.down.last_progress)

    def run(self):
        """Relay until both directions have ended, a timer expires or the gate ends the tunnel."""
        up, down = self.up, self.down
        client = up.source.fileno()
        reader, tls = up, self.tls
        poll, monotonic = self.poll.poll, time.monotonic
        turns, crowd = up.source.turns, Turns.crowd
        work = 0  # that turns.took() does not know yet
        now = monotonic()
        wake = self.begin(now)
        answer = {up: [(down.source.fileno(), POLLIN)], down: [(client, POLLIN)]}
        expected = None  # events, if they need not be polled for
        while not self.over:
            if expected:
                events, expected = expected, None
            else:
                events = poll((wake - now) * 1000 if wake > now else 0)
            before, now = now, monotonic()
            for fd, event in events:
                reader = up if fd == client else down
                if event != POLLIN or fd == self.wakeup or not (self.polled or reader.reading()):
                    self.on_event(fd, event, now)
                    wake = now
                elif reader.move(now) and not (tls and reader.decrypted()):
                    continue
                due = self.settle(now)
                if due < wake:
                    wake = due
            work += Turns.BULK if reader.bulk else 1
            if work >= turns.patience or crowd.sparse:
                # Where each side answers the other, the answer comes while others have their turn.
                if (turns.took(now, work) and (self.polled or tls) and now == reader.last_read
                        and before == (down if reader is up else up).last_read):
                    expected = answer[reader]
                work = 0
            if now >= wake or not events:
                wake = min(self.check_timers(now), now + LONGEST_POLL)
            elif self.wakeup is not None and now - before < QUIET / 10:
                self.ignore_wakeup()
                wake = min(wake, now + QUIET)

    def begin(self, now):
        """Send the 101 and what came with the heads. Return when to check the timers."""
        for flow in (self.up, self.down):
            if flow.pending:
                flow.flush(now)
        self.settle(now)
        if self.gate.state != "running":  # the wakeup was set before this tunnel knew it
            return self.on_wakeup(now)
        return now + min(QUIET, self.location.idle_timeout, self.send_timeout,
                         self.location.ping_interval or QUIET)

    def on_event(self, fd, event, now):
        """Take an event that is not just plain bytes to be read."""
        if fd == self.wakeup:
            self.on_wakeup(now)
            return
        up, down = self.up, self.down
        reader, writer = (up, down) if fd == up.source.fileno() else (down, up)
        if writer.writing():
            writer.flush(now)
        if reader.reading():
            reader.move(now)
        elif event & POLLERR:
            reader.source_state = RESET
        elif event & POLLHUP and not writer.writing():
            self.watch(fd, None)  # both ends closed, bytes still to be read: later

    def settle(self, now):
        """Act on what flows and scanners have seen, then poll for what can move.

        Return the time.monotonic() by which to check the timers: math.inf if none is due earlier
        than it was.
        """
        up, down = self.up, self.down
        if self.tls:
            for flow in (up, down):
                while flow.decrypted():
                    flow.move(now)
        if up.scanner.notable:
            self.on_scanner(up, now)
        if down.scanner.notable:
            self.on_scanner(down, now)
        if not (up.source_state is up.sink_state is down.source_state is down.sink_state is OPEN):
            self.settle_ends(now)
            if self.over:
                return math.inf
        idle = not (up.pending or down.pending or up.piped or down.piped or self.tls)
        if idle and self.polled and up.source_state is down.source_state is OPEN:
            if self.deadline < math.inf:
                return self.deadline
            return now + HALF_CLOSE if self.closed_both_ways() else math.inf
        self.polled = idle
        for reader, writer in ((up, down), (down, up)):
            stream, events = reader.source, 0
            if reader.source_state is OPEN:
                if not (reader.pending or reader.piped):
                    events = stream.read_event
            elif writer.sink_state in (CLOSED, BROKEN):
                events = None
            if writer.pending or writer.piped:
                events |= stream.write_event
            fd = stream.sock.fileno()
            if self.interest.get(fd, 0) != events:
                self.watch(fd, events)
        return now

    def settle_ends(self, now):
        """Act on sources and sinks that are not OPEN any more."""
        up, down = self.up, self.down
        if self.complete():  # nearly always
            self.over = True
            return
        for flow, back in ((up, down), (down, up)):
            if flow.source_state is EOF and back.sink_state is BROKEN:
                flow.source_state = RESET  # the same socket, whose error its writer has got
            if flow.source_state is not OPEN and flow.sink_state is OPEN:
                self.on_source_end(flow, back, now)
            if flow.source_state is RESET:
                back.break_sink()
                self.over = self.over or flow.sink_state is not CLOSING
            elif flow.sink_state is BROKEN and flow.source_state is OPEN:
                self.note_end("backend" if flow is up else "client", flow.broken_by)
                self.deadline = min(self.deadline, now + LINGER)
        ended = [flow.source_state is not OPEN and flow.sink_state in (CLOSED, BROKEN)
                 for flow in (up, down)]
        self.over = self.over or all(ended) or self.complete()

    def on_source_end(self, flow, back, now):
        """A peer has ended its direction, or broken off: pass that on after its bytes."""
        self.note_end("client" if flow is self.up else "backend", flow.source_state)
        flow.release()
        flow.end(b"", now)
        tls = flow.source.tls or flow.sink.tls
        if flow.source_state is RESET or tls:
            self.deadline = min(self.deadline, now + LINGER)
        if flow.source_state is EOF and (tls or self.closed_both_ways()):
            back.end(b"", now)

    def complete(self):
        """Return True if nothing is left to do but to close both sockets, which sends FIN.

        After both Close frames one FIN is enough, once all is written. Not under TLS, where
        close_notify is to be sent first.
        """
        up, down = self.up, self.down
        states = up.source_state, up.sink_state, down.source_state, down.sink_state
        return (EOF in states and not (RESET in states or BROKEN in states)
                and not (up.pending or down.pending or up.piped or down.piped or self.tls)
                and self.closed_both_ways())

    def closed_both_ways(self):
        """Return True if a Close frame has passed each way (RFC 6455 7.1.4)."""
        return bool(self.up.scanner.close and self.down.scanner.close)

    def note_end(self, side, how, reason=None):
        """Record who has ended the tunnel, how and why; the first one counts."""
        self.record.closed_by(side, how, reason or side + "_gone")

    def on_scanner(self, flow, now):
        """Act on a Close, a message too big, a pong, or bytes that are not frames."""
        scanner = flow.scanner
        scanner.notable = False
        if scanner.lost and scanner.limit:  # what cannot be counted cannot be limited
            self.finish("bad_frames", 1002, 1002, now)
        elif scanner.lost:
            self.record.frames_lost(self)
            for each in (self.up, self.down):
                each.release()
                each.scanner = UntilClose()
                each.flush(now)
        elif scanner.too_big:
            to_client, to_backend = (1009, 1001) if flow is self.up else (1001, 1009)
            self.finish("message_too_big", to_client, to_backend, now)
        elif scanner.rtt is not None:
            self.rtt, scanner.rtt = scanner.rtt, None
        if scanner.close:
            self.record.closed_by("client" if flow is self.up else "backend", scanner.close[0])

    def finish(self, reason, to_client, to_backend, now, seconds=LINGER):
        """End the tunnel: Close frames where they can be placed, FIN, and read on for a moment."""
        framed = isinstance(self.down.scanner, FrameScanner)
        self.record.closed_by("gate", to_client if framed else "fin")
        self.record.ended(reason)
        self.deadline = min(self.deadline, now + seconds)
        self.down.end(close_frame(to_client, reason, False), now)
        self.up.end(close_frame(to_backend, reason, True), now)
        self.settle(now)

    def check_timers(self, now):
        """Do what is due, return the time.monotonic() at which to check again."""
        if self.deadline == math.inf:
            wake = self.check_ends(now)
        if self.deadline < math.inf:
            self.over = self.over or now >= self.deadline
            return self.deadline
        if self.wakeup is None:
            if self.seen_wakeup is not self.gate.wakeup:
                return self.on_wakeup(now)
            if now - self.last_byte < QUIET:
                wake = min(wake, now + QUIET)
            else:
                self.poll_wakeup()
        for flow in (self.up, self.down):
            if flow.pipe is not None:
                if now - flow.last_progress >= PIPE_KEEP and not flow.piped:
                    flow.close_pipe()
                else:
                    wake = min(wake, now + PIPE_KEEP)
        if self.location.ping_interval:
            wake = min(wake, self.check_pings(now))
        return wake

    def check_ends(self, now):
        """Finish the tunnel if one of its times has come; return the next of them."""
        up, down, limit = self.up, self.down, self.location.idle_timeout
        half_closed = (up.source_state is not OPEN or down.source_state is not OPEN
                       or self.closed_both_ways())
        if half_closed and isinstance(up.scanner, FrameScanner):  # else it is a way to use it
            limit = min(HALF_CLOSE, limit)
        idle_at = max(up.last_progress, down.last_progress, up.pinged, down.pinged) + limit
        stalled_at = down.last_progress + self.send_timeout if down.writing() else math.inf
        if now >= idle_at and half_closed:
            self.deadline = now
        elif now >= idle_at:
            self.finish("idle_timeout", 1001, 1001, now)
        elif now >= self.end_at:
            left = self.gate.deadline - 0.2 - now  # the log line is written before the gate ends
            self.finish("drain", 1001, 1001, now, seconds=min(LINGER, max(0.1, left)))
        elif now >= stalled_at:
            self.finish("send_timeout", 1001, 1001, now)
        return min(idle_at, self.end_at, stalled_at)

    def check_pings(self, now):
        """Ping each side that has been silent; return when to check again."""
        wake = math.inf
        if self.closed_both_ways() or self.up.scanner.close or self.down.scanner.close:
            return wake  # a peer that is closing need not reply
        for side, incoming, outgoing in (("client", self.up, self.down),
                                         ("backend", self.down, self.up)):
            if self.location.ping_peers in ("both", side) and self.deadline == math.inf:
                wake = min(wake, self.check_ping(incoming, outgoing, now))
        return min(wake, self.deadline)

    def check_ping(self, incoming, outgoing, now):
        """Ping the peer of these flows if it has been silent; return when to check again."""
        sent, scanner = outgoing.pinged, incoming.scanner
        if (not isinstance(scanner, FrameScanner) or incoming.source_state is not OPEN
                or outgoing.sink_state is not OPEN):
            return math.inf
        if incoming.last_read < sent:
            if now >= sent + self.location.ping_timeout:
                self.finish("ping_timeout", 1011, 1001, now)
            return sent + self.location.ping_timeout
        due = max(incoming.last_read, sent) + self.location.ping_interval
        if incoming is self.down:
            due += min(1.0, self.location.ping_interval / 4)  # the backend's turn is a little later
        if now < due:
            return due
        payload = os.urandom(8)
        if not outgoing.place(make_frame(PING, payload, masked=outgoing is self.up), now):
            return now + 0.25  # inside a frame, or stalled: soon again
        scanner.expect_pong(payload, now)
        outgoing.pinged = now
        if outgoing.writing():
            self.settle(now)
        return now + min(self.location.ping_timeout, self.location.ping_interval)

    def poll_wakeup(self):
        """Poll the gate's wakeup too, since the tunnel is quiet.

        A busy tunnel saves that third descriptor: its timers run twice a second, and see there
        that the gate has another wakeup than the one they know.
        """
        self.wakeup = self.seen_wakeup.fileno()
        self.poll.register(self.wakeup, POLLIN)

    def ignore_wakeup(self):
        """The tunnel is busy again."""
        self.poll.unregister(self.wakeup)
        self.wakeup = None

    def on_wakeup(self, now):
        """The gate is draining or stopping: return when to check the timers again."""
        if self.wakeup is not None:
            self.ignore_wakeup()
        self.seen_wakeup = self.gate.wakeup  # it may be set once more
        if self.gate.state == "stopping":
            self.finish("shutdown", 1001, 1001, now, seconds=0.8)
        elif self.gate.state == "draining" and self.end_at == math.inf:  # opened after the plan
            self.end_at = now + random.random() * max(0.0, self.gate.deadline - 1 - now)
        return now

    def close(self):
        """Close the pipes, pass a reset on, report the counts."""
        self.close_pipes()
        self.record.take_counts(self)
        for flow in (self.up, self.down):
            if flow.source_state is RESET and flow.sink_state is CLOSED:
                flow.sink.abort()


# ------------------------------------------------ WebSocket frames (RFC 6455 5)

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
LONGEST_HEADER = 14
SPLICE_MINIMUM = 16 * 1024  # payload for which splicing is worth its calls


def make_frame(opcode, payload, masked):
    """Return a final frame as bytes. masked: towards a server (RFC 6455 5.3)."""
    length, mask_bit = len(payload), 0x80 if masked else 0
    if length < 126:
        header = bytes((0x80 | opcode, mask_bit | length))
    elif length < 1 << 16:
        header = struct.pack("!BBH", 0x80 | opcode, mask_bit | 126, length)
    else:
        header = struct.pack("!BBQ", 0x80 | opcode, mask_bit | 127, length)
    if not masked:
        return header + payload
    mask = os.urandom(4)
    return header + mask + apply_mask(payload, mask)


def close_frame(code, reason, masked):
    """Return a Close frame with a code and a short reason."""
    payload = struct.pack("!H", code) + reason.encode("ascii", "replace")[:60]
    return make_frame(CLOSE, payload, masked)


def apply_mask(payload, mask):
    """Mask or unmask a short payload (RFC 6455 5.3)."""
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def frame_header(data, position=0):
    """Decode the frame header at position (RFC 6455 5.2).

    Return (size of the header, size of the payload), or None while the header is incomplete.
    FIN, reserved bits and opcode are its first byte, as it is.
    """
    available = len(data) - position
    if available < 2:
        return None
    second = data[position + 1]
    length = second & 0x7F
    size = 6 if second & 0x80 else 2
    if length >= 126:
        width = 2 if length == 126 else 8
        size += width
        length = int.from_bytes(data[position + 2:position + 2 + width], "big")
    return (size, length) if available >= size else None


def parse_close(payload):
    """Return (code, reason bytes) of a Close frame's payload (RFC 6455 7.1.5: 1005 if none)."""
    code = payload[0] << 8 | payload[1] if len(payload) > 1 else 1005
    return code, payload[2:]


# What the first byte of a frame may be: kinds of frames, in this order.
INVALID_FRAME, CONTROL_FRAME, FRAGMENT, LAST_FRAGMENT, WHOLE_MESSAGE = range(5)


def frame_kinds(reserved):
    """Return the kind for each of the 256 first bytes. reserved: the bits that must be 0."""
    kinds = [INVALID_FRAME] * 256
    for first in range(256):
        opcode, final = first & 0x0F, first & 0x80
        if first & reserved:
            continue
        if opcode in (CONTINUATION, TEXT, BINARY):
            last = LAST_FRAGMENT if opcode == CONTINUATION else WHOLE_MESSAGE
            kinds[first] = last if final else FRAGMENT
        elif opcode in (CLOSE, PING, PONG) and final:
            kinds[first] = CONTROL_FRAME
    return kinds


# By whether an extension was negotiated, which may use the reserved bits.
FRAME_KINDS = {False: frame_kinds(0x70), True: frame_kinds(0)}


def short_sizes(mask_bit):
    """Return the size of the frame for each of the 256 second bytes.

    0: the second byte does not tell it, or is invalid because of its mask bit.
    """
    sizes = [0] * 256
    for second in range(mask_bit, mask_bit + 126):
        sizes[second] = sum(frame_header(bytes((0x80, second)) + bytes(4)))
    return sizes


SHORT_SIZES = {mask_bit: short_sizes(mask_bit) for mask_bit in (0, 0x80)}


class FrameScanner(Scanner):
    """Follows the frames of one direction and keeps no payload (RFC 6455 5.2).

    All bytes pass at once, but for what may be a pong to a ping of the gate's own: that is held
    back until it is whole. A header or control frame that is incomplete is kept (at most 139
    bytes) and put in front of the next read, so that only whole ones are ever decoded.
    When the bytes are not frames, it gives up (lost) and they pass as they are.
    """

    __slots__ = ("mask_bit", "kinds", "short_sizes", "limit", "remaining", "partial",
                 "partial_passed", "message", "messages", "last_data", "last_size", "last_header",
                 "close", "lost", "too_big", "notable", "pings", "rtt")

    def __init__(self, masked, extensions, limit, now):
        self.mask_bit = 0x80 if masked else 0    # frames of a client are masked (RFC 6455 5.1)
        self.kinds = FRAME_KINDS[extensions]
        self.short_sizes = SHORT_SIZES[self.mask_bit]
        self.limit = limit                       # max_message_size, 0 for none
        self.remaining = 0                       # bytes of the current frame still to come
        self.partial = b""                       # an incomplete header or control frame
        self.partial_passed = 0                  # bytes of it that passed: all, or none if held
        self.message = 0                         # payload of the current message in earlier frames
        self.messages = 0                        # text and binary messages that have ended
        self.last_data = now                     # time.monotonic() of the last text or binary frame
        # Of the last message of one frame: its size, and its header without mask. As often as not
        # the next is alike, and a comparison tells.
        self.last_size, self.last_header = -1, b""
        self.close = None                        # (code, reason) of a Close that passed
        self.lost = False                        # these bytes are not frames
        self.too_big = False                     # a message exceeds the limit; it did not pass
        self.notable = False
        self.pings = {}                          # {payload: time.monotonic()} of unanswered pings
        self.rtt = None                          # of the last pong, in seconds

    def between(self):
        """Return True if all that passed is whole frames, so that one may be placed here."""
        return not (self.remaining or self.partial_passed or self.lost)

    def feed(self, data, now):
        """Take the bytes of one read, return those that pass on."""
        if not (self.remaining or self.partial or self.message):
            last_size = self.last_size
            if len(data) == last_size:
                if data.startswith(self.last_header):
                    self.messages += 1
                    self.last_data = now
                    return data
            elif last_size > 0 and not len(data) % last_size:
                count = len(data) // last_size
                if self.count_alike(data, 0) == count:
                    self.messages += count
                    self.last_data = now
                    return data
            size = len(data)
            if size > 1 and size == self.short_sizes[data[1]]:
                kind = self.kinds[data[0]]
                if kind == WHOLE_MESSAGE and not self.limit:
                    self.messages += 1
                    self.last_data = now
                    self.last_size, self.last_header = size, data[:2]
                    return data
                if kind == CONTROL_FRAME:
                    return data if self.take_control(data, size - (data[1] & 0x7F), now) else b""
        return self.scan(data, now)

    def count_alike(self, data, position):
        """Return how many whole frames from position on have the header of the last message.

        Their headers are one frame size apart: each byte of a header is in a slice of that step.
        """
        step, header = self.last_size, self.last_header
        count = (len(data) - position) // step
        end = position + count * step
        for place in range(len(header)):
            column, byte = data[position + place:end:step], header[place:place + 1]
            if column != byte * count:
                count = len(column) - len(column.lstrip(byte))
                end = position + count * step
        return count

    def scan(self, data, now):
        """feed(), frame by frame."""
        passed, start = [], self.partial_passed  # what passes: passed, then data[start:]
        data, self.partial, self.partial_passed = self.partial + data, b"", 0
        position, size = self.remaining, len(data)
        while position < size:
            kind, header = self.kinds[data[position]], frame_header(data, position)
            if not self.valid(kind, data, position):
                self.lost = self.notable = True
                position = size
                break
            end = size + 1 if header is None else position + header[0] + header[1]
            if header is None or (kind == CONTROL_FRAME and end > size):
                data = self.keep(data, position, start)
                break
            if kind == CONTROL_FRAME:
                if not self.take_control(data[position:end], header[0], now):
                    passed.append(data[start:position])
                    start = end
            elif not self.count(kind, header[1], now):
                data = data[:position]           # of a message too big the last frame is dropped
                position = size + (end - start if start > position else 0)
                break
            elif kind == WHOLE_MESSAGE:
                alike = self.last_size == end - position
                self.remember(data[position:position + header[0]], end - position)
                if alike and end < size:  # perhaps one of many
                    count = self.count_alike(data, end)
                    self.messages += count
                    end += count * self.last_size
            position = end
        self.remaining = max(0, position - size)
        return b"".join(passed) + data[start:] if passed else data[start:]

    def keep(self, data, position, start):
        """Keep the incomplete frame at position; return what of data passes up to its end.

        start: up to where data has passed before. Only a pong that may be awaited is held back.
        """
        self.partial = data[position:]
        if self.pings and data[position] & 0x0F == PONG and start <= position:
            return data[:position]
        self.partial_passed = len(self.partial)
        return data

    def valid(self, kind, data, position):
        """Return True if the one or two bytes that are here can begin a frame of this direction."""
        if kind == INVALID_FRAME or position + 1 == len(data):
            return kind != INVALID_FRAME
        second = data[position + 1]
        if second & 0x80 != self.mask_bit or (kind == CONTROL_FRAME and second & 0x7F > 125):
            return False
        return second & 0x7F != 127 or position + 2 == len(data) or data[position + 2] < 0x80

    def count(self, kind, length, now):
        """Count a text or binary frame. Return False if its message is too big."""
        self.last_data = now
        self.message += length
        if 0 < self.limit < self.message:
            self.too_big = self.notable = True
            return False
        if kind != FRAGMENT:
            self.messages += 1
            self.message = 0
        return True

    def remember(self, header, size):
        """Keep the header of a message of one frame for count_alike() and peek()."""
        self.last_header = header[:-4] if self.mask_bit else header
        self.last_size = size

    def take_control(self, frame, header_size, now):
        """Take a whole control frame. Return False for a pong to a ping of the gate's own."""
        opcode, payload = frame[0] & 0x0F, frame[header_size:]
        if self.mask_bit and opcode != PING:
            payload = apply_mask(payload, frame[header_size - 4:header_size])
        if opcode == CLOSE:
            self.close = parse_close(payload)
            self.notable = True
        elif opcode == PONG and payload in self.pings:
            self.rtt = now - self.pings.pop(payload)
            self.notable = True
            return False
        return True

    def skip(self, count):
        self.remaining -= count

    def bulk(self):
        """Return True inside a large frame, and between two if the next may be as large."""
        return self.remaining >= SPLICE_MINIMUM or (self.last_size >= SPLICE_MINIMUM
                                                    and not self.partial)

    def peek(self, recv, now):
        """Count the next frame, still in the socket, if it is large; return its size, else 0."""
        head = recv(LONGEST_HEADER, socket.MSG_PEEK)
        if len(head) < LONGEST_HEADER:
            return 0
        if self.last_size >= SPLICE_MINIMUM and head.startswith(self.last_header) and (
                not self.message):
            self.messages += 1
            self.last_data = now
            self.remaining = self.last_size
            return self.remaining
        kind, (size, length) = self.kinds[head[0]], frame_header(head)
        if (kind < FRAGMENT or not self.valid(kind, head, 0) or length < SPLICE_MINIMUM
                or 0 < self.limit < self.message + length):
            return 0  # feed() has to see it
        self.count(kind, length, now)
        self.remaining = size + length
        if kind == WHOLE_MESSAGE:
            self.remember(head[:size], self.remaining)
        return self.remaining

    def expect_pong(self, payload, now):
        """A ping with this payload was sent: its pong is not passed on."""
        self.pings[payload] = now
        if len(self.pings) > 64:
            self.pings.pop(next(iter(self.pings)))

    def release(self):
        held, self.partial = self.partial[self.partial_passed:], b""
        return held


# ------------------------------------------------------------------- Access log

access_log = logging.getLogger("wsgate.access")


class AccessLogEntry:
    """What the access log reports of one exchange; filled in on the way, written once at its end.

    The Exchange fills it in, from tunnel_begins() on the Tunnel, both in the connection's thread;
    the status page reads what is fixed by then.
    """

    ids = itertools.count(random.randrange(1 << 24))

    host = request = location = server = "-"
    status = 0
    failed = 0               # servers that failed before this one
    handshake = None         # seconds up to the 101; None if there was none
    up = down = (0, 0)       # (messages, bytes) from and to the client
    closer = None            # who ended the tunnel: "client", "backend" or "gate"
    how = None               # and how: a close code, or "eof", "rst", "fin"
    reason = None            # a stable word, see REASONS
    frames = None            # "lost" when the tunnel's bytes were not frames
    rtt = None               # of the tunnel's last pong, in seconds
    note = None              # for people

    def __init__(self, counters, client):
        self.counters = counters
        self.id = "%06x" % (next(self.ids) & 0xFFFFFFFF)
        self.time = time.time()
        self.begun = time.monotonic()
        self.client = client

    def take_request(self, request):
        """Take the request line and the host, escaped; skipped if the log is off."""
        if access_log.isEnabledFor(logging.INFO):
            self.host = printable(request.authority or b"-")
            self.request = printable(b"%s %s HTTP/1.%d" % (
                request.method, mask_query(request.target), request.minor))

    def take_counts(self, tunnel):
        """Take what has passed through a tunnel; a scanner that gave up counts no messages."""
        self.up = max(tunnel.up.scanner.messages, self.up[0]), tunnel.up.bytes
        self.down = max(tunnel.down.scanner.messages, self.down[0]), tunnel.down.bytes
        self.rtt = tunnel.rtt

    def ended(self, reason, status=None, note=None):
        """The exchange could not continue; status only if no response has begun."""
        self.reason = reason
        self.status = status or self.status
        self.note = " ".join(note.split()).replace('"', "'") if note else self.note

    def closed_by(self, who, how, reason=None):
        """Record who ended the tunnel ("client", "backend" or "gate"), how and why.

        how: a close code, or "eof", "rst", "fin". The first one counts; what the gate has done
        it may do again in another way.
        """
        if self.closer is None or self.closer == who == "gate":
            self.closer, self.how = who, how
            self.reason = reason or self.reason

    def frames_lost(self, tunnel):
        """The bytes of the tunnel are not frames: messages are not counted any more."""
        self.frames = "lost"
        self.take_counts(tunnel)

    def note_refusal(self, request, response):
        """A backend refused a handshake: note what its response and the request disagree about."""
        self.reason = "backend_said_%d" % response.status
        location, origin = response.fields.get(b"location"), request.fields.get(b"origin")
        if location and response.status // 100 == 3:
            self.note = "redirected to %s" % printable(mask_query(location))
        elif origin and response.status == 403:
            self.note = "Origin %s, Host %s" % (printable(origin), printable(request.authority))

    def tunnel_begins(self):
        """Write one line now; the one at the end has the same ID and all fields."""
        self.handshake = time.monotonic() - self.begun
        self.counters.count_tunnel(self.handshake)
        self.write_line(event="open")

    def write(self):
        """Count the exchange and write the line at its end."""
        self.counters.count_exchange(self)
        if not access_log.isEnabledFor(logging.INFO):  # the fields alone cost some time
            return
        self.write_line(
            event="done" if self.handshake is None else "closed", request=self.request,
            status=self.status, dur=round(time.monotonic() - self.begun, 3), up=self.up,
            down=self.down, close=self.closer and "%s:%s" % (self.closer, self.how),
            reason=self.reason or "-", failed=self.failed or None, frames=self.frames,
            note=self.note, rtt=None if self.rtt is None else round(self.rtt, 4))

    def write_line(self, **fields):
        """Write a line of these fields and of those that each line has."""
        if access_log.isEnabledFor(logging.INFO):
            line = LogLine(fields, time=utc(self.time), id=self.id, client=self.client,
                           host=self.host, server=self.server, location=self.location,
                           hs=self.handshake and round(self.handshake, 3))
            for handler in access_log.handlers:
                handler.handle(line)


LOG_FIELDS = (  # the fields of an access log line in their order, and how each is written
    ("time", "%s"), ("id", "%s"), ("client", "%s"), ("host", "%s"), ("request", '"%s"'),
    ("status", "%s"), ("event", "%s"), ("location", "%s"), ("server", "%s"), ("dur", "dur=%s"),
    ("hs", "hs=%s"), ("up", "up=%d/%dB"), ("down", "down=%d/%dB"), ("close", "close=%s"),
    ("reason", "reason=%s"), ("failed", "failed=%s"), ("frames", "frames=%s"),
    ("note", 'note="%s"'), ("rtt", "rtt=%s"))


class LogLine(dict):
    """The fields of an access log line; those that are None are left out.

    Handlers take it for a logging.LogRecord: to make one would cost as much as the line.
    """

    levelname = "INFO"
    levelno = logging.INFO

    def getMessage(self):
        """Return the line as text, in the order of LOG_FIELDS: each is one word or in quotes."""
        self["location"] = self["location"].replace(" ", "\\x20")  # "= /exact" has two words
        return " ".join([form % self[name] for name, form in LOG_FIELDS
                         if self.get(name) is not None])

    def json(self):
        """Return the line as JSON; a pair of counts is two fields, e.g. up_messages, up_bytes."""
        fields = {name: value for name, value in self.items() if value is not None}
        for name in ("up", "down"):
            if name in fields:
                fields[name + "_messages"], fields[name + "_bytes"] = fields.pop(name)
        return json.dumps(fields, sort_keys=True)


def utc(seconds):
    """Return a Unix time as ISO 8601 text in UTC, with milliseconds."""
    return "%s.%03dZ" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)),
                         seconds % 1 * 1000)


def mask_query(target):
    """Return a request-target without the values of its query, where tokens often are."""
    path, question, query = target.partition(b"?")
    if not question:
        return target
    query = re.sub(br"=[^&;]+", b"=...", query)
    return path + question + re.sub(br"(^|[&;])[^&;=]{24,}", br"\1...", query)


REDACTED_FIELDS = frozenset(b"authorization proxy-authorization cookie set-cookie x-api-key"
                            b" sec-websocket-protocol sec-websocket-key".split())


def show_head(request):
    """Return a request's head for the debug log, without what must stay secret."""
    lines = [request.method + b" " + mask_query(request.target)]
    lines += [name + b": " + (b"..." if name.lower() in REDACTED_FIELDS else value)
              for name, value in request.fields]
    return "\n".join("  " + printable(line) for line in lines)


# ------------------------------------------------------------------ Log writers
#
# A thread that logs must never wait for the reader of a log: a stalled container runtime
# or syslogd would stop all traffic. So each of the two logs has a LogWriter: lines are
# formatted by the thread that logs, wait in a bounded queue, and are written by the writer's
# own thread. After a write it gathers lines for a moment, which costs fewer wake-ups and system
# calls than a write per line. What does not fit is dropped and counted.


class LogWriter(logging.Handler):
    """One open log: a bounded queue of lines, and a thread that writes them to a sink."""

    LIMIT = 1 << 20  # characters in the queue
    GATHER = 0.05    # seconds
    PATIENCE = 0.3   # seconds to write what is queued when the log is closed

    def __init__(self, where, sink, old=None):
        """where: the value of access_log or error_log. sink: an object with deliver(lines)
        that returns how many lines were lost, and close(). old: the LogWriter that this one
        replaces. Raises RuntimeError if there can be no more threads."""
        super().__init__()
        self.where = where
        self.sink = sink
        self.queue_lock = threading.Lock()
        self.changed = threading.Condition(self.queue_lock)  # there is something to do
        # Guarded by queue_lock:
        self.queue = []    # of (level name, text)
        self.size = 0      # characters in it
        self.dropped = old.dropped if old else 0    # lines, in all
        self.reported = old.reported if old else 0  # of these, in the error log; main thread alone
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.run, name="log writer", daemon=True)
        self.thread.start()

    def handle(self, record):
        """Queue a line, or drop it; in place of logging's own, which holds a lock over I/O."""
        try:
            text = self.format(record)
        except Exception:  # a mistake in a log line costs no connection
            return
        with self.queue_lock:
            if self.size + len(text) > self.LIMIT:
                self.dropped += 1
            else:
                if not self.queue:
                    self.changed.notify()
                self.queue.append((record.levelname, text))
                self.size += len(text)

    def run(self):
        """Write what is queued until close(), in the writer's own thread."""
        while self.queue or not self.closing.is_set():
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.closing.is_set())
                lines, self.queue, self.size = self.queue, [], 0
            lost = self.sink.deliver(lines)
            with self.queue_lock:
                self.dropped += lost
            self.closing.wait(self.GATHER)
        self.sink.close()

    def end(self):
        """Have the thread write what is queued and end."""
        super().close()
        self.closing.set()
        with self.changed:
            self.changed.notify()

    def close(self):
        """Write what is queued and end; wait for a sink that stalls no longer than PATIENCE."""
        if not self.closing.is_set():
            self.end()
            self.thread.join(self.PATIENCE)


class FileSink(io.FileIO):
    """Writes lines to a descriptor: a file, stdout or stderr."""

    def deliver(self, lines):
        """Write (level, text) pairs; return how many are lost, e.g. because the disk is full."""
        text = "".join([text + "\n" for _, text in lines])
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        while rest:
            try:
                rest = rest[os.write(self.fileno(), rest):]
            except BlockingIOError:  # a named pipe, or one that another process made non-blocking
                poll = Poll()
                poll.register(self.fileno(), POLLOUT)
                poll.poll(1000)
            except OSError:
                return bytes(rest).count(b"\n")
        return 0


class SyslogSink(logging.handlers.SysLogHandler):
    """Sends each line to syslogd, at (host, port) or a path, as a datagram (RFC 3164)."""

    append_nul = False
    ident = "wsgate: "  # without it syslogd takes the first word for the host

    def deliver(self, lines):
        """Send (level, text) pairs; return how many could not be sent."""
        self.lost = 0
        for level, text in lines:
            self.emit(logging.makeLogRecord({"levelname": level, "msg": text}))
        return self.lost

    def handleError(self, record):
        """Count a line that could not be sent."""
        self.lost += 1


def open_logs(server):
    """Open both logs that [server] names, again if they are open.

    Returns {key: error} of those that cannot be opened; they stay as they are.
    """
    log.setLevel(server.log_level.upper())
    access_log.setLevel(logging.CRITICAL if server.access_log == "off" else logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written costs no connection
    logging._srcfile = None  # do not look for caller and thread (Logging HOWTO, Optimization)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s",
                                  "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    access_line = operator.methodcaller("json" if server.log_format == "json" else "getMessage")
    errors = {}
    for key, form in (("error_log", formatter.format), ("access_log", access_line)):
        try:
            open_log(key, getattr(server, key), form, server.user)
        except (OSError, RuntimeError) as error:
            errors[key] = describe_error(error)
    return errors


LOGS = {"access_log": access_log, "error_log": log}


def open_log(key, where, form, user):
    """Give a log the one writer for this destination; raise OSError and keep the old one.

    form: a function that makes a line of a record.
    """
    writer = old = log_writers().get(key)
    # Only a file can have been replaced by another of its name.
    if not old or old.where != where or not where.startswith(("-", "syslog:")):
        writer = LogWriter(where, log_sink(where, sys.stderr if key == "error_log" else sys.stdout,
                                           user), old)
    writer.format = form
    LOGS[key].propagate = False
    LOGS[key].handlers = [writer]  # in one step: other threads are logging
    if old not in (None, writer):
        before = old.dropped
        old.close()
        with writer.queue_lock:  # what has been lost since writer was made
            writer.dropped += old.dropped - before


def log_sink(where, stream, user):
    """Return the sink for a value of access_log or error_log; raise OSError.

    stream: what - is. user: who will have to open the file again.
    """
    if where.startswith("syslog:"):
        host, _, port = where[7:].partition(":")
        return SyslogSink((host, int(port or 514)) if host else "/dev/log", "daemon")
    if where == "-" and stream:  # else it was closed by who started us
        return FileSink(os.dup(stream.fileno()), "w")
    if where in ("-", "off"):
        where = os.devnull
    try:  # without O_NONBLOCK a named pipe that has no reader would be waited for
        descriptor = os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT
                             | getattr(os, "O_NONBLOCK", 0), 0o644)
    except OSError as error:
        raise OSError(error.errno, "cannot write %s (%s)" % (where, error.strerror))
    give_to(user, where, descriptor)
    return FileSink(descriptor, "w")


def log_writers():
    """Return {"access_log" or "error_log": LogWriter} of the logs that are open."""
    return {key: handler for key, logger in LOGS.items()
            for handler in logger.handlers if isinstance(handler, LogWriter)}


def report_dropped_lines():
    """Log how many lines have been dropped, once the error log has room for that."""
    writers = log_writers()
    for key, writer in writers.items():
        dropped = writer.dropped - writer.reported
        if dropped and writers["error_log"].size < LogWriter.LIMIT // 2:
            writer.reported += dropped
            log.warning("%s: %d lines dropped (it cannot be written, or its reader stalls)",
                        key, dropped)


def close_logs():
    """Write what is queued and close both logs, within the PATIENCE of one."""
    report_dropped_lines()
    deadline, writers = time.monotonic() + LogWriter.PATIENCE, log_writers().values()
    for writer in writers:
        writer.end()
    for writer in writers:
        writer.thread.join(max(0.0, deadline - time.monotonic()))


# ----------------------------------------------------------------------- Status


class StatusConnection(socketserver.BaseRequestHandler):
    """One request to the status page: / /status.json /metrics /healthz /readyz."""

    def handle(self):
        """Read the request, send the response, close."""
        stream, deadline = Stream(self.request, Turns()), Deadline(STATUS_TIMEOUT)
        head_only, fields = False, ()
        # The client may disconnect.
        with contextlib.suppress(OSError, EOFError, TimedOut), contextlib.closing(stream):
            try:
                request = parse_request_head(read_head(stream, SMALL_READ, deadline))
                head_only = request.method == b"HEAD"
                status, kind, text = self.page(self.server.gate, request)
            except HTTPError as error:
                status, kind, fields = error.status, b"text/plain", error.fields
                text = ": ".join(filter(None, (error.reason, error.detail))) + "\n"
            stream.write_all(make_response(status, None, text.encode(), STATUS_FIELDS + fields,
                                           head_only=head_only, content_type=kind), deadline)
            stream.linger(Deadline(LINGER))

    def page(self, gate, request):
        """Return (status, content type, text); raise HTTPError."""
        self.check_client(gate.config.server, request)
        if request.method not in (b"GET", b"HEAD"):
            raise HTTPError(405, "method_not_allowed", "", ((b"Allow", b"GET, HEAD"),))
        path, _, query = request.target.decode("ascii").partition("?")
        if path not in STATUS_PAGES:
            raise HTTPError(404, "no_route", "no such page")
        kind, text = STATUS_PAGES[path]
        return (503 if path == "/readyz" and gate.state != "running" else 200, kind,
                text(gate, query))

    def check_client(self, server, request):
        """Raise HTTPError unless status_allow has the client and Host is one of ours.

        Whoever can connect to a Unix socket is allowed. A web page that lets its own name point
        to this address (DNS rebinding) sends that name in Host.
        """
        if not isinstance(self.client_address, tuple):
            return
        if not trusted(server.status_allow, self.client_address[0]):
            raise HTTPError(403, "access_denied", "this address is not in status_allow")
        host = request.host.strip("[]")  # "": HTTP/1.0 without Host
        if (host not in ("", "localhost", self.server.listen.address.host.lower())
                and parse_ip(host) is None):
            raise HTTPError(403, "access_denied", "Host is not an address, localhost or the name"
                                                  " in status_listen")


STATUS_TIMEOUT = 5  # seconds for a whole exchange
STATUS_PAGES = {    # path: (content type, function that returns the text)
    "/": (b"text/html", lambda gate, query: status_page(status_with_tunnels(gate), query)),
    "/status.json": (b"application/json",
                     lambda gate, _: json.dumps(status_with_tunnels(gate), indent=1) + "\n"),
    "/metrics": (b"text/plain; version=0.0.4", lambda gate, _: metrics(status(gate))),
    "/healthz": (b"text/plain", lambda gate, _: "ok\n"),
    "/readyz": (b"text/plain",
                lambda gate, _: "%s\n" % gate.state.replace("running", "ready")),
}
STATUS_FIELDS = (
    (b"Cache-Control", b"no-store"),
    (b"Content-Security-Policy", b"default-src 'none'; style-src 'unsafe-inline';"
                                 b" base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"X-Frame-Options", b"DENY"),
    (b"X-Content-Type-Options", b"nosniff"),
)


def status(gate):
    """Return what the status pages show, except the open tunnels, as a dict."""
    now, connections, counters = time.monotonic(), gate.connections, gate.counters
    with counters.lock:
        totals, handshakes = counters.totals.copy(), list(counters.handshakes)
        statuses = {str(code): count for code, count in sorted(counters.statuses.items())}
    bounds = ["%g" % bound for bound in HANDSHAKE_BUCKETS] + ["+Inf"]
    tunnels, up, down = counters.traffic(connections.tunnels())
    return {"version": VERSION, "state": gate.state, "started": round(counters.started, 3),
            "uptime": round(time.time() - counters.started), "connections": len(connections),
            "capacity": connections.capacity, "capacity_reason": connections.limited_by,
            "tunnels_open": tunnels, "requests": sum(statuses.values()),
            "tunnels": totals["tunnels"], "bytes": {"up": up, "down": down},
            "statuses": statuses, "refusals": counted(totals, "refused_"),
            "ends": counted(totals, "end_"),
            "handshakes": dict(zip(bounds, itertools.accumulate(handshakes))),
            "handshake_sum": totals["handshake_sum"],
            "log_lines_dropped": {key: writer.dropped for key, writer in log_writers().items()},
            "servers": [describe_server(upstream, server, now)
                        for upstream in gate.config.upstreams for server in upstream.servers],
            "history": rates(list(counters.samples))}


def status_with_tunnels(gate):
    """Return what status() does, with the open tunnels as "live"."""
    return dict(status(gate), live=[describe_tunnel(tunnel, time.monotonic())
                                    for tunnel in gate.connections.tunnels()])


def describe_server(upstream, server, now):
    """Return what the status pages show of a Server, as a dict."""
    available = server.available(now)
    return {"upstream": upstream.name, "server": server.name, "active": server.health.active,
            "selected": server.health.selected, "up": not server.down and available,
            "state": "down" if server.down else "up" if available else "unavailable",
            "backup": server.backup}


def describe_tunnel(tunnel, now):
    """Return what the status pages show of an open Tunnel, as a dict."""
    entry, flows = tunnel.record, (tunnel.up, tunnel.down)
    scanners = [flow.scanner for flow in flows]
    data = max([each.last_data for each in scanners if each.last_data] or [tunnel.last_byte])
    return {
        "id": entry.id, "age": round(now - tunnel.opened, 1), "client": entry.client,
        "location": entry.location, "server": entry.server, "last_data": round(now - data, 1),
        "last_byte": round(now - tunnel.last_byte, 1),
        "up_messages": scanners[0].messages, "up_bytes": flows[0].bytes,
        "down_messages": scanners[1].messages, "down_bytes": flows[1].bytes,
        "rtt": None if tunnel.rtt is None else round(tunnel.rtt, 4)}


def rates(samples):
    """Return Counters.samples as [(tunnels, bytes up per second, bytes down per second)]."""
    return [(new[1], max(0, new[2] - old[2]) / (new[0] - old[0]),
             max(0, new[3] - old[3]) / (new[0] - old[0]))
            for old, new in zip(samples, samples[1:])]


def counted(totals, prefix):
    """Return what Counters.totals has under this prefix as {word: count}."""
    return {name[len(prefix):]: count for name, count in sorted(totals.items())
            if name.startswith(prefix)}


METRICS = (  # name, kind, key of status(), label or key of what is in it, meaning
    ("start_time_seconds", "gauge", "started", None, "Start of the process, in Unix time."),
    ("connections", "gauge", "connections", None, "Open client connections."),
    ("connections_limit", "gauge", "capacity", None, "Maximum number of client connections."),
    ("tunnels", "gauge", "tunnels_open", None, "Open tunnels."),
    ("requests_total", "counter", "statuses", "status", "Exchanges that have ended, by status."),
    ("refusals_total", "counter", "refusals", "reason",
     "Exchanges that wsgate refused, by reason."),
    ("tunnel_ends_total", "counter", "ends", "reason", "Tunnels that have ended, by reason."),
    ("bytes_total", "counter", "bytes", "direction",
     "Payload relayed, from (up) and to (down) clients."),
    ("log_lines_dropped_total", "counter", "log_lines_dropped", "log",
     "Log lines that could not be written."),
    ("server_active", "gauge", "servers", "active", "Open exchanges and tunnels of a server."),
    ("server_up", "gauge", "servers", "up", "0 while a server is unavailable or marked down."),
    ("handshake_seconds", "histogram", "handshakes", "le", "Time from a request to its 101."),
)


def metrics(facts):
    """Return the dict of status() in the Prometheus text format, version 0.0.4."""
    lines = []
    quoted = json.JSONEncoder(ensure_ascii=False).encode  # as label values are
    for name, kind, key, label, meaning in METRICS:
        lines += ["# HELP wsgate_%s %s" % (name, meaning), "# TYPE wsgate_%s %s" % (name, kind)]
        if key == "servers":
            lines += ["wsgate_%s{upstream=%s,server=%s} %d" % (
                name, quoted(each["upstream"]), quoted(each["server"]), each[label])
                for each in facts[key]]
        elif label:
            name += "_bucket" if kind == "histogram" else ""
            lines += ['wsgate_%s{%s="%s"} %s' % (name, label, word, count)
                      for word, count in facts[key].items()]
        else:
            lines.append("wsgate_%s %s" % (name, facts[key]))
    lines += ["wsgate_handshake_seconds_sum %s" % facts["handshake_sum"],
              "wsgate_handshake_seconds_count %d" % facts["handshakes"]["+Inf"]]
    return "\n".join(lines) + "\n"


STATUS_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="refresh" content="5"><meta name="viewport" content="width=device-width">
<title>wsgate: {tunnels_open} tunnels</title>
<style>
:root{{color-scheme:light dark;--line:#8884}}
body{{font:15px/1.45 system-ui,sans-serif;margin:1em auto;max-width:70em;padding:0 1em}}
h1{{font-size:1.3em}} h2{{font-size:1.05em;margin:1.6em 0 .4em}}
.facts{{display:flex;flex-wrap:wrap;gap:.6em 2em}} .facts b{{display:block;font-size:1.5em}}
.wide{{overflow-x:auto}} table{{border-collapse:collapse;width:100%}}
th,td{{text-align:right;padding:.25em .6em;border-bottom:1px solid var(--line);white-space:nowrap;
font-variant-numeric:tabular-nums}}
tr>:first-child,.servers tr>:nth-child(2),.live tr>:nth-child(n+3):nth-child(-n+5){{
text-align:left}}
svg{{width:100%;height:7em;border-bottom:1px solid var(--line)}}
path{{fill:none;stroke-width:1.5;vector-effect:non-scaling-stroke}}
.a{{stroke:#36c}} .b{{stroke:#2a2}} .c{{stroke:#d70}} .ta{{color:#36c}} .tb{{color:#2a2}}
.tc{{color:#d70}} .unavailable>:nth-child(3),.down>:nth-child(3){{color:#d22;font-weight:bold}}
</style><h1>wsgate {version} <small>{state}, up {uptime}</small></h1>
<div class="facts"><div><b>{tunnels_open}</b>tunnels open</div>
<div><b>{connections}</b>connections of {capacity} ({capacity_reason})</div>
<div><b>{tunnels}</b>tunnels in all</div><div><b>{requests}</b>exchanges ended</div></div>
<h2>Last ten minutes: <span class="ta">tunnels</span>, <span class="tb">bytes/s up</span>,
<span class="tc">bytes/s down</span></h2>
<svg viewBox="0 0 120 100" preserveAspectRatio="none" role="img"
 aria-label="tunnels and bytes per second">{curves}</svg>
<p>{peaks}</p><h2>Servers</h2><div class="wide"><table class="servers">
<tr><th>upstream<th>server<th>state<th>active<th>selected</tr>{servers}</table></div>
<h2>Tunnels, by <a href="?sort=age">age</a> or <a href="?sort=bytes">bytes</a></h2>
<div class="wide"><table class="live"><tr><th>id<th>age<th>client<th>location<th>server
<th>messages up<th>bytes up<th>messages down<th>bytes down<th>last data<th>rtt</tr>{live}</table>
</div><h2>Refused by wsgate</h2><p>{refusals}</p></html>
"""


def status_page(facts, query):
    """Return the dict of status() as HTML that refreshes itself; no script, nothing loaded."""
    keys = ("up_bytes", "down_bytes") if query == "sort=bytes" else ("age",)
    live = sorted(facts["live"], key=lambda each: -sum(each[key] for key in keys))[:500]
    curves, peaks = status_curves(facts["history"])
    return STATUS_PAGE.format(**dict(
        facts, uptime=scaled(facts["uptime"], DURATION), curves=curves, peaks=peaks,
        servers="".join(server_row(each) for each in facts["servers"]),
        live="".join(tunnel_row(each) for each in live),
        refusals=html.escape(", ".join("%s %d" % pair for pair in facts["refusals"].items())
                             or "nothing")))


def status_curves(history):
    """Return (SVG paths, text of the peaks) for the history that rates() makes."""
    curves, peaks = [], []
    for column, (kind, name) in enumerate((("a", "tunnels"), ("b", "bytes/s up"),
                                           ("c", "bytes/s down"))):
        values = [sample[column] for sample in history]
        peak = max(values, default=0)
        points = ["%d,%.1f" % (120 - len(values) + place, 98 - 96 * value / peak if peak else 98)
                  for place, value in enumerate(values)]
        if points:
            curves.append('<path class="%s" d="M%s"/>' % (kind, " L".join(points)))
        peaks.append("most %s: %s" % (name, scaled(peak, AMOUNT)))
    return "".join(curves), ", ".join(peaks)


def server_row(each):
    """Return a row of the table of servers; each: the dict of describe_server."""
    return table_row((each["upstream"] if each["upstream"] != each["server"] else "-",
                      each["server"], each["state"] + (" (backup)" if each["backup"] else ""),
                      each["active"], each["selected"]), each["state"])


def tunnel_row(each):
    """Return a row of the table of tunnels; each: the dict of describe_tunnel."""
    return table_row((each["id"], scaled(each["age"], DURATION), each["client"], each["location"],
                      each["server"], each["up_messages"], scaled(each["up_bytes"], AMOUNT),
                      each["down_messages"], scaled(each["down_bytes"], AMOUNT),
                      scaled(each["last_data"], DURATION),
                      "-" if each["rtt"] is None else "%.1f ms" % (each["rtt"] * 1000)))


def table_row(values, kind=""):
    """Return a row of a table; kind: its class."""
    return '<tr class="%s">%s' % (
        kind, "".join("<td>%s" % html.escape(str(value)) for value in values))


# Units for people: (from which number, size, format).
DURATION = ((172800, 86400, "%dd"), (7200, 3600, "%dh"), (120, 60, "%dm"), (-math.inf, 1, "%ds"))
AMOUNT = ((1e9, 1e9, "%.1fG"), (1e6, 1e6, "%.1fM"), (1e3, 1e3, "%.1fk"), (-math.inf, 1, "%d"))


def scaled(number, units):
    """Return a number in the first of these units that it reaches: '90m', '3.4k'."""
    return next(form % (number / size) for least, size, form in units if number >= least)


# ----------------------------------------------------------------- Command line


def main(argv=None):
    """Do what the command line asks for and return the exit status.

    0: done. 1: configuration or run-time error. 2: usage (argparse exits with it).
    """
    arguments = parse_arguments(argv)
    try:
        for wanted, action in (
                (arguments.print_config, print_config), (arguments.print_unit, print_unit),
                (arguments.hash_password, print_password), (arguments.demo, demo),
                (arguments.probe, probe), (arguments.t, check_config),
                (arguments.s, send_signal)):
            if wanted:
                return action(arguments) or 0
        return run_gate(*find_config(arguments))
    except ConfigError as error:
        print_error(*error.errors)
    except KeyboardInterrupt:
        return 1 if arguments.probe else 0  # an interrupted probe has no verdict
    except (OSError, ValueError) as error:
        print_error(describe_error(error))
    return 1


def print_error(*lines):
    """Print lines to stderr, each with the name of the program."""
    sys.stderr.writelines("wsgate: %s\n" % line for line in lines)


def parse_arguments(argv):
    """Return an argparse.Namespace; exit after -h, -v and wrong usage."""
    parser = argparse.ArgumentParser(
        prog="wsgate.py", description="A WebSocket reverse proxy in one file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  wsgate.py --demo\n"
               "  wsgate.py --listen :8080 --backend http://127.0.0.1:9000\n"
               "  wsgate.py -c wsgate.ini -t\n  wsgate.py -s reload")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for names, facts in options.items():
            group.add_argument(*names.split(), **facts)
    return parser.parse_args(argv)


def argument(parse):
    """Return a parser of values for argparse, which shows the text of one exception only."""
    def convert(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error))
    return convert


CONTROL = {"quit": "SIGQUIT", "reload": "SIGHUP", "reopen": "SIGUSR1", "stop": "SIGTERM",
           "upgrade": "SIGUSR2"}
OPTIONS = {  # title of a group: {names of an option: what add_argument() takes}
    "run": {
        "-c": dict(metavar="FILE", help="configuration file (default: ./wsgate.ini, then"
                                        " wsgate.ini beside wsgate.py)"),
        "--listen": dict(metavar="ADDRESS", help="listen on this address, in place of the file's"),
        "--backend": dict(metavar="URL", help="forward all requests to this backend: a URL,"
                                              " host:port or port"),
        "--demo": dict(action="store_true", help="run a gateway, an echo backend and a test page"),
    },
    "control a running process": {
        "-s": dict(metavar="SIGNAL", choices=list(CONTROL),
                   help="send a signal through the pid file: %s" % ", ".join(CONTROL)),
    },
    "check and print": {
        "-t": dict(action="store_true", help="test the configuration and report all errors"),
        "--probe": dict(metavar="URL", help="perform a WebSocket handshake and explain the result;"
                                            " /path: with each backend of the configuration, then"
                                            " with the gateway"),
        "--hash-password": dict(metavar="USER", help="read a password and print a line for"
                                                     " auth_basic_user_file"),
        "--print-config": dict(action="store_true", help="print a wsgate.ini that lists every key"
                                                         " with its default"),
        "--print-unit": dict(action="store_true", help="print a systemd unit"),
        "-v --version": dict(action="version", version="wsgate %s, Python %s" % (
            VERSION, sys.version.split()[0])),
    },
    "with --probe": {
        "--header": dict(metavar="'NAME: VALUE'", action="append", default=[],
                         help="add or replace a header field"),
        "--origin": dict(metavar="URL", help="send this Origin, as a browser does"),
        "--subprotocol": dict(metavar="NAME", help="offer this Sec-WebSocket-Protocol"),
        "--cafile": dict(metavar="FILE", help="CA file (PEM) to verify the server with"),
        "--insecure": dict(action="store_true", help="do not verify the certificate"),
        "--message": dict(metavar="TEXT", help="send a message and wait for its echo"),
        "--count": dict(metavar="N", type=argument(parse_count),
                        help="number of echo round trips"),
        "--idle": dict(metavar="TIME", type=argument(parse_timeout),
                       help="then stay idle for this long and report who closes the connection"),
        "--timeout": dict(metavar="TIME", type=argument(parse_timeout), default="10s",
                          help="time limit of each step without --idle (default: 10s)"),
    },
}


def find_config(arguments):
    """Return (path or None, {key: text} for [server]) as the command line says."""
    path = arguments.c
    overrides = {} if arguments.listen is None else {"listen": arguments.listen}
    if arguments.backend is not None:  # PORT, :PORT
        where = re.sub(r"^:?(?=[0-9]+(?:/|$))", "127.0.0.1:", arguments.backend)
        overrides["proxy_pass"] = where if "://" in where else "http://" + where
    elif not path:
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wsgate.ini")
        path = next(filter(os.path.exists, ("wsgate.ini", beside)), None)
        if not path:
            print_error("no wsgate.ini here or beside wsgate.py; using the defaults")
    return path, overrides


def check_config(arguments):
    """-t: print warnings and nginx's own line of success; raise ConfigError with all errors."""
    path, overrides = find_config(arguments)
    print_error(*["warning: %s" % line for line in load_config(path, overrides).warnings])
    print_error("configuration %s test is successful" % (
        "file %s" % path if path else "of the command line"))


def send_signal(arguments):
    """-s: signal the process whose ID is in the pid file of the configuration."""
    path, overrides = find_config(arguments)
    require(path, "-s reads pid from the configuration of the running process (use -c FILE)")
    pid_file = require(reload_config(path, overrides).server.pid,
                       "-s needs pid = FILE in [server]")
    number = require(running_gate(pid_file), "no wsgate process with the PID in %s", pid_file)
    os.kill(number, getattr(signal, CONTROL[arguments.s]))


def print_password(arguments):
    """--hash-password: read a password and print the line for auth_basic_user_file."""
    try:
        # getpass reads the terminal even if a password is piped in.
        password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    except EOFError:
        sys.stderr.write("\n")
        password = ""
    require(password, "no password given")
    sys.stdout.write("%s:%s\n" % (arguments.hash_password,
                                  hash_password(password.encode()).decode()))


SAMPLE = """\
# wsgate.ini: a complete configuration; every key with its default.
#
#   python3 wsgate.py -t                test it
#   python3 wsgate.py                   run it
#   python3 wsgate.py -s reload         apply changes (needs pid)
#
# Durations: 500ms 30s 10m 2h 1d, or a number of seconds. Sizes: 512 16k 1m 1g, in
# bytes. Lists: separated by commas, spaces or lines; a line that continues a value
# is indented. Comments have lines of their own. Two lines are a complete file:
# [server] and proxy_pass = http://host:port.

[server]
%s

# Every key of a location is also allowed in [server], as the default of all locations,
# which a location overrides (allow = removes it). Locations: [location /prefix],
# [location HOST,HOST/prefix], [location *.example.com/prefix], [location = /exact]. The
# most specific host wins, then the exact path, then the longest prefix.

[location /]
proxy_pass = http://127.0.0.1:9000
%s

# A group of servers, used by proxy_pass = http://NAME.

#[upstream NAME]
%s
"""


def print_config(arguments):
    """--print-config: print wsgate.ini, made from the tables."""
    location = dict(LOCATION_KEYS)
    certificate = {name: location.pop(name) for name in ("ssl_certificate", "ssl_certificate_key")}
    tables = dict(SERVER_KEYS, **certificate), location, UPSTREAM_KEYS
    sys.stdout.write(SAMPLE % tuple(map(sample_of, tables)))


def sample_of(table):
    """Return the keys of a table with their defaults, as comments of wsgate.ini."""
    return "\n".join(
        "%s\n#%s" % (textwrap.fill(key.meaning, 88, initial_indent="# ", subsequent_indent="# "),
                     ("%s = %s" % (name, key.default)).rstrip())
        for name, key in table.items() if name != "proxy_pass")


UNIT = """\
# /etc/systemd/system/wsgate.service, then: systemctl daemon-reload; systemctl enable --now wsgate
[Unit]
Description=wsgate WebSocket reverse proxy
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
NotifyAccess=all
ExecStart=%(python)s %(file)s -c /etc/wsgate.ini
ExecReload=/bin/kill -HUP $MAINPID
KillSignal=SIGQUIT
TimeoutStopSec=60
Restart=on-failure
WatchdogSec=60
DynamicUser=yes
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
LimitNOFILE=65536
TasksMax=infinity
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RuntimeDirectory=wsgate
LogsDirectory=wsgate
# For keys that only root can read, such as those of certbot (restart wsgate after a renewal):
#LoadCredential=cert.pem:/etc/letsencrypt/live/NAME/fullchain.pem
#LoadCredential=key.pem:/etc/letsencrypt/live/NAME/privkey.pem
# and in wsgate.ini:
#   ssl_certificate = /run/credentials/wsgate.service/cert.pem
#   ssl_certificate_key = /run/credentials/wsgate.service/key.pem

[Install]
WantedBy=multi-user.target
"""


def print_unit(arguments):
    """--print-unit: print a unit for this file and this Python; warn if it could not read them."""
    python, file = sys.executable, os.path.abspath(__file__)
    sys.stdout.write(UNIT % {"python": python, "file": file})
    for path in (python, file):
        if path.startswith((os.path.expanduser("~") + "/", "/home/", "/tmp/", "/var/tmp/")):
            print_error("the unit cannot read %s (ProtectHome, PrivateTmp); move it, e.g. to"
                        " /usr/local" % path)


# ------------------------------------------------------------------------- Demo


def demo(arguments):
    """--demo: run wsgate and a backend in one process; return the exit status."""
    backend = DemoBackend()
    overrides = {"listen": arguments.listen or "127.0.0.1:8080", "ping_interval": "5s",
                 "proxy_pass": "http://127.0.0.1:%d" % backend.server_address[1]}

    def ready(gate):
        """Called once it listens."""
        backend.gate = gate
        print_error("open %s in a browser; Ctrl-C ends it" % gate.listeners[0].url())
    return run_gate(None, overrides, ready)


DEMO_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>wsgate demo</title><style>
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:46em;margin:2em auto;padding:0 1em}
input{font:inherit;width:70%;padding:.3em} button{font:inherit;padding:.3em 1em}
pre{background:#8882;padding:.8em;white-space:pre-wrap}
#state{font-weight:bold}</style>
<h1>wsgate works</h1>
<p>The WebSocket of this page is connected through wsgate to an echo backend:
<span id="state">connecting</span>. <span id="rtt"></span></p>
<form><input id="text" autofocus placeholder="Type a message, press Enter">
<button>Send</button></form>
<pre id="log"></pre>
<h2>The handshake as received by the backend</h2><pre id="head">...</pre>
<script>
const element = id => document.getElementById(id)
const url = location.href.replace(/^http/, "ws").replace(/[?#].*/, "") + "socket"
const socket = new WebSocket(url)
const log = text => element("log").textContent = text + "\\n" + element("log").textContent
socket.onopen = () => { element("state").textContent = "connected"; socket.send("head") }
socket.onclose = event =>
  element("state").textContent = "closed with " + event.code + " " + event.reason
let head = true
socket.onmessage = event => {
  if (head) { element("head").textContent = event.data; head = false }
  else log("echo: " + event.data)
}
document.forms[0].onsubmit = event => {
  event.preventDefault()
  log("sent: " + element("text").value)
  socket.send(element("text").value)
  element("text").value = ""
}
setInterval(async () => element("rtt").textContent = await (await fetch("rtt")).text(), 1000)
</script></html>
"""


class DemoBackend(socketserver.ThreadingTCPServer):
    """A backend on a port of its own: a page, an echo and the round-trip time of wsgate's pings."""

    daemon_threads = True
    gate = None  # set once it listens

    def __init__(self):
        super().__init__(("127.0.0.1", 0), DemoConnection)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """Ignore a browser that disconnects."""


class DemoConnection(socketserver.BaseRequestHandler):
    """One connection to the DemoBackend, for one request."""

    def handle(self):
        stream, deadline = Stream(self.request, Turns()), Deadline(86400)
        head = read_head(stream, SMALL_READ, deadline)
        request = parse_request_head(head)
        key = handshake_key(request)
        if key:
            self.echo(stream, head, key, deadline)
        elif request.path == "/":
            stream.write_all(make_response(200, None, DEMO_PAGE.encode(),
                                           content_type=b"text/html"), deadline)
        else:
            times = [tunnel.rtt for tunnel in self.server.gate.connections.tunnels()
                     if tunnel.rtt]
            text = "The last ping of wsgate took %.1f ms." % (times[-1] * 1000) if times else ""
            stream.write_all(make_response(200, None, text.encode()), deadline)

    def echo(self, stream, head, key, deadline):
        """Send each message back, in place of 'head' the handshake; up to the Close."""
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                         b"Connection: Upgrade\r\n"
                         b"Sec-WebSocket-Accept: " + accept_for(key) + b"\r\n\r\n", deadline)
        for opcode, payload in read_frames(stream, deadline):
            if payload == b"head":
                payload = head.strip()
            stream.write_all(make_frame(PONG if opcode == PING else opcode, payload,
                                        masked=False), deadline)
            if opcode == CLOSE:
                stream.linger(Deadline(LINGER))
                return


def read_frames(stream, deadline):
    """Yield (opcode, payload) of each frame, unmasked, to the end of the stream.

    A frame of more than 1 MiB ends it too. Raise TimedOut at the deadline, also in a flood.
    """
    while True:
        deadline.remaining()
        data = stream.buffer
        header, length = frame_header(data) or (0, 0)
        if length > 1 << 20:
            return
        if header and len(data) >= header + length:
            payload = data[header:header + length]
            stream.buffer = data[header + length:]
            if data[1] & 0x80:
                payload = apply_mask(payload, data[header - 4:header])
            yield data[0] & 0x0F, payload
        elif not stream.read_more(deadline):
            return


# -------------------------------------------------------------- Probe: verdicts

VERDICTS = {  # word: (what happened, what to do)
    "works": ("101, and the WebSocket works", ""),
    "wrong_accept": (
        "101, but Sec-WebSocket-Accept does not match the key: the response of a cache, or of a"
        " server without WebSocket support",
        "probe the backend directly; bypass caches and whatever rewrites responses"),
    "not_upgraded": (
        "101 without Upgrade: websocket and Connection: Upgrade; browsers reject it",
        "the server omitted them, or a proxy removed these hop-by-hop fields"),
    "wrong_choice": (
        "101 with %(chosen)s where %(offered)s was offered; browsers reject it",
        "offer a subprotocol of the server (--subprotocol), or let it select an offered one"),
    "wrong_version": (
        "%(status)d: this Sec-WebSocket-Version is not supported",
        "use one that the response lists; browsers send 13"),
    "cut": (
        "101, and closed after %(seconds).1f s: %(how)s",
        "see the server's log; if it was idle, raise the idle timeout on the path, or send pings"
        " (wsgate: ping_interval)"),
    "page": (
        "200 OK: a regular page; the Upgrade header did not reach a WebSocket endpoint",
        "compare the path with the application's; each proxy must pass Upgrade and Connection"),
    "redirected": (
        "%(status)d: redirect to %(location)s, which WebSocket clients do not follow",
        "use that URL (a prefix? https?), or log in and send the cookie: --header 'Cookie: ...'"),
    "headers_lost": (
        "400: most often Upgrade and Connection were removed by a proxy",
        "both are hop-by-hop: each proxy must set them, over HTTP/1.1; see the body above and the"
        " server's log"),
    "login_needed": (
        "401: authentication required",
        "--header 'Authorization: ...' or --header 'Cookie: ...'"),
    "origin_denied": (
        "403: most often because Origin (%(origin)s) does not match Host (%(host)s)",
        "each proxy must pass Host unchanged (nginx: proxy_set_header Host $http_host); allow the"
        " origin, or try another one: --origin"),
    "wrong_path": (
        "404: no WebSocket endpoint at %(target)s on Host %(host)s",
        "check the path, and whether a proxy adds or removes a prefix"),
    "upgrade_missing": (
        "426: Upgrade or Connection was removed by a proxy before the server that responded",
        "both are hop-by-hop: each proxy must set them, over HTTP/1.1; see the body above"),
    "conn_limit_per_ip": ("429: too many requests or connections from this address", "retry later"),
    "bad_gateway": (
        "502: the proxy cannot reach its backend",
        "start the backend; check its port; write 127.0.0.1 for localhost, which may be ::1; probe"
        " it from that machine"),
    "unavailable": (
        "503: the proxy has no backend available",
        "start the backend; check its health checks and limits"),
    "gateway_timeout": (
        "504: the backend did not respond to its proxy in time",
        "probe it from that machine; check firewalls"),
    "other_status": (
        "%(status)d is not a response to a WebSocket handshake",
        "see the body above and the server's log"),
    "unresolved": (
        "host name not resolved: %(error)s", "check its spelling, and DNS on this machine"),
    "refused": (
        "connection refused by %(where)s", "start the server; check its address and port"),
    "unreachable": (
        "cannot connect to %(where)s: %(error)s", "check address, route and firewall"),
    "timeout": (
        "no %(step)s within %(timeout)g s",
        "a firewall drops the packets, the server is stuck, or it is a TLS port (wss://)"),
    "closed": (
        "%(where)s closed the connection without a response: %(error)s",
        "is it a TLS port (wss://)? else see its log"),
    "certificate": (
        "%(error)s",
        "trust its CA (--cafile; in wsgate.ini proxy_ssl_trusted_certificate), or do not verify it"
        " (--insecure; proxy_ssl_verify = off)"),
    "plain_port": ("no TLS on this port", "use ws:// or http:// here, or the port with TLS"),
    "tls_port": ("TLS is required on this port", "use wss:// or https:// here"),
    "tls_failed": (
        "TLS handshake failed: %(error)s",
        "is it a port without TLS, an unknown host name (SNI), or is a client certificate"
        " required?"),
    "garbage": (
        "the response is not valid HTTP or WebSocket: %(error)s",
        "another program listens on this port"),
}
STATUS_VERDICTS = {  # of a response without a reason word of wsgate: the most frequent cause
    200: "page", 301: "redirected", 302: "redirected", 303: "redirected", 307: "redirected",
    308: "redirected", 400: "headers_lost", 401: "login_needed", 403: "origin_denied",
    404: "wrong_path", 426: "upgrade_missing", 429: "conn_limit_per_ip", 502: "bad_gateway",
    503: "unavailable", 504: "gateway_timeout"}


class Verdict(Exception):
    """Ends a probe. word: the result; facts: for its sentence.

    sentence: (what happened, what to do), if not that of VERDICTS.
    """

    def __init__(self, word, sentence=None, **facts):
        super().__init__(word)
        self.word = word
        self.sentence = sentence or VERDICTS[word]
        self.facts = facts


def refusal(status, reason):
    """Return the Verdict of a refused handshake: by wsgate's reason word, else by status."""
    row = reason_row(reason)
    if row is None:
        return Verdict(STATUS_VERDICTS.get(status, "other_status"))
    return Verdict(reason, ("rejected by wsgate: " + row.meaning, row.remedy))


# ------------------------------------------------------------------------ Probe

PROBE_UPGRADE = Upgrade(b"websocket", b"Upgrade", True, None, None)
# Those of REDACTED_FIELDS that are shown: they explain the result.
SHOWN_FIELDS = frozenset((b"sec-websocket-key", b"sec-websocket-protocol"))


def probe(arguments):
    """--probe URL or /path: return the exit status, 0 only if the WebSocket works."""
    if arguments.probe.startswith("/"):
        return probe_config(arguments)
    tls, authority, target = require(
        re.fullmatch(r"(?i)(?:ws|http)(s?)://([^\s/?#@]+)/?([^\s#]*)(?:#\S*)?", arguments.probe),
        "invalid URL %r (expected ws://host[:port]/path, wss://... or a /path of the"
        " configuration)", arguments.probe).groups()
    port = 443 if tls else 80
    server = Server(parse_address(authority, default_port=port))
    head = handshake_head(arguments, re.sub(":%d$" % port, "", authority), "/" + target)
    context = probe_context(not arguments.insecure, arguments.cafile) if tls else None
    return 0 if Probe(arguments, server, head, context).run().word == "works" else 1


def probe_config(arguments):
    """-c FILE --probe /path: probe each backend with what wsgate would send to it, then wsgate.

    Return the exit status, 0 if all work.
    """
    config = load_config(*find_config(arguments))
    listen = min(config.server.listen, key=lambda each: each.redirect)
    host = loopback_for(listen.address.host)
    gate = Server(listen.address._replace(host=host))
    head = handshake_head(arguments, gate.name if host else "localhost", arguments.probe)
    try:
        request = parse_request_head(head)
    except HTTPError as error:
        raise ValueError("wsgate would reject this request: %s" % error)
    location = require(config.route(request.host, request.path),
                       "no [location] for this path on host %s (expected another path, or"
                       " --header 'Host: NAME')", request.host)
    address = "::1" if ":" in (host or "") else "127.0.0.1"
    client = ClientInfo(  # this process, as wsgate would see it
        peer=address, address=address, port=0, scheme=b"https" if listen.ssl else b"http",
        subject=b"", trusted=(not listen.proxy_protocol
                              and trusted(config.server.set_real_ip_from, address)),
        server_address=address, server_port=listen.address.port or 0)
    request.withheld, proxy, probes = location.withheld, location.websocket_proxy, []
    for server in proxy.upstream.servers if proxy else ():
        print_line("Backend %s of [location %s]:" % (server.name, location.name))
        probes.append(Probe(
            arguments, server,
            request_head_for_backend(request, location, client, server, PROBE_UPGRADE),
            proxy.context, location.proxy_ssl_name, location.proxy_protocol).run())
    print_line("wsgate at %s:" % gate.name)
    probes.append(Probe(arguments, gate, head, probe_context(False) if listen.ssl else None,
                        request.host, listen.proxy_protocol).run())
    compare(probes)
    return 0 if all(each.word == "works" for each in probes) else 1


def compare(probes):
    """Print status, verdict and the fields that differ, side by side; then where to look."""
    fields = [each.response.fields if each.response else Headers() for each in probes]
    rows = [[""] + [each.server.name for each in probes[:-1]] + ["wsgate"],
            ["status"] + [str(each.response.status) if each.response else "-" for each in probes],
            ["verdict"] + [each.word for each in probes]]
    names = set().union(*[each.index for each in fields]) - REDACTED_FIELDS
    for name in sorted(names - {b"date", b"sec-websocket-accept"}):
        values = [printable(b", ".join(each.get_all(name)))[:40] or "-" for each in fields]
        if len({value.lower() for value in values}) > 1:
            rows.append([printable(name)] + values)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print_line("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    bad = [each.server.name for each in probes[:-1] if each.word != "works"]
    print_line(
        "\nStart with the backend; by itself it does not work: %s" % ", ".join(bad) if bad else
        "\nEverything works." if probes[-1].word == "works" else
        "\nThe backends work, wsgate does not: see its log, and whether it runs with this"
        " configuration (-s reload).")


def handshake_head(arguments, authority, target):
    """Return a handshake (RFC 6455 4.1) as bytes; raise ValueError for an invalid --header.

    --header replaces the field of its name; without a value it removes it.
    """
    host = authority if max(authority) < "\x7f" else authority.encode("idna").decode()
    fields = ["Host: " + host, "Upgrade: websocket", "Connection: Upgrade",
              "Sec-WebSocket-Version: 13",
              "Sec-WebSocket-Key: " + base64.b64encode(os.urandom(16)).decode(),
              "Origin: " + (arguments.origin or ""),
              "Sec-WebSocket-Protocol: " + (arguments.subprotocol or "")]
    replaced = [line.partition(":")[0].lower() for line in arguments.header]
    lines = [line for line in fields if line.partition(":")[0].lower() not in replaced]
    head = b"GET %s HTTP/1.1\r\n" % percent_encode(target.encode("utf-8", "surrogateescape"),
                                                   NOT_PRINTABLE)
    for text in lines + arguments.header:
        line = text.encode("utf-8", "surrogateescape") + b"\r\n"
        require(line.count(b"\n") == 1 and FIELD_LINES.fullmatch(line),
                "invalid header field '%s' (expected Name: value)", printable(text))
        head += line if line.partition(b":")[2].strip() else b""
    return head + b"\r\n"


def probe_context(verify, cafile=None):
    """Return the SSLContext of a probe, made as those for backends are."""
    values = {name: LOCATION_KEYS[name].parse(LOCATION_KEYS[name].default)
              for name in BACKEND_TLS_KEYS}
    return backend_context(Settings(dict(
        values, proxy_ssl_verify=verify,
        proxy_ssl_trusted_certificate=cafile and parse_pem(cafile))))


def print_line(label, text=None):
    """Print a line of the report, in ASCII."""
    line = label if text is None else "%-10s%s" % (label, text.replace("\\x22", '"'))
    sys.stdout.write(line.encode("ascii", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


class Probe:
    """One handshake with one server, reported step by step.

    run() sets word, that of the Verdict, and response, the last Response or None.
    """

    def __init__(self, arguments, server, head, context=None, tls_name=None, proxy_protocol=False):
        self.arguments = arguments
        self.server = server
        self.head = head
        self.sent = parse_fields(head[:-2].partition(b"\r\n")[2])
        self.context = context
        self.tls_name = tls_name or server.address.host
        self.preface = b"PROXY UNKNOWN\r\n" if proxy_protocol else b""
        self.deadline = Deadline(arguments.timeout)
        self.stream = self.response = self.word = None
        self.since = time.monotonic()    # of the last step, of the 101, or when the silence began

    def run(self):
        """Perform all steps up to the Verdict; return self."""
        try:
            self.connect()
            if self.context:
                self.start_tls()
            self.perform_handshake()
            self.check_response()
            self.use_frames()
            raise Verdict("works")
        except Verdict as verdict:
            self.report(verdict)
        finally:
            if self.stream:
                self.stream.close()
        return self

    def took(self):
        """Return the time since the last step as text, for the end of a line."""
        before, self.since = self.since, time.monotonic()
        return "  (%.1f ms)" % ((self.since - before) * 1000)

    def connect(self):
        """Resolve the name and connect to the first address that accepts, in their order."""
        try:
            addresses = self.server.addresses(self.deadline)
        except (OSError, UnicodeError, TimedOut) as error:
            raise Verdict("unresolved", error=describe_error(error))
        names = [address if isinstance(address, str) else address[0] for _, address in addresses]
        print_line("resolve", "%s is %s%s" % (printable(self.server.name), ", ".join(names),
                                              self.took()))
        for place, ((family, address), where) in enumerate(zip(addresses, names)):
            try:
                self.stream = connect_socket(family, address, self.deadline,
                                             len(addresses) - place)
                print_line("connect", "connected to %s%s" % (where, self.took()))
                return self.stream.write_all(self.preface, self.deadline)
            except (OSError, TimedOut) as failure:
                print_line("connect", "%s: %s%s" % (where, describe_error(failure), self.took()))
                error = failure
        if timed_out(error):
            raise Verdict("timeout", step="connection")
        raise Verdict("refused" if isinstance(error, ConnectionRefusedError) else "unreachable",
                      error=describe_error(error))

    def start_tls(self):
        """Start TLS and print version, cipher and certificate."""
        try:
            self.stream.start_tls(self.context, self.deadline, server_hostname=self.tls_name)
        except (OSError, ValueError) as error:  # ValueError: CertificateError, Python 3.6
            if timed_out(error):
                raise Verdict("timeout", step="TLS handshake")
            kind = tls_error_kind(error)
            raise Verdict({"untrusted": "certificate", "host_name": "certificate",
                           "version": "tls_failed"}.get(kind, kind), error=describe_error(error))
        sock = self.stream.sock
        print_line("TLS", "%s, %s%s" % (sock.version(), sock.cipher()[0], self.took()))
        facts = sock.getpeercert()  # empty if it was not verified
        print_line("", "certificate of %s, issued by %s, valid until %s" % (
            distinguished_name(facts), distinguished_name({"subject": facts["issuer"]}),
            facts["notAfter"]) if facts else "certificate not verified")

    def perform_handshake(self):
        """Send the handshake and read the head of the response."""
        self.print_head("sent", self.head)
        try:
            self.stream.write_all(self.head, self.deadline)
            while not self.response or (self.response.status != 101
                                        and self.response.status < 200):
                self.deadline.remaining()
                head = read_head(self.stream, BIG_READ, self.deadline, take_response_head)
                self.print_head("received", head, self.took())
                self.response = parse_response_head(head)
        except (TimedOut, EOFError, HTTPError, OSError) as error:
            got = self.stream.buffer
            if re.match(br"[\x15\x16]\x03", got):  # a TLS alert or handshake record
                raise Verdict("tls_port")
            if got or isinstance(error, HTTPError):
                raise Verdict("garbage", error=str(error) if isinstance(error, BackendError)
                              else printable(got[:60]))
            if isinstance(error, TimedOut):
                raise Verdict("timeout", step="response to the handshake")
            raise Verdict("tls_failed" if isinstance(error, ssl.SSLError) else "closed",
                          error=describe_error(error))

    def print_head(self, label, head, took=""):
        """Print a head line by line, without secrets."""
        for line in re.split(br"\r?\n", head.rstrip(b"\r\n")):
            name = line.partition(b":")[0]
            hidden = name.lower() in REDACTED_FIELDS - SHOWN_FIELDS
            print_line(label, printable(name + b": ..." if hidden else line) + took)
            label = took = ""

    def check_response(self):
        """Return if the response opens the WebSocket; raise a Verdict otherwise."""
        fields, sent = self.response.fields, self.sent
        if self.response.status != 101:
            raise self.refused(self.read_body())
        fault = fault_in_101(sent, fields, PROBE_UPGRADE)
        chosen, offered = (each.tokens(b"sec-websocket-protocol") for each in (fields, sent))
        if len(fields.get_all(b"upgrade")) > 1:
            fault = "not_upgraded"
        elif not fault and len(chosen) != min(1, len(offered)):
            fault = "wrong_choice"  # browsers reject a missing choice too
        if fault:
            raise Verdict(fault, offered=printable(b", ".join(offered)) or "none",
                          chosen="Sec-WebSocket-Protocol: %s" % (
                              printable(b", ".join(chosen)) or "(none)"))
        if extensions_used(self.response) and not sent.get_all(b"sec-websocket-extensions"):
            raise Verdict("wrong_choice", chosen="Sec-WebSocket-Extensions", offered="none")

    def read_body(self):
        """Return the text of a refusal without tags: servers write there what is missing."""
        scanner, body, deadline = self.response.body(b"GET", True), b"", Deadline(1)
        # What was read is enough:
        with contextlib.suppress(OSError, ValueError, HTTPError, TimedOut):
            while True:
                body += scanner.feed(self.stream.buffer, 0)
                self.stream.buffer = b""
                if (scanner.done or len(body) > SMALL_READ
                        or not self.stream.read_more(deadline)):
                    break
        return b" ".join(re.sub(br"(?is)<(style|script).*?</\1>|<[^>]*>", b" ", body).split())

    def refused(self, body):
        """Print the body of a response that is not 101; return its Verdict."""
        status, fields = self.response.status, self.response.fields
        if body:
            print_line("body", printable(body[:400]))
        if status == 400 and re.search(br"(?i)HTTPS (port|server)|SSL-enabled|TLS port", body):
            return Verdict("tls_port")
        reason = printable(fields.get(b"x-wsgate-reason") or b"")
        if status == 426 and not reason and fields.get_all(b"sec-websocket-version"):
            return Verdict("wrong_version")
        return refusal(status, reason)

    def use_frames(self):
        """Send messages or stay idle, as asked, else send one ping; then close."""
        asked = self.arguments
        self.since = time.monotonic()
        try:
            if asked.count or asked.message is not None:
                message = (asked.message or "wsgate").encode("utf-8", "surrogateescape")
                count = asked.count or 1
                times = self.round_trips(count, TEXT, message, self.deadline)
                print_line("echo", "%d of %d echoed%s" % (
                    len(times), count, ": min %.1f, median %.1f, max %.1f ms" % (
                        times[0], times[len(times) // 2], times[-1])
                    if times else "; is it an echo server?"))
            elif not asked.idle:
                times = self.round_trips(1, PING, b"wsgate", Deadline(1))
                print_line("ping", "pong after %.1f ms" % times[0] if times else "no pong")
            if asked.idle:
                self.idle(asked.idle)
            deadline = Deadline(1)
            self.stream.write_all(close_frame(1000, "", masked=True), deadline)
            closed = any(opcode == CLOSE for opcode, _ in read_frames(self.stream, deadline))
            print_line("close", "Close received" if closed else "ended without a Close frame")
        except TimedOut:
            print_line("close", "no Close received")
        except OSError as error:
            raise Verdict("cut", how="connection lost: %s" % describe_error(error))

    def round_trips(self, count, opcode, payload, deadline):
        """Send a frame count times, each after the payload of the last has come back.

        Return the times in milliseconds, sorted: less than count if the deadline came first.
        """
        times, expected = [], (PONG,) if opcode == PING else (TEXT, BINARY, CONTINUATION)
        with contextlib.suppress(TimedOut):
            while len(times) < count:
                began = time.monotonic()
                self.stream.write_all(make_frame(opcode, payload, masked=True), deadline)
                next(data for received, data in self.frames(deadline)
                     if received in expected and data == payload)
                times.append((time.monotonic() - began) * 1000)
        return sorted(times)

    def idle(self, seconds):
        """Send nothing for this long but pongs."""
        self.since = time.monotonic()
        try:
            for opcode, _ in self.frames(Deadline(seconds)):
                if opcode == PING:
                    print_line("idle", "ping after %.1f s, answered"
                               % (time.monotonic() - self.since))
        except TimedOut:
            print_line("idle", "survived %g s of silence" % seconds)

    def frames(self, deadline):
        """Yield as read_frames does, and answer pings, as a browser does.

        Raise a Verdict for a Close or the end of the connection.
        """
        for opcode, payload in read_frames(self.stream, deadline):
            if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
                raise Verdict("garbage", error="frame with opcode %d" % opcode)
            if opcode == CLOSE:
                code, reason = parse_close(payload)
                reason = printable(reason)
                row = reason_row(reason)
                if row and row.status:  # reject_with = close
                    raise refusal(0, reason)
                raise Verdict("cut", how="Close %d %s" % (code, reason or "without a reason"))
            if opcode == PING:
                self.stream.write_all(make_frame(PONG, payload[:125], masked=True), deadline)
            yield opcode, payload
        raise Verdict("cut", how="connection closed without a Close frame (1006 in browsers)")

    def report(self, verdict):
        """Print a Verdict and what to do."""
        self.word = verdict.word
        location = self.response.fields.get(b"location") if self.response else None
        facts = {name: printable(value) for name, value in (
            ("where", self.server.name), ("target", self.head.split(b" ")[1]),
            ("host", self.sent.get(b"host") or "missing"),
            ("origin", self.sent.get(b"origin") or "not sent"),
            ("location", location or "nowhere"))}
        facts.update(timeout=self.arguments.timeout, seconds=time.monotonic() - self.since,
                     status=self.response.status if self.response else 0, **verdict.facts)
        happened, remedy = verdict.sentence
        print_line("verdict", "%s: %s" % (self.word, happened % facts))
        if remedy:
            print_line("to do", remedy % facts)
        print_line("")


if __name__ == "__main__":
    sys.exit(main())
