"use strict";
// The status page: follows /events and shows what comes. Text only ever goes in as text, never as markup.

const $ = (id) => document.getElementById(id);
const TOKEN = "agent-shim-admin-token";
const SILENCE_MS = 10000;
const HOUR = 3600;
const QUARTER = 900;
const AGENTS_SHOWN = 10;
let now = Date.now() / 1000; // the shim's clock, of the snapshot on show
let level = null;
let percent = 100; // of the rollout
let frame = HOUR; // seconds that the timeline and the plots show
let names = new Map(); // names of agents by their id

// --- small things -------------------------------------------------------------------------------------------------

function el(tag, attributes, ...children) {
  const svg = tag === "svg" || tag === "rect" || tag === "title";
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

// Puts nodes into a place unless they look the same as what is there: focus and selection stay.
function put(place, ...nodes) {
  const fresh = el("div", {}, ...nodes);
  if (place.shown !== fresh.innerHTML) {
    place.shown = fresh.innerHTML;
    place.replaceChildren(...fresh.childNodes);
  }
}

function span(seconds) {
  const left = Math.max(0, Math.floor(seconds));
  if (left < 60) return `${left} s`;
  if (left < HOUR) return `${Math.floor(left / 60)} min`;
  const [big, small, size] = left < 86400 ? ["h", "min", HOUR] : ["d", "h", 86400];
  const rest = Math.floor((left % size) / (size === HOUR ? 60 : HOUR));
  return `${Math.floor(left / size)} ${big}${rest ? ` ${rest} ${small}` : ""}`;
}

const plural = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");
const day = (at) => new Date(at * 1000).toDateString();
const moment = (at) => (day(at) === day(now) ? clock(at) : new Date(at * 1000).toLocaleString("en-GB"));
const ago = (at) => (at === null ? "never" : el("time", { datetime: new Date(at * 1000).toISOString(), title: moment(at) }, `${span(now - at)} ago`));
const rough = (s) => (s < 10 ? Math.round(s * 10) / 10 : Math.round(s)) + " s";
const every = (s) => (s === null ? "" : s < 0.1 ? "many a second" : `every ${s < 120 ? rough(s) : span(s)}`);
const mark = (name, ...text) => el("span", { class: "mark", "data-level": name }, el("span", {}, ...text));
const chip = (name, text) => el("span", { class: "chip", "data-level": name }, text);
const id = (text) => el("span", { class: "id" }, text);
const under = (...text) => el("small", {}, ...text);
const copy = (text) => el("button", { type: "button", class: "copy", "data-copy": text, "aria-label": `Copy ${text}`, title: `Copy ${text}` });
const known = (ident) => [names.has(ident) ? el("strong", {}, names.get(ident)) : id(ident), names.has(ident) ? under(id(ident)) : null];

function latency(s) {
  if (s === null) return "–";
  return s < 0.001 ? "< 1 ms" : s < 1 ? `${Math.round(s * 1000)} ms` : rough(s);
}

function bytes(number) {
  return number < 1024 ? `${number} B` : number < 1048576 ? `${Math.round(number / 1024)} KiB` : `${(number / 1048576).toFixed(1)} MiB`;
}

// --- tables: rows are kept by key, cells are only touched when they change ----------------------------------------

function table(place, caption, columns, rows, key) {
  if (!rows.length) {
    place.replaceChildren();
    place.body = null;
    return;
  }
  if (!place.body) {
    const heads = columns.map(([name, , kind]) => el("th", { scope: "col", role: "columnheader", class: kind }, name));
    place.body = el("tbody", { role: "rowgroup" });
    place.rows = new Map();
    place.replaceChildren(
      el("table", { role: "table" },
        caption ? el("caption", {}, caption) : null,
        el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, heads)),
        place.body));
  }
  const seen = new Map();
  rows.forEach((data, index) => {
    const name = key(data);
    const row = place.rows.get(name) || el("tr", { role: "row" }, columns.map(([label, , kind], at) => at
      ? el("td", { role: "cell", "data-label": label, class: kind }, el("div"))
      : el("th", { role: "rowheader", scope: "row" }, el("div"))));
    columns.forEach(([, cell], at) => put(row.children[at].firstChild, ...[cell(data)].flat()));
    if (place.body.children[index] !== row) place.body.insertBefore(row, place.body.children[index] || null);
    seen.set(name, row);
  });
  while (place.body.children.length > rows.length) place.body.lastChild.remove();
  place.rows = seen;
}

// --- the sections -------------------------------------------------------------------------------------------------

// Where on this page a problem can be seen, by its code.
const PLACES = {
  link_down: ["timeline-title", "See when it was away"], link_connecting: ["timeline-title", "See when it was away"],
  agents_silent: ["agents-title", "See the agents"], agent_unknown: ["agents-title", "See the agents"],
  name_unknown: ["agents-title", "See the agents"], heartbeats_refused: ["agents-title", "See the agents"],
  heartbeats_unacknowledged: ["agents-title", "See the agents"], commands_not_fetched: ["commands-title", "See the commands"],
  commands_in_doubt: ["commands-title", "See the commands"], fallback_failing: ["agents-title", "See the agents by HTTP"],
  needs_no_shim: ["migration-title", "See the migration"],
};
const COMMAND = /agent-shim [a-z-]+(?: (?:--[a-z-]+|[A-Z]{2,}))*/;

