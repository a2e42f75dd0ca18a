"""The report page: what is in the file, and what a reader can do with it in a browser."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

import glcan_fx
from glcan_fx.bench.job import Job
from glcan_fx.bench.report import as_page
from glcan_fx.bench.rows import Row
from glcan_fx.report import page as report

STATIC = files("glcan_fx.report") / "static"
MIB = 2**20
NAMES = ["backbone.body.maxpool", "backbone.body.layer1.0", "backbone.body.layer1.1", "neck, head, loss"]
COLOURS = ["#dbe9f6", "#e3f2dd", "#fdebd3", "#f3e1f0"]
KEPT = [(420, 80), (195, 80), (156, 80), (713, 0)]


def dot(groups: list[tuple[int, int]], blocks: int = 0) -> str:
    """A partition graph: a cluster per local module or group of modules, an auxiliary network beside it."""
    lines = ['digraph plan { graph [fontname="Helvetica" nodesep=0.35 ranksep=0.3]',
             'node [fontname="Helvetica" shape=box style="filled,rounded" fontsize=11 color="#666666"]',
             'edge [fontname="Helvetica" fontsize=9 color="#444444"]',
             'input [label="input 8x3x800x1066" fillcolor=white]']
    before = "input"
    for first, last in groups:
        own = f"{first}" if first == last else f"{first}-{last}"
        kept, aux = KEPT[first]
        lines.append(f'subgraph "cluster_{own}" {{ id="module-{own}" label="{own}  {NAMES[first]}"'
                     f' style="filled,rounded" fillcolor="{COLOURS[first]}"')
        for block in range(blocks + 1):
            suffix = f"-op-{block}" if blocks else "-block-all"
            lines.append(f'"b{own}.{block}" [id="module-{own}{suffix}" fillcolor=white'
                         f' label="block {block}\\nkeeps {kept} MiB"]')
        lines.append("}")
        lines += [f'"b{own}.{b}" -> "b{own}.{b + 1}"' for b in range(blocks)]
        lines.append(f'"{before}" -> "b{own}.0" [label=" detach" style=bold weight=20]')
        before = f"b{own}.{blocks}"
        if aux:
            lines += [f'"a{own}" [id="aux-{own}" label="auxiliary {own}\\nkeeps {aux} MiB" shape=note style=filled'
                      f' fillcolor="{COLOURS[first]}"]',
                      f'"{before}" -> "a{own}" [label=" local loss"]']
    return "\n".join([*lines, "}"])


def sample() -> dict[str, Any]:
    """A report of four local modules, two of which one of the graphs draws as one."""
    hill = [*range(100, 3600, 9), *range(3600, 150, -9), 150]
    plan = [base + rise for base, top in ((180, 760), (190, 520), (195, 480), (200, 2540)) for rise in
            [*range(0, top - base, 20), *range(top - base, 0, -25)]]
    halves = [*range(100, 3045, 8), *range(3045, 1500, -10), *range(1500, 2300, 9), *range(2300, 150, -10)]

    def step(name: str, peak: int, live: list[int], parts: list[tuple[str, int]], phases: list[str]) -> dict[str, Any]:
        return {"name": name, "peak": peak * MIB, "peak_text": f"{peak / 1024:.2f} GiB ({peak / 3600:.2f})",
                "compute": "1.00", "when": phases[-2],
                "parts": [[part, mib * MIB, f"{mib:.1f} MiB"] for part, mib in parts],
                "live": [mib * MIB for mib in live],
                "phases": [[phase, i / len(phases)] for i, phase in enumerate(phases)]}

    return {
        "title": "RetinaNet", "subtitle": "task detection, 4 local modules of 9 possible, planned for 8x3x800x1066",
        "graphs": [{"label": "repeated modules as one", "dot": dot([(0, 0), (1, 2), (3, 3)])},
                   {"label": "local modules", "dot": dot([(i, i) for i in range(4)])},
                   {"label": "blocks", "dot": dot([(i, i) for i in range(4)], blocks=2)}],
        "table": {"columns": [{"name": "", "align": "right"}, {"name": "local module", "align": "left"},
                              {"name": "stride", "align": "right"}, {"name": "parameters", "align": "right"},
                              {"name": "kept for backward", "align": "right"}, {"name": "features", "align": "left"}],
                  "rows": [[str(i), name, "4", f"{9.5 * (i + 1):.1f} k", f"{own}.0 MiB + {aux}.0 MiB",
                            "own layer2.1; S layer3.1, layer4.1" if aux else "neck and head"]
                           for i, (name, (own, aux)) in enumerate(zip(NAMES, KEPT, strict=True))],
                  "totals": ["", "total", "", "21.05 M", "max 713.0 MiB", ""]},
        "modules": [{"index": i, "name": name, "colour": COLOURS[i],
                     "facts": [["stride", "4"], ["parameters", f"{9536 + i:,}"],
                               ["kept for backward", f"{own}.0 MiB + {aux}.0 MiB"]],
                     "code": f"# local module {i}: {name} | stride 4, 64 channels\nx_{i} = self.conv_{i}(cut_{i})\n",
                     "aux_code": f"def forward(self, x):\n    return self.network_{i}(x)  # lean\n" if aux else None,
                     "saved": own * MIB, "aux_saved": aux * MIB}
                    for i, (name, (own, aux)) in enumerate(zip(NAMES, KEPT, strict=True))],
        "memory": {"text": "Peak memory of a training step with SGD and momentum, simulated", "steps": [
            step("backpropagation", 3600, hill,
                 [("activations of neck, head, loss", 2250), ("activations of layer1.0", 830),
                  ("activations of layer1.1", 360), ("parameters", 80), ("optimizer state", 80)],
                 ["forward", "neck, head, loss", "backward", "optimizer step"]),
            step("activation checkpointing, every block", 3045, halves,
                 [("activations", 2885), ("parameters", 80), ("optimizer state", 80)],
                 ["forward", "backward", "optimizer step"]),
            step("this plan", 2540, plan,
                 [("loss", 2150), ("activations", 200), ("parameters", 90), ("optimizer state", 90), ("cache", 10)],
                 [f"{kind} of {name}" for name in NAMES for kind in ("forward", "loss")])]},
        "notes": ["The last module keeps most: slices=4 would help."], "report": ["captured on rung 1 of 5"],
    }


def test_the_vendored_file_is_the_recorded_one() -> None:
    record = json.loads((STATIC / "viz-js.json").read_text())
    vendored = (STATIC / record["file"]).read_bytes()
    assert hashlib.sha256(vendored).hexdigest() == record["sha256"]
    assert record["version"].encode() in vendored[:200]
    licence = (STATIC / record["license"]).read_text()
    assert all(f"{name} {version}" in licence for name, version in (entry.split()[:2] for entry in record["contains"]))
    assert "Permission is hereby granted" in licence and "Eclipse Public License - v 1.0" in licence


def test_texts_cannot_leave_their_place() -> None:
    data = sample()
    evil = "</script><script>alert(1)</script><!-- {{data}} \u2028 \ud800 \\"
    data["title"] = data["modules"][0]["name"] = data["notes"][0] = evil
    text = report.page(data)
    text.encode()
    scripts = re.findall(r"<script\b[^>]*>(.*?)</script", text, re.DOTALL | re.IGNORECASE)
    assert len(scripts) == 3 and "<" not in scripts[0]
    assert json.loads(scripts[0]) == data
    assert text.count("&lt;/script&gt;&lt;script&gt;alert(1)") == 2 and "<!-- {{data" not in text


def test_the_page_asks_for_nothing() -> None:
    text = report.page(sample())
    assert "default-src 'none'" in text[:400]
    written = text.replace((STATIC / "viz-global.js").read_text(encoding="utf-8"), "")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:|//|[\w./]+\.(?:js|css))|@import|url\(""", written)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A function that opens a report from a file; no test may leave an error or a request behind."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.on("console", lambda message: complaints.append(message.text)
            if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def open_report(data: dict[str, Any] | Path, fragment: str = "") -> Any:
        path = data if isinstance(data, Path) else tmp_path / "report.html"
        if not isinstance(data, Path):
            path.write_text(report.page(data), encoding="utf-8")
        page.on("request", lambda request: complaints.append(request.url)
                if request.url.split("#")[0] != path.as_uri() and not request.url.startswith("data:") else None)
        page.goto(path.as_uri() + fragment)
        return page

    yield open_report
    page.close()
    assert complaints == []


