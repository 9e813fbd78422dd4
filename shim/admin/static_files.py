"""Files of the status page, served from the package without a build step or another origin."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from aiohttp import web

FILES = {
    "/": ("index.html", "text/html"),
    "/status.js": ("status.js", "text/javascript"),
    "/status.css": ("status.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/uplot.js": ("uPlot.iife.min.js", "text/javascript"),
    "/uplot.css": ("uPlot.min.css", "text/css"),
    "/uplot.LICENSE": ("uPlot.LICENSE", "text/plain"),
}

_NO_TOKEN = b'data-token="none"'

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class StaticFiles:
    """Handler for `FILES`. The page has a mark that shows if it must ask for a token before it requests data."""

    def __init__(self, token_required: bool) -> None:
        self._token = b'data-token="required"' if token_required else _NO_TOKEN

    async def serve(self, request: web.Request) -> web.Response:
        """Return one of `FILES`."""
        name, content_type = FILES[request.path]
        body = _read(name).replace(_NO_TOKEN, self._token, 1) if request.path == "/" else _read(name)
        return web.Response(body=body, content_type=content_type, charset="utf-8")


@cache
def _read(name: str) -> bytes:
    return (Path(__file__).parent / "static" / name).read_bytes()
