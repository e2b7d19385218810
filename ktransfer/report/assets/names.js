// What people say of the clusters: cluster -> name and image -> name, where an empty name is junk. The browser keeps it
// from visit to visit, names.csv from machine to machine.
const COLUMNS = ["cluster", "key", "name", "junk", "clustering"];
const data = JSON.parse(document.getElementById("data")?.textContent ?? "null");
const place = `ktransfer names ${data?.clustering} ${data?.begins}`; // a page that begins with other names forgets
const served = document.querySelector('meta[name="served"]')?.content; // where `report --serve` answers
const past = [];
const listeners = [];
let said = data && (kept() ?? data.names);

function kept() {
  try {
    return JSON.parse(localStorage.getItem(place));
  } catch {
    return null; // some browsers keep nothing for files
  }
}

function change(edit) {
  past.push(JSON.stringify(said));
  edit(said);
  tell();
}

function undo() {
  if (past.length) said = JSON.parse(past.pop());
  tell();
}

function tell() {
  try {
    localStorage.setItem(place, JSON.stringify(said));
  } catch {
    // as above: names.csv can still be saved
  }
  listeners.forEach((listener) => listener());
}

const nameOf = (cluster) => said.clusters[cluster];
const movedTo = (key) => (Object.hasOwn(said.images, key) ? said.images[key] : undefined);
const isJunk = (cluster) => nameOf(cluster) === "";

function rename(clusters, name) {
  change((all) => clusters.forEach((cluster) => (name === null ? delete all.clusters[cluster] : (all.clusters[cluster] = name))));
}

function move(keys, name) {
  change((all) => keys.forEach((key) => (name === null ? delete all.images[key] : (all.images[key] = name))));
}

function knownNames() {
  const names = [...Object.values(said.clusters), ...Object.values(said.images)];
  return [...new Set(names.filter(Boolean))].sort((one, other) => one.localeCompare(other));
}

function toCsv() {
  const field = (value) => (/[",\r\n]|^\s|\s$/.test(value) ? `"${value.replaceAll('"', '""')}"` : String(value));
  const row = (cluster, key, name) => [String(cluster), key, name, name === "" ? "yes" : "", data.clustering];
  const clusters = Object.keys(said.clusters).sort((one, other) => one - other);
  const images = Object.keys(said.images).sort();
  const rows = [COLUMNS, ...clusters.map((one) => row(one, "", nameOf(one))), ...images.map((key) => row("", key, said.images[key]))];
  return rows.map((cells) => cells.map(field).join(",") + "\n").join("");
}

function readCsv(text) {
  const rows = [[""]];
  let quoted = false;
  const whole = text.replace(/^\ufeff/, "");
  for (let at = 0; at < whole.length; at++) {
    const sign = whole[at];
    const cells = rows.at(-1);
    if (quoted && sign === '"' && whole[at + 1] === '"') cells[cells.length - 1] += whole[at++];
    else if (sign === '"') quoted = !quoted;
    else if (!quoted && sign === ",") cells.push("");
    else if (!quoted && sign === "\n") rows.push([""]);
    else if (quoted || sign !== "\r") cells[cells.length - 1] += sign;
  }
  return rows.filter((cells) => cells.length > 1);
}

// Throws an Error with a sentence for people where the file is of another kind or of other clusters.
function fromCsv(text) {
  const [header, ...rows] = readCsv(text);
  const at = Object.fromEntries(COLUMNS.map((name) => [name, header?.indexOf(name) ?? -1]));
  if (["cluster", "key", "name", "junk"].some((name) => at[name] < 0)) throw new Error("This is no file of names.");
  const found = { clusters: {}, images: {} };
  for (const cells of rows) {
    const of = at.clustering < 0 ? "" : cells[at.clustering];
    if (of && of !== data.clustering) throw new Error("These names are of another clustering.");
    const name = cells[at.junk] === "yes" ? "" : cells[at.name];
    if (cells[at.key]) found.images[cells[at.key]] = name;
    else found.clusters[cells[at.cluster]] = name;
  }
  change((all) => Object.assign(all, found));
}
