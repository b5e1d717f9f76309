"use strict";
const plots = JSON.parse(document.getElementById("plots").textContent);
for (const [name, plot] of Object.entries(plots)) {
  Plotly.newPlot("plot-" + name, plot.data, plot.layout, {responsive: true, displayModeBar: false});
}
const items = [...document.querySelectorAll(".item")];
const texts = items.map(item => item.textContent.toLowerCase());
const search = document.getElementById("search");
search.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  items.forEach((item, i) => { item.hidden = !texts[i].includes(wanted); });
  const found = items.filter(item => !item.hidden).length;
  document.getElementById("found").textContent = wanted ? found + " of " + items.length : "";
});
