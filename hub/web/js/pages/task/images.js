/** Tab "Images": add pictures, see them, give them labels. */
import { api, at } from "../../api.js";
import { attempt, patiently, useLoaded } from "../../calls.js";
import { Button, Camera, Choice, Confirm, Dialog, DropZone, Empty, ErrorBox, Form, TextField, count, pending, plural } from "../../components.js";
import { html, useEffect, useRef, useState } from "../../lib.js";
import { go, route } from "../../router.js";
import { Grid } from "./grid.js";
import { ImageDialog, LabelChoice, Untested, useKeys } from "./shared.js";
import { useUpload } from "./uploads.js";

const PAGE = 500;
const BULK = 200; // images of one change
const GROUPS = 100; // of near-duplicates in one page
const FOLDERS = "folder";
const REFRESH_MS = 500; // between two readings of the list during an upload

const sum = ({ train, test }) => train + test;

/** Images of a filter, loaded page by page as far as they are needed. */
function useImages(task, filter) {
  const key = JSON.stringify([task, filter]);
  const [, redraw] = useState();
  const list = useRef({});
  if (list.current.key !== key) list.current = { key, items: [], next: "0", wanted: 1 };
  const mine = list.current;

  async function load() {
    const { show, use: split, unlabelled, label } = filter;
    let page;
    if (show === "errors") {
      page = await api.get(at(task, "review"), { kind: "errors", count: 100 });
      page = { images: page.images.map(({ image, suggestions: [suggested] }) => ({ ...image, suggested })), next: null };
    } else if (show === "duplicates") {
      page = await api.get(at(task, "near-duplicates"), { count: GROUPS, cursor: mine.next === "0" ? null : mine.next });
      page.images = page.groups.flatMap(({ images }) => {
        const group = (mine.groups = (mine.groups ?? 0) + 1);
        return images.map((image) => ({ ...image, group }));
      });
    } else page = await api.get(at(task, "images"), { count: PAGE, cursor: mine.next, split, unlabelled, label: unlabelled ? null : label });
    mine.items = [...mine.items, ...page.images];
    mine.next = page.next;
  }
  /** Load until the first `wanted` images are there. */
  function need(wanted) {
    mine.wanted = Math.max(mine.wanted, wanted);
    if (mine.next === null || mine.items.length >= mine.wanted) return Promise.resolve();
    mine.busy ??= (async () => {
      try {
        while (mine === list.current && mine.next !== null && mine.items.length < mine.wanted) {
          await load();
          redraw({});
        }
      } catch (error) {
        mine.error = error;
        redraw({});
      }
      mine.busy = null;
    })();
    return mine.busy;
  }
  /** Change or drop (null) loaded images without a request. */
  function update(digests, change) {
    mine.items = mine.items.flatMap((image) => {
      if (!digests.has(image.digest)) return [image];
      const changed = change(image);
      return changed ? [changed] : [];
    });
    redraw({});
  }
  const restart = () => {
    list.current = {};
    redraw({});
  };
  useEffect(() => void need(1), [mine]);
  return { items: mine.items, complete: mine.next === null, error: mine.error, need, update, restart };
}

/** Number of images that a filter has, from the counts of the dataset. */
function totalOf(info, { label, unlabelled, use }) {
  const part = (row) => (use ? row[use] : sum(row));
  if (unlabelled) return part(info.unlabelled);
  if (label !== undefined) return part(info.labels.find((row) => row.label === label) ?? { train: 0, test: 0 });
  return part(info.unlabelled) + info.labels.reduce((total, row) => total + part(row), 0);
}

export default function Images({ task, detail }) {
  const info = useLoaded(() => api.get(at(task, "dataset")), [task]);
  if (!info.value) return pending(info);
  return html`<${Dataset} key=${task} task=${task} detail=${detail} info=${info.value} reload=${info.reload} />`;
}

