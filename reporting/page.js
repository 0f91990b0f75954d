"use strict";
const PAGE = 100; // samples that are listed at a time
const STOPS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]]; // viridis

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, attributes);
  node.append(...children); // text becomes a text node: nothing of a sample is read as HTML
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
  sample.t.forEach((token, position) => {
    const pass = sample.c[position];
    const cell = make("i", { title: `position ${position}, token id ${token}: ` +
      (pass < 0 ? "never committed" : `forward pass ${pass + 1} of ${sample.n}`) });
    if (pass < 0) cell.className = "open";
    else {
      const [fill, ink] = colour(sample.n > 1 ? pass / (sample.n - 1) : 0);
      cell.textContent = pass + 1;
      cell.style.background = fill;
      cell.style.color = ink;
    }
    if (position >= sample.k) cell.className += position === sample.k ? " tail cut" : " tail";
    box.append(cell);
  });
  return box;
}

function part(title, content) {
  const text = typeof content === "string";
  return [make("h3", {}, title), text ? make("pre", {}, content === "" ? "(empty)" : content) : content];
}

function verdict(sample) {
  const lines = [`score ${sample.m}`];
  for (const [filter, answer] of Object.entries(sample.x || {}))
    lines.push(`${filter}: ${typeof answer === "string" ? answer : JSON.stringify(answer)}`);
  for (const [key, value] of Object.entries(sample.v || {})) if (value !== "" && value !== null) lines.push(`${key}: ${value}`);
  return lines.join("\n");
}

function fill(details, sample) { // once, when it is first opened
  const scale = make("span", { className: "scale", title: "first to last forward pass" });
  scale.style.background = `linear-gradient(90deg, ${STOPS.map((s) => `rgb(${s.join(",")})`).join(",")})`;
  const facts = `${sample.k} tokens returned, ${sample.n} forward passes, ended: ${sample.f ?? "canvas full"} `;
  const body = make("div", { className: "body" }, ...part("Prompt", sample.p),
    ...part("Answer", sample.a || sample.s), ...part("Verdict", verdict(sample)));
  if (sample.t.length) body.append(...part("Decoding", make("div", {}, facts, scale)), strip(sample));
  details.append(body);
}

function entry(sample, binary) {
  const label = binary ? (sample.m ? "right" : "wrong") : sample.m.toPrecision(3);
  const summary = make("summary", {}, make("span", { className: "doc" }, "doc " + sample.d + (sample.r ? "/" + sample.r : "")),
    make("span", { className: "mark " + (binary ? label : "") }, label),
    make("span", {}, sample.s.slice(0, 200).replace(/\s+/g, " ")));
  const details = make("details", { className: "sample" }, summary);
  details.dataset.doc = sample.d;
  details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) fill(details, sample); });
  return details;
}

async function openRun(run) { // lists the samples; unpacked once
  if (run.ready) return run.ready;
  const status = make("div", { className: "bar" }, "unpacking ...");
  run.append(status);
  return (run.ready = (async () => {
    let samples;
    try { samples = await unpack(run.dataset.samples); }
    catch (error) { status.textContent = "the samples cannot be shown in this browser: " + error; throw error; }
    const binary = samples.every((s) => s.m === 0 || s.m === 1);
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
      shown = samples.filter((s) => choice.value === "all" || (choice.value === "right") === Boolean(s.m));
      list.replaceChildren();
      at = 0;
      count.textContent = `${shown.length} of ${samples.length} samples`;
      next();
    };
    run.find = (doc) => { // lists as far as the document; its <details>, or null
      choice.value = "all";
      select();
      const index = shown.findIndex((s) => s.d === doc);
      if (index >= at) next(index + 1);
      return index < 0 ? null : list.children[index];
    };
    more.addEventListener("click", () => next());
    choice.addEventListener("change", select);
    goto.addEventListener("change", () => show(run.find(Number(goto.value))));
    status.replaceChildren(...(binary ? [choice] : []), "go to", goto, count);
    run.append(list, make("div", { className: "bar" }, more));
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
  const run = document.querySelectorAll(".run")[Number(wanted.get("result") ?? -1)];
  if (!run) return;
  if (!run.open) run.querySelector("summary").click();
  await openRun(run);
  if (wanted.has("doc")) show(run.find(Number(wanted.get("doc"))));
}

for (const run of document.querySelectorAll(".run"))
  run.addEventListener("toggle", () => { if (run.open) openRun(run).catch(() => {}); });
window.addEventListener("hashchange", follow);
follow();
