// A drawing grid of visible cells. Ink lives here, so no stroke waits for a server; the page is told of each finished
// change as the state `ink`: three characters per cell, row by row: the strength of its ink as two hexadecimal digits
// (00 none, ff full), then its mark: 0 none, 1 touched (inked, or made known blank), 2 hole (left to the model).
//
// data: {height, width: cells; levels: K of the images; known: the mode, see isKnown; live: tell of a stroke while it is
// drawn; ink: what a new grid shows; load: {revision, ink} replaces the drawing, once, as one step that can be undone}.
// Known cells are opaque, unknown ones transparent (hatched). Anything on the page with `data-ink` (strengths alone,
// two digits per cell) takes the place of the drawing when it is clicked.
//
// The drawing is kept in sessionStorage: a reload, or another page and back, does not lose it. A link's drawing, `d` in
// the address, comes first if the address is another one than when the kept drawing was made.

const MAX_UNDO = 200;
const LIVE_MS = 250; // at most four requests a second while a stroke lasts
const [NONE, TOUCHED, HOLE] = [0, 1, 2];
const TOOLS = { p: "pen", e: "eraser", b: "blank", h: "hole" };

const linked = () => new URLSearchParams(location.search).get("d");

function createGrid(root, { height, width, ink: given }) {
  const canvas = root.querySelector("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const paper = root.querySelector(".paper");
  const grey = root.querySelector(".grey input");
  const style = getComputedStyle(root);
  const rgb = (name) => {
    context.fillStyle = style.getPropertyValue(name).trim();
    const hex = parseInt(context.fillStyle.slice(1), 16);
    return [hex >> 16, (hex >> 8) & 255, hex & 255];
  };
  const colours = { ink: rgb("--ink"), paper: rgb("--paper") };
  const size = height * width;
  const storageKey = `pixelcnn-drawing-${height}x${width}`;

  let cells = blank(); // strengths, then marks
  let undone = [];
  let done = [];
  let tool = "pen";
  let brush = 2;
  let data = { levels: 2, known: "above", live: false };
  let send = () => {};
  let stroke = null; // {id: pointer, before: cells at its start, x, y: last place in cells}
  let sentAt = 0;
  let loaded = null; // the last `load` that was taken

  canvas.width = width;
  canvas.height = height;
  paper.style.setProperty("--columns", width);
  paper.style.setProperty("--rows", height);

  function blank() {
    return new Uint8Array(2 * size);
  }

  function toText() {
    let text = "";
    for (let i = 0; i < size; i++) text += cells[i].toString(16).padStart(2, "0") + cells[size + i];
    return text;
  }

  function fromText(text) {
    const found = blank();
    if (typeof text !== "string" || !/^([0-9a-f]{2}[012])*$/.test(text) || text.length !== 3 * size) return found;
    for (let i = 0; i < size; i++) {
      found[i] = parseInt(text.slice(3 * i, 3 * i + 2), 16);
      found[size + i] = Number(text[3 * i + 2]);
    }
    return found;
  }

  // What of a strength the images' levels can show, 0 to 255.
  function shown(strength) {
    return (Math.floor((strength * (data.levels - 1)) / 255 + 0.5) * 255) / (data.levels - 1);
  }

  function lowestInk() {
    for (let i = size - 1; i >= 0; i--) if (shown(cells[i]) && cells[size + i] !== HOLE) return i;
    return -1;
  }

  // As `known_cells` in app/drawing.py.
  function isKnown(i, lowest) {
    const mark = cells[size + i];
    if (mark === HOLE) return false;
    if (data.known === "mask") return true;
    if (data.known === "touched") return mark === TOUCHED;
    return shown(cells[i]) > 0 || (data.known === "above" && lowest >= 0 && i < (Math.floor(lowest / width) + 1) * width);
  }

  function draw() {
    const picture = context.createImageData(width, height);
    const lowest = lowestInk();
    for (let i = 0; i < size; i++) {
      if (!isKnown(i, lowest)) continue;
      const share = shown(cells[i]) / 255;
      for (let c = 0; c < 3; c++) {
        picture.data[4 * i + c] = Math.round(colours.paper[c] + (colours.ink[c] - colours.paper[c]) * share);
      }
      picture.data[4 * i + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
  }

  function showTools() {
    const used = cells.some((value) => value > 0);
    root.classList.toggle("inked", used || stroke !== null);
    root.classList.toggle("binary", data.levels === 2);
    for (const button of root.querySelectorAll("button")) {
      const { tool: t, brush: b, action } = button.dataset;
      if (t) button.setAttribute("aria-pressed", t === tool);
      if (b) button.setAttribute("aria-pressed", Number(b) === brush);
      // Not `disabled`: a button that loses the focus would lose the place of who goes by keyboard.
      if (action === "undo") button.setAttribute("aria-disabled", done.length === 0);
      if (action === "redo") button.setAttribute("aria-disabled", undone.length === 0);
      if (action === "clear") button.setAttribute("aria-disabled", !used);
    }
  }

  function changed(before) {
    if (before.every((value, i) => value === cells[i])) return;
    done.push(before);
    if (done.length > MAX_UNDO) done.shift();
    undone = [];
    report();
  }

  function report() {
    draw();
    showTools();
    const text = toText();
    try {
      sessionStorage.setItem(storageKey, JSON.stringify({ text, linked: linked(), loaded }));
    } catch {
      // No storage in this browser: a reload then starts from the address.
    }
    sentAt = performance.now();
    send(text);
  }

  function restore() {
    let kept = null;
    try {
      kept = JSON.parse(sessionStorage.getItem(storageKey));
    } catch {
      // As above.
    }
    loaded = kept?.loaded ?? null;
    cells = fromText(kept && kept.linked === linked() ? kept.text : given);
  }

  function setCell(i) {
    if (tool === "hole") {
      cells[size + i] = HOLE;
      return;
    }
    cells[i] = tool === "pen" ? (data.levels === 2 ? 255 : Number(grey.value)) : 0;
    cells[size + i] = tool === "eraser" ? NONE : TOUCHED;
  }

  // A square of brush x brush cells around a place; the parts outside the grid are cut off.
  function stamp(x, y) {
    const left = Math.round(x - brush / 2);
    const top = Math.round(y - brush / 2);
    for (let row = Math.max(top, 0); row < Math.min(top + brush, height); row++) {
      for (let column = Math.max(left, 0); column < Math.min(left + brush, width); column++) setCell(row * width + column);
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
    showTools();
    changed(before);
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (stroke || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    const [x, y] = place(event);
    stroke = { id: event.pointerId, before: cells.slice(), x, y };
    stamp(x, y);
    draw();
    showTools();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (stroke?.id !== event.pointerId) return;
    for (const moved of event.getCoalescedEvents?.() ?? []) lineTo(...place(moved));
    lineTo(...place(event));
    draw();
    if (data.live && performance.now() - sentAt > LIVE_MS) report();
  });
  // Or a quick stroke counts as a fling, and the next tap, on a button, only ends that.
  canvas.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  canvas.addEventListener("pointerup", endStroke);
  canvas.addEventListener("pointercancel", endStroke);
  canvas.addEventListener("lostpointercapture", endStroke);

  const actions = {
    undo() {
      if (stroke || done.length === 0) return;
      undone.push(cells);
      cells = done.pop();
      report();
    },
    redo() {
      if (stroke || undone.length === 0) return;
      done.push(cells);
      cells = undone.pop();
      report();
    },
    clear() {
      replace(blank());
    },
  };

  function replace(next) {
    if (stroke) return;
    const before = cells;
    cells = next;
    changed(before);
  }

  function takeEnding(hex) {
    if (hex.length !== 2 * size) return;
    const next = blank();
    for (let i = 0; i < size; i++) {
      next[i] = parseInt(hex.slice(2 * i, 2 * i + 2), 16);
      const wasBlank = cells[i] === 0 && cells[size + i] === TOUCHED;
      next[size + i] = next[i] || wasBlank ? TOUCHED : NONE;
    }
    replace(next);
  }

  root.querySelector(".tools").addEventListener("click", (event) => {
    const { tool: t, brush: b, action } = event.target.closest("button")?.dataset ?? {};
    if (t) tool = t;
    if (b) brush = Number(b);
    if (action) actions[action]();
    showTools();
  });

  // The rest of the page belongs to others: these listeners end with the grid.
  const gone = new AbortController();
  const onPage = (type, listener) =>
    document.addEventListener(
      type,
      (event) => (root.isConnected ? listener(event) : gone.abort()),
      { capture: true, signal: gone.signal },
    );
  onPage("click", (event) => {
    const ending = event.target.closest?.("[data-ink]");
    if (ending) takeEnding(ending.dataset.ink);
  });
  onPage("keydown", (event) => {
    const [target] = event.composedPath(); // within shadow roots, too
    if (target.isContentEditable || target.closest?.("input:not([type=range]), textarea, select, [role=combobox]")) return;
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key === "z") actions[event.shiftKey ? "redo" : "undo"]();
      else if (key === "y") actions.redo();
      else return;
    } else if (event.altKey) return;
    else if (key in TOOLS) tool = TOOLS[key];
    else if (["1", "2", "3"].includes(key)) brush = Number(key);
    else if (key === "delete") actions.clear();
    else return;
    event.preventDefault();
    event.stopPropagation(); // Or the page's own shortcuts would see it too.
    showTools();
  });

  restore();
  return {
    update(newData, setStateValue) {
      data = newData;
      send = (text) => setStateValue("ink", text);
      draw();
      showTools();
      if (given !== null && toText() !== given) report(); // what was kept is news to the page
      given = null;
      if (data.load && data.load.revision !== loaded) {
        loaded = data.load.revision;
        replace(fromText(data.load.ink));
      }
    },
  };
}

// The page calls this at every rerun: what must outlive a rerun hangs on the element.
export default function ({ parentElement, data, setStateValue }) {
  const root = parentElement.querySelector(".drawing");
  root.grid ??= createGrid(root, data);
  root.grid.update(data, setStateValue);
}