// A hint with a button that copies the command in it, and a link to the part of the page that shows more.
function todoFor(row) {
  const command = COMMAND.exec(row.hint)?.[0];
  const [before, after] = command ? row.hint.split(command, 2) : [];
  const [place, words] = PLACES[row.code] || [];
  const parts = [command ? [before, el("code", {}, command), copy(command), after] : row.hint, place ? [" ", el("a", { href: `#${place}` }, words)] : null].flat();
  return parts.some(Boolean) ? el("span", { class: "hint" }, ...parts) : null;
}

function showOverall(status) {
  const { overall } = status;
  $("overall").dataset.level = overall.level;
  put($("sentence"), el("span", {}, overall.text));
  const rows = [...overall.problems, ...overall.notes];
  put($("problems"), ...rows.map((row, index) =>
    el("li", {}, index || !overall.problems.length ? el("span", {}, row.text) : null, todoFor(row))));
  const sign = { good: "✓", waiting: "…", warning: "!", bad: "✕" }[overall.level];
  document.title = `${sign} agent-shim`;
  if (level !== overall.level) $("announce").textContent = overall.text; // read aloud on a change, not each second
  level = overall.level;
}

// --- the objectives -----------------------------------------------------------------------------------------------

const OBJECTIVES = {
  connection_success: ["Connection success", "> 99 %", "attempt"],
  reconnection: ["Reconnection", "< 10 s for 95 %", "reconnect"],
  heartbeat_success: ["Heartbeat success", "> 99.9 %", "heartbeat"],
  message_latency: ["Message latency", "< 100 ms for 95 %", "message"],
};
const JUDGED = { met: ["good", "✓"], missed: ["bad", "✕"], unknown: ["waiting", "–"] };
const share = (part) => `${Math.floor(part * 10000) / 100} %`; // rounded down: what is missed by little is not 100 %

function measured(label, { state, measured: value, samples }, noun) {
  const [name, sign] = JUDGED[state];
  return el("div", { class: "window", "data-level": name },
    el("span", {}, label),
    el("strong", {}, value === null ? "– none yet" : `${sign} ${share(value)}`, value === null ? null : el("span", { class: "hidden" }, ` ${state}`)),
    el("span", {}, value === null ? "" : plural(samples, noun)));
}

function showObjectives(status) {
  put($("objectives"), ...status.objectives.map((objective) => {
    const [title, target, noun] = OBJECTIVES[objective.name];
    const { "1h": hour, "24h": whole } = objective.windows;
    // Until an hour has passed both windows are the same.
    const label = whole.observed_s >= 86400 ? "24 h" : `${(whole.observed_s / HOUR).toFixed(1)} h`;
    const rows = whole.observed_s < 1.1 * HOUR ? [[span(Math.min(whole.observed_s, HOUR)), whole]] : [["1 h", hour], [label, whole]];
    return el("div", {}, el("h3", {}, el("span", {}, title), el("span", {}, target)), rows.map(([label, window]) => measured(label, window, noun)));
  }));
}

// --- the figures --------------------------------------------------------------------------------------------------

function tile(name, value, below, state) {
  return el("div", { "data-level": state }, el("dt", {}, name), el("dd", {}, value), el("dd", {}, below));
}

const byHttp = (sessions) => Object.values(sessions.by_http).reduce((sum, number) => sum + number, 0);

const MODES = { websocket: "WebSocket", http: "HTTP", auto: "auto" };

// Who of the agents is in the rollout, in one line.
function inside({ percent, include, exclude, hash, inside, agents }) {
  if (percent >= 100 && !exclude.length) return "all agents";
  const place = hash === null ? "" : `, hash ${hash.toFixed(1)}`;
  const lists = include.length + exclude.length ? " and lists" : "";
  if (inside === null) return agents.total ? `${agents.inside} of ${agents.total} in the ${percent} %${lists}` : `${percent} % of agents${lists}`;
  return `${inside ? "in" : "outside"} the ${percent} %${lists}${place}`;
}

function modeTile(status) {
  const { mode, by_http, rollout } = status;
  const days = status.migration.sunset.days_left;
  const over = days !== null && days <= 0;
  const set = [mode === "websocket" ? "" : `mode ${mode}`, rollout.percent < 100 || rollout.exclude.length ? `rollout ${rollout.percent} %` : ""].filter(Boolean).join(", ");
  if (over && set) return tile("Mode and rollout", "WebSocket", `because sunset.at has passed; set: ${set}`, "good");
  const now = mode === "http" ? "all calls by the vendor's HTTP API" : mode === "auto" ? `${by_http ? "HTTP" : "WebSocket"} now, ${inside(rollout)}` : inside(rollout);
  return tile("Mode and rollout", MODES[mode], now, mode === "auto" && by_http ? "warning" : "good");
}

