/** Parts that all pages share. */
import { at } from "./api.js";
import { attempt, useFile } from "./calls.js";
import { html, useEffect, useId, useLayoutEffect, useRef, useState } from "./lib.js";
import { dismiss, notices, notify } from "./state.js";

// Values as text; "" for none.

const NUMBERS = new Intl.NumberFormat();
const RELATIVE = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });
const UNITS = [["day", 86_400], ["hour", 3600], ["minute", 60], ["second", 1]];

export const count = (number) => (typeof number === "number" ? NUMBERS.format(number) : "");

const BYTES = ["bytes", "KiB", "MiB", "GiB", "TiB"];
export function bytes(size) {
  if (typeof size !== "number") return "";
  const i = Math.min(4, Math.floor(Math.log2(size || 1) / 10));
  return `${(size / 1024 ** i).toLocaleString(undefined, { maximumFractionDigits: 1 })} ${BYTES[i]}`;
}

export const plural = (number, name) => `${count(number)} ${name}${number === 1 ? "" : "s"}`;

export const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

export const percent = (share, digits = 0) => (typeof share === "number" ? `${(100 * share).toFixed(digits)} %` : "");

export const estimate = (share, interval, digits = 1) =>
  percent(share, digits) + (interval ? ` (${percent(interval[0], digits)} to ${percent(interval[1], digits)})` : "");

export function ago(time) {
  if (!time) return "";
  const seconds = (new Date(time) - Date.now()) / 1000;
  if (Math.abs(seconds) > 30 * 86_400) return new Date(time).toLocaleDateString();
  const [unit, size] = UNITS.find(([, size]) => Math.abs(seconds) >= size) ?? UNITS.at(-1);
  return RELATIVE.format(Math.round(seconds / size), unit);
}

export const duration = (seconds) =>
  typeof seconds !== "number" ? "" : seconds < 90 ? plural(Math.round(seconds), "second") : plural(Math.round(seconds / 60), "minute");

export function Page({ title, actions, children }) {
  useEffect(() => {
    document.title = `${title} - karst-hub`;
  }, [title]);
  return html`<div class="title"><h1>${title}</h1>${actions && html`<div class="actions">${actions}</div>`}</div>${children}`;
}

export const Loading = () => html`<p role="status">Loading ...</p>`;

export const Empty = ({ title, children }) => html`<div class="empty"><h2>${title}</h2>${children}</div>`;

export const ErrorBox = ({ error, retry }) => html`<div class="error" role="alert">
  <p>${error.message}</p>
  ${retry && html`<${Button} onClick=${retry}>Try again<//>`}
</div>`;

/** Return what is shown in place of a value of `useLoaded` that is not there yet. */
export const pending = ({ error, reload }) => (error ? html`<${ErrorBox} error=${error} retry=${reload} />` : html`<${Loading} />`);

export const Notices = () => html`<div class="notices" role="status">
  ${notices.value.map(({ id, text, kind }) => html`<p key=${id} class=${`notice ${kind}`}><span>${text}</span> <${Close} onClick=${() => dismiss(id)} /></p>`)}
</div>`;

const Close = ({ onClick }) => html`<button type="button" class="plain" aria-label="Close" onClick=${onClick}>x</button>`;

/** A button that is busy until the promise of `onClick` ends. `label` names it where its text does not. */
export function Button({ onClick, kind = "", label, disabled = false, children }) {
  const [busy, setBusy] = useState(false);
  const clicked = async (event) => {
    const done = onClick(event);
    if (!done?.then) return;
    setBusy(true);
    await done.finally(() => setBusy(false));
  };
  return html`<button type="button" class=${kind} aria-label=${label} disabled=${disabled || busy} aria-busy=${busy || null} onClick=${clicked}>${children}</button>`;
}

/** A control with its label; the child is one input, select or textarea. */
export const Field = ({ label, hint, children }) => html`<div class="field"><label><span>${label}</span>${children}</label>${hint && html`<small>${hint}</small>`}</div>`;

/** A line of text, or some `rows`; `onText` gets it at each change. */
export const TextField = ({ label, hint, onText, ...rest }) => html`<${Field} label=${label} hint=${hint}><${rest.rows ? "textarea" : "input"} ...${rest} onInput=${(event) => onText(event.target.value)} /><//>`;

