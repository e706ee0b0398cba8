/** Tab "Train": one button, the live curve, and what the result means. */
import { api, at, sleep } from "../../api.js";
import { attempt, useLoaded } from "../../calls.js";
import { Button, Chart, Choice, Empty, ErrorBox, Meter, Table, ago, count, duration, estimate, pending, percent, plural, sentence } from "../../components.js";
import { html, signal, useEffect, useRef, useState } from "../../lib.js";
import { go, route } from "../../router.js";
import { FEW_TESTED, ImageStrip, Sees, accuraciesOf, accuracyOf, versionOf } from "./shared.js";

const ENDED = ["done", "failed", "cancelled"];
const budget = signal(600); // seconds of KARST, as the person last chose
const CELLS = 20; // labels of a confusion matrix; with more, only its largest confusions are listed

export default function Train({ task, detail, reload }) {
  const info = useLoaded(() => api.get(at(task, "dataset")), [task]);
  const trainings = useLoaded(async () => (await api.get(at(task, "trainings"))).trainings, [task]);
  const [starting, setStarting] = useState(false);
  const chosen = route.value.query.training;

  const ended = () => Promise.all([trainings.reload(), reload()]);
  const start = async (recipe) => {
    setStarting(true);
    await attempt(async () => {
      const training = await api.post(at(task, "trainings"), { recipe, budget_s: budget.value });
      await ended();
      go(`/tasks/${task}/train?training=${training.id}`);
    });
    setStarting(false);
  };
  for (const loaded of [info, trainings]) if (!loaded.value) return pending(loaded);
  const trainable = info.value.labels.filter(({ train, test }) => train + test > 0);
  const images = trainable.reduce((sum, { train, test }) => sum + train + test, 0);
  const shown =
    trainings.value.find(({ id }) => id === chosen) ??
    trainings.value.find(({ state }) => !ENDED.includes(state)) ??
    trainings.value[0];
  if (trainable.length < 2 && !shown) {
    return html`<${Empty} title="Nothing to train on yet">
      <p>A training needs images of at least two labels; ten of each are a good start.</p>
      <p><a href=${`#/tasks/${task}/images`}>Add and label images</a></p>
    <//>`;
  }
  return html`<section aria-label="Train">
    <div class="row">
      <${Button} kind="primary" disabled=${trainable.length < 2} onClick=${() => start("instant")}>Train now<//>
      <span>takes seconds, the first time longer; ${plural(images, "image")} of ${plural(trainable.length, "label")}, a part of them only to test</span>
    </div>
    ${shown &&
    html`<div class="row">
      <${Button} disabled=${trainable.length < 2} onClick=${() => start("auto")}>Improve<//>
      <${Choice} label="for about" value=${budget.value} options=${[[60, "1 minute"], [600, "10 minutes"], [1800, "30 minutes"], [3600, "an hour"]]} onPick=${(seconds) => (budget.value = Number(seconds))} />
      <span>trains KARST, plus half a minute to start; kept only if it is better on images that it did not train on</span>
    </div>`}
    <${Sees} />
    ${starting && html`<div class="card"><p role="status">Starting the training ... The first one also reads every image.</p><progress aria-label="Start of the training" /></div>`}
    ${!starting && shown && !ENDED.includes(shown.state) && html`<${Running} key=${shown.id} task=${task} training=${shown} onEnd=${ended} />`}
    ${!starting && shown && ENDED.includes(shown.state) && html`<${Result} key=${shown.id} task=${task} detail=${detail} training=${shown} reload=${reload} />`}
    ${trainings.value.length > 1 &&
    html`<h2>Trainings</h2>
      <${Table}
        label="Trainings"
        head=${["started", "recipe", "state", "version", "accuracy", "labelled images", "seconds"]}
        rows=${trainings.value.map((t) => [
          html`<a href=${`#/tasks/${task}/train?training=${t.id}`}>${ago(t.created)}</a>`,
          t.recipe,
          t.state,
          t.version ?? "",
          t.report ? percent(accuracyOf(t.report)?.accuracy) : "",
          count(t.snapshot.images),
          t.seconds.toFixed(1),
        ])}
      />`}
  </section>`;
}

