"""Serve a built gallery on this machine until it is told to stop."""

import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6

from polyspan.errors import WrongContent

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def serve_gallery(
    folder: Path | str, host: str = "127.0.0.1", port: int = 8000, *, ready: Callable[[str], None] | None = None
) -> None:
    """Serve a folder that :func:`build_gallery` wrote, until Ctrl-C or a polite termination.

    Parameters
    ----------
    folder : path
    host : str
        Address to listen on. Only this machine can reach the default; there is no password on any other.
    port : int
        0 takes a free one.
    ready : callable, optional
        Called with the address once requests are answered; without it the address is printed on stderr.

    Raises
    ------
    WrongContent
        The folder holds no gallery.
    ValueError
        The host or the port cannot be listened on.
    """
    server = make_server(folder, host, port)
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _stop)
    try:
        (ready or _tell)(server.address)
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def make_server(folder: Path | str, host: str, port: int) -> "GalleryServer":
    """Return a server that listens already and answers once ``serve_forever`` runs; ``shutdown`` ends that."""
    folder = Path(folder)
    if not (folder / "index.html").is_file():
        raise WrongContent(folder, found="no index.html", expected="a folder that build_gallery wrote")
    if not 0 <= port <= 65535:
        raise ValueError(f"port must lie between 0 and 65535, got {port}")
    kind = GalleryServer6 if ":" in host else GalleryServer
    try:
        return kind((host, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"host and port must be free to listen on, got {host}:{port}: {reason}") from error


class GalleryServer(ThreadingHTTPServer):
    """A server of static files; requests that are under way do not keep it from closing."""

    allow_reuse_address = True

    @property
    def address(self) -> str:
        """The address of the index page."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"

    def handle_error(self, request, client_address) -> None:
        """Pass over a browser that went away in mid-answer; anything else is reported as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class GalleryServer6(GalleryServer):
    """The same for an IPv6 host."""

    address_family = AF_INET6


class _Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path) -> None:
        self.send_error(HTTPStatus.NOT_FOUND, "No such page")

    def log_message(self, format, *args) -> None:
        """Say nothing about single requests."""


def _stop(signum, frame) -> None:  # noqa: ARG001 - the form of a signal handler
    raise KeyboardInterrupt


def _tell(address: str) -> None:
    print(f"gallery at {address} (Ctrl-C stops)", file=sys.stderr, flush=True)
