"use strict";
const root = document.documentElement;
const fail = (text) => { root.dataset.error = (root.dataset.error || "") + text + "; "; };
addEventListener("error", (e) => fail(e.message));
addEventListener("securitypolicyviolation", (e) => fail("asked for " + e.blockedURI));

// what a mark stands for, beside the pointer
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (e) => {
  const mark = e.target.closest ? e.target.closest("[data-tip]") : null;
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.left = left + "px";
  tip.style.top = Math.max(4, e.clientY - tip.offsetHeight - 10) + "px";
});

// a key of a legend hides and shows its marks in the charts beside it
for (const key of document.querySelectorAll(".legend-key[data-series]")) {
  key.addEventListener("click", () => {
    const off = key.classList.toggle("off");
    const around = key.closest(".block") || key.closest("section");
    for (const mark of around.querySelectorAll(`svg [data-series="${key.dataset.series}"]`)) mark.classList.toggle("hidden-series", off);
  });
}

// a plan's dot and its row are picked together
for (const section of document.querySelectorAll("section")) {
  const pick = (number) => {
    for (const item of section.querySelectorAll("[data-pick], tr[data-row]"))
      item.classList.toggle("picked", (item.dataset.pick ?? item.dataset.row) === number);
  };
  for (const dot of section.querySelectorAll("[data-pick]")) dot.addEventListener("click", () => pick(dot.dataset.pick));
  for (const row of section.querySelectorAll("tr[data-row]")) row.addEventListener("click", () => pick(row.dataset.row));
}
root.dataset.charts = document.querySelectorAll("svg.chart").length;
root.dataset.ready = "yes";
