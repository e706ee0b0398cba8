/** What all pages share: the keys of this tab, the person's rights, the connection to the hub, notices. */
import { signal } from "./lib.js";

const STORED = "karst-hub keys";
const NOTICE_MS = 8000;

/** {tenant, admin}: the API keys of this browser tab; each may be missing. */
export const keys = signal(stored());
/** {tenant, role: "owner" | "caller", admin: bool}; null while nobody is signed in. */
export const me = signal(null);
/** "ok", or "lost" while the hub does not answer. */
export const connection = signal("ok");
/** [{id, text, kind: "ok" | "error"}] */
export const notices = signal([]);

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}

/** Keep keys in this tab; they end with it. */
export function signIn(added) {
  keys.value = { ...keys.value, ...added };
  sessionStorage.setItem(STORED, JSON.stringify(keys.value));
}

/** Forget all keys, or one: "tenant" or "admin". */
export function signOut(which) {
  const { [which]: _gone, ...rest } = which ? keys.value : {};
  sessionStorage.removeItem(STORED);
  keys.value = {};
  if (rest.tenant || rest.admin) signIn(rest);
  me.value = null;
}

let last = 0;
/** Show a line to the person. Errors stay until they are closed. */
export function notify(text, kind = "ok") {
  const id = ++last;
  notices.value = [...notices.value.filter((notice) => notice.text !== text), { id, text, kind }].slice(-4);
  if (kind !== "error") setTimeout(() => dismiss(id), NOTICE_MS);
}

export function dismiss(id) {
  notices.value = notices.value.filter((notice) => notice.id !== id);
}
