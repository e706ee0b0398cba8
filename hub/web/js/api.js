/** The hub's public HTTP API, the console's only way to the hub. */
import { connection, keys, me, notify, signOut } from "./state.js";

const BASE = new URL(".", document.baseURI); // with the path of a proxy, if the hub is below one
const ADMIN = /^\/v1\/(status|gc|audit|admin\/|tenants$|tenants\/[^/]+\/import)/;
const POLL_MS = 1000;
const DOWNLOAD_MS = 60_000; // until a saved file's memory is freed

/** A problem (RFC 9457) that the hub answered, or a hub that did not answer (status 0). */
export class ApiError extends Error {
  constructor(status, problem = {}, retryAfter = null) {
    const errors = problem.errors ?? [];
    const named = errors.map(({ field, message }) => (field ? `${field}: ${message}` : message)).join("; ");
    super([problem.detail || problem.title || `status ${status}`, named].filter(Boolean).join(" "));
    Object.assign(this, { status, errors, retryAfter: Number(retryAfter) || null });
  }
}

export function address(path, params = {}) {
  const url = new URL(path.replace(/^\//, ""), BASE);
  for (const [name, value] of Object.entries(params)) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, value);
  }
  return url;
}

/** Return the path of a task's route, each part encoded. */
export const at = (task, ...parts) => ["/v1/tasks", ...[task, ...parts].map(encodeURIComponent)].join("/");

/** Wait; the signal ends it with an AbortError. */
export const sleep = (ms, signal) =>
  new Promise((resolve, reject) => {
    setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => reject(signal.reason));
  });

/** Return the key for a path: an admin's for the routes of admins, else the tenant's. */
function keyFor(path) {
  const { tenant, admin } = keys.value;
  const other = path.match(/^\/v1\/tenants\/([^/]+)/)?.[1] ?? me.value?.tenant;
  const isAdmins = ADMIN.test(path) || (me.value && other !== me.value.tenant);
  return isAdmins ? (admin ?? tenant) : (tenant ?? admin);
}

/** Return the error of a refused call. A key that the hub no longer knows is forgotten. */
function refused(key, status, problem, retryAfter) {
  const name = ["tenant", "admin"].find((kind) => key && keys.value[kind] === key);
  if (status === 401 && name) {
    signOut(name);
    notify("The hub does not accept this key any more: it was revoked or has expired. Sign in with another one.", "error");
  }
  return new ApiError(status, problem, retryAfter);
}

/** Note that the hub does not answer, and look for it until it does. */
async function lost() {
  if (connection.value === "lost") return;
  connection.value = "lost";
  const answers = () => fetch(address("/healthz"), { cache: "no-store" }).then(({ ok }) => ok, () => false);
  do await sleep(POLL_MS);
  while (!(await answers()));
  connection.value = "ok";
  notify("The hub answers again.");
}

/** Return the reply of a successful call. A `key` in place of the tab's own is not forgotten when it is refused. */
async function call(method, path, { params, body, headers, signal, key } = {}) {
  const own = key ? null : keyFor(path);
  const authorization = key || own ? { authorization: `Bearer ${key ?? own}` } : {};
  let reply;
  try {
    reply = await fetch(address(path, params), { method, body, signal, cache: "no-store", headers: { ...authorization, ...headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    lost();
    throw new ApiError(0, { detail: "The hub does not answer." });
  }
  if (reply.ok) return reply;
  const problem = await reply.json().catch(() => ({})); // of a proxy in front of the hub: only its status is known
  throw refused(own, reply.status, problem, reply.headers.get("retry-after"));
}

async function json(method, path, params, data) {
  const sent = data === undefined ? {} : { body: JSON.stringify(data), headers: { "content-type": "application/json" } };
  const reply = await call(method, path, { params, ...sent });
  return reply.status === 204 ? null : reply.json();
}

/** Post a body and return the reply's JSON. `fetch` knows no progress of uploads, so this is an XMLHttpRequest. */
function upload(path, body, { params, type, onProgress, signal } = {}) {
  return new Promise((resolve, reject) => {
    const key = keyFor(path);
    const request = new XMLHttpRequest();
    request.open("POST", address(path, params));
    request.setRequestHeader("authorization", `Bearer ${key}`);
    if (type) request.setRequestHeader("content-type", type);
    request.responseType = "json"; // null for an empty reply, or a proxy's page
    if (onProgress) request.upload.onprogress = ({ loaded }) => onProgress(loaded);
    const stop = () => request.abort();
    signal?.addEventListener("abort", stop);
    request.onloadend = () => signal?.removeEventListener("abort", stop);
    request.onabort = () => reject(signal.reason);
    request.onerror = () => {
      lost();
      reject(new ApiError(0, { detail: "The hub does not answer, or closed the connection." }));
    };
    request.onload = () => {
      const { status, response } = request;
      if (status < 400) resolve(response);
      else reject(refused(key, status, response ?? {}, request.getResponseHeader("retry-after")));
    };
    if (signal?.aborted) return reject(signal.reason);
    request.send(body);
  });
}

/** Return an object URL of a file that needs a key. The caller revokes it. */
async function blobUrl(path, signal) {
  return URL.createObjectURL(await (await call("GET", path, { signal })).blob());
}

async function download(path, name) {
  const url = await blobUrl(path);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), DOWNLOAD_MS);
}

/** Call `onEvent` with each server-sent event's JSON; return at the end of the stream. */
async function events(path, onEvent, signal) {
  const reply = await call("GET", path, { signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r\n", "\n");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) onEvent(JSON.parse(data.map((line) => line.slice(5)).join("\n")));
    }
  }
}

export const api = {
  get: (path, params) => json("GET", path, params),
  post: (path, data) => json("POST", path, {}, data),
  put: (path, data) => json("PUT", path, {}, data),
  patch: (path, data) => json("PATCH", path, {}, data),
  delete: (path) => json("DELETE", path),
  call,
  upload,
  blobUrl,
  download,
  events,
};
