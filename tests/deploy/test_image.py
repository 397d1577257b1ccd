"""The image has what configs/ray.env sets, and no more of the repository than it runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.sources import PACKAGES, ROOT, modules, our_imports

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
# Variables of the image that are not Ray's or ours.
OF_THE_IMAGE = {"PATH", "PYTHONUNBUFFERED"}

# Sources configs/ray.env as the image's user in the image's folder, without touching this machine.
_AS_IN_THE_IMAGE = """
id() { echo 1000; }
mkdir() { :; }
chmod() { :; }
env() { echo /opt/adakv/haproxy; }
command() { echo /opt/adakv/.venv/bin/python; }
PWD=/opt/adakv
set -a
. "$1"
exec /usr/bin/env -0
"""


def environment_of_ray_env() -> dict[str, str]:
    path = ROOT / "configs" / "ray.env"
    done = subprocess.run(
        ["/bin/sh", "-c", _AS_IN_THE_IMAGE, "sh", str(path)],
        env={"PATH": "/nowhere"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    named = re.findall(r"^(\w+)=", path.read_text(), re.MULTILINE)
    return {name: found[name] for name in named}


def environment_of_the_image() -> dict[str, str]:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    return dict(entry.split("=", 1) for entry in line.split())


def test_the_image_has_the_environment_of_a_cluster() -> None:
    image = environment_of_the_image()
    assert {name: image[name] for name in set(image) - OF_THE_IMAGE} == environment_of_ray_env()


def test_ray_and_python_are_on_the_path_in_any_shell() -> None:
    text = DOCKERFILE.read_text()
    assert environment_of_the_image()["PATH"] == "/opt/adakv/.venv/bin:$PATH"
    assert "'PATH=/opt/adakv/.venv/bin:$PATH' > /etc/profile.d/adakv.sh" in text


def test_the_image_sees_no_gpu_that_its_pod_has_not_asked_for() -> None:
    assert "NVIDIA_VISIBLE_DEVICES" not in DOCKERFILE.read_text()


def test_the_pods_run_as_the_user_of_the_image() -> None:
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE.read_text(), re.MULTILINE)
    pods = ROOT / "deploy" / "helm" / "adakv-serve" / "templates" / "_cluster.tpl"
    assert f"runAsUser: {user}\n" in pods.read_text()


def test_the_image_gets_the_packages_that_serve_and_no_others() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert kept & set(PACKAGES) == set(PACKAGES) - {"evals", "loadtest"}
    assert all((ROOT / path).exists() for path in kept)
    needed = {"adakv_serve", "configs", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert kept - set(PACKAGES) == needed | {"scripts/install", "scripts/step"}


def test_what_the_image_gets_imports_nothing_that_it_lacks() -> None:
    lacking = {"evals", "loadtest"}
    for module in modules():
        if module.split(".")[0] not in lacking:
            assert not {name.split(".")[0] for name in our_imports(module)} & lacking, module


def test_hadolint_finds_nothing() -> None:
    found = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if found is None:
        pytest.skip("needs hadolint: scripts/install loadtest,dev,deploy")
    done = subprocess.run([found, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