/** The name of a new task, tenant or alias; for "My Flowers" it offers "my-flowers". */
export function NameField({ label = "Name", value, onText, hint = NAME_HINT }) {
  const offer = value.trim().toLowerCase().replace(/[^a-z0-9_-]+/g, "-").replace(/^[-_]+|-+$/g, "");
  const use = offer && offer !== value.replace(/-$/, "") && html`<button type="button" class="plain" onClick=${() => onText(offer)}>Use <u>${offer}</u> instead</button>`;
  return html`<${TextField} label=${label} required maxlength="63" pattern="[a-z0-9][a-z0-9_\\-]*" hint=${use || hint} title=${NAME_HINT} value=${value} onText=${onText} />`;
}
const NAME_HINT = "Small letters, digits, - and _, for example: my-flowers";

/** A choice of `options`, pairs of value and text; `onPick` gets the value. `none` is the text where nothing is chosen. */
export const Choice = ({ label, value, options, onPick, none }) => html`<${Field} label=${label}>
  <select value=${value ?? ""} onChange=${(event) => onPick(event.target.value)}>
    ${none && html`<option value="" disabled>${none}</option>`}
    ${options.map(([value, text]) => html`<option value=${value}>${text}</option>`)}
  </select>
<//>`;

/** A form. Its button is busy until the promise of `onSubmit` ends, and the form shows its error. */
export function Form({ action, onSubmit, row, children }) {
  const [{ busy, error }, set] = useState({});
  const submit = async (event) => {
    event.preventDefault();
    set({ busy: true });
    set(await Promise.resolve(onSubmit()).then(() => ({}), (error) => ({ error })));
  };
  return html`<form class=${row ? "row" : ""} onSubmit=${submit}>
    ${children}
    ${error && html`<${ErrorBox} error=${error} />`}
    <button disabled=${busy} aria-busy=${busy}>${action}</button>
  </form>`;
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
    <div class="dialog"><div class="title"><h2 id=${id}>${title}</h2><${Close} onClick=${onClose} /></div>${children}</div>
  </dialog>`;
}

export const Confirm = ({ title, action, onYes, onNo, children }) => html`<${Dialog} title=${title} onClose=${onNo}>
  <p>${children}</p>
  <div class="actions"><${Button} onClick=${onNo}>Cancel<//><${Button} kind="danger" onClick=${onYes}>${action}<//></div>
<//>`;

/** Text to copy: a command, or a key that is shown once. */
export function CopyBox({ label, text }) {
  const [done, setDone] = useState(false);
  const box = useRef(null);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      getSelection().selectAllChildren(box.current); // without TLS a page may not write to the clipboard
      if (!document.execCommand("copy")) return notify("The text is selected: press Ctrl+C.");
    }
    setDone(true);
    setTimeout(() => setDone(false), 2000);
  };
  return html`<div class="copy">
    <pre ref=${box} tabindex="0" role="region" aria-label=${label}><code>${text}</code></pre>
    <${Button} label=${`Copy ${label}`} onClick=${copy}>${done ? "Copied" : "Copy"}<//>
  </div>`;
}

