"""Errors of the control API."""

from __future__ import annotations

from shim.errors import ShimError


class RequestRefused(ShimError):
    """A request to the control API that cannot be carried out; `status` is the HTTP status of the response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
