// What a person gives with a pointer: a picture from a file, a mask painted over it, a map of labels, boxes.

const MOST = 2048; // pixels of a mask's longer side, at most

export function make(tag, settings = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), settings);
  element.append(...inside);
  return element;
}

const png = (canvas) => new Promise((done) => canvas.toBlob(done, "image/png"));

function canvasOf(width, height) {
  return make("canvas", { width, height });
}

function at(event, canvas) { // in [0, 1]
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function follow(canvas, begin, move, end = () => {}) {
  let drawing = false;
  canvas.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    drawing = true;
    begin(at(event, canvas), event);
  });
  canvas.addEventListener("pointermove", (event) => drawing && move(at(event, canvas)));
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, () => { if (drawing) { drawing = false; end(); } });
  }
}

function brush(value) {
  const size = make("input", { type: "range", min: 1, max: 40, value, title: "Width of the brush" });
  return [size, make("label", {}, "Brush", size)];
}

// A picture from a file, from the clipboard or dropped, shown, and handed on as the bytes that came.
export class Picture {
  constructor(name, changed = () => {}) {
    this.name = name; this.blob = null; this.changed = changed;
    this.file = make("input", { type: "file", accept: "image/*" });
    this.file.setAttribute("aria-label", name);
    this.view = make("div");
    this.remove = make("button", { type: "button", textContent: "Remove", hidden: true });
    this.box = make("div", { className: "drop" }, this.file);
    this.tools = make("div", { className: "tools" }, this.remove);
    this.element = make("div", { className: "painter" }, this.box, this.view, this.tools);
    this.file.addEventListener("change", () => this.file.files[0] && this.set(this.file.files[0]));
    this.remove.addEventListener("click", () => this.set(null));
    this.box.addEventListener("dragover", (event) => { event.preventDefault(); this.box.classList.add("over"); });
    this.box.addEventListener("dragleave", () => this.box.classList.remove("over"));
    this.box.addEventListener("drop", (event) => {
      event.preventDefault(); this.box.classList.remove("over");
      if (event.dataTransfer.files[0]) this.set(event.dataTransfer.files[0]);
    });
    this.box.addEventListener("paste", (event) => event.clipboardData.files[0] && this.set(event.clipboardData.files[0]));
  }

  async set(blob) {
    this.blob = blob; this.remove.hidden = !blob;
    if (!blob) this.file.value = "";
    let image = null;
    try { image = blob && await createImageBitmap(blob); } catch { /* what the browser cannot show, the server may read, or refuse */ }
    this.show(image);
    this.changed();
  }

  show(image) {
    this.view.replaceChildren();
    if (!image) return;
    const scale = Math.min(1, MOST / Math.max(image.width, image.height));
    const canvas = canvasOf(Math.max(1, Math.round(image.width * scale)), Math.max(1, Math.round(image.height * scale)));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    this.view.append(enlarged(canvas));
  }

  async parts() {
    return this.blob ? { [this.name]: this.blob } : {};
  }
}

function enlarged(canvas) {
  const small = Math.max(canvas.width, canvas.height) < 160;
  canvas.style.width = small ? "18rem" : "";
  canvas.classList.toggle("small", small);
  return canvas;
}

// A picture and a mask over it: what is painted is drawn anew.
export class Masked extends Picture {
  constructor(name, mask, changed) {
    super(name, changed);
    this.maskName = mask; this.mask = null; this.painted = false;
    const [size, label] = brush(12);
    this.size = size;
    this.erase = make("button", { type: "button", textContent: "Erase" });
    this.clear = make("button", { type: "button", textContent: "Clear" });
    this.erase.setAttribute("aria-pressed", "false");
    this.painting = [this.erase, this.clear, label];
    for (const one of this.painting) one.hidden = true;
    this.tools.append(...this.painting);
    this.erase.addEventListener("click", () => {
      const erases = this.erase.getAttribute("aria-pressed") !== "true";
      this.erase.setAttribute("aria-pressed", erases); this.erase.textContent = erases ? "Paint" : "Erase";
    });
    this.clear.addEventListener("click", () => { this.blank(); this.refresh(); this.changed(); });
  }