function showTiles(status) {
  const { links, sessions, commands, migration, replicas } = status;
  const first = links.items[0];
  const phase = { up: "connected", down: "away", refused: "token refused", idle: "at rest" };
  const queued = commands.waiting + commands.offered;
  const days = migration.sunset.days_left;
  const http = byHttp(sessions);
  const [calls, errors] = ["calls_per_s", "errors_per_s"].map((name) => plots.data?.[name]?.at(-1) ?? null);
  put($("tiles"),
    modeTile(status),
    tile("Controller",
      !first ? "no link" : links.total > 1 ? `${links.online} of ${links.total} links up` : phase[first.phase],
      first ? `for ${span(now - first.since)}` : "dialled at an agent's first call",
      first && (first.phase === "down" || first.phase === "refused") ? "bad" : "good"),
    tile("Agents", sessions.fresh || !http ? `${sessions.fresh} alive` : `${http} by HTTP`,
      [`of ${sessions.total}${http && sessions.fresh || sessions.silent ? "" : " known"}`, http && sessions.fresh ? `, ${http} by HTTP` : "", sessions.silent ? `, ${sessions.silent} silent` : ""].join(""),
      sessions.silent ? "warning" : "good"),
    tile("Agents' calls", calls === null ? "–" : `${calls < 10 ? calls.toFixed(1) : Math.round(calls)} / s`,
      errors === null ? "" : errors ? `${errors < 10 ? errors.toFixed(1) : Math.round(errors)} errors / s` : "no errors", errors ? "warning" : "good"),
    tile("Commands waiting", queued.toLocaleString("en"),
      [plural(commands.results, "result") + " to report", commands.uncertain ? `, ${commands.uncertain} in doubt` : ""].join(""),
      sessions.not_polling || commands.uncertain ? "warning" : "good"),
    tile("Legacy API ends", days === null ? "unknown" : days < 0 ? "over" : `in ${days < 2 ? span(days * 86400) : plural(Math.floor(days), "day")}`,
      days === null ? "set sunset.at" : new Date(migration.sunset.at * 1000).toLocaleDateString("en-GB", { dateStyle: "medium" }),
      days !== null && days < 7 ? "warning" : "good"),
    replicas ? tile(`Replica ${replicas.replica}`, `${replicas.owned.length} of ${replicas.shards} shards`,
      `${plural(replicas.replicas.length, "replica")} alive${replicas.unowned ? `, ${plural(replicas.unowned, "shard")} without an owner` : ""}`,
      replicas.unowned ? "warning" : "good") : null);
}

// The segments in the frame; `from` and `to` are seconds since its begin. A first dial that succeeds is no loss.
function segments(link) {
  const { timeline } = link;
  const parts = timeline.map((segment, index) => ({
    ...segment,
    from: Math.max(0, frame - (now - segment.since)),
    to: index + 1 < timeline.length ? frame - (now - timeline[index + 1].since) : frame,
  }));
  const starting = (part, index) => part.phase === "down" && part.to - part.from < 10 && !parts.slice(0, index).some((each) => each.phase === "up");
  return parts
    .map((part, index) => (starting(part, index) ? { ...part, phase: "idle" } : part))
    .filter((part) => part.to > 0)
    .map((part) => ({ ...part, lost: part.phase === "down" || part.phase === "refused" }));
}

function summaryOf(link) {
  const parts = segments(link);
  const length = (wanted) => parts.filter(wanted).reduce((sum, part) => sum + part.to - part.from, 0);
  const wanted = length((part) => part.phase !== "idle");
  const up = wanted ? (100 * length((part) => part.phase === "up")) / wanted : 0;
  return wanted
    ? `connected ${up > 99.995 ? "100" : up.toFixed(up < 99 ? 1 : 2)} % of the time it was needed, ${plural(parts.filter((part) => part.lost).length, "interruption")}`
    : "not needed";
}

function lane(link, several) {
  const summary = summaryOf(link);
  // Bad news is painted last, and never too narrow to be seen.
  const rects = [...segments(link)].sort((a, b) => a.lost - b.lost).map((part) => {
    const width = Math.max(part.to - part.from, part.lost ? frame / 360 : 0);
    return el("rect", { class: part.phase, x: Math.min(part.from, frame - width).toFixed(1), y: 0, width: width.toFixed(1), height: 22 },
      el("title", {}, `${part.phase} from ${clock(part.since)} for ${span(part.to - part.from)}${part.reason ? `: ${part.reason}` : ""}`));
  });
  return el("div", { class: "lane" },
    several ? el("p", {}, id(link.name), el("span", { class: "muted" }, summary)) : null,
    el("svg", { viewBox: `0 0 ${frame} 22`, preserveAspectRatio: "none", role: "img", "aria-label": summary }, rects));
}

function losses(links) {
  const found = links.flatMap((link) => segments(link).filter((part) => part.lost));
  found.sort((a, b) => b.since - a.since);
  return found.slice(0, 20).map((part) =>
    el("li", {}, `${clock(part.since)} · ${part.to >= frame ? "until now" : `for ${span(part.to - part.from)}`} · ${part.phase === "refused" ? "token refused" : part.reason || "first dial"}`));
}

