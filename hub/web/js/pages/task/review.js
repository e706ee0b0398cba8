/** Tab "Review": one image at a time; one key confirms or corrects. */
import { api, at } from "../../api.js";
import { attempt, useLoaded } from "../../calls.js";
import { Button, Choice, Empty, ErrorBox, Loading, count, pending, percent, plural } from "../../components.js";
import { html, useEffect, useRef, useState } from "../../lib.js";
import { go, route } from "../../router.js";
import { FullImage, KeysChoice, LabelChoice, useKeys } from "./shared.js";

const QUEUE = 20; // images of a call; the hub then orders the rest again with the labels of these

export default function Review({ task, detail, reload }) {
  const kind = route.value.query.kind === "errors" ? "errors" : "unlabelled";
  const info = useLoaded(() => api.get(at(task, "dataset")), [task]);
  const queue = useRef([]);
  const passed = useRef(new Set()); // skipped or answered here: a new queue shows them last or never
  const history = useRef([]);
  const [state, setState] = useState({ image: null });
  const [given, setGiven] = useState(0);
  const [busy, setBusy] = useState(false);

  async function next() {
    try {
      if (!queue.current.length) {
        const { images } = await api.get(at(task, "review"), { kind, count: Math.min(100, QUEUE + passed.current.size) });
        queue.current = images.filter(({ image }) => !passed.current.has(image.digest)).slice(0, QUEUE);
      }
      setState({ image: queue.current.shift() ?? null, ended: true });
    } catch (error) {
      setState({ image: null, error });
    }
  }
  useEffect(() => {
    queue.current = [];
    passed.current = new Set();
    history.current = [];
    setGiven(0);
    setState({ image: null });
    next();
  }, [task, kind]);

  const { image: shown } = state;
  const labels = info.value?.labels.map((row) => row.label) ?? [];
  const suggestions = shown?.suggestions ?? [];
  const own = shown?.image.label ?? null; // Enter keeps the label that an image has: suggestions may be weak
  const answer = async (label) => {
    if (!shown || busy) return;
    setBusy(true);
    const done = await attempt(() => api.post(at(task, "feedback"), { image: shown.image.digest, label }));
    if (done) {
      history.current.push(shown);
      passed.current.add(shown.image.digest);
      setGiven((n) => n + 1);
      info.reload();
      await next();
    }
    setBusy(false);
  };
  const skip = () => {
    if (!shown || busy) return;
    passed.current.add(shown.image.digest);
    next();
  };
  const undo = async () => {
    const last = history.current.at(-1);
    if (!last || busy) return;
    setBusy(true);
    const done = await attempt(() => api.patch(at(task, "images", last.image.digest), { label: last.image.label }), "Taken back.");
    if (done) {
      history.current.pop();
      passed.current.delete(last.image.digest);
      if (shown) queue.current.unshift(shown);
      setGiven((n) => n - 1);
      setState({ image: last });
      info.reload();
    }
    setBusy(false);
  };
  useKeys((event) => {
    const control = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if ((control && key === "z") || (!control && key === "u")) undo();
    else if (control) return;
    else if (key === "enter" && own !== null) answer(own);
    else if (key === (own === null ? "enter" : "t") && suggestions.length) answer(suggestions[0].label);
    else if (key === "s" || key === "arrowright") skip();
    else if (/^[1-9]$/.test(key) && labels[key - 1] !== undefined) answer(labels[key - 1]);
    else return;
    event.preventDefault();
  });

  const train = () =>
    attempt(async () => {
      const training = await api.post(at(task, "trainings"), { recipe: "instant" });
      await reload();
      go(`/tasks/${task}/train?training=${training.id}`);
    });
  if (!info.value) return pending(info);
  const left = info.value.unlabelled.train + info.value.unlabelled.test;
  const retrain = html`<${Button} kind=${shown ? "" : "primary"} onClick=${train}>Retrain<//>`;
  return html`<section aria-label="Review" onClick=${({ detail, target }) => detail && target.closest("button")?.blur() /* by mouse: the next Enter is a command */}>
    <div class="row">
      <${Choice}
        label="Review"
        value=${kind}
        options=${[["unlabelled", "images without a label"], ["errors", "labels that may be wrong"]]}
        onPick=${(chosen) => go(`/tasks/${task}/review${chosen === "errors" ? "?kind=errors" : ""}`)}
      />
      <p role="status">${kind === "unlabelled" ? `${count(left)} left` : ""}${given ? `${kind === "unlabelled" ? ", " : ""}${count(given)} done` : ""}</p>
      ${given > 0 && html`<${Button} onClick=${undo}>Undo <kbd>U</kbd><//>${shown && retrain}`}
    </div>
    ${state.error && html`<${ErrorBox} error=${state.error} retry=${next} />`}
    ${!shown && !state.error && !state.ended && html`<${Loading} />`}
    ${shown &&
    html`<article class="review">
      <${FullImage} key=${shown.image.digest} task=${task} digest=${shown.image.digest} alt=${`the image ${shown.image.name}`} />
      <div>
        ${own !== null && html`<p>Its label is <strong>${own}</strong>.</p>
          <${Button} kind="primary" onClick=${() => answer(own)}>Keep ${own} <kbd>Enter</kbd><//>`}
        ${suggestions.length
          ? html`<p aria-live="polite">Suggestion: <strong>${suggestions[0].label}</strong> (${percent(suggestions[0].score)})${suggestions.length > 1 && html`<span class="soft">${suggestions.slice(1).map(({ label, score }) => `; ${label} ${percent(score)}`)}</span>`}</p>
              <${Button} kind=${own === null ? "primary" : ""} onClick=${() => answer(suggestions[0].label)}>${suggestions[0].label} <kbd>${own === null ? "Enter" : "T"}</kbd><//>`
          : html`<p>No suggestion yet: give a few images of each label.</p>`}
        <ul class="chips" aria-label="Labels">
          ${labels.slice(0, 30).map((label, i) => html`<li><button class="chip" onClick=${() => answer(label)}>${i < 9 && html`<kbd>${i + 1}</kbd>`} ${label}</button></li>`)}
        </ul>
        <div class="row">
          <${LabelChoice} text="Another label" labels=${labels} onPick=${(label) => answer(label)} />
          <${Button} onClick=${skip}>Skip <kbd>S</kbd><//>
        </div>
        <${KeysChoice} />
      </div>
    </article>`}
    ${!shown && state.ended && html`<${Done} task=${task} detail=${detail} reload=${reload} kind=${kind} skipped=${left} given=${given} retrain=${retrain} again=${() => (passed.current.clear(), next())} />`}
  </section>`;
}

/** The end of a queue: what to do next, and how more images come here by themselves. */
function Done({ task, detail, reload, kind, skipped, given, retrain, again }) {
  const keep = (images) =>
    attempt(async () => {
      await api.put(at(task), { keep: { ...detail.keep, images } });
      await reload();
    }, "The setting is saved.");
  return html`<${Empty} title=${kind === "errors" ? "No label looks wrong" : skipped ? "Only skipped images are left" : "Every image has a label"}>
    ${given > 0 && html`<p>Train again, so that the task knows your ${plural(given, "answer")}. ${retrain}</p>`}
    ${kind === "unlabelled" && skipped > 0 && html`<p><${Button} onClick=${again}>Show the skipped ones<//></p>`}
    ${kind === "unlabelled" && html`<p>Images that you add without a label come here.</p>`}
    ${detail.keep &&
    html`<p>The hub can keep pictures that it classifies, so that they appear here. Tell the callers: the pictures may show people.</p>
      <${Choice}
        label="Keep classified pictures for review"
        value=${detail.keep.images}
        options=${[["none", "none"], ["uncertain", "uncertain ones"], ["sample", "a tenth"], ["all", "all"]]}
        onPick=${keep}
      />`}
  <//>`;
}
