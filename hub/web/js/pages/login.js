/** The page of a person without a key, or with a login link. */
import { api } from "../api.js";
import { ErrorBox, Form, Loading, TextField } from "../components.js";
import { html, useEffect, useState } from "../lib.js";
import { replace } from "../router.js";
import { signIn } from "../state.js";

export function Login({ code }) {
  const [typed, setTyped] = useState("");
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
    const key = typed.trim();
    signIn({ [await kindOf(key)]: key });
  };
  if (waiting) return html`<${Loading} />`;
  return html`<section class="narrow">
    <h1>Sign in</h1>
    <p>Paste an API key of this hub. The key stays in this browser tab, and is forgotten when you close it.</p>
    <${Form} action="Sign in" onSubmit=${submit}>
      <${TextField} label="API key" type="password" autocomplete="off" required value=${typed} placeholder="kh_..." onText=${setTyped} />
    <//>
    ${error && html`<${ErrorBox} error=${error} />`}
    <p><code>karst-hub login-link</code>, on the hub's machine, prints a link that signs you in.</p>
  </section>`;
}

/** Trade the one-time code of a login link for keys. */
async function exchange(code) {
  const { key, admin_key: admin } = await (await api.call("POST", "/v1/login", { key: code })).json();
  signIn({ ...(key && { tenant: key }), ...(admin && { admin }) });
}

async function kindOf(key) {
  try {
    await api.call("GET", "/v1/usage", { key });
    return "tenant";
  } catch (error) {
    if (error.status === 403) return "admin";
    throw error;
  }
}
