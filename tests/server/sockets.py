"""Requests as bytes over sockets."""

import re
import socket

import httpx2


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", maxsplit=1)[-1])), timeout=10)


def received(connection: socket.socket, answers: int) -> bytes:
    """What comes until there are so many answers, all of them with a JSON body."""
    data = b""
    while len(re.findall(rb"\r\n\r\n\{.*?\}(?=HTTP|$)", data, re.DOTALL)) < answers:
        chunk = connection.recv(2**16)
        assert chunk, data
        data += chunk
    return data


def head(length: int, *lines: str) -> bytes:
    return "\r\n".join(
        ("POST /predict HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {length}", *lines, "", "")
    ).encode()


def last_answer(connection: socket.socket) -> httpx2.Response:
    """What comes until the end of the connection: one answer."""
    data = b""
    while chunk := connection.recv(2**16):
        data += chunk
    lines, body = data.split(b"\r\n\r\n")
    status, *headers = lines.decode().split("\r\n")
    return httpx2.Response(int(status.split()[1]), headers=[tuple(line.split(": ")) for line in headers], content=body)