def transform(page: Any) -> str:
    return str(page.locator(".card .view").get_attribute("transform"))


def test_every_graph_is_drawn(opened: Any) -> None:
    page = opened(sample())
    page.wait_for_selector(".card svg #module-1-2")
    assert page.locator(".card svg #aux-1-2").count() == page.locator(".card svg #module-3").count() == 1
    page.select_option("#which", label="blocks")
    page.wait_for_selector(".card svg #module-2-op-1")
    assert page.locator(".card svg").count() == 1 and page.locator(".card svg #module-1-2").count() == 0
    page.select_option("#which", label="repeated modules as one")
    assert page.locator(".card svg #module-1-2").count() == 1


def test_a_node_shows_its_module(opened: Any) -> None:
    page = opened(sample())
    page.click(".card svg #aux-0 text >> nth=0")
    details = page.locator("#details")
    texts = details.inner_text()
    assert all(text in texts for text in ("backbone.body.maxpool", "9,536", "self.conv_0", "self.network_0"))
    assert page.url.endswith("#module-0")
    for place in ("#row-0", "#module-0", "#aux-0"):
        assert "selected" in str(page.locator(place).get_attribute("class"))
    assert "selected" not in str(page.locator("#row-1").get_attribute("class"))
    page.keyboard.press("Escape")
    assert page.locator(".selected").count() == 0 and "9,536" not in details.inner_text() and "#" not in page.url


