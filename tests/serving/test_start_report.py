"""What `python -m serving.run` says while the application starts."""

from typing import Any

from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
)

from adakv_serve.serving.start_report import StartReport
from tests.waiting import eventually

CONFIG: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 8001},
    "applications": [{"name": "llm", "route_prefix": "/small"}],
}


def app(
    status: ApplicationStatus, message: str = "", **running: tuple[int, int]
) -> ApplicationStatusOverview:
    """An application; its deployments by name, with replicas that run and that start."""
    deployments = {
        name: DeploymentStatusOverview(
            status=DeploymentStatus.UPDATING,
            status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
            replica_states={ReplicaState.RUNNING: runs, ReplicaState.STARTING: starts},
            message="",
        )
        for name, (runs, starts) in running.items()
    }
    return ApplicationStatusOverview(status, message, 0.0, deployments)


class Start:
    """A start whose state and clock a test sets."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.now = 0.0
        self.applications: dict[str, ApplicationStatusOverview] = {}
        self.report = StartReport(
            CONFIG, lambda: self.applications, self.said.append, lambda: self.now
        )

    def look(self, now: float, application: ApplicationStatusOverview) -> bool:
        self.now, self.applications = now, {"llm": application}
        return self.report.look()


def test_it_counts_replicas_until_the_application_is_ready() -> None:
    start = Start()
    assert not start.report.look()
    assert not start.look(2, app(ApplicationStatus.DEPLOYING))
    assert not start.look(5, app(ApplicationStatus.DEPLOYING, Ingress=(0, 1), Engine=(0, 2)))
    assert not start.look(40, app(ApplicationStatus.DEPLOYING, Ingress=(1, 0), Engine=(1, 1)))
    assert start.look(62, app(ApplicationStatus.RUNNING, Ingress=(1, 0), Engine=(2, 0)))
    assert start.said == [
        "starting llm (0:02)",
        "starting llm: Engine 0 of 2, Ingress 0 of 1 (0:05)",
        "starting llm: Engine 1 of 2, Ingress 1 of 1 (0:40)",
        "llm is ready after 1:02: http://127.0.0.1:8001/small",
    ]


def test_what_does_not_change_is_said_now_and_then() -> None:
    start = Start()
    for second in range(40):
        start.look(second, app(ApplicationStatus.DEPLOYING))
    assert start.said == [f"starting llm ({time})" for time in ("0:00", "0:15", "0:30")]


def test_a_failure_is_said_once_by_its_error() -> None:
    start = Start()
    message = (
        "Deploying app 'llm' failed:\nTraceback (most recent call last):\nValueError: no key\n"
    )
    assert start.look(3, app(ApplicationStatus.DEPLOY_FAILED, message))
    assert start.look(4, app(ApplicationStatus.DEPLOY_FAILED, message))
    assert start.said == ["llm has not started: ValueError: no key"]


def test_the_error_of_an_engine_says_more_than_that_it_failed() -> None:
    start = Start()
    failed = app(
        ApplicationStatus.DEPLOY_FAILED, "The deployments ['Engine'] failed.", Engine=(0, 1)
    )
    engine = failed.deployments["Engine"]
    engine.status, engine.message = DeploymentStatus.DEPLOY_FAILED, "Error:\nOSError: no model\n"
    assert start.look(90, failed)
    assert start.said == ["llm has not started: OSError: no model"]


def test_a_report_that_gets_no_answer_ends_with_a_line() -> None:
    said: list[str] = []

    def silent() -> dict[str, ApplicationStatusOverview]:
        raise TimeoutError

    StartReport(CONFIG, silent, said.append).follow()
    eventually(lambda: said, what="the line")
    assert said == ["no more of the start: Serve does not answer (TimeoutError)"]
