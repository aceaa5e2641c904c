// Reads the figures off a chart at the pointer. The page can be read without it.
"use strict";
for (const chart of document.querySelectorAll(".chart")) {
  const panels = JSON.parse(chart.dataset.hover);
  const svg = chart.querySelector(":scope > svg");
  if (!panels.length) continue;
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  let tip = null, cross = null;
  const leave = () => { tip?.remove(); cross?.remove(); tip = cross = null; };
  const short = (value) => Number(value.toPrecision(4)).toLocaleString("en").replace("-", "−");
  const text = (value) => Math.abs(value) >= 1e-3 || value === 0 ? short(value) : value.toExponential(2);
  const hidden = (run) => document.getElementById("show" + run)?.checked === false;

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = (event.clientX - box.left) / box.width * width;
    const py = (event.clientY - box.top) / box.height * height;
    const at = (p) => p.x[2] + (px - p.x[0]) / (p.x[1] - p.x[0]) * (p.x[3] - p.x[2]);
    const inside = panels.filter((p) => px >= p.x[0] - 4 && px <= p.x[1] + 4 && py >= p.y[1] && py <= p.y[0]);
    leave();
    if (!inside.length) return;
    const panel = inside[0];
    const rows = [];
    let nearest = null;
    for (const curve of panel.curves) {
      if (hidden(curve.run)) continue;
      let best = -1;
      for (let i = 0; i < curve.x.length; i++) {
        if (curve.y[i] === null) continue;
        if (best < 0 || Math.abs(curve.x[i] - at(panel)) < Math.abs(curve.x[best] - at(panel))) best = i;
      }
      if (best < 0) continue;
      rows.push([curve, curve.x[best], curve.y[best]]);
      if (nearest === null || Math.abs(curve.x[best] - at(panel)) < Math.abs(nearest - at(panel))) nearest = curve.x[best];
    }
    if (nearest === null) return;
    const place = panel.x[0] + (nearest - panel.x[2]) / (panel.x[3] - panel.x[2]) * (panel.x[1] - panel.x[0]);
    cross = document.createElementNS(svg.namespaceURI, "line");
    for (const [name, value] of [["class", "cross"], ["x1", place], ["x2", place], ["y1", panel.y[0]], ["y2", panel.y[1]]])
      cross.setAttribute(name, value);
    svg.append(cross);
    tip = document.createElement("div");
    tip.className = "tip";
    const head = document.createElement("div");
    head.textContent = (panel.step ? "step " : "KL ") + text(nearest);
    tip.append(head);
    for (const [curve, x, y] of rows) {
      const row = document.createElement("div");
      const colour = document.createElement("i");
      const name = document.createElement("span");
      const value = document.createElement("b");
      colour.style.background = `var(--s${curve.colour})`;
      name.textContent = curve.name + (x === nearest ? "" : panel.step ? ` (step ${text(x)})` : ` (KL ${text(x)})`);
      value.textContent = text(y);
      row.append(colour, name, value);
      tip.append(row);
    }
    chart.append(tip);
    const frame = chart.getBoundingClientRect();
    const left = box.left - frame.left + place / width * box.width;
    tip.style.left = (left + 14 + tip.offsetWidth > frame.width ? Math.max(0, left - 14 - tip.offsetWidth) : left + 14) + "px";
    tip.style.top = Math.max(0, event.clientY - frame.top - tip.offsetHeight / 2) + "px";
  });
  svg.addEventListener("pointerleave", leave);
}
