// Cards of clusters. Their images are put in when they come near the screen, and taken out when they leave it.
const cards = new Map();
const sheets = new Map();
const KINDS = ["nearest", "between", "farthest"];

function sheetOf(cluster) {
  if (!sheets.has(cluster)) {
    const bytes = Uint8Array.from(atob(data.clusters[cluster].sheet), (sign) => sign.charCodeAt(0));
    sheets.set(cluster, URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
  }
  return sheets.get(cluster);
}

function tile(cluster, index, says) {
  const one = data.clusters[cluster];
  const box = document.createElement("span");
  box.className = "tile";
  if (!one.sheet) return box;
  const image = new Image();
  const columns = Math.min(data.columns, one.keys.length);
  image.src = sheetOf(cluster);
  image.alt = says;
  image.draggable = false;
  image.style.width = `calc(var(--tile) * ${columns})`;
  image.style.left = `calc(var(--tile) * ${-(index % data.columns)})`;
  image.style.top = `calc(var(--tile) * ${-Math.floor(index / data.columns)})`;
  box.append(image);
  return box;
}

// Places, among the images of a cluster by distance, of those that stand on its card.
function chosen(cluster) {
  const count = data.clusters[cluster].keys.length;
  if (!data.clusters[cluster].sheet) return;
  const few = data.chosen;
  const all = [...Array(count).keys()];
  if (count <= 3 * few) return [all.slice(0, few), all.slice(few, 2 * few), all.slice(2 * few)];
  const inner = all.slice(few, -few);
  // Steps of a golden ratio fall all over the middle, and the same each time.
  const picked = all.slice(0, few).map((step) => inner[Math.floor((((step + 1) * 0.618034) % 1) * inner.length)]);
  return [all.slice(0, few), [...new Set(picked)].sort((one, other) => one - other), all.slice(-few)];
}

function fill(card) {
  const cluster = Number(card.dataset.cluster);
  if (!data.clusters[cluster].sheet) return;
  const few = data.clusters[cluster].keys.length <= 3 * data.chosen;
  chosen(cluster).forEach((places, kind) => {
    const strip = card.querySelector(`.${KINDS[kind]}`);
    strip.dataset.kind = few ? "" : KINDS[kind];
    strip.replaceChildren(...places.map((index) => tile(cluster, index, "")));
  });
}

const empty = (card) => data.clusters[card.dataset.cluster].sheet && card.querySelectorAll(".strip").forEach((strip) => strip.replaceChildren());

const rounded = (value) => (value === null || value === undefined ? null : value.toFixed(2));

function factsOf(one) {
  const facts = [`${one.size.toLocaleString("en")} image${one.size === 1 ? "" : "s"}`];
  for (const name of ["cohesion", "margin", "purity"]) if (rounded(one[name]) !== null) facts.push(`${name} ${rounded(one[name])}`);
  return facts.join(" · ");
}

const titleOf = (cluster) => (nameOf(cluster) ? `${cluster} ${nameOf(cluster)}` : isJunk(cluster) ? `${cluster} (junk)` : `${cluster}`);

function neighbours(cluster) {
  const label = document.createElement("span");
  label.textContent = "near";
  return [label, ...data.clusters[cluster].near.map((other) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "to";
    button.dataset.cluster = other;
    button.textContent = titleOf(other);
    button.setAttribute("aria-label", `Open cluster ${titleOf(other)}`);
    return button;
  })];
}

function makeCard(cluster) {
  const one = data.clusters[cluster];
  const card = document.getElementById("card").content.firstElementChild.cloneNode(true);
  card.dataset.cluster = cluster;
  card.querySelector(".number").textContent = cluster;
  card.querySelector(".pick").setAttribute("aria-label", `Choose cluster ${cluster}`);
  card.querySelector(".name").setAttribute("aria-label", `Name of cluster ${cluster}`);
  card.querySelector(".junk").setAttribute("aria-label", `Cluster ${cluster} is junk`);
  card.querySelector(".facts").textContent = factsOf(one);
  card.querySelector(".class").textContent = one.class && `mostly ${one.class}`;
  const open = card.querySelector(".open");
  open.setAttribute("aria-label", `Open cluster ${cluster}, ${one.size} images`);
  if (!one.sheet) open.textContent = one.keys.length ? "see its images" : "empty";
  open.disabled = !one.keys.length;
  return card;
}

function refresh(cluster, card) {
  const name = nameOf(cluster);
  const field = card.querySelector(".name");
  if (document.activeElement !== field) field.value = name ?? "";
  card.classList.toggle("is-junk", isJunk(cluster));
  card.querySelector(".junk").setAttribute("aria-pressed", isJunk(cluster));
  card.querySelector(".near").replaceChildren(...neighbours(cluster));
}
