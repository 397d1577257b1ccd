"""The fingerprint of an engine's caches changes with weights and settings, and only with them."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from adakv_worker.worker.fingerprint import fingerprint
from tests.adakv_worker.engines import make_tiny_model


def config(folder: Path, **changes: object) -> VllmConfig:
    settings = {"dtype": "float32", "max_model_len": 512, "skip_tokenizer_init": True, **changes}
    return AsyncEngineArgs(model=str(folder), **settings).create_engine_config()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), heads=4, kv_heads=2)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "copy")


def test_the_same_weights_have_the_same_fingerprint_wherever_they_are(
    model: Path, copy: Path
) -> None:
    assert fingerprint(config(model)) == fingerprint(config(copy))
    assert fingerprint(config(model)) == fingerprint(config(copy, max_model_len=256, block_size=16))


def test_other_weights_at_the_same_path_have_another_fingerprint(copy: Path) -> None:
    before = fingerprint(config(copy))
    (file,) = copy.glob("*.safetensors")
    weights = load_file(file)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, file)
    assert fingerprint(config(copy)) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"hf_overrides": {"rope_theta": 5e5}},
        {"load_format": "dummy"},
        {"revision": "other"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_have_another_fingerprint(model: Path, changes: dict[str, object]) -> None:
    assert fingerprint(config(model, **changes)) != fingerprint(config(model))
