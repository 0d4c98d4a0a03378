"""A small server for the live page: it reads, it answers two addresses, and nobody but whom it is meant for.

A browser is also where other people's pages run. Those must not read this one: a request that names another host than
this server has (a name of theirs that leads here), or that comes from another origin, is refused; beyond the loopback a
token is asked for. No address names a file, so none leads out of a folder.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Event
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .live import LiveRuns
from .page import page_of

_COOKIE = "zeropipe-watch"
_LOOK = 1.0  # seconds between two looks at the files
_PING = 15.0  # seconds of silence after which a browser that has gone is noticed
_MOST_LOOKING = 32  # at once
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_of_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class PageServer(ThreadingHTTPServer):
    """Serves until `shutdown`; `token` is None on the loopback."""

    daemon_threads = True

    def __init__(self, live: LiveRuns, host: str, port: int) -> None:
        super().__init__((host, port), _Handler)
        self.live, self.token = live, None if is_of_this_machine(host) else secrets.token_urlsafe(24)
        self.seats, self.ending = BoundedSemaphore(_MOST_LOOKING), Event()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/" + (f"?token={self.token}" if self.token else "")

    def shutdown(self) -> None:
        self.ending.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes in the middle of an answer is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    timeout = 60  # of a request that never ends

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if problem := self._problem():
            self._answer(403, problem)
        elif self.server.token and not self._knows_the_token():
            given = parse_qs(address.query).get("token", [""])[0]
            if address.path != "/" or not _same(given, self.server.token):
                self._answer(403, "open the address that zeropipe watch printed: it has the token in it")
                return
            cookie = f"{_COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            self._answer(303, "", {"Location": "/", "Set-Cookie": cookie})  # the token leaves the address bar
        elif address.path == "/":
            self._answer(200, page_of([], live=True), kind="text/html")
        elif address.path == "/events":
            self._events()
        else:
            self._answer(404, "there is / and /events")

    def _refuse(self) -> None:
        self.close_connection = True  # what it wanted to write is not read
        self._answer(405, "this page is to be looked at", {"Allow": "GET"})

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _problem(self) -> str | None:
        """Why a request is not from a person who looks at this server."""
        named = self.headers.get_all("Host") or []
        host = urlsplit(f"//{named[0]}").hostname if len(named) == 1 else None
        if host is None or (self.server.token is None and not is_of_this_machine(host)):
            return "this server is not there by that name; open http://127.0.0.1:PORT/"
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != named[0]:
            return "another origin may not look"
        if urlsplit(self.path).path != "/" and self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            return "another site may not look"
        return None

    def _knows_the_token(self) -> bool:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            return False
        return found is not None and _same(found.value, self.server.token or "")

    def _answer(self, status: int, text: str, more: dict[str, str] | None = None, kind: str = "text/plain") -> None:
        body = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            **_HEADERS,
            **(more or {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _events(self) -> None:
        """Server-sent events: all runs at once, and again whenever something has changed."""
        if not self.server.seats.acquire(blocking=False):
            self._answer(503, f"{_MOST_LOOKING} look on already")
            return
        try:
            self.close_connection = True
            self.send_response(200)
            for name, value in {"Content-Type": "text/event-stream", **_HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            self._send_changes()
        finally:
            self.server.seats.release()

    def _send_changes(self) -> None:
        sent, at = None, time.monotonic()
        while not self.server.ending.wait(0 if sent is None else _LOOK):
            text = self.server.live.text()
            if text != sent:
                self.wfile.write(f"data: {text}\n\n".encode())
                sent, at = text, time.monotonic()
            elif time.monotonic() > at + _PING:
                self.wfile.write(b":\n\n")
                at = time.monotonic()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses may hold the token."""

    def version_string(self) -> str:
        return "zeropipe"


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())
