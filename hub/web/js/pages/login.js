/** The page of a person without a key, or with a login link. */
import { address, api } from "../api.js";
import { Button, ErrorBox, Field, Loading } from "../components.js";
import { html, useEffect, useState } from "../lib.js";
import { replace } from "../router.js";
import { signIn } from "../state.js";

export function Login({ code }) {
  const [key, setKey] = useState("");
  const [error, setError] = useState(null);
  const [waiting, setWaiting] = useState(Boolean(code));
  useEffect(() => {
    if (!code) return;
    replace("/tasks"); // the code does not stay in the address or the history
    exchange(code)
      .catch(setError)
      .finally(() => setWaiting(false));
  }, [code]);

  const submit = async () => {
    setError(null);
    try {
      const kind = await kindOf(key.trim());
      signIn({ [kind]: key.trim() });
    } catch (problem) {
      setError(problem);
    }
  };
  if (waiting) return html`<${Loading} />`;
  return html`<section class="narrow">
    <h1>Sign in</h1>
    <p>Paste an API key of this hub. The key stays in this browser tab, and is forgotten when you close it.</p>
    <form onSubmit=${(event) => (event.preventDefault(), submit())}>
      <${Field} label="API key"><input type="password" autocomplete="off" required value=${key} placeholder="kh_..." onInput=${(e) => setKey(e.target.value)} /><//>
      <${Button} kind="primary" submit>Sign in<//>
    </form>
    ${error && html`<${ErrorBox} error=${error} />`}
    <p><code>karst-hub serve</code> prints a login link at its first start, and <code>karst-hub login-link</code> prints another.</p>
  </section>`;
}

/** Trade the one-time code of a login link for keys. */
async function exchange(code) {
  const { key, admin_key: admin } = await api.logIn(code);
  signIn({ ...(key && { tenant: key }), ...(admin && { admin }) });
}

/** Return whether a key is a tenant's or an admin's. */
async function kindOf(key) {
  const reply = await fetch(address("/v1/usage"), { headers: { authorization: `Bearer ${key}` } });
  if (reply.ok) return "tenant";
  if (reply.status === 403) return "admin";
  const problem = await reply.json().catch(() => ({}));
  throw new Error(problem.detail ?? "The hub does not accept this key.");
}
