"""Keys from a file: which open, and what a change of the file does."""

import hashlib
import logging
import os
from pathlib import Path

import pytest

from adakv_serve.serving.http.api_keys import ApiKeys
from adakv_serve.serving.http.key_file import KeyFile

LOGGER = logging.getLogger("test")


def line(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# of production\n\n" + line("alice", "one") + line("bob", "two"))
    return path


def opens(keys: ApiKeys, key: str) -> bool:
    return keys.caller("/v1/models", {"authorization": f"Bearer {key}"}) is not None


def write(path: Path, text: str) -> None:
    """Replace a file as editors and deployment tools do."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def test_the_keys_of_its_digests_open(path: Path) -> None:
    keys = ApiKeys(("listed",), KeyFile(path, LOGGER))
    assert [opens(keys, key) for key in ("one", "two", "listed", "three", "")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_a_key_is_changed_without_a_restart(path: Path) -> None:
    keys = ApiKeys((), KeyFile(path, LOGGER))
    assert opens(keys, "one")
    write(path, line("alice", "new"))
    assert opens(keys, "new")
    assert not opens(keys, "one")


@pytest.mark.parametrize("text", ["", "alice\n", "alice 1234\n", "# none\n", None])
def test_a_broken_file_changes_nothing(
    path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys((), KeyFile(path, LOGGER))
    if text is None:
        path.unlink()
    else:
        write(path, text)
    assert opens(keys, "one")
    assert not opens(keys, "three")
    assert caplog.text.count("the API keys stay as they were") == 1
    write(path, line("carol", "three"))
    assert opens(keys, "three")


@pytest.mark.parametrize("text", ["", "alice\n", "alice one two\n", "alice " + "g" * 64])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    with pytest.raises(OSError, match="keys"):
        KeyFile(path, LOGGER)
    path.write_text(text)
    with pytest.raises(ValueError, match="keys"):
        KeyFile(path, LOGGER)