/** A table of `rows`, each an array of cells. `sort` is {by, down, can, choose} where the server sorts; `more` loads further rows. */
export function Table({ label, head, rows, sort, more, empty }) {
  if (!rows.length && empty) return html`<p>${empty}</p>`;
  const order = (i) => (sort?.by === i ? (sort.down ? "descending" : "ascending") : null);
  const header = (text, i) =>
    sort?.can.includes(i) ? html`<button type="button" class="plain" onClick=${() => sort.choose(i)}>${text}</button>` : text || html`<span class="hidden">Actions</span>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label}>
      <table>
        <thead><tr>${head.map((text, i) => html`<th scope="col" aria-sort=${order(i)}>${header(text, i)}</th>`)}</tr></thead>
        <tbody>${rows.map((row) => html`<tr>${row.map((cell) => html`<td>${cell}</td>`)}</tr>`)}</tbody>
      </table>
    </div>
    ${more && html`<${Button} onClick=${more}>More ${label.toLowerCase()}<//>`}`;
}

/** A labelled bar for a share, with the interval of its estimate. */
export function Meter({ label, value, interval }) {
  const text = estimate(value, interval);
  const at = (share) => `${100 * Math.min(1, Math.max(0, share))}%`;
  return html`<div class="meter" role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax="1" aria-valuenow=${value} aria-valuetext=${text}>
    <span>${label}</span>
    <span class="meter-bar" aria-hidden="true">
      <span class="meter-fill" style=${{ width: at(value) }}></span>
      ${interval && html`<span class="meter-interval" style=${{ left: at(interval[0]), width: `calc(${at(interval[1])} - ${at(interval[0])})` }}></span>`}
    </span>
    <span>${text}</span>
  </div>`;
}

/** A small line of numbers; its label tells the numbers to a screen reader. */
export function Sparkline({ values, label }) {
  const top = Math.max(1, ...values);
  const step = 100 / Math.max(1, values.length - 1);
  const points = values.map((value, i) => `${(i * step).toFixed(1)},${(22 - (20 * value) / top).toFixed(1)}`).join(" ");
  return html`<svg class="sparkline" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label=${label}><polyline points=${points} /></svg>`;
}

const COLOURS = ["#2f7fd1", "#c2571a", "#2e8b57", "#9457b8", "#b8860b", "#c2405f", "#4a7a8c"];