const LANES_SHOWN = 4;

function showTimeline(status) {
  const { items, total } = status.links;
  const open = $("timeline").querySelector("details")?.open;
  const list = losses(items);
  const marks = frame === HOUR ? ["60 min ago", "45", "30", "15", "now"] : ["15 min ago", "10", "5", "now"];
  const shown = items.slice(0, LANES_SHOWN);
  put($("timeline-summary"), `${frame === HOUR ? "last hour" : "last 15 minutes"}${items.length && total === 1 ? `: ${summaryOf(items[0])}` : ""}`);
  put($("timeline"),
    items.length ? null : el("p", { class: "empty" }, "No link yet: it is dialled at an agent's first call."),
    shown.map((link) => lane(link, total > 1)),
    items.length ? el("div", { class: "axis", "aria-hidden": "true" }, marks.map((text) => el("span", {}, text))) : null,
    items.length ? el("div", { class: "below" },
      total > shown.length ? el("span", {}, `${plural(total - shown.length, "more link")}, ${status.links.online} of all ${total} up`) : null,
      list.length ? el("details", { open }, el("summary", {}, "When it was away"), el("ul", {}, list)) : null) : null);
}

// How an agent's last call to the vendor's HTTP API ended, and why it went there.
function httpReport({ http: { why, hash, status, reason } }) {
  const whys = { mode: "mode http", rollout: `outside ${percent} %, hash ${hash.toFixed(1)}`, link_down: "the link is down" };
  return [String(status || reason || "no answer"), under(whys[why])];
}

function alive(session) {
  if (session.http) return [mark(session.http.served ? "good" : "bad", "by HTTP"), under(ago(session.http.at))];
  const trouble = { name_unknown: "unknown to the controller", unknown: "unknown to the controller", heartbeats_refused: "refused by the controller" }[session.trouble];
  if (session.fresh) return [trouble ? mark("bad", trouble) : mark("good", "alive"), under(ago(session.seen_at))];
  const since = session.stale_since;
  return [mark(session.silent ? "warning" : "waiting", session.superseded ? "replaced" : "silent"),
    under(since === null ? "never seen" : `for ${span(now - since)}`)];
}

function held(hold) {
  if (!hold.learnt) return "as configured";
  if (hold.limit_s >= hold.max_s) return "the most there is";
  return hold.ceiling_s === null ? "still learning" : `its client allows ${rough(hold.ceiling_s)}`;
}

// For how long polls are held, with the reason and their interval as a tooltip.
function holding({ hold, poll_at, polling_now }) {
  if (poll_at === null && !polling_now && !hold.ceiling_s) return null;
  const interval = hold.interval_s ? `; polls ${hold.pace === "pause" ? `${rough(hold.interval_s)} after each` : every(hold.interval_s)}` : "";
  return el("small", { title: held(hold) + interval }, hold.limit_s ? `up to ${rough(hold.limit_s)}` : "not held");
}

const AGENT_COLUMNS = [
  ["Agent", (s) => [s.name ? el("strong", { title: s.name }, s.name) : id(s.id), under(...(s.name ? [id(s.id), copy(s.id)] : [copy(s.id)]))]],
  ["Dialect", (s) => s.dialect || "–"],
  ["State", alive],
  ["Reports", (s) => s.http ? httpReport(s) : [s.status || "–", s.tunnel_status ? under(`tunnel ${s.tunnel_status}`) : ""]],
  ["Heartbeats", (s) => s.http ? "–" : [s.heartbeat_s === null ? (s.heartbeat_at === null ? "none" : "measuring") : every(s.heartbeat_s), s.heartbeat_at === null ? "" : under(ago(s.heartbeat_at))]],
  ["Polls", (s) => s.http ? "–" : [s.polling_now ? "held now" : s.poll_at === null ? "none" : ago(s.poll_at), holding(s)]],
  ["Queue", (s) => [
    s.queue.waiting + s.queue.offered ? `${s.queue.waiting} waiting${s.queue.offered ? `, ${s.queue.offered} offered` : ""}` : "empty",
    s.queue.not_polling ? under(chip("warning", "does not poll")) : s.queue.oldest_at !== null ? under("oldest ", ago(s.queue.oldest_at)) : ""]],
];

const choice = { text: "", all: false }; // what of the agents is shown
let latest = null;

const troubled = (s) => s.queue.not_polling || s.silent || s.trouble || (s.http && !s.http.served);
const stateOf = (s) => (s.http ? "by HTTP" : s.trouble ? "refused unknown" : s.fresh ? "alive" : "silent");

