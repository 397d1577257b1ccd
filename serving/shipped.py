"""The configurations that come with us, and the environment of Ray that they are made for.

They lie in `configs/` of the repository, which is a folder of this package once that is installed.
"""

import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def ray_variables(path: str) -> dict[str, str]:
    """Return what `ray.env` sets for a Ray cluster that serves us.

    Args:
        path: `PATH` of the cluster; this environment's programs come before it.

    Raises:
        subprocess.CalledProcessError: the shell cannot run `ray.env`.
    """
    path = f"{Path(sys.executable).parent}:{path}"
    shell = ["env", "-i", f"PATH={path}", "sh", "-c", 'set -a; . "$0"; env -0', "configs/ray.env"]
    printed = subprocess.run(
        shell, cwd=CONFIGS.parent, capture_output=True, check=True, text=True
    ).stdout
    variables = dict(line.split("=", 1) for line in printed.split("\0") if line)
    return {name: one for name, one in variables.items() if name.startswith(("RAY_", "ADAKV_"))}
