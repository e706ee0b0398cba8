/** The list of tasks: search and pages on the server, so that 10,000 tasks are as light as ten. */
import { address, api, at } from "../api.js";
import { attempt, useLoaded, usePages } from "../calls.js";
import { Button, Dialog, Empty, ErrorBox, Form, Loading, NameField, Page, Sparkline, Table, TextField, ago, count, estimate, percent } from "../components.js";
import { html, useEffect, useState } from "../lib.js";
import { Link, go, replace, route } from "../router.js";
import { me } from "../state.js";
import { Sees, owns } from "./task/shared.js";

const PAGE = 25;
const DAYS = 14;
const DEMO = ["digits", "shapes", "count"];
const SORTS = ["name", "labels", "images", "accuracy", "version", "registered"]; // by column
const DEFAULTS = { search: "", sort: SORTS[0], order: "asc" };

export default function Tasks() {
  const chosen = { ...DEFAULTS, ...route.value.query };
  const { search, sort, order } = chosen;
  const list = usePages("tasks", "/v1/tasks", { limit: PAGE, search, sort, order });
  const [making, setMaking] = useState(false);
  const owner = me.value?.role === "owner";
  const show = (change) => {
    const query = Object.entries({ ...chosen, ...change }).filter(([name, value]) => value !== DEFAULTS[name]);
    replace(`/tasks${query.length ? `?${new URLSearchParams(query)}` : ""}`);
  };
  // Names from A, numbers from the largest; once more turns the order.
  const choose = (i) => show({ sort: SORTS[i], order: SORTS[i] === sort ? (order === "asc" ? "desc" : "asc") : i ? "desc" : "asc" });
  const { items = [], next } = list.value ?? {};
  const empty = list.value && !items.length && !next;
  return html`<${Page} title="Tasks" actions=${owner && html`<${Button} kind="primary" onClick=${() => setMaking(true)}>New task<//>`}>
    ${list.error && html`<${ErrorBox} error=${list.error} retry=${list.reload} />`}
    ${empty && !search
      ? html`<${FirstSteps} owner=${owner} onNew=${() => setMaking(true)} onDone=${list.reload} />`
      : html`<${TextField} label="Search by name" type="search" value=${search} maxlength="127" onText=${(text) => show({ search: text })} />
          ${!list.value && !list.error && html`<${Loading} />`}
          ${empty && html`<p>No task has <q>${search}</q> in its name.</p>`}
          ${items.length > 0 &&
          html`<${Table}
            label="Tasks"
            head=${["name", "labels", "training images", "accuracy", "version", "registered", `images a day, ${DAYS} days`]}
            sort=${{ by: SORTS.indexOf(sort), down: order === "desc", can: [0, 1, 2, 3, 4, 5], choose }}
            rows=${items.map((task) => [
              html`<${Link} to=${`/tasks/${encodeURIComponent(task.task)}`}>${task.task}<//>`,
              count(task.classes),
              count(task.train_images),
              estimate(task.accuracy?.accuracy, task.accuracy?.interval),
              task.latest ?? "none yet",
              ago(task.registered),
              owns(task.task) && html`<${Calls} key=${task.task} task=${task.task} />`,
            ])}
            more=${next && list.more}
          />`}`}
    ${making && html`<${NewTask} onClose=${() => setMaking(false)} />`}
  <//>`;
}

/** Use of a task in the last days; nothing if the hub does not count. */
function Calls({ task }) {
  const { value } = useLoaded(() => api.get(at(task, "usage"), { days: DAYS }), [task]);
  if (!value) return null;
  const { days, total } = value;
  const unknown = total.images && typeof total.unknown === "number" ? `, ${percent(total.unknown / total.images)} unknown` : "";
  return html`<span class="actions">
    <${Sparkline} values=${days.map(({ images }) => images)} label=${`${count(total.images)} images in ${DAYS} days`} /> <small>${count(total.images)}${unknown}</small>
  </span>`;
}

function NewTask({ onClose }) {
  const [name, setName] = useState("");
  const [labels, setLabels] = useState("");
  const make = async () => {
    const given = labels.split("\n").map((label) => label.trim()).filter(Boolean);
    await api.put(at(name), given.length ? { labels: given } : {});
    onClose();
    go(`/tasks/${name}/images`);
  };
  return html`<${Dialog} title="New task" onClose=${onClose}>
    <${Form} action="Make the task" onSubmit=${make}>
      <${NameField} value=${name} onText=${setName} />
      <${TextField} rows="4" label="Labels, one a line" hint="You can leave this empty: labels also come from folders, and from what you type later." value=${labels} onText=${setLabels} />
    <//>
  <//>`;
}

function FirstSteps({ owner, onNew, onDone }) {
  const [demo, setDemo] = useState(false);
  useEffect(() => {
    api.get("/v1/backbone").then(({ name }) => setDemo(name === "demo"), () => {});
  }, []);
  const add = () =>
    attempt(async () => {
      for (const task of DEMO) {
        const file = await (await fetch(new URL(`../../demo/${task}.safetensors`, import.meta.url))).blob();
        await api.upload(at(task, "versions"), file, { params: { alias: "stable" } });
      }
      await onDone();
    }, "Three tasks are here. Open one, and try it with a picture.");
  if (!owner) return html`<${Empty} title="No task yet"><p>This key may only classify. Ask an owner of the tenant for a task.</p><//>`;
  return html`<${Empty} title="From pictures to an endpoint in three steps">
    <ol>
      <li><strong>Make a task</strong> and drop pictures into it: a folder for each label, a zip, or the camera. Ten of each label are a start.</li>
      <li><strong>Train</strong>: the first version takes seconds.</li>
      <li><strong>Try it</strong>, then call it from your program. What it got wrong, you correct under Review.</li>
    </ol>
    <div class="actions">
      <${Button} kind="primary" onClick=${onNew}>Make a task<//>
      ${demo && html`<${Button} onClick=${add}>Add the demo's three tasks<//>`}
    </div>
    <${Sees} />
    <p>Programs can do the same over HTTP: <a href=${address("/docs")}>the API</a>.</p>
  <//>`;
}
