/** Parts that all pages share. */
import { api } from "./api.js";
import { html, useEffect, useId, useLayoutEffect, useRef, useState } from "./lib.js";
import { dismiss, notices } from "./state.js";

// Numbers and times -------------------------------------------------------------------------------------------------

const NUMBERS = new Intl.NumberFormat();
const RELATIVE = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });
const UNITS = [["day", 86_400], ["hour", 3600], ["minute", 60], ["second", 1]];

/** Return a number with separators; "" for none. */
export const count = (number) => (typeof number === "number" ? NUMBERS.format(number) : "");

/** Return a share as a percentage; "" for none. */
export const percent = (share, digits = 0) => (typeof share === "number" ? `${(100 * share).toFixed(digits)} %` : "");

/** Return a time as text that is relative to now. */
export function ago(time) {
  if (!time) return "";
  const seconds = (new Date(time) - Date.now()) / 1000;
  if (Math.abs(seconds) > 30 * 86_400) return new Date(time).toLocaleDateString();
  const [unit, size] = UNITS.find(([, size]) => Math.abs(seconds) >= size) ?? UNITS.at(-1);
  return RELATIVE.format(Math.round(seconds / size), unit);
}

/** Return seconds as text; "" for none. */
export const duration = (seconds) =>
  typeof seconds !== "number" ? "" : seconds < 90 ? `${Math.round(seconds)} seconds` : `${Math.round(seconds / 60)} minutes`;

// Page and state ----------------------------------------------------------------------------------------------------

export function Page({ title, actions, children }) {
  useEffect(() => {
    document.title = `${title} - karst-hub`;
  }, [title]);
  return html`<div class="title"><h1>${title}</h1>${actions && html`<div class="actions">${actions}</div>`}</div>${children}`;
}

/** Links that look like tabs: [[name, text, href]]. */
export function Tabs({ tabs, chosen, label }) {
  return html`<nav class="tabs" aria-label=${label}>
    ${tabs.map(([name, text, href]) => html`<a href=${href} aria-current=${name === chosen ? "page" : null}>${text}</a>`)}
  </nav>`;
}

export const Loading = () => html`<p class="loading" role="status">Loading ...</p>`;

/** What to do where there is nothing yet. */
export function Empty({ title, children }) {
  return html`<div class="empty"><h2>${title}</h2>${children}</div>`;
}

export function ErrorBox({ error, retry }) {
  return html`<div class="error" role="alert">
    <p>${error.detail ?? error.message ?? String(error)}</p>
    ${retry && html`<${Button} onClick=${retry}>Try again<//>`}
  </div>`;
}

/** The notices of `state.notify`. */
export function Notices() {
  return html`<div class="notices" role="status" aria-live="polite">
    ${notices.value.map(
      ({ id, text, kind }) => html`<p key=${id} class=${`notice ${kind}`}>
        <span>${text}</span> <button class="plain" aria-label="Close" onClick=${() => dismiss(id)}>x</button>
      </p>`,
    )}
  </div>`;
}

// Controls ----------------------------------------------------------------------------------------------------------

/** A button that is busy until the promise of `onClick` ends. `label` names it where its text does not. */
export function Button({ onClick, kind = "", label, disabled = false, submit = false, children }) {
  const [busy, setBusy] = useState(false);
  const here = useRef(true);
  useEffect(() => () => void (here.current = false), []);
  const clicked = async (event) => {
    const done = onClick?.(event);
    if (!done?.then) return;
    setBusy(true);
    try {
      await done;
    } finally {
      if (here.current) setBusy(false);
    }
  };
  return html`<button type=${submit ? "submit" : "button"} class=${kind} aria-label=${label} disabled=${disabled || busy} aria-busy=${busy || null} onClick=${clicked}>${children}</button>`;
}

/** A control with its label; the child is one input, select or textarea. */
export function Field({ label, hint, children }) {
  return html`<div class="field"><label><span>${label}</span>${children}</label>${hint && html`<small>${hint}</small>`}</div>`;
}

/** A modal dialog; Escape closes it, and the focus returns to where it was. */
export function Dialog({ title, onClose, children }) {
  const box = useRef(null);
  const id = useId();
  useLayoutEffect(() => {
    const before = document.activeElement;
    box.current.showModal();
    box.current.querySelector("input, select, textarea")?.focus(); // otherwise a key would press the button that closes
    return () => before?.focus?.();
  }, []);
  const outside = (event) => event.target === box.current && onClose();
  return html`<dialog ref=${box} aria-labelledby=${id} onCancel=${(event) => (event.preventDefault(), onClose())} onClick=${outside}>
    <div class="dialog">
      <div class="title"><h2 id=${id}>${title}</h2><button type="button" class="plain" aria-label="Close" onClick=${onClose}>x</button></div>
      ${children}
    </div>
  </dialog>`;
}

/** A question before something that cannot be taken back. */
export function Confirm({ title, action, onYes, onNo, children }) {
  return html`<${Dialog} title=${title} onClose=${onNo}>
    <p>${children}</p>
    <div class="actions"><${Button} onClick=${onNo}>Cancel<//><${Button} kind="danger" onClick=${onYes}>${action}<//></div>
  <//>`;
}

