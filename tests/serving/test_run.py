"""`python -m serving.run` where it cannot start."""

import subprocess
import sys

from loadtest.servers.ports import free_port


def test_an_address_without_a_cluster_is_named_in_one_line() -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "serving.run", "configs/cluster.yaml", "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("configs/cluster.yaml: no Ray cluster answers")
    assert "Traceback" not in done.stderr
