"""The proofs of a scheduler's requests, attached to outputs when they have changed."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec
from vllm.v1.engine import EngineCoreOutputs

from adakv_worker.core.plan import Plan
from adakv_worker.core.request import CompressedRequest
from adakv_worker.messages import Answer, Proof, with_proof


class Counts(NamedTuple):
    """Counts of `MemoryStats` by their names there."""

    decode_evictions: int = 0
    selection_failures: int = 0


class Proofs:
    """The newest proof of each request.

    First proofs and counts pile up until they are taken, once a step.
    """

    def __init__(self) -> None:
        self._proofs: dict[str, Proof] = {}
        # Requests whose proof goes with their next output, and those where it goes with each.
        self._changed: set[str] = set()
        self._always: set[str] = set()
        self._new: list[Proof] = []
        self._counts = Counts()

    def __len__(self) -> int:
        return len(self._proofs)

    def get(self, request_id: str) -> Proof | None:
        return self._proofs.get(request_id)

    def always_attach(self, request_id: str) -> None:
        """Attach a request's proof to each of its outputs: any may be its last.

        The front end finds stop strings, after the fact.
        """
        self._always.add(request_id)

    def put(self, request_id: str, proof: Proof) -> None:
        """Note a proof that has changed, or that comes from another engine."""
        self._proofs[request_id] = proof
        self._changed.add(request_id)

    def note_whole(self, request_id: str, plan: Plan) -> None:
        """Note that a request will not be compressed, at first or after a preemption."""
        before = self._proofs.get(request_id)
        if before is None or before.skipped != plan.skipped:
            self._note(request_id, plan.proof(None))

    def note_step(
        self,
        requests: Mapping[str, CompressedRequest],
        evicted: Collection[str],
        answer: Answer,
    ) -> None:
        """Note the results of a step.

        Args:
            evicted: requests that were commanded to evict.
            answer: the workers' answer; proofs have the entries that they really kept.
        """
        for request_id in evicted:
            if proof := self._proofs.get(request_id):
                self._change(request_id, proof, decode_evictions=proof.decode_evictions + 1)
                evictions = self._counts.decode_evictions + 1
                self._counts = self._counts._replace(decode_evictions=evictions)
        for request_id in answer.failed:
            failures = self._counts.selection_failures + 1
            self._counts = self._counts._replace(selection_failures=failures)
            if (request := requests.get(request_id)) and (proof := self._proofs.get(request_id)):
                self._change(request_id, proof, fallback=request.plan.fallback)
        for request_id, entries in answer.kept.items():
            if request := requests.get(request_id):
                self._note(request_id, request.plan.proof(entries))

    def _change(self, request_id: str, proof: Proof, **changes: str | int | None) -> None:
        self.put(request_id, msgspec.structs.replace(proof, **changes))

    def _note(self, request_id: str, proof: Proof) -> None:
        before = self._proofs.get(request_id)
        if before is None:
            self._new.append(proof)
            self.put(request_id, proof)
        else:
            self._change(request_id, proof, decode_evictions=before.decode_evictions)

    def attach(self, outputs: Mapping[int, EngineCoreOutputs]) -> None:
        """Attach proofs to a request's last output, and to the next one after a change."""
        for batch in outputs.values():
            for output in batch.outputs:
                request_id, ends = output.request_id, output.finish_reason is not None
                is_due = ends or request_id in self._changed or request_id in self._always
                if is_due and (proof := self._proofs.get(request_id)):
                    if not ends and request_id not in self._changed:
                        # It is large, and has been sent.
                        proof = proof.with_detail(None)
                    output.kv_transfer_params = with_proof(proof)
                    self._changed.discard(request_id)
                if ends:
                    self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """Drop a request that has ended."""
        self._proofs.pop(request_id, None)
        self._changed.discard(request_id)
        self._always.discard(request_id)

    def take_new(self) -> list[Proof]:
        """Return the first proofs of requests since the last call."""
        new, self._new = self._new, []
        return new

    def take_counts(self) -> Counts:
        """Return the counts since the last call."""
        counts, self._counts = self._counts, Counts()
        return counts
