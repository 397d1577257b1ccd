"""The command line of `python -m evals`."""

from pathlib import Path

import pytest

from adakv_serve.evals.__main__ import main
from adakv_serve.evals.commands import COMMANDS
from adakv_serve.evals.results.files import write_rows
from tests.evals.test_scores import scored


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_every_command_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"python -m evals {name}" in capsys.readouterr().out


def test_report_prints_the_tables_of_results_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    list(write_rows([[scored("snapkv", [0.5, 0.7], ["a", "b"])]], path))
    assert main(["report", str(path)]) == 0
    assert "| snapkv | 1.000 / 1.000 / 0.600 |" in capsys.readouterr().out


def test_an_error_is_one_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "/no/such/file.jsonl"]) == 1
    assert capsys.readouterr().err == "[Errno 2] No such file or directory: '/no/such/file.jsonl'\n"
