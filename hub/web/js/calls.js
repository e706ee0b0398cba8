/** Calls of components to the hub: values that they show, and actions of the person. */
import { useCallback, useEffect, useRef, useState } from "./lib.js";
import { notify } from "./state.js";

/** Load a value for a component, and again when `deps` change: {value, error, reload}. */
export function useLoaded(load, deps) {
  const [state, set] = useState({});
  const turn = useRef(0);
  const reload = useCallback(async () => {
    const mine = ++turn.current; // a later call makes earlier replies void
    try {
      const value = await load();
      if (mine === turn.current) set({ value });
    } catch (error) {
      if (mine === turn.current) set((before) => ({ value: before.value, error }));
    }
  }, deps);
  useEffect(() => {
    set({});
    reload();
    return () => void turn.current++;
  }, [reload]);
  return { ...state, reload };
}

/** Run an action. Show its error to the person; return whether it succeeded. */
export async function attempt(action, success) {
  try {
    await action();
    if (success) notify(success, "ok");
    return true;
  } catch (error) {
    if (error.name !== "AbortError") notify(error.detail || error.message, "error");
    return false;
  }
}
