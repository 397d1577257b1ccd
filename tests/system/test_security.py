"""What `docs/security.md` says is exposed: ports, files, and no secret in any log."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import pytest
import redis

from adakv_serve.router.stores import private_folder
from tests.system.deployment import API_KEY, ROOT, Deployment

# Where Serve has the front doors' own HTTP.
DOORS = range(30000, 31001)
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


class Row(NamedTuple):
    """One of the table of ports: who listens, and whether on loopback alone."""

    process: str
    is_loopback: bool


class Listener(NamedTuple):
    process: str
    ip: str
    port: int


def table() -> list[Row]:
    text = (ROOT / "docs" / "security.md").read_text()
    ports = text.partition("## Ports")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \|", ports, re.MULTILINE)
    return [Row(process, where.strip().endswith("loopback")) for process, where in rows]


def listeners(deployment: Deployment) -> Iterator[Listener]:
    for process in deployment.family():
        try:
            name = " ".join(process.cmdline())
            connections = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        for one in connections:
            if one.status == psutil.CONN_LISTEN:
                yield Listener(name, one.laddr.ip, one.laddr.port)


def test_every_open_port_is_in_the_table_and_none_is_wider(deployment: Deployment) -> None:
    rows, seen = table(), set()
    for one in listeners(deployment):
        possible = [row for row in rows if row.process in one.process]
        assert possible, f"{one} is not in docs/security.md"
        seen.add(possible[0].process)
        wide = [row for row in possible if not row.is_loopback and one.port not in DOORS]
        assert wide or one.ip in LOOPBACK, f"{one} listens on more than loopback"
    assert {"haproxy", "valkey-server", "ServeReplica", "gcs_server", "raylet"} <= seen


def test_what_clients_and_the_store_use_is_on_loopback(deployment: Deployment) -> None:
    ports = {urlsplit(url).port for url in (deployment.base_url, deployment.store_url)}
    addresses = {one.port: one.ip for one in listeners(deployment) if one.port in ports}
    assert addresses == dict.fromkeys(ports, "127.0.0.1")


def test_files_and_sockets_are_of_their_user_alone(deployment: Deployment) -> None:
    folder = private_folder()
    assert _mode(folder) == 0o700
    (process,) = [psutil.Process(pid) for pid in deployment.pids("/haproxy.cfg")]
    command = process.cmdline()
    config = Path(command[command.index("-f") + 1])
    assert config.parent.parent == folder
    assert _mode(config.parent) == 0o700
    assert _mode(config) == 0o600
    assert _mode(config.parent / "admin.sock") == 0o600
    url = folder / f"store-{urlsplit(deployment.store_url).port}.url"
    assert (_mode(url), url.read_text()) == (0o600, deployment.store_url)


def test_the_store_asks_for_its_password(deployment: Deployment) -> None:
    parts = urlsplit(deployment.store_url)
    assert parts.port is not None
    assert len(parts.password or "") >= 32
    with redis.Redis(port=parts.port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.keys()
    with redis.Redis.from_url(deployment.store_url) as known:
        assert known.ping()


def test_no_secret_is_in_a_log_or_on_a_command_line(deployment: Deployment) -> None:
    password = urlsplit(deployment.store_url).password
    assert password
    secrets = [API_KEY.encode(), password.encode()]
    logs = [path for path in deployment.folder.rglob("logs/**/*") if path.is_file()]
    assert any("replica" in path.name for path in logs)
    for path in [deployment.log_path, *logs]:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret in content], path
    for process in deployment.family():
        try:
            command = "\0".join(process.cmdline()).encode()
        except psutil.NoSuchProcess:
            continue
        assert not [secret for secret in secrets if secret in command], process


def _mode(path: Path) -> int:
    status = path.stat()
    assert status.st_uid == os.getuid()
    return stat.S_IMODE(status.st_mode)
