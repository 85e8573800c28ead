"""The network as the ranks will use it: which interface, whether a port opens, latency and
bandwidth to one other host. No torch.

The listening side is a thread of the probe. It serves whoever knows the token of this look at the
hosts, on one address only.
"""

from __future__ import annotations

import hmac
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil

PINGS = 30
SECONDS = 0.25  # of sending in one direction
CHUNK = 1 << 20
TIMEOUT_S = 3.0
TOKEN_BYTES = 16
ECHO, TAKE, GIVE = b"E", b"T", b"G"  # what the other side is asked to do


def interface(first: str, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The interface that ranks of this environment use, with its address, state, MTU and Mb/s.

    It is GLOO_SOCKET_IFNAME's or NCCL_SOCKET_IFNAME's where they name one; otherwise that of the
    route to the host `first`. "named": what the variables say. "name" and "address" are None where
    there is no such interface here.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("GLOO_SOCKET_IFNAME") or environ.get("NCCL_SOCKET_IFNAME") or ""
    addresses = {name: _addresses(name) for name in psutil.net_if_addrs()}
    if named:
        wanted = [w.lstrip("=") for w in named.split(",") if not w.startswith("^")]
        name = next((n for n in addresses if n in wanted and addresses[n]), None)
        if name is None and not wanted:
            name = _of_address(addresses, _route_to(first))
    else:
        name = _of_address(addresses, _route_to(first))
    found: dict[str, Any] = {"named": named, "name": name, "address": addresses[name][0] if name else None, "all": sorted(addresses)}
    found["addresses"] = [address for mine in addresses.values() for address in mine]
    if name:
        state = psutil.net_if_stats()[name]
        found |= {"up": state.isup, "mtu": state.mtu, "mbit": state.speed or None, "loopback": found["address"].startswith("127.")}
    return found


def _addresses(name: str) -> list[str]:
    return [a.address for a in psutil.net_if_addrs().get(name, []) if a.family == socket.AF_INET]


def _of_address(addresses: Mapping[str, list[str]], address: str | None) -> str | None:
    return next((name for name, mine in addresses.items() if address in mine), None)


def _route_to(host: str) -> str | None:
    """This host's address towards another one; connecting a datagram socket sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


class Listener:
    """Answers other hosts' measurements at `address`, from its start to close(); `port` is the port it got.

    port=0: any free one. Raises OSError where the address or the port cannot be had.
    """

    def __init__(self, address: str, token: bytes, port: int = 0) -> None:
        self.token = token
        self.socket = socket.create_server((address, port), backlog=64)
        self.port = int(self.socket.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(TIMEOUT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                if not hmac.compare_digest(_exactly(connection, TOKEN_BYTES), self.token):
                    return
                while task := connection.recv(1):
                    if task == ECHO:
                        connection.sendall(_exactly(connection, 8))
                    elif task == TAKE:
                        connection.sendall(struct.pack("!dQ", *_take(connection)))
                    elif task == GIVE:
                        _give(connection)
            except OSError:
                return


def can_connect(address: str, port: int, token: bytes) -> str | None:
    """None where another host's Listener answers at a port, else why not."""
    try:
        with _connected(address, port, token) as connection:
            connection.sendall(ECHO + bytes(8))
            _exactly(connection, 8)
            return None
    except OSError as error:
        return _reason(error)


def measure(address: str, port: int, token: bytes) -> dict[str, Any]:
    """Round trip in microseconds (the middle of PINGS), and GB/s to (`out_gb_s`) and from
    (`in_gb_s`) another host's Listener.
    """
    try:
        with _connected(address, port, token) as connection:
            trips = []
            for _ in range(PINGS):
                started = time.perf_counter()
                connection.sendall(ECHO + bytes(8))
                _exactly(connection, 8)
                trips.append(time.perf_counter() - started)
            connection.sendall(TAKE)
            _give(connection)
            seconds, count = struct.unpack("!dQ", _exactly(connection, 16))
            out = count / seconds / 1e9
            connection.sendall(GIVE)
            seconds, count = _take(connection)
            return {"us": statistics.median(trips) * 1e6, "out_gb_s": out, "in_gb_s": count / seconds / 1e9, "error": None}
    except OSError as error:
        return {"us": None, "out_gb_s": None, "in_gb_s": None, "error": _reason(error)}


def _connected(address: str, port: int, token: bytes) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(token)
    return connection


def _give(connection: socket.socket) -> None:
    """Send pieces, each after its length, for SECONDS; a length of 0 ends it."""
    piece, ends = struct.pack("!Q", CHUNK) + bytes(CHUNK), time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        connection.sendall(piece)
    connection.sendall(struct.pack("!Q", 0))


def _take(connection: socket.socket) -> tuple[float, int]:
    """Seconds and bytes of what the other side gives; the clock starts with its first bytes."""
    count, buffer, started = 0, memoryview(bytearray(CHUNK)), 0.0
    while length := struct.unpack("!Q", _exactly(connection, 8))[0]:
        started = started or time.perf_counter()
        if length > CHUNK:
            raise OSError("the other side does not keep to the protocol")
        left = length
        while left:
            got = connection.recv_into(buffer[:left])
            if not got:
                raise ConnectionResetError("the connection ended")
            left -= got
        count += length
    return max(time.perf_counter() - started, 1e-9), count


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("the connection ended")
        data += piece
    return data


def _reason(error: OSError) -> str:
    return "no answer within 3 s" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()


def holder(port: int) -> str:
    """Which process of this host listens at a port, as far as it may be known."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
            return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"
