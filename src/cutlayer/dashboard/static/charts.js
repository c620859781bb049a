// Two small drawings in SVG. They say nothing that the tables do not say.

const WIDTH = 480, HEIGHT = 150, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;
const COLOURS = 6;

export function make(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// points: [{x, y, isRetried}]
export function columns(svg, points, label) {
  const top = Math.max(...points.map((p) => p.y), 1e-9);
  const step = (WIDTH - LEFT - RIGHT) / points.length;
  const nodes = frame(points[0].x, points.at(-1).x, 0, top);
  points.forEach((p, index) => {
    const height = Math.max(1, (p.y / top) * (HEIGHT - TOP - BOTTOM));
    nodes.push(make("rect", {
      class: p.isRetried ? "column retried" : "column",
      x: LEFT + index * step + Math.min(1, step / 6), width: Math.max(0.7, Math.min(26, step - Math.min(2, step / 3))),
      y: HEIGHT - BOTTOM - height, height,
    }));
  });
  show(svg, nodes, label);
}

// series: Map of name -> [{x, y}], ascending by x
export function lines(svg, series, label) {
  const points = [...series.values()].flat();
  const xs = points.map((p) => p.x), ys = points.map((p) => p.y);
  const [minX, maxX, minY, maxY] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const nodes = frame(minX, maxX, minY, maxY);
  [...series.values()].forEach((line, index) => {
    const places = line.map((p) => [
      LEFT + (maxX > minX ? (p.x - minX) / (maxX - minX) : 0.5) * (WIDTH - LEFT - RIGHT),
      HEIGHT - BOTTOM - (maxY > minY ? (p.y - minY) / (maxY - minY) : 0.5) * (HEIGHT - TOP - BOTTOM),
    ]);
    nodes.push(make("polyline", { class: "series", points: places.map((p) => p.join(",")).join(" "), ...stroke(index) }));
    if (places.length < 40) for (const [cx, cy] of places) nodes.push(make("circle", { class: `point series-${index % COLOURS}`, cx, cy, r: 2.6 }));
  });
  show(svg, nodes, label);
}

export function swatch(index) {
  const svg = make("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" });
  svg.append(make("rect", { class: `series-${index % COLOURS}`, width: 12, height: 12, rx: 3 }));
  return svg;
}

// One colour more often than once: the lines then differ by their dashes.
function stroke(index) {
  const dashes = ["none", "6 3", "2 3"][Math.floor(index / COLOURS) % 3];
  return { class: `series series-${index % COLOURS}`, "stroke-dasharray": dashes };
}

function frame(minX, maxX, minY, maxY) {
  const base = HEIGHT - BOTTOM;
  return [
    make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: base, y2: base }),
    make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: TOP, y2: TOP }),
    make("text", { x: LEFT - 6, y: TOP + 4, "text-anchor": "end" }, short(maxY)),
    make("text", { x: LEFT - 6, y: base + 3, "text-anchor": "end" }, short(minY)),
    make("text", { x: LEFT, y: HEIGHT - 5 }, `round ${minX}`),
    make("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, maxX > minX ? `round ${maxX}` : ""),
  ];
}

function show(svg, nodes, label) {
  svg.setAttribute("aria-label", label);
  svg.replaceChildren(...nodes);
}

function short(value) {
  return Math.abs(value) >= 1e4 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}