/** Text to copy: a command, or a key that is shown once. */
export function CopyBox({ label, text }) {
  const [done, setDone] = useState(false);
  const box = useRef(null);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      getSelection().selectAllChildren(box.current); // without TLS a page may not write to the clipboard
      document.execCommand("copy");
    }
    setDone(true);
    setTimeout(() => setDone(false), 2000);
  };
  return html`<div class="copy">
    <pre ref=${box} tabindex="0" role="region" aria-label=${label}><code>${text}</code></pre>
    <${Button} label=${`Copy ${label}`} onClick=${copy}>${done ? "Copied" : "Copy"}<//>
  </div>`;
}

// Data --------------------------------------------------------------------------------------------------------------

/** A table of `rows`, each an array of cells. `sort` is {by, down, choose} where the server sorts. */
export function Table({ label, head, rows, sort, empty = "" }) {
  if (!rows.length && empty) return html`<p>${empty}</p>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label}>
    <table>
      <thead>
        <tr>${head.map((text, i) => html`<th scope="col" aria-sort=${sort && sort.by === i ? (sort.down ? "descending" : "ascending") : null}>
          ${sort?.can?.includes(i) ? html`<button type="button" class="plain" onClick=${() => sort.choose(i)}>${text}</button>` : text || html`<span class="hidden">Actions</span>`}
        </th>`)}</tr>
      </thead>
      <tbody>${rows.map((row) => html`<tr>${row.map((cell) => html`<td>${cell}</td>`)}</tr>`)}</tbody>
    </table>
  </div>`;
}

/** A labelled bar for a share, with the interval of its estimate. */
export function Meter({ label, value, interval }) {
  const text = `${percent(value, 1)}${interval ? ` (${percent(interval[0], 1)} to ${percent(interval[1], 1)})` : ""}`;
  const at = (share) => `${100 * Math.min(1, Math.max(0, share))}%`;
  return html`<div class="meter" role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax="1" aria-valuenow=${value} aria-valuetext=${text}>
    <span class="meter-label">${label}</span>
    <span class="meter-bar" aria-hidden="true">
      <span class="meter-fill" style=${{ width: at(value) }}></span>
      ${interval && html`<span class="meter-interval" style=${{ left: at(interval[0]), width: `calc(${at(interval[1])} - ${at(interval[0])})` }}></span>`}
    </span>
    <span class="meter-value">${text}</span>
  </div>`;
}

/** A small line of numbers; its label tells the numbers to a screen reader. */
export function Sparkline({ values, label }) {
  const top = Math.max(1, ...values);
  const step = 100 / Math.max(1, values.length - 1);
  const points = values.map((value, i) => `${(i * step).toFixed(1)},${(22 - (20 * value) / top).toFixed(1)}`).join(" ");
  return html`<svg class="sparkline" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label=${label}><polyline points=${points} /></svg>`;
}

const COLOURS = ["#2f7fd1", "#c2571a", "#2e8b57", "#9457b8", "#b8860b", "#c2405f", "#4a7a8c", "#7a7a2e"];