function showAgents(status) {
  const { sessions } = status;
  latest = status;
  const wanted = choice.text.toLowerCase();
  const matches = sessions.items.filter((s) => [s.name, s.id, s.agent_id, s.dialect, stateOf(s)].some((text) => text && text.toLowerCase().includes(wanted)));
  // Those in trouble first, then the newest. The order of agents that stay as they are does not change.
  matches.sort((a, b) => Boolean(troubled(b)) - Boolean(troubled(a)) || (b.first_call_at || 0) - (a.first_call_at || 0));
  const shown = choice.all ? matches : matches.slice(0, AGENTS_SHOWN);
  $("agents-tools").hidden = sessions.items.length <= AGENTS_SHOWN && !wanted;
  $("agents-all").textContent = choice.all ? `Show ${AGENTS_SHOWN}` : `Show all ${matches.length}`;
  $("agents-all").hidden = matches.length <= AGENTS_SHOWN;
  $("agents-all").setAttribute("aria-pressed", String(choice.all));
  put($("agents-count"), shown.length < sessions.total ? `${shown.length} of ${sessions.total}: those in trouble, then the newest` : `${sessions.total} known`);
  if (!shown.length) {
    put($("agents"), el("p", { class: "empty" }, sessions.items.length ? "No agent matches." : "None is known yet."));
    $("agents").body = null;
    return;
  }
  $("agents").shown = null;
  table($("agents"), "", AGENT_COLUMNS, shown, (s) => `${s.owner}/${s.kind}/${s.id}`);
}

$("filter").addEventListener("input", (event) => {
  choice.text = event.target.value.trim();
  if (latest) showAgents(latest);
});
$("agents-tools").addEventListener("submit", (event) => event.preventDefault());
$("agents-all").addEventListener("click", () => {
  choice.all = !choice.all;
  if (latest) showAgents(latest);
});

const STATES = {
  queued: ["waiting", "waiting"], offered: ["waiting", "offered"], uncertain: ["warning", "in doubt"], delivered: ["good", "delivered"],
  answered: ["good", "answered"], closed: ["good", "done"], expired: ["bad", "expired"], dead: ["bad", "given up"],
};
const EVENTS = {
  arrived: ["waiting", "arrived"], offered: ["waiting", "offered to the agent"], delivered: ["good", "the agent has it"],
  result: ["good", "the agent answered"], closed: ["good", "the controller has the result"], uncertain: ["warning", "in doubt"],
  requeued: ["warning", "waits again"], reported: ["bad", "failure reported to the controller"], dead: ["bad", "given up"],
  expired: ["bad", "expired"], redeliver: ["warning", "queued again by hand"],
};
const eventOf = (name) => EVENTS[name] || ["waiting", name];
const linkTo = (command) => el("a", { href: `#command=${encodeURIComponent(command)}`, class: "id" }, command);

const WAITING_COLUMNS = [
  ["Command", (c) => linkTo(c.id)],
  ["Type", (c) => c.type],
  ["Agent", (c) => known(c.session)],
  ["State", (c) => [chip(...STATES[c.state]), c.reason ? under(c.reason) : ""]],
  ["Since", (c) => ago(c.since)],
  ["Offers", (c) => String(c.attempts), "number"],
];
const RECENT_COLUMNS = [
  ["Command", (c) => linkTo(c.id)],
  ["Type", (c) => c.type || ""],
  ["Agent", (c) => known(c.session)],
  ["Newest step", (c) => [mark(...eventOf(c.event)), c.detail && c.event !== "arrived" ? under(c.detail) : ""]],
  ["When", (c) => ago(c.at)],
];

const WAITING_SHOWN = 3;
const RECENT_SHOWN = 3;

function showCommands(status) {
  const { commands } = status;
  const { latency: times } = commands;
  put($("latency-summary"), times.commands ? `half in ${latency(times.p50_s)}, 95 % in ${latency(times.p95_s)}` : "");
  const queued = commands.waiting + commands.offered;
  const waiting = commands.items.slice(0, WAITING_SHOWN);
  put($("commands-count"), queued ? `${queued.toLocaleString("en")} here, ${bytes(commands.bytes)}${queued > waiting.length ? `; the oldest ${waiting.length} shown` : ""}` : "");
  table($("waiting"), "Waiting for their agents, the oldest first", WAITING_COLUMNS, waiting, (c) => `${c.session}/${c.id}`);
  $("no-commands").hidden = commands.items.length + commands.recent.length > 0;
  table($("recent"), "The latest", RECENT_COLUMNS, commands.recent.slice(0, waiting.length ? RECENT_SHOWN : RECENT_SHOWN + WAITING_SHOWN), (c) => `${c.session}/${c.id}`);
}

// --- events: names and fields as in the log ------------------------------------------------------------------------

const LEVELS = { info: "good", warning: "warning", error: "bad", critical: "bad" };
const EVENTS_SHOWN = 5;

// The name of the agent is shown beside its id.
const named = (detail) => detail.replace(/\bsession ([^,]+)/, (found, ident) => (names.has(ident) ? `${found} (${names.get(ident)})` : found));

function eventLine(event) {
  return el("li", {},
    el("time", { datetime: new Date(event.at * 1000).toISOString(), title: moment(event.at) }, day(event.at) === day(now) ? clock(event.at) : new Date(event.at * 1000).toLocaleDateString("en-GB", { day: "numeric", month: "short" })),
    el("span", {}, mark(LEVELS[event.level] || "waiting", event.event.replaceAll("_", " ")), event.detail ? under(named(event.detail)) : null));
}

