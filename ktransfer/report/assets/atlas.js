// The atlas: cards that are searched, sorted, filtered, named and merged; and the map.
const picked = new Set();
const CHUNK = 12; // a whole number of rows in 1, 2, 3, 4 and 6 columns
let shownClusters = [];
const near = new IntersectionObserver(
  (seen) => seen.forEach(({ isIntersecting, target }) => [...target.children].forEach(isIntersecting ? fill : empty)),
  { rootMargin: "700px" },
);

function wanted(cluster) {
  const name = nameOf(cluster);
  const shows = part("filter").value;
  if (shows === "open" && name !== undefined) return false;
  if (shows === "named" && !name) return false;
  if (shows === "junk" && name !== "") return false;
  if (shows === "chosen" && !picked.has(cluster)) return false;
  const text = part("search").value.trim().toLowerCase();
  const one = data.clusters[cluster];
  if (!text || text.replace(/^#/, "") === String(cluster)) return true;
  return [name ?? "", one.class, ...one.keys].some((each) => each.toLowerCase().includes(text));
}

function compare(one, other) {
  const by = part("sort").value;
  const value = (cluster) => (by === "cluster" ? cluster : by === "name" ? nameOf(cluster) || null : data.clusters[cluster][by]);
  const [first, second] = [value(one), value(other)];
  if (first === null || second === null) return (first === null) - (second === null) || one - other;
  const sign = part("order").value === "up" ? 1 : -1;
  return sign * (by === "name" ? first.localeCompare(second) : first - second) || one - other;
}

// Cards stand in chunks: those that are far from the screen are neither laid out nor watched one by one.
function arrange() {
  shownClusters = [...cards.keys()].filter(wanted).sort(compare);
  const chunks = [];
  for (let at = 0; at < shownClusters.length; at += CHUNK) {
    const chunk = document.createElement("div");
    chunk.className = "chunk";
    chunk.role = "presentation";
    chunk.append(...shownClusters.slice(at, at + CHUNK).map((cluster) => cards.get(cluster)));
    chunks.push(chunk);
  }
  near.disconnect();
  part("cards").replaceChildren(...chunks);
  chunks.forEach((chunk) => near.observe(chunk));
  part("none").hidden = chunks.length > 0;
  showState();
}

function showState() {
  const clusters = data.clusters.length;
  const done = Object.keys(said.clusters).length;
  const images = Object.keys(said.clusters).reduce((sum, cluster) => sum + (data.clusters[cluster]?.size ?? 0), 0);
  const moved = Object.keys(said.images).length;
  part("state").textContent = `${shownClusters.length} shown; ${done} of ${clusters} named or junk, ${images.toLocaleString("en")} images${moved ? `; ${moved} moved` : ""}${picked.size ? `; ${picked.size} chosen` : ""}`;
  part("merge").disabled = picked.size < 2;
  part("undo").disabled = !past.length;
}

function showNames() {
  for (const [cluster, card] of cards) refresh(cluster, card);
  part("known").replaceChildren(...knownNames().map((name) => new Option(name, name)));
  showState(); // what is shown stays, so that the cursor keeps its place
}

function merge() {
  const all = [...picked].sort((one, other) => one - other);
  const name = part("merged").value.trim() || all.map(nameOf).find(Boolean) || `clusters ${all.join(", ")}`.slice(0, 250);
  picked.clear();
  document.querySelectorAll(".picked").forEach((card) => {
    card.classList.remove("picked");
    card.querySelector(".pick").checked = false;
  });
  part("merged").value = "";
  rename(all, name);
}

async function save() {
  if (served) {
    const answer = await fetch(`${served}names`, { method: "POST", body: toCsv() });
    part("state").textContent = answer.ok ? `Saved in ${await answer.text()}` : `Not saved: ${await answer.text()}`;
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" }));
  link.download = "names.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function load(event) {
  try {
    fromCsv(await event.target.files[0].text());
  } catch (error) {
    part("state").textContent = error.message;
  }
  event.target.value = "";
}

function onCard(event) {
  const card = event.target.closest(".card");
  if (!card) return;
  const cluster = Number(card.dataset.cluster);
  if (event.type === "change" && event.target.matches(".name")) {
    const name = event.target.value.trim();
    rename([cluster], name || null);
  } else if (event.type === "change" && event.target.matches(".pick")) {
    picked[event.target.checked ? "add" : "delete"](cluster);
    card.classList.toggle("picked", event.target.checked);
    showState();
  } else if (event.type === "click" && event.target.closest(".open")) open(cluster);
  else if (event.type === "click" && event.target.matches(".junk")) rename([cluster], isJunk(cluster) ? null : "");
}

// Pictures stand on the map where there is room: those of large clusters first.
async function pictures(points, width, height) {
  const placed = [];
  const far = (one) => placed.every((other) => Math.hypot((one.x - other.x) * width, (one.y - other.y) * height) > 44);
  for (const one of [...points].sort((first, second) => second.size - first.size)) {
    if (!data.clusters[one.cluster].sheet || placed.length >= 150 || !far(one)) continue;
    placed.push(one);
    const image = new Image();
    image.src = sheetOf(one.cluster);
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = data.side;
    canvas.getContext("2d").drawImage(image, 0, 0, data.side, data.side, 0, 0, data.side, data.side);
    one.picture = canvas.toDataURL("image/jpeg", 0.8);
  }
}

function pointsOfMap() {
  const points = data.clusters.map(({ size, cohesion, margin, purity, x, y }, cluster) => ({ cluster, size, cohesion, margin, purity, x, y, name: nameOf(cluster) ?? "" }));
  return points.filter((one) => one.size);
}

async function onMap(event) {
  const view = event.detail;
  const points = pointsOfMap();
  view.addEventListener("click", (_, item) => item?.datum?.cluster !== undefined && open(item.datum.cluster));
  await pictures(points, view.width(), view.height());
  await view.data("clusters", points.map((one) => ({ ...one }))).runAsync();
}

function begin() {
  data.clusters.forEach((_, cluster) => cards.set(cluster, makeCard(cluster)));
  arrange();
  showNames();
  for (const kind of ["click", "change"]) part("cards").addEventListener(kind, onCard);
  document.addEventListener("click", (event) => event.target.matches(".to") && open(Number(event.target.dataset.cluster)));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
    event.preventDefault();
    part("search").focus();
  });
  part("tools").addEventListener("submit", (event) => event.preventDefault());
  part("search").addEventListener("input", arrange);
  for (const id of ["sort", "order", "filter"]) part(id).addEventListener("change", arrange);
  part("merge").addEventListener("click", merge);
  part("undo").addEventListener("click", undo);
  part("save").addEventListener("click", save);
  part("load").addEventListener("change", load);
  document.querySelector(".map").addEventListener("drawing", (event) => (event.detail.datasets = { clusters: pointsOfMap() }));
  document.querySelector(".map").addEventListener("drawn", onMap);
  addEventListener("beforeprint", () => document.querySelectorAll(".card").forEach(fill));
  listeners.push(showNames);
  listenOpened();
}

if (data) begin();