/** A chart of uPlot: `data` is [x, y1, y2 ...], `series` the names of all. uPlot is loaded when the first chart is shown. */
export function Chart({ data, series, label, time = false, height = 240 }) {
  const box = useRef(null);
  const plot = useRef(null);
  useEffect(() => {
    let gone = false;
    let sizes;
    const loaded = import("../vendor/uplot.js").catch(() => ({})); // the hub is away: the page works without its chart
    loaded.then(({ default: UPlot }) => {
      if (gone || !UPlot || !box.current) return;
      const ink = getComputedStyle(box.current).color;
      const axis = { stroke: ink, grid: { stroke: "#8884", width: 1 }, ticks: { stroke: "#8884" } };
      const size = () => ({ width: Math.max(200, box.current.clientWidth), height });
      plot.current = new UPlot(
        {
          ...size(),
          scales: { x: { time } },
          axes: [axis, axis],
          series: series.map((name, i) => (i ? { label: name, stroke: COLOURS[(i - 1) % COLOURS.length], width: 2, spanGaps: true, points: { show: data[0].length < 40 } } : { label: name })),
        },
        data,
        box.current,
      );
      sizes = new ResizeObserver(() => box.current && plot.current?.setSize(size()));
      sizes.observe(box.current);
    });
    return () => {
      gone = true;
      sizes?.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [series.join("\n"), time, height]);
  useEffect(() => plot.current?.setData(data), [data]);
  return html`<figure class="chart"><div ref=${box} role="img" aria-label=${label}></div><figcaption>${label}</figcaption></figure>`;
}

// Pictures ----------------------------------------------------------------------------------------------------------

const SEEN_MS = 100; // in view before a thumbnail is fetched: a fast scroll fetches none on its way

/** The thumbnail of an image of a task. It is fetched when it comes into view, and freed when it goes. */
export function Thumbnail({ task, digest, alt }) {
  const box = useRef(null);
  const [state, setState] = useState({});
  useEffect(() => {
    let mine = null;
    const stop = new AbortController();
    const fetchIt = () => {
      seen.disconnect();
      api.blobUrl(`/v1/tasks/${encodeURIComponent(task)}/images/${digest}/thumbnail`, { signal: stop.signal }).then(
        (url) => (stop.signal.aborted ? api.release(url) : setState({ url: (mine = url) })),
        (error) => stop.signal.aborted || setState({ error }),
      );
    };
    let timer = 0;
    const seen = new IntersectionObserver((entries) => {
      clearTimeout(timer);
      if (entries.at(-1).isIntersecting) timer = setTimeout(fetchIt, SEEN_MS);
    });
    setState({});
    seen.observe(box.current);
    return () => {
      clearTimeout(timer);
      seen.disconnect();
      stop.abort();
      if (mine) api.release(mine);
    };
  }, [task, digest]);
  return html`<span class="thumbnail-box" ref=${box}>
    ${state.url && html`<img class="thumbnail" src=${state.url} alt=${alt} draggable="false" />`}
    ${state.error && html`<span class="thumbnail missing" role="img" aria-label=${`${alt} (not loaded)`}>?</span>`}
  </span>`;
}

/** Return the files of a drop, with those in folders: [{file, path}]. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ file, path: file.name }));
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      found.push({ file: await new Promise((yes, no) => entry.file(yes, no)), path: entry.fullPath.replace(/^\//, "") });
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((yes, no) => reader.readEntries(yes, no));
      if (!some.length) return;
      for (const child of some) await walk(child);
    }
  };
  for (const entry of entries) await walk(entry);
  return found;
}

/** A place to drop, paste or choose files; `onFiles` gets [{file, path}], where a path begins with its folders. */
export function DropZone({ onFiles, accept, folders = false, children }) {
  const [over, setOver] = useState(false);
  const latest = useRef(onFiles);
  latest.current = onFiles;
  useEffect(() => {
    const paste = (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (files.length && !document.querySelector("dialog[open]")) latest.current(files.map((file) => ({ file, path: file.name })));
    };
    addEventListener("paste", paste);
    return () => removeEventListener("paste", paste);
  }, []);
  const chosen = (event) => {
    const files = [...event.target.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
    event.target.value = "";
    if (files.length) onFiles(files);
  };
  const drop = async (event) => {
    event.preventDefault();
    setOver(false);
    const files = await dropped(event.dataTransfer);
    if (files.length) onFiles(files);
  };
  const drag = (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    setOver(true);
  };
  return html`<div class=${over ? "drop over" : "drop"} onDragOver=${drag} onDragLeave=${() => setOver(false)} onDrop=${drop}>
    ${children}
    <div class="actions">
      <label class="button"><input class="hidden" type="file" multiple accept=${accept} onChange=${chosen} />Choose files</label>
      ${folders && html`<label class="button"><input class="hidden" type="file" webkitdirectory onChange=${chosen} />Choose a folder</label>`}
    </div>
  </div>`;
}

/** A dialog with the camera's picture; `onPicture` gets a JPEG for each press of the button. */
export function Camera({ onPicture, onClose }) {
  const video = useRef(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    let stream = null;
    let gone = false;
    const start = async () => {
      if (!navigator.mediaDevices) throw new Error("This browser gives the camera only to pages over TLS or on localhost.");
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      if (gone) return stream.getTracks().forEach((track) => track.stop());
      video.current.srcObject = stream;
      await video.current.play();
    };
    start().catch((problem) => gone || setError(problem));
    return () => {
      gone = true;
      stream?.getTracks().forEach((track) => track.stop());
    };
  }, []);
  const take = () => {
    const { videoWidth, videoHeight } = video.current;
    if (!videoWidth) return;
    const canvas = Object.assign(document.createElement("canvas"), { width: videoWidth, height: videoHeight });
    canvas.getContext("2d").drawImage(video.current, 0, 0);
    canvas.toBlob((blob) => onPicture(blob), "image/jpeg", 0.92);
  };
  return html`<${Dialog} title="Camera" onClose=${onClose}>
    ${error ? html`<p role="alert">The camera cannot be used: ${error.message}</p>` : html`<video class="full" ref=${video} muted playsinline aria-label="the camera's picture"></video>`}
    <div class="actions"><${Button} onClick=${onClose}>Close<//>${!error && html`<${Button} kind="primary" onClick=${take}>Take the picture<//>`}</div>
  <//>`;
}