function showEvents(status) {
  const { events } = status;
  put($("events"), ...(events.length ? events.slice(0, EVENTS_SHOWN).map(eventLine) : [el("li", {}, el("span", { class: "empty" }, "None yet."))]));
  $("older").hidden = events.length <= EVENTS_SHOWN;
  put($("events-older"), ...events.slice(EVENTS_SHOWN).map(eventLine));
}

const ROUTE_COLUMNS = [
  ["Route", (r) => el("code", {}, `${r.method} ${r.path}`)],
  ["Dialect", (r) => r.dialect],
  ["Agents", (r) => r.agents.toLocaleString("en"), "number"],
  ["Calls", (r) => r.calls.toLocaleString("en"), "number"],
  ["Last", (r) => ago(r.last)],
];
const USER_COLUMNS = [
  ["Agent", (a) => [a.name ? el("strong", {}, a.name) : id(a.id), a.name ? under(id(a.id)) : ""]],
  ["Calls", (a) => a.routes.length
    ? el("ul", { class: "inline" }, a.routes.map((r) => el("li", {}, `${r.operation.replace("_", " ")} `, el("span", { class: "muted" }, `${r.calls.toLocaleString("en")}${r.every_s === null ? "" : `, ${every(r.every_s)}`}`))))
    : el("span", { class: "muted" }, "none since the start")],
  ["Last call", (a) => ago(a.last)],
];

function showMigration(status) {
  const { sunset, removable, reasons, routes, agents, counted_since } = status.migration;
  put($("sunset"), sunset.at === null ? "no sunset date is configured" : `legacy API ends ${new Date(sunset.at * 1000).toLocaleDateString("en-GB", { dateStyle: "long" })}`);
  put($("removable"), el("div", { class: "go" },
    removable ? chip("good", "The shim can be removed") : chip("waiting", "The shim is still needed"),
    el("ul", { class: "inline" }, removable ? el("li", {}, "no agent has called a deprecated route for 24 h, and nothing waits here") : reasons.map((reason) => el("li", {}, reason)))));
  $("usage").hidden = !routes.length && !agents.total;
  put($("usage-summary"), `${plural(routes.length, "deprecated route")} in use by ${plural(agents.total, "agent")}`);
  table($("routes"), `Deprecated routes in use since ${moment(counted_since)}`, ROUTE_COLUMNS, routes, (r) => `${r.dialect}/${r.operation}`);
  table($("users"), `Who uses them${agents.total > agents.items.length ? ` (${agents.items.length} of ${agents.total})` : ""}`, USER_COLUMNS, agents.items, (a) => `${a.kind}/${a.id}`);
}

function show(status) {
  now = status.now;
  percent = status.rollout_percent;
  const before = frame;
  frame = status.uptime_s < QUARTER ? QUARTER : HOUR;
  names = new Map(status.sessions.items.filter((s) => s.name).map((s) => [s.id, s.name]));
  $("status").hidden = false;
  $("login").hidden = true;
  put($("about"), `${status.version} · up ${span(status.uptime_s)}`);
  const url = status.agents_url;
  put($("facts"), `agents call ${url || "?"}`, url ? copy(url) : null, ` · controller ${status.upstream}${status.fallback ? ` · fallback ${status.fallback}` : ""}`);
  for (const part of [showOverall, showObjectives, showTiles, showTimeline, showAgents, showCommands, showEvents, showMigration]) part(status);
  if (before !== frame && plots.all.length) drawPlots();
}

// --- plots --------------------------------------------------------------------------------------------------------

const plots = { data: null, all: [] };
const plotHeight = () => (innerWidth < 761 ? 105 : 115);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A logarithmic scale has its lines at the powers of ten only.
function decades(unit, { grid, ticks }) {
  if (unit !== "ms") return {};
  const filter = (_, splits) => splits.map((value) => (Number.isInteger(Math.log10(value)) ? value : null));
  return { grid: { ...grid, filter }, ticks: { ...ticks, filter } };
}

