from collections.abc import Generator, Iterator

import openai
import pytest

from tests.system.deployment import Deployment, deployed


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    with deployed() as deployment:
        yield deployment


@pytest.fixture(scope="session")
def client(deployment: Deployment) -> openai.OpenAI:
    return deployment.client()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the shared deployment last, so that no other one runs beside it.

    Among them the slow ones come last: they kill and change what the others look at.
    """

    def place(item: pytest.Item) -> tuple[bool, bool]:
        shared = "deployment" in getattr(item, "fixturenames", ())
        return shared, shared and item.get_closest_marker("slow") is not None

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows what a deployment wrote beside the failure of a test of it."""
    report = yield
    if report.failed:
        logs = {id(it): it for it in item.funcargs.values() if isinstance(it, Deployment)}
        report.sections += [("deployment", it.log()[-8000:]) for it in logs.values()]
    return report
