"""Admin port: health, readiness, metrics, the status page and the operator's actions."""

from shim.admin.server import AdminServer
from shim.admin.subject import Subject

__all__ = ["AdminServer", "Subject"]
