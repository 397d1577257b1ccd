"""What a start of the application waits for, in a few lines."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    ReplicaState,
)

# Seconds between two looks, and between two equal lines.
_LOOK_S, _AGAIN_S = 1.0, 15.0

Applications = Mapping[str, ApplicationStatusOverview]


class StartReport:
    """Says of each application how far its start is, until it runs or has failed."""

    def __init__(
        self,
        config: Mapping[str, Any],
        applications: Callable[[], Applications],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            config: a configuration of `serve run`, which names the port.
            applications: asks Serve for the state of all applications.
        """
        self._config, self._applications, self._say, self._clock = config, applications, say, clock
        self._started = clock()
        self._last_line, self._last_s = "", 0.0
        self._ended: set[str] = set()
        self._stopped = threading.Event()

    def follow(self) -> None:
        """Look once a second, in a thread of its own, until all have started or failed."""
        threading.Thread(target=self._follow, name="start report", daemon=True).start()

    def stop(self) -> None:
        """Say nothing more."""
        self._stopped.set()

    def _follow(self) -> None:
        try:
            while not self._stopped.is_set() and not self.look():
                self._stopped.wait(_LOOK_S)
        except Exception as error:
            # What has no report starts all the same.
            if not self._stopped.is_set():
                self._say(f"no more of the start: Serve does not answer ({type(error).__name__})")

    def look(self) -> bool:
        """Say what is new; return whether all applications have started or failed."""
        applications = self._applications()
        passed_s = self._clock() - self._started
        time_passed = f"{int(passed_s) // 60}:{int(passed_s) % 60:02}"
        for name, one in applications.items():
            if name in self._ended:
                continue
            if one.status == ApplicationStatus.RUNNING:
                self._ended.add(name)
                self._say(f"{name} is ready after {time_passed}: {self._url(name)}")
            elif one.status == ApplicationStatus.DEPLOY_FAILED:
                self._ended.add(name)
                self._say(f"{name} has not started: {_failure(one)}")
        waiting = {name: one for name, one in applications.items() if name not in self._ended}
        line = "; ".join(f"starting {name}{_counts(one)}" for name, one in waiting.items())
        if waiting and (line != self._last_line or passed_s - self._last_s >= _AGAIN_S):
            self._say(f"{line} ({time_passed})")
            self._last_line, self._last_s = line, passed_s
        return bool(applications) and not waiting

    def _url(self, name: str) -> str:
        http = self._config.get("http_options") or {}
        paths = {
            one.get("name", "default"): one.get("route_prefix") or "/"
            for one in self._config.get("applications", ())
        }
        scheme = "https" if "ADAKV_TLS_CERTIFICATE" in os.environ else "http"
        host = http.get("host") or "0.0.0.0"
        host = "localhost" if host == "0.0.0.0" else host
        return f"{scheme}://{host}:{http.get('port', 8000)}{paths.get(name, '/')}"


def _counts(application: ApplicationStatusOverview) -> str:
    """Return how many replicas of each deployment run: `: Engine 1 of 2, Ingress 1 of 1`."""
    counts = [
        f"{name} {states.get(ReplicaState.RUNNING, 0)} of {sum(states.values())}"
        for name, one in sorted(application.deployments.items())
        if (states := one.replica_states)
    ]
    return f": {', '.join(counts)}" if counts else ""


def _failure(application: ApplicationStatusOverview) -> str:
    """Return why an application has failed, in a line."""
    # The application's own message may only name the deployment that has failed.
    messages = [
        one.message
        for one in application.deployments.values()
        if one.status in (DeploymentStatus.UNHEALTHY, DeploymentStatus.DEPLOY_FAILED)
    ]
    lines = [
        line.strip() for text in (application.message, *messages) for line in text.splitlines()
    ]
    # The last line of a traceback is the error.
    return next((line for line in reversed(lines) if line), "Serve does not say why")
