"""The Python blocks of the README and of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCKS = [(f"{path}, block {number}", block) for path, text in PAGES.items()
          for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))]
SLOW = "memory_budget=\"4GiB\""  # a RetinaNet-R50, planned to a budget: a minute


def test_there_are_blocks():
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize(("name", "block"), [
    pytest.param(name, block, id=name, marks=[pytest.mark.slow] if SLOW in block else []) for name, block in BLOCKS])
def test_block_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, name, "exec"), {})
