/** Parts that several tabs of a task share. */
import { api, at } from "../../api.js";
import { attempt, useFile, useLoaded } from "../../calls.js";
import { Button, Choice, Dialog, Field, Thumbnail } from "../../components.js";
import { html, signal, useEffect, useRef, useState } from "../../lib.js";
import { me } from "../../state.js";

/** Return whether this person may change a task: an owner of its tenant. */
export const owns = (task) => me.value?.role === "owner" && !task.includes(":");

/** Whether keys of one character are commands: speech input may press them by mistake (WCAG 2.1.4). */
const commands = signal(true);

export const KeysChoice = () =>
  html`<label><input type="checkbox" checked=${commands.value} onChange=${({ target }) => (commands.value = target.checked)} /> letters and numbers are commands</label>`;

/** Call `onKey` for each key outside of text fields, dialogs and controls that use the key themselves. */
export function useKeys(onKey) {
  const latest = useRef(onKey);
  latest.current = onKey;
  useEffect(() => {
    const listen = (event) => {
      if (event.defaultPrevented || event.altKey || document.querySelector("dialog[open]")) return;
      if (event.target.closest("input:not([type=checkbox]), select, textarea")) return;
      if (!commands.value && event.key.length === 1 && !event.ctrlKey && !event.metaKey) return;
      if (event.key === "Enter" && event.target.closest("button, a:not([aria-current]), summary")) return;
      latest.current(event);
    };
    addEventListener("keydown", listen);
    return () => removeEventListener("keydown", listen);
  }, []);
}

/** Return the versions and aliases of a task as pairs of value and text for a choice. */
export const references = (detail) => [
  ...Object.keys(detail.aliases).map((alias) => [alias, `${alias} (${targets(detail, alias)})`]),
  ...detail.versions.map(({ version }) => [String(version), `version ${version}`]),
];

export function targets(detail, alias) {
  const weights = Object.entries(detail.aliases[alias] ?? {});
  const sum = weights.reduce((total, [, weight]) => total + weight, 0);
  if (weights.length === 1) return `version ${weights[0][0]}`;
  return weights.map(([version, weight]) => `${Math.round((100 * weight) / sum)} % version ${version}`).join(", ");
}

/** Return the only version of an alias; null if it has several or does not exist. */
export function versionOf(detail, alias) {
  const versions = Object.keys(detail.aliases[alias] ?? {});
  return versions.length === 1 ? Number(versions[0]) : null;
}

export const FEW_TESTED = 10; // fewer test images say less than the left-out ones
const MEASURED = [
  ["test", "test_images", "test images"],
  ["held_out", "train_images", "held-out images"],
  ["leave_one_out", "train_images", "left-out images"],
  ["val", "val_images", "validation images"],
];

/** Return [{accuracy, interval, images, on}] from the figures of a training, the most telling first. */
export function accuraciesOf(metrics) {
  const found = MEASURED.map(([name, images, on]) => ({ accuracy: metrics?.[`${name}_accuracy`], interval: metrics?.[`${name}_interval`], images: metrics?.[images], on }));
  const [first, ...others] = found.filter(({ accuracy }) => typeof accuracy === "number");
  return first?.on === "test images" && first.images < FEW_TESTED ? [...others, first] : first ? [first, ...others] : [];
}

export const accuracyOf = (metrics) => accuraciesOf(metrics)[0];

export function Sees() {
  const { value } = useLoaded(() => api.get("/v1/backbone"), []);
  if (!value) return null;
  const [, height, width] = value.input_size;
  return html`<p class="soft">
    This hub's backbone sees images at ${width} x ${height} pixels, and no finer details.${width < SMALL_PX &&
    html` A larger one sees more, such as <code>HUB_BACKBONE=vit_base_patch16_224.augreg_in21k</code> (docs/backbones.md).`}
  </p>`;
}
const SMALL_PX = 96;

/** A warning of labels without a test image, where others have some. */
export function Untested({ info }) {
  const tested = info.labels.some(({ test }) => test > 0);
  const missing = tested ? info.labels.filter(({ train, test }) => train > 0 && !test).map(({ label }) => label) : [];
  if (!missing.length) return null;
  const named = missing.slice(0, 10).join(", ") + (missing.length > 10 ? ` and ${missing.length - 10} more` : "");
  return html`<p class="warning">
    No test image of ${named}: the accuracy on test images does not cover ${missing.length > 1 ? "these labels" : "this label"}. Add images, or open one and set its use to “test”.
  </p>`;
}

