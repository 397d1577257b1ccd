"""The command line `adakv` as a user types it."""

import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adakv.__main__ import _BENCHES, _COMMANDS, Command, main


def adakv(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "adakv", *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("words", [(), ("--help",), ("bench",), ("bench", "--help")])
def test_alone_it_lists_its_commands(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name}" in listed for name in (_BENCHES if "bench" in words else _COMMANDS))


@pytest.mark.parametrize("words", [("srve",), ("bench", "ofline")])
def test_an_unknown_command_is_named(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"no command '{words[-1]}'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*_COMMANDS.values(), *_BENCHES.values()])
def test_every_command_is_there(command: Command) -> None:
    module = importlib.import_module(command.module)
    assert callable(module.main)


def test_a_command_gets_its_arguments_and_shows_its_own_help() -> None:
    done = adakv("inspect", "--help")
    assert done.returncode == 0
    assert "--watch" in done.stdout


def test_copies_of_configurations_overwrite_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "cluster.yaml"
    mine.write_text("mine")
    done = adakv("configs", str(tmp_path))
    assert (done.returncode, mine.read_text()) == (1, "mine")
    assert done.stderr.splitlines() == [f"{tmp_path}: File exists: name a new folder"]


def test_the_doctor_finds_a_busy_port_and_a_wrong_setting(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    with socket.socket() as busy, socket.socket() as other:
        for one in (busy, other):
            one.bind(("127.0.0.1", 0))
            one.listen()
        ports = [one.getsockname()[1] for one in (busy, other)]
        http = {"host": "127.0.0.1", "port": ports[0]}
        args = {"store": {"port": ports[1]}}
        config.write_text(
            yaml.safe_dump(
                {
                    "http_options": http,
                    "applications": [{"name": "llm", "import_path": "a:b", "args": args}],
                }
            )
        )
        done = adakv("doctor", str(config), "--json")
        found = {one["name"]: one for one in json.loads(done.stdout)}
        assert done.returncode == 1
        assert found["http"]["verdict"] == found["embedded store"]["verdict"] == "error"
    # This machine runs the tests.
    machine = json.loads(adakv("doctor", "--json").stdout)
    assert [one for one in machine if one["verdict"] == "error"] == []
    secret = {
        "applications": [
            {"import_path": "a:b", "args": {"store": {"url": "redis://:hidden@store:1/0"}}}
        ]
    }
    config.write_text(yaml.safe_dump(secret))
    done = adakv("doctor", str(config))
    assert done.returncode == 1
    assert "store.url" in done.stdout
    assert "hidden" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no mapping"), (b"[1]", "no mapping"), (b"applications: abc", "applications"),
        (b"http_options: {port: abc}", "http_options.port"),
        (b"http_options: {port: 99999}\napplications: []", "0.0.0.0:99999 unusable"),
        (b"http_options: {host: nowhere.invalid}\napplications: []", "nowhere.invalid:8000 unus"),
        (b"http_options: {host: 127.0..1}\napplications: []", "127.0..1:8000 unusable"),
        (b"applications: [{import_path: 'a:b', args: {ingress: {count: 3, max_count: 1}}}]",
         "settings that contradict each other"),
        (b"\xff\xfe\x80", "odd.yaml"),
    ],
)  # fmt: skip
def test_the_doctor_names_what_is_wrong_with_an_odd_file(
    tmp_path: Path, content: bytes, named: str
) -> None:
    odd = tmp_path / "odd.yaml"
    odd.write_bytes(content)
    done = adakv("doctor", str(odd))
    assert done.returncode in (1, 2)
    assert named in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_names_the_package_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "adakv_serve.loadtest.soak", None)
    assert main(["bench", "soak"]) == 1
    assert "adakv bench soak: the package adakv_serve.loadtest.soak is missing" in (
        capsys.readouterr().err
    )
