"""The admin port: health, readiness, metrics, the status page and what a person may change."""

from shim.admin.journal import Journal
from shim.admin.server import AdminServer

__all__ = ["AdminServer", "Journal"]
