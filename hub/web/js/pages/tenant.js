/** The tenant: keys, limits and use, sharing, changes, export. */
import { api } from "../api.js";
import { attempt, useLoaded } from "../calls.js";
import { Button, Confirm, CopyBox, Dialog, ErrorBox, Field, Loading, Meter, Page, Table, ago, count } from "../components.js";
import { html, useState } from "../lib.js";
import { Link } from "../router.js";
import { me, notify } from "../state.js";

const AUDIT_PAGE = 50;
const USED = {
  tasks: "Tasks",
  stored_bytes: "Bytes of adapters",
  images: "Images in datasets",
  image_bytes: "Bytes of images",
  images_in_flight: "Images of unfinished requests",
};
const RATES = { requests_per_second: "requests a second", images_per_second: "images a second", versions: "versions of a task" };

export default function Tenant() {
  const { tenant } = me.value;
  const base = `/v1/tenants/${tenant}`;
  return html`<${Page} title=${`Tenant ${tenant}`}>
    <${Keys} path=${`${base}/keys`} />
    <${Limits} path=${`${base}/usage`} />
    <${Shared} />
    <${Audit} path=${`${base}/audit`} />
    <h2>Export</h2>
    <p>One tar file with all tasks, versions, images and settings. Keys are not in it.</p>
    <${Button} onClick=${() => attempt(() => api.download(`${base}/export`, `${tenant}.tar`))}>Download the export<//>
  <//>`;
}

export function Keys({ path, roles = ["caller", "owner"], title = "Keys" }) {
  const keys = useLoaded(() => api.get(path), [path]);
  const [making, setMaking] = useState(false);
  const [gone, setGone] = useState(null);
  const [made, setMade] = useState(null);
  const revoke = async () => {
    await attempt(() => api.delete(`${path}/${encodeURIComponent(gone.id)}`), `The key ${gone.name} is revoked.`);
    setGone(null);
    await keys.reload();
  };
  return html`<section aria-label=${title}>
    <div class="title"><h2>${title}</h2><${Button} onClick=${() => setMaking(true)}>New key<//></div>
    ${keys.error && html`<${ErrorBox} error=${keys.error} retry=${keys.reload} />`}
    ${keys.value
      ? html`<${Table}
          label=${title}
          head=${["name", "role", "made", "last used", "expires", "tasks", ""]}
          rows=${keys.value.keys.map((key) => [
            key.name,
            key.role,
            ago(key.created),
            ago(key.last_used) || "never",
            key.expires ? new Date(key.expires).toLocaleString() : "never",
            key.tasks?.join(", ") ?? "all",
            html`<${Button} kind="danger" label=${`Revoke ${key.name}`} onClick=${() => setGone(key)}>Revoke<//>`,
          ])}
        />`
      : !keys.error && html`<${Loading} />`}
    ${making && html`<${NewKey} path=${path} roles=${roles} onClose=${() => setMaking(false)} onMade=${(key) => (setMaking(false), setMade(key), keys.reload())} />`}
    ${made &&
    html`<${Dialog} title=${`The key ${made.name}`} onClose=${() => setMade(null)}>
      <p><strong>Copy it now.</strong> The hub keeps only a digest of it and cannot show it again.</p>
      <${CopyBox} label="key" text=${made.key} />
    <//>`}
    ${gone && html`<${Confirm} title=${`Revoke the key ${gone.name}`} action="Revoke" onYes=${revoke} onNo=${() => setGone(null)}>Programs with this key are refused at once. This cannot be undone.<//>`}
  </section>`;
}

function NewKey({ path, roles, onClose, onMade }) {
  const [name, setName] = useState("");
  const [role, setRole] = useState(roles[0]);
  const [days, setDays] = useState("");
  const [tasks, setTasks] = useState("");
  const [error, setError] = useState(null);
  const make = async () => {
    const body = { name };
    if (roles[0]) body.role = role;
    if (days) body.expires = new Date(Date.now() + 86_400_000 * Number(days)).toISOString();
    const bound = tasks.split(/[\s,]+/).filter(Boolean);
    if (bound.length) body.tasks = bound;
    try {
      onMade(await api.post(path, body));
    } catch (problem) {
      setError(problem);
    }
  };
  return html`<${Dialog} title="New key" onClose=${onClose}>
    <form onSubmit=${(event) => (event.preventDefault(), make())}>
      <${Field} label="Name" hint="Who or what uses it, for example: camera 3"><input required maxlength="100" value=${name} onInput=${(e) => setName(e.target.value)} /><//>
      ${roles[0] &&
      html`<${Field} label="It may">
        <select value=${role} onChange=${(e) => setRole(e.target.value)}>
          <option value="caller">only classify</option>
          <option value="owner">do everything in this tenant</option>
        </select>
      <//>`}
      <${Field} label="Days until it expires" hint="Empty: it does not expire"><input type="number" min="1" max="3650" value=${days} onInput=${(e) => setDays(e.target.value)} /><//>
      ${role === "caller" && html`<${Field} label="Only for these tasks" hint="Empty: all tasks"><input value=${tasks} onInput=${(e) => setTasks(e.target.value)} /><//>`}
      ${error && html`<${ErrorBox} error=${error} />`}
      <${Button} kind="primary" submit>Make the key<//>
    </form>
  <//>`;
}

