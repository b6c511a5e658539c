// The form, what happens while something is drawn, and the gallery. Everything that is fetched is from the server of this page.

import { Boxes, LabelMap, make, Masked, Picture } from "/page/paint.js";

const $ = (id) => document.getElementById(id);
const about = await (await fetch("/description")).json();
const inputs = {}; // of the conditions, by field: what has `element`, `said()` or `parts()`
const sliders = [];
const init = new Masked("init", "mask", suggest);
let strengthMoved = false;
let stopping = null;

const numberOf = (id) => ($(id).value === "" ? null : Number($(id).value));
const chosen = () => about.models.filter((model, i) => about.models.length === 1 || $(`model-${i}`).checked);
const usual = () => chosen()[0] ?? about.models[0];
const size = () => {
  const said = [numberOf("height"), numberOf("width")];
  return said[0] > 0 && said[1] > 0 && Math.max(...said) <= 4096 ? said : usual().size;
};

function written(name, field) {
  if (field.kind === "picture") return new Picture(`ask.${name}`);
  if (field.kind === "mask") return null; // painted over its picture
  if (field.kind === "map") return new LabelMap(name, field, size());
  if (field.kind === "boxes") return new Boxes(name, field, size());
  if (field.kind === "choice") {
    const element = make("select", {}, ...field.names.map((choice) => make("option", { value: choice, textContent: choice })));
    return { element, said: () => element.value };
  }
  const number = field.kind === "number";
  const element = make("input", { type: number ? "number" : "text" });
  if (number) {
    if (field.low !== null) element.min = field.low;
    if (field.high !== null) element.max = field.high;
    element.step = field.whole ? 1 : "any";
    element.placeholder = field.usual ?? (field.high === null ? "usual" : `${field.low} to ${field.high}`);
  }
  return { element, said: () => (element.value === "" ? null : number ? Number(element.value) : element.value) };
}

function buildForm() {
  document.title = $("title").textContent = about.models.map((model) => model.name).join(", ");
  $("models").hidden = about.models.length < 2;
  about.models.forEach((model, i) => {
    const tick = make("input", { type: "checkbox", id: `model-${i}`, checked: i < 2 });
    tick.addEventListener("change", refresh);
    $("models").append(make("label", {}, tick, model.name));
  });
  for (const [name, field] of Object.entries(about.fields)) {
    if (name === "caption") continue;
    const mask = Object.keys(about.fields).find((other) => about.fields[other].over === name);
    const input = mask ? new Masked(`ask.${name}`, `ask.${mask}`) : written(name, field);
    if (!input) continue;
    inputs[name] = input;
    const control = input.element.matches("input, select");
    const title = mask ? `${name}: paint over what is drawn anew (${mask})` : name;
    input.box = make(control ? "label" : "div", { className: "field" }, title, input.element);
    $("fields").append(input.box);
  }
  about.adapters.forEach(({ source, strength, whole }) => {
    const range = whole ? { min: 0, max: 1, step: 1 } : { min: Math.min(-1, strength), max: Math.max(2, strength), step: 0.05 };
    const slider = make("input", { type: "range", ...range, value: strength });
    const said = make("output", { textContent: strength });
    slider.addEventListener("input", () => { said.textContent = slider.value; });
    sliders.push(slider);
    $("adapters").append(make("label", {}, make("span", {}, `${source} `, said), slider));
  });
  $("sampler").append(make("option", { value: "", textContent: "" }), ...about.samplers.map((name) => make("option", { value: name, textContent: name })));
  $("init").append(init.element);
  $("strength").addEventListener("input", () => { strengthMoved = true; suggest(); });
  suggest();
  for (const id of ["width", "height"]) $(id).addEventListener("change", resize);
  $("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e6); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); }
  });
  $("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
  $("stop").addEventListener("click", () => stopping?.abort());
  refresh();
}

function suggest() { // what is painted is drawn anew as a whole, unless another strength was chosen
  if (!strengthMoved) $("strength").value = init.painted ? 1 : 0.6;
  $("strength-said").textContent = $("strength").value;
}

