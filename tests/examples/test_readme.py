"""The Python blocks of the README and of the documentation run as they stand."""

import json
import re
from pathlib import Path

import pytest

import glcan_fx.errors

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


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Its code cells in order, in fewer epochs, and what the last one claims."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "start.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    sources = ["".join(cell["source"]).replace("epochs=8", "epochs=2") for cell in cells if cell["cell_type"] == "code"]
    for number, source in enumerate(sources[:-1]):
        exec(compile(source, f"cell {number}", "exec"), names)
    setup, _, claim = sources[-1].rpartition("\n")
    exec(setup, names)
    assert eval(claim, names)
    assert names["accuracy"](names["local"]) > 0.5 and "local module 1:" in capsys.readouterr().out


def test_every_error_and_warning_is_explained():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    classes = [name for name, value in vars(glcan_fx.errors).items()
               if isinstance(value, type) and value.__module__ == "glcan_fx.errors"]
    assert len(classes) > 10
    assert not [name for name in classes if f"| `{name}` |" not in page and name != "GlcanFxError"]


def test_the_readme_s_links_work_everywhere():
    """Also where its text is shown alone: as the package's description."""
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and not [link for link in links if not link.startswith("https://")]
    base = "https://github.com/glcan-fx/glcan-fx/blob/main/"
    own = [link.removeprefix(base).partition("#")[0] for link in links if link.startswith(base)]
    assert own and not [path for path in own if not (ROOT / path).exists()]
