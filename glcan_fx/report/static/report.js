// The page of a report. Python formats every figure; this file only lays them out.
//
// data: {
//   title, subtitle: text,
//   graphs: [{label, dot}],               DOT; ids of nodes and clusters say what they show: see idRange below
//   table: {columns: [{name, align}], rows: [[text]], totals: [text]},   row i is local module i, if there are modules
//   modules: [{index, name, colour, facts: [[name, text]], code, aux_code, saved, aux_saved}],   bytes, for backward
//   memory: null or {text, steps: [{name, peak, peak_text, compute, when, parts: [[name, bytes, text]],
//           live: [bytes], phases: [[name, start]]}]},                   start: a fraction of the step
//   frontier: null or {title, text, columns: [text], axis: a column, compute or time, rows: [[text]],
//           points: [{name, k, exact, peak, compute, chosen, peer}]},    peak: bytes; compute: the axis's, a ratio
//   notes: [text], report: [text]
// }
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  // ---- helpers -----------------------------------------------------------------------------------------------------

  /** An element with attributes, and children that are elements or texts; never markup. */
  function make(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }

  function draw(tag, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") Object.entries(value).forEach(([key, text]) => element.style.setProperty(key, text));
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const byId = (id) => document.getElementById(id);
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  /** Bytes for people, as Python's tables write them. */
  function size(count) {
    if (count >= 2 ** 30) return `${(count / 2 ** 30).toFixed(2)} GiB`;
    return count >= 2 ** 17 || count === 0
      ? `${(count / 2 ** 20).toFixed(1)} MiB`
      : `${(count / 2 ** 10).toFixed(1)} KiB`;
  }

  /** Round values from 0 to at least most, about count of them, in one unit: [[bytes, text]]. */
  function ticks(most, count) {
    const [unit, name] = most >= 2 ** 30 ? [2 ** 30, "GiB"] : most >= 2 ** 20 ? [2 ** 20, "MiB"] : [2 ** 10, "KiB"];
    const rough = Math.max(most / unit, 1e-3) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return Array.from({ length: Math.ceil(most / unit / step - 1e-9) + 1 }, (_, i) => [
      i * step * unit,
      `${(i * step).toFixed(digits)} ${name}`,
    ]);
  }

  /** A text that may break within a module's path, before a name; a number in the path stays with what it counts. */
  function breakable(text) {
    return text
      .split(/(?<=[._/])(?=[A-Za-z])/)
      .flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));
  }

  function swatch(colour) {
    return make("span", { class: "swatch", style: { background: colour } });
  }

  // ---- memory ------------------------------------------------------------------------------------------------------

  /** Colour and dashes of a step: the first (what one had) and the last (the plan) are the same in every report. */
  function strokeOf(i, count) {
    if (count > 1 && i === count - 1) return { stroke: "var(--last)" };
    if (i === 0) return { stroke: "var(--first)" };
    return { stroke: `var(--line-${(i - 1) % 5})`, "stroke-dasharray": ["7 3", "2 3", "9 3 2 3"][(i - 1) % 3] };
  }

  function key(i, count) {
    return draw(
      "svg",
      { class: "key", viewBox: "0 0 26 10", "aria-hidden": "true" },
      draw("line", { x1: 0, x2: 26, y1: 5, y2: 5, style: strokeOf(i, count) }),
    );
  }

  function showMemory(memory) {
    const section = byId("memory");
    section.hidden = false;
    section.append(make("h2", {}, "Memory of a training step"), make("p", { class: "hint" }, memory.text));
    section.append(bars(memory.steps), exactParts(memory.steps));
    const lines = memory.steps.some((step) => step.live.length > 1);
    if (lines) section.append(make("h3", {}, "Memory over one training step"), timeline(memory.steps));
  }

  /** "activations of layer1.0" is of the kind "activations": a kind has a colour, its parts are segments. */
  const kindOf = (part) => part.split(" of ")[0];

  function bars(steps) {
    const totals = new Map();
    for (const step of steps) {
      for (const [name, bytes] of step.parts) totals.set(kindOf(name), (totals.get(kindOf(name)) ?? 0) + bytes);
    }
    const kinds = [...totals].sort((a, b) => b[1] - a[1]).map(([kind]) => kind);
    const known = ["activations", "loss", "parameters", "optimizer state", "cache", "gradients", "auxiliary network", "input"];
    const colourOf = (kind) => (known.includes(kind) ? `var(--area-${known.indexOf(kind)})` : "var(--area-rest)");
    const marks = ticks(Math.max(...steps.map((step) => step.peak)), 5);
    const end = marks.at(-1)[0];
    const box = make("div", { class: "bars" });
    box.append(make("ul", { class: "legend" }, ...kinds.map((kind) => make("li", {}, swatch(colourOf(kind)), kind))));
    steps.forEach((step, i) => {
      const bar = make("div", { class: "bar", role: "img", "aria-label": `${step.name}: ${step.peak_text}` });
      const parts = [...step.parts].sort((a, b) => kinds.indexOf(kindOf(a[0])) - kinds.indexOf(kindOf(b[0])));
      for (const [name, bytes, text] of parts) {
        bar.append(
          make(
            "span",
            {
              class: bytes < end / 250 ? "thin" : null,
              title: `${name}: ${text}`,
              style: { width: `${(100 * bytes) / end}%`, background: colourOf(kindOf(name)) },
            },
            make("span", {}, text),
          ),
        );
      }
      box.append(
        make(
          "div",
          { class: "step" },
          make(
            "div",
            { class: "step-head" },
            key(i, steps.length),
            make("strong", {}, step.name),
            make("span", {}, `${step.peak_text}, ${step.compute}; peak during ${step.when}`),
          ),
          bar,
        ),
      );
    });
    box.append(
      make(
        "div",
        { class: "axis", "aria-hidden": "true" },
        ...marks.map(([bytes, text], i) =>
          make(
            "span",
            { class: i === marks.length - 1 ? "end" : null, style: { left: `${(100 * bytes) / end}%` } },
            text,
          ),
        ),
      ),
    );
    return box;
  }

  /** The bars' figures as a table, closed at first. */
  function exactParts(steps) {
    const names = [...new Set(steps.flatMap((step) => step.parts.map(([name]) => name)))];
    const lookup = steps.map((step) => new Map(step.parts.map(([name, , text]) => [name, text])));
    const head = make("tr", {}, make("th", {}, "part of the peak"), ...steps.map((step) => make("th", {}, step.name)));
    const rows = names.map((name) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, name),
        ...lookup.map((texts) => make("td", {}, texts.get(name) ?? "")),
      ),
    );
    return make(
      "details",
      {},
      make("summary", {}, "Exact figures of the bars"),
      make(
        "div",
        { class: "scroll" },
        make("table", { class: "facts-table" }, make("thead", {}, head), make("tbody", {}, ...rows)),
      ),
    );
  }

  /** One line per step; the steps are as long as each other on the page, whatever time they take. */
  function timeline(steps) {
    const box = make("div", { class: "chart" });
    const legend = make(
      "ul",
      { class: "legend" },
      ...steps.map((step, i) => make("li", {}, key(i, steps.length), `${step.name}: ${step.peak_text}`)),
    );
    const tip = make("div", { class: "tip", hidden: true });
    let cursor = null,
      at = null,
      left = 0,
      inner = 0;

    function paint() {
      const width = box.clientWidth,
        names = width < 600 ? 0 : 15 * (steps.length - 1), // room for the labels of peaks, one above the other
        height = width < 600 ? 240 : 300 + names;
      if (width === 0) return;
      const most = Math.max(...steps.map((step) => Math.max(step.peak, ...step.live)));
      const marks = ticks(most, 5),
        top = 18 + names,
        bottom = height - 40;
      const end = marks.at(-1)[0];
      left = 12 + 7 * Math.max(...marks.map(([, text]) => text.length));
      inner = width - left - 20;
      const x = (fraction) => left + fraction * inner,
        y = (bytes) => bottom - (bytes / end) * (bottom - top);
      const svg = draw("svg", {
        height,
        viewBox: `0 0 ${width} ${height}`,
        role: "img",
        tabindex: 0,
        "aria-label": "Bytes live over the step. " + steps.map((s) => `${s.name}: peak ${s.peak_text}`).join(". "),
      });
      for (const [bytes, text] of marks) {
        svg.append(
          draw("line", { class: "grid", x1: left, x2: x(1), y1: y(bytes), y2: y(bytes) }),
          draw("text", { x: left - 8, y: y(bytes) + 4, "text-anchor": "end" }, text),
        );
      }
      for (const percent of [0, 25, 50, 75, 100]) {
        svg.append(draw("text", { x: x(percent / 100), y: bottom + 16, "text-anchor": "middle" }, `${percent} %`));
      }
      svg.append(
        draw(
          "text",
          { x: x(0.5), y: bottom + 34, "text-anchor": "middle" },
          "progress of the step (allocations and releases, in order)",
        ),
      );
      const labels = [];
      steps.forEach((step, i) => {
        if (step.live.length < 2) return;
        const style = strokeOf(i, steps.length);
        const points = step.live.map(
          (bytes, j) => `${x(j / (step.live.length - 1)).toFixed(1)},${y(bytes).toFixed(1)}`,
        );
        svg.append(
          draw("polygon", {
            class: "under",
            style: { fill: style.stroke },
            points: [`${x(0)},${bottom}`, ...points, `${x(1)},${bottom}`].join(" "),
          }),
        );
        svg.append(draw("polyline", { class: "line", style, points: points.join(" ") }));
        const peak = step.live.indexOf(Math.max(...step.live));
        labels.push({ name: step.name, x: x(peak / (step.live.length - 1)), y: y(step.live[peak]) - 7 });
      });
      if (width >= 600) label(svg, labels, x(0), x(1));
      cursor = draw("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
      svg.append(cursor);
      box.replaceChildren(svg, tip);
      if (at !== null) point(at);
    }

    /** Names at the peaks, moved up where they would cover each other. */
    function label(svg, labels, low, high) {
      const placed = [];
      for (const { name, x, y } of labels.sort((a, b) => b.y - a.y)) {
        const half = name.length * 3.6 + 4,
          middle = clamp(x, low + half, high - half);
        let height = y;
        while (placed.some((o) => Math.abs(o.middle - middle) < o.half + half && Math.abs(o.height - height) < 15))
          height -= 3;
        placed.push({ middle, half, height });
        svg.append(draw("text", { class: "name", x: middle, y: height, "text-anchor": "middle" }, name));
      }
    }

    function point(fraction) {
      at = clamp(fraction, 0, 1);
      const px = left + at * inner;
      cursor.setAttribute("x1", px);
      cursor.setAttribute("x2", px);
      cursor.setAttribute("visibility", "visible");
      tip.replaceChildren(make("div", {}, `${(100 * at).toFixed(0)} % of the step`));
      steps.forEach((step, i) => {
        if (step.live.length < 2) return;
        const bytes = step.live[Math.round(at * (step.live.length - 1))];
        const phase = step.phases.findLast(([, start]) => start <= at);
        tip.append(
          make("div", {}, key(i, steps.length), step.name, make("b", {}, size(bytes))),
          make("small", {}, phase ? phase[0] : ""),
        );
      });
      tip.hidden = false;
      tip.style.left = at < 0.5 ? `${px + 12}px` : "auto";
      tip.style.right = at < 0.5 ? "auto" : `${box.clientWidth - px + 12}px`;
    }

    function leave() {
      at = null;
      tip.hidden = true;
      cursor?.setAttribute("visibility", "hidden");
    }

    box.addEventListener("pointermove", (event) =>
      point((event.clientX - box.getBoundingClientRect().left - left) / inner),
    );
    box.addEventListener("pointerdown", (event) =>
      point((event.clientX - box.getBoundingClientRect().left - left) / inner),
    );
    box.addEventListener("pointerleave", leave);
    box.addEventListener("focusout", leave);
    box.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -0.01, ArrowRight: 0.01 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      point((at ?? 0) + by);
    });
    let painted = 0;
    new ResizeObserver(() => {
      if (box.clientWidth !== painted) paint();
      painted = box.clientWidth;
    }).observe(box);
    return make("div", {}, legend, box);
  }

  // ---- frontier ----------------------------------------------------------------------------------------------------

  /** Peak against compute: a round mark for exact gradients, a square one for local ones, a ring for what is chosen. */
  function showFrontier({ title, text, columns, axis, rows, points }) {
    const cost = columns.indexOf(axis);
    const section = byId("frontier");
    section.hidden = false;
    const box = make("div", { class: "chart" });
    const mark = (exact, x, y, chosen) => {
      const style = { fill: exact ? "var(--first)" : "var(--last)" };
      const shape = exact
        ? draw("circle", { cx: x, cy: y, r: 5, style })
        : draw("rect", { x: x - 4.5, y: y - 4.5, width: 9, height: 9, style });
      return chosen
        ? draw("g", {}, shape, draw("circle", { class: "ring", cx: x, cy: y, r: 9 }))
        : shape;
    };
    const sample = (exact, chosen) =>
      draw("svg", { class: "key mark", viewBox: "0 0 26 20", "aria-hidden": "true" }, mark(exact, 13, 10, chosen));
    const chosen = points.find((point) => point.chosen);
    const legend = make(
      "ul",
      { class: "legend" },
      make("li", {}, sample(true, false), "exact: backpropagation's gradients"),
      points.some((point) => !point.exact) ? make("li", {}, sample(false, false), "local modules, by their number") : null,
      chosen ? make("li", {}, sample(chosen.exact, true), "this plan") : null,
    );

    function paint() {
      const width = box.clientWidth,
        height = 340;
      if (width === 0) return;
      const marks = ticks(Math.max(...points.map((point) => point.peak)), 5);
      const end = marks.at(-1)[0],
        left = 12 + 7 * Math.max(...marks.map(([, mark]) => mark.length)),
        bottom = height - 44,
        top = 16;
      const computes = points.map((point) => point.compute);
      const low = Math.floor(Math.min(...computes) * 10 - 0.5) / 10,
        high = Math.ceil(Math.max(...computes) * 10 + 0.5) / 10;
      const x = (compute) => left + ((compute - low) / (high - low)) * (width - left - 24),
        y = (bytes) => bottom - (bytes / end) * (bottom - top);
      const svg = draw("svg", {
        height,
        viewBox: `0 0 ${width} ${height}`,
        role: "img",
        "aria-label": points.map((p, i) => `${p.name}: ${rows[i][2]} at ${axis} ${rows[i][cost]}`).join(". "),
      });
      for (const [bytes, mark] of marks) {
        svg.append(
          draw("line", { class: "grid", x1: left, x2: width - 24, y1: y(bytes), y2: y(bytes) }),
          draw("text", { x: left - 8, y: y(bytes) + 4, "text-anchor": "end" }, mark),
        );
      }
      for (let tenth = Math.round(low * 10); tenth <= Math.round(high * 10); tenth++) {
        svg.append(draw("text", { x: x(tenth / 10), y: bottom + 16, "text-anchor": "middle" }, (tenth / 10).toFixed(1)));
      }
      svg.append(
        draw("text", { x: (left + width) / 2, y: bottom + 36, "text-anchor": "middle" }, `${axis} of a step, relative to backpropagation's`),
      );
      const taken = points.map((point) => [x(point.compute) - 6, x(point.compute) + 6, y(point.peak) + 4]);
      points.forEach((point, i) => {
        const at = mark(point.exact, x(point.compute), y(point.peak), point.chosen);
        at.append(draw("title", {}, `${point.name}: ${rows[i][2]}, ${axis} ${rows[i][cost]}`));
        svg.append(at);
        const name = point.peer ? point.name : point.exact ? "" : `k=${point.k}`;
        if (!name) return;
        const wide = 6.9 * name.length;
        const free = ([start, height]) =>
          start > left && start + wide < width && !taken.some(
            ([from, to, other], j) => j !== i && start < to && start + wide > from && Math.abs(other - height) < 13,
          );
        const sides = [x(point.compute) + 12, x(point.compute) - 12 - wide];
        const places = [4, -10, 18].flatMap((down) => sides.map((side) => [side, y(point.peak) + down]));
        const place = places.find(free); // where there is none, its title says it
        if (place === undefined) return;
        const [start, height] = place;
        taken.push([start, start + wide, height]);
        const before = start < x(point.compute);
        svg.append(
          draw(
            "text",
            { class: "name", x: before ? start + wide : start, y: height, "text-anchor": before ? "end" : "start" },
            name,
          ),
        );
      });
      box.replaceChildren(svg);
    }
    let painted = 0;
    new ResizeObserver(() => {
      if (box.clientWidth !== painted) paint();
      painted = box.clientWidth;
    }).observe(box);
    const head = make("tr", {}, ...columns.map((name) => make("th", {}, name)));
    const lines = rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell))));
    section.append(
      make("h2", {}, title),
      make("p", { class: "hint" }, text),
      legend,
      box,
      make(
        "details",
        {},
        make("summary", {}, "The plot's figures"),
        make(
          "div",
          { class: "scroll" },
          make("table", { class: "facts-table" }, make("thead", {}, head), make("tbody", {}, ...lines)),
        ),
      ),
    );
  }

  // ---- selection ---------------------------------------------------------------------------------------------------

  // from, to: local modules, both included; current: the one whose details are shown
  let selection = null;
  const listeners = [];

  function select(from, to = from, current = from) {
    const last = data.modules.length - 1;
    if (!(from >= 0 && from <= to && to <= last)) return;
    change({ from, to, current: clamp(current, from, to) });
  }

  function change(next) {
    selection = next;
    const { from, to, current } = next ?? {};
    const hash = next && `#module-${from}${to > from ? `-${to}` : ""}${current > from ? `/${current}` : ""}`;
    try {
      history.replaceState(null, "", hash ?? location.href.split("#")[0]);
    } catch {
      // a page in a sandboxed frame has no history: only the address misses the selection
    }
    listeners.forEach((listener) => listener());
  }

  function readHash() {
    const match = /^#module-(\d+)(?:-(\d+))?(?:\/(\d+))?$/.exec(location.hash);
    if (match) select(Number(match[1]), Number(match[2] ?? match[1]), Number(match[3] ?? match[1]));
  }

  /** The local modules that an element of a graph shows: module-3, aux-3, cache-3-op-7; module-13-46 of a group. */
  function idRange(id) {
    const match = /^(?:module|aux|cache)-(\d+)(?:-(\d+))?(?:-|$)/.exec(id);
    return match && [Number(match[1]), Number(match[2] ?? match[1])];
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && selection) change(null);
  });
  window.addEventListener("hashchange", readHash);

  // ---- graph -------------------------------------------------------------------------------------------------------

  let engine = null; // Graphviz, started once, when the first graph is drawn

  async function layOut(dot) {
    engine ??= Viz.instance();
    const result = (await engine).render(dot, { format: "svg", engine: "dot" });
    if (result.status !== "success") throw new Error(result.errors.map((error) => error.message).join("\n"));
    return result.output;
  }

  function showGraphs(graphs) {
    const drawn = new Map(); // number of the graph: its SVG element, its text, and where it was scrolled to
    const card = make("div", {
      class: "card",
      tabindex: 0,
      role: "group",
      "aria-label": "Graph; keys: plus, minus, arrows, 0 to fit",
    });
    const choice = make(
      "select",
      { id: "which", onchange: () => show(Number(choice.value)) },
      ...graphs.map(({ label }, i) => make("option", { value: i }, label)),
    );
    const button = (id, text, title, action) =>
      make("button", { id, type: "button", title, "aria-label": title, onclick: action }, text);
    const tools = [
      button("zoom-in", "+", "Zoom in", () => zoom(1.3)),
      button("zoom-out", "−", "Zoom out", () => zoom(1 / 1.3)),
      button("fit", "Fit width", "Fit to the width", () => fit()),
      button("fit-all", "Fit all", "Show the whole graph", () => fitAll()),
      button("download", "Download SVG", "Download this graph as SVG", () => download()),
    ];
    byId("graph").append(
      make("h2", {}, "Graph"),
      make("p", { class: "hint" }, "Click a node for its local module. Wheel zooms, drag moves, double click fits."),
      make("div", { class: "toolbar" }, make("label", {}, "Show ", choice), ...tools),
      card,
    );
    let view = null,
      shown = -1;

    async function show(which) {
      shown = which;
      view = null;
      tools.forEach((tool) => {
        tool.disabled = true;
      });
      if (!drawn.has(which)) {
        card.replaceChildren(make("p", {}, "Laying out the graph…"));
        await new Promise((done) => setTimeout(done, 30)); // let the browser paint that first
        try {
          drawn.set(which, prepare(await layOut(graphs[which].dot)));
        } catch (error) {
          if (shown === which) {
            card.replaceChildren(
              make("p", { class: "error" }, `This graph could not be drawn.\n${error.message ?? error}`),
            );
          }
          return;
        }
      }
      if (shown !== which) return; // another was chosen meanwhile
      view = drawn.get(which);
      card.replaceChildren(view.svg);
      tools.forEach((tool) => {
        tool.disabled = false;
      });
      if (!view.scale || view.fitted) place(view.fitted ?? widthScale);
      highlight();
      reveal();
    }

    /** Graphviz's SVG as an element that fills the card and moves its content by one transform. */
    function prepare(text) {
      const svg = document.importNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement, true);
      const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
      const content = draw("g", { class: "view" }, ...svg.childNodes);
      ["width", "height", "viewBox"].forEach((name) => svg.removeAttribute(name));
      svg.append(content);
      svg
        .querySelectorAll("g.node > title, g.edge > title, g.cluster > title, g.graph > title")
        .forEach((title) => title.remove());
      svg
        .querySelectorAll("a")
        .forEach((link) => ["href", "xlink:href", "target"].forEach((name) => link.removeAttribute(name)));
      for (const element of svg.querySelectorAll("g[id]")) {
        const range = idRange(element.id);
        if (range) fill(element, { "data-from": range[0], "data-to": range[1] }, []);
      }
      return { svg, content, text, width, height, x: 0, y: 0, scale: 0, fitted: null };
    }

    function highlight() {
      for (const element of card.querySelectorAll("[data-from]")) {
        const { from, to } = element.dataset;
        element.classList.toggle(
          "selected",
          selection !== null && Number(from) <= selection.to && Number(to) >= selection.from,
        );
      }
    }

    /** Move the graph where none of what is selected can be seen. */
    function reveal() {
      const boxes = [...card.querySelectorAll(".selected")].map((element) => element.getBoundingClientRect());
      const frame = card.getBoundingClientRect();
      const across = (box) => box.right > frame.left + 20 && box.left < frame.right - 20;
      const down = (box) => box.bottom > frame.top + 20 && box.top < frame.bottom - 20;
      if (!view || !boxes.length || boxes.some((box) => across(box) && down(box))) return;
      const [box] = boxes;
      move(
        view.x + (across(box) ? 0 : (frame.left + frame.right - box.left - box.right) / 2),
        view.y + (down(box) ? 0 : (frame.top + frame.bottom - box.top - box.bottom) / 2),
        view.scale,
      );
    }

    function move(x, y, scale) {
      Object.assign(view, { x, y, scale, fitted: null });
      view.content.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)}) scale(${scale.toFixed(4)})`);
    }

    const widthScale = () => Math.min((card.clientWidth - 24) / view.width, 1.6);
    const wholeScale = () => Math.min(widthScale(), (card.clientHeight - 24) / view.height);

    /** From the top, in the middle, until the reader moves it. */
    function place(scaleOf) {
      if (!view || !card.clientWidth) return;
      const scale = scaleOf();
      move(
        (card.clientWidth - scale * view.width) / 2,
        Math.max(12, (card.clientHeight - scale * view.height) / 2),
        scale,
      );
      view.fitted = scaleOf;
    }

    const fit = () => place(widthScale),
      fitAll = () => place(wholeScale);

    /** Zoom about a point of the card, by default its middle. False where it is as far as it goes. */
    function zoom(factor, x = card.clientWidth / 2, y = card.clientHeight / 2) {
      if (!view) return false;
      const scale = clamp(view.scale * factor, wholeScale() * 0.8, 8),
        by = scale / view.scale;
      if (Math.abs(by - 1) < 1e-6) return false;
      move(x - (x - view.x) * by, y - (y - view.y) * by, scale);
      return true;
    }

    function local(event) {
      const box = card.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    }

    card.addEventListener(
      "wheel",
      (event) => {
        const pixels = event.deltaY * (event.deltaMode === 1 ? 18 : event.deltaMode === 2 ? 300 : 1);
        // at the end of the zoom the page scrolls
        if (zoom(Math.exp(-clamp(pixels, -200, 200) / 400), ...local(event))) event.preventDefault();
      },
      { passive: false },
    );

    const pointers = new Map();
    let dragged = false;
    card.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      if (pointers.size === 0) dragged = false;
      pointers.set(event.pointerId, local(event));
    });
    card.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before || !view) return;
      const now = local(event);
      // A click is not a drag: the pointer is captured only once it has moved, so that the click still finds its node.
      if (!dragged && Math.hypot(now[0] - before[0], now[1] - before[1]) < 4) return;
      if (!dragged) card.setPointerCapture(event.pointerId);
      dragged = true;
      card.classList.add("dragged");
      const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
      move(view.x + (now[0] - before[0]) / pointers.size, view.y + (now[1] - before[1]) / pointers.size, view.scale);
      if (other) {
        const span = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
        zoom(span(now) / Math.max(span(before), 1), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      }
      pointers.set(event.pointerId, now);
    });
    for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
      card.addEventListener(name, (event) => {
        if (name === "pointerleave" && card.hasPointerCapture(event.pointerId)) return;
        pointers.delete(event.pointerId);
        if (pointers.size === 0) card.classList.remove("dragged");
      });
    }
    card.addEventListener("click", (event) => {
      if (dragged) return;
      const element = event.target.closest("[data-from]");
      if (element) select(Number(element.dataset.from), Number(element.dataset.to));
    });
    card.addEventListener("dblclick", fit);
    card.addEventListener("keydown", (event) => {
      const [dx, dy] = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[
        event.key
      ] ?? [0, 0];
      if (!view || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "+" || event.key === "=") zoom(1.3);
      else if (event.key === "-") zoom(1 / 1.3);
      else if (event.key === "0") fit();
      else if (dx || dy) move(view.x + dx, view.y + dy, view.scale);
      else return;
      event.preventDefault();
    });

    function download() {
      const url = URL.createObjectURL(new Blob([view.text], { type: "image/svg+xml" }));
      const name = `${data.title} ${graphs[shown].label}`.toLowerCase().replace(/[^a-z0-9.]+/g, "-");
      make("a", { href: url, download: `${name}.svg` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    }

    // A new width of the card: fit again, or keep in the middle what the reader had there.
    let width = 0;
    new ResizeObserver(() => {
      if (!card.clientWidth || card.clientWidth === width) return;
      if (view?.fitted || !view?.scale) place(view?.fitted ?? widthScale);
      else move(view.x + (card.clientWidth - width) / 2, view.y, view.scale);
      width = card.clientWidth;
    }).observe(card);
    // on paper the whole graph, as wide as the page
    window.addEventListener("beforeprint", () => {
      if (!view) return;
      view.svg.setAttribute("viewBox", `0 0 ${view.width} ${view.height}`);
      view.content.removeAttribute("transform");
    });
    window.addEventListener("afterprint", () => {
      if (!view) return;
      view.svg.removeAttribute("viewBox");
      if (view.fitted) place(view.fitted);
      else move(view.x, view.y, view.scale);
    });

    listeners.push(highlight, reveal);
    show(0);
  }

  // ---- details -----------------------------------------------------------------------------------------------------

  function showDetails() {
    const panel = byId("details");
    panel.classList.toggle("open", selection !== null);
    document.body.classList.toggle("selected", selection !== null);
    if (!selection) {
      panel.replaceChildren(
        make("h2", {}, "Local module"),
        make(
          "p",
          { class: "hint" },
          "Select a local module in the graph or in the table to see its figures and its generated code. " +
            "Escape clears the selection.",
        ),
      );
      return;
    }
    const { from, to, current } = selection;
    const module = data.modules[current];
    const step = (by, text, title) =>
      make(
        "button",
        {
          type: "button",
          title,
          "aria-label": title,
          disabled: !data.modules[current + by],
          onclick: () => select(...reach(current + by)),
        },
        text,
      );
    const parts = [
      make(
        "div",
        { class: "toolbar" },
        step(-1, "‹ previous", "Previous local module"),
        step(1, "next ›", "Next local module"),
        make("span", { style: { "margin-left": "auto" } }),
        make(
          "button",
          { type: "button", id: "wider", title: "More or less room for the code", onclick: widen },
          byId("columns").classList.contains("wide") ? "narrower" : "wider",
        ),
        make(
          "button",
          { type: "button", id: "close", title: "Clear the selection (Escape)", onclick: () => change(null) },
          "close",
        ),
      ),
    ];
    if (to > from) {
      parts.push(
        make("p", { class: "hint" }, `${to - from + 1} local modules that are drawn as one:`),
        make(
          "div",
          { class: "choices" },
          ...data.modules
            .slice(from, to + 1)
            .map(({ index, name }) =>
              make(
                "button",
                {
                  type: "button",
                  title: name,
                  "aria-pressed": String(index === current),
                  onclick: () => select(from, to, index),
                },
                `${index} ${name.split(".").slice(-2).join(".")}`,
              ),
            ),
        ),
      );
    }
    parts.push(
      make("h2", {}, swatch(module.colour), make("span", {}, ...breakable(`${module.index}  ${module.name}`))),
    );
    parts.push(make("dl", {}, ...module.facts.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)])));
    if (module.code) parts.push(code("Code of the local module", module.code));
    if (module.aux_code) parts.push(code("Code of its auxiliary network", module.aux_code));
    panel.replaceChildren(...parts);
    panel.scrollTop = 0;
  }

  function widen(event) {
    event.target.textContent = byId("columns").classList.toggle("wide") ? "narrower" : "wider";
  }

  /** What a step to a neighbour selects: the same group as long as it is within. */
  function reach(index) {
    const { from, to } = selection;
    return to > from && index >= from && index <= to ? [from, to, index] : [index];
  }

  function code(title, text) {
    const pre = make("pre", { tabindex: 0 });
    for (const line of text.replace(/\n$/, "").split("\n")) {
      const mark = /(^|\s)#/.exec(line);
      const start = mark ? mark.index : line.length;
      pre.append(line.slice(0, start));
      if (mark) pre.append(make("span", { class: "comment" }, line.slice(start)));
      pre.append("\n");
    }
    return make("details", { open: true }, make("summary", {}, title), pre);
  }

  // ---- table -------------------------------------------------------------------------------------------------------

  function showTable({ columns, rows, totals }) {
    const most = Math.max(1, ...data.modules.map((module) => module.saved + module.aux_saved));
    const saved = columns.findIndex(({ name }) => name.startsWith("saved")); // the bars stand under these figures
    const plain = !data.modules.length; // of something else than local modules: nothing to select
    const wordy = columns.map((_, c) => rows.some((row) => (row[c] ?? "").length > 14 && c !== saved));
    const styleOf = (c) => (columns[c].align === "right" ? "right" : wordy[c] ? "text" : null);
    const line = (texts, cell) =>
      columns.map((_, c) => make(cell, { class: styleOf(c) }, ...breakable(texts[c] ?? "")));
    const body = make(
      "tbody",
      {},
      ...rows.map((row, i) => {
        const module = data.modules[i];
        const cells = line(row, "td");
        if (module) {
          cells[0].prepend(swatch(module.colour));
          cells[saved].append(
            make(
              "div",
              {
                class: "saved",
                title: `${size(module.saved)} of its own, ${size(module.aux_saved)} of its auxiliary network`,
              },
              make("span", { style: { width: `${(100 * module.saved) / most}%` } }),
              make("span", { style: { width: `${(100 * module.aux_saved) / most}%` } }),
            ),
          );
        }
        return make(
          "tr",
          plain ? {} : { id: `row-${i}`, tabindex: 0, onclick: () => select(i), onkeydown: (event) => press(event, i) },
          ...cells,
        );
      }),
    );
    byId("modules").append(
      make("h2", {}, plain ? "Methods" : "Local modules"),
      ...(plain ? [] : [legendOfBars()]),
      make(
        "div",
        { class: "scroll" },
        make(
          "table",
          {},
          make(
            "thead",
            {},
            make(
              "tr",
              {},
              ...line(
                columns.map(({ name }) => name),
                "th",
              ),
            ),
          ),
          body,
          totals?.length ? make("tfoot", {}, make("tr", {}, ...line(totals, "td"))) : null,
        ),
      ),
    );

    function legendOfBars() {
      return make(
        "ul",
        { class: "legend" },
        make("li", {}, "Bars, saved for backward:"),
        make("li", {}, swatch("var(--last)"), "by the module itself"),
        make("li", {}, swatch("var(--line-2)"), "by its auxiliary network"),
      );
    }

    function press(event, i) {
      const next = { ArrowUp: i - 1, ArrowDown: i + 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") select(i);
      else if (next !== undefined) body.children[next]?.focus();
      else return;
      event.preventDefault();
    }

    listeners.push(() =>
      [...body.children].forEach((row, i) => {
        const inside = selection !== null && i >= selection.from && i <= selection.to;
        row.classList.toggle("selected", inside);
        row.classList.toggle("current", inside && i === selection.current);
        if (inside && i === selection.current) row.setAttribute("aria-current", "true");
        else row.removeAttribute("aria-current");
      }),
    );
  }

  // ---- notes -------------------------------------------------------------------------------------------------------

  function showNotes() {
    const section = byId("notes");
    const list = (title, items) =>
      items.length &&
      section.append(make("h2", {}, title), make("ul", {}, ...items.map((item) => make("li", {}, item))));
    list("Notes", data.notes);
    list("How the model was captured", data.report);
    section.hidden = section.childElementCount === 0;
  }

  // what is closed on the screen is open on paper, but for tables of several pages
  window.addEventListener("beforeprint", () =>
    document.querySelectorAll("details").forEach((element) => {
      element.dataset.before = element.open;
      element.open ||= element.querySelectorAll("tr").length <= 20;
    }),
  );
  window.addEventListener("afterprint", () =>
    document.querySelectorAll("details").forEach((element) => {
      element.open = element.dataset.before === "true";
    }),
  );

  byId("columns").hidden = false;
  byId("columns").classList.toggle("plain", !data.modules.length);
  if (data.memory) showMemory(data.memory);
  if (data.frontier) showFrontier(data.frontier);
  if (data.modules.length) {
    listeners.push(showDetails);
    showDetails();
  } else byId("details").hidden = true;
  showTable(data.table);
  showNotes();
  if (data.graphs.length) showGraphs(data.graphs);
  else byId("graph").hidden = true;
  readHash();
})();