function resize() {
  for (const input of Object.values(inputs)) input.resize?.(size());
}

function refresh() { // as the chosen models are asked, and what is usual for the first of them
  const fields = new Set(chosen().flatMap((model) => model.fields)), model = usual();
  for (const [name, input] of Object.entries(inputs)) input.box.hidden = !fields.has(name);
  for (const id of ["prompt-label", "negative-label"]) $(id).hidden = !fields.has("caption");
  $("steps").placeholder = model.steps ?? ""; $("guidance").placeholder = model.guidance ?? "usual";
  [$("height").placeholder, $("width").placeholder] = model.size;
  for (const id of ["height", "width"]) $(id).step = $(id).min = model.factor;
  $("sampler").options[0].textContent = `usual (${model.sampler})`;
  resize();
}

async function request() {
  const said = { models: chosen().map((model) => model.name), prompt: $("prompt").value, negative: $("negative").value, ask: {} };
  for (const id of ["seed", "count", "batch", "steps", "guidance", "width", "height"]) said[id] = numberOf(id);
  said.sampler = $("sampler").value || null;
  if (sliders.length) said.adapters = sliders.map((slider) => Number(slider.value));
  const form = new FormData(), shown = Object.entries(inputs).filter(([, input]) => !input.box.hidden);
  for (const [name, input] of shown) if (input.said) said.ask[name] = input.said();
  const parts = await Promise.all([...shown.map(([, input]) => input), ...($("begin").open ? [init] : [])].map((input) => input.parts?.() ?? {}));
  const pictures = Object.assign({}, ...parts);
  if (pictures.init) said.strength = numberOf("strength");
  const megabytes = Object.values(pictures).reduce((sum, blob) => sum + blob.size, 0) / 2 ** 20;
  if (megabytes > 63) throw new Error(`The pictures are larger than 64 MB together: ${Math.ceil(megabytes)} MB.`);
  form.append("request", JSON.stringify(said));
  for (const [name, blob] of Object.entries(pictures)) form.append(name, blob, name);
  return form;
}

