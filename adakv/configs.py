"""`adakv configs [FOLDER]`: list the configurations that come with us, or copy them to edit."""

import argparse
import shutil
import sys
from pathlib import Path

from adakv_serve.serving.shipped import CONFIGS


def main() -> int:
    parser = argparse.ArgumentParser(prog="adakv configs", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="a new folder for copies")
    folder = parser.parse_args().folder
    if folder is None:
        for config in sorted(CONFIGS.glob("*.yaml")):
            print(config)
        return 0
    try:
        shutil.copytree(CONFIGS, folder)
    except OSError as error:
        print(f"{folder}: {error.strerror or error}: name a new folder", file=sys.stderr)
        return 1
    print(f"adakv serve {folder / 'cluster.yaml'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
