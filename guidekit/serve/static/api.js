// The server's API, as docs/reference/serve-api.md describes it.

async function asked(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const error = new Error(body.error || `The server answered ${answer.status}.`);
    error.status = answer.status;
    throw error;
  }
  return body;
}

const sent = (path, body, signal) =>
  asked(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });

export const api = {
  about: () => asked("/api"),
  model: (name) => asked(`/api/models/${encodeURI(name)}`),
  tokens: (body, signal) => sent("/api/tokens", body, signal),
  open: (body) => sent("/api/open", body),
  runs: () => asked("/api/runs"),
  run: (id) => asked(`/api/runs/${id}`),
  draw: (body) => sent("/api/runs", body),
  stop: (id) => asked(`/api/runs/${id}`, { method: "DELETE" }),
  events: (id) => new EventSource(`/api/runs/${id}/events`),
  file: (id, path) => `/api/runs/${id}/files/${path.split("/").map(encodeURIComponent).join("/")}`,
};
