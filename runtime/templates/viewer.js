"use strict";
const byId = (id) => document.getElementById(id);
const pictures = JSON.parse(byId("pictures").textContent);

// The viewer: two of the pictures of an image, one over the other, cut off where the slider is.
function show() {
  const picture = pictures[byId("which").value];
  const [left, right] = ["left", "right"].map((side) => byId(side).value);
  const stage = byId("stage");
  stage.style.aspectRatio = `${picture.width} / ${picture.height}`;
  stage.style.maxWidth = `min(100%, ${Math.max(picture.width, 320)}px, calc(85vh * ${picture.width / picture.height}))`;
  byId("over").src = picture.layers[left];
  byId("under").src = picture.layers[right];
  byId("over").alt = `${picture.name}, ${left}`;
  byId("under").alt = `${picture.name}, ${right}`;
  const { top, left: x, height, width } = picture.mark;
  byId("mark").hidden = byId("crops").hidden = picture.equal;
  Object.assign(byId("mark").style, { top: top + "%", left: x + "%", height: height + "%", width: width + "%" });
  byId("caption").textContent = `${picture.caption}. Left: ${left}. Right: ${right}.`;
  byId("crops").replaceChildren(...picture.crops.map(([kind, source]) => {
    const figure = document.createElement("figure");
    const image = Object.assign(document.createElement("img"), { src: source, alt: `${picture.name}, marked part, ${kind}` });
    const caption = Object.assign(document.createElement("figcaption"), { textContent: kind });
    figure.append(image, caption);
    return figure;
  }));
  for (const link of document.querySelectorAll("[data-picture]"))
    link.closest("tr").classList.toggle("shown", link.dataset.picture === byId("which").value);
}

if (pictures.length) {
  byId("at").addEventListener("input", () => {
    byId("stage").style.setProperty("--at", byId("at").value + "%");
    byId("at").ariaValueText = byId("at").value + " percent";
  });
  for (const id of ["which", "left", "right"]) byId(id).addEventListener("change", show);
  for (const link of document.querySelectorAll("[data-picture]"))
    link.addEventListener("click", () => { byId("which").value = link.dataset.picture; show(); });
  show();
}