function axes(unit) {
  const shared = { stroke: colour("--muted"), font: "12px system-ui, sans-serif", grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
  return [
    { ...shared, size: 26, values: (_, ticks) => ticks.map((at) => new Date(at * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" })) },
    { ...shared, ...decades(unit, shared), size: 58, values: (_, ticks) => ticks.map((value) => (value === null || (unit !== "/s" && !Number.isInteger(value)) ? "" : unit === "ms" ? latency(value / 1000) : value.toLocaleString("en"))) },
  ];
}

// From milliseconds to the half minute of an agent that polls rarely: only a logarithm shows both.
const TIMES = { distr: 3, log: 10, range: (_, low, high) => [1, Math.max(300, high * 1.6)] };
const RATES = { range: (_, low, high) => [0, Math.max(1, high * 1.15)] };
const NUMBERS = { range: (_, low, high) => [0, Math.max(4, high * 1.15)] };

function plot(place, unit, lines, y) {
  place.replaceChildren();
  // Without a cursor the key shows the newest value.
  const ms = (made, given, column, index) => {
    const value = index === null && made ? made.data[column].findLast((each) => each !== null) : given;
    return value === null || value === undefined ? "–" : unit === "ms" ? latency(value / 1000) : value.toLocaleString("en");
  };
  const series = lines.map(([label, name, more]) => ({
    label, stroke: colour(name), width: 2, value: ms, points: { show: unit === "ms", size: 5, fill: colour(name) }, ...more,
  }));
  const made = new uPlot({
    width: place.clientWidth, height: plotHeight(), cursor: { y: false, drag: { setScale: false } },
    scales: { x: { time: true, range: () => [plots.data.at.at(-1) - frame, plots.data.at.at(-1)] }, y },
    axes: axes(unit),
    series: [{ label: "", value: (_, at) => (at ? clock(at) : "latest") }, ...series],
  }, [[], ...lines.map(() => [])], place);
  place.append(el("p", { class: "empty", hidden: true }));
  return made;
}

function makePlots() {
  const soft = colour("--good-soft");
  const stepped = { paths: uPlot.paths.stepped({ align: 1 }) };
  plots.all = [
    plot($("latency"), "ms", [["95 % in", "--accent", {}], ["half in", "--good", {}]], TIMES),
    plot($("depth"), "", [["commands", "--accent", { ...stepped, fill: soft }], ["results", "--warning", stepped]], NUMBERS),
    plot($("calls"), "/s", [["calls", "--accent", stepped], ["errors", "--bad", stepped]], RATES),
  ];
  drawPlots();
}

function drawPlots() {
  const { at, waiting, offered, results, p50_s, p95_s, calls_per_s, errors_per_s } = plots.data;
  const ms = (column) => column.map((value) => (value === null ? null : Math.max(1, value * 1000)));
  const queued = waiting.map((number, index) => number + offered[index]);
  plots.all[0].setData([at, ms(p95_s), ms(p50_s)]);
  plots.all[1].setData([at, queued, results]);
  plots.all[2].setData([at, calls_per_s, errors_per_s]);
  const handed = p95_s.filter((value) => value !== null);
  const note = $("latency").querySelector(".empty");
  note.hidden = handed.length > 0;
  note.textContent = "No command was handed over in this time.";
  $("latency").setAttribute("aria-label", handed.length ? `the slowest 5 s had 95 % within ${latency(Math.max(...handed))}` : note.textContent);
  $("depth").setAttribute("aria-label", `now ${queued.at(-1)} commands and ${results.at(-1)} results, at most ${Math.max(...queued)} commands in the last hour`);
  $("calls").setAttribute("aria-label", `now ${calls_per_s.at(-1)} calls and ${errors_per_s.at(-1)} errors per second, at most ${Math.max(...calls_per_s)} calls`);
}

function addSamples(columns) {
  for (const [name, values] of Object.entries(columns)) plots.data[name] = [...plots.data[name], ...values].slice(-720);
  drawPlots();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.data && makePlots());
new ResizeObserver(() => plots.all.forEach((made) => {
  const width = made.root.parentElement.clientWidth;
  if (width && width !== made.width) made.setSize({ width, height: plotHeight() });
})).observe($("main"));

// --- one command --------------------------------------------------------------------------------------------------

function fact(name, value) {
  return value === null || value === "" ? null : el("div", {}, el("dt", {}, name), el("dd", {}, value));
}

function steps(trace) {
  return el("ol", { class: "steps" }, trace.map((step, index) => {
    const [state, words] = eventOf(step.event);
    const since = index ? step.at - trace[index - 1].at : null;
    return el("li", { "data-level": state },
      el("time", { datetime: new Date(step.at * 1000).toISOString() }, `${clock(step.at)}.${String(Math.floor((step.at % 1) * 1000)).padStart(3, "0")}`),
      el("span", { class: "delta" }, since === null ? "" : `+ ${since < 60 ? latency(Math.max(since, 0)) : span(since)}`),
      el("span", {}, words, step.detail ? under(step.detail) : null));
  }));
}

// The controller's ids are not to run in the shell of whoever copies the line.
const shellWord = (text) => (/^\w[\w.:@=+-]*$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function todo(command) {
  const by = { queued: ["purge", "gives it up"], uncertain: ["purge", "gives it up"], dead: ["redeliver", "queues it again"], expired: ["redeliver", "queues it again"], delivered: ["redeliver", "queues it again, if the agent has lost it"] }[command.state];
  return by && command.stored ? el("p", { class: "todo" }, el("code", {}, `agent-shim ${by[0]} ${shellWord(command.id)}`), ` ${by[1]}.`, copy(`agent-shim ${by[0]} ${shellWord(command.id)}`)) : null;
}

function found(command) {
  const result = command.result && (command.result.success ? "success" : `failure${command.result.code ? ` (${command.result.code})` : ""}`);
  return el("div", { class: "found" },
    el("p", {}, el("strong", { class: "id" }, command.id), chip(...(command.stored ? STATES[command.state] : ["bad", "rejected"])), el("button", { type: "button", class: "plain", onclick: leave }, "Close")),
    el("dl", { class: "facts" },
      fact("Type", command.type), fact("Agent", command.agent ? `${command.agent} (${command.session.id})` : command.session.id),
      fact("Arrived", command.arrived_at && moment(command.arrived_at)), fact("Offers", command.stored ? String(command.attempts) : null),
      fact("Payload", command.stored ? bytes(command.size_bytes) : null), fact("Result", result),
      fact("Expires", ["queued", "uncertain"].includes(command.state) ? moment(command.expires_at) : null), fact("Came by", command.via)),
    steps(command.trace), todo(command));
}

const ENDED = ["closed", "expired", "dead"];
let following;

// Shows the command that the address names, and follows it until it has ended.
async function showTrace() {
  clearTimeout(following);
  const { hash } = location;
  const wanted = /^#command=(.+)$/.exec(hash);
  if (!wanted) return put($("trace"));
  const name = decodeURIComponent(wanted[1]);
  const first = $("trace").dataset.of !== hash;
  if (first) $("command").value = name;
  const response = await ask(`commands/${encodeURIComponent(name)}.json`).catch(() => null);
  const answer = response && (await response.json().catch(() => null));
  if (location.hash !== hash) return;
  $("trace").dataset.of = hash;
  if (response && response.ok) put($("trace"), ...answer.commands.map(found));
  else put($("trace"), el("p", { class: "error" }, answer ? `${answer.error}.` : "The shim does not answer."));
  if (first) $("commands-title").scrollIntoView({ block: "start" });
  if (response && response.ok && !answer.commands.every(({ state }) => ENDED.includes(state))) following = setTimeout(showTrace, 2000);
}

function leave() {
  history.pushState(null, "", location.pathname + location.search);
  showTrace();
  $("trace").dataset.of = "";
  $("command").focus();
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const hash = `#command=${encodeURIComponent($("command").value.trim())}`;
  if (location.hash === hash) showTrace();
  else location.hash = hash;
});
addEventListener("hashchange", showTrace);
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName) && !$("status").hidden) {
    event.preventDefault();
    $("command").focus();
  }
});

