/** Tab "Use": how a program calls this task, and how it is used. */
import { address, api, at } from "../../api.js";
import { useLoaded } from "../../calls.js";
import { Chart, CopyBox, Table, count, percent, plural } from "../../components.js";
import { html } from "../../lib.js";
import { owns } from "./shared.js";

const DAYS = 30;

const curl = (url, task) => `export HUB_KEY=kh_...
curl -H "Authorization: Bearer $HUB_KEY" \\
  "${url}/v1/tasks/${task}/classify" --data-binary @picture.jpg`;

const python = (url, task) => `from hub import Client  # pip install karst-hub

with Client("${url}", "kh_...") as client:
    answer = client.classify("${task}", "picture.jpg")
    print(answer.predictions[0][0].label)`;

const script = (url, task) => `const reply = await fetch("${url}/v1/tasks/${task}/classify", {
  method: "POST",
  headers: { authorization: \`Bearer \${token}\` },
  body: file,
});
const { predictions } = await reply.json();
console.log(predictions[0][0].label);`;

export default function Use({ task, detail }) {
  const url = address("/").href.replace(/\/$/, "");
  return html`<h2>Call this task</h2>
    ${!detail.versions.length && html`<p>The task answers as soon as it has a version.</p>`}
    <p>Programs need a key that may only classify${owns(task) ? html`: <a href="#/tenant">make one</a>` : ""}. Put it in place of <code>kh_...</code>, and your file in place of <code>picture.jpg</code>.</p>
    ${[["curl", curl], ["Python", python], ["JavaScript", script]].map(([name, text]) => html`<h3>${name}</h3><${CopyBox} label=${name} text=${text(url, task)} />`)}
    <p>Visitors can read a key in a web page. Give each a token of some minutes instead: <a href=${address("/docs")}><code>POST /v1/tokens</code></a> on your server, or <code>karst-hub token ${task}</code> (docs/browsers.md).</p>
    ${owns(task) && html`<${Usage} task=${task} />`}`;
}

/** Counts by label and day, and drift; nothing if the hub does not count. */
function Usage({ task }) {
  const usage = useLoaded(() => api.get(at(task, "usage"), { days: DAYS }), [task]);
  if (!usage.value) return null;
  const { days, total, drift } = usage.value;
  if (!total?.images) return html`<h2>Use of the last ${DAYS} days</h2><p>No image was classified yet.</p>`;
  const labels = Object.entries(total.by_label ?? {}).sort((a, b) => b[1] - a[1]);
  const shown = labels.slice(0, 6).map(([label]) => label);
  const time = days.map(({ day }) => Date.parse(day) / 1000);
  return html`<h2>Use of the last ${DAYS} days</h2>
    <p>
      ${plural(total.images, "image")}${typeof total.unknown === "number" ? `, ${percent(total.unknown / total.images)} unknown` : ""}${typeof total.typicality === "number" ? `, mean typicality ${total.typicality.toFixed(2)}` : ""}${total.confirmed + total.corrections > 0 ? `, ${count(total.corrections)} of ${count(total.confirmed + total.corrections)} reviewed answers corrected` : ""}.
    </p>
    ${drift && html`<p class=${drift.verdict === "drift" ? "warning" : ""}><strong>Drift:</strong> ${drift.text}</p>`}
    <${Chart} label="Images a day" time data=${[time, days.map(({ images }) => images), ...shown.map((label) => days.map(({ by_label }) => by_label?.[label] ?? 0))]} series=${["day", "all", ...shown]} />
    <${Table} label="Answers by label" head=${["label", "images", "share"]} rows=${labels.slice(0, 100).map(([label, n]) => [label, count(n), percent(n / total.images)])} />
    <${Table} label="Images by version" head=${["version", "images"]} rows=${Object.entries(total.by_version ?? {}).map(([version, n]) => [version, count(n)])} />`;
}
