/** The tenant: keys, limits and use, sharing, export, changes. */
import { api, at } from "../api.js";
import { attempt, useLoaded, usePages } from "../calls.js";
import { Button, Choice, Confirm, CopyBox, Dialog, ErrorBox, Form, Meter, Page, Table, TextField, ago, bytes, count, pending } from "../components.js";
import { html, useState } from "../lib.js";
import { Link } from "../router.js";
import { me, notify } from "../state.js";
import { owns } from "./task/shared.js";

const PAGE = 50;
const USED = {
  tasks: "Tasks",
  stored_bytes: "Adapters",
  images: "Images in datasets",
  image_bytes: "Size of the images",
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
    <h2>Export</h2>
    <p>One tar file with all tasks, versions, images and settings. Keys are not in it.</p>
    <${Button} onClick=${() => attempt(() => api.download(`${base}/export`, `${tenant}.tar`))}>Download the export<//>
    <${Audit} path=${`${base}/audit`} />
  <//>`;
}

export function Keys({ path, roles = ["caller", "owner"], title = "Keys" }) {
  const keys = usePages("keys", path, { limit: PAGE });
  const [making, setMaking] = useState(false);
  const [gone, setGone] = useState(null);
  const [made, setMade] = useState(null);
  const revoke = async () => {
    await attempt(() => api.delete(`${path}/${encodeURIComponent(gone.id)}`), `The key ${gone.name} is revoked.`);
    setGone(null);
    await keys.reload();
  };
  const lasting = keys.value?.items.filter(({ expires }) => !expires).length;
  const last = !roles.length && lasting === 1 && !keys.value.next; // the hub keeps it
  return html`<div class="title"><h2>${title}</h2><${Button} onClick=${() => setMaking(true)}>New key<//></div>
    ${keys.value
      ? html`<${Table}
          label=${title}
          empty="There is no key."
          head=${["name", "role", "made", "last used", "expires", "tasks", ""]}
          rows=${keys.value.items.map((key) => [
            key.name,
            key.role,
            ago(key.created),
            ago(key.last_used) || "never",
            key.expires ? new Date(key.expires).toLocaleString() : "never",
            key.tasks?.join(", ") ?? "all",
            html`<${Button} kind="danger" label=${`Revoke ${key.name}`} disabled=${last && !key.expires} onClick=${() => setGone(key)}>Revoke<//>`,
          ])}
          more=${keys.value.next && keys.more}
        />
        ${last && html`<p class="soft">The last admin key that does not expire cannot be revoked. Make another one first.</p>`}`
      : pending(keys)}
    ${making && html`<${NewKey} path=${path} roles=${roles} onClose=${() => setMaking(false)} onMade=${(key) => (setMaking(false), setMade(key), keys.reload())} />`}
    ${made &&
    html`<${Dialog} title=${`The key ${made.name}`} onClose=${() => setMade(null)}>
      <p><strong>Copy it now.</strong> The hub keeps only a digest of it and cannot show it again.</p>
      <${CopyBox} label="key" text=${made.key} />
    <//>`}
    ${gone && html`<${Confirm} title=${`Revoke the key ${gone.name}`} action="Revoke" onYes=${revoke} onNo=${() => setGone(null)}>Programs with this key are refused at once. This cannot be undone.<//>`}`;
}

function NewKey({ path, roles, onClose, onMade }) {
  const [name, setName] = useState("");
  const [role, setRole] = useState(roles[0]);
  const [days, setDays] = useState("");
  const [tasks, setTasks] = useState("");
  const make = async () => {
    const body = { name };
    if (role) body.role = role;
    if (days) body.expires = new Date(Date.now() + 86_400_000 * Number(days)).toISOString();
    const bound = tasks.split(/[\s,]+/).filter(Boolean);
    if (bound.length && role === "caller") body.tasks = bound;
    onMade(await api.post(path, body));
  };
  return html`<${Dialog} title="New key" onClose=${onClose}>
    <${Form} action="Make the key" onSubmit=${make}>
      <${TextField} label="Name" hint="The program or person that uses it, for example: camera 3" required maxlength="100" value=${name} onText=${setName} />
      ${role && html`<${Choice} label="It may" value=${role} onPick=${setRole} options=${[["caller", "only classify"], ["owner", "do everything in this tenant"]]} />`}
      <${TextField} label="Days until it expires" hint="Empty: it does not expire" type="number" min="1" max="3650" value=${days} onText=${setDays} />
      ${role === "caller" && html`<${TextField} label="Only for these tasks" hint="Names with spaces or commas between them. Empty: all tasks" value=${tasks} onText=${setTasks} />`}
    <//>
  <//>`;
}

