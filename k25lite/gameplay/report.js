"use strict";
// Names of files and words of models are appended as text nodes and encoded in addresses: none is ever read as markup.
const $ = id => document.getElementById(id), ROW = 58, SHOWN = innerWidth < 560 ? 6 : 16, NONCE = document.currentScript.nonce;
const {kinds, videos, swarm} = DATA, RIGHT = 1, WRONG = 2, MISSED = 3;
const make = (tag, properties, ...children) => { const e = Object.assign(document.createElement(tag), properties); e.append(...children); return e; };
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim(), reduced = matchMedia("(prefers-reduced-motion: reduce)");
const clock = s => { s = Math.floor(s + 1e-6); const h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60, pad = n => String(n).padStart(2, "0"); return h ? `${h}:${pad(m)}:${pad(s % 60)}` : `${m}:${pad(s % 60)}`; };
const WHOLE = new Intl.NumberFormat("en", {maximumFractionDigits: 0}), TENTHS = new Intl.NumberFormat("en", {maximumFractionDigits: 1});
const seconds = s => `${(s < 10 ? TENTHS : WHOLE).format(s)} s`, count = n => WHOLE.format(n);
const events = DATA.events.video.map((video, i) => ({
  i, video, kind: DATA.events.kind[i], start: DATA.events.start[i] / 1000, end: DATA.events.end[i] / 1000, confidence: DATA.events.confidence[i],
  frames: DATA.events.frames[i], clip: DATA.events.clip[i], status: DATA.events.status[i],
}));
for (const e of events) e.words = `${videos[e.video].name} ${kinds[e.kind]} ${clock(e.start)}`.toLowerCase();
const frame = (e, ms) => `frames/${videos[e.video].file}-${ms}.webp`, tags = {[WRONG]: "wrong", [MISSED]: "missed"};
const picture = (e, ms, alt = "") => ms === undefined ? make("span", {className: "none"}) : make("img", {src: frame(e, ms), alt, loading: "lazy", decoding: "async"});
const middle = e => e.frames[e.frames.length >> 1], colour = e => `var(--${kinds[e.kind]})`;
// The list: only the rows in sight are there
let rows = [], chosen = null;
const shownKinds = new Set(kinds.keys()), list = $("list");
function filter() {
  const words = $("search").value.trim().toLowerCase().split(/\s+/), video = $("video").value, least = +$("least").value, status = +($("status")?.value || 0);
  $("least-shown").textContent = `${least} %`;
  rows = events.filter(e => shownKinds.has(e.kind) && (video === "" || e.video === +video) && (status ? e.status === status : e.status !== MISSED)
    && (e.status === MISSED || e.confidence >= least) && words.every(w => e.words.includes(w)));
  const all = events.reduce((n, e) => n + (e.status !== MISSED), 0);
  $("count").textContent = rows.length === all && !status ? `${count(all)} events` : `${count(rows.length)} of ${count(all)} events`;
  $("none").hidden = rows.length > 0; $("space").style.height = `${rows.length * ROW}px`;
  list.scrollTop = 0; draw(true);
}
let drawn = "";
function draw(force) {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4), last = Math.min(rows.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4), key = `${first} ${last}`;
  if (!force && key === drawn) return;
  drawn = key;
  $("space").replaceChildren(...rows.slice(first, last).map((e, n) => {
    const title = make("span", {className: "title"}, make("i"), make("b", {}, kinds[e.kind]), ...tags[e.status] ? [make("span", {className: "tag"}, tags[e.status])] : []);
    const row = make("div", {className: "row", id: `event-${e.i}`, onclick: () => { choose(e, true); list.focus({preventScroll: true}); }}, picture(e, middle(e)),
      make("div", {style: "min-width:0"}, title, make("span", {className: "name", dir: "auto"}, videos[e.video].name)),
      make("span", {className: "right"}, clock(e.start), make("small", {}, seconds(e.end - e.start), e.status === MISSED ? "" : ` · ${e.confidence} %`)));
    row.style.top = `${(first + n) * ROW}px`; row.style.setProperty("--kind", colour(e)); row.dataset.event = e.i;
    for (const [name, value] of Object.entries({role: "option", "aria-selected": e === chosen, "aria-posinset": first + n + 1, "aria-setsize": rows.length})) row.setAttribute(name, value);
    return row;
  }));
}
function choose(e, play) {
  chosen = e;
  const at = rows.indexOf(e), player = $("player"), video = videos[e.video];
  if (at >= 0) {
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
  }
  draw(true); list.setAttribute("aria-activedescendant", `event-${e.i}`);
  $("hint").hidden = true; $("about").hidden = false; $("message").textContent = "";
  const swatch = make("i", {className: "dot"}); swatch.style.setProperty("--kind", colour(e));
  $("what").replaceChildren(swatch, `${kinds[e.kind]} at ${clock(e.start)}`, ...tags[e.status] ? [make("span", {className: "tag"}, tags[e.status])] : []);
  const facts = {Video: video.name, Time: `${e.start.toFixed(2)} to ${e.end.toFixed(2)} s (${seconds(e.end - e.start)})`, Confidence: e.status === MISSED ? "not found" : `${e.confidence} %`};
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {dir: "auto"}, value)]));
  const source = make("button", {onclick: () => show(e, false, true)}, "Play from the original video");
  $("strip").replaceChildren(...e.frames.map(ms => make("button", {title: `Key frame at ${clock(ms / 1000)}`, onclick: () => jump(e, ms / 1000)}, picture(e, ms, `Key frame at ${clock(ms / 1000)}`))));
  $("message").replaceChildren(...e.clip ? [source] : []);
  show(e, Boolean(e.clip), play);
  mark();
}
let offset = 0; // of the player's clock against the video's
function show(e, clip, play) {
  const player = $("player"), still = $("still"), video = videos[e.video], [from, to] = e.clip || [Math.max(0, e.start - 1) * 1000, (e.end + 1) * 1000];
  offset = clip ? from / 1000 : 0;
  const address = clip ? `clips/${video.file}-${from}-${to}.mp4` : `${video.source}#t=${from / 1000},${to / 1000}`;
  player.hidden = false; still.hidden = true;
  if (middle(e) === undefined) player.removeAttribute("poster"); else player.poster = frame(e, middle(e));
  player.onerror = () => {
    player.hidden = true; still.hidden = middle(e) === undefined; $("hint").hidden = !still.hidden;
    if (!still.hidden) { still.src = frame(e, middle(e)); still.alt = `Key frame of this ${kinds[e.kind]}`; }
    $("message").textContent = clip ? "This clip is missing from the report." : "It has no clip of its own, and the original video does not lie where it was or cannot be played here.";
  };
  player.src = address; player.load();
  if (play) player.play().catch(() => {}); // a browser may want a click first
}
function jump(e, time) { const player = $("player"); if (!player.hidden) { player.currentTime = Math.max(0, time - offset); player.pause(); } }
function step(by) {
  if (!rows.length) return;
  choose(rows[Math.min(Math.max(rows.indexOf(chosen) + by, 0), rows.length - 1)], false);
}
list.addEventListener("scroll", () => draw(false), {passive: true});
list.addEventListener("keydown", e => {
  const page = Math.floor(list.clientHeight / ROW), by = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9}[e.key];
  if (by) step(by); else if ((e.key === "Enter" || e.key === " ") && chosen) show(chosen, Boolean(chosen.clip), true); else return;
  e.preventDefault();
});
document.addEventListener("keydown", e => {
  if (e.target.matches("input, select, video") || e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === "j" || e.key === "k") step(e.key === "j" ? 1 : -1);
  if (e.key === "/") { $("search").focus(); e.preventDefault(); }
});
$("previous").onclick = () => step(-1); $("next").onclick = () => step(1);
for (const id of ["search", "video", "least", "status"]) $(id)?.addEventListener("input", filter);
for (const button of document.querySelectorAll("[data-kind]")) button.onclick = () => {
  const kind = +button.dataset.kind, on = !shownKinds.has(kind);
  shownKinds[on ? "add" : "delete"](kind); button.setAttribute("aria-pressed", on); filter(); timeline();
};
$("reset").onclick = () => {
  $("search").value = $("video").value = ""; $("least").value = 0; if ($("status")) $("status").value = "";
  kinds.forEach((_, kind) => shownKinds.add(kind)); document.querySelectorAll("[data-kind]").forEach(b => b.setAttribute("aria-pressed", true)); filter(); timeline();
};
videos.forEach((v, n) => $("video").append(make("option", {value: n}, v.name)));
for (const button of document.querySelectorAll(".only")) button.onclick = () => { $("video").value = button.dataset.video; filter(); $("events").scrollIntoView(); list.focus({preventScroll: true}); };
// The mistakes
const wanted = new Set([WRONG, MISSED]); let many = SHOWN;
function mistakes() {
  if (!$("mistakes")) return;
  const all = events.filter(e => wanted.has(e.status));
  $("mistakes").replaceChildren(...all.slice(0, many).map(e => {
    const card = make("button", {className: "mistake", onclick: () => { choose(e, true); $("stage").scrollIntoView({block: "nearest"}); }}, picture(e, middle(e)),
      make("span", {}, `${kinds[e.kind]} ${tags[e.status]}`), make("span", {dir: "auto"}, `${clock(e.start)} in ${videos[e.video].name}`), make("span", {}, e.status === WRONG ? `${e.confidence} % sure` : seconds(e.end - e.start)));
    return card;
  }));
  if (!all.length) $("mistakes").append(make("p", {className: "muted"}, "None."));
  $("more").hidden = all.length <= many; $("more").textContent = `Show more (${count(all.length - many)})`;
}
if ($("more")) $("more").onclick = () => { many += 4 * SHOWN; mistakes(); };
for (const button of document.querySelectorAll("[data-mistakes]")) button.onclick = () => {
  const status = +button.dataset.mistakes, on = !wanted.has(status);
  wanted[on ? "add" : "delete"](status); button.setAttribute("aria-pressed", on); many = SHOWN; mistakes();
};
// Charts, each drawn when it comes into sight
const narrow = () => innerWidth < 560, CONFIG = {displaylogo: false, responsive: true, displayModeBar: false, doubleClick: "reset"};
const layout = more => { const axis = {gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, fixedrange: true}; return {
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {family: "system-ui, sans-serif", size: 12, color: css("--muted")}, margin: {l: 8, r: 12, t: 8, b: 8}, showlegend: false, hovermode: "closest",
  hoverlabel: {bgcolor: css("--card"), bordercolor: css("--line"), font: {color: css("--ink")}, align: "left"}, dragmode: "zoom", ...more, xaxis: {...axis, ...more.xaxis}, yaxis: {...axis, ...more.yaxis}}; };
