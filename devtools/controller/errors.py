"""What the control API refuses."""

from __future__ import annotations

from shim.errors import ShimError


class RequestRefused(ShimError):
    """A request to the control API that cannot be carried out; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
