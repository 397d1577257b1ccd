"""The sessions that a router remembers."""

from adakv_serve.router.session_hints import LastTurn, SessionHints, session_key


def test_the_sessions_that_were_active_last_are_remembered() -> None:
    hints = SessionHints(most=2)
    hints.note(1, "a", 100)
    hints.note(2, "b", 200)
    hints.note(1, "c", 300)
    hints.note(3, "d", 400)
    assert hints.last_turn(1) == LastTurn("c", 300)
    assert hints.last_turn(2) is None
    assert hints.last_turn(None) is None


def test_sessions_of_different_tenants_are_different() -> None:
    keys = {
        session_key(tenant, name)
        for tenant in (None, "a", "b")
        for name in ("x", "y", "", "None", "\ud83d")
    }
    assert len(keys) == 15
