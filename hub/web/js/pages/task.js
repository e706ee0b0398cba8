/** The page of one task: its tabs, each a module of its own that is loaded when it is first shown. */
import { api } from "../api.js";
import { ErrorBox, Loading, Page, Tabs } from "../components.js";
import { html, useEffect, useState } from "../lib.js";
import { route } from "../router.js";
import { me } from "../state.js";

const TABS = {
  images: ["Images", () => import("./task/images.js")],
  train: ["Train", () => import("./task/train.js")],
  try: ["Try", () => import("./task/try.js")],
  review: ["Review", () => import("./task/review.js")],
  versions: ["Versions", () => import("./task/versions.js")],
  use: ["Use", () => import("./task/use.js")],
};
const CALLER_TABS = ["try", "use"]; // of a key that may only classify, and of a task of another tenant

export default function TaskPage() {
  const [, task, named] = route.value.parts;
  const [state, setState] = useState({});
  const [Tab, setTab] = useState(null);
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
  useEffect(() => {
    let here = true;
    setTab(null);
    TABS[tab][1]().then(
      (module) => here && setTab(() => module.default),
      () => here && setState((before) => ({ ...before, error: new Error("The hub did not send this tab. Reload the page.") })),
    );
    return () => {
      here = false;
    };
  }, [tab]);
  const { detail, error } = state;
  if (error && !detail) return html`<${Page} title=${task}><${ErrorBox} error=${error} retry=${reload} /><//>`;
  return html`<${Page} title=${task}>
    <${Tabs} label=${`Parts of ${task}`} chosen=${tab} tabs=${shown.map((name) => [name, TABS[name][0], `#/tasks/${encodeURIComponent(task)}/${name}`])} />
    ${detail && Tab ? html`<${Tab} key=${`${task} ${tab}`} task=${task} detail=${detail} reload=${reload} />` : html`<${Loading} />`}
  <//>`;
}