async function draw() {
  if (stopping) return;
  stopping = new AbortController();
  $("draw").disabled = true; $("stop").hidden = false; $("error").textContent = ""; $("status").textContent = "";
  const live = new Live();
  try {
    const answer = await fetch("/draw", { method: "POST", body: await request(), signal: stopping.signal });
    if (!answer.ok) throw new Error((await answer.json()).error);
    for await (const event of lines(answer.body)) live.happens(event);
    $("status").textContent = live.notes.join(" ");
  } catch (error) {
    $("status").textContent = stopping.signal.aborted ? "Stopped." : "";
    if (!stopping.signal.aborted) $("error").textContent = error instanceof TypeError ? "The page's server does not answer: is it closed?" : error.message;
  }
  live.end();
  stopping = null; $("draw").disabled = false; $("stop").hidden = true;
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

class Live { // what is being drawn
  constructor() {
    this.notes = []; this.count = numberOf("count") ?? 1;
    this.head = make("p", { className: "soft" }); this.bar = make("progress", { max: 1, value: 0 });
    this.cells = make("div", { className: this.count > 3 ? "pictures" : "pictures few" });
    $("now").replaceChildren(make("div", { className: "card" }, this.head, this.bar, this.cells));
    $("now").hidden = false;
    if (innerWidth < 960) $("now").scrollIntoView({ behavior: "smooth" });
  }

  happens(event) {
    if (event.error) throw new Error(event.error);
    if (event.note) { this.notes.push(event.note); $("status").textContent = this.notes.join(" "); }
    if (event.waiting !== undefined) this.head.textContent = event.waiting ? `Waiting: ${event.waiting} before this one.` : "";
    if (event.model) {
      this.model = event.model;
      const [height, width] = size();
      this.cells.replaceChildren(...Array.from({ length: this.count }, () => {
        const cell = make("div", { className: "nothing" });
        cell.style.aspectRatio = `${width} / ${height}`;
        return cell;
      }));
    }
    if (event.step) this.step(event);
    if (event.drawing) { this.bar.value = 1; show(event.drawing, true); }
  }

  step({ step, of, first, pictures }) {
    const which = this.count > 1 && first > 0 ? `, from picture ${first + 1}` : "";
    this.head.textContent = `${this.model}: step ${step}${of ? ` of ${of}` : ""}${which}`;
    if (of) this.bar.value = step / of; else this.bar.removeAttribute("value");
    pictures?.forEach((url, i) => {
      const cell = this.cells.children[first + i];
      if (!cell) return;
      const image = cell.tagName === "IMG" ? cell : make("img", { alt: "estimate" });
      image.src = url; image.classList.toggle("small", Math.max(...size()) < 160);
      if (image !== cell) cell.replaceWith(image);
    });
  }

  end() { $("now").hidden = true; $("now").replaceChildren(); }
}

function show(drawing) {
  $("empty").hidden = true;
  let card = document.querySelector(`[data-group="${drawing.group}"]`);
  if (!card) {
    card = make("article", { className: "card" }, make("h2", { textContent: drawing.prompt }), make("div", { className: "sides" }));
    card.dataset.group = drawing.group;
    card.firstChild.hidden = !drawing.prompt;
    $("gallery").prepend(card);
  }
  const few = drawing.pictures.length > 3 ? "pictures" : "pictures few", small = Math.max(...drawing.size) < 160 ? "small" : "";
  const place = (name) => `/drawings/${drawing.folder}/${name}`;
  const pictures = drawing.pictures.map((name, i) => {
    const image = make("img", { src: place(name), alt: `${drawing.prompt} seed ${drawing.seeds[i]}`, className: small });
    const button = make("button", { type: "button", title: `seed ${drawing.seeds[i]}` }, image);
    button.addEventListener("click", () => enlarge(drawing, i, place(name)));
    return button;
  });
  const shown = drawing.shown.map((name) => make("img", { src: place(name), alt: name.split(".")[1], title: name.split(".")[1], className: small }));
  const copy = make("button", { type: "button", textContent: "Copy" });
  copy.addEventListener("click", () => copied(copy, drawing.command));
  const seeds = drawing.seeds.length > 1 ? `seeds ${drawing.seeds[0]} to ${drawing.seeds.at(-1)}` : `seed ${drawing.seeds[0]}`;
  card.lastChild.append(make("div", { className: "side" },
    make("p", { className: "soft", textContent: `${about.models.length > 1 ? `${drawing.model}, ` : ""}${seeds}` }),
    ...(shown.length ? [make("div", { className: "shown" }, ...shown)] : []),
    make("div", { className: few }, ...pictures),
    make("div", { className: "command" }, make("pre", { textContent: drawing.command }), copy)));
}

async function copied(button, text) {
  const before = button.textContent;
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Select it and copy"; }
  setTimeout(() => { button.textContent = before; }, 1500);
}

function enlarge(drawing, i, url) {
  const dialog = $("large"), [image] = dialog.getElementsByTagName("img"), act = (name) => dialog.querySelector(`[data-do=${name}]`);
  image.src = url; image.className = Math.max(...drawing.size) < 160 ? "small" : "";
  dialog.querySelector("p").textContent = `seed ${drawing.seeds[i]}. The command draws it again, as samples/${drawing.pictures[i]}:`;
  dialog.querySelector("pre").textContent = drawing.command;
  act("copy").onclick = () => copied(act("copy"), drawing.command);
  act("begin").onclick = async () => {
    await init.set(await (await fetch(url)).blob());
    $("begin").open = true; dialog.close(); $("begin").scrollIntoView({ block: "nearest" });
  };
  act("save").href = url; act("save").download = `${drawing.folder}-${drawing.pictures[i]}`;
  act("close").onclick = () => dialog.close();
  dialog.showModal();
}

buildForm();
for (const drawing of await (await fetch("/drawings")).json()) show(drawing);
document.body.dataset.ready = "yes";
