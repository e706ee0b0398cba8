/** The page of one task: its tabs, each a module of its own. */
import { api, at } from "../api.js";
import { useLoaded } from "../calls.js";
import { Page, pending } from "../components.js";
import { html } from "../lib.js";
import { route } from "../router.js";
import { owns } from "./task/shared.js";
import Images from "./task/images.js";
import Review from "./task/review.js";
import Train from "./task/train.js";
import Try from "./task/try.js";
import Use from "./task/use.js";
import Versions from "./task/versions.js";

const TABS = {
  images: ["Images", Images],
  train: ["Train", Train],
  try: ["Try", Try],
  review: ["Review", Review],
  versions: ["Versions", Versions],
  use: ["Use", Use],
};
const CALLER_TABS = ["try", "use"]; // of a key that may only classify, and of a task of another tenant

export default function TaskPage() {
  const [, task = "", tab] = route.value.parts;
  return html`<${Task} key=${task} task=${task} named=${tab} />`;
}

function Task({ task, named }) {
  const loaded = useLoaded(async () => {
    const detail = await api.get(at(task));
    for (let next = detail.next; next; ) {
      const page = await api.get(at(task), { cursor: next });
      detail.versions.push(...page.versions);
      next = page.next;
    }
    return detail;
  }, [task]);
  const { value: detail, error, reload } = loaded;
  if (error && !detail) return html`<${Page} title=${task}>${pending(loaded)}<//>`;
  const shown = Object.keys(TABS).filter((name) => owns(task) || CALLER_TABS.includes(name));
  const tab = shown.includes(named) ? named : shown[0];
  const [, Tab] = TABS[tab];
  return html`<${Page} title=${task}>
    <nav class="tabs" aria-label=${`Parts of ${task}`}>
      ${shown.map((name) => html`<a href=${`#/tasks/${encodeURIComponent(task)}/${name}`} aria-current=${name === tab ? "page" : null}>${TABS[name][0]}</a>`)}
    </nav>
    ${detail ? html`<${Tab} key=${tab} task=${task} detail=${detail} reload=${reload} />` : pending(loaded)}
  <//>`;
}