function Limits({ path }) {
  const usage = useLoaded(() => api.get(path), [path]);
  if (usage.error) return html`<${ErrorBox} error=${usage.error} retry=${usage.reload} />`;
  if (!usage.value) return html`<${Loading} />`;
  const { limits, used, counted } = usage.value;
  return html`<section aria-label="Limits and use">
    <h2>Limits and use</h2>
    <p>${count(counted.requests)} requests and ${count(counted.images)} images since the tenant was made; ${count(counted.refused)} requests were refused.</p>
    ${Object.entries(USED).map(
      ([name, text]) => html`<${Meter} label=${`${text}: ${count(used[name])} of ${count(limits[name])}`} value=${limits[name] ? used[name] / limits[name] : 0} />`,
    )}
    <p class="soft">At most ${Object.entries(RATES).map(([name, text]) => `${count(limits[name])} ${text}`).join(", ")}. An admin changes limits.</p>
  </section>`;
}

/** With which other tenants the tasks are shared. */
function Shared() {
  const [name, setName] = useState("");
  const [found, setFound] = useState(null);
  const [tenants, setTenants] = useState("");
  const [error, setError] = useState(null);
  const look = async () => {
    setError(null);
    try {
      const { sharing } = await api.get(`/v1/tasks/${encodeURIComponent(name)}`, { limit: 1 });
      setFound({ task: name, public: sharing.public });
      setTenants(sharing.tenants.join("\n"));
    } catch (problem) {
      setError(problem);
    }
  };
  const save = async () => {
    setError(null);
    try {
      await api.put(`/v1/tasks/${encodeURIComponent(found.task)}/sharing`, { public: found.public, tenants: tenants.split(/\s+/).filter(Boolean) });
      notify(`The sharing of ${found.task} is saved.`);
    } catch (problem) {
      setError(problem);
    }
  };
  return html`<section aria-label="Sharing">
    <h2>Sharing</h2>
    <p>Other tenants may classify with a task that you share. They see neither its images nor its file.</p>
    <form class="row" onSubmit=${(event) => (event.preventDefault(), look())}>
      <${Field} label="Task"><input required value=${name} onInput=${(e) => setName(e.target.value)} /><//>
      <${Button} submit>Show<//>
    </form>
    ${error && html`<${ErrorBox} error=${error} />`}
    ${found &&
    html`<form onSubmit=${(event) => (event.preventDefault(), save())}>
      <label><input type="checkbox" checked=${found.public} onChange=${(e) => setFound({ ...found, public: e.target.checked })} /> every tenant of this hub may classify with ${found.task}</label>
      <${Field} label="Tenants, one a line"><textarea rows="3" value=${tenants} onInput=${(e) => setTenants(e.target.value)}></textarea><//>
      <${Button} kind="primary" submit>Save<//> <${Link} to=${`/tasks/${found.task}`}>Open the task<//>
    </form>`}
  </section>`;
}

/** Changes, oldest first, a page at a time. */
export function Audit({ path, params = {} }) {
  const [pages, setPages] = useState([]);
  const [next, setNext] = useState(undefined);
  const [error, setError] = useState(null);
  const load = async (after) => {
    setError(null);
    try {
      const page = await api.get(path, { ...params, after, count: AUDIT_PAGE });
      setPages((before) => (after ? [...before, ...page.entries] : page.entries));
      setNext(page.next);
    } catch (problem) {
      setError(problem);
    }
  };
  return html`<section aria-label="Changes">
    <h2>Changes</h2>
    ${next === undefined && !error && html`<${Button} onClick=${() => load()}>Show the changes<//>`}
    ${error && html`<${ErrorBox} error=${error} />`}
    ${next !== undefined &&
    html`<${Table}
        label="Changes"
        empty="Nothing was changed yet."
        head=${["time", "action", "key", "address", "detail"]}
        rows=${pages.map((entry) => [new Date(entry.at).toLocaleString(), entry.action, entry.name || entry.key, entry.address, html`<small>${Object.entries(entry.detail).map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ").slice(0, 200)}</small>`])}
      />
      ${next && html`<${Button} onClick=${() => load(next)}>Later changes<//>`}`}
  </section>`;
}
