// The chat page: each question goes to the base and to the tuned model at the same time, and both answers are shown as
// they come. Answers are put in as text, never as HTML.

const at = (id) => document.getElementById(id);
const KEPT = "recipe-serve-key"; // for this tab alone, so that the page can be loaded again
let key = "";
let models = []; // {name, tuned, messages: what was said so far}
let form = { messages: true, system: null }; // how the training rows put a question
let running = null; // AbortController of the answers that are coming

// --- the server ---------------------------------------------------------------------------------------------

class Problem extends Error {} // in words, for whoever reads the page

async function call(path, body, signal) {
  const options = { headers: { Authorization: `Bearer ${key}` }, signal };
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) throw new Problem("The key is missing or wrong. Open the address that the server printed.");
  const said = await response.json().catch(() => null);
  throw new Problem(said?.error?.message ?? `The server answered with error ${response.status}.`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Problem("The connection broke before the answer was complete.");
    });
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

// --- one question, two answers ------------------------------------------------------------------------------

function number(id) {
  const value = at(id).valueAsNumber;
  if (!at(id).checkValidity() || Number.isNaN(value)) {
    throw new Problem(`${at(id).parentElement.textContent.trim()}: expected a number from ${at(id).min} to ${at(id).max}.`);
  }
  return value;
}

function settings() {
  return { temperature: number("temperature"), seed: number("seed"), max_tokens: number("max-tokens") };
}

function request(model, question, chosen) {
  const body = { model: model.name, stream: true, stream_options: { include_usage: true }, ...chosen };
  if (!form.messages) return ["/v1/completions", { ...body, prompt: question }];
  const system = at("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  const asked = [...opening, ...model.messages, { role: "user", content: question }];
  return ["/v1/chat/completions", { ...body, messages: asked }];
}

async function answer(model, question, chosen, place) {
  let text = "";
  let first = 0;
  let tokens = 0;
  let end = "";
  place.card.setAttribute("aria-busy", "true");
  try {
    const response = await call(...request(model, question, chosen), running.signal);
    for await (const event of events(response)) {
      if (event.error) throw new Problem(event.error.message);
      const choice = event.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece && !first) first = performance.now();
      text += piece;
      if (piece) place.text.append(piece);
      if (choice?.finish_reason === "length") end = " · cut at the most tokens";
      tokens = event.usage?.completion_tokens ?? tokens;
    }
  } catch (error) {
    if (error.name === "AbortError") end = " · stopped";
    else if (error instanceof Problem) fail(place, error.message);
    else throw error;
  } finally {
    place.card.removeAttribute("aria-busy");
  }
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `${tokens} tokens · ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  place.facts.append((rate + end).replace(/^ · /, ""));
  model.messages.push({ role: "user", content: question }, { role: "assistant", content: text });
}

function fail(place, message) {
  const line = document.createElement("p");
  line.className = "failed";
  line.append(message);
  place.text.after(line);
}

function element(name, kind, ...inside) {
  const made = document.createElement(name);
  made.className = kind;
  made.append(...inside);
  return made;
}

function turn(question) {
  const places = models.map((model) => {
    const text = element("div", "text");
    const facts = element("p", "faint small");
    const card = element("section", model.tuned ? "card tuned" : "card", element("h2", "", model.name), text, facts);
    return { card, text, facts };
  });
  const cards = element("div", "answers", ...places.map((place) => place.card));
  at("turns").append(element("article", "turn", element("p", "question", question), cards));
  at("ask").scrollIntoView({ block: "end" });
  return places;
}

async function send() {
  const question = at("prompt").value;
  if (running || !question.trim() || !models.length) return;
  say("");
  let chosen;
  try {
    chosen = settings();
  } catch (error) {
    return say(error.message);
  }
  at("prompt").value = "";
  running = new AbortController();
  buttons();
  const places = turn(question);
  await Promise.all(models.map((model, i) => answer(model, question, chosen, places[i])));
  running = null;
  buttons();
  at("prompt").focus();
}

// --- the page -----------------------------------------------------------------------------------------------

function say(problem) {
  at("problem").hidden = !problem;
  at("problem").textContent = problem;
}

function buttons() {
  at("send").disabled = Boolean(running) || !models.length;
  at("stop").disabled = !running;
}

function forget() {
  running?.abort();
  for (const model of models) model.messages = [];
  at("turns").replaceChildren();
  say("");
  at("prompt").focus();
}

async function begin() {
  say("");
  models = [];
  try {
    const found = await (await call("/v1/models")).json();
    form = found.form ?? form;
    models = found.data.map(({ id }, i) => ({ name: id, tuned: i > 0, messages: [] }));
  } catch (error) {
    say(error.message);
  }
  const known = models.length > 0;
  at("key-form").hidden = known;
  if (known) {
    sessionStorage.setItem(KEPT, key);
    at("title").textContent = models.at(-1).name;
    document.title = `${models.at(-1).name} beside its base`;
    at("system").value = form.system ?? "";
    at("system").hidden = at("system-label").hidden = !form.messages;
    if (!form.messages) at("prompt-label").textContent = "Your text, which both continue as it stands";
  }
  buttons();
  at(known ? "prompt" : "key").focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  begin();
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", forget);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  }
});

function takeKey() {
  key = new URLSearchParams(location.hash.slice(1)).get("key") ?? sessionStorage.getItem(KEPT) ?? "";
  history.replaceState(null, "", location.pathname); // the key is not to stay in the address bar and the history
}

window.addEventListener("hashchange", () => { // the address of another server's start, put into this tab
  takeKey();
  begin();
});
takeKey();
await begin();
document.documentElement.dataset.drawn = "yes";
