"""The name `kernels` is also that of a Hugging Face package that transformers probes for."""

import subprocess
import sys


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_transformers_does_not_take_us_for_its_kernels_package() -> None:
    code = (
        "import kernels; from transformers.utils import is_kernels_available as available;"
        "print(available())"
    )
    assert _python(code) == "False"


def test_importing_kernels_does_not_import_torch() -> None:
    code = "import sys, kernels, kernels.blocks; print('torch' in sys.modules)"
    assert _python(code) == "False"
