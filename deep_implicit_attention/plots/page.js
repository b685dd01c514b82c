"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// An array from −1 to 1 that was packed into 16 bits; the answer, called with indices, gives one
// number, NaN where what was packed is not finite.
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.codes), (c) => c.charCodeAt(0));
  const codes = new DataView(bytes.buffer);
  return (...index) => {
    const code = codes.getInt16(2 * index.reduce((sum, k, axis) => sum * packed.shape[axis] + k, 0), true);
    return code === -32768 ? NaN : code / 32767;
  };
}

const read = {};
for (const [name, value] of Object.entries(data))
  if (value && value.codes !== undefined) read[name] = unpack(value);

// The colours of cividis, which every eye sees in the same order: dark blue at 0, yellow at 1.
const CIVIDIS = [[0, 34, 78], [60, 77, 110], [124, 123, 120], [187, 173, 108], [254, 232, 56]];
const between = (start, end, t) => `rgb(${start.map((c, i) => Math.round(c + t * (end[i] - c))).join(",")})`;

function shade(part) {
  if (Number.isNaN(part)) return GREY;
  const t = 4 * Math.max(0, Math.min(1, part)), k = Math.min(3, Math.floor(t));
  return between(CIVIDIS[k], CIVIDIS[k + 1], t - k);
}

const GREY = "#9a9a9a"; // what is not finite

// The paper at 0, blue below it, orange above.
const ends = {};
function signed(value) {
  if (Number.isNaN(value)) return GREY;
  return between(ends.paper, value < 0 ? ends.minus : ends.plus, Math.min(1, Math.abs(value)));
}

function canvas(id, width, height) {
  const element = $(id), scale = window.devicePixelRatio || 1;
  element.width = width * scale; element.height = height * scale;
  element.style.width = `${width}px`;
  const context = element.getContext("2d");
  context.scale(scale, scale);
  context.font = "12px system-ui, sans-serif";
  return context;
}

const finite = (number) => typeof number === "number" && Number.isFinite(number);
const percent = (p) => (finite(p) ? `${(100 * p).toFixed(1)} %` : "not finite");
const small = (r) => (finite(r) ? r.toExponential(1) : "not finite");
const stepName = (k) => {
  if (k < data.steps.length) return `step ${data.steps[k]}`;
  return data.solved[state.example] ? "equilibrium, by the solver" : "best answer of the solver, which reached no equilibrium";
};
// Of an example whose solver failed there is nothing to be away from.
function away(e, k) {
  if (!data.solved[e]) return "the solver reached no equilibrium";
  const distance = data.distances[e][k];
  if (!finite(distance)) return "its distance from equilibrium is not finite";
  return distance < 10 ? `${percent(distance)} away from equilibrium` : `${small(distance)} times its length away from equilibrium`;
}
// What the colours of a scale mean where a relaxation that runs away leaves it.
const beyond = () => (data.clipped ? ", and beyond." : ".") + (data.broken ? " Grey: not finite." : "");
const frames = data.steps.length + 1;
const state = { example: 0, step: frames - 1, place: 0 };

function bars(rows) { // [name, probability, emphasised]
  $("bars").innerHTML = "";
  const best = Math.max(...rows.map((row) => row[1]).filter(finite));
  for (const [name, p, bold] of rows) {
    const label = document.createElement(bold ? "b" : "span");
    label.textContent = name;
    const track = document.createElement("span"), fill = document.createElement("span"), number = document.createElement("span");
    track.className = "track"; fill.className = p === best ? "fill best" : "fill";
    fill.style.cssText = `display:block;width:${finite(p) ? 100 * p : 0}%`;
    track.append(fill);
    number.textContent = percent(p);
    $("bars").append(label, track, number);
  }
}

