"""What a program says while one waits for it, on a terminal and elsewhere."""

import os
import subprocess
import sys

PROGRAM = """
from adakv.progress import waiting
with waiting("counting [sheep]", 4) as tell:
    for done in range(4):
        print("sheep", done)
        tell(done, "asleep")
"""


def test_elsewhere_lines_tell_of_begin_and_end() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"sheep {number}" for number in range(4)]
    assert done.stderr.splitlines() == ["counting [sheep] ...", "counting [sheep]: 0 s"]


def test_a_terminal_shows_a_bar_and_the_output_goes_where_it_is_sent() -> None:
    terminal, behind = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=behind, env=environment
    ) as process:
        os.close(behind)
        output, _ = process.communicate(timeout=60)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert output.decode().splitlines() == [f"sheep {number}" for number in range(4)]
    assert "━" in shown
    assert "sheep 0" not in shown
    assert "counting [sheep]: 0 s" in shown
