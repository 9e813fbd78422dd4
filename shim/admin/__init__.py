"""The admin port: health, readiness, metrics."""

from shim.admin.server import AdminServer

__all__ = ["AdminServer"]
