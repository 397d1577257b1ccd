"""The wheel that users install: its description, its files, its programs without a checkout."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from tests.house.sources import LINKED
from tests.installed import ROOT, build_wheel, install, outside

OWN_NAMES = ("adakv", "adakv_serve", "adakv_worker")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed") / "venv")


def _run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=outside(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_package_indexes_take_its_description(wheel: Path, tmp_path: Path) -> None:
    printed = _run(sys.executable, "-m", "twine", "check", "--strict", wheel, folder=tmp_path)
    assert "PASSED" in printed


def test_it_has_no_files_that_do_not_belong(wheel: Path, tmp_path: Path) -> None:
    check = Path(sys.executable).parent / "check-wheel-contents"
    # It has several top-level packages, and the same `py.typed` in each.
    printed = _run(check, "--ignore", "W002,W009", wheel, folder=tmp_path)
    assert printed.strip().endswith("OK")


def test_it_has_every_file_of_the_checkouts_packages(wheel: Path) -> None:
    lines = subprocess.run(
        ["git", "ls-files", "-s", *OWN_NAMES, *LINKED],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    # Links have a mode of their own.
    names = [line.split("\t")[1] for line in lines if not line.startswith("120000")]
    listed = {f"adakv_serve/{n}" if n.startswith(LINKED) else n for n in names}
    assert listed <= _files(wheel)


def test_it_takes_no_name_that_others_may_have(wheel: Path, programs: Path, tmp_path: Path) -> None:
    folders = {name.split("/")[0] for name in _files(wheel)}
    assert {name for name in folders if not name.endswith(".dist-info")} == set(OWN_NAMES)
    code = f"import importlib.util as u; print(*filter(u.find_spec, {LINKED}))"
    assert _run(programs / "python", "-c", code, folder=tmp_path).split() == []


def _files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_configurations_can_be_copied_and_ray_finds_its_proxy(
    programs: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "mine"
    printed = _run(programs / "adakv", "configs", copies, folder=tmp_path)
    assert printed.strip() == f"adakv serve {copies / 'cluster.yaml'}"
    assert yaml.safe_load((copies / "cluster.yaml").read_text())["applications"]
    code = (
        "import os; from adakv_serve.serving.shipped import ray_variables; "
        "print(ray_variables(os.environ['PATH'])['RAY_SERVE_HAPROXY_BINARY_PATH'])"
    )
    proxy = Path(_run(programs / "python", "-c", code, folder=tmp_path).strip())
    assert proxy.is_relative_to(programs.parent)
    assert os.access(proxy, os.X_OK)


def test_vllm_finds_the_plug_in(programs: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points; "
        "(one,) = entry_points(group='vllm.general_plugins', name='adakv'); "
        "print(one.load().__code__.co_filename)"
    )
    printed = _run(programs / "python", "-c", code, folder=tmp_path)
    assert Path(printed.strip()).is_relative_to(programs.parent)
    assert [one.value for one in entry_points(group="vllm.general_plugins", name="adakv")] == [
        "adakv_worker.plugin:register"
    ]