function course(lines) { // [probabilities by frame, colour, width, dash]
  const width = 300, height = 150, left = 42, bottom = 24, c = canvas("course", width, height);
  const x = (k) => left + 6 + (width - left - 14) * k / Math.max(1, frames - 1);
  const y = (p) => 6 + (height - bottom - 12) * (1 - p);
  c.fillStyle = c.strokeStyle = ink("--soft");
  c.textAlign = "right";
  for (const p of [0, 0.5, 1]) {
    c.globalAlpha = 0.35; c.beginPath(); c.moveTo(left, y(p)); c.lineTo(width, y(p)); c.stroke(); c.globalAlpha = 1;
    c.fillText(`${100 * p} %`, left - 3, y(p) + 4);
  }
  c.textAlign = "center"; c.fillText(`step ${data.steps[0]}`, x(0) + 8, height - 6); c.fillText(data.solved[state.example] ? "eq." : "solver", x(frames - 1) - (data.solved[state.example] ? 6 : 14), height - 6);
  for (const [values, colour, size, dash] of lines) {
    c.strokeStyle = colour; c.lineWidth = size; c.setLineDash(dash); c.beginPath();
    values.forEach((p, k) => { // NaN are gaps
      if (finite(p)) finite(values[k - 1]) ? c.lineTo(x(k), y(p)) : c.moveTo(x(k), y(p));
    });
    c.stroke();
  }
  c.setLineDash([]); c.lineWidth = 1.5; c.strokeStyle = ink("--ink");
  c.beginPath(); c.moveTo(x(state.step), 4); c.lineTo(x(state.step), height - bottom); c.stroke();
}

const range = (n) => Array.from({ length: n }, (_, k) => k);

const image = {
  choose() {
    data.examples.forEach((one, k) => {
      const mark = one.label === one.read ? "" : " (wrong)";
      const read = one.read === null ? "not read, its scores are not finite" : `read as ${data.classes[one.read]}${mark}`;
      $("example").append(new Option(`no. ${one.index}: a ${data.classes[one.label]}, ${read}`, k));
    });
  },
  draw() {
    const { example: e, step: k } = state, one = data.examples[e];
    const p = range(data.classes.length).map((c) => read.probabilities(e, k, c));
    const best = p.indexOf(Math.max(...p));
    const said = p.every(finite) ? `read as ${data.classes[best]} with ${percent(p[best])}` : "not read, the probabilities are not finite";
    $("status").textContent = `${stepName(k)}: ${said}; relative residual ${small(data.residuals[e][k])}; ${away(e, k)}.`;
    $("step").setAttribute("aria-valuetext", stepName(k));
    const size = 160, [height, width, channels] = data.pixels.shape.slice(1);
    const pixels = canvas("image", size, size);
    for (const r of range(height)) for (const q of range(width)) {
      const v = range(3).map((c) => Math.round(255 * read.pixels(e, r, q, Math.min(c, channels - 1))));
      pixels.fillStyle = `rgb(${v.join(",")})`;
      pixels.fillRect(q * size / width, r * size / height, size / width + 0.5, size / height + 0.5);
    }
    pixels.strokeStyle = ink("--accent"); pixels.lineWidth = 1;
    for (const g of range(data.grid + 1)) {
      const at = Math.min(size - 0.5, g * size / data.grid + 0.5);
      pixels.strokeRect(at, 0, 0, size); pixels.strokeRect(0, at, size, 0);
    }
    const cell = size / data.grid, off = data.token ? 1 : 0, shift = off ? cell + 12 : 0;
    const map = canvas("lengths", size + shift, size + 16);
    const place = (i) => (i < off ? [0, (size - cell) / 2] : [shift + ((i - off) % data.grid) * cell, Math.floor((i - off) / data.grid) * cell]);
    for (const i of range(off + data.grid ** 2)) {
      map.fillStyle = shade(read.lengths(e, k, i));
      map.fillRect(...place(i), cell + 0.5, cell + 0.5);
    }
    map.fillStyle = ink("--soft");
    if (off) map.fillText("class", 2, (size + cell) / 2 + 14);
    $("lengths-legend").textContent = `Dark blue 0 to yellow ${data.length.toPrecision(3)} (dimensionless)${beyond()}` + (off ? " The class token lies beside the patches." : "");
    const [, , sites, parts] = data.z.shape, tall = Math.max(2, Math.min(14, 260 / sites)), wide = Math.max(3, Math.min(16, 260 / parts));
    const matrix = canvas("sites", wide * parts, tall * sites);
    for (const i of range(sites)) for (const a of range(parts)) {
      matrix.fillStyle = signed(read.z(e, k, i, a));
      matrix.fillRect(a * wide, i * tall, wide + 0.5, tall + 0.5);
    }
    $("sites-legend").textContent = `A row a site${off ? ", the class token first" : ""}; ${parts} of ${data.dim} components. Blue −${data.size.toPrecision(3)}, orange +${data.size.toPrecision(3)}${beyond()}`;
    bars(p.map((v, c) => [data.classes[c], v, c === one.label]));
    course(range(data.classes.length).map((c) => {
      const values = range(frames).map((t) => read.probabilities(e, t, c));
      if (c === one.read) return [values, ink("--accent"), 2.5, []];
      return [values, ink(c === one.label ? "--warn" : "--soft"), c === one.label ? 2 : 0.7, c === one.label ? [5, 3] : []];
    }));
  },
};

