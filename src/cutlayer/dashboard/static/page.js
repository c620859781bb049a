// Asks for the server's state every two seconds and shows it. Whatever comes from a peer is set as
// text only; the page's policy forbids markup from texts.

import { columns, lines, swatch } from "./charts.js";
import { ago, bytes, clock, count, duration, number } from "./format.js";

const REFRESH_MS = 2000;
const byId = (id) => document.getElementById(id);
const shown = new Map(); // section -> what it was drawn from

async function refresh() {
  try {
    const answer = await fetch("api/state", { signal: AbortSignal.timeout(10_000) });
    if (answer.status === 401) return location.reload();
    if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`);
    draw(await answer.json());
    byId("problem").hidden = true;
  } catch (error) {
    byId("problem").textContent = `No fresh state from the server: ${error.message}`;
    byId("problem").hidden = false;
  }
  setTimeout(refresh, REFRESH_MS);
}

function draw({ server, rates }) {
  const federation = server.federation;
  document.title = federation ? `${federation.name} · cutlayer` : "cutlayer";
  setText(byId("title"), federation ? federation.name : "Trunk server");
  byId("phase").classList.toggle("bad", Boolean(federation?.stopped));
  badge(byId("ready"), server.is_ready ? "ready" : "not ready", server.is_ready ? "good" : "bad");
  drawNumbers(server, rates);
  drawFederation(federation);
  drawMembers(federation?.members ?? [], server.time_s);
  drawRounds(federation?.rounds ?? []);
  drawPublished(federation?.published ?? []);
  fill("replicas", server.replicas.map((r) => [
    r.name, mark(r.is_alive ? "alive" : "restarting", r.is_alive ? "good" : "bad"), count(r.num_restarts), r.members.join(", "),
  ]));
  fill("runs", server.runs.map((r) => [r.owner, r.run_id, count(r.step)]));
  byId("charts").hidden = byId("seconds-figure").hidden && byId("loss-figure").hidden;
  const proved = server.assurance === "none" ? "" : ` · attestation ${server.assurance}`;
  setText(byId("footer"), `${server.software}${proved} · up ${duration(Math.floor(server.uptime_s))} · state of ${clock(server.time_s)}`);
}

function drawNumbers(server, rates) {
  const totals = server.totals;
  const numbers = [
    ["tokens per second", count(rates.tokens_per_s), `${count(totals.tokens)} in all`],
    ["bytes up", bytes(totals.bytes_up), `${bytes(rates.bytes_up_per_s)}/s`],
    ["bytes down", bytes(totals.bytes_down), `${bytes(rates.bytes_down_per_s)}/s`],
    ["connections", count(server.num_connections), ""],
    ["training runs", count(server.runs.length), `${bytes(server.graph_bytes)} graphs`],
    ["sessions", count(server.num_sessions), `${bytes(server.cache_bytes)} cache`],
  ];
  const list = byId("numbers");
  numbers.forEach(([name, value, more], index) => {
    const card = list.children[index] ?? addCard(list, name);
    setText(card.children[1].firstChild, value);
    setText(card.children[1].lastChild, more);
  });
}

function addCard(list, name) {
  const card = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
  dt.textContent = name;
  dd.append(document.createElement("span"), " ", document.createElement("small"));
  card.append(dt, dd);
  list.append(card);
  return card;
}

function drawFederation(federation) {
  byId("federation").hidden = !federation;
  if (!federation) return;
  const aggregation = federation.hides_aggregate ? "secure aggregation, sum hidden from the server"
    : federation.is_secure ? "secure aggregation on" : "secure aggregation OFF: the server sees each update";
  setText(byId("rules"), `${federation.strategy} · ${aggregation}`);
  setText(byId("phase"), federation.is_finished ? `Finished after ${count(federation.num_rounds)} rounds`
    : federation.stopped ? `Stopped after round ${count(federation.round)}: ${federation.stopped}`
    : `Round ${count(federation.round)} of ${count(federation.num_rounds)}${federation.attempt > 1 ? `, attempt ${federation.attempt}` : ""}: ${federation.phase}`);
  const done = federation.is_finished || federation.stopped ? federation.round : Math.max(0, federation.round - 1);
  const bar = byId("bar");
  bar.setAttribute("aria-valuemax", federation.num_rounds);
  bar.setAttribute("aria-valuenow", done);
  bar.firstElementChild.style.width = `${(100 * done) / federation.num_rounds}%`;
  const waits = federation.waits_for;
  byId("waits").hidden = waits.length === 0;
  setText(byId("waits"), `Waiting for ${few(waits)}`);
}

function drawMembers(members, now) {
  fill("members", members.map((m) => [m.name, mark(m.status, m.status), count(m.num_rounds), count(m.num_missed), ago(m.last_seen_s, now)]));
}

function drawRounds(rounds) {
  fill("rounds", rounds.toReversed().map((r) => [
    count(r.round), duration(r.seconds), `${count(r.num_survivors)} of ${count(r.num_cohort)}`, count(r.num_attempts),
    r.total_weight ? count(r.total_weight) : "–", bytes(r.bytes_up), bytes(r.bytes_down), clock(r.ended_s), few(r.stragglers),
  ]));
  const timed = rounds.filter((r) => r.seconds !== null);
  byId("seconds-figure").hidden = timed.length === 0;
  if (timed.length && isNew("seconds", timed)) {
    const points = timed.map((r) => ({ x: r.round, y: r.seconds, isRetried: r.num_attempts > 1 }));
    columns(byId("seconds"), points, `Seconds per round, ${timed.length} rounds; the newest took ${duration(timed.at(-1).seconds)}`);
  }
}

function drawPublished(published) {
  fill("published", published.toReversed().map((p) => [p.member, p.name, count(p.round), number(p.value)]));
  const series = new Map();
  for (const p of published) {
    if (!p.name.includes("loss") || p.value === null) continue;
    const name = p.name === "loss" ? p.member : `${p.member}: ${p.name}`;
    if (!series.has(name)) series.set(name, []);
    series.get(name).push({ x: p.round, y: p.value });
  }
  byId("loss-figure").hidden = series.size === 0;
  if (series.size && isNew("loss", [...series])) {
    lines(byId("loss"), series, `Loss by round as published by ${few([...series.keys()])}`);
    byId("legend").replaceChildren(...[...series.keys()].map((name, index) => {
      const item = document.createElement("li");
      item.append(swatch(index), name);
      return item;
    }));
  }
}

// Cells change only where their content does: a selection or a screen reader's place stays.
function fill(id, rows) {
  byId(`${id}-section`).hidden = rows.length === 0;
  const table = byId(id), body = table.tBodies[0], heads = table.tHead.rows[0].cells;
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, index) => {
    const row = body.rows[index] ?? addRow(body, heads);
    cells.forEach((cell, place) => setCell(row.cells[place], cell));
  });
}

function addRow(body, heads) {
  const row = body.insertRow();
  for (const head of heads) row.insertCell().className = head.className;
  return row;
}

function setCell(node, cell) {
  if (typeof cell === "string") return setText(node, cell);
  if (!node.firstElementChild) node.append(document.createElement("span"));
  badge(node.firstElementChild, cell.text, cell.style);
}

const mark = (text, style) => ({ text, style });

function badge(node, text, style) {
  setText(node, text);
  node.className = `badge ${style}`;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function isNew(section, data) {
  const text = JSON.stringify(data);
  if (shown.get(section) === text) return false;
  shown.set(section, text);
  return true;
}

function few(names) {
  return names.length <= 8 ? names.join(", ") : `${names.slice(0, 8).join(", ")} and ${names.length - 8} more`;
}

refresh();
