/** The page of one task: its tabs, each a module of its own. */
import { api } from "../api.js";
import { ErrorBox, Loading, Page, Tabs } from "../components.js";
import { html, useEffect, useState } from "../lib.js";
import { route } from "../router.js";
import { me } from "../state.js";
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
  const [, task = "", named] = route.value.parts;
  const [state, setState] = useState({});
  const path = `/v1/tasks/${encodeURIComponent(task)}`;
  const reload = async () => {
    try {
      const detail = await api.get(path);
      for (let next = detail.next; next; ) {
        const page = await api.get(path, { cursor: next });
        detail.versions.push(...page.versions);
        next = page.next;
      }
      setState({ detail });
    } catch (error) {
      setState((before) => ({ ...before, error }));
    }
  };
  useEffect(() => {
    setState({});
    reload();
  }, [task]);
  const owned = me.value?.role === "owner" && !task.includes(":");
  const shown = Object.keys(TABS).filter((name) => owned || CALLER_TABS.includes(name));
  const tab = shown.includes(named) ? named : shown[0];
  const Tab = TABS[tab][1];
  const { detail, error } = state;
  if (error && !detail) return html`<${Page} title=${task}><${ErrorBox} error=${error} retry=${reload} /><//>`;
  return html`<${Page} title=${task}>
    <${Tabs} label=${`Parts of ${task}`} chosen=${tab} tabs=${shown.map((name) => [name, TABS[name][0], `#/tasks/${encodeURIComponent(task)}/${name}`])} />
    ${detail ? html`<${Tab} key=${`${task} ${tab}`} task=${task} detail=${detail} reload=${reload} />` : html`<${Loading} />`}
  <//>`;
}
