/** Tab "Try": a picture in, an answer out, from one version or from two side by side. */
import { api, at } from "../../api.js";
import { attempt } from "../../calls.js";
import { Button, Camera, Choice, DropZone, Empty, Meter, percent, plural } from "../../components.js";
import { html, useEffect, useRef, useState } from "../../lib.js";
import { LabelChoice, owns, references } from "./shared.js";

const SHOWN = 48; // pictures at once
const COVERAGE = 0.9;
const PARTS = { decode: "reading the picture", load: "loading the version", queue: "waiting", compute: "computing" }; // of an answer's time

/** Classify one picture with a version: the reply, and what its headers say. */
async function classify(task, file, version, sets) {
  const params = { version, top_k: 5, ...(sets ? { coverage: COVERAGE } : {}) };
  const began = performance.now();
  const reply = await api.call("POST", at(task, "classify"), { params, body: file });
  const { headers } = reply;
  const times = Object.fromEntries(
    [...(headers.get("server-timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]),
  );
  return {
    ...(await reply.json()),
    times,
    total: performance.now() - began,
    companions: [headers.get("x-batch-images"), headers.get("x-batch-tasks")].map(Number),
  };
}

export default function Try({ task, detail }) {
  const known = references(detail);
  const [versions, setVersions] = useState(["latest", ""]);
  const [pictures, setPictures] = useState([]);
  const [camera, setCamera] = useState(false);
  const held = useRef([]);
  held.current = pictures;
  useEffect(() => () => held.current.forEach(({ url }) => URL.revokeObjectURL(url)), []);
  if (!detail.versions.length) {
    return html`<${Empty} title="No version yet">
      <p>The task answers as soon as it has a version.${owns(task) && html` <a href=${`#/tasks/${task}/images`}>Add images</a>, then <a href=${`#/tasks/${task}/train`}>train</a>.`}</p>
    <//>`;
  }
  const add = (files) => {
    const added = files.slice(0, SHOWN).map(({ file }) => ({ file, url: URL.createObjectURL(file), id: crypto.randomUUID?.() ?? Math.random() }));
    const next = [...added, ...pictures];
    next.slice(SHOWN).forEach(({ url }) => URL.revokeObjectURL(url));
    setPictures(next.slice(0, SHOWN));
  };
  const choose = (i, value) => setVersions(versions.map((old, k) => (k === i ? value : old)));
  const chosen = versions.filter(Boolean);
  return html`<section aria-label="Try">
    <${DropZone} onFiles=${add} accept="image/*"><p><strong>Drop pictures here</strong>, paste one, or choose some.</p><//>
    <div class="row">
      <${Button} onClick=${() => setCamera(true)}>Use the camera<//>
      ${["Version", "Compare with"].map(
        (text, i) => html`<${Choice} label=${text} value=${versions[i]} options=${i ? [["", "no other version"], ...known] : known} onPick=${(value) => choose(i, value)} />`,
      )}
    </div>
    ${camera && html`<${Camera} onPicture=${(blob) => (setCamera(false), add([{ file: blob, path: "" }]))} onClose=${() => setCamera(false)} />`}
    <div aria-live="polite">
      ${pictures.map(
        ({ file, url, id }) => html`<article key=${id} class="card tried">
          <div><img class="preview" src=${url} alt="the picture" /><p class="soft">${file.name}</p></div>
          <div class="sides">
            ${chosen.map((version, i) => html`<${Answer} key=${`${i}${version}`} task=${task} file=${file} version=${version} detail=${detail} />`)}
          </div>
          ${owns(task) && html`<${Teach} task=${task} file=${file} labels=${detail.labels} />`}
        </article>`,
      )}
    </div>
  </section>`;
}

function Answer({ task, file, version, detail }) {
  const [found, setFound] = useState(null);
  useEffect(() => {
    let gone = false;
    const sets = (detail.versions.find((v) => String(v.version) === version) ?? detail.versions.at(-1))?.coverage;
    classify(task, file, version, sets)
      // Versions behind one alias may differ in what they know.
      .catch((error) => (error.status === 422 && sets && error.errors?.some(({ field }) => field === "coverage") ? classify(task, file, version) : Promise.reject(error)))
      .then((answer) => gone || setFound({ answer }), (error) => gone || setFound({ error }));
    return () => (gone = true);
  }, [task, file, version]);
  if (!found) return html`<div aria-busy="true">Classifying ...</div>`;
  if (found.error) return html`<div class="warning"><p>${found.error.message}</p></div>`;
  const { answer } = found;
  const [best] = answer.predictions[0];
  const [images, tasks] = answer.companions;
  const unknown = answer.unknown?.[0];
  return html`<div class="answer">
    <h2>${unknown ? "Unknown" : best.label} <small>version ${answer.version}</small></h2>
    ${unknown && html`<p class="warning">The picture does not look like the task's images, so these figures mean little.</p>`}
    ${answer.predictions[0].map(({ label, score }) => html`<${Meter} key=${label} label=${label} value=${score} />`)}
    ${answer.sets && !unknown && html`<p>${percent(COVERAGE)} sure, if it is like the task's images: ${answer.sets[0].join(" or ")}</p>`}
    ${answer.typicality &&
    html`<${Meter} label="Typicality" value=${answer.typicality[0]} />
      <p class="soft">${percent(answer.typicality[0])} of the task's own images look less typical. Near 0 %: the picture is unlike them.</p>`}
    <details class="soft">
      <summary>Answered in ${Math.round(answer.total)} ms</summary>
      ${Object.entries(answer.times).map(([name, ms]) => `${PARTS[name] ?? name} ${ms.toFixed(1)} ms, `)}the rest on the way.${images > 0 && ` Computed in one pass of ${plural(images, "image")} of ${plural(tasks, "task")}.`}
    </details>
  </div>`;
}

/** Add the picture to the task's images with its true label, so that the next training knows it. */
function Teach({ task, file, labels }) {
  const [given, setGiven] = useState(null);
  const give = (label) =>
    attempt(async () => {
      const form = new FormData();
      form.append("image", file, file.name || "picture.jpg");
      const { refused } = await api.upload(at(task, "images"), form, { params: { label } });
      if (refused.length) throw new Error(refused[0].reason);
      setGiven(label);
    });
  if (given) return html`<p role="status">Added as ${given}. <a href=${`#/tasks/${task}/train`}>Train again</a> to use it.</p>`;
  return html`<div class="row"><${LabelChoice} text="Add to the images as" labels=${labels} onPick=${give} /></div>`;
}
