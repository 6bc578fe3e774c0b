// The server's API: paths are relative, so that the page also works behind a proxy that adds a prefix.

let key = ""; // in memory only: a reload forgets it

export function useKey(text) {
  key = text.trim();
}

// A failure as one line for the reader. status: of HTTP, or 0 if the server could not be reached. code: the server's
// word for it, if it has one.
export class Failure extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function call(path, body, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const options = { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Failure("The server cannot be reached.");
  });
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const message = told.error?.message ?? `The server answered ${response.status} ${response.statusText}`;
  const wait = Number(response.headers.get("Retry-After"));
  const line = wait ? `${message} (try again in ${Math.ceil(wait)} s)` : message;
  throw new Failure(line, response.status, told.error?.code);
}

export async function model() {
  const { data } = await (await call("v1/models")).json();
  await call("ready"); // 503 until everything is compiled, and while the server ends
  return data[0];
}

// The lines of a body as it arrives.
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const whole = (rest + value).split(/\r?\n/);
      rest = whole.pop();
      yield* whole;
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure("The connection was lost.");
  } finally {
    reader.cancel().catch(() => {}); // nobody reads on: the server may stop
  }
}

// The events of a streamed answer, one after the other. Throws Failure, or AbortError if `signal` aborts it.
export async function* stream(path, body, signal) {
  const response = await call(path, { ...body, stream: true }, signal);
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data:")) continue; // blank lines, and comments, which keep the connection alive
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Failure(event.error.message, response.status);
    yield event;
  }
  throw new Failure("The connection ended before the answer did.");
}
