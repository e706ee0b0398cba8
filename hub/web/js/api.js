/** The hub's public HTTP API. The console has no other way to the hub. */
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
    this.name = "ApiError";
    Object.assign(this, { status, title: problem.title, detail: this.message, errors, retryAfter });
  }
}

/** Return the address of a path of the API. */
export function address(path, params = {}) {
  const url = new URL(path.replace(/^\//, ""), BASE);
  for (const [name, value] of Object.entries(params)) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, value);
  }
  return url;
}

/** Return the key for a path: an admin's for the routes of admins, else the tenant's. */
function keyFor(path) {
  const { tenant, admin } = keys.value;
  const [plain] = path.split("?");
  const other = plain.match(/^\/v1\/tenants\/([^/]+)/)?.[1] ?? me.value?.tenant;
  const isAdmins = ADMIN.test(plain) || (me.value && other !== me.value.tenant);
  return isAdmins ? (admin ?? tenant) : (tenant ?? admin);
}

function authorised(path, headers = {}) {
  const key = keyFor(path);
  return key ? { authorization: `Bearer ${key}`, ...headers } : headers;
}

async function failed(path, reply) {
  let problem = {};
  try {
    problem = await reply.json();
  } catch {
    // A proxy in front of the hub answered; its status is all that is known.
  }
  return refused(path, reply.status, problem, reply.headers.get("retry-after"));
}

/** Return the error of a refused call. A key that the hub no longer knows is forgotten. */
function refused(path, status, problem, retryAfter) {
  if (status === 401 && keyFor(path) && path !== "/v1/login") {
    signOut(keyFor(path) === keys.value.admin ? "admin" : "tenant");
    notify("The hub does not accept this key any more: it was revoked or has expired. Sign in with another one.", "error");
  }
  const seconds = Number(retryAfter);
  return new ApiError(status, problem, retryAfter && Number.isFinite(seconds) ? seconds : null);
}

/** Note that the hub does not answer, and look for it until it does. */
function lost() {
  if (connection.value === "lost") return;
  connection.value = "lost";
  const look = async () => {
    try {
      if ((await fetch(address("/healthz"), { cache: "no-store" })).ok) {
        connection.value = "ok";
        return notify("The hub answers again.");
      }
    } catch {
      // not yet
    }
    setTimeout(look, POLL_MS);
  };
  setTimeout(look, POLL_MS);
}

async function call(method, path, { params, body, headers, signal } = {}) {
  let reply;
  try {
    reply = await fetch(address(path, params), { method, body, signal, cache: "no-store", headers: authorised(path, headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    lost();
    throw new ApiError(0, { detail: "The hub does not answer." });
  }
  if (!reply.ok) throw await failed(path, reply);
  return reply;
}

async function json(method, path, { params, data } = {}) {
  const sent = data === undefined ? {} : { body: JSON.stringify(data), headers: { "content-type": "application/json" } };
  const reply = await call(method, path, { params, ...sent });
  return reply.status === 204 ? null : reply.json();
}

/** Send a body with progress. `fetch` has none for uploads, so this is an XMLHttpRequest. */
function upload(path, body, { params, headers, onProgress, signal, reply = false } = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address(path, params));
    for (const [name, value] of Object.entries(authorised(path, headers))) request.setRequestHeader(name, value);
    if (onProgress) request.upload.addEventListener("progress", ({ loaded, total }) => onProgress(loaded, total));
    const stop = () => request.abort();
    signal?.addEventListener("abort", stop);
    request.addEventListener("loadend", () => signal?.removeEventListener("abort", stop));
    request.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    request.addEventListener("error", () => {
      lost();
      reject(new ApiError(0, { detail: "The hub does not answer, or closed the connection." }));
    });
    request.addEventListener("load", () => {
      let data = {};
      try {
        data = JSON.parse(request.responseText);
      } catch {
        // an empty reply, or a proxy's page
      }
      const found = { get: (name) => request.getResponseHeader(name) };
      if (request.status >= 400) reject(refused(path, request.status, data, found.get("retry-after")));
      else resolve(reply ? { body: data, headers: found } : data);
    });
    if (signal?.aborted) return reject(new DOMException("stopped", "AbortError"));
    request.send(body);
  });
}

/** Return an object URL of a file that needs a key; `api.release` frees it. */
async function blobUrl(path, { params, signal } = {}) {
  return URL.createObjectURL(await (await call("GET", path, { params, signal })).blob());
}

/** Save a file that needs a key under this name. */
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
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { detail: "The connection to the hub was lost." });
    }
    if (part.done) return;
    text += part.value.replaceAll("\r\n", "\n");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) onEvent(JSON.parse(data.map((line) => line.slice(5)).join("\n")));
    }
  }
}

export const api = {
  get: (path, params) => json("GET", path, { params }),
  post: (path, data, params) => json("POST", path, { data, params }),
  put: (path, data) => json("PUT", path, { data }),
  patch: (path, data) => json("PATCH", path, { data }),
  delete: (path) => json("DELETE", path),
  logIn: async (code) => (await call("POST", "/v1/login", { headers: { authorization: `Bearer ${code}` } })).json(),
  upload,
  blobUrl,
  download,
  release: (url) => URL.revokeObjectURL(url),
  events,
};
