// What the page does in the browser beside the grid, whose event `drawing` it hears:
//
// - Endings (`.endings[data-for]`, the text of the drawing that they end) are dimmed while the grid shows another
//   drawing, and hidden while it shows none. One that was put on the grid looks chosen as long as it is there.
// - The address becomes that of the last answered request once the pen rests. It replaces the history's entry: neither
//   Streamlit's query parameters nor anything else here makes one. The grid hears of it by the event `address`.
// - A picture that is pasted, or dropped anywhere, goes to the page's uploader, whose part of the page opens. The uploader
//   offers a phone's camera, and is named to screen readers (Streamlit gives its section a role that hides the name).
// - Where there is such an address: Copy link; where there are endings, a button that shows the drawing in place of them
//   as long as it is held.
//
// data: {query: of the address that draws the last endings again, or shows what surprises in a drawing, or ""; drawing: the
// text of the endings' drawing, or ""; copied: what the button then says; token: of a shared page, or ""}.

const REST_MS = 500;
const COPIED_MS = 2000;

function createCompanion(root) {
  const button = root.querySelector(".copy");
  const compare = root.querySelector(".compare");
  const copyText = button.textContent;
  let data = {};
  let timer = null;

  function improveUploader() {
    for (const input of document.querySelectorAll('[data-testid="stFileUploader"] input[type="file"]')) {
      if (input.accept !== "image/*") input.accept = "image/*";
      input.closest("section")?.removeAttribute("role");
    }
  }

  function upload(event) {
    // What is copied both as text and as a picture, such as a cell of a table, comes to a text field as text.
    if (event.clipboardData?.getData("text") && event.target.closest?.("input, textarea")) return;
    const files = (event.clipboardData ?? event.dataTransfer)?.files;
    const input = document.querySelector('[data-testid="stFileUploader"] input[type="file"]');
    if (!root.isConnected) return;
    if (event.type === "drop" && files?.length) event.preventDefault(); // or the browser leaves the page for it
    if (!input || ![...(files ?? [])].some((file) => file.type.startsWith("image/"))) return;
    event.preventDefault();
    event.stopPropagation(); // or the uploader takes what is dropped on it twice
    const details = input.closest("details");
    if (details && !details.open) details.querySelector("summary").click();
    input.files = files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    input.closest('[data-testid="stFileUploader"]').scrollIntoView({ block: "nearest" });
  }

  function sync() {
    improveUploader();
    const drawing = document.drawing;
    if (!drawing) return;
    for (const endings of document.querySelectorAll(".endings[data-for]")) {
      const isCurrent = endings.dataset.for === drawing.text; // even if one of them adds nothing to it
      const buttons = [...endings.querySelectorAll("[data-ink]")];
      const isChosen = ({ dataset }) => !isCurrent && dataset.ink === drawing.ink;
      for (const button of buttons) button.setAttribute("aria-pressed", isChosen(button));
      endings.classList.toggle("earlier", !isCurrent && !buttons.some(isChosen));
      endings.classList.toggle("gone", drawing.blank);
    }
  }

  function rest() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const address = link();
      if (!root.isConnected || address === location.href) return;
      history.replaceState(history.state, "", address);
      document.dispatchEvent(new CustomEvent("address"));
    }, REST_MS);
  }

  // A shared page is open to who has its token (`make demo SHARE=1`): it stays in the address, whatever else changes.
  function link() {
    const query = new URLSearchParams(data.query || location.search);
    const token = data.token || new URLSearchParams(location.search).get("token");
    if (token) query.set("token", token);
    return `${location.origin}${location.pathname}?${query}`.replace(/\?$/, "");
  }

  // Browsers offer a clipboard to secure pages alone, which one in the local network is not, and may still refuse it.
  async function copy(text) {
    try {
      return await navigator.clipboard.writeText(text);
    } catch {
      // The older way is left.
    }
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }

  button.addEventListener("click", async () => {
    await copy(link());
    button.textContent = root.querySelector("span").textContent = data.copied;
    setTimeout(() => {
      button.textContent = copyText;
      root.querySelector("span").textContent = "";
    }, COPIED_MS);
  });

  const hold = (held) => {
    compare.setAttribute("aria-pressed", held);
    for (const endings of document.querySelectorAll(".endings")) endings.classList.toggle("compare", held);
  };
  for (const type of ["pointerdown", "keydown"]) {
    compare.addEventListener(type, (event) => hold(type === "pointerdown" || event.key === " " || event.key === "Enter"));
  }
  for (const type of ["pointerup", "pointercancel", "pointerleave", "keyup", "blur"]) {
    compare.addEventListener(type, () => hold(false));
  }
  compare.addEventListener("contextmenu", (event) => event.preventDefault()); // which a finger that holds asks for

  // The rest of the page belongs to others: what listens there ends with this element.
  const gone = new AbortController();
  const observer = new MutationObserver(() => (root.isConnected ? sync() : leave()));
  const leave = () => {
    observer.disconnect();
    gone.abort();
  };
  observer.observe(document.body, { subtree: true, childList: true });
  const onPage = (type, listener) => document.addEventListener(type, listener, { capture: true, signal: gone.signal });
  onPage("paste", upload);
  onPage("drop", upload);
  onPage("dragover", (event) => {
    if (root.isConnected && event.dataTransfer?.types.includes("Files")) event.preventDefault(); // it may be dropped
  });
  onPage("drawing", () => {
    if (!root.isConnected) return leave();
    sync();
    rest();
  });

  return {
    update(newData) {
      data = newData;
      compare.hidden = !data.drawing;
      button.hidden = !data.query;
      sync();
      rest();
    },
  };
}

export default function ({ parentElement, data }) {
  const root = parentElement.querySelector(".companion");
  root.companion ??= createCompanion(root);
  root.companion.update(data);
}