/** A queued or running training: its stage, curve and time left, from server-sent events. */
function Running({ task, training, onEnd }) {
  const [now, setNow] = useState(training);
  const points = useRef([]);
  const [lost, setLost] = useState(false);
  useEffect(() => {
    const stop = new AbortController();
    const follow = async () => {
      for (let state = null; !stop.signal.aborted; ) {
        try {
          await api.events(
            at(task, "trainings", training.id, "events"),
            (found) => {
              setLost(false);
              setNow((state = found));
              const { loss = null, accuracy = null } = found.progress ?? {};
              if (loss !== null || accuracy !== null) points.current.push([points.current.length, loss, accuracy]);
            },
            stop.signal,
          );
        } catch (error) {
          if (stop.signal.aborted) return;
          if (error.status === 404) return onEnd();
          setLost(true);
        }
        if (state && ENDED.includes(state.state)) return onEnd();
        await sleep(2000);
      }
    };
    follow();
    return () => stop.abort();
  }, [training.id]);
  const progress = now.progress ?? { stage: now.state === "queued" ? "waits for other trainings" : "starting", step: 0, steps: 0 };
  const left = progress.seconds_left;
  const curve = points.current;
  return html`<div class="card">
    <h2>Training (${now.recipe})</h2>
    <p><span role="status">${progress.stage}</span>${progress.steps ? `, ${count(progress.step)} of ${count(progress.steps)}` : ""}
      ${typeof left === "number" ? `; about ${duration(left)} left` : ""}
      ${typeof progress.accuracy === "number" ? `; accuracy so far ${percent(progress.accuracy)}` : ""}
    </p>
    <progress aria-label="Progress of the training" max=${progress.steps || 1} value=${progress.steps ? progress.step : undefined} />
    ${lost && html`<p class="warning">The connection was lost; trying again. The training goes on in the hub.</p>`}
    ${curve.length > 2 &&
    html`<${Chart} label="Loss and accuracy while training" data=${[0, 1, 2].map((i) => curve.map((point) => point[i]))} series=${["time", "loss", "accuracy on held-out images"]} />`}
    <${Button} onClick=${() => attempt(async () => (await api.delete(at(task, "trainings", training.id)), await onEnd()), "The training is cancelled.")}>Cancel<//>
  </div>`;
}

/** A training that has ended: accuracy, labels, confusions, errors, advice, and the way to production. */
function Result({ task, detail, training, reload }) {
  const report = useLoaded(
    async () => (training.report_files.includes("report.json") ? api.get(at(task, "trainings", training.id, "report", "report.json")) : null),
    [training.id],
  );
  const figures = report.value ?? training.report;
  const title = training.version ? `Version ${training.version} is ready` : training.state === "cancelled" ? "The training was cancelled" : "No version was made";
  const accuracies = accuraciesOf(training.report ?? figures);
  const [found, ...others] = accuracies;
  const unseen = accuracies.find(({ on }) => on.includes("-out"));
  const of = unseen && `${count(unseen.images)} ${unseen.on}`;
  const version = detail.versions.find((v) => v.version === training.version);
  const labels = report.value?.labels ?? version?.labels ?? Object.keys(figures?.classes ?? {});
  const advice = report.value?.advice?.filter((line) => !line.includes("--")).join(" ");
  const curve = report.value?.learning_curve ?? [];
  return html`<div class="card">
      <div role="status"><h2>${title}</h2></div>
      ${training.error && html`<p>${sentence(training.error)}</p>`}
      ${found && html`<${Meter} label=${`Accuracy on ${count(found.images)} ${found.on}`} value=${found.accuracy} interval=${found.interval} />`}
      ${others.map((other) => html`<p class="soft">On ${plural(other.images, other.on.slice(0, -1))}: ${estimate(other.accuracy, other.interval)}.${other.images < FEW_TESTED ? " So few images say little." : ""}</p>`)}
      ${of && html`<p class="soft">${unseen.on === "held-out images" ? "Held-out" : "Left-out"} images are answered by classifiers that were trained without them.</p>`}
      ${report.error && html`<${ErrorBox} error=${report.error} retry=${report.reload} />`}
      ${training.version &&
      html`${typeof figures.chance === "number" && html`<p>Always naming the most frequent label would be right for ${percent(figures.chance)}.</p>`}
        ${figures.comparison && html`<p>${sentence(figures.comparison)}${version?.metrics?.recipe === "instant" && " So this version is what “Train now” makes."}</p>`}
        ${advice && html`<p><strong>Advice:</strong> ${advice}</p>`}`}
      ${training.warnings.map((text) => html`<p class="warning">${sentence(text)}</p>`)}
      ${training.promotion && html`<p>${training.promotion.promoted ? "It became" : "It did not become"} stable: ${training.promotion.reason}.</p>`}
      ${training.version && html`<p><a class="button primary" href=${`#/tasks/${task}/try`}>Try it</a></p>`}
      ${version && html`<${Promote} task=${task} detail=${detail} version=${training.version} labels=${labels} reload=${reload} />`}
    </div>
    ${figures?.classes && html`<${Classes} classes=${figures.classes} labels=${labels} of=${of} />`}
    ${report.value?.confusion && html`<${Confusions} task=${task} report=${report.value} labels=${labels} of=${of} />`}
    ${report.value?.errors?.length > 0 &&
    html`<h2>Worst errors among the ${of}</h2>
      <p>The most certain wrong answers. Wrong labels show up here: open an image to correct it.</p>
      <${ImageStrip} task=${task} labels=${labels} images=${asImages(report.value.errors.slice(0, 24))} />`}
    ${curve.length > 1 &&
    html`<${Chart} label="Accuracy on left-out images by number of images" data=${[curve.map(([n]) => n), curve.map(([, a]) => a)]} series=${["images", "accuracy"]} shares />`}`;
}

const asImages = (errors) =>
  errors.map(({ image, label, predicted, score }) => ({ digest: image, label, text: `${label}, taken for ${predicted} (${percent(score)})` }));

