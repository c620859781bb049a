// A conversation over this endpoint's own /v1/chat/completions, and its state every second.
// Whatever comes from the model is set as text only; the page's policy forbids markup from texts.

const REFRESH_MS = 1000;
const byId = (id) => document.getElementById(id);
const state = { model: "", messages: [], stopper: null };

async function refresh() {
  try {
    const answer = await fetch("status", { signal: AbortSignal.timeout(10_000) });
    if (answer.status === 401) return location.reload();
    if (!answer.ok) throw new Error(await complaint(answer));
    draw(await answer.json());
    tell("state", "");
  } catch (error) {
    tell("state", `No fresh state from the endpoint: ${error.message}`);
  }
  setTimeout(refresh, REFRESH_MS);
}

function draw(now) {
  state.model = now.model;
  document.title = `${now.model} · cutlayer chat`;
  setText(byId("model"), now.model);
  setText(byId("guarantee"), now.guarantee);
  byId("guarantee").classList.toggle("bad", now.guarantee.startsWith("no "));
  byId("logout").hidden = !now.has_token;
  byId("send").disabled = !now.has_chat_template || state.stopper !== null;
  if (!now.has_chat_template) tell("template", "This model has no chat template: it continues texts (/v1/completions) and does not chat.");
  const trips = now.num_round_trips, saved = now.num_round_trips_saved;
  const numbers = [
    ["tokens per second", now.tokens_per_s.toFixed(1), `${count(now.num_tokens)} in all`],
    ["replies", count(now.num_replies), `${count(now.num_waiting)} wait for room`],
    ["round trips", count(trips), "to the trunk server"],
    ["round trips saved", count(saved), trips + saved ? `${Math.round((100 * saved) / (trips + saved))} % of all` : ""],
    ["bytes sent", bytes(now.bytes_up), "vectors, never text"],
    ["bytes received", bytes(now.bytes_down), ""],
    ["vectors released", count(now.num_vectors_released), "in this run, guesses included"],
    ["vectors replayed", count(now.num_vectors_replayed), `${count(now.num_sessions_replayed)} sessions lost`],
  ];
  const list = byId("numbers");
  numbers.forEach(([name, value, more], index) => {
    const card = list.children[index] ?? addCard(list, name);
    setText(card.children[1].firstChild, value);
    setText(card.children[1].lastChild, more);
  });
  setText(byId("footer"), `context of ${count(now.context_length)} tokens · up ${Math.floor(now.uptime_s / 60)} min · API at ${location.origin}/v1`);
}

function addCard(list, name) {
  const card = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
  dt.textContent = name;
  dd.append(document.createElement("span"), " ", document.createElement("small"));
  card.append(dt, dd);
  list.append(card);
  return card;
}

async function send(text) {
  const asked = [...state.messages, { role: "user", content: text }];
  addTurn("user", text);
  const turn = addTurn("assistant", "");
  state.stopper = new AbortController();
  waiting(true);
  tell("reply", "");
  try {
    await readReply(asked, turn, state.stopper.signal);
  } catch (error) {
    if (error.name === "AbortError") return note(turn, "stopped");
    turn.item.classList.add("failed");
    note(turn, "no reply");
    tell("reply", error.message);
  } finally {
    // What was said stays in the conversation, also where it was cut short.
    if (turn.text) state.messages = [...asked, { role: "assistant", content: turn.text }];
    state.stopper = null;
    waiting(false);
  }
}

async function readReply(messages, turn, signal) {
  const began = performance.now();
  const answer = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model: state.model, messages, stream: true, stream_options: { include_usage: true }, ...choices() }),
    signal,
  });
  if (!answer.ok) throw new Error(await complaint(answer));
  let usage = null, reason = "";
  for await (const event of events(answer.body)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      if (choice.delta.content) grow(turn, choice.delta.content);
      reason = choice.finish_reason ?? reason;
    }
    usage = event.usage ?? usage;
  }
  if (!usage) throw new Error("the reply broke off");
  const seconds = (performance.now() - began) / 1000;
  const cached = usage.prompt_tokens_details.cached_tokens;
  note(turn, `${count(usage.completion_tokens)} tokens, ${(usage.completion_tokens / seconds).toFixed(1)} per second` +
    (cached ? `, ${count(cached)} of ${count(usage.prompt_tokens)} prompt tokens were cached` : "") +
    (reason === "length" ? ", cut at the length" : ""));
}

async function* events(body) {
  let rest = "";
  for await (const text of body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function choices() {
  const chosen = {};
  if (byId("temperature").value !== "") chosen.temperature = Number(byId("temperature").value);
  if (byId("length").value !== "") chosen.max_tokens = Number(byId("length").value);
  return chosen;
}

function addTurn(role, text) {
  const item = document.createElement("li"), words = document.createElement("p"), small = document.createElement("small");
  item.className = role;
  words.textContent = text;
  item.append(words, small);
  byId("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return { item, words, small, text };
}

function grow(turn, text) {
  turn.text += text;
  turn.words.append(text);
  byId("ask").scrollIntoView({ block: "end" });
}

function note(turn, text) {
  turn.small.textContent = text;
}

function waiting(is) {
  byId("stop").hidden = !is;
  byId("send").disabled = is;
  byId("fresh").disabled = is;
}

async function complaint(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.trim() || `status ${answer.status}`;
  }
}

const problems = new Map();

function tell(kind, text) {
  problems.set(kind, text);
  const all = [...problems.values()].filter(Boolean).join(" ");
  setText(byId("problem"), all);
  byId("problem").hidden = !all;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const count = (value) => value.toLocaleString("en");

function bytes(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000 || unit === "GB") return `${unit === "B" ? value : value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
}

function submit(event) {
  event?.preventDefault();
  const text = byId("text").value.trim();
  if (!text || state.stopper !== null || byId("send").disabled) return;
  byId("text").value = "";
  send(text);
}

byId("ask").addEventListener("submit", submit);
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
byId("stop").addEventListener("click", () => state.stopper?.abort());
byId("fresh").addEventListener("click", () => {
  state.messages = [];
  byId("turns").replaceChildren();
  tell("reply", "");
  byId("text").focus();
});
byId("text").focus();
refresh();
