/** The list of tasks: search and pages on the server, so that 10,000 tasks are as light as ten. */
import { address, api } from "../api.js";
import { Button, Dialog, Empty, ErrorBox, Field, Loading, Page, Sparkline, Table, ago, count, percent } from "../components.js";
import { html, useEffect, useRef, useState } from "../lib.js";
import { Link, go, replace, route } from "../router.js";
import { me, notify } from "../state.js";

const PAGE = 25;
const DAYS = 14;
const DEMO = ["digits", "shapes", "count"];
const SORTS = ["name", "labels", "images", "accuracy", "version", "registered"]; // by column

export default function Tasks() {
  const { search = "", sort = SORTS[0], order = "asc" } = route.value.query;
  const [state, setState] = useState({ tasks: [], next: null, ready: false });
  const [making, setMaking] = useState(false);
  const turn = useRef(0);
  const owner = me.value?.role === "owner";

  const load = async (cursor) => {
    const mine = ++turn.current;
    try {
      const page = await api.get("/v1/tasks", { limit: PAGE, cursor, search, sort, order });
      if (mine !== turn.current) return;
      setState((before) => ({ tasks: cursor ? [...before.tasks, ...page.tasks] : page.tasks, next: page.next ?? null, ready: true }));
    } catch (error) {
      if (mine === turn.current) setState((before) => ({ ...before, error, ready: true }));
    }
  };
  useEffect(() => {
    load();
  }, [search, sort, order]);
  const show = (change) => {
    const query = Object.entries({ search, sort, order, ...change }).filter(([name, value]) => value && value !== { sort: SORTS[0], order: "asc" }[name]);
    replace(`/tasks${query.length ? `?${new URLSearchParams(query)}` : ""}`);
  };
  // Names from A, numbers from the largest; once more turns the order.
  const choose = (i) => show({ sort: SORTS[i], order: SORTS[i] === sort ? (order === "asc" ? "desc" : "asc") : i ? "desc" : "asc" });
  const empty = state.ready && !state.error && !state.tasks.length && !state.next;
  return html`<${Page} title="Tasks" actions=${owner && html`<${Button} kind="primary" onClick=${() => setMaking(true)}>New task<//>`}>
    ${state.error && html`<${ErrorBox} error=${state.error} retry=${() => load()} />`}
    ${empty && !search
      ? html`<${FirstSteps} owner=${owner} onNew=${() => setMaking(true)} onDone=${() => load()} />`
      : html`<${Field} label="Search by name"><input type="search" value=${search} maxlength="127" onInput=${(e) => show({ search: e.target.value })} /><//>
          ${!state.ready && html`<${Loading} />`}
          ${empty && html`<p>No task has <q>${search}</q> in its name.</p>`}
          ${state.tasks.length > 0 &&
          html`<${Table}
            label="Tasks"
            head=${["name", "labels", "training images", "accuracy", "version", "registered", `images a day, ${DAYS} days`]}
            sort=${{ by: SORTS.indexOf(sort), down: order === "desc", can: [0, 1, 2, 3, 4, 5], choose }}
            rows=${state.tasks.map((task) => [
              html`<${Link} to=${`/tasks/${encodeURIComponent(task.task)}`}>${task.task}<//>`,
              count(task.classes),
              count(task.train_images),
              measured(task.accuracy),
              task.latest ?? "none yet",
              ago(task.registered),
              html`<${Calls} key=${task.task} task=${task.task} />`,
            ])}
          />`}
          ${state.next && html`<div class="actions"><${Button} onClick=${() => load(state.next)}>More tasks<//></div>`}`}
    ${making && html`<${NewTask} onClose=${() => setMaking(false)} />`}
  <//>`;
}

/** Return an accuracy with its interval, as far as they are known. */
function measured(accuracy) {
  if (!accuracy) return "";
  const { interval } = accuracy;
  return `${percent(accuracy.accuracy, 1)}${interval ? ` (${percent(interval[0])} to ${percent(interval[1])})` : ""}`;
}

/** Use of a task in the last days. A key without the right to see it shows nothing. */
function Calls({ task }) {
  const [days, setDays] = useState(null);
  useEffect(() => {
    let here = true;
    if (me.value?.role !== "owner" || task.includes(":")) return;
    api.get(`/v1/tasks/${encodeURIComponent(task)}/usage`, { days: DAYS }).then(
      (usage) => here && setDays(usage),
      () => {},
    );
    return () => {
      here = false;
    };
  }, [task]);
  if (!days) return null;
  const { total } = days;
  const values = days.days.map(({ images }) => images);
  const unknown = total.images && typeof total.unknown === "number" ? `, ${percent(total.unknown / total.images)} unknown` : "";
  return html`<span class="actions"><${Sparkline} values=${values} label=${`${count(total.images)} images in ${DAYS} days`} /> <small>${count(total.images)}${unknown}</small></span>`;
}

function NewTask({ onClose }) {
  const [name, setName] = useState("");
  const [labels, setLabels] = useState("");
  const [error, setError] = useState(null);
  const make = async () => {
    const given = labels.split("\n").map((label) => label.trim()).filter(Boolean);
    try {
      await api.put(`/v1/tasks/${encodeURIComponent(name)}`, given.length ? { labels: given } : {});
      onClose();
      go(`/tasks/${name}/images`);
    } catch (problem) {
      setError(problem);
    }
  };
  return html`<${Dialog} title="New task" onClose=${onClose}>
    <form onSubmit=${(event) => (event.preventDefault(), make())}>
      <${Field} label="Name" hint="Small letters, digits, - and _, for example: flowers"><input value=${name} required title="Small letters, digits, - and _, for example: my-flowers" maxlength="63" pattern="[a-z0-9][a-z0-9_\\-]*" onInput=${(e) => setName(e.target.value)} /><//>
      <${Field} label="Labels, one a line" hint="You can leave this empty: labels also come from folders, and from what you type later."><textarea rows="4" value=${labels} onInput=${(e) => setLabels(e.target.value)}></textarea><//>
      ${error && html`<${ErrorBox} error=${error} />`}
      <${Button} kind="primary" submit>Make the task<//>
    </form>
  <//>`;
}

/** What to do on a new hub. */
function FirstSteps({ owner, onNew, onDone }) {
  const [demo, setDemo] = useState(false);
  useEffect(() => {
    api.get("/v1/backbone").then(({ name }) => setDemo(name === "demo"), () => {});
  }, []);
  const add = async () => {
    for (const task of DEMO) {
      const file = await (await fetch(new URL(`../../demo/${task}.safetensors`, import.meta.url))).blob();
      try {
        await api.upload(`/v1/tasks/${task}/versions`, file, { params: { alias: "stable" } });
      } catch (error) {
        return notify(`${task}: ${error.message}`, "error");
      }
    }
    notify("Three tasks are here. Open one, and try it with a picture.");
    onDone();
  };
  if (!owner) return html`<${Empty} title="No task yet"><p>This key may only classify. Ask an owner of the tenant for a task.</p><//>`;
  return html`<${Empty} title="From pictures to an endpoint in three steps">
    <ol>
      <li><strong>Make a task</strong> and drop pictures into it: a folder for each label, a zip, or the camera. Ten pictures of each label are a start.</li>
      <li><strong>Train</strong>: the first version takes seconds.</li>
      <li><strong>Try it</strong>, then call it from your program. What it got wrong, you correct under Review.</li>
    </ol>
    <div class="actions">
      <${Button} kind="primary" onClick=${onNew}>Make a task<//>
      ${demo && html`<${Button} onClick=${add}>Add the demo's three tasks<//>`}
    </div>
    <p>Programs can do the same over HTTP: <a href=${address("/docs")}>the API</a>.</p>
  <//>`;
}
