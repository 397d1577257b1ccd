"""The other replicas of a deployment, for held caches that move between them."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray import serve

from adakv_serve.router.lending.redis_leases import LendingLedger
from adakv_serve.serving.spill.parcels import LenderName, open_parcels
from adakv_serve.serving.spill.sessions import Destination, Parcel

if TYPE_CHECKING:
    from adakv_worker.frontend.session_moves import SessionAsk
    from adakv_worker.session_messages import Found, HeldCard


# Longest wait for a place at another replica, while a request waits here.
_PLACE_S = 2.0


class Addressee(NamedTuple):
    """The one replica that a call is for; the request router finds it by this last argument."""

    replica_id: str


class ReplicaPeers:
    """Calls the other replicas of this one's deployment by its handle."""

    def __init__(
        self, name: LenderName, application: str, ledger: LendingLedger, cache_kind: str
    ) -> None:
        """
        Args:
            cache_kind: name of the kind of caches that others must be able to read.
        """
        self._name = name
        self._application = application
        self._ledger = ledger
        self._cache_kind = cache_kind
        self._handle: Any = None

    def _call(self, method: str, **options: Any) -> Any:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(self._name.deployment, self._application)
        return self._handle.options(method_name=method, **options)

    async def give(
        self, holder: str, ask: "SessionAsk", most_bytes_per_token: float, to: Destination
    ) -> Parcel | None:
        call = self._call("give_session", stream=True).remote(
            ask, most_bytes_per_token, to, Addressee(holder)
        )
        try:
            # A holder that is full has no place for it, and its queue may be long.
            async with asyncio.timeout(_PLACE_S):
                await anext(call)
            parcel: Parcel | None
            (parcel,) = [one async for one in call]
        except BaseException:
            call.cancel()
            raise
        return parcel

    async def take(self, receiver: str, one: "Found", card: "HeldCard", path: Path) -> bool:
        name = LenderName.of(receiver)
        parcel = Parcel(one.tokens, one.nbytes, card, str(path))
        if name.node_id != self._name.node_id:
            parcel = parcel._replace(path=None, arrays=await asyncio.to_thread(self.pack, path))
        is_whole: bool = await self._call("take_session").remote(parcel, Addressee(name.replica_id))
        return is_whole

    async def others(self) -> list[str]:
        own, others = self._name, []
        for room in await self._ledger.best(self._cache_kind):
            name = LenderName.parse(room.lender)
            if name is not None and name.deployment == own.deployment and name != own:
                others.append(room.lender)
        return others

    def pack(self, path: Path) -> list[ray.ObjectRef[Any]]:
        """Return references to the parts of a cache, for another node."""
        return [ray.put(parcel) for parcel in open_parcels(path)]
