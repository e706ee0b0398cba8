/** A virtual list of thumbnails: only visible images have elements, so 100,000 images are as light as 100. */
import { Thumbnail } from "../../components.js";
import { html, useEffect, useRef, useState } from "../../lib.js";

const CELL = 116; // pixels, with the gap
const ROW = 140;
const BEYOND = 2; // rows above and below the visible ones

/**
 * `items` are the loaded images of `total`; `need(n)` asks for the first n. `selected` is a set of digests.
 * Keys: arrows, Home, End and Page move; Space selects; Shift extends; Ctrl+A asks for all; Enter opens.
 */
export function Grid({ task, items, total, need, selected, onSelect, onAll, onOpen, describe }) {
  const box = useRef(null);
  const anchor = useRef(0);
  const [place, setPlace] = useState(0);
  const [view, setView] = useState({ top: 0, height: 600, width: CELL });
  const columns = Math.max(1, Math.floor(view.width / CELL));
  const rows = Math.ceil(total / columns);
  const first = Math.max(0, Math.min(Math.floor(view.top / ROW) - BEYOND, rows - 1));
  const end = Math.min(rows, Math.ceil((view.top + view.height) / ROW) + BEYOND);
  const visible = items.slice(first * columns, end * columns);

  useEffect(() => {
    const look = () => {
      if (!box.current) return;
      const { scrollTop: top, clientHeight: height, clientWidth: width } = box.current;
      setView((old) => (old.top === top && old.height === height && old.width === width ? old : { top, height, width }));
    };
    const sizes = new ResizeObserver(look);
    sizes.observe(box.current);
    box.current.addEventListener("scroll", look, { passive: true });
    look();
    return () => sizes.disconnect();
  }, []);
  useEffect(() => need(Math.min(total, end * columns)), [end, columns, total, items.length]);

  const range = (a, b) => items.slice(Math.min(a, b), Math.max(a, b) + 1).map(({ digest }) => digest);
  const select = (i, { extend, toggle }) => {
    const digest = items[i].digest;
    if (extend) return onSelect(new Set([...(toggle ? selected : []), ...range(anchor.current, i)]));
    anchor.current = i;
    const next = new Set(toggle ? selected : []);
    if (toggle && selected.has(digest)) next.delete(digest);
    else next.add(digest);
    onSelect(next);
  };
  const move = (i, event) => {
    const next = Math.max(0, Math.min(items.length - 1, i));
    setPlace(next);
    const top = Math.floor(next / columns) * ROW;
    const { scrollTop, clientHeight } = box.current;
    if (top < scrollTop) box.current.scrollTop = top;
    else if (top + ROW > scrollTop + clientHeight) box.current.scrollTop = top + ROW - clientHeight;
    if (event.shiftKey) select(next, { extend: true });
    else anchor.current = next;
  };
  const onKey = (event) => {
    const page = columns * Math.max(1, Math.floor(view.height / ROW));
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page };
    if (event.key in steps) move(place + steps[event.key], event);
    else if (event.key === "Home") move(0, event);
    else if (event.key === "End") move(items.length - 1, event);
    else if (event.key === " " && items[place]) select(place, { toggle: true, extend: event.shiftKey });
    else if (event.key === "Enter" && items[place]) onOpen(items[place]);
    else if (event.key === "a" && (event.ctrlKey || event.metaKey)) onAll();
    else if (event.key === "Escape") onSelect(new Set());
    else return;
    event.preventDefault();
  };
  const onClick = (event, i) => {
    setPlace(i);
    box.current.focus({ preventScroll: true });
    const touch = event.pointerType === "touch"; // no keys to hold: each tap selects one more
    select(i, { extend: event.shiftKey, toggle: touch || event.ctrlKey || event.metaKey });
  };
  const onDrag = (event, image) => {
    const dragged = selected.has(image.digest) ? [...selected] : [image.digest];
    if (!selected.has(image.digest)) onSelect(new Set(dragged));
    event.dataTransfer.setData("application/x-karst-images", JSON.stringify(dragged));
    event.dataTransfer.effectAllowed = "move";
  };

  return html`<div
    class="grid-box"
    ref=${box}
    role="listbox"
    tabindex="0"
    aria-label=${`Images, ${total}`}
    aria-multiselectable="true"
    aria-activedescendant=${items[place] ? `image-${place}` : undefined}
    onKeyDown=${onKey}
  >
    <div class="grid-space" role="none" style=${{ height: `${rows * ROW}px` }}>
      <div class="grid-rows" role="none" style=${{ transform: `translateY(${first * ROW}px)`, "--columns": columns }}>
        ${visible.map((image, k) => {
          const i = first * columns + k;
          const text = describe(image);
          return html`<div
            key=${image.digest}
            id=${`image-${i}`}
            class=${i === place ? "cell current" : "cell"}
            role="option"
            aria-selected=${selected.has(image.digest)}
            aria-label=${`${image.name || image.digest.slice(0, 12)}, ${text}`}
            aria-posinset=${i + 1}
            aria-setsize=${total}
            draggable
            onClick=${(event) => onClick(event, i)}
            onDblClick=${() => onOpen(image)}
            onDragStart=${(event) => onDrag(event, image)}
          >
            <${Thumbnail} task=${task} digest=${image.digest} alt="" />
            <span>${text}</span>
          </div>`;
        })}
      </div>
    </div>
  </div>`;
}
