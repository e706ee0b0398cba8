/** The hub, for its admin: workers, busy tasks and tenants, trainings and errors, live; tenants and admin keys. */
import { api } from "../api.js";
import { usePages } from "../calls.js";
import { Button, Chart, Dialog, ErrorBox, Form, Loading, NameField, Page, Table, ago, bytes, count, duration, pending, percent } from "../components.js";
import { html, useEffect, useRef, useState } from "../lib.js";
import { connection } from "../state.js";
import { Audit, Keys } from "./tenant.js";

const PERIOD_MS = 2000;
const KEPT = 150; // points of the chart: five minutes
const SHOWN = 50; // trainings

export default function Hub() {
  const [status, setStatus] = useState(null);
  const [trainings, setTrainings] = useState(null);
  const [error, setError] = useState(null);
  const points = useRef([[], [], []]);
  useEffect(() => {
    let timer;
    let here = true;
    const look = async () => {
      if (connection.value === "ok" && !document.hidden) {
        try {
          const [found, jobs] = await Promise.all([api.get("/v1/status"), api.get("/v1/admin/trainings")]);
          const sum = (name) => found.workers.reduce((total, worker) => total + worker[name], 0);
          const now = [Date.now() / 1000, sum("images_per_second"), sum("waiting")];
          points.current = points.current.map((values, i) => [...values, now[i]].slice(-KEPT));
          if (!here) return;
          setStatus(found);
          setTrainings(jobs);
          setError(null);
        } catch (problem) {
          if (here) setError(problem);
        }
      }
      if (here) timer = setTimeout(look, PERIOD_MS);
    };
    look();
    return () => {
      here = false;
      clearTimeout(timer);
    };
  }, []);
  return html`<${Page} title="Hub">
    ${error && html`<${ErrorBox} error=${error} />`}
    ${status ? html`<${Status} status=${status} points=${points.current} />
          <${Trainings} list=${trainings} />
          <${Errors} errors=${status.errors} />` : !error && html`<${Loading} />`}
    <${Tenants} />
    <${Keys} path="/v1/admin/keys" roles=${[]} title="Admin keys" />
    <${Audit} path="/v1/audit" params=${{ of: "admins" }} />
  <//>`;
}

function Status({ status, points }) {
  const { workers, tasks, tenants, changes_refused: refused } = status;
  return html`${refused && html`<p class="error" role="alert">Changes are refused: ${refused}</p>`}
    <h2>Now</h2>
    <${Chart} label="Images a second, and images in the queue" time data=${points} series=${["time", "images a second", "queue"]} height=${180} />
    <h3>Workers</h3>
    <${Table}
      label="Workers"
      empty="No worker reports. The hub starts one, or none can start: see the log of the hub."
      head=${["worker", "device", "up since", "slots", "hit rate", "images a pass", "adapters a pass", "queue", "images a second", "failures"]}
      rows=${workers.map((worker) => [
        worker.worker,
        worker.device,
        ago(Date.now() - 1000 * worker.uptime_s),
        `${count(worker.slots_used)} of ${count(worker.slots)}`,
        percent(worker.hits + worker.loads ? worker.hits / (worker.hits + worker.loads) : undefined, 1),
        worker.images_per_pass.toFixed(1),
        worker.adapters_per_pass.toFixed(1),
        count(worker.waiting),
        worker.images_per_second.toFixed(1),
        count(worker.failures),
      ])}
    />
    <h3>Busy tasks</h3>
    <${Table} label="Busy tasks" empty="No task is called now." head=${["tenant", "task", "images a second"]} rows=${tasks.map((task) => [task.tenant, task.task, task.images_per_second.toFixed(1)])} />
    <h3>Tenants that called in the last minute</h3>
    <${Table}
      label="Tenants that called in the last minute"
      empty="No tenant called."
      head=${["tenant", "unfinished images now", "requests in all", "images in all", "refused in all"]}
      rows=${tenants.map(({ tenant, images_in_flight: now, counted }) => [tenant, count(now), count(counted.requests), count(counted.images), count(counted.refused)])}
    />`;
}

function Trainings({ list: { trainings, running, queued } }) {
  return html`<h2>Trainings</h2>
    <p>${count(running)} running, ${count(queued)} queued.</p>
    <${Table}
      label="Trainings"
      empty="No training is running or queued, and none ended recently."
      head=${["tenant", "task", "recipe", "state", "time left", "images", "version", "started", "ended"]}
      rows=${trainings.slice(0, SHOWN).map((t) => [
        t.tenant,
        t.task,
        t.recipe,
        t.error ?? (t.progress ? `${t.progress.stage}${t.progress.steps ? `, ${count(t.progress.step)} of ${count(t.progress.steps)}` : ""}` : t.state),
        duration(t.progress?.seconds_left),
        count(t.images),
        t.version ?? "",
        ago(t.started ?? t.created),
        ago(t.ended),
      ])}
    />
    ${trainings.length > SHOWN && html`<p class="soft">The first ${SHOWN} of ${count(trainings.length)}.</p>`}`;
}

function Errors({ errors }) {
  return html`<h2>Errors of the last hour</h2>
    <${Table}
      label="Errors of the last hour"
      empty="No request was refused or failed in the last hour."
      head=${["kind", "status", "requests", "last"]}
      rows=${errors.map(({ kind, status, count: number, last }) => [kind, status, count(number), ago(last)])}
    />`;
}

function Tenants() {
  const list = usePages("tenants", "/v1/tenants", { limit: 50 });
  const [making, setMaking] = useState(false);
  const [open, setOpen] = useState(null);
  return html`<div class="title"><h2>Tenants</h2><${Button} onClick=${() => setMaking(true)}>New tenant<//></div>
    ${list.value
      ? html`<${Table}
          label="Tenants"
          empty="There is no tenant."
          head=${["tenant", "made", "requests a second", "images a second", "tasks", "adapters", "share", ""]}
          rows=${list.value.items.map(({ tenant, created, limits }) => [
            tenant,
            ago(created),
            count(limits.requests_per_second),
            count(limits.images_per_second),
            count(limits.tasks),
            bytes(limits.stored_bytes),
            count(limits.weight),
            html`<${Button} label=${`Keys of ${tenant}`} onClick=${() => setOpen(tenant)}>Keys<//>`,
          ])}
          more=${list.value.next && list.more}
        />`
      : pending(list)}
    ${making && html`<${NewTenant} onClose=${() => setMaking(false)} onMade=${(name) => (setMaking(false), setOpen(name), list.reload())} />`}
    ${open && html`<${Dialog} title=${`Tenant ${open}`} onClose=${() => setOpen(null)}><${Keys} path=${`/v1/tenants/${open}/keys`} /><//>`}`;
}

function NewTenant({ onClose, onMade }) {
  const [name, setName] = useState("");
  const make = async () => {
    await api.post("/v1/tenants", { tenant: name });
    onMade(name);
  };
  return html`<${Dialog} title="New tenant" onClose=${onClose}>
    <${Form} action="Make the tenant" onSubmit=${make}><${NameField} value=${name} onText=${setName} /><//>
  <//>`;
}
