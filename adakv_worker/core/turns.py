"""Turns between the tenants whose requests wait."""

from collections import Counter
from collections.abc import Iterable

from vllm.v1.core.sched.request_queue import FCFSRequestQueue, RequestQueue
from vllm.v1.request import Request

from adakv_worker.session_messages import TENANT_KEY


class Turns:
    """Orders the waiting requests of one scheduler.

    The next request is one of the tenant that has the fewest running, so that a tenant with many
    requests delays another one by no more than its share. Each tenant's requests keep their order,
    and preempted ones stay in front. Requests without a tenant count as those of one.
    """

    def __init__(self) -> None:
        self._seen: set[str | None] = set()

    def note(self, request: Request) -> None:
        """Take a new request into account."""
        if len(self._seen) < 2:
            self._seen.add(_tenant(request))

    def order(self, waiting: RequestQueue, running: Iterable[Request]) -> None:
        """Order a first-come queue; one by priorities stays as it is."""
        if len(self._seen) < 2 or len(waiting) < 2 or not isinstance(waiting, FCFSRequestQueue):
            return
        before = Counter(map(_tenant, running))
        places = {}
        for request in waiting:
            if request.num_preemptions:
                places[request.request_id] = -1
                continue
            tenant = _tenant(request)
            places[request.request_id] = before[tenant]
            before[tenant] += 1
        ordered = sorted(waiting, key=lambda request: places[request.request_id])
        waiting.clear()
        waiting.extend(ordered)


def _tenant(request: Request) -> str | None:
    params = request.sampling_params
    tenant = params.extra_args.get(TENANT_KEY) if params is not None and params.extra_args else None
    return tenant if isinstance(tenant, str) else None
