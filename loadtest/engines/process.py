"""An engine in a process of its own, driven by a line of JSON at a time."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import IO, Any

# An engine that still starts does not read that it is to end.
_MOST_SECONDS_TO_END = 20


class EngineProcess:
    """`loadtest.engines.arm`, which answers each line that it reads with one of its own."""

    def __init__(self, name: str, settings: dict[str, Any], threads: int, log: IO[str]) -> None:
        self._name = name
        variables = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        if settings["compression"] is None:
            variables["VLLM_PLUGINS"] = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "adakv_serve.loadtest.engines.arm", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=variables,
        )

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a command; raise RuntimeError if the engine process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"the engine of arm {self._name} died: see the log")

    def stop(self) -> None:
        """Let the engine end by itself, or end it if it does not."""
        self.ask_to_end()
        try:
            self._process.wait(_MOST_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def ask_to_end(self) -> None:
        """Tell the engine to end, without waiting for it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
