/** The console: signs in, finds out what the key may do, and shows the page of the address. */
import { ApiError, api } from "./api.js";
import { Button, ErrorBox, Loading, Notices } from "./components.js";
import { html, render, useEffect, useState } from "./lib.js";
import Hub from "./pages/hub.js";
import { Login } from "./pages/login.js";
import TaskPage from "./pages/task.js";
import Tasks from "./pages/tasks.js";
import Tenant from "./pages/tenant.js";
import { Link, go, route } from "./router.js";
import { connection, keys, me, signOut } from "./state.js";

// Not on demand: a browser never loads a module again that failed while the hub was away.
const PAGES = { tasks: Tasks, tenant: Tenant, hub: Hub };

async function rights({ tenant, admin }) {
  const found = { tenant: null, role: null, admin: false };
  if (tenant) {
    found.tenant = (await api.get("/v1/usage")).tenant;
    found.role = (await succeeds(() => api.get(`/v1/tenants/${found.tenant}`))) ? "owner" : "caller";
  }
  if (admin) found.admin = await succeeds(() => api.get("/v1/admin/keys", { limit: 1 }));
  return found;
}

async function succeeds(load) {
  try {
    await load();
    return true;
  } catch (error) {
    if (error instanceof ApiError && error.status === 403) return false;
    throw error;
  }
}

function App() {
  const [error, setError] = useState(null);
  const { tenant, admin } = keys.value;
  const find = async () => {
    setError(null);
    try {
      me.value = await rights(keys.value);
    } catch (problem) {
      if (problem.status !== 401) setError(problem);
    }
  };
  useEffect(() => {
    if (tenant || admin) find();
  }, [tenant, admin, connection.value]);
  const page = route.value.parts[0];
  let body;
  if (page === "login" || !(tenant || admin)) body = html`<${Login} code=${page === "login" ? route.value.parts[1] : null} />`;
  else if (error) body = html`<${ErrorBox} error=${error} retry=${find} />`;
  else if (!me.value) body = html`<${Loading} />`;
  else {
    const shown = page in PAGES && (page !== "tasks" || me.value.tenant); // an admin key alone has no tasks
    const name = shown ? page : me.value.tenant ? "tasks" : "hub";
    body = html`<${name === "tasks" && route.value.parts[1] ? TaskPage : PAGES[name]} />`;
  }
  return html`<a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), document.getElementById("main").focus())}>To the content</a>
    <${Header} page=${page} />
    ${connection.value === "lost" && html`<p class="lost" role="alert">The hub does not answer. This page tries again every second; nothing that you typed is lost.</p>`}
    <main id="main" tabindex="-1">${body}</main>
    <${Notices} />`;
}

function Header({ page }) {
  const signedIn = me.value && (keys.value.tenant || keys.value.admin);
  const links = signedIn
    ? [me.value.tenant && ["tasks", "Tasks"], me.value.role === "owner" && ["tenant", "Tenant"], me.value.admin && ["hub", "Hub"]].filter(Boolean)
    : [];
  return html`<header>
    <a class="brand" href="#/tasks">karst-hub</a>
    <nav aria-label="Pages">
      ${links.map(([name, text]) => html`<${Link} to=${`/${name}`} aria-current=${page === name ? "page" : null}>${text}<//>`)}
    </nav>
    ${signedIn && html`<span class="who">${[me.value.tenant, me.value.admin && "admin"].filter(Boolean).join(" + ")}</span>
      <${Button} onClick=${() => (signOut(), go("/tasks"))}>Sign out<//>`}
  </header>`;
}

render(html`<${App} />`, document.getElementById("console"));
