"""Admin port: the HTTP server for health, readiness, metrics, the status page and the operators' actions."""

from shim.admin.server import AdminServer

__all__ = ["AdminServer"]