  show(image) {
    super.show(image);
    for (const one of this.painting) one.hidden = !image;
    this.mask = null; this.painted = false;
    if (!image) return;
    this.canvas = this.view.querySelector("canvas");
    this.canvas.dataset.mask = this.maskName;
    this.picture = canvasOf(this.canvas.width, this.canvas.height);
    this.picture.getContext("2d").drawImage(this.canvas, 0, 0);
    this.mask = canvasOf(this.canvas.width, this.canvas.height);
    this.blank();
    follow(this.canvas, (point) => { this.last = point; this.stroke(point); }, (point) => this.stroke(point), () => this.changed());
  }

  blank() {
    const pen = this.mask.getContext("2d");
    pen.fillStyle = "#000"; pen.fillRect(0, 0, this.mask.width, this.mask.height);
    this.painted = false;
  }

  stroke(point) {
    const pen = this.mask.getContext("2d"), { width, height } = this.mask, erases = this.erase.getAttribute("aria-pressed") === "true";
    pen.strokeStyle = erases ? "#000" : "#fff"; pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = Math.max(1, this.size.value / 100 * Math.max(width, height));
    pen.beginPath(); pen.moveTo(this.last[0] * width, this.last[1] * height); pen.lineTo(point[0] * width, point[1] * height); pen.stroke();
    this.last = point; this.painted = true;
    this.refresh();
  }

  refresh() {
    const pen = this.canvas.getContext("2d"), { width, height } = this.canvas;
    pen.drawImage(this.picture, 0, 0);
    const shade = canvasOf(width, height), over = shade.getContext("2d");
    over.drawImage(this.mask, 0, 0);
    over.globalCompositeOperation = "multiply"; over.fillStyle = "#f0f"; over.fillRect(0, 0, width, height);
    pen.globalAlpha = 0.6; pen.globalCompositeOperation = "lighten"; pen.drawImage(shade, 0, 0);
    pen.globalAlpha = 1; pen.globalCompositeOperation = "source-over";
  }

  async parts() {
    const parts = await super.parts();
    return this.blob && this.mask && this.painted ? { ...parts, [this.maskName]: await png(this.mask) } : parts;
  }
}

function swatches(field, choose) {
  const buttons = field.names.map((name, i) => {
    const button = make("button", { type: "button", textContent: name, title: `label ${name}` });
    button.style.background = field.colours[i];
    button.addEventListener("click", () => pick(i));
    return button;
  });
  function pick(i) {
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(i === k)));
    choose(i);
  }
  pick(Math.min(1, buttons.length - 1));
  return make("div", { className: "swatches" }, ...buttons);
}

const rgb = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

// Labels as a picture of 24 bits, red + 256 green: browsers that hide what machine they run on read canvases back with noise.
function bmp(labels, width, height) {
  const row = Math.ceil(3 * width / 4) * 4, bytes = new Uint8Array(54 + row * height), head = new DataView(bytes.buffer);
  bytes.set([66, 77]);
  for (const [place, value] of [[2, bytes.length], [10, 54], [14, 40], [18, width], [22, height], [34, row * height]]) {
    head.setUint32(place, value, true);
  }
  head.setUint16(26, 1, true); head.setUint16(28, 24, true);
  labels.forEach((label, i) => {
    bytes.set([0, label >> 8, label % 256], 54 + row * (height - 1 - Math.floor(i / width)) + 3 * (i % width));
  });
  return new Blob([bytes], { type: "image/bmp" });
}

// A map of labels, painted pixel by pixel of the picture that is asked for; or one from a file.
export class LabelMap {
  constructor(name, field, size) {
    this.name = name; this.colours = field.colours.map(rgb); this.label = 1;
    this.canvas = canvasOf(1, 1); this.canvas.dataset.map = name; this.canvas.style.width = "18rem"; this.canvas.classList.add("small");
    const [width, label] = brush(12), fill = make("button", { type: "button", textContent: "Fill" });
    fill.title = "The whole map with this label";
    this.file = new Picture(`ask.${name}`, () => { this.canvas.hidden = Boolean(this.file.blob); });
    this.element = make("div", { className: "painter" }, swatches(field, (i) => { this.label = i; }), this.canvas,
      make("div", { className: "tools" }, fill, label), make("details", {}, make("summary", { textContent: "or from a file" }), this.file.element));
    fill.addEventListener("click", () => { this.labels.fill(this.label); this.refresh(); });
    follow(this.canvas, (point) => { this.last = point; this.stroke(point, width.value); }, (point) => this.stroke(point, width.value));
    this.resize(size);
  }

