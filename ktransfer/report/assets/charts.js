// Charts: Vega draws them when they come near the screen, and again when the browser turns dark or light.
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();

function look() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const text = { labelColor: colour("--soft"), titleColor: colour("--soft"), labelFontSize: 12, titleFontSize: 12 };
  return {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: colour("--line") },
    axis: { ...text, gridColor: colour("--line"), domainColor: colour("--line"), tickColor: colour("--line"), gridOpacity: 0.6 },
    legend: { ...text, labelColor: colour("--ink") },
    range: { category: dark.matches ? ["#74b6ff", "#ffb454", "#7fd88f", "#e58fd0", "#d9d26a", "#b3a1ff"] : ["#0b5cad", "#c25700", "#1a7f37", "#9c2f86", "#7a6a00", "#5b43c4"] },
  };
}

async function draw(figure) {
  const plot = figure.querySelector(".plot");
  const spec = JSON.parse(figure.querySelector(".spec").textContent);
  figure.dispatchEvent(new CustomEvent("drawing", { detail: spec }));
  const options = { actions: false, renderer: "svg", ast: true, config: look(), tooltip: { theme: dark.matches ? "dark" : "light" } };
  const width = { width: "container", autosize: { type: "fit", contains: "padding" } };
  const result = await vegaEmbed(plot, { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...width, ...spec }, options);
  drawn.get(figure)?.finalize();
  drawn.set(figure, result);
  figure.dispatchEvent(new CustomEvent("drawn", { detail: result.view }));
}

function drawWhenNear() {
  const watch = new IntersectionObserver(
    (seen) => {
      for (const one of seen.filter((each) => each.isIntersecting)) {
        watch.unobserve(one.target);
        draw(one.target);
      }
    },
    { rootMargin: "400px" },
  );
  document.querySelectorAll(".chart").forEach((figure) => watch.observe(figure));
}

addEventListener("load", drawWhenNear); // Vega stands behind this program
dark.addEventListener("change", () => [...drawn.keys()].forEach(draw));
addEventListener("beforeprint", () => document.querySelectorAll(".chart").forEach((figure) => drawn.has(figure) || draw(figure)));