// --- copying: a page that is not served by https or from localhost has no clipboard --------------------------------

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = el("textarea", { class: "hidden", "aria-hidden": true });
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (!button) return;
  await copyText(button.dataset.copy).catch(() => {});
  $("announce").textContent = `Copied ${button.dataset.copy}`;
  button.dataset.done = "";
  setTimeout(() => delete button.dataset.done, 1200);
});

// --- following the shim -------------------------------------------------------------------------------------------

// The token goes into a header, not into a cookie: a cookie of this host would go to every other port of it, too.
function ask(path, signal) {
  const token = sessionStorage.getItem(TOKEN);
  return fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {}, cache: "no-store", credentials: "omit", signal });
}

function receive(event, data) {
  if (event === "series") {
    plots.data = data;
    plots.all.length ? drawPlots() : null;
  } else if (event === "samples") {
    addSamples(data);
  } else if (event === "status") {
    const first = $("status").hidden;
    show(data);
    setLive("live");
    if (!plots.all.length) makePlots();
    if (first) showTrace();
  }
}

async function read(body, alive) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    alive();
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(": ")), line.slice(line.indexOf(": ") + 2)]));
      receive(fields.event, JSON.parse(fields.data));
    }
  }
}

function setLive(state) {
  const words = { live: "live", connecting: "connecting", lost: `no answer from the shim since ${clock(Date.now() / 1000)}` };
  if ($("live").dataset.state === state) return;
  $("live").dataset.state = state;
  $("live").textContent = words[state];
  $("status").toggleAttribute("data-stale", state === "lost");
  if (state !== "lost") return;
  $("announce").textContent = words.lost;
  level = null; // the first answer after that is read aloud, whatever it says
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function askForToken(error) {
  sessionStorage.removeItem(TOKEN);
  $("status").hidden = true;
  $("login").hidden = false;
  $("login-error").textContent = error;
  $("token").focus();
  return new Promise((resolve) => $("login").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(TOKEN, $("token").value.trim());
    $("token").value = "";
    resolve();
  }, { once: true }));
}

async function follow() {
  if (document.documentElement.dataset.token === "required" && !sessionStorage.getItem(TOKEN)) await askForToken("");
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    const control = new AbortController();
    let watchdog;
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => control.abort(), SILENCE_MS);
    };
    try {
      alive();
      const response = await ask("events", control.signal);
      if (response.status === 401) {
        await askForToken((await response.json()).error + ".");
        wait = 250;
        continue;
      }
      if (response.ok) {
        wait = 250;
        await read(response.body, alive);
      }
    } catch (error) {
      if (error instanceof SyntaxError || error instanceof ReferenceError) throw error;
    } finally {
      clearTimeout(watchdog);
    }
    setLive("lost");
    await sleep(wait);
  }
}

follow();