def test_a_group_lets_choose(opened: Any) -> None:
    page = opened(sample())
    page.click(".card svg #module-1-2-block-all")
    assert "9,537" in page.inner_text("#details") and page.url.endswith("#module-1-2")
    assert page.locator("tr.selected").count() == 2 and page.locator(".choices button").count() == 2
    page.click(".choices button >> nth=1")
    assert "9,538" in page.inner_text("#details") and page.locator("tr.selected").count() == 2


def test_a_row_shows_its_module(opened: Any) -> None:
    page = opened(sample())
    page.wait_for_selector(".card svg")
    page.click("#row-2")
    assert "9,538" in page.inner_text("#details") and "self.conv_2" in page.inner_text("#details")
    assert "selected" in str(page.locator("#module-1-2").get_attribute("class"))
    page.focus("#row-2")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert "9,539" in page.inner_text("#details") and page.url.endswith("#module-3")
    page.click("#row-1 .kept")
    assert "9,537" in page.inner_text("#details")


def test_the_address_keeps_the_selection(opened: Any) -> None:
    page = opened(sample(), "#module-1-2/2")
    page.wait_for_selector(".card svg #module-1-2.selected")
    assert "9,538" in page.inner_text("#details")


def test_zoom_and_pan(opened: Any) -> None:
    page = opened(sample())
    page.wait_for_selector(".card svg #module-0")
    fitted = transform(page)
    page.click("#zoom-in")
    zoomed = transform(page)
    page.eval_on_selector(".card", "card => card.scrollIntoView({block: 'center', behavior: 'instant'})")
    box = page.locator(".card").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.wheel(0, -200)
    page.wait_for_function("before => document.querySelector('.view').getAttribute('transform') !== before", arg=zoomed)
    wheeled = transform(page)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 70, steps=4)
    page.mouse.up()
    assert len({fitted, zoomed, wheeled, transform(page)}) == 4
    assert page.locator(".selected").count() == 0
    page.dblclick(".card", position={"x": 5, "y": 5})
    assert transform(page) == fitted


