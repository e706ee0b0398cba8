/** Calls of components to the hub: values that they show, and actions of the person. */
import { api, sleep } from "./api.js";
import { useCallback, useEffect, useRef, useState } from "./lib.js";
import { notify } from "./state.js";

const WAITS = 60; // of one action
const LONG_S = 60; // a limit that lasts as long is an error

/** Load a value, and again when `deps` change: {value, error, reload}. `load` gets the argument of `reload`. */
export function useLoaded(load, deps) {
  const [state, set] = useState({});
  const turn = useRef(0);
  const reload = useCallback(async (more) => {
    const mine = ++turn.current; // a later call makes earlier replies void
    try {
      const value = await load(more);
      if (mine === turn.current) set({ value });
    } catch (error) {
      if (mine === turn.current) set(({ value }) => ({ value, error }));
    }
  }, deps);
  useEffect(() => {
    reload();
    return () => void turn.current++;
  }, [reload]);
  return { ...state, reload: () => reload(), more: () => reload(state.value) };
}

/** Load a list page by page, as `useLoaded`: `value` is {items, next}, and `more` adds the next page. */
export const usePages = (name, path, params = {}, cursor = "cursor") =>
  useLoaded(
    async (before) => {
      const page = await api.get(path, { ...params, [cursor]: before?.next });
      return { items: [...(before?.items ?? []), ...page[name]], next: page.next };
    },
    [path, JSON.stringify(params)],
  );

/** Load a file that needs a key: {url, error}. Its object URL is freed with the component. Without a path it waits. */
export function useFile(path) {
  const [state, set] = useState({});
  useEffect(() => {
    const stop = new AbortController();
    let url;
    set({});
    if (path) api.blobUrl(path, stop.signal).then(
      (found) => (stop.signal.aborted ? URL.revokeObjectURL(found) : set({ url: (url = found) })),
      (error) => stop.signal.aborted || set({ error }),
    );
    return () => {
      stop.abort();
      URL.revokeObjectURL(url);
    };
  }, [path]);
  return state;
}

/** Run an action; while the tenant's rate is reached, wait and run it again. */
export async function patiently(action, signal) {
  for (let waited = 0; ; waited++) {
    try {
      return await action();
    } catch (error) {
      const seconds = error.retryAfter ?? 2;
      if (error.status !== 429 || waited >= WAITS || seconds >= LONG_S) throw error;
      await sleep(1000 * seconds, signal);
    }
  }
}

/** Run an action. Show its error to the person; return whether it succeeded. */
export async function attempt(action, success) {
  try {
    await action();
    if (success) notify(success);
    return true;
  } catch (error) {
    if (error.name !== "AbortError") notify(error.message, "error");
    return false;
  }
}
