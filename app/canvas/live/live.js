// Endings that come without the page. When the grid tells of a drawing (event `drawn`), its endings are fetched and shown
// here row by row, in place of the page's (`html[data-live]`, page.css). Once they have come, or cannot, the page is told of
// the drawing: it runs, and shows the same endings with all that belongs to them. Whoever presses something else meanwhile,
// or waits long, has the page told at once.
//
// data: {url, visit: where and as whom to ask; settings: text that changes with what would change the endings; drawing: whose
// endings the page shows; pending: the page itself is asking; on: whether to ask at all}.

const PATIENCE_MS = 1000;

// One for the document: Streamlit may make the element anew while endings are on their way.
function createLive() {
  let root = null;
  let data = {};
  let came = () => {};
  let asking = null; // {stop: AbortController, tell: of the drawing, or null once the page knows; text, settings: as below}
  let isFresh = false; // the grid was blank: what is drawn next is another drawing
  let shown = null; // {html, text: of the drawing whose endings are shown here, settings}

  function show(next) {
    shown = next;
    root.innerHTML = shown?.html ?? "";
    document.documentElement.toggleAttribute("data-live", shown !== null);
  }

  // What is shown here gives way to the page.
  function isOver() {
    return !data.on || data.pending || shown?.settings !== data.settings || shown?.text === data.drawing;
  }

  function stop() {
    asking?.stop.abort();
    asking = null;
  }

  function tell() {
    if (root.isConnected) asking?.tell?.();
    if (asking) asking.tell = null;
  }

  async function ask(text, tellDrawing) {
    stop();
    const { settings } = data;
    const mine = (asking = { stop: new AbortController(), tell: tellDrawing, text, settings });
    setTimeout(() => asking === mine && tell(), PATIENCE_MS);
    let isFinished = false;
    try {
      const response = await fetch(data.url, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ visit: data.visit, drawing: text, fresh: isFresh }),
        signal: mine.stop.signal,
      });
      isFresh = false;
      const reader = response.status === 200 ? response.body.pipeThrough(new TextDecoderStream()).getReader() : null;
      for (let rest = ""; reader; ) {
        const { done, value } = await reader.read();
        if (done || asking !== mine) break;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        if (!events.length) continue;
        const event = JSON.parse(events.pop().slice("data: ".length)); // the last one is all that is to be seen
        if (data.settings === settings) show({ html: event.html, text, settings }); // else it is the page's to show
        isFinished = event.finished;
      }
    } catch {
      // A stroke came in between, or this way is closed: the page knows what to say.
    }
    if (asking !== mine) return;
    if (!isFinished || isOver()) show(null); // the page may have been faster
    if (mine.tell) tell();
    else if (root.isConnected) came(); // else the page finds them when it is shown again
    asking = null;
  }

  document.addEventListener("drawn", (event) => {
    if (!root.isConnected) return;
    if (!data.on || event.detail.blank) {
      isFresh = event.detail.blank;
      stop();
      show(null);
      return;
    }
    event.preventDefault();
    const { text, tell: tellDrawing } = event.detail;
    if (asking?.text === text && asking.settings === data.settings) asking.tell = tellDrawing; // the pen was only lifted
    else ask(text, tellDrawing);
  });
  // The page must know what is drawn before it hears of anything else; another page learns it from the server.
  for (const type of ["pointerdown", "keydown", "pagehide"]) {
    const listener = (event) => {
      if (!event.composedPath().some((element) => element.matches?.(".drawing, a"))) tell();
    };
    window.addEventListener(type, listener, { capture: true });
  }

  return {
    update(newRoot, newData, setTriggerValue) {
      const isNew = root !== newRoot;
      [root, data, came] = [newRoot, newData, () => setTriggerValue("came", true)];
      if (data.pending || !data.on) {
        tell();
        stop();
      }
      if (isOver() || isNew) show(isOver() ? null : shown);
    },
  };
}

export default function ({ parentElement, data, setTriggerValue }) {
  const root = parentElement.querySelector(".live") ?? parentElement.appendChild(document.createElement("div"));
  root.className = "live";
  document.live ??= createLive();
  document.live.update(root, data, setTriggerValue);
}
