/** Tab "Versions": what was trained, what is live, and the way back. */
import { api, at } from "../../api.js";
import { attempt } from "../../calls.js";
import { Button, Choice, Confirm, Empty, Field, Form, NameField, Table, ago, bytes, count, estimate } from "../../components.js";
import { html, useEffect, useState } from "../../lib.js";
import { accuracyOf, targets } from "./shared.js";

export default function Versions({ task, detail, reload }) {
  const [gone, setGone] = useState(null); // the version or alias to delete
  if (!detail.versions.length) {
    return html`<${Empty} title="No version yet"><p><a href=${`#/tasks/${task}/train`}>Train</a>, or register a file with <code>karst-hub register</code>.</p><//>`;
  }
  const change = (action, text) => attempt(async () => (await action(), await reload()), text);
  const download = (version) =>
    attempt(() => api.download(at(task, "versions", version, "file"), `${task.split(":").at(-1)}-${version}.safetensors`));
  const pointing = (version) => Object.keys(detail.aliases).filter((alias) => version in detail.aliases[alias]);
  const versions = [...detail.versions].sort((a, b) => b.version - a.version);
  return html`<h2>Aliases</h2>
    <p>Programs call a version by an alias. Move it, and their next call gets another version. <code>latest</code> follows each new version; <code>stable</code> is for the one that you trust.</p>
    ${Object.keys(detail.aliases).map(
      (alias) => html`<${Alias} key=${alias} task=${task} alias=${alias} detail=${detail} versions=${versions} change=${change} onDelete=${() => setGone({ alias })} />`,
    )}
    <${NewAlias} task=${task} versions=${versions} change=${change} />
    <${Choice}
      label="After a training in the hub, stable moves"
      value=${detail.promote}
      options=${[["never", "by hand only"], ["if_better", "if the version is better on the same test images"], ["always", "always"]]}
      onPick=${(promote) => change(() => api.put(at(task), { promote }), "The setting is saved.")}
    />
    <h2>Versions</h2>
    <p>Recipe <code>instant</code> learned the labels only, <code>karst</code> also adapted the backbone. A snapshot is the list of images and labels behind a version. Test images are not among the training images.</p>
    <${Table}
      label="All versions"
      head=${["version", "registered", "accuracy", "recipe", "training images", "labels", "size", "trained on", "aliases", ""]}
      rows=${versions.map((version) => {
        const metrics = version.metrics ?? {};
        const found = accuracyOf(metrics);
        return [
          version.version,
          ago(version.registered),
          found ? estimate(found.accuracy, found.interval, 0) : "unknown",
          metrics.recipe ?? "uploaded",
          count(metrics.train_images),
          count(version.labels.length),
          bytes(version.size_bytes),
          metrics.training ? html`<a href=${`#/tasks/${task}/train?training=${metrics.training}`}>snapshot <code>${String(metrics.snapshot).slice(0, 8)}</code></a>` : "",
          pointing(version.version).join(", "),
          html`<span class="actions">
            <${Button} onClick=${() => download(version.version)} label=${`Download version ${version.version}`}>Download<//>
            <${Button} kind="danger" disabled=${pointing(version.version).length > 0} onClick=${() => setGone(version)} label=${`Delete version ${version.version}`}>Delete<//>
          </span>`,
        ];
      })}
    />
    ${gone &&
    html`<${Confirm}
      title=${gone.alias ? `Delete the alias ${gone.alias}` : `Delete version ${gone.version}`}
      action="Delete"
      onNo=${() => setGone(null)}
      onYes=${async () => {
        const path = gone.alias ? at(task, "aliases", gone.alias) : at(task, "versions", gone.version);
        await change(() => api.delete(path), "Deleted.");
        setGone(null);
      }}
    >
      ${gone.alias ? "Callers that name it will get an error." : "Its number is never used again."}
    <//>`}`;
}

const option = ({ version }) => [version, `version ${version}`];

function Alias({ task, alias, detail, versions, change, onDelete }) {
  const weights = detail.aliases[alias];
  const live = Object.keys(weights).map(Number).sort((a, b) => weights[b] - weights[a]);
  const sum = live.reduce((total, version) => total + weights[version], 0);
  const [chosen, setCanary] = useState(null);
  const [moved, setShare] = useState(null); // null: the share is as the alias has it
  useEffect(() => setShare(null), [JSON.stringify(weights)]);
  const main = live.find((version) => version !== chosen) ?? live[0]; // a canary of more than half stays the canary
  const canary = [chosen, ...live].find((version) => version !== null && version !== main) ?? null;
  const share = moved ?? (canary in weights ? Math.round((100 * weights[canary]) / sum) : 10);
  const path = at(task, "aliases", alias);
  const others = versions.filter(({ version }) => version !== main);
  const start = () => {
    const target = share >= 100 ? { version: canary } : share <= 0 ? { version: main } : { weights: { [main]: 100 - share, [canary]: share } };
    return change(() => api.put(path, target), `${alias}: ${share} % of the calls get version ${canary}.`);
  };
  return html`<div class="card alias">
    <div class="row">
      <span><strong><code>${alias}</code></strong>: ${targets(detail, alias)}</span>
      <${Choice}
        label=${`Point ${alias} at`}
        value=${live[1] ? null : main}
        none=${live[1] && "several"}
        options=${versions.map(option)}
        onPick=${(version) => change(() => api.put(path, { version: Number(version) }), `${alias} is version ${version} now.`)}
      />
      <${Button} label=${`Roll back ${alias}`} onClick=${() => change(() => api.post(`${path}/rollback`), `${alias} is back at its previous target.`)}>Roll back<//>
      ${alias !== "latest" && html`<${Button} kind="danger" label=${`Delete the alias ${alias}`} onClick=${onDelete}>Delete<//>`}
    </div>
    ${others.length > 0 &&
    html`<details open=${!!live[1]}>
      <summary>Canary: a share of the calls to another version</summary>
      <div class="row">
        <${Choice} label="Canary" value=${canary} none="choose ..." options=${others.map(option)} onPick=${(version) => setCanary(Number(version))} />
        <${Field} label=${`Share of ${alias}: ${share} %`}>
          <input type="range" min="0" max="100" value=${share} onInput=${(e) => setShare(Number(e.target.value))} />
        <//>
        <${Button} disabled=${canary === null} onClick=${start}>Set<//>
      </div>
    </details>`}
  </div>`;
}

function NewAlias({ task, versions, change }) {
  const [name, setName] = useState("");
  const [version, setVersion] = useState(versions[0].version);
  const submit = async () => {
    if (await change(() => api.put(at(task, "aliases", name), { version }), `${name} is version ${version}.`)) setName("");
  };
  return html`<${Form} row action="Set" onSubmit=${submit}>
    <${NameField} label="New alias" hint="" value=${name} placeholder="stable" onText=${setName} />
    <${Choice} label="for" value=${version} options=${versions.map(option)} onPick=${(chosen) => setVersion(Number(chosen))} />
  <//>`;
}
