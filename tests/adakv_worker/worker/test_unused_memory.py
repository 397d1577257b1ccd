"""Memory with holes, and what of it goes back to the system."""

import subprocess
import sys

# In a process of its own, whose memory nothing else changes.
PROGRAM = """
import ctypes, time
import psutil, torch
from adakv_worker.worker.unused_memory import UnusedMemory

resident = lambda: psutil.Process().memory_info().rss >> 20
# As it becomes by itself where large tensors come and go.
ctypes.CDLL(None).mallopt(-3, 32 << 20)
now_s = [0.0]
unused = UnusedMemory(lambda: now_s[0])
stays, goes = [], []
for _ in range(200):
    goes.append(torch.ones(1 << 18))
    stays.append(torch.ones(1 << 14))
goes.clear()
full = resident()
unused.give_back()
soon = resident()
now_s[0] = 301.0
unused.give_back()
print(full - soon, full - resident(), all(one.sum() == 1 << 14 for one in stays))
"""


def test_holes_go_back_after_some_minutes_and_nothing_else_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    at_once, later, stays = done.stdout.split()
    assert int(at_once) < 20
    assert int(later) > 150
    assert stays == "True"