  resize([height, width]) {
    const old = this.labels, { width: w, height: h } = this.canvas;
    this.labels = new Uint16Array(width * height);
    if (old) {
      for (let i = 0; i < this.labels.length; i++) {
        const x = i % width, y = Math.floor(i / width);
        this.labels[i] = old[Math.floor(y * h / height) * w + Math.floor(x * w / width)];
      }
    }
    this.canvas.width = width; this.canvas.height = height;
    this.refresh();
  }

  stroke(to, size) {
    const { width, height } = this.canvas, radius = Math.max(0.5, size / 200 * Math.max(width, height)), from = this.last;
    const pieces = Math.ceil(Math.hypot((to[0] - from[0]) * width, (to[1] - from[1]) * height) / Math.max(1, radius / 2)) || 1;
    for (let k = 1; k <= pieces; k++) {
      const x = (from[0] + (to[0] - from[0]) * k / pieces) * width, y = (from[1] + (to[1] - from[1]) * k / pieces) * height;
      for (let row = Math.max(0, Math.floor(y - radius)); row <= Math.min(height - 1, y + radius); row++) {
        for (let column = Math.max(0, Math.floor(x - radius)); column <= Math.min(width - 1, x + radius); column++) {
          if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius) this.labels[row * width + column] = this.label;
        }
      }
    }
    this.last = to;
    this.refresh();
  }

  refresh() {
    const pen = this.canvas.getContext("2d"), image = pen.createImageData(this.canvas.width, this.canvas.height);
    this.labels.forEach((label, i) => image.data.set([...this.colours[label], 255], 4 * i));
    pen.putImageData(image, 0, 0);
  }

  async parts() {
    return this.file.blob ? this.file.parts() : { [`map.${this.name}`]: bmp(this.labels, this.canvas.width, this.canvas.height) };
  }
}

// Boxes, drawn from corner to corner, each of one kind.
export class Boxes {
  constructor(name, field, size) {
    this.name = name; this.field = field; this.boxes = []; this.kind = 1;
    this.canvas = canvasOf(1, 1); this.canvas.dataset.boxes = name; this.canvas.style.width = "18rem";
    const back = make("button", { type: "button", textContent: "Undo" }), clear = make("button", { type: "button", textContent: "Clear" });
    this.element = make("div", { className: "painter" }, swatches(field, (i) => { this.kind = i; }), this.canvas,
      make("div", { className: "tools" }, back, clear));
    back.addEventListener("click", () => { this.boxes.pop(); this.refresh(); });
    clear.addEventListener("click", () => { this.boxes = []; this.refresh(); });
    let start = null;
    const inside = (v) => Math.min(1, Math.max(0, v));
    follow(this.canvas, (point) => { start = point; this.boxes.push([this.kind, ...point, ...point]); }, ([x, y]) => {
      const [u, v] = start;
      this.boxes[this.boxes.length - 1] = [this.kind, ...[Math.min(u, x), Math.min(v, y), Math.max(u, x), Math.max(v, y)].map(inside)];
      this.refresh();
    }, () => { this.boxes = this.boxes.filter(([, l, t, r, b]) => r - l > 0.01 && b - t > 0.01); this.refresh(); });
    this.resize(size);
  }

  resize([height, width]) {
    const scale = 400 / Math.max(height, width);
    this.canvas.width = Math.round(width * scale); this.canvas.height = Math.round(height * scale);
    this.refresh();
  }

  refresh() {
    const pen = this.canvas.getContext("2d"), { width, height } = this.canvas;
    pen.clearRect(0, 0, width, height);
    for (const [kind, l, t, r, b] of this.boxes) {
      pen.globalAlpha = 0.45; pen.fillStyle = this.field.colours[kind];
      pen.fillRect(l * width, t * height, (r - l) * width, (b - t) * height);
      pen.globalAlpha = 1; pen.strokeStyle = pen.fillStyle = "#222"; pen.lineWidth = 2; pen.font = "18px sans-serif";
      pen.strokeRect(l * width, t * height, (r - l) * width, (b - t) * height);
      pen.fillText(this.field.names[kind], l * width + 6, t * height + 20);
    }
  }

  said() { return this.boxes; }

  async parts() { return {}; }
}
