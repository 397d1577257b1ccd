"""URLs of stores: no error holds a part of one, and only their user finds the embedded one's."""

import os
import stat
from pathlib import Path

import pytest

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.router import inspect
from adakv_serve.router.stores import checked_url, full_url, has_password, keep_url, private_folder


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hush/more@h:6379/0",
        "redis://:hush#more@h:6379/0",
        "redis://:1234/hush@h",
        "redis://:hush@",
        "http://:hush@h",
        "valkey://:hush@h:1",
        "hush",
        "",
        "rediss://:hush@h:port",
        "redis://:hush@h?socket_timeout=hush",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_a_part_of_it(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"STORE (cannot be read|must|names no)") as caught:
        checked_url(url, "STORE")
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert inspect.main(["--url", url]) == 1
    assert "hush" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("url", "has"),
    [
        ("redis://h", False),
        ("rediss://user@h:1/2", False),
        ("rediss://:a%2Fb@h:1/2?ssl_ca_certs=/x", True),
        ("redis://h?password=x", True),
        ("redis+sentinel://:x@h:1,g:2/primary", True),
        ("rediss+sentinel://h/primary?sentinel_password=x", True),
    ],
)
def test_a_url_that_redis_understands_stays_as_it_is(url: str, has: bool) -> None:
    assert checked_url(url, "STORE") == url
    assert has_password(url) is has


def test_the_url_of_an_embedded_store_is_found_while_its_keeper_lives() -> None:
    port = free_port()
    url, plain = f"redis://:secret@127.0.0.1:{port}", f"redis://127.0.0.1:{port}"
    assert full_url(plain) == plain
    with keep_url(url):
        assert full_url(plain) == url
        assert full_url(f"redis://localhost:{port}") == url
        for other in (f"redis://10.0.0.7:{port}", f"redis://:own@127.0.0.1:{port}"):
            assert full_url(other) == other
        with keep_url(f"redis://:newer@127.0.0.1:{port}"):
            assert full_url(plain) == f"redis://:newer@127.0.0.1:{port}"
    assert full_url(plain) == plain


def test_no_other_user_can_read_it_and_none_is_left() -> None:
    port = free_port()
    path = private_folder() / f"store-{port}.url"
    with keep_url(f"redis://:secret@127.0.0.1:{port}"):
        assert _mode(path) == 0o600
        assert _mode(path.parent) == 0o700
        assert path.stat().st_uid == os.getuid()
    with keep_url(f"redis://:secret@127.0.0.1:{free_port()}"):
        assert not path.exists()


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
