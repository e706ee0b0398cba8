/** Pages by the address's fragment: `#/tasks/flowers/images?label=rose`. The hub never sees it. */
import { html, signal } from "./lib.js";

function current() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decoded);
  return { parts, query: Object.fromEntries(new URLSearchParams(query)) };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** {parts, query} of the page that is shown. */
export const route = signal(current());
addEventListener("hashchange", () => {
  route.value = current();
});

export function go(path) {
  location.hash = path;
}

/** Show a page in place of this one: the address that is left is not in the browser's history. */
export function replace(path) {
  history.replaceState(null, "", `#${path}`);
  route.value = current();
}

/** A link within the console; `to` is a path such as "/tasks". */
export function Link({ to, children, ...rest }) {
  return html`<a href=${`#${to}`} ...${rest}>${children}</a>`;
}