const visible = (character) => ({ "\n": "↵", " ": "␣", "\t": "⇥" })[character] || character;

const text = {
  choose() {
    data.windows.forEach((one, k) => $("example").append(new Option(`${k + 1}: ${Array.from(one).slice(0, 24).map(visible).join("")}…`, k)));
    $("place").max = data.top.shape[2] - 1;
    state.place = data.top.shape[2] - 1;
    $("place").value = state.place;
    $("place").addEventListener("input", () => { state.place = Number($("place").value); show(); });
  },
  draw() {
    const { example: e, step: k, place: t } = state, characters = Array.from(data.windows[e]);
    const top = range(data.top.shape[3]).map((r) => [data.vocabulary[data.ids[e][k][t][r]], read.top(e, k, t, r)]);
    const next = t + 1 < characters.length ? characters[t + 1] : null;
    const known = top.every((row) => finite(row[1])), loss = data.losses[e][k];
    const said = known ? `the likeliest is ${visible(top[0][0])} with ${percent(top[0][1])}` : "nothing is the likeliest, the probabilities are not finite";
    $("status").textContent = `${stepName(k)}: after ${visible(characters[t])} at position ${t + 1} ${said}; ` +
      `mean loss of the window ${finite(loss) ? `${loss.toFixed(3)} nats` : "not finite"}; ` +
      `relative residual ${small(data.residuals[e][k])}.`;
    $("step").setAttribute("aria-valuetext", stepName(k));
    $("place").setAttribute("aria-valuetext", `position ${t + 1}, ${visible(characters[t])}`);
    $("text").innerHTML = "";
    characters.slice(0, data.top.shape[2]).forEach((character, i) => {
      const span = document.createElement("span");
      span.textContent = visible(character);
      const p = i ? read.next(e, k, i - 1) : 0;
      span.style.background = `color-mix(in srgb, var(--accent) ${Math.round(70 * (p || 0))}%, transparent)`;
      const pull = i === t ? 0 : read.couplings(e, t, i) || 0;
      span.style.borderBottomColor = `color-mix(in srgb, var(--warn) ${Math.round(100 * pull)}%, transparent)`;
      span.title = i ? `${percent(p)}` : "";
      if (i === t) span.setAttribute("aria-current", "true");
      span.addEventListener("click", () => { state.place = i; $("place").value = i; show(); });
      $("text").append(span);
    });
    bars(!known ? [] : top.map(([character, p]) => [visible(character), p, character === next]));
    course([[range(frames).map((f) => read.next(e, f, t)), ink("--accent"), 2.5, []]]);
    const sites = data.top.shape[2], wide = Math.max(3, Math.min(8, 320 / sites));
    const map = canvas("lengths", wide * sites, 40);
    for (const i of range(sites)) {
      map.fillStyle = shade(read.lengths(e, k, i));
      map.fillRect(i * wide, i === t ? 0 : 8, wide + 0.5, 32);
    }
    $("lengths-legend").textContent = `Positions from left to right; dark blue 0 to yellow ${data.length.toPrecision(3)} (dimensionless)${beyond()}`;
  },
};

const view = data.kind === "text" ? text : image;

function show() {
  for (const name of ["paper", "plus", "minus"])
    ends[name] = [1, 3, 5].map((k) => parseInt(ink(`--${name}`).slice(k, k + 2), 16));
  view.draw();
}

function go(step) {
  state.step = Math.max(0, Math.min(frames - 1, step));
  $("step").value = state.step;
  show();
}

let timer = null;
function play() {
  if (timer !== null) { clearInterval(timer); timer = null; $("play").textContent = "Play"; return; }
  $("play").textContent = "Stop";
  go(0);
  timer = setInterval(() => (state.step + 1 < frames ? go(state.step + 1) : play()), 350);
}

view.choose();
$("step").max = frames - 1;
$("example").addEventListener("change", () => { state.example = Number($("example").value); show(); });
$("step").addEventListener("input", () => go(Number($("step").value)));
$("play").addEventListener("click", play);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
go(0);