function Classes({ classes, labels, of }) {
  return html`<h2>Labels of the ${of}</h2>
    <${Table}
      label="Figures of each label"
      head=${["label", "images", "found (recall)", "right if named (precision)"]}
      rows=${labels.filter((label) => classes[label]).map((label) => {
        const { images, recall, precision } = classes[label];
        return [label, count(images), percent(recall), precision === null ? "never named" : percent(precision)];
      })}
    />`;
}

/** The confusion matrix. A cell opens its images: right answers in the tab Images, wrong ones here. */
function Confusions({ task, report, labels, of }) {
  const [cell, setCell] = useState(null);
  const rows = report.confusion;
  const opened = (i, k) => (i === k ? go(`/tasks/${task}/images?${new URLSearchParams({ label: labels[i] })}`) : setCell([i, k]));
  const worst = rows
    .flatMap((row, i) => row.map((n, k) => [n, i, k]))
    .filter(([n, i, k]) => n && i !== k)
    .sort((a, b) => b[0] - a[0])
    .slice(0, CELLS);
  const wrong = cell && report.errors.filter(({ label, predicted }) => label === labels[cell[0]] && predicted === labels[cell[1]]);
  return html`<h2>Answers to the ${of}</h2>
    ${labels.length > CELLS
      ? html`<ul>${worst.map(([n, i, k]) => html`<li><button class="plain" onClick=${() => opened(i, k)}>${plural(n, "image")} of ${labels[i]} taken for ${labels[k]}</button></li>`)}</ul>`
      : html`<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix"><table class="confusion">
          <thead><tr><th scope="col">label / answer</th>${labels.map((label) => html`<th scope="col">${label}</th>`)}</tr></thead>
          <tbody>
            ${rows.map((row, i) => {
              const total = row.reduce((sum, n) => sum + n, 0) || 1;
              return html`<tr><th scope="row">${labels[i]}</th>${row.map(
                (n, k) => html`<td>${n > 0 &&
                html`<button class=${i === k ? "cell-right" : "cell-wrong"} style=${{ "--share": `${Math.round((60 * n) / total)}%` }}
                  aria-label=${`${plural(n, "image")} of ${labels[i]} answered ${labels[k]}`} onClick=${() => opened(i, k)}>${n}</button>`}</td>`,
              )}</tr>`;
            })}
          </tbody>
        </table></div>`}
    ${cell &&
    html`<div class="card" role="region" aria-label="Images of the cell">
      <h3 tabindex="-1" ref=${(element) => element?.focus()}>${labels[cell[0]]} taken for ${labels[cell[1]]}</h3>
      <${ImageStrip} key=${cell.join()} task=${task} labels=${labels} images=${asImages(wrong)} empty="The report does not name these images." />
      <${Button} onClick=${() => setCell(null)}>Close<//>
    </div>`}`;
}

function Promote({ task, detail, version, labels, reload }) {
  const live = versionOf(detail, "stable");
  const others = detail.versions.map((v) => v.version).filter((number) => number !== version);
  const [other, setOther] = useState(live && live !== version ? live : (others.findLast((number) => number < version) ?? others[0] ?? null));
  const [found, setFound] = useState(null);
  const compare = () => attempt(async () => setFound(await api.get(at(task, "compare"), { a: other, b: version })));
  const promote = () =>
    attempt(async () => {
      await api.put(at(task, "aliases", "stable"), { version });
      await reload();
    }, `Version ${version} is stable now.`);
  return html`<div class="row">
      ${live === version ? html`<span>This version is <code>stable</code>.</span>` : html`<${Button} onClick=${promote}>Make it stable<//><span>Programs that call <code>stable</code> then get this version.</span>`}
      ${other !== null &&
      html`<${Choice}
          label="Compare with"
          value=${other}
          options=${others.map((number) => [number, `version ${number}${number === live ? " (stable)" : ""}`])}
          onPick=${(number) => (setOther(Number(number)), setFound(null))}
        />
        <${Button} onClick=${compare}>Compare<//>`}
    </div>
    ${found &&
    html`<div role="status">
      <p>
        On the same ${plural(found.images, "test image")}, version ${found.b.version} is
        ${found.better === "b" ? " better" : found.better === "a" ? " worse" : " neither better nor worse"}
        ${" "}(${found.gain >= 0 ? "+" : "−"}${(100 * Math.abs(found.gain)).toFixed(1)} points, standard error ${(100 * found.standard_error).toFixed(1)}).
        ${found.left_out ? ` Left out, because they trained one of the versions: ${plural(found.left_out, "image")}.` : ""}
      </p>
      ${["a", "b"].map((side) => html`<${Meter} label=${`Version ${found[side].version}`} value=${found[side].accuracy} interval=${found[side].interval} />`)}
      ${found.differ.length > 0 &&
      html`<details><summary>${plural(found.differing, "image")} with different answers</summary>
        <${ImageStrip} task=${task} labels=${labels} images=${found.differ.slice(0, 48).map((image) => ({ ...image, text: `${image.label}: ${found.a.version} says ${image.a}, ${found.b.version} says ${image.b}` }))} />
      </details>`}
    </div>`}`;
}