function Dataset({ task, detail, info, reload }) {
  const { label, unlabelled, use, show } = route.value.query;
  const filter = { label, unlabelled, use, show };
  const images = useImages(task, filter);
  const [selected, select] = useState(new Set());
  const [open, setOpen] = useState(null);
  const [dialog, setDialog] = useState(null); // "delete", "label", "camera"
  const [choice, setChoice] = useState(FOLDERS); // label of new images
  const undo = useRef([]);
  const counting = useRef(0);
  const refreshing = useRef(0);
  const labels = info.labels.map((row) => row.label);
  const more = show && images.items.length && !images.complete ? 1 : 0; // a place that asks for the next page
  const total = show || images.complete ? images.items.length + more : totalOf(info, filter);

  const filterBy = (change) => {
    select(new Set());
    const query = Object.entries({ ...filter, ...change }).filter(([, value]) => value !== undefined && value !== "");
    go(`/tasks/${task}/images${query.length ? `?${new URLSearchParams(query)}` : ""}`);
  };
  const recount = () => {
    clearTimeout(counting.current);
    counting.current = setTimeout(reload, 300);
  };
  const refresh = () => {
    clearTimeout(refreshing.current);
    refreshing.current = 0;
    images.restart();
    return reload();
  };
  // Parts of an upload may end faster than the list is read. The last one waits for the list.
  const upload = useUpload(task, (last) => (last ? refresh() : void (refreshing.current ||= setTimeout(refresh, REFRESH_MS))));
  const add = (files) => upload.start(files, choice === FOLDERS ? null : choice);

  const belongs = (image) => {
    if (unlabelled && image.label !== null) return false;
    if (label !== undefined && image.label !== label) return false;
    return show !== "errors" || image.suggested?.kept !== false;
  };
  /** Give images a label (null: none), in steps. `record` keeps what Undo needs. */
  const relabel = (digests, to, record = true) =>
    attempt(async () => {
      const chosen = new Set(digests);
      const known = new Map(images.items.map(({ digest, label }) => [digest, label]));
      const before = digests.map((digest) => [digest, known.get(digest) ?? null]);
      for (let i = 0; i < digests.length; i += BULK) {
        await patiently(() => api.patch(at(task, "images"), { images: digests.slice(i, i + BULK), label: to }));
      }
      if (record) undo.current.push(before);
      images.update(chosen, (image) => {
        const changed = { ...image, label: to, suggested: image.suggested && { ...image.suggested, kept: false } };
        return belongs(changed) ? changed : null;
      });
      select(new Set());
      recount();
    }, `${plural(digests.length, "image")} ${digests.length === 1 ? "is" : "are"} ${to === null ? "without a label" : `labelled ${to}`} now.`);
  const takeBack = async () => {
    const last = undo.current.pop();
    if (!last) return;
    for (const before of new Set(last.map(([, label]) => label))) {
      await relabel(last.filter(([, label]) => label === before).map(([digest]) => digest), before, false);
    }
    images.restart();
  };
  const remove = () =>
    attempt(async () => {
      const gone = new Set();
      try {
        for (const digest of selected) {
          await patiently(() => api.delete(at(task, "images", digest)));
          gone.add(digest);
        }
      } finally {
        images.update(gone, () => null);
        select(new Set([...selected].filter((digest) => !gone.has(digest))));
        setDialog(null);
        recount();
      }
    }, `${plural(selected.size, "image")} deleted.`);
  const addLabel = async (name) => {
    const added = await attempt(async () => {
      await api.put(at(task), { labels: [...new Set([...labels, name])] });
      await reload();
    });
    return added && selected.size ? relabel([...selected], name) : added;
  };
  const selectAll = () =>
    attempt(async () => {
      await images.need(Infinity);
      select(new Set(images.items.map(({ digest }) => digest)));
    });

  useKeys((event) => {
    const control = event.ctrlKey || event.metaKey;
    const number = /^[1-9]$/.test(event.key) ? labels[event.key - 1] : undefined;
    if (control && event.key === "z") takeBack();
    else if (control || !selected.size) return;
    else if (number !== undefined) relabel([...selected], number);
    else if (event.key === "0" || event.key === "Backspace") relabel([...selected], null);
    else if (event.key === "Delete") setDialog("delete");
    else return;
    event.preventDefault();
  });
  const drop = (event, to) => {
    const text = event.dataTransfer.getData("application/x-karst-images");
    if (!text) return;
    event.preventDefault();
    event.stopPropagation();
    relabel(JSON.parse(text), to);
  };
  const describe = (image) =>
    (image.group ? `${image.group}: ` : "") +
    (image.suggested ? `${image.label}; or ${image.suggested.label}?` : (image.label ?? "no label")) +
    (image.use === "test" ? " · test" : "");

  // `to` is a label, null for none, undefined for all images.
  const chip = (text, key, on, row, to) => html`<li>
    <button
      class="chip"
      aria-pressed=${on}
      onClick=${() => filterBy({ label: (!on && to) || undefined, unlabelled: !on && to === null ? "1" : undefined })}
      onDragOver=${(event) => to !== undefined && event.preventDefault()}
      onDrop=${(event) => to !== undefined && drop(event, to)}
    >
      ${key && html`<kbd>${key}</kbd>`} ${text} (${count(row)})
    </button>
  </li>`;

  return html`<section aria-label="Images">
    <${DropZone} onFiles=${add} accept="image/*,.zip" folders>
      <p><strong>Drop images, folders or a zip here</strong>, paste them, or choose them. A folder's name becomes the label of its images.</p>
    <//>
    <div class="row">
      <${LabelChoice} text="Label of new images" labels=${labels} none="from their folders" value=${choice === FOLDERS ? null : choice} onPick=${(name) => setChoice(name ?? FOLDERS)} />
      <${Button} onClick=${() => setDialog("camera")}>Take pictures<//>
    </div>
    <${Progress} upload=${upload} labels=${labels} onLabel=${async (label) => (await relabel(upload.state.unlabelled, label)) && (upload.clear(), images.restart())} />
    ${info.images === 0
      ? !(upload.state && !upload.state.done) &&
        html`<${Empty} title="No images yet">
          <p>Add pictures of two things or more, about ten of each. <code>rose/1.jpg</code> gets the label rose.</p>
        <//>`
      : html`<${NextStep} task=${task} info=${info} trained=${detail.versions.length > 0} />
          <ul class="chips" aria-label="Labels: filter, or drop images on one">
            <li>Show</li>
            ${chip("all", "", label === undefined && !unlabelled, info.images, undefined)}
            ${chip("no label", "0", !!unlabelled, sum(info.unlabelled), null)}
            ${info.labels.map((row, i) => chip(row.label, i < 9 ? i + 1 : "", label === row.label, sum(row), row.label))}
            <li><button class="chip" onClick=${() => setDialog("label")}>${selected.size ? "+ new label for the selected" : "+ new label"}</button></li>
          </ul>
          ${info.similar_labels.length > 0 &&
          html`<p class="warning">These labels differ only in case or spaces: ${info.similar_labels.map((group) => group.join(" and ")).join("; ")}.</p>`}
          <div class="row">
            <${Choice} label="Use" value=${use} options=${[["", "all"], ["train", "train"], ["test", "test"]]} onPick=${(use) => filterBy({ use })} />
            <${Choice}
              label="Show"
              value=${show}
              options=${[["", "newest first"], ["errors", "labels that may be wrong"], ["duplicates", "near-duplicates"]]}
              onPick=${(show) => filterBy({ show })}
            />
          </div>
          ${show === "duplicates" && html`<p>Groups of nearly equal images, by number; those that train and test come first. Keep one of a group, or give them the same use.</p>`}
          ${images.error && html`<${ErrorBox} error=${images.error} retry=${images.restart} />`}
          <div class="row" role="toolbar" aria-label="Selected images">
            <span aria-live="polite">${count(selected.size)} selected</span>
            <${Button} onClick=${selectAll}>Select all<//>
            ${selected.size > 0 &&
            html`<${LabelChoice} text="Label them" labels=${labels} none="no label" onPick=${(name) => relabel([...selected], name)} />
              <${Button} onClick=${() => setOpen(images.items.find(({ digest }) => selected.has(digest)))}>Open<//>
              <${Button} kind="danger" onClick=${() => setDialog("delete")}>Delete<//>`}
            ${undo.current.length > 0 && html`<${Button} onClick=${takeBack}>Undo<//>`}
          </div>
          ${total === 0
            ? html`<p>${images.complete ? "No image matches this filter." : "Loading ..."}</p>`
            : html`<${Grid}
                task=${task}
                items=${images.items}
                total=${total}
                need=${images.need}
                selected=${selected}
                onSelect=${select}
                onAll=${selectAll}
                onOpen=${setOpen}
                describe=${describe}
              />`}`}
    ${open &&
    html`<${ImageDialog}
      task=${task}
      image=${open}
      labels=${labels}
      note=${open.suggested && `A classifier of the other images says ${open.suggested.label}.`}
      onClose=${() => setOpen(null)}
      onDelete=${() => (select(new Set([open.digest])), setOpen(null), setDialog("delete"))}
      onChange=${(changed) => {
        images.update(new Set([changed.digest]), (image) => (belongs({ ...image, ...changed }) ? { ...image, ...changed } : null));
        setOpen({ ...open, ...changed });
        recount();
      }}
    />`}
    ${dialog === "delete" &&
    html`<${Confirm} title="Delete images" action="Delete" onYes=${remove} onNo=${() => setDialog(null)}>
      Delete ${plural(selected.size, "image")} of this task? Versions that they trained stay.
    <//>`}
    ${dialog === "label" && html`<${NewLabel} onAdd=${addLabel} onClose=${() => setDialog(null)} />`}
    ${dialog === "camera" &&
    html`<${Camera} onPicture=${(blob) => add([{ file: new File([blob], `camera-${Date.now()}.jpg`, { type: blob.type }), path: "" }])} onClose=${() => setDialog(null)} />`}
  </section>`;
}

function NextStep({ task, info, trained }) {
  const used = info.labels.filter((row) => sum(row) > 0).length;
  const unlabelled = sum(info.unlabelled);
  const found = `${plural(info.images, "image")}, ${plural(used, "label")}.`;
  if (used < 2) {
    return html`<p role="status">
      ${found} <strong>Next:</strong>${unlabelled
        ? " give the images at least two labels. Select some below, then choose under “Label them”, or drag them to a label."
        : " add images of a second label."}
    </p>`;
  }
  return html`<div class="row">
      <p role="status">
        ${found}${unlabelled > 0 && html` ${count(unlabelled)} without a label: <a href=${`#/tasks/${task}/review`}>review them one by one</a>.`}
      </p>
      <a class=${trained ? "button" : "button primary"} href=${`#/tasks/${task}/train`}>Next: train</a>
    </div>
    <${Untested} info=${info} />`;
}

function NewLabel({ onAdd, onClose }) {
  const [name, setName] = useState("");
  const submit = async () => {
    if (await onAdd(name.trim())) onClose();
  };
  return html`<${Dialog} title="New label" onClose=${onClose}>
    <${Form} action="Add" onSubmit=${submit}><${TextField} label="Name" value=${name} required pattern=".*\\S.*" maxlength="200" onText=${setName} /><//>
  <//>`;
}

function Progress({ upload: { state, stop, clear }, labels, onLabel }) {
  if (!state) return null;
  const { added = 0, already_there: there = 0, moved = 0, refused = 0 } = state.counts;
  const parts = [`${count(added)} added`, there && `${count(there)} already there`, moved && `${count(moved)} moved`, refused && `${count(refused)} refused`].filter(Boolean);
  return html`<div class="card">
    <p role="status">
      ${state.nothing ? "No image among these files." : `${state.done ? "Done" : "Uploading"}: ${parts.join(", ")}.`}
      ${state.error && html` <strong>${state.error}</strong>`}
    </p>
    ${!state.done && html`<progress aria-label="Upload" max="1" value=${state.share} />`}
    ${state.done &&
    state.unlabelled?.length > 0 &&
    html`<div class="row"><p class="warning">${plural(state.unlabelled.length, "image")} without a label, as no folder names one.</p><${LabelChoice} text="Label of these" labels=${labels} onPick=${onLabel} /></div>`}
    ${state.warnings.map((text) => html`<p class="warning">${text}</p>`)}
    ${state.refused.length > 0 &&
    html`<details open>
      <summary>Refused files</summary>
      <ul class="refused">
        ${state.refused.slice(0, 200).map(({ name, reason }) => html`<li><strong>${name}</strong>: ${reason}</li>`)}
      </ul>
    </details>`}
    <${Button} onClick=${state.done ? clear : stop}>${state.done ? "Close" : "Stop"}<//>
  </div>`;
}
