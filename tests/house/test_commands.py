"""Commands in the documents are ones that our programs take, with all of their options."""

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from adakv.__main__ import _BENCHES, _COMMANDS
from adakv_serve.serving.http.api_keys import ApiKeys
from adakv_serve.serving.http.key_file import KeyFile
from tests.house.sources import PACKAGES, ROOT
from tests.house.test_documents import DOCUMENTS

_BLOCK = re.compile(r"^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_ENDS = {"&&", "||", ";", "|", "&", "(", ")", ">", ">>", "<", "\n"}
_ASSIGNMENT = re.compile(r"[A-Za-z_]+=")
_INSTALLED = {
    "adakv-compare": "adakv_serve.loadtest.compare",
    "adakv-drain": "adakv_serve.serving.drain",
    "adakv-evals": "adakv_serve.evals.__main__",
    "adakv-inspect": "adakv_serve.router.inspect",
    "adakv-serve": "adakv_serve.serving.run",
    "adakv-simulate": "adakv_serve.router.simulate.__main__",
}
_OUR_MODULE = re.compile(rf"(adakv_serve|{'|'.join(PACKAGES)})(\.\w+)*")


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the commands of a document as lists of words."""
    text = path.read_text()
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield from _split(line)
    for span in _SPAN.findall(_FENCED.sub("", text)):
        yield from _split(span)


def _split(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # Quotes that another line closes, or none at all.
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in _ENDS:
            command.append(word)
            continue
        while command and _ASSIGNMENT.match(command[0]):
            command.pop(0)
        if command:
            yield command
        command = []


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the module and the arguments of a command that runs a program of ours."""
    # `[CONFIG]` may be left out.
    name, *rest = [words[0], *(word for word in words[1:] if not word.startswith("["))]
    if Path(name).name in ("python", "python3") and rest[:1] == ["-m"]:
        module = rest[1] if len(rest) > 1 else ""
        if not _OUR_MODULE.fullmatch(module):
            return None
        main = ROOT.joinpath(*module.split("."), "__main__.py")
        return (f"{module}.__main__" if main.exists() else module), rest[2:]
    if name in _INSTALLED and rest:
        return _INSTALLED[name], rest
    if name == "adakv" and rest[:1] == ["bench"] and len(rest) > 1:
        return (_BENCHES[rest[1]].module, rest[2:]) if rest[1].islower() else None
    if name == "adakv" and rest and rest[0].islower() and rest[0] != "bench":
        return _COMMANDS[rest[0]].module, rest[1:]
    return None


EVERY = sorted({(path.name, *words) for path in DOCUMENTS for words in commands(path)})


def refused(commands: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return what programs say of the commands that they do not take."""
    # A capital stands for a number.
    lines = [[re.sub(r"^[A-Z]$", "1", word) for word in words] for words in commands]
    done = subprocess.run(
        [sys.executable, "-m", "tests.house.parsed_commands"],
        cwd=ROOT,
        input=json.dumps(lines),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    # A sentence may name a program without the options that it needs.
    return {line: why for line, why in said.items() if "--" in line or "are required" not in why}


def test_programs_take_the_arguments_that_documents_give_them() -> None:
    lines = {(one[0], *one[1]) for _, *words in EVERY if (one := program(words))}
    assert len(lines) > 50
    assert refused(sorted(lines)) == {}


def test_locust_takes_the_options_that_documents_give_it() -> None:
    lines = [words for _, *words in EVERY if words[0] == "locust"]
    assert len(lines) > 2
    assert refused(lines) == {}


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    lines = [words for _, *words in EVERY if words[0] == "make" and len(words) > 1]
    assert {words[1] for words in lines} - targets == set()


def test_files_that_commands_name_exist() -> None:
    ours = re.compile(r"(?:CONFIG=)?((?:configs|evals|examples|loadtest|scripts|tests)/[\w./-]+)")
    named = {found[1] for _, *words in EVERY for word in words if (found := ours.fullmatch(word))}
    assert len(named) > 10
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_extras_that_commands_install_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [" ".join(words) for _, *words in EVERY]
    pip = [re.search(r"pip install .*(?:\.|adakv-serve)\[([\w,]+)\]", line) for line in lines]
    setup = [re.match(r"scripts/install ([\w,]+)", line) for line in lines]
    named = {name for found in (*pip, *setup) if found for name in found[1].split(",")}
    assert named
    assert named - set(project["optional-dependencies"]) == set()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_the_recipe_for_a_key_makes_a_key_that_opens(tmp_path: Path) -> None:
    (recipe,) = _BLOCK.findall((ROOT / "docs" / "configuration.md").read_text())[:1]
    script = f"{recipe}\nprintf %s $key"
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    keys = ApiKeys((), KeyFile(tmp_path / "keys", logging.getLogger("test")))
    assert keys.caller("/v1/models", {"authorization": f"Bearer {done.stdout}"}) is not None
