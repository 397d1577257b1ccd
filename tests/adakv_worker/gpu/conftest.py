"""These tests run in a process of their own, where `interpreted.py` came first."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
