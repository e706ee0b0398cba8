/** Line charts in SVG, for a few lines of some hundred points. */
import { count } from "./components.js";
import { html, useEffect, useRef, useState } from "./lib.js";

const COLOURS = ["#2f7fd1", "#c2571a", "#2e8b57", "#9457b8", "#b8860b", "#c2405f", "#4a7a8c", "#7a7a2e"];
const [TOP, RIGHT, BOTTOM, LEFT] = [8, 12, 24, 52]; // pixels around the lines
const TICK_PX = [90, 45]; // at least so many from one tick to the next: across, upwards
const POINTS = 40; // with fewer, each has a dot
const DAY = 86_400;
const TIME_STEPS = [1, 5, 15, 30, 60, 300, 900, 1800, 3600, 10_800, 21_600, 43_200, DAY, 2 * DAY, 7 * DAY, 14 * DAY, 30 * DAY];

/** Return the multiples of a round step between two values, at most `count`. */
function ticks(low, high, count, time) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = (time && TIME_STEPS.find((seconds) => seconds >= rough)) || [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

/** Return the ends of an axis; values that are nearly all above zero begin there if that costs little room. */
function range(values, margin) {
  const known = values.filter((value) => typeof value === "number");
  let [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
  if (margin && low > 0 && low < high / 2) low = 0;
  if (low === high) [low, high] = margin && low === 0 ? [0, 1] : [low - 0.5, high + 0.5];
  return margin ? [low, high + 0.05 * (high - low)] : [low, high];
}

const number = (value) => (typeof value !== "number" ? "–" : count(Math.abs(value) < 1000 ? Number(value.toPrecision(4)) : Math.round(value)));

/** Return seconds since 1970 as text: a day, which the hub counts by UTC, or a time of day. */
function moment(seconds, whole) {
  const date = new Date(1000 * seconds);
  if (whole >= DAY) return date.toLocaleDateString(undefined, { month: "short", day: "numeric", timeZone: "UTC" });
  return date.toLocaleTimeString(undefined, whole < 600 ? {} : { hour: "2-digit", minute: "2-digit" });
}

/** A chart: `data` is [x, y1, y2 ...], `series` the names of all. The legend has the values under the pointer, or the last. */
export function Chart({ data, series, label, time = false, height = 240 }) {
  const box = useRef(null);
  const [width, setWidth] = useState(600);
  const [pointed, setPointed] = useState(null);
  useEffect(() => {
    const sizes = new ResizeObserver(() => box.current && setWidth(Math.max(200, box.current.clientWidth)));
    sizes.observe(box.current);
    return () => sizes.disconnect();
  }, []);
  const [xs, ...lines] = data;
  const [low, high] = range(xs, false);
  const [bottom, top] = range(lines.flat(), true);
  const [across, upwards] = [width - LEFT - RIGHT, height - TOP - BOTTOM];
  const x = (value) => LEFT + (across * (value - low)) / (high - low);
  const y = (value) => TOP + (upwards * (top - value)) / (top - bottom);
  const points = lines.map((line) => line.map((value, i) => [x(xs[i]), y(value), value]).filter(([, , value]) => typeof value === "number"));
  const text = (value) => (time ? moment(value, high - low > 2 * DAY ? DAY : high - low) : number(value));
  const chosen = Math.min(pointed ?? Infinity, xs.length - 1);
  const point = ({ clientX, currentTarget }) => {
    const at = low + ((clientX - currentTarget.getBoundingClientRect().left - LEFT) * (high - low)) / across;
    setPointed(xs.reduce((best, value, i) => (Math.abs(value - at) < Math.abs(xs[best] - at) ? i : best), 0));
  };
  return html`<figure class="chart">
    <div ref=${box} role="img" aria-label=${label}>
      <svg width=${width} height=${height} onPointerMove=${point} onPointerLeave=${() => setPointed(null)}>
        ${ticks(bottom, top, Math.max(2, upwards / TICK_PX[1]), false).map((value) => html`<line class="rule" x1=${LEFT} x2=${width - RIGHT} y1=${y(value)} y2=${y(value)} /><text x=${LEFT - 6} y=${y(value) + 4} text-anchor="end">${number(value)}</text>`)}
        ${xs.length > 0 && ticks(low, high, Math.max(2, across / TICK_PX[0]), time).map((value) => html`<line class="rule" x1=${x(value)} x2=${x(value)} y1=${TOP} y2=${height - BOTTOM} /><text x=${x(value)} y=${height - 6} text-anchor="middle">${text(value)}</text>`)}
        ${pointed !== null && xs.length > 0 && html`<line class="pointed" x1=${x(xs[chosen])} x2=${x(xs[chosen])} y1=${TOP} y2=${height - BOTTOM} />`}
        ${points.map((line, i) => {
          const colour = COLOURS[i % COLOURS.length];
          return html`<polyline fill="none" stroke=${colour} stroke-width="2" points=${line.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ")} />
            ${line.length < POINTS && line.map(([a, b]) => html`<circle cx=${a} cy=${b} r="3" fill=${colour} />`)}`;
        })}
      </svg>
    </div>
    <figcaption>${label}</figcaption>
    <ul class="legend">
      <li>${series[0]}: ${xs.length ? text(xs[chosen]) : "–"}</li>
      ${lines.map((line, i) => html`<li><svg width="12" height="12" aria-hidden="true"><rect width="12" height="12" fill=${COLOURS[i % COLOURS.length]} /></svg> ${series[i + 1]}: ${number(line[chosen])}</li>`)}
    </ul>
  </figure>`;
}
