"""`adakv serve [CONFIG]`: `python -m serving.run` in the environment that `ray.env` sets.

What is set already stays. `make serve` does the same by a shell.
"""

import os
import sys

from adakv_serve.serving.shipped import ray_variables


def main() -> int:
    for name, value in ray_variables(os.environ.get("PATH", os.defpath)).items():
        os.environ.setdefault(name, value)
    # Ray reads its variables when it is imported.
    from adakv_serve.serving.run import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
