"""The runs of a comparison: arms one after the other, with a record of those that are done."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adakv_serve.loadtest.client.records import Record, read_records, summary
from adakv_serve.loadtest.comparison.config import CompareConfig, LoadConfig
from adakv_serve.loadtest.comparison.order import Unit, interleaved
from adakv_serve.loadtest.comparison.provenance import environment
from adakv_serve.loadtest.servers.occupancy import Look, occupancy_watch
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import serve_run

_LOOK_EVERY_S = 0.5
# Far from the seeds of the loads themselves, whose prompts are cached already.
_OTHER_PROMPTS = 500_000
_LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"


@dataclass(frozen=True)
class LoadRun:
    """One load on one unit."""

    records: list[Record]
    looks: list[Look]


@dataclass(frozen=True)
class UnitRun:
    """crashed: why the unit ended early, or None; `loads` has what came before.

    environment: its machine and versions.
    """

    loads: dict[str, LoadRun]
    crashed: str | None
    environment: dict[str, Any]


def units(config: CompareConfig) -> list[Unit]:
    """Return the starts of the arms' deployments; each start gets all loads once."""
    return interleaved(config.arms, config.repetitions)


class Runs:
    """The folder `runs` of a comparison: one for each unit, with `done.json` when it is over."""

    def __init__(self, folder: Path, config: CompareConfig) -> None:
        self._folder = folder / "runs"
        self._config = config

    def is_done(self, unit: Unit) -> bool:
        """Return whether the unit ran before, crashed or not."""
        return (self._of(unit) / "done.json").exists()

    def run(self, unit: Unit, progress: Callable[[str], None] = lambda line: None) -> str | None:
        """Start the arm, put all loads on it, stop it; return why it crashed, if it did.

        Args:
            progress: gets a line when a load begins and when it ends.
        """
        folder = self._of(unit)
        # An interrupted attempt may have left files.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = self._config.deployment(unit.arm)
        (application,) = config["applications"]
        port, crashed = free_port(), None
        try:
            with serve_run(config, folder / "server.log", port) as base_url:
                store_url = f"redis://127.0.0.1:{port}"
                for load in self._loads(unit):
                    progress(f"{load.name}: {load.sessions} sessions")
                    asyncio.run(
                        self._run_load(unit, load, base_url, store_url, application["name"])
                    )
                    records = read_records(folder / f"{load.name}.records.jsonl")
                    progress(f"{load.name}: {_in_short(records)}")
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            crashed = str(error)
        done = {"crashed": crashed, "deployment": config, "environment": environment()}
        (folder / "done.json").write_text(json.dumps(done) + "\n")
        return crashed

    def read(self, unit: Unit) -> UnitRun:
        """Return the results of a unit that is done."""
        folder = self._of(unit)
        loads = {}
        for load in self._loads(unit):
            records, looks = (folder / f"{load.name}.{kind}.jsonl" for kind in ("records", "looks"))
            if looks.exists():
                rows = [json.loads(line) for line in looks.read_text().splitlines()]
                loads[load.name] = LoadRun(read_records(records), [Look(*row) for row in rows])
        done = json.loads((folder / "done.json").read_text())
        return UnitRun(loads, done["crashed"], done["environment"])

    def _of(self, unit: Unit) -> Path:
        return self._folder / f"{unit.repetition}-{unit.arm}"

    def _loads(self, unit: Unit) -> Iterator[LoadConfig]:
        for load in self._config.loads:
            yield load
            if unit.arm == self._config.reference and load.has_bound:
                yield prefill_only(load)

    async def _run_load(
        self, unit: Unit, load: LoadConfig, base_url: str, store_url: str, application: str
    ) -> None:
        folder = self._of(unit)
        records = folder / f"{load.name}.records.jsonl"
        records.touch()
        async with occupancy_watch(store_url, application, _LOOK_EVERY_S) as watch:
            await self._locust(unit, load, base_url, records, folder / f"{load.name}.locust.log")
        looks = "".join(json.dumps(look) + "\n" for look in watch.looks)
        (folder / f"{load.name}.looks.jsonl").write_text(looks)
        outcomes = read_records(records)
        if not any(record.error is None for record in outcomes):
            reasons = sorted({record.error for record in outcomes if record.error})
            raise RuntimeError(f"{load.name}: no request succeeded: {'; '.join(reasons) or 'none'}")

    async def _locust(
        self, unit: Unit, load: LoadConfig, base_url: str, records: Path, log_path: Path
    ) -> None:
        options: dict[str, Any] = {
            "host": base_url, "users": load.users, "spawn-rate": 1000, "workload": load.workload,
            "prompt-tokens": load.prompt_tokens, "output-tokens": load.output_tokens,
            "sessions": load.sessions, "warmup": load.warmup, "rate": load.rate_per_s,
            "seed": load.seed + unit.repetition, "records": records,
            "tokenizer": self._config.tokenizer,
        }  # fmt: skip
        flags = [
            part
            for name, value in options.items()
            if value is not None
            for part in (f"--{name}", str(value))
        ]
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--headless", *flags,
                stdout=log, stderr=log, env=os.environ,
            )  # fmt: skip
            # 1: some requests failed; the records have the reasons.
            if await process.wait() not in (0, 1):
                tail = log_path.read_text(errors="replace").strip()[-500:]
                raise RuntimeError(f"{load.name}: Locust ended with {process.returncode}: {tail}")


def _in_short(records: list[Record]) -> str:
    figures = summary(records)
    return (
        f"{figures['requests']} requests in {figures['elapsed_s']:.0f} s, "
        f"{figures['tokens_per_s']:.1f} tokens/s, {sum(figures['failures'].values())} failed"
    )


def prefill_only(load: LoadConfig) -> LoadConfig:
    """Return a load of a few prompts of the same size, one at a time, for a single token each."""
    return load.model_copy(
        update={
            "name": f"{load.name}.prefill", "output_tokens": 1, "users": 1, "rate_per_s": None,
            "sessions": min(4, load.sessions), "warmup": 1, "seed": load.seed + _OTHER_PROMPTS,
        }
    )  # fmt: skip
