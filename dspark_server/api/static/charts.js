// Small SVG charts. Each function draws anew into its element; colours come from the style sheet by class.

const SVG = "http://www.w3.org/2000/svg";

function node(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function canvas(element, width, height, label) {
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  element.replaceChildren(svg);
  return svg;
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** A round number at or above `value`, for the top of an axis. */
export function nice(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
  return power * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.999);
}

/** Value at x of a curve given by rising points, straight between them. */
export function interpolate(points, x) {
  const right = points.findIndex(([at]) => at >= x);
  if (right < 0) return points.at(-1)[1];
  if (right === 0) return points[0][1];
  const [[x0, y0], [x1, y1]] = [points[right - 1], points[right]];
  return y0 + ((y1 - y0) * (x - x0)) / (x1 - x0);
}

/** The SPS curve, this step's Theta over it, and the B that was chosen. costs: [[B, milliseconds]]. */
export function drawScheduler(element, costs, picture) {
  const [width, height, left, right, top, bottom] = [440, 250, 36, 40, 26, 34];
  if (!costs.length) {
    const note = document.createElement("p");
    note.className = "empty";
    note.textContent = "The policies loaded need no cost table, so none was measured: start with selection causal.";
    element.replaceChildren(note);
    return;
  }
  const speeds = costs.map(([tokens, ms]) => [tokens, 1000 / ms]);
  const theta = picture?.theta ?? [];
  const reach = Math.max(picture?.tokens ?? 0, theta.at(-1)?.[0] ?? 0, 15);
  const most = Math.min(costs.at(-1)[0], nice(reach * 1.15));
  const x = (tokens) => left + ((width - left - right) * tokens) / most;
  const ceiling = nice(speeds[0][1]);
  const y = (speed) => height - bottom - ((height - top - bottom) * speed) / ceiling;
  const thetaCeiling = nice(Math.max(1, ...theta.map(([, value]) => value)) * 1.1);
  const yTheta = (value) => height - bottom - ((height - top - bottom) * value) / thetaCeiling;
  const label = picture
    ? `Steps per second over tokens per pass. This step ran ${picture.tokens} tokens.`
    : "Steps per second over tokens per pass.";
  const svg = canvas(element, width, height, label);
  if (picture) {
    const fixed = picture.tokens - picture.drafts;
    svg.append(node("rect", { class: "fixed", x: x(0), y: top, width: x(fixed) - x(0), height: height - top - bottom }));
  }
  svg.append(node("path", { class: "axis", d: `M${left} ${height - bottom}H${width - right}` }));
  for (const part of [0, 0.5, 1]) {
    const tokens = Math.round(most * part);
    svg.append(node("text", { x: x(tokens), y: height - bottom + 14, "text-anchor": "middle" }, tokens));
    if (part) {
      svg.append(node("text", { x: left - 6, y: y(ceiling * part) + 4, "text-anchor": "end" }, round(ceiling * part)));
      if (theta.length)
        svg.append(
          node("text", { class: "theta-text", x: width - right + 6, y: yTheta(thetaCeiling * part) + 4 },
            round(thetaCeiling * part)),
        );
    }
  }
  svg.append(node("text", { x: left - 30, y: 12 }, "SPS, steps/s"));
  svg.append(node("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "B, tokens in the pass"));
  const shown = [[1, interpolate(speeds, 1)], ...speeds.filter(([b]) => b > 1 && b < most), [most, interpolate(speeds, most)]];
  svg.append(node("path", { class: "sps", d: path(shown.map(([b, s]) => [x(b), y(s)])) }));
  if (theta.length) {
    svg.append(node("text", { class: "theta-text", x: width, y: 12, "text-anchor": "end" }, "Θ, tokens/s expected"));
    svg.append(node("path", { class: "theta", d: path(theta.map(([b, value]) => [x(b), yTheta(value)])) }));
  }
  if (picture) {
    const at = x(picture.tokens);
    svg.append(node("path", { class: "chosen", d: `M${at} ${top}V${height - bottom}` }));
    svg.append(node("circle", { class: "dot", cx: at, cy: y(interpolate(speeds, picture.tokens)), r: 5 }));
    if (picture.expected !== null) svg.append(node("circle", { class: "dot", cx: at, cy: yTheta(picture.expected), r: 5 }));
    const end = at > width - 110;
    svg.append(
      node("text", { class: "chosen-text", x: at + (end ? -7 : 7), y: top + 10, "text-anchor": end ? "end" : "start" },
        `B = ${picture.tokens}`),
    );
  }
}

/** Bars of acceptance; rates [[accepted, verified]] by position. */
export function drawAcceptance(element, rates) {
  const shown = rates.filter(([, verified]) => verified > 0);
  const [width, height, top, bottom] = [440, 220, 18, 20];
  const count = Math.max(shown.length, 7);
  const text = shown.map(([a, v], i) => `${i + 1}: ${Math.round((100 * a) / v)} %`).join(", ");
  const svg = canvas(element, width, height, `Acceptance by position. ${text || "Nothing verified yet."}`);
  const step = width / count;
  for (let i = 0; i < count; i++) {
    const [accepted, verified] = shown[i] ?? [0, 0];
    const share = verified ? accepted / verified : 0;
    const bar = { x: i * step + 4, width: step - 8, rx: 4 };
    const tall = height - top - bottom;
    svg.append(node("rect", { class: "bar-back", ...bar, y: top, height: tall }));
    svg.append(node("rect", { class: "bar", ...bar, y: top + tall * (1 - share), height: tall * share }));
    const middle = { x: (i + 0.5) * step, "text-anchor": "middle" };
    svg.append(node("text", { ...middle, y: height - 5 }, i + 1));
    if (verified) svg.append(node("text", { class: "strong", ...middle, y: top - 5 }, `${Math.round(100 * share)}`));
  }
}

/** One step's seconds as one bar; parts {draft, verify, host} in milliseconds. */
export function drawParts(element, parts) {
  const [width, height] = [440, 44];
  const entries = Object.entries(parts);
  const all = entries.reduce((sum, [, ms]) => sum + ms, 0);
  const words = entries.map(([name, ms]) => `${name} ${ms.toFixed(1)} ms`);
  const svg = canvas(element, width, height, `A step: ${words.join(", ") || "none yet"}.`);
  svg.append(node("rect", { class: "bar-back", width, height: 14, y: 4, rx: 4 }));
  let left = 0;
  entries.forEach(([name, ms], index) => {
    const wide = all ? (width * ms) / all : 0;
    svg.append(node("rect", { class: `part-${name}`, x: left, y: 4, width: Math.max(0, wide - 1.5), height: 14, rx: 2 }));
    left += wide;
    svg.append(node("rect", { class: `part-${name}`, x: index * 150, y: 28, width: 9, height: 9, rx: 2 }));
    svg.append(node("text", { x: index * 150 + 14, y: 37 }, all ? words[index] : name));
  });
}

/** Budget per request (line) over requests running (area); samples [{at, budget, running}], the newest last. */
export function drawHistory(element, samples, seconds) {
  const [width, height, left, right, top, bottom] = [440, 150, 26, 30, 20, 18];
  const now = samples.at(-1)?.at ?? 0;
  const x = (at) => width - right - ((width - left - right) * (now - at)) / seconds;
  const most = nice(Math.max(4, ...samples.map((s) => s.running)));
  const high = nice(Math.max(2, ...samples.map((s) => s.budget ?? 0)));
  const scale = (value, limit) => height - bottom - ((height - top - bottom) * value) / limit;
  const last = samples.at(-1);
  const label = last ? `${last.running} requests run; budget per request ${last.budget?.toFixed(1) ?? "unknown"}.` : "";
  const svg = canvas(element, width, height, label);
  svg.append(node("text", { class: "chosen-text", x: 0, y: 12 }, "budget per request"));
  svg.append(node("text", { x: width, y: 12, "text-anchor": "end" }, "requests running"));
  if (samples.length > 1) {
    const area = samples.map((s) => [x(s.at), scale(s.running, most)]);
    const from = area[0][0].toFixed(1);
    svg.append(node("path", { class: "load", d: `${path(area)}V${height - bottom}H${from}Z` }));
    let line = [];
    for (const sample of [...samples, { budget: null }]) {
      if (sample.budget !== null) line.push([x(sample.at), scale(sample.budget, high)]);
      else if (line.length) {
        if (line.length > 1) svg.append(node("path", { class: "budget", d: path(line) }));
        line = [];
      }
    }
  }
  svg.append(node("path", { class: "axis", d: `M${left} ${height - bottom}H${width - right}` }));
  svg.append(node("text", { x: left - 5, y: top + 6, "text-anchor": "end" }, round(high)));
  svg.append(node("text", { x: left - 5, y: height - bottom, "text-anchor": "end" }, 0));
  svg.append(node("text", { x: width - right + 5, y: top + 6 }, most));
  svg.append(node("text", { x: left, y: height - 3 }, `${seconds} s ago`));
  svg.append(node("text", { x: width - right, y: height - 3, "text-anchor": "end" }, "now"));
}

const round = (value) => (value >= 10 ? Math.round(value) : Math.round(value * 10) / 10);
