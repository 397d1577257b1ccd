"""Tells a replica when Serve takes it out of its routers' sight, while it still has requests.

Serve has no hook for that. But it tells every request router at once which replicas are there, and
a replica that has a handle of its own deployment has a router, too.
"""

from collections.abc import Callable, Iterable

_calls: dict[str, Callable[[bool], object]] = {}


def on_membership(replica_id: str, call: Callable[[bool], object]) -> None:
    """Has `call` told, in the router's thread, whether a router of this process has the replica.

    A replica that is not there is being removed, or changed where it is: then it comes back.
    """
    _calls[replica_id] = call


def tell_membership(before: Iterable[str], after: Iterable[str]) -> None:
    """For routers: which replicas were there until now, and which are from now on."""
    after = set(after)
    for replica_id in after.symmetric_difference(before):
        if call := _calls.get(replica_id):
            call(replica_id in after)
