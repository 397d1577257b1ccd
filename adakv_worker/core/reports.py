"""The proofs of a scheduler's requests, attached to outputs when they have changed."""

from collections.abc import Collection, Mapping
from typing import Any

from vllm.v1.engine import EngineCoreOutputs

from adakv_worker.commands import Answer
from adakv_worker.core.plan import Plan

REPORT_KEY = "kv_compression"

Report = dict[str, Any]


class Reports:
    """The newest `Plan.report` of each request.

    What is new in it is kept until it is taken, which every step must do.
    """

    def __init__(self) -> None:
        self._reports: dict[str, Report] = {}
        # Requests whose report goes with their next output, and those where it goes with each.
        self._changed: set[str] = set()
        self._always: set[str] = set()
        # First reports of requests, until they are taken.
        self._new: list[Report] = []
        self._counts = {"decode_evictions": 0, "selection_failures": 0}

    def __len__(self) -> int:
        return len(self._reports)

    def get(self, request_id: str) -> Report | None:
        return self._reports.get(request_id)

    def always_attach(self, request_id: str) -> None:
        """Attach a request's report to each of its outputs: any may be its last.

        The front end finds stop strings, after the fact.
        """
        self._always.add(request_id)

    def put(self, request_id: str, report: Report) -> None:
        """Note a report that comes from elsewhere, or has changed."""
        self._reports[request_id] = report
        self._changed.add(request_id)

    def note_whole(self, request_id: str, plan: Plan | None) -> None:
        """Note that a request will not be compressed, at first or after a preemption."""
        before = self._reports.get(request_id)
        if plan is None or (before is not None and before["skipped"] == plan.skipped):
            return
        self._note(request_id, plan.report(None))

    def note_step(
        self, plans: Mapping[str, Plan], evicted: Collection[str], answer: Answer
    ) -> None:
        """Note what the workers did in a step.

        Args:
            evicted: requests that were to evict.
            answer: theirs; a compressed request is reported with what they really kept.
        """
        for request_id in evicted:
            if report := self._reports.get(request_id):
                evictions = report.get("decode_evictions", 0) + 1
                self.put(request_id, {**report, "decode_evictions": evictions})
                self._counts["decode_evictions"] += 1
        for request_id in answer.failed:
            self._counts["selection_failures"] += 1
            if plan := plans.get(request_id):
                plan.fallback = f"policy '{plan.choice.preset}' failed"
                if report := self._reports.get(request_id):
                    self.put(request_id, {**report, "fallback": plan.fallback})
        for request_id, entries in answer.kept.items():
            if plan := plans.get(request_id):
                self._note(request_id, plan.report(entries))

    def _note(self, request_id: str, report: Report) -> None:
        before = self._reports.get(request_id)
        if before is None:
            self._new.append(report)
        else:
            report["decode_evictions"] = before.get("decode_evictions", 0)
        self.put(request_id, report)

    def attach(self, outputs: Mapping[int, EngineCoreOutputs]) -> None:
        """Attach reports to a request's last output, and to the next one after a change."""
        if not self._reports and not self._always:
            return
        due = self._changed | self._always
        for batch in outputs.values():
            for output in batch.outputs:
                ends = output.finish_reason is not None
                if not ends and output.request_id not in due:
                    continue
                if report := self._reports.get(output.request_id):
                    output.kv_transfer_params = {REPORT_KEY: report}
                    self._changed.discard(output.request_id)
                if ends:
                    self.forget(output.request_id)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._reports.pop(request_id, None)
        self._changed.discard(request_id)
        self._always.discard(request_id)

    def take_new(self) -> list[Report]:
        """Return the first reports of requests since the last call."""
        new, self._new = self._new, []
        return new

    def take_counts(self) -> dict[str, int]:
        """Return the counts since the last call, by their names in `MemoryStats`."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return counts
