// A drawing grid of visible cells. Ink lives here, so no stroke waits for a server; the page is told of each finished
// change as the state `ink`: one character per cell, row by row, "1" where there is ink and "0" elsewhere.
//
// data: {height, width: cells; known: "above" (every row down to the lowest ink) or "ink" (inked cells alone)}.
// What is drawn is what is known: ink is dark, known blank cells are white, unknown cells are transparent (hatched).

const MAX_UNDO = 200;

function createGrid(root, { height, width }) {
  const canvas = root.querySelector("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const paper = root.querySelector(".paper");
  const style = getComputedStyle(root);
  const rgba = (name) => {
    context.fillStyle = style.getPropertyValue(name).trim();
    const hex = parseInt(context.fillStyle.slice(1), 16);
    return [hex >> 16, (hex >> 8) & 255, hex & 255, 255];
  };
  const colours = { ink: rgba("--ink"), paper: rgba("--paper") };

  let ink = new Uint8Array(height * width);
  let undone = [];
  let done = [];
  let tool = "pen";
  let brush = 2;
  let known = "above";
  let send = () => {};
  let stroke = null; // {id: pointer, before: ink at its start, x, y: last place in cells}

  canvas.width = width;
  canvas.height = height;
  paper.style.setProperty("--columns", width);
  paper.style.setProperty("--rows", height);

  function draw() {
    const picture = context.createImageData(width, height);
    const lowest = ink.lastIndexOf(1);
    const numKnown = known === "above" && lowest >= 0 ? (Math.floor(lowest / width) + 1) * width : 0;
    for (let i = 0; i < ink.length; i++) {
      if (ink[i]) picture.data.set(colours.ink, 4 * i);
      else if (i < numKnown) picture.data.set(colours.paper, 4 * i);
    }
    context.putImageData(picture, 0, 0);
    root.classList.toggle("inked", lowest >= 0 || stroke !== null);
    for (const button of root.querySelectorAll("button")) {
      const { tool: t, brush: b, action } = button.dataset;
      if (t) button.setAttribute("aria-pressed", t === tool);
      if (b) button.setAttribute("aria-pressed", Number(b) === brush);
      // Not `disabled`: a button that loses the focus would take the keyboard shortcuts with it.
      if (action === "undo") button.setAttribute("aria-disabled", done.length === 0);
      if (action === "redo") button.setAttribute("aria-disabled", undone.length === 0);
      if (action === "clear") button.setAttribute("aria-disabled", lowest < 0);
    }
  }

  function changed(before) {
    if (before.every((value, i) => value === ink[i])) return;
    done.push(before);
    if (done.length > MAX_UNDO) done.shift();
    undone = [];
    report();
  }

  function report() {
    draw();
    send(ink.join(""));
  }

  // A square of brush x brush cells around a place; the parts outside the grid are cut off.
  function stamp(x, y) {
    const left = Math.round(x - brush / 2);
    const top = Math.round(y - brush / 2);
    for (let row = Math.max(top, 0); row < Math.min(top + brush, height); row++) {
      for (let column = Math.max(left, 0); column < Math.min(left + brush, width); column++) {
        ink[row * width + column] = tool === "pen" ? 1 : 0;
      }
    }
  }

  // Fast strokes report few places: steps of half a cell between them leave no gap.
  function lineTo(x, y) {
    const steps = Math.max(1, Math.ceil(2 * Math.max(Math.abs(x - stroke.x), Math.abs(y - stroke.y))));
    for (let i = 1; i <= steps; i++) {
      stamp(stroke.x + ((x - stroke.x) * i) / steps, stroke.y + ((y - stroke.y) * i) / steps);
    }
    stroke.x = x;
    stroke.y = y;
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  }

  function endStroke(event) {
    if (stroke?.id !== event.pointerId) return;
    const { before } = stroke;
    stroke = null;
    draw();
    changed(before);
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (stroke || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    const [x, y] = place(event);
    stroke = { id: event.pointerId, before: ink.slice(), x, y };
    stamp(x, y);
    draw();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (stroke?.id !== event.pointerId) return;
    for (const moved of event.getCoalescedEvents?.() ?? []) lineTo(...place(moved));
    lineTo(...place(event));
    draw();
  });
  // Or a quick stroke counts as a fling, and the next tap, on a button, only ends that.
  canvas.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  canvas.addEventListener("pointerup", endStroke);
  canvas.addEventListener("pointercancel", endStroke);
  canvas.addEventListener("lostpointercapture", endStroke);

  const actions = {
    undo() {
      if (stroke || done.length === 0) return;
      undone.push(ink);
      ink = done.pop();
      report();
    },
    redo() {
      if (stroke || undone.length === 0) return;
      done.push(ink);
      ink = undone.pop();
      report();
    },
    clear() {
      if (stroke) return;
      const before = ink;
      ink = new Uint8Array(height * width);
      changed(before);
    },
  };

  root.querySelector(".tools").addEventListener("click", (event) => {
    const { tool: t, brush: b, action } = event.target.closest("button")?.dataset ?? {};
    if (t) tool = t;
    if (b) brush = Number(b);
    if (action) actions[action]();
    draw();
  });
  root.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key === "z") actions[event.shiftKey ? "redo" : "undo"]();
      else if (key === "y") actions.redo();
      else return;
    } else if (event.altKey) return;
    else if (key === "p") tool = "pen";
    else if (key === "e") tool = "eraser";
    else if (["1", "2", "3"].includes(key)) brush = Number(key);
    else return;
    event.preventDefault();
    event.stopPropagation(); // Or the page's own shortcuts would see it too.
    draw();
  });

  return {
    update(data, setStateValue) {
      known = data.known;
      send = (text) => setStateValue("ink", text);
      draw();
    },
  };
}

// The page calls this at every rerun: what must outlive a rerun hangs on the element.
export default function ({ parentElement, data, setStateValue }) {
  const root = parentElement.querySelector(".drawing");
  root.grid ??= createGrid(root, data);
  root.grid.update(data, setStateValue);
}
