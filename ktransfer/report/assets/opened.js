// A cluster opened: all its images by distance, which can be marked and moved to other groups.
const dialog = document.getElementById("opened");
const part = (id) => document.getElementById(id);
const marked = new Set();
let shown = null;
let listed = []; // its images: key, distance, and index in the page or row in the data

function open(cluster) {
  shown = cluster;
  marked.clear();
  listed = served ? [] : data.clusters[cluster].keys.map((key, index) => ({ key, far: data.clusters[cluster].far[index], index }));
  const one = data.clusters[cluster];
  part("opened-facts").textContent = `${factsOf(one)}${!served && one.keys.length < one.size ? `; ${one.keys.length} of its images are in this page` : ""}`;
  showOpened();
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  if (served) more();
}

async function more() {
  const cluster = shown;
  const answer = await fetch(`${served}members/${cluster}/${listed.length}`);
  if (shown !== cluster || !answer.ok) return;
  const found = await answer.json();
  listed.push(...found);
  part("members").append(...found.map(member));
  part("more").hidden = listed.length >= data.clusters[cluster].size;
}

function picture({ index, row }) {
  if (row === undefined) return tile(shown, index, "");
  const box = document.createElement("span");
  const image = new Image();
  box.className = "tile whole";
  image.loading = "lazy";
  image.alt = "";
  image.src = `${served}images/${row}`;
  box.append(image);
  return box;
}

function showOpened() {
  if (shown === null) return;
  part("opened-title").textContent = `Cluster ${titleOf(shown)}`;
  part("opened-near").replaceChildren(...neighbours(shown));
  part("members").replaceChildren(...listed.map(member));
  showMarked();
}

function member(one) {
  const { key } = one;
  const box = document.createElement("button");
  box.type = "button";
  box.className = "member";
  box.dataset.key = key;
  box.setAttribute("aria-pressed", marked.has(key));
  const words = (kind, text) => {
    const line = document.createElement("span");
    line.className = kind;
    line.dir = "auto";
    line.textContent = text;
    return line;
  };
  box.append(picture(one), words("key", key), words("soft", `distance ${one.far.toFixed(3)}`));
  if (movedTo(key) !== undefined) box.append(words("moved", movedTo(key) === "" ? "junk" : `to ${movedTo(key)}`));
  box.title = key;
  return box;
}

function showMarked() {
  part("marked").textContent = marked.size ? `${marked.size} marked` : "";
  part("move").disabled = !marked.size || !part("target").value.trim();
  part("move-junk").disabled = part("back").disabled = !marked.size;
}

function moveMarked(name) {
  const keys = [...marked];
  marked.clear();
  move(keys, name);
}

function step(by) {
  const count = shownClusters.length;
  if (count) open(shownClusters[(shownClusters.indexOf(shown) + by + count) % count]);
}

function listenOpened() {
  part("members").addEventListener("click", (event) => {
    const box = event.target.closest(".member");
    if (!box) return;
    const { key } = box.dataset;
    if (!marked.delete(key)) marked.add(key);
    box.setAttribute("aria-pressed", marked.has(key));
    showMarked();
  });
  part("moving").addEventListener("submit", (event) => {
    event.preventDefault();
    moveMarked(part("target").value.trim());
  });
  part("target").addEventListener("input", showMarked);
  part("move-junk").addEventListener("click", () => moveMarked(""));
  part("back").addEventListener("click", () => moveMarked(null));
  part("previous").addEventListener("click", () => step(-1));
  part("next").addEventListener("click", () => step(1));
  part("more").addEventListener("click", more);
  part("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    cards.get(shown)?.querySelector(".open").focus({ preventScroll: false });
    shown = null;
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.closest("input")) return;
    if (event.key === "ArrowRight") step(1);
    else if (event.key === "ArrowLeft") step(-1);
  });
  listeners.push(showOpened);
}
