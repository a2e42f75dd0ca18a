"""examples/compare.py: one command for several methods, and the page that it writes."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_training import EXAMPLES, SMALL, pictures, program

__all__ = ["pictures"]  # the fixture


@pytest.mark.slow
def test_runs_several_methods_once_and_shows_them_side_by_side(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "compare.py"), "classification", "--data", str(pictures), "--methods",
               "glcan --ahead 1", "hpff+man+dgl", "--k", "3", "--seeds", "0", "--out", str(tmp_path), "--", *map(
                   str, SMALL), "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert {row.split(" | ")[0].strip("| ") for row in rows[1:3]} == {"bp", "checkpoint"}
    assert any("| glcan | 3 | ahead 1 |" in row for row in rows) and any("| hpff+man+dgl | 3 |" in row for row in rows)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/record.json")}
    assert len(before) == 4
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/record.json")} == before


@pytest.mark.slow
def test_the_page_has_every_method_and_its_picture(tmp_path: Path) -> None:
    compare = program("compare")
    compare.page(tmp_path / "methods.md")
    text = (tmp_path / "methods.md").read_text()
    for name in ("GLCAN", "DGL", "AugLocal", "InfoPro", "PredSim", "MAN", "HPFF", "MLAAN", "SGR"):
        assert f"### {name}\n" in text
    assert "arXiv 2407.05623" in text and "Args:" not in text
    pictures = sorted((tmp_path / "pictures").glob("method-*.svg"))
    assert len(pictures) == len(compare.DRAWN) and all("<svg" in path.read_text() for path in pictures)
