"use strict";
const INDEX = JSON.parse(document.getElementById("index").textContent); // what page.py writes: results, rows
const STOPS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]]; // viridis
const $ = (id) => document.getElementById(id);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, attributes);
  node.append(...children); // strings become text nodes, so a sample is never parsed as HTML
  return node;
}

// ---------------------------------------------------------------- tables

function sortKey(text) { // the number that a cell begins with, else its text; empty cells are last
  const number = parseFloat(text.replace(/^[<\s]+/, ""));
  return text === "-" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

for (const section of document.querySelectorAll("section.table")) {
  const body = section.querySelector("tbody"), rows = [...body.rows];
  const filter = section.querySelector("input"), count = section.querySelector(".count");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
  const heads = [...section.querySelectorAll("th")];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const order = head.ariaSort === "ascending" ? "descending" : "ascending";
    for (const other of heads) other.ariaSort = other === head ? order : "none";
    const keys = new Map(rows.map((row) => [row, sortKey(row.cells[column].dataset.key ?? row.cells[column].textContent)]));
    const sign = (a, b) => keys.get(a) === null || keys.get(b) === null || order === "ascending" ? 1 : -1;
    body.append(...[...rows].sort((a, b) => sign(a, b) * compare(keys.get(a), keys.get(b))));
  }));
  body.addEventListener("click", (event) => { // anywhere in a row is as good as its link
    const link = event.target.closest("tr").querySelector("a");
    if (link && !event.target.closest("a") && getSelection().isCollapsed) link.click();
  });
  body.addEventListener("keydown", (event) => {
    const links = [...body.querySelectorAll("tr:not([hidden]) a")];
    step(event, links, links.indexOf(event.target));
  });
}

function step(event, nodes, at) { // arrows, Home and End move the focus among nodes
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: nodes.length - 1 }[event.key];
  if (to === undefined || !nodes[to]) return null;
  event.preventDefault();
  nodes[to].focus();
  return nodes[to];
}

// ---------------------------------------------------------------- samples

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const loaded = new Map(); // index of a result -> promise of {about, tokens, samples}

function load(i) { // unpacks a result when it is first opened; samples are null if the page has none
  if (!loaded.has(i)) loaded.set(i, (async () => {
    const about = await unpack(`about-${i}`);
    const { tokens, samples } = $(`samples-${i}`) ? await unpack(`samples-${i}`) : { tokens: [], samples: null };
    for (const sample of samples ?? []) restore(sample, tokens);
    return { about, tokens, samples };
  })());
  return loaded.get(i);
}

function restore(sample, tokens) { // what reporting/samples.py has shortened
  const { ids = [], raw, text } = sample;
  if (typeof raw === "number") sample.raw = ids.slice(0, raw).map((id) => tokens[id][1]).join("");
  if (typeof text === "number") sample.text = sample.raw.slice(0, text);
  sample.key = sample.doc_id + (sample.repeat ? `/${sample.repeat}` : "");
}

function passesOf(sample) { // the forward pass that committed each position of the canvas, or -1
  return Array.from({ length: sample.length }, (_, at) => {
    const code = at < sample.passes.length ? sample.passes.charCodeAt(at) - 48 : -1;
    return code < 0 ? -1 : sample.starts[Math.floor(at / 32)] + code;
  });
}

function colour(share) { // 0 to 1 -> style of a cell
  const at = Math.min(share * (STOPS.length - 1), STOPS.length - 1 - 1e-9), low = Math.floor(at);
  const rgb = STOPS[low].map((from, i) => Math.round(from + (STOPS[low + 1][i] - from) * (at - low)));
  const light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2];
  return `--fill: rgb(${rgb.join(",")}); --ink: ${light > 120 ? "#000" : "#fff"}`;
}

