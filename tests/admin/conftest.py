"""Fixtures of a world and its status, for the tests of the admin port."""

from tests.management.conftest import make_page, make_world, page, pytest_asyncio_loop_factories, world

__all__ = ["make_page", "make_world", "page", "pytest_asyncio_loop_factories", "world"]