/** A choice of a label, with a way to a new one. Without a `value` (null: no label), a choice is an action. */
export function LabelChoice({ labels, value, none, onPick, text = "Label" }) {
  const [fresh, setFresh] = useState(null);
  if (fresh !== null) {
    const done = (event) => {
      event.preventDefault();
      if (fresh.trim()) onPick(fresh.trim());
      setFresh(null);
    };
    return html`<form class="row" onSubmit=${done}>
      <${Field} label="New label"><input value=${fresh} maxlength="200" ref=${focus} onInput=${(e) => setFresh(e.target.value)} /><//>
      <${Button} onClick=${() => setFresh(null)}>Cancel<//><button>Add</button>
    </form>`;
  }
  const picked = ({ target }) => {
    if (target.value === "+") setFresh("");
    else onPick(target.value.slice(1) || null);
    if (value === undefined) target.value = ""; // an action, not a state
  };
  return html`<${Field} label=${text}>
    <select value=${value === undefined ? "" : `=${value ?? ""}`} onChange=${picked}>
      ${value === undefined && html`<option value="" disabled>choose ...</option>`} ${none && html`<option value="=">${none}</option>`}
      ${labels.map((label) => html`<option value=${`=${label}`}>${label}</option>`)}
      <option value="+">new label ...</option>
    </select>
  <//>`;
}

const focus = (element) => element?.focus();

/** An image at its full size; its thumbnail until the file is there, and if the browser cannot show the file. */
export function FullImage({ task, digest, alt }) {
  const { url } = useFile(at(task, "images", digest));
  const [bad, setBad] = useState(null);
  if (!url || bad === url) return html`<${Thumbnail} task=${task} digest=${digest} alt=${alt} />`;
  return html`<img class="full" src=${url} alt=${alt} onError=${() => setBad(url)} />`;
}

export function ImageDialog({ task, image, labels, note, onChange, onDelete, onClose }) {
  const change = (body, text) => attempt(async () => onChange(await api.patch(at(task, "images", image.digest), body)), text);
  return html`<${Dialog} title=${image.name || image.digest.slice(0, 12)} onClose=${onClose}>
    <${FullImage} task=${task} digest=${image.digest} alt=${image.name || "the image"} />
    ${note && html`<p>${note}</p>`}
    <div class="row">
      <${LabelChoice} labels=${labels} value=${image.label} none="no label" onPick=${(label) => change({ label }, label ? `Labelled ${label}.` : "The label is removed.")} />
      ${image.split &&
      html`<${Choice}
        label="Use"
        value=${image.split}
        options=${[["auto", `automatic (now: ${image.use})`], ["train", "train"], ["test", "test"]]}
        onPick=${(split) => change({ split }, "The use is changed.")}
      />`}
      ${onDelete && html`<${Button} kind="danger" onClick=${onDelete}>Delete<//>`}
    </div>
  <//>`;
}

/** Thumbnails of some images that open a dialog: list of {digest, label, text}. */
export function ImageStrip({ task, images, labels, empty = "No image." }) {
  const [open, setOpen] = useState(null);
  const [changed, setChanged] = useState({});
  if (!images.length) return html`<p>${empty}</p>`;
  const shown = images.map((image) => ({ ...image, ...changed[image.digest] }));
  return html`<ul class="strip">
      ${shown.map(
        (image) => html`<li key=${image.digest}>
          <button class="plain" onClick=${() => setOpen(image.digest)}>
            <${Thumbnail} task=${task} digest=${image.digest} alt="" />
            <span>${image.text}</span>
          </button>
        </li>`,
      )}
    </ul>
    ${open &&
    html`<${ImageDialog}
      task=${task}
      image=${shown.find(({ digest }) => digest === open)}
      labels=${labels}
      onClose=${() => setOpen(null)}
      onChange=${(image) => setChanged({ ...changed, [image.digest]: { ...image, text: `now ${image.label ?? "without a label"}` } })}
    />`}`;
}
