/** The vendored libraries in one place: Preact, hooks, htm and signals. */
import htm from "../vendor/htm.js";
import { h } from "../vendor/preact.js";

export { useCallback, useEffect, useId, useLayoutEffect, useRef, useState } from "../vendor/hooks.js";
export { render } from "../vendor/preact.js";
export { signal } from "../vendor/signals.js";
export const html = htm.bind(h);
