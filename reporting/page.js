"use strict";
const PAGE = 100; // samples listed at a time
const STOPS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]]; // viridis

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, attributes);
  node.append(...children); // strings become text nodes, so a sample is never parsed as HTML
  return node;
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function colour(share) { // 0 to 1 -> [css colour, css ink]
  const at = Math.min(share * (STOPS.length - 1), STOPS.length - 1 - 1e-9), low = Math.floor(at);
  const rgb = STOPS[low].map((from, i) => Math.round(from + (STOPS[low + 1][i] - from) * (at - low)));
  const light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2];
  return ["rgb(" + rgb.join(",") + ")", light > 120 ? "#000" : "#fff"];
}

function strip(sample) {
  const box = make("div", { className: "strip" });
  sample.token_ids.forEach((token, position) => {
    const pass = sample.committed_at[position];
    const cell = make("i", { title: `position ${position}, token id ${token}: ` +
      (pass < 0 ? "never committed" : `forward pass ${pass + 1} of ${sample.nfe}`) });
    if (pass < 0) cell.className = "open";
    else {
      const [fill, ink] = colour(sample.nfe > 1 ? pass / (sample.nfe - 1) : 0);
      cell.textContent = pass + 1;
      cell.style.background = fill;
      cell.style.color = ink;
    }
    if (position >= sample.tokens_returned) cell.className += position === sample.tokens_returned ? " tail cut" : " tail";
    box.append(cell);
  });
  return box;
}

function part(title, content) {
  const text = typeof content === "string";
  return [make("h3", {}, title), text ? make("pre", {}, content === "" ? "(empty)" : content) : content];
}

function verdict(sample) {
  const line = (key, value) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`;
  const lines = [`score ${sample.score}`];
  for (const [filter, answer] of Object.entries(sample.extracted || {})) lines.push(line(filter, answer));
  for (const [key, value] of Object.entries(sample.verdict || {})) if (value !== "" && value !== null) lines.push(line(key, value));
  return lines.join("\n");
}

function target(value) { // a text, or lists of texts by name
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map(target).join("\n");
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return Object.entries(value).map(([name, one]) => `${name}:\n${target(one)}`).join("\n\n");
}

function fill(details, sample) { // called when a sample is first opened
  const scale = make("span", { className: "scale", title: "first to last forward pass" });
  scale.style.background = `linear-gradient(90deg, ${STOPS.map((s) => `rgb(${s.join(",")})`).join(",")})`;
  const facts = `${sample.tokens_returned} tokens returned, ${sample.nfe} forward passes, ended: ${sample.ended ?? "canvas full"} `;
  const body = make("div", { className: "body" }, ...part("Prompt", sample.prompt),
    ...part("Answer", sample.raw_text || sample.text));
  const judged = [make("div", {}, ...part("Verdict", verdict(sample)))];
  if (sample.target !== null) judged.push(make("div", {}, ...part("Target", target(sample.target))));
  body.append(make("div", { className: "beside" }, ...judged));
  if (sample.token_ids.length) body.append(...part("Decoding", make("div", {}, facts, scale)), strip(sample));
  details.append(body);
}

function entry(sample, binary) {
  const label = binary ? (sample.score ? "right" : "wrong") : sample.score.toPrecision(3);
  const doc = `doc ${sample.doc_id}` + (sample.repeat ? `/${sample.repeat}` : "");
  const summary = make("summary", {}, make("span", { className: "doc" }, doc),
    make("span", { className: "mark " + (binary ? label : "") }, label),
    make("span", {}, sample.text.slice(0, 200).replace(/\s+/g, " ")));
  const details = make("details", { className: "sample" }, summary);
  details.dataset.doc = sample.doc_id;
  details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) fill(details, sample); });
  return details;
}

async function openResult(result) { // unpacks the samples, once, and lists them
  if (result.ready) return result.ready;
  const status = make("div", { className: "bar" }, "unpacking ...");
  result.append(status);
  return (result.ready = (async () => {
    let samples;
    try { samples = await unpack(result.dataset.samples); }
    catch (error) { status.textContent = "the samples cannot be shown in this browser: " + error; throw error; }
    const binary = samples.every((s) => s.score === 0 || s.score === 1);
    const list = make("div", {}), more = make("button", {}), count = make("span", {});
    const choice = make("select", {}, ...["all", "right", "wrong"].map((name) => make("option", {}, name)));
    const goto = make("input", { type: "number", min: 0, placeholder: "doc", size: 6 });
    let shown = [], at = 0;
    const next = (until = at + PAGE) => {
      for (; at < Math.min(until, shown.length); at++) list.append(entry(shown[at], binary));
      more.hidden = at >= shown.length;
      more.textContent = `show ${Math.min(PAGE, shown.length - at)} more of ${shown.length - at}`;
    };
    const select = () => {
      shown = samples.filter((s) => choice.value === "all" || (choice.value === "right") === Boolean(s.score));
      list.replaceChildren();
      at = 0;
      count.textContent = `${shown.length} of ${samples.length} samples`;
      next();
    };
    result.find = (doc) => { // lists samples up to the document; returns its <details>, or null
      choice.value = "all";
      select();
      const index = shown.findIndex((s) => s.doc_id === doc);
      if (index >= at) next(index + 1);
      return index < 0 ? null : list.children[index];
    };
    more.addEventListener("click", () => next());
    choice.addEventListener("change", select);
    goto.addEventListener("change", () => show(result.find(Number(goto.value))));
    status.replaceChildren(...(binary ? [choice] : []), "go to", goto, count);
    result.append(list, make("div", { className: "bar" }, more));
    select();
  })());
}

function show(sample) {
  if (!sample) return;
  if (!sample.open) sample.querySelector("summary").click();
  sample.scrollIntoView();
}

async function follow() { // #result=0&doc=3
  const wanted = new URLSearchParams(location.hash.slice(1));
  const result = document.querySelectorAll(".result")[Number(wanted.get("result") ?? -1)];
  if (!result) return;
  if (!result.open) result.querySelector("summary").click();
  await openResult(result);
  if (wanted.has("doc")) show(result.find(Number(wanted.get("doc"))));
}

for (const result of document.querySelectorAll(".result"))
  result.addEventListener("toggle", () => { if (result.open) openResult(result).catch(() => {}); });
window.addEventListener("hashchange", follow);
follow();
