// Boxes of images by their score.
const score = document.getElementById("score");

function showBoxes() {
  const least = Number(score.value);
  document.getElementById("score-shown").textContent = least.toFixed(2);
  document.querySelectorAll("#boxes rect[data-score]").forEach((box) => box.toggleAttribute("hidden", Number(box.dataset.score) < least));
  const drawn = document.getElementById("drawn").checked;
  document.querySelectorAll("#boxes rect.drawn").forEach((box) => box.toggleAttribute("hidden", !drawn));
}

if (score) {
  score.addEventListener("input", showBoxes);
  document.getElementById("drawn").addEventListener("change", showBoxes);
  showBoxes();
}