/** A chart of uPlot: `data` is [x, y1, y2 ...], `series` the names of all. uPlot is loaded when the first chart is shown. */
export function Chart({ data, series, label, shares, time = false, height = 240 }) {
  const box = useRef(null);
  const plot = useRef(null);
  useEffect(() => {
    let gone = false;
    const place = box.current; // the ref is empty before the observer below ends
    const size = () => ({ width: Math.max(200, place.clientWidth), height });
    const sizes = new ResizeObserver(() => plot.current?.setSize(size()));
    const draw = ({ default: UPlot }) => {
      if (gone) return;
      // Few wide marks: times of the browser's language, and numbers of things are whole.
      const when = (_plot, marks, _axis, _space, step) => marks.map((s) => new Date(1000 * s)[step < 86_400 ? "toLocaleTimeString" : "toLocaleDateString"]());
      const axis = { stroke: () => getComputedStyle(place).color, grid: { stroke: "#8884", width: 1 }, ticks: { stroke: "#8884" } };
      const range = ({ data: [x] }, low, high) => (x.length > 1 ? [low, high] : [low - 60, low]); // uPlot would show three years around one point
      const across = { ...axis, space: 90, ...(time ? { values: when } : { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] }) };
      const lines = series.slice(1).map((name, i) => ({ label: name, stroke: COLOURS[i % COLOURS.length], width: 2, spanGaps: true, points: { show: data[0].length < 40 } }));
      plot.current = new UPlot({ ...size(), scales: { x: { time, range }, y: shares ? { range: [0, 1.05] } : {} }, axes: [across, axis], series: [{ label: series[0] }, ...lines] }, data, place);
      sizes.observe(place);
    };
    import("../vendor/uplot.js").then(draw, () => {}); // the hub is away: the page works without its chart
    return () => {
      gone = true;
      sizes.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [series.join("\n"), time, height]);
  useEffect(() => plot.current?.setData(data), [data]);
  return html`<figure class="chart"><div ref=${box} role="img" aria-label=${label}></div><figcaption>${label}</figcaption></figure>`;
}

const SEEN_MS = 100; // in view before a thumbnail is fetched: a fast scroll fetches none on its way

/** The thumbnail of an image of a task. It is fetched when it comes into view, and freed when it goes. */
export function Thumbnail({ task, digest, alt }) {
  const box = useRef(null);
  const [seen, setSeen] = useState(false);
  const { url, error } = useFile(seen && at(task, "images", digest, "thumbnail"));
  useEffect(() => {
    let timer = 0;
    const watch = new IntersectionObserver((entries) => {
      clearTimeout(timer);
      if (entries.at(-1).isIntersecting) timer = setTimeout(() => (watch.disconnect(), setSeen(true)), SEEN_MS);
    });
    watch.observe(box.current);
    return () => {
      clearTimeout(timer);
      watch.disconnect();
    };
  }, []);
  return html`<span class="thumbnail-box" ref=${box}>
    ${url && html`<img class="thumbnail" src=${url} alt=${alt} draggable="false" />`}
    ${error && html`<span class="thumbnail missing" role="img" aria-label=${`${alt} (not loaded)`}>?</span>`}
  </span>`;
}

/** Return the files of a drop, with those in folders: [{file, path}]. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map(plain);
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      found.push({ file: await new Promise((yes, no) => entry.file(yes, no)), path: entry.fullPath.replace(/^\//, "") });
      return;
    }
    const reader = entry.createReader(); // it gives some entries at a time, and none at the end
    for (let some; (some = await new Promise((yes, no) => reader.readEntries(yes, no))).length; ) {
      for (const child of some) await walk(child);
    }
  };
  for (const entry of entries) await walk(entry);
  return found;
}

const plain = (file) => ({ file, path: file.webkitRelativePath || file.name });

/** A place to drop, paste or choose files; `onFiles` gets [{file, path}], where a path begins with its folders. */
export function DropZone({ onFiles, accept, folders = false, children }) {
  const [over, setOver] = useState(false);
  const take = useRef();
  take.current = (files) => files.length && onFiles(files);
  useEffect(() => {
    const paste = ({ clipboardData }) => document.querySelector("dialog[open]") || take.current([...(clipboardData?.files ?? [])].map(plain));
    addEventListener("paste", paste);
    return () => removeEventListener("paste", paste);
  }, []);
  const chosen = ({ target }) => {
    const files = [...target.files].map(plain);
    target.value = ""; // otherwise the same files could not be chosen again
    take.current(files);
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    attempt(async () => take.current(await dropped(event.dataTransfer)));
  };
  const drag = (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
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
    const stop = () => stream?.getTracks().forEach((track) => track.stop());
    const start = async () => {
      if (!navigator.mediaDevices) throw new Error("This browser gives the camera only to pages over TLS or on localhost.");
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      if (gone) return stop();
      video.current.srcObject = stream;
      await video.current.play();
    };
    start().catch((problem) => gone || setError(problem));
    return () => {
      gone = true;
      stop();
    };
  }, []);
  const take = () => {
    const { videoWidth, videoHeight } = video.current;
    if (!videoWidth) return;
    const canvas = Object.assign(document.createElement("canvas"), { width: videoWidth, height: videoHeight });
    canvas.getContext("2d").drawImage(video.current, 0, 0);
    canvas.toBlob(onPicture, "image/jpeg", 0.92);
  };
  return html`<${Dialog} title="Camera" onClose=${onClose}>
    ${error ? html`<p role="alert">The camera cannot be used: ${error.message}</p>` : html`<video class="full" ref=${video} muted playsinline aria-label="the camera's picture"></video>`}
    <div class="actions"><${Button} onClick=${onClose}>Close<//>${!error && html`<${Button} kind="primary" onClick=${take}>Take the picture<//>`}</div>
  <//>`;
}
