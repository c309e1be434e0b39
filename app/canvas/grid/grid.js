// A drawing grid of visible cells. Ink lives here, so no stroke waits for a server; the page is told of each finished
// change as the state `ink`, two hexadecimal digits for each value: row by row the strength of each cell's ink (00 none,
// ff full), in colour its red, green and blue; then row by row each cell's mark: 00 none, 01 touched (inked, or made known
// blank), 02 hole (left to the model).
//
// data: what `drawing_grid` in __init__.py is given, with drawings as such text (`ink` is what a new grid shows), and `texts`
// that are spoken. `load` is one step that can be undone. The detail of the event `drawing` stays in `document.drawing`.
// Before the page is told of a change there is an event `drawn`; whoever cancels it tells the page later, by
// `detail.tell()`. Known cells are opaque, unknown ones transparent (hatched).
//
// The drawing is kept in sessionStorage: a reload, or another page and back, does not lose it. A link's drawing, `d` in
// the address, comes first if the address is another one than when the kept drawing was made. A page that changes its own
// address says so by an event `address` of `document`.

const MAX_UNDO = 200;
const LIVE_MS = 250; // at most four requests a second while a stroke lasts
const [LARGE, MAX_ZOOM, WHEEL] = [48, 8, 400]; // cells of a grid that can be zoomed; how far; how slowly by wheel
const DEMONSTRATION_MS = 1200; // for drawing it
const [NONE, TOUCHED, HOLE] = [0, 1, 2];
const [INK, PAPER] = [[28, 31, 43], 255]; // red, green, blue, as in app/canvas/rendering.py
const BRUSHES = ["1", "2", "3", "5", "8"];
const MAX_GREYS = 17; // to choose from
const RAMP = 1.5; // a soft edge goes from full to none within so many cells, about as in MNIST
const TEXT_FIELDS =
  "input:not([type=range], [type=color], [type=checkbox], [type=radio]), textarea, select, [role=combobox]";
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const TOOLS = { p: "pen", e: "eraser", b: "blank", h: "hole" };

const HEX = Array.from({ length: 256 }, (_, value) => value.toString(16).padStart(2, "0"));

const linked = () => new URLSearchParams(location.search).get("d");