// Plotly reads a few tags in texts as markup.
const plain = text => text.replace(/[&<>]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"}[c])), short = text => { const most = narrow() ? 10 : 24; return plain(text.length > most ? `…${text.slice(1 - most)}` : text); };
const ticks = (span, most) => { const step = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800].find(s => span / s <= most) || span, at = []; for (let t = 0; t <= span * 1.0001; t += step) at.push(t); return {tickvals: at, ticktext: at.map(clock)}; };
const longest = Math.max(...videos.map(v => v.seconds)), view = {from: 0, to: longest};
const lane = e => e.video + (e.kind - (kinds.length - 1) / 2) * .78 / kinds.length;
function bars() { // boxes from start to end, none thinner than two pixels; one path for all of a kind
  const thin = (view.to - view.from) / Math.max($("plot-timeline").clientWidth, 300) * 2, half = .3 / kinds.length;
  return kinds.map((kind, number) => {
    const x = [], y = [], ids = [];
    if (shownKinds.has(number)) for (const e of events) if (e.kind === number && e.status !== MISSED) {
      const end = Math.max(e.end, e.start + thin), low = lane(e) - half, high = lane(e) + half;
      x.push(e.start, end, end, e.start, null); y.push(low, low, high, high, null); ids.push(e.i, e.i, e.i, e.i, e.i);
    }
    return {x, y, ids, kind};
  });
}
const rowHeight = () => Math.max(Math.min(620 / videos.length, narrow() ? 64 : 72), narrow() ? 15 : 19);
function timeline() {
  if (!window.Plotly) return;
  const box = $("plot-timeline"), height = rowHeight();
  const traces = bars().map(({x, y, ids, kind}) => ({x, y, customdata: ids, mode: "none", name: kind, fill: "toself", fillcolor: css(`--${kind}`), hoveron: "points",
    text: ids.map(i => events[i].told ??= `<b>${kind}</b> ${clock(events[i].start)}, ${seconds(events[i].end - events[i].start)}<br>${plain(videos[events[i].video].name)}`), hoverinfo: "text"}));
  const base = videos.map((v, n) => ({type: "line", layer: "below", x0: 0, x1: v.seconds, y0: n, y1: n, line: {color: css("--faint"), width: height * .86}}));
  return Plotly.react(box, traces, layout({height: height * videos.length + 46, shapes: base, uirevision: "kept",
    xaxis: {range: [view.from, view.to], fixedrange: false, showgrid: false, ...ticks(longest, narrow() ? 5 : 12)},
    yaxis: {tickvals: videos.map((_, n) => n), ticktext: videos.map(v => short(v.name)), range: [videos.length - .5, -.5], showgrid: false, zeroline: false}}), CONFIG).then(() => {
    if (!box.dataset.ready) {
      box.dataset.ready = "yes";
      box.on("plotly_click", at => { choose(events[at.points[0].customdata], true); $("stage").scrollIntoView({block: "nearest"}); });
      box.on("plotly_relayout", change => {
        if (change["xaxis.range[0]"] === undefined && !change["xaxis.autorange"] && !change["xaxis.range"]) return;
        const [from, to] = box.layout.xaxis.range; if (from === view.from && to === view.to) return;
        Object.assign(view, {from, to}); const now = bars();
        Plotly.restyle(box, {x: now.map(b => b.x)}); Plotly.relayout(box, {"xaxis.tickvals": zoomed().tickvals, "xaxis.ticktext": zoomed().ticktext});
      });
    }
    mark();
  });
}
function zoomed() { const span = view.to - view.from, {tickvals} = ticks(span, narrow() ? 5 : 12), step = (tickvals[1] ?? span) - tickvals[0], first = Math.ceil(view.from / step) * step, at = []; for (let t = first; t <= view.to; t += step) at.push(t); return {tickvals: at, ticktext: at.map(clock)}; }
function mark() { // where the chosen event lies
  const box = $("plot-timeline"); if (!window.Plotly || !box.dataset.ready || !chosen) return;
  Plotly.relayout(box, {annotations: [{x: (chosen.start + chosen.end) / 2, y: chosen.video - .45, text: "▼", showarrow: false, yshift: 3, font: {size: 13, color: css("--ink")}}]});
}
const kept = new Map(); // charts that have been drawn, to be drawn anew when the colours change
function rate() {
  const starts = []; let total = 0;
  for (const v of videos) { starts.push(total); total += v.seconds; }
  const bin = [10, 30, 60, 300, 600, 900, 1800, 3600, 7200].find(s => total / s <= 32) || 14400, bins = Math.ceil(total / bin);
  const traces = kinds.map((kind, number) => { const y = new Array(bins).fill(0); for (const e of events) if (e.kind === number && e.status !== MISSED) y[Math.min(bins - 1, Math.floor((starts[e.video] + e.start) / bin))] += 3600 / Math.min(bin, total - bin * Math.min(bins - 1, Math.floor((starts[e.video] + e.start) / bin)));
    return {type: "bar", name: kind, x: y.map((_, n) => (n + .5) * bin), y, width: bin * .86, marker: {color: css(`--${kind}`)}, hovertemplate: `%{y:,.0f} ${kind} an hour<extra></extra>`}; });
  return Plotly.react("plot-rate", traces, layout({height: 300, barmode: "stack", hovermode: "x unified", xaxis: {title: {text: `Play time, in steps of ${clock(bin)}`}, range: [0, total], showgrid: false, ...ticks(total, narrow() ? 4 : 8)}, yaxis: {title: {text: "Events per hour"}}}), CONFIG);
}
function lengths() {
  const of = ["fight", "boss"].map(kind => [kind, events.filter(e => kinds[e.kind] === kind && e.status !== MISSED).map(e => e.end - e.start)]), most = Math.max(2, ...of.flatMap(([, all]) => all)), size = [1, 2, 5, 10, 20, 60].find(s => most / s <= 30) || 120;
  const traces = of.map(([kind, x]) => ({type: "histogram", name: kind, x, xbins: {start: 0, end: most + size, size}, marker: {color: css(`--${kind}`)}, hovertemplate: `%{y} ${kind === "boss" ? "boss fights" : "fights"} of %{x} s<extra></extra>`}));
  return Plotly.react("plot-lengths", traces, layout({height: 300, barmode: "stack", bargap: .12, showlegend: true, legend: {x: 1, xanchor: "right", y: 1}, xaxis: {title: {text: "Length in seconds"}, showgrid: false}, yaxis: {title: {text: "How many"}}}), CONFIG);
}
function health() {
  const select = $("health-video"); if (!select.options.length) { videos.forEach((v, n) => { if (v.health) select.append(make("option", {value: n}, v.name)); }); select.oninput = health; }
  const number = +select.value, {health: [x, y], seconds: end} = videos[number];
  const low = {x, y, mode: "lines", fill: "tozeroy", line: {color: css("--pickup"), width: 1.6, shape: "hv"}, fillcolor: css("--pickup") + "26", text: x.map(clock), hovertemplate: "%{text}: health %{y}<extra></extra>"};
  const deaths = events.filter(e => e.video === number && kinds[e.kind] === "death" && e.status !== MISSED);
  const crosses = {x: deaths.map(e => e.start), y: deaths.map(() => 0), mode: "markers", marker: {symbol: "x", size: 9, color: css("--death")}, cliponaxis: false, text: deaths.map(e => clock(e.start)), hovertemplate: "death found at %{text}<extra></extra>"};
  return Plotly.react("plot-health", [low, crosses], layout({height: 260, xaxis: {range: [0, end], showgrid: false, ...ticks(end, narrow() ? 5 : 12)}, yaxis: {title: {text: "Health"}, rangemode: "tozero"}}), CONFIG);
}
function gantt() {
  const passes = [...new Set(swarm.work.map(w => w[3]))], height = Math.max(Math.min(swarm.lanes, 40) * 26, 60);
  const traces = passes.map(pass => { const own = swarm.work.filter(w => w[3] === pass);
    return {type: "bar", orientation: "h", name: pass, base: own.map(w => w[1]), x: own.map(w => Math.max(w[2] - w[1], swarm.wall / 2000)), y: own.map(w => w[0] + 1), width: .76, marker: {color: css(`--${pass}`), line: {color: css("--card"), width: .6}}, text: own.map(w => `${plain(w[4])}<br>${seconds(w[2] - w[1])}`), textposition: "none", hovertemplate: "%{text}<extra></extra>"}; });
  return Plotly.react("plot-swarm", traces, layout({height: height + 80, barmode: "overlay", showlegend: true, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, margin: {l: 8, r: 12, t: 34, b: 8}, xaxis: {title: {text: "Seconds since the analysis began"}, range: [0, swarm.wall]}, yaxis: {title: {text: "At work"}, range: [swarm.lanes + .5, .5], dtick: Math.ceil(swarm.lanes / 16), tick0: 1, showgrid: false}}), CONFIG);
}
const charts = {"plot-timeline": timeline, "plot-rate": rate, "plot-lengths": lengths, "plot-health": health, "plot-swarm": gantt};
filter(); mistakes(); document.documentElement.dataset.interactive = Math.round(performance.now());
const watcher = new IntersectionObserver(seen => { for (const {target, isIntersecting} of seen) if (isIntersecting) { watcher.unobserve(target); kept.set(target.id, charts[target.id]); charts[target.id](); } }, {rootMargin: "300px"});
const plotly = make("script", {src: "plotly.min.js", nonce: NONCE, onload: () => { for (const id in charts) if ($(id)) watcher.observe($(id)); }, onerror: () => document.querySelectorAll(".plot").forEach(box => box.replaceWith(make("p", {className: "muted"}, "plotly.min.js is missing beside this page."))) });
requestAnimationFrame(() => setTimeout(() => document.head.append(plotly)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => kept.forEach(chart => chart()));
