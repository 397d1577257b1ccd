"""`adakv COMMAND`: serve, inspect, measure, evaluate, simulate, and check a machine."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A program by the module that has its `main`, and what it does."""

    module: str
    does: str


_COMMANDS = {
    "serve": Command("adakv_serve.serving.start", "serve a configuration, as `make serve` does"),
    "drain": Command(
        "adakv_serve.serving.drain", "shut the doors of a running deployment, or open them again"
    ),
    "configs": Command("adakv.configs", "list the shipped configurations, or copy them to edit"),
    "inspect": Command("adakv_serve.router.inspect", "show the memory of every replica"),
    "simulate": Command("adakv_serve.router.simulate.__main__", "compare routers in virtual time"),
    "eval": Command("adakv_serve.evals.__main__", "measure what compression does to answers"),
    "doctor": Command("adakv.doctor", "check this machine, and say what to do"),
}
_BENCHES = {
    "compare": Command(
        "adakv_serve.loadtest.compare", "deployments at equal KV memory, with a report"
    ),
    "offline": Command("adakv_serve.loadtest.offline", "engines at equal KV memory, without HTTP"),
    "published": Command("adakv_serve.loadtest.published", "KV-Compress' set-up on one GPU"),
    "spill": Command("adakv_serve.loadtest.spill", "moving a cache against computing it again"),
    "routing": Command("adakv_serve.loadtest.routing", "prompts that are repeated, and at once"),
    "ingresses": Command("adakv_serve.loadtest.ingresses", "one, two and four front doors"),
    "front-door": Command(
        "adakv_serve.loadtest.front_door", "the front door against plain `vllm serve`"
    ),
    "autoscaling": Command("adakv_serve.loadtest.autoscaling", "a fleet that grows and shrinks"),
    "long-answer": Command("adakv_serve.loadtest.long_answer", "an answer at its bound"),
    "service-times": Command(
        "adakv_serve.loadtest.service_times", "a replica's speeds, for the simulation"
    ),
    "fuzz": Command("adakv_serve.loadtest.fuzz", "odd requests against a deployment"),
    "chaos": Command("adakv_serve.loadtest.chaos", "faults of all kinds under load"),
    "soak": Command("adakv_serve.loadtest.soak", "hours of load, and what grows"),
}

# Images and plain installations leave out what only measures.
_MORE = "pip install 'adakv-serve[loadtest]', or use a checkout of the repository"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, words = (words[0], words[1:]) if words else ("--help", [])
    bench = Command("", "run a load test; alone it lists them")
    prefix, known = "adakv", {**_COMMANDS, "bench": bench}
    if name == "bench":
        prefix, known = "adakv bench", _BENCHES
        name, words = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        print(_listed(prefix, known))
        return 0
    if name not in known:
        print(f"{prefix}: no command {name!r}\n{_listed(prefix, known)}", file=sys.stderr)
        return 2
    # Programs read `sys.argv`, and show its first word in their help.
    sys.argv = [f"{prefix} {name}", *words]
    try:
        program = importlib.import_module(known[name].module)
    except ModuleNotFoundError as error:
        print(f"{prefix} {name}: the package {error.name} is missing: {_MORE}", file=sys.stderr)
        return 1
    status: int | None = program.main()
    return status or 0


def _listed(prefix: str, commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {command.does}" for name, command in commands.items()]
    return "\n".join([f"usage: {prefix} COMMAND [--help] ...", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