function createGrid(root, data) {
  const [height, width, channels = 1] = data.shape;
  const { demonstration } = data;
  let { brush, ink: given } = data;
  const canvas = root.querySelector("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const paper = root.querySelector(".paper");
  const grey = root.querySelector(".grey input");
  const colour = root.querySelector(".paint input");
  const size = height * width;
  const marks = channels * size; // where they begin in the cells
  const isPaint = channels === 3;
  const isLarge = Math.max(height, width) >= LARGE;
  const storageKey = `pixelcnn-drawing-${height}x${width}${isPaint ? "x3" : ""}`;

  let cells = blank(); // strengths, then marks
  let undone = [];
  let done = [];
  let tool = "pen";
  let soft = true; // where there are levels for it
  let send = () => {};
  // {id: pointer, before: cells at its start, last: those of before it; demonstrated, as it was; cover: of each cell, how
  // much of it the soft pen covers; x, y: last place}
  let stroke = null;
  let cursor = [Math.floor(width / 2), Math.floor(height / 2)]; // the keyboard's cell: column, row
  let sentAt = 0;
  let frame = 0; // the one that is to show new ink
  let view = { scale: 1, x: 0, y: 0 }; // what is seen of a large grid: in papers
  const fingers = new Map(); // those on the grid: pointer to place
  let loaded = null; // the last `load` that was taken
  const taken = new WeakMap(); // of cells that were clicked, not drawn: their `data-ink`
  let demonstrated = null; // the demonstration's cells, while the grid shows it, or draws it, and nothing else

  for (const button of root.querySelectorAll("[data-colour]")) button.style.background = button.dataset.colour;
  root.classList.toggle("large", isLarge);
  canvas.width = width;
  canvas.height = height;
  paper.style.setProperty("--columns", width);
  paper.style.setProperty("--rows", height);

  function blank() {
    return new Uint8Array(marks + size);
  }

  function toText() {
    return Array.from(cells, (value) => HEX[value]).join("");
  }

  function fromText(text) {
    if (typeof text !== "string" || text.length !== 2 * (marks + size) || !/^[0-9a-f]*$/.test(text)) return blank();
    const found = blank().map((_, i) => byteOf(text, 2 * i));
    return found.subarray(marks).every((mark) => mark <= HOLE) ? found : blank();
  }

  function byteOf(hex, start) {
    return parseInt(hex.slice(start, start + 2), 16);
  }

  // What of a strength the images' levels can show, 0 to 255.
  function shown(strength) {
    return (Math.floor((strength * (data.levels - 1)) / 255 + 0.5) * 255) / (data.levels - 1);
  }

  // Paint is ink of any colour, black too.
  function isInk(i) {
    return isPaint ? cells[marks + i] === TOUCHED : shown(cells[i]) > 0 && cells[marks + i] !== HOLE;
  }

  function lowestInk() {
    for (let i = size - 1; i >= 0; i--) if (isInk(i)) return i;
    return -1;
  }

  // As `known_cells` in app/canvas/drawing.py.
  function isKnown(i, lowest) {
    const mark = cells[marks + i];
    if (mark === HOLE) return false;
    if (data.known === "mask") return true;
    if (data.known === "touched") return mark === TOUCHED;
    return isInk(i) || (data.known === "above" && lowest >= 0 && i < (Math.floor(lowest / width) + 1) * width);
  }

  // However many moves of the pointer a frame has: the grid is drawn, and told of, once.
  function drawSoon() {
    frame ||= requestAnimationFrame(() => {
      if (!stroke || !data.live || performance.now() - sentAt <= LIVE_MS) return paint();
      stroke.told = true;
      report();
    });
  }

  function draw() {
    paint();
    showTools();
  }

  // What frames in a stroke need: no tool changes on the way.
  function paint() {
    cancelAnimationFrame(frame);
    frame = 0;
    const picture = context.createImageData(width, height);
    const lowest = lowestInk();
    for (let i = 0; i < size; i++) {
      if (!isKnown(i, lowest)) continue;
      for (let c = 0; c < 3; c++) {
        picture.data[4 * i + c] = isPaint
          ? Math.round(shown(cells[3 * i + c]))
          : Math.round(PAPER + ((INK[c] - PAPER) * shown(cells[i])) / 255);
      }
      picture.data[4 * i + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
    document.drawing = { text: toText(), blank: cells.every((value) => value === 0), ink: taken.get(cells) };
    document.dispatchEvent(new CustomEvent("drawing", { detail: document.drawing }));
  }

  function showTools() {
    const used = cells.some((value) => value > 0);
    root.classList.toggle("inked", used || stroke !== null);
    root.classList.toggle("binary", data.levels === 2);
    root.classList.toggle("in-colour", isPaint);
    for (const button of root.querySelectorAll("button")) {
      const { tool: t, brush: b, colour: c, edge, action } = button.dataset;
      if (t) button.setAttribute("aria-pressed", t === tool);
      if (b) button.setAttribute("aria-pressed", Number(b) === brush);
      if (c) button.setAttribute("aria-pressed", c === colour.value);
      if (edge) button.setAttribute("aria-pressed", soft);
      // Not `disabled`: a button that loses the focus would lose the place of who goes by keyboard.
      if (action === "undo") button.setAttribute("aria-disabled", done.length === 0);
      if (action === "redo") button.setAttribute("aria-disabled", undone.length === 0);
      if (action === "clear") button.setAttribute("aria-disabled", !used);
    }
  }

  function changed(before) {
    if (before.every((value, i) => value === cells[i])) {
      cells = before; // `taken` knows it
      return draw();
    }
    done.push(before);
    if (done.length > MAX_UNDO) done.shift();
    undone = [];
    report();
  }

  function report() {
    draw();
    keep();
    const { text } = document.drawing;
    sentAt = performance.now();
    const detail = { ...document.drawing, tell: () => send(text) };
    if (document.dispatchEvent(new CustomEvent("drawn", { detail, cancelable: true }))) send(text);
  }

  function keep() {
    try {
      sessionStorage.setItem(storageKey, JSON.stringify({ text: toText(), linked: linked(), loaded }));
    } catch {
      // No storage in this browser: a reload then starts from the address.
    }
  }

  function restore() {
    let kept = null;
    try {
      kept = JSON.parse(sessionStorage.getItem(storageKey));
    } catch {
      // As above.
    }
    loaded = kept?.loaded ?? null;
    const nothing = /^0*$/.test(given); // such as the address of a drawing of another shape
    const isKept = kept && ([null, kept.linked].includes(linked()) || nothing);
    cells = fromText(isKept ? kept.text : given);
    if (kept && !nothing) keep(); // what was kept before a link was opened is not to come back
    if (demonstration && !kept && nothing) demonstrate(fromText(demonstration));
  }

  // Draw by itself: ink cell by ink cell, the nearest first, as a hand would; live, if the page is. A person who moves
  // less, or comes in between, sees the whole of it at once.
  function demonstrate(whole) {
    demonstrated = whole;
    const left = [];
    for (let i = 0; i < size; i++) if (whole[marks + i]) left.push(i);
    const path = [];
    for (let at = left[0]; left.length; ) {
      const far = (i) => Math.hypot((i % width) - (at % width), 1.01 * (Math.floor(i / width) - Math.floor(at / width)));
      at = isPaint ? left[0] : left.reduce((best, i) => (far(i) < far(best) ? i : best));
      left.splice(left.indexOf(at), 1);
      path.push(at);
    }
    let [shown, startedAt] = [0, null];
    const step = (now) => {
      if (!demonstrated || !root.isConnected) return;
      startedAt ??= now;
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      const until = calm ? path.length : Math.min(path.length, ((now - startedAt) / DEMONSTRATION_MS) * path.length);
      for (; shown < until; shown++) {
        const i = path[shown];
        cells.set(whole.subarray(channels * i, channels * (i + 1)), channels * i);
        cells[marks + i] = whole[marks + i];
      }
      draw();
      if (shown < path.length) {
        if (data.live && now - sentAt > LIVE_MS) report();
        requestAnimationFrame(step);
      } else report();
    };
    requestAnimationFrame(step);
  }

  // The first own stroke on a demonstration begins a new drawing; undo, or a second finger, brings the whole of it back.
  function begin(id, x, y) {
    const last = demonstrated ?? cells;
    cells = demonstrated ? blank() : cells.slice();
    stroke = { id, last, demonstrated, before: cells.slice(), cover: new Float32Array(size), x, y };
    demonstrated = null;
  }

  // What the pen leaves, a value for each channel.
  function penInk() {
    if (isPaint) return [byteOf(colour.value, 1), byteOf(colour.value, 3), byteOf(colour.value, 5)];
    return [data.levels === 2 ? 255 : Number(grey.value)];
  }

  function setCell(i) {
    if (tool === "hole") {
      cells[marks + i] = HOLE;
      return;
    }
    const values = tool === "pen" ? penInk() : new Array(channels).fill(0);
    cells.set(values, channels * i);
    cells[marks + i] = tool === "eraser" ? NONE : TOUCHED;
  }

  // Draw a straight line with a soft edge, over what was there when the stroke began: a stroke that crosses itself gets
  // no darker. Paint that covers less than half of an empty cell leaves it empty: there is no paper to mix with.
  function softLine(fromX, fromY, toX, toY) {
    const values = penInk();
    const reach = (brush + RAMP) / 2;
    const [dx, dy] = [toX - fromX, toY - fromY];
    const squared = dx * dx + dy * dy;
    const first = (a, b) => Math.max(Math.floor(Math.min(a, b) - reach), 0);
    const last = (a, b, end) => Math.min(Math.ceil(Math.max(a, b) + reach), end);
    for (let row = first(fromY, toY); row < last(fromY, toY, height); row++) {
      for (let column = first(fromX, toX); column < last(fromX, toX, width); column++) {
        const [x, y] = [column + 0.5 - fromX, row + 0.5 - fromY];
        const along = squared ? Math.min(Math.max((x * dx + y * dy) / squared, 0), 1) : 0;
        const cover = Math.min((reach - Math.hypot(x - along * dx, y - along * dy)) / RAMP, 1);
        const i = row * width + column;
        if (cover <= stroke.cover[i]) continue;
        stroke.cover[i] = cover;
        const wasInk = stroke.before[marks + i] === TOUCHED;
        if (isPaint && !wasInk && cover < 0.5) continue;
        for (let c = 0; c < channels; c++) {
          const old = wasInk ? stroke.before[channels * i + c] : isPaint ? values[c] : 0;
          cells[channels * i + c] = Math.round(old + (values[c] - old) * cover);
        }
        if (isPaint || cells[i] > 0) cells[marks + i] = TOUCHED;
      }
    }
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
    if (tool === "pen" && soft && data.levels > 2) softLine(stroke.x, stroke.y, x, y);
    else hardLine(x, y);
    stroke.x = x;
    stroke.y = y;
  }

  function hardLine(x, y) {
    const steps = Math.max(1, Math.ceil(2 * Math.max(Math.abs(x - stroke.x), Math.abs(y - stroke.y))));
    for (let i = 1; i <= steps; i++) {
      stamp(stroke.x + ((x - stroke.x) * i) / steps, stroke.y + ((y - stroke.y) * i) / steps);
    }
  }

  // A place on the screen as shares of an element's width and height.
  function within(element, x, y) {
    const box = element.getBoundingClientRect();
    return [(x - box.left) / box.width, (y - box.top) / box.height];
  }

  function place(event) {
    const [x, y] = within(canvas, event.clientX, event.clientY);
    return [x * width, y * height];
  }

  function endStroke(id) {
    fingers.delete(id);
    if (stroke?.id !== id) return;
    const { last } = stroke;
    stroke = null;
    changed(last);
  }

  // Two fingers look, they do not draw: what the first one has drawn meanwhile goes.
  function dropStroke() {
    if (!stroke) return;
    const isNews = stroke.told || stroke.demonstrated;
    ({ last: cells, demonstrated } = stroke);
    stroke = null;
    if (isNews) report();
    else draw();
  }

  // Show a part of a large grid: `scale` times as large, the point at (x, y) of the paper, 0 to 1, where it is or moved.
  function look(scale, x, y, [right, down] = [0, 0]) {
    scale = Math.min(Math.max(scale, 1), MAX_ZOOM);
    const moved = (point, start, by) =>
      Math.min(Math.max(point - ((point - start) * scale) / view.scale + by, 1 - scale), 0);
    view = { scale, x: moved(x, view.x, right), y: moved(y, view.y, down) };
    root.querySelector(".sheet").style.transform = `translate(${100 * view.x}%, ${100 * view.y}%) scale(${scale})`;
  }

  function pinch(event) {
    const spread = () => {
      const [[ax, ay], [bx, by]] = fingers.values();
      return [Math.hypot(ax - bx, ay - by), ...within(paper, (ax + bx) / 2, (ay + by) / 2)];
    };
    const [distance, x, y] = spread();
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    const [nowDistance, nowX, nowY] = spread();
    look((view.scale * nowDistance) / distance, x, y, [nowX - x, nowY - y]);
  }

  canvas.addEventListener("pointerdown", (event) => {
    const isFinger = event.pointerType === "touch";
    if (isFinger) fingers.set(event.pointerId, [event.clientX, event.clientY]);
    // A pen's stays with a palm beside it, and begins where the palm was first.
    if (fingers.has(stroke?.id) && (fingers.size > 1 || !isFinger)) dropStroke();
    if (stroke || (isFinger && fingers.size > 1) || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    const [x, y] = place(event);
    begin(event.pointerId, x, y);
    lineTo(x, y);
    draw();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (isLarge && !stroke && fingers.size === 2 && fingers.has(event.pointerId)) pinch(event);
    if (stroke?.id !== event.pointerId) return;
    for (const moved of event.getCoalescedEvents?.() ?? []) lineTo(...place(moved));
    lineTo(...place(event));
    drawSoon();
  });
  // Otherwise the browser takes a quick stroke for a fling, and the next tap, on a button, only ends that.
  canvas.addEventListener("touchmove", (event) => {
    if (event.touches.length === 1) event.preventDefault();
  });
  for (const type of ["pointerup", "lostpointercapture"]) {
    canvas.addEventListener(type, (event) => endStroke(event.pointerId));
  }
  canvas.addEventListener("pointercancel", (event) => {
    fingers.delete(event.pointerId);
    if (stroke?.id === event.pointerId) dropStroke(); // the browser took it for a gesture of its own
  });
  canvas.addEventListener("wheel", (event) => {
    if (!isLarge) return;
    event.preventDefault();
    look(view.scale * Math.exp(-event.deltaY / WHEEL), ...within(paper, event.clientX, event.clientY));
  });

  // By keyboard: arrows go, with Shift they draw on the way; Space draws where one is.
  canvas.addEventListener("keydown", (event) => {
    const [right, down] = ARROWS[event.key] ?? [0, 0];
    if ((!right && !down && event.key !== " ") || event.ctrlKey || event.metaKey || event.altKey || stroke) return;
    event.preventDefault();
    const [column, row] = cursor;
    cursor = [Math.min(Math.max(column + right, 0), width - 1), Math.min(Math.max(row + down, 0), height - 1)];
    if (event.key === " " || event.shiftKey) {
      begin(null, column + 0.5, row + 0.5);
      lineTo(cursor[0] + 0.5, cursor[1] + 0.5);
      endStroke(null);
    }
    showCursor();
  });
  canvas.addEventListener("focus", showCursor);

  function showCursor() {
    const [column, row] = cursor;
    paper.style.setProperty("--column", column);
    paper.style.setProperty("--row", row);
    const i = row * width + column;
    const state = data.texts[!isKnown(i, lowestInk()) ? "cell_unknown" : isInk(i) ? "cell_ink" : "cell_blank"];
    const values = { row: row + 1, column: column + 1, state };
    root.querySelector(".spoken").textContent = data.texts.cell.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  }

  const actions = {
    undo: () => retrace(done, undone),
    redo: () => retrace(undone, done),
    clear: () => replace(blank()),
  };

  // To the drawing before, or after: each list holds those that the other one leads back to.
  function retrace(from, to) {
    if (stroke || from.length === 0) return;
    demonstrated = null;
    to.push(cells);
    cells = from.pop();
    report();
  }

  function replace(next) {
    if (stroke) return;
    demonstrated = null;
    const before = cells;
    cells = next;
    changed(before);
  }

  function take(hex) {
    if (hex.length === 2 * (marks + size)) replace(fromText(hex));
    if (hex.length !== 2 * marks) return;
    const next = blank();
    for (let k = 0; k < marks; k++) next[k] = byteOf(hex, 2 * k);
    for (let i = 0; i < size; i++) {
      const wasBlank = cells[i] === 0 && cells[marks + i] === TOUCHED;
      next[marks + i] = isPaint || next[i] || wasBlank ? TOUCHED : NONE;
    }
    taken.set(next, hex);
    replace(next);
  }

  root.querySelector(".tools").addEventListener("click", (event) => {
    const opener = event.target.closest(".opener");
    if (opener) {
      const further = root.querySelector(".further");
      further.hidden = !further.hidden;
      opener.setAttribute("aria-expanded", !further.hidden);
    }
    const { tool: t, brush: b, colour: c, edge, action } = event.target.closest("button")?.dataset ?? {};
    if (t) tool = t;
    if (b) brush = Number(b);
    if (c) [colour.value, tool] = [c, "pen"];
    if (edge) soft = !soft;
    if (action) actions[action]();
    showTools();
  });
  colour.addEventListener("input", () => {
    tool = "pen";
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
  onPage("address", keep);
  onPage("click", (event) => {
    const ending = event.target.closest?.("[data-ink]");
    if (ending) take(ending.dataset.ink);
  });
  onPage("keydown", (event) => {
    const [target] = event.composedPath(); // within shadow roots, too
    if (!data.shortcuts) return;
    if (target.isContentEditable || target.closest?.(TEXT_FIELDS)) return;
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key === "z") actions[event.shiftKey ? "redo" : "undo"]();
      else if (key === "y") actions.redo();
      else return;
    } else if (event.altKey) return;
    else if (key in TOOLS && !(isPaint && key === "b")) tool = TOOLS[key];
    else if (BRUSHES.includes(key)) brush = Number(key);
    else if (key === "s" && data.levels > 2) soft = !soft;
    else if (key === "delete") actions.clear();
    else return;
    event.preventDefault();
    event.stopPropagation(); // Keep the page's own shortcuts from seeing it, too.
    showTools();
  });

  restore();
  return {
    update(newData, setStateValue) {
      data = newData;
      // A step for each level where there are few; the greatest is shown as the last level, be it less than 255.
      grey.min = grey.step = Math.floor(255 / Math.min(data.levels - 1, MAX_GREYS));
      send = (text) => setStateValue("ink", text);
      draw();
      if (given !== null && toText() !== given) report(); // what was kept is news to the page
      given = null;
      if (data.load && !stroke && data.load.revision !== loaded) { // else the stroke's own end brings it again
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
