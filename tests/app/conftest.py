"""Fixtures of the page's tests: a stand-in for the service, on a port of its own."""

from collections.abc import Iterator

import pytest

from tests.app.stub_service import StubService


@pytest.fixture
def service() -> Iterator[StubService]:
    stub = StubService()
    yield stub
    stub.close()