function replay(sample, { tokens, letter }) { // the strip, the canvas as text, and a slider over forward passes
  const passes = passesOf(sample), texts = sample.ids.every((id) => tokens[id][1] !== null);
  const strip = make("div", { className: "strip" }), canvas = make("pre", { className: "canvas" });
  passes.forEach((pass, at) => {
    const [id, text] = tokens[sample.ids[at]] ?? [];
    const token = pass < 0 ? "never committed" : `${text == null ? "" : JSON.stringify(text) + ", "}token ${id}, forward pass ${pass + 1} of ${sample.nfe}`;
    const cell = make("i", { title: `position ${at}: ${token}` }, pass < 0 ? "" : String(pass + 1));
    if (pass >= 0) cell.style.cssText = colour(sample.nfe > 1 ? pass / (sample.nfe - 1) : 0);
    cell.classList.toggle("tail", at >= sample.tokens_returned);
    cell.classList.toggle("cut", at === sample.tokens_returned);
    strip.append(cell);
    if (texts && at < sample.ids.length) canvas.append(make("span", { title: cell.title, className: at >= sample.tokens_returned ? "tail" : "" }, text));
  });
  const slider = make("input", { type: "range", className: "slider", min: 0, max: sample.nfe, value: sample.nfe, ariaLabel: "forward pass" });
  const label = make("output", {}), play = make("button", {}, "replay");
  const draw = () => {
    const now = Number(slider.value);
    for (const box of [strip, canvas]) [...box.children].forEach((node, at) => {
      node.classList.toggle("open", passes[at] < 0 || passes[at] >= now);
      node.classList.toggle("new", passes[at] === now - 1 && now < sample.nfe);
    });
    label.textContent = `pass ${now} of ${sample.nfe}, ${passes.filter((pass) => pass >= 0 && pass < now).length} tokens`;
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "replay"; };
  slider.addEventListener("input", () => { stop(); draw(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "pause";
    if (Number(slider.value) === sample.nfe) slider.value = 0;
    timer = setInterval(() => {
      if (!play.isConnected || Number(slider.value) === sample.nfe) return stop();
      slider.value = Number(slider.value) + 1;
      draw();
    }, Math.max(40, 5000 / sample.nfe));
  });
  for (const [box, other] of [[strip, canvas], [canvas, strip]]) box.addEventListener("mouseover", (event) => {
    for (const node of [...strip.querySelectorAll(".hot"), ...canvas.querySelectorAll(".hot")]) node.classList.remove("hot");
    if (event.target !== box) for (const one of [box, other]) one.children[[...box.children].indexOf(event.target)]?.classList.add("hot");
  });
  strip.addEventListener("click", (event) => { // to the pass that committed the cell
    const pass = passes[[...strip.children].indexOf(event.target)];
    if (pass >= 0) { stop(); slider.value = pass + 1; draw(); }
  });
  draw();
  const end = tokens.find(([id]) => `end token ${id}` === sample.ended)?.[1];
  const ended = (sample.ended ?? "canvas full") + (end ? ` ${JSON.stringify(end)}` : "");
  const facts = `${sample.tokens_returned} tokens returned, ${sample.nfe} forward passes, ended: ${ended}`;
  return [...part(`Decoding${letter}`, make("div", {}, facts)), make("div", { className: "bar" }, play, slider, label), strip, ...(texts ? [canvas] : [])];
}

function part(title, content, className = "") {
  const text = typeof content === "string";
  return [make("h3", {}, title), text ? make("pre", { className }, content === "" ? "(empty)" : content) : content];
}

function plain(value) { // any JSON as text
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map((one) => (one !== null && typeof one === "object" ? JSON.stringify(one) : plain(one))).join("\n");
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return Object.entries(value).map(([name, one]) => `${name}:\n${plain(one)}`).join("\n\n");
}

function grid(rows, chosen) { // objects as a table, such as the options of a question
  const names = [...new Set(rows.flatMap(Object.keys))];
  const line = (tag, cells) => cells.map((cell) => make(tag, {}, typeof cell === "string" ? cell : JSON.stringify(cell ?? null)));
  const body = rows.map((row, i) => make("tr", { className: i === chosen ? "chosen" : "" }, ...line("td", [i, ...names.map((name) => row[name])])));
  return make("div", { className: "wide" }, make("table", {}, make("tr", {}, ...line("th", ["", ...names])), ...body));
}

function verdict(sample) {
  const line = ([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`;
  const facts = Object.entries(sample.verdict ?? {}).filter(([, value]) => value !== "" && value !== null);
  const found = Object.entries(sample.extracted ?? {}).map(([filter, text]) => line([filter === "none" ? "extracted" : `extracted by ${filter}`, text]));
  return [`score ${sample.score}`, ...found, ...facts.map(line)].join("\n");
}

function mark(sample, binary) {
  if (!sample) return make("span", { className: "mark", title: "no such sample" }, "–");
  if (!binary) return make("span", { className: "mark" }, sample.score.toPrecision(3));
  const [className, sign] = sample.score ? ["right", "✓"] : ["wrong", "✗"];
  return make("span", { className: `mark ${className}`, title: className, ariaLabel: className, role: "img" }, sign);
}

function answer(side, sample) { // one result's column
  const box = make("div", {});
  if (!sample) return make("div", {}, ...part(`Answer${side.letter}`, "no sample of this document"));
  const { raw = "", text } = sample, generated = raw !== "" || text !== "" || !sample.more;
  if (generated) {
    const inside = raw.startsWith(text);
    const body = make("pre", {}, text || (raw ? "" : "(empty)"));
    if (inside && raw.length > text.length) body.append(make("span", { className: "rest", title: "not part of the scored text" }, raw.slice(text.length)));
    box.append(...part(`Answer${side.letter}`, body));
    if (!inside && raw) box.append(...part("Before it was cut", raw));
  } else box.append(make("h3", {}, `Answer${side.letter}`));
  box.append(...part(`Verdict${side.letter}`, verdict(sample)));
  for (const [name, value] of Object.entries(sample.more ?? {})) {
    const rows = Array.isArray(value) && value.length && value.every((one) => one !== null && typeof one === "object" && !Array.isArray(one));
    box.append(...part(name, rows ? grid(value, sample.more.chosen) : plain(value)));
  }
  return box;
}

// ---------------------------------------------------------------- one result, or two side by side

// name -> [label with one result, label with two, (score, score there) -> whether it is shown]
const SHOW = {
  all: ["all", "all", () => true],
  right: ["right", null, (a) => a === 1],
  wrong: ["wrong", null, (a) => a !== 1],
  differ: [null, "different verdicts", (a, b) => a !== b],
  better: [null, "right here, wrong there", (a, b) => a > b],
  worse: [null, "wrong here, right there", (a, b) => a < b],
  both: [null, "right in both", (a, b) => a === 1 && b === 1],
  neither: [null, "wrong in both", (a, b) => a !== 1 && b !== 1],
};
let turn = 0; // of the view; what an older one still waits for is dropped
let place = null; // where the overview was left: {scroll, focus}
let view = null; // {sides, rows, shown, binary}

const wanted = () => new URLSearchParams(location.hash.slice(1));

function remember(changes) { // the address opens the same view again
  const state = wanted();
  for (const [name, value] of Object.entries(changes)) value === "" ? state.delete(name) : state.set(name, value);
  history.replaceState(null, "", "#" + state);
}

async function route() {
  const mine = ++turn, state = wanted(), i = Number(state.get("result") ?? -1), j = Number(state.get("with") || -1);
  const open = i in INDEX.results;
  if (open && $("view").hidden) place = { scroll: scrollY, focus: document.activeElement };
  $("overview").hidden = open;
  $("view").hidden = !open;
  if (!open) {
    view = null;
    if (place) { scrollTo(0, place.scroll); place.focus.focus({ preventScroll: true }); place = null; }
    return;
  }
  const chosen = [i, j].filter((index) => index in INDEX.results);
  const names = chosen.map((index) => INDEX.results[index].name);
  $("title").textContent = chosen.length > 1 ? names.map((name, n) => `${"AB"[n]}: ${name}`).join("\n") : names[0];
  $("count").textContent = "unpacking ...";
  for (const id of ["about", "list", "sample"]) $(id).replaceChildren();
  let parts;
  try { parts = await Promise.all(chosen.map(load)); }
  catch (error) { if (mine === turn) $("count").textContent = `this browser cannot unpack the samples: ${error}`; return; }
  if (mine !== turn) return;
  const sides = parts.map((one, n) => ({ ...one, letter: chosen.length > 1 ? ` ${"AB"[n]}` : "" }));
  $("about").replaceChildren(...sides.map((side, n) => about(side.about, INDEX.results[chosen[n]], chosen.length > 1 ? `${"AB"[n]}: ` : "")));
  const others = INDEX.results.map((result, index) => ({ ...result, index })).filter((r) => r.documents === INDEX.results[i].documents && r.index !== i);
  options($("with"), [["", "no other result"], ...others.map((r) => [r.index, r.name])], j < 0 ? "" : j);
  if (!sides.every((side) => side.samples)) {
    $("count").textContent = "The samples were left out (--no_samples).";
    return;
  }
  const there = sides[1] && new Map(sides[1].samples.map((sample) => [sample.key, sample]));
  const rows = sides[0].samples.map((sample) => (there ? [sample, there.get(sample.key)] : [sample]));
  const binary = chosen.every((index) => INDEX.results[index].accuracy);
  view = { sides, rows, binary, shown: [] };
  const shows = Object.entries(SHOW).filter(([name, show]) => show[there ? 1 : 0] && (binary || ["all", "differ", "better", "worse"].includes(name)));
  const label = (show) => (binary ? show[there ? 1 : 0] : show[1].replace("right here, wrong there", "higher here").replace("wrong here, right there", "lower here").replace("verdicts", "scores"));
  options($("show"), shows.map(([name, show]) => [name, label(show)]), state.get("show") ?? "all");
  list();
  if (state.get("doc") === null) $("title").focus();
}

function options(select, pairs, value) {
  select.replaceChildren(...pairs.map(([name, label]) => make("option", { value: name }, label)));
  select.value = value;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

function about(parts, result, prefix) {
  const { started, commit, machine } = parts.Origin ?? {};
  const facts = [result.value, started?.replace("T", " ").replace("+00:00", " UTC"), commit && `commit ${commit.slice(0, 10)}${commit.includes(" ") ? " with changes" : ""}`, machine];
  const lists = Object.entries(parts).flatMap(([title, values]) => [make("h3", {}, title),
    make("dl", {}, ...Object.entries(values).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, typeof value === "string" ? value : JSON.stringify(value))]))]);
  const title = prefix + facts.filter(Boolean).join(" · ");
  return make("details", {}, make("summary", {}, title, " · configuration"), make("p", { className: "note" }, result.file), ...lists);
}

function list() { // the samples that the filters leave; opens the one of the address, else the first
  const test = SHOW[$("show").value][2], words = $("words").value.toLowerCase();
  const holds = (sample) => sample && JSON.stringify([sample.prompt, sample.text, sample.target, sample.more]).toLowerCase().includes(words);
  view.shown = view.rows.filter(([a, b]) => (view.sides.length < 2 || b || $("show").value === "all") && test(a.score, b?.score) && (!words || holds(a) || holds(b)));
  $("count").textContent = `${view.shown.length} of ${view.rows.length} samples`;
  $("list").replaceChildren(...view.shown.map((row) => {
    const marks = view.sides.map((_, n) => mark(row[n], view.binary));
    const button = make("button", {}, make("span", { className: "doc" }, row[0].key), ...marks, make("span", { className: "text" }, (row[0].text || row[0].prompt || "").slice(0, 120)));
    button.dataset.key = row[0].key;
    return button;
  }));
  const doc = wanted().get("doc"), at = view.shown.findIndex(([sample]) => sample.key === doc);
  pick(Math.max(at, 0), at >= 0);
}

function pick(at, asked) { // shows a sample; asked: the address is to name it
  const row = view.shown[at];
  $("list").querySelector("[aria-current]")?.removeAttribute("aria-current");
  if (!row) return $("sample").replaceChildren(make("p", {}, "no sample"));
  const button = $("list").children[at];
  button.setAttribute("aria-current", "true");
  button.scrollIntoView({ block: "nearest" });
  if (asked) remember({ doc: row[0].key });
  const marks = view.sides.flatMap(({ letter }, n) => [letter, " ", mark(row[n], view.binary)]);
  const target = row.find((sample) => sample?.target !== undefined)?.target;
  const columns = view.sides.map((side, n) => answer(side, row[n]));
  const replays = view.sides.map((side, n) => make("div", { className: "replay" }, ...(row[n]?.ids?.length ? replay(row[n], side) : [])));
  if (target !== undefined) columns.push(make("div", {}, ...part("Target", plain(target))));
  $("sample").replaceChildren(make("h2", {}, `Document ${row[0].key}`, ...marks),
    ...part("Prompt", row[0].prompt ?? "", "prompt"), make("div", { className: "beside" }, ...columns), make("div", { className: "beside" }, ...replays));
  const prompt = document.querySelector("pre.prompt");
  prompt.scrollTop = prompt.scrollHeight; // the question is behind the examples
}

$("list").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) { pick([...$("list").children].indexOf(button), true); if (event.detail === 0) $("sample").focus(); }
});
$("list").addEventListener("keydown", (event) => {
  const rows = [...$("list").children], next = step(event, rows, rows.indexOf(event.target));
  if (next) pick(rows.indexOf(next), true);
});
$("show").addEventListener("change", () => { remember({ show: $("show").value }); list(); });
$("with").addEventListener("change", () => { remember({ with: $("with").value, show: "" }); route(); });
$("words").addEventListener("input", () => view && list());
$("number").addEventListener("change", () => {
  $("show").value = "all";
  $("words").value = "";
  remember({ doc: $("number").value, show: "" });
  list();
  if ($("list").querySelector("[aria-current] .doc")?.textContent !== $("number").value) $("count").textContent = `no document ${$("number").value}`;
});
document.addEventListener("keydown", (event) => { // from the sample to its row, from there to all results
  if (event.key !== "Escape" || $("view").hidden || event.target.type === "search") return;
  const row = $("list").querySelector("[aria-current]");
  if (row && $("sample").contains(event.target)) row.focus();
  else location.hash = "";
});
addEventListener("hashchange", route);
route();
