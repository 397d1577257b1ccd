"""Made-up fleets and viewers of their feed."""

import json
from typing import Any

from adakv_serve.router.ledger.occupancy import Report
from tests.router.occupancies import occupancy


class Source:
    """Reports that a test sets."""

    def __init__(self, replicas: int = 1) -> None:
        self.reports = [Report(occupancy(f"r{number:07}"), 0.1) for number in range(replicas)]
        self.reads = 0

    def read(self) -> list[Report]:
        self.reads += 1
        return self.reports

    def change(self, number: int, **changes: Any) -> None:
        report = self.reports[number].occupancy
        self.reports[number] = Report(report.model_copy(update=changes), 0.1)


def parsed(event: bytes) -> tuple[str, dict[str, Any]]:
    """Return the name and the data of a server-sent event."""
    first, second, *rest = event.decode().split("\n")
    assert rest == ["", ""]
    return first.removeprefix("event: "), json.loads(second.removeprefix("data: "))
