/** Upload of many images in forms of one label, and of zips: in parallel, with progress, never losing a reason. */
import { api, at } from "../../api.js";
import { patiently } from "../../calls.js";
import { useRef, useState } from "../../lib.js";

const FORM_IMAGES = 32;
const FORM_BYTES = 12e6; // of one form; a larger image is sent alone
const PARALLEL = 2;
const SYSTEM_FILE = /(^|\/)(\.|__MACOSX|Thumbs\.db$|desktop\.ini$)/i;

const isZip = ({ file }) => /\.zip$/i.test(file.name) || /zip/.test(file.type);

/** Return label and split of a file from its folders: `photos/test/rose/1.jpg`. */
function fromPath(path) {
  const folders = path.split("/").slice(0, -1);
  const split = folders.map((name) => name.toLowerCase()).find((name) => name === "train" || name === "test");
  return { label: folders.at(-1) && folders.at(-1).toLowerCase() !== split ? folders.at(-1) : "", split: split ?? "" };
}

/** Return the parts of an upload: [{zip}] or [{label, split, files}]. `choice` null: the folders name the labels. */
export function partsOf(files, choice) {
  const groups = new Map();
  const parts = [];
  for (const found of files) {
    if (SYSTEM_FILE.test(found.path)) continue;
    if (isZip(found)) {
      parts.push({ zip: true, label: choice ?? "", split: "", files: [found.file], bytes: found.file.size });
      continue;
    }
    const { label, split } = choice === null ? fromPath(found.path) : { label: choice, split: "" };
    const key = JSON.stringify([label, split]);
    let part = groups.get(key);
    if (!part || part.files.length >= FORM_IMAGES || part.bytes + found.file.size > FORM_BYTES) {
      part = { label, split, files: [], bytes: 0 };
      groups.set(key, part);
      parts.push(part);
    }
    part.files.push(found.file);
    part.bytes += found.file.size;
  }
  return parts;
}

/** Send one part; wait where the tenant's rate is reached. */
async function send(task, part, onProgress, signal) {
  const params = { label: part.label, split: part.split };
  let body = part.files[0];
  const type = part.zip && "application/zip";
  if (!part.zip) {
    body = new FormData();
    for (const file of part.files) body.append("image", file, file.name);
  }
  return patiently(() => api.upload(at(task, "images"), body, { params, type, onProgress, signal }), signal);
}

/** State of an upload of a task: {state, start, stop}. `onDone` is called after each part, and with true at the end. */
export function useUpload(task, onDone) {
  const [state, setState] = useState(null);
  const abort = useRef(null);
  const latest = useRef(onDone);
  latest.current = onDone;

  async function start(files, choice) {
    const parts = partsOf(files, choice);
    const total = { bytes: 0, files: 0 };
    for (const part of parts) (total.bytes += part.bytes), (total.files += part.files.length);
    if (!parts.length) return setState({ done: true, files: 0, nothing: true, counts: {}, refused: [], warnings: [] });
    const stop = (abort.current = new AbortController());
    const sent = new Map(); // bytes by part; half of them until the hub has answered
    const found = { counts: {}, refused: [], warnings: [], unlabelled: [] };
    let last = 0;
    const show = (more) => {
      if (!more && Date.now() - last < 100) return;
      last = Date.now();
      const bytes = [...sent.values()].reduce((sum, part) => sum + part, 0);
      setState({ ...found, share: total.bytes ? bytes / total.bytes : 0, files: total.files, ...more });
    };
    const take = async (part) => {
      try {
        const reply = await send(task, part, (bytes) => (sent.set(part, Math.min(bytes, part.bytes) / 2), show()), stop.signal);
        for (const [name, count] of Object.entries(reply.counts)) found.counts[name] = (found.counts[name] ?? 0) + count;
        found.refused.push(...reply.refused);
        for (const { digest, label } of reply.added) if (label === null && choice === null) found.unlabelled.push(digest);
        found.warnings = [...new Set([...found.warnings, ...reply.warnings])];
      } catch (error) {
        if (error.name === "AbortError" || [401, 403, 404, 429, 507].includes(error.status) || !error.status) throw error;
        if (part.files.length > 1) {
          // One file made the whole form fail: send each alone.
          for (const file of part.files) await take({ ...part, files: [file], bytes: 0 });
        } else {
          found.counts.refused = (found.counts.refused ?? 0) + 1;
          found.refused.push({ name: part.files[0].name, reason: error.message });
        }
      }
      sent.set(part, part.bytes);
      show({});
      latest.current(false);
    };
    const queue = [...parts];
    const work = async () => {
      while (queue.length && !stop.signal.aborted) await take(queue.shift());
    };
    show({});
    try {
      await Promise.all(Array.from({ length: PARALLEL }, work));
    } catch (error) {
      queue.length = 0;
      stop.abort();
      if (error.name !== "AbortError") found.error = error.message;
    }
    if (stop.signal.aborted) found.error ??= "Stopped. Images that had arrived stay.";
    await latest.current(true);
    show({ done: true });
  }
  return { state, start, stop: () => abort.current?.abort(), clear: () => setState(null) };
}