def test_the_graph_stays_in_sight(opened: Any) -> None:
    page = opened(sample())
    page.select_option("#which", label="blocks")
    page.wait_for_selector(".card svg #module-3")
    page.set_viewport_size({"width": 420, "height": 800})
    page.wait_for_timeout(100)
    card, graph = page.locator(".card").bounding_box(), page.locator(".view").bounding_box()
    assert graph["x"] >= card["x"] and graph["x"] + graph["width"] <= card["x"] + card["width"]
    last = page.locator(".card svg #module-3-op-2")
    for _ in range(6):
        page.click("#zoom-in")
    assert last.bounding_box()["y"] > card["y"] + card["height"]
    page.click("#row-3 td >> nth=1")
    card, shown = page.locator(".card").bounding_box(), page.locator(".card svg #module-3").bounding_box()
    assert card["y"] < shown["y"] + shown["height"] and shown["y"] < card["y"] + card["height"]


def test_memory_is_drawn(opened: Any) -> None:
    page = opened(sample())
    assert page.locator(".bar").count() == page.locator(".chart .line").count() == 3
    widths = page.eval_on_selector_all(
        ".bar", "bars => bars.map(bar => [...bar.children].reduce((sum, part) => sum + part.offsetWidth, 0))")
    assert widths[0] / widths[2] == pytest.approx(3600 / 2540, rel=0.02)
    page.hover(".chart", position={"x": 300, "y": 100})
    tip = page.inner_text(".tip")
    assert all(text in tip for text in ("backpropagation", "GiB", "loss of backbone.body.maxpool"))


def test_what_cannot_be_drawn_says_why(opened: Any) -> None:
    page = opened({**sample(), "memory": None, "notes": [], "graphs": [{"label": "broken", "dot": "digraph { a -> "}]})
    page.wait_for_selector(".card .error")
    assert "syntax error" in page.inner_text(".card")
    assert page.locator("#memory").is_hidden() and page.locator("#row-3").is_visible()


def test_without_javascript(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report.page(sample()), encoding="utf-8")
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(path.as_uri())
    assert page.inner_text("h1") == "RetinaNet" and "JavaScript" in page.inner_text(".error")


def test_a_plan_s_report(opened: Any, tmp_path: Path) -> None:
    cuts = ["maxpool", "layer1.0", "layer1.1", "layer2.0"]  # two modules alike
    example = torch.empty(2, 3, 64, 64)
    plan = glcan_fx.plan(resnet18(num_classes=10), k=cuts, task="classification", example_inputs=example)
    plan.save(tmp_path / "plan.html")
    page = opened(tmp_path / "plan.html")
    page.wait_for_selector(".card svg #module-4")
    assert page.locator(".card svg g.node[id^=aux-]").count() == 4 and page.locator("#modules tbody tr").count() == 5
    page.click(".card svg #module-2 text >> nth=0")
    texts = page.inner_text("#details")
    assert f"{plan.modules[2].parameters:,}" in texts and "# local module 2: " in texts and "def forward" in texts
    assert "17.13" not in texts and "backpropagation" in page.inner_text("#memory")
    page.select_option("#which", label="blocks")
    page.wait_for_selector(".card svg text:has-text('layer2.1')")
    page.select_option("#which", label="identical modules as one")
    page.wait_for_selector(".card svg [id^=module-0]")


def test_a_bench_s_report(opened: Any, tmp_path: Path) -> None:
    rows = [Row(name, name, 3 * MIB, 100, when="forward", parts={"activations": 3 * MIB}, curve=[0, 3 * MIB, 0])
            for name in ("bp", "glcan")]
    rows[1].update({"k": 9})
    (tmp_path / "bench.html").write_text(as_page(rows, "model.py:net", Job("model.py:net", {}, [[2, 3, 64, 64]])))
    page = opened(tmp_path / "bench.html")
    page.wait_for_selector("#memory .chart")
    assert page.locator("#modules tbody tr").count() == 2 and not page.is_visible("#details")
    assert "glcan, k=9" in page.inner_text("#memory") and "glcan, k=9" in page.inner_text("#modules")
