"""Where the last turns of conversations went whose clients name their sessions."""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

# Sessions to remember, some 200 bytes each.
_MOST_SESSIONS = 100_000


def session_key(tenant: str | None, session_id: str) -> int:
    """Return a number for a session. Sessions of different tenants never share one."""
    text = repr((tenant, session_id)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


class LastTurn(NamedTuple):
    """The replica that got a session's last turn, and that turn's prompt tokens."""

    replica_id: str
    prompt_tokens: int


class SessionHints:
    """The last turns of the sessions that were active last. Their replicas may be gone.

    A hint says where a prompt is probably cached whose tokens the router does not know.
    """

    def __init__(self, most: int = _MOST_SESSIONS) -> None:
        self._most = most
        self._last: OrderedDict[int, LastTurn] = OrderedDict()

    def note(self, session: int, replica_id: str, prompt_tokens: int) -> None:
        """Remember a turn that was sent to a replica."""
        self._last[session] = LastTurn(replica_id, prompt_tokens)
        self._last.move_to_end(session)
        if len(self._last) > self._most:
            self._last.popitem(last=False)

    def last_turn(self, session: int | None) -> LastTurn | None:
        """Return a session's last turn, or None if there is no session or none is known."""
        return None if session is None else self._last.get(session)