function Limits({ path }) {
  const usage = useLoaded(() => api.get(path), [path]);
  if (!usage.value) return pending(usage);
  const { limits, used, counted } = usage.value;
  const shown = (name) => (name.endsWith("bytes") ? bytes : count);
  return html`<h2>Limits and use</h2>
    <p>${count(counted.requests)} requests and ${count(counted.images)} images since the tenant was made; ${count(counted.refused)} requests were refused.</p>
    ${Object.entries(USED).map(
      ([name, text]) => html`<${Meter} label=${`${text}: ${shown(name)(used[name])} of ${shown(name)(limits[name])}`} value=${limits[name] ? used[name] / limits[name] : 0} />`,
    )}
    <p class="soft">At most ${Object.entries(RATES).map(([name, text]) => `${count(limits[name])} ${text}`).join(", ")}. An admin changes limits.</p>`;
}

function Shared() {
  const [name, setName] = useState("");
  const [found, setFound] = useState(null);
  const [tenants, setTenants] = useState("");
  const list = useLoaded(async () => (await api.get("/v1/tasks", { search: name, limit: 50 })).tasks, [name]);
  const look = async () => {
    setFound(null);
    const { sharing } = await api.get(at(name), { limit: 1 });
    if (!sharing) throw new Error("Another tenant shares this task with you. Only its owner changes that.");
    setFound({ task: name, public: sharing.public });
    setTenants(sharing.tenants.join("\n"));
  };
  const save = async () => {
    await api.put(at(found.task, "sharing"), { public: found.public, tenants: tenants.split(/\s+/).filter(Boolean) });
    notify(`The sharing of ${found.task} is saved.`);
  };
  return html`<h2>Sharing</h2>
    <p>Other tenants may classify with a task that you share. They see neither its images nor its file.</p>
    <${Form} row action="Show" onSubmit=${look}><${TextField} label="Task" list="own-tasks" required value=${name} onText=${setName} /><//>
    <datalist id="own-tasks">${list.value?.filter(({ task }) => owns(task)).map(({ task }) => html`<option value=${task} />`)}</datalist>
    ${found &&
    html`<${Form} action="Save" onSubmit=${save}>
        <label><input type="checkbox" checked=${found.public} onChange=${(e) => setFound({ ...found, public: e.target.checked })} /> every tenant of this hub may classify with ${found.task}</label>
        <${TextField} rows="4" label="Tenants, one a line" value=${tenants} onText=${setTenants} />
      <//>
      <p><${Link} to=${`/tasks/${found.task}`}>Open the task<//></p>`}`;
}

export function Audit({ path, params = {} }) {
  const list = usePages("entries", path, { ...params, count: PAGE, order: "desc" }, "after");
  const text = (detail) => Object.entries(detail).map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
  return html`<h2>Changes</h2>
    ${list.error && html`<${ErrorBox} error=${list.error} retry=${list.reload} />`}
    ${list.value &&
    html`<${Table}
      label="Changes"
      empty="Nothing was changed yet."
      head=${["time", "action", "key", "address", "detail"]}
      rows=${list.value.items.map((entry) => [new Date(entry.at).toLocaleString(), entry.action, entry.name || entry.key, entry.address, html`<small>${text(entry.detail).slice(0, 200)}</small>`])}
      more=${list.value.next && list.more}
    />`}`;
}
