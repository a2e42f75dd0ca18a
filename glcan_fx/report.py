"""Write a report: one HTML page that needs nothing but itself, from figures and graphs that are already text."""

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def page(data: Mapping[str, Any]) -> str:
    """The HTML of a report: styles, script, Graphviz as WebAssembly and the data are all in it, and it loads nothing.

    data: title, subtitle, graphs, table, modules, memory, notes and report, as static/report.js describes them. Texts
    are shown as they are; the page only lays them out. Write it as UTF-8.
    """
    parts = {
        "title": _escaped(data["title"]), "subtitle": _escaped(data["subtitle"]), "css": _static("report.css"),
        "viz": _static("viz-global.js"), "js": _static("report.js"), "data": _embedded(data),
    }
    # one pass, so that nothing within a part is taken for a placeholder
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _static("report.html"))


def _escaped(text: str) -> str:
    """In ASCII, so that a text that UTF-8 cannot hold (half a surrogate pair) does not stop the page's writing."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: no text of a model's can end the script, or open a comment in it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _static(name: str) -> str:
    return files(__package__).joinpath("static", name).read_text(encoding="utf-8")
