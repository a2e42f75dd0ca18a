"""The report page: what is in the file, and what a reader can do with it in a browser."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
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
CUTS = ["maxpool", "layer1.0", "layer1.1", "layer2.0"]  # the second and the third local module are alike


@cache
def plan() -> glcan_fx.PlannedModel:
    return glcan_fx.plan(resnet18(num_classes=10), k=CUTS, task="classification",
                         example_inputs=torch.empty(2, 3, 64, 64))


@cache
def html(depth: str) -> str:
    return plan().to_html(depth)


def sample(depth: str = "stages") -> dict[str, Any]:
    """The data of a plan's report, which begins with this graph."""
    found: dict[str, Any] = json.loads(html(depth).split('id="data">', 1)[1].split("</script", 1)[0])
    return found


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
    assert page.locator(".card svg #aux-1-2").count() == page.locator(".card svg #module-4").count() == 1
    page.select_option("#which", label="blocks")
    page.wait_for_selector(".card svg text:has-text('layer2.1')")
    assert page.locator(".card svg").count() == 1 and page.locator(".card svg #module-1-2").count() == 0
    assert page.locator(".card svg g.node[id^=aux-]").count() == 4
    page.select_option("#which", label="identical modules as one")
    assert page.locator(".card svg #module-1-2").count() == 1


def test_a_node_shows_its_module(opened: Any) -> None:
    page = opened(sample())
    page.click(".card svg #aux-0 text >> nth=0")
    details = page.locator("#details")
    texts = details.inner_text()
    assert all(text in texts for text in ("maxpool", "9,536", "# local module 0: ", "def forward"))
    assert page.url.endswith("#module-0")
    for place in ("#row-0", "#module-0", "#aux-0"):
        assert "selected" in str(page.locator(place).get_attribute("class"))
    assert "selected" not in str(page.locator("#row-1").get_attribute("class"))
    page.keyboard.press("Escape")
    assert page.locator(".selected").count() == 0 and "9,536" not in details.inner_text() and "#" not in page.url


def test_a_group_lets_choose(opened: Any) -> None:
    page = opened(sample())
    page.click(".card svg #module-1-2 text >> nth=0")
    assert "# local module 1: " in page.inner_text("#details") and page.url.endswith("#module-1-2")
    assert page.locator("tr.selected").count() == 2 and page.locator(".choices button").count() == 2
    page.click(".choices button >> nth=1")
    assert "# local module 2: " in page.inner_text("#details") and page.locator("tr.selected").count() == 2


def test_a_row_shows_its_module(opened: Any) -> None:
    page = opened(sample())
    page.wait_for_selector(".card svg")
    page.click("#row-2")
    assert "# local module 2: " in page.inner_text("#details")
    assert "selected" in str(page.locator("#module-1-2").get_attribute("class"))
    page.focus("#row-2")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert "# local module 3: " in page.inner_text("#details") and page.url.endswith("#module-3")
    page.click("#row-1 .saved")
    assert "# local module 1: " in page.inner_text("#details")
    columns = page.locator("#modules thead th").all_inner_texts()
    assert len(columns) == len(sample()["table"]["columns"])  # the bars stand in the column of their figures


def test_the_address_keeps_the_selection(opened: Any) -> None:
    page = opened(sample(), "#module-1-2/2")
    page.wait_for_selector(".card svg #module-1-2.selected")
    assert "# local module 2: " in page.inner_text("#details")


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
    page = opened(sample("operators"))
    page.wait_for_selector(".card svg #module-4-cluster")
    page.set_viewport_size({"width": 420, "height": 800})
    page.wait_for_timeout(100)
    card, graph = page.locator(".card").bounding_box(), page.locator(".view").bounding_box()
    assert graph["x"] >= card["x"] and graph["x"] + graph["width"] <= card["x"] + card["width"]
    for _ in range(6):
        page.click("#zoom-in")
    assert page.locator(".card svg #module-4-cluster").bounding_box()["y"] > card["y"] + card["height"]
    page.click("#row-4 td >> nth=1")
    card, shown = page.locator(".card").bounding_box(), page.locator(".card svg #module-4-cluster").bounding_box()
    assert card["y"] < shown["y"] + shown["height"] and shown["y"] < card["y"] + card["height"]


def test_memory_is_drawn(opened: Any) -> None:
    steps = sample()["memory"]["steps"]
    page = opened(sample())
    assert page.locator(".bar").count() == page.locator(".chart .line").count() == 3
    widths = page.eval_on_selector_all(
        ".bar", "bars => bars.map(bar => [...bar.children].reduce((sum, part) => sum + part.offsetWidth, 0))")
    assert widths[0] / widths[2] == pytest.approx(steps[0]["peak"] / steps[2]["peak"], rel=0.02)
    page.hover(".chart", position={"x": 300, "y": 100})
    tip = page.inner_text(".tip")
    assert "backpropagation" in tip and "MiB" in tip and any(phase in tip for phase, _ in steps[2]["phases"])


def test_what_cannot_be_drawn_says_why(opened: Any) -> None:
    page = opened({**sample(), "memory": None, "notes": [], "graphs": [{"label": "broken", "dot": "digraph { a -> "}]})
    page.wait_for_selector(".card .error")
    assert "syntax error" in page.inner_text(".card")
    assert page.locator("#memory").is_hidden() and page.locator("#row-4").is_visible()


def test_without_javascript(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report.page(sample()), encoding="utf-8")
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(path.as_uri())
    assert page.inner_text("h1") == "ResNet" and "JavaScript" in page.inner_text(".error")


def test_a_bench_s_report(opened: Any, tmp_path: Path) -> None:
    rows = [Row(name, name, 3 * MIB, 100, when="forward", parts={"activations": 3 * MIB}, curve=[0, 3 * MIB, 0])
            for name in ("bp", "glcan")]
    rows[1].update({"k": 9})
    (tmp_path / "bench.html").write_text(as_page(rows, "model.py:net", Job("model.py:net", {}, [[2, 3, 64, 64]])))
    page = opened(tmp_path / "bench.html")
    page.wait_for_selector("#memory .chart")
    assert page.locator("#modules tbody tr").count() == 2 and not page.is_visible("#details")
    assert "glcan, k=9" in page.inner_text("#memory") and "glcan, k=9" in page.inner_text("#modules")
