// The page of t5-serve. All addresses are relative, so that it works under any path prefix.

const EXAMPLE = `otterbak is a backup program for laptops that are often offline. It watches the \
folders it is told about and keeps encrypted, deduplicated copies of every changed file, first in \
a local cache and then, as soon as there is a network, on any SSH server. Old versions are thinned \
out over time: hourly copies are kept for a day, daily ones for a month and monthly ones for years. \
Single files can be searched for and restored from the command line. Interrupted uploads continue \
where they stopped, and a periodic check verifies that every copy can still be read.`;
const CURL_CHARACTERS = 2000; // of JSON in a command line; longer texts go through a file
const FIELDS = {
  text: "text", num_beams: "beams", on_overflow: "overflow",
  length: "words", "length.words": "words",
};

const $ = (id) => document.getElementById(id);
const [form, text, summary, status, progress] =
  ["form", "text", "summary", "status", "progress"].map($);
let running = null; // the AbortController of the request in progress
let refused = false; // the last request got a 401: try again once there is a token
let maxBytes = 4 << 20;

// ---- token ----

let token = "";
try { token = sessionStorage.t5ServeToken ?? ""; } catch { /* storage is off */ }

function keepToken(value) {
  token = value;
  try { sessionStorage.t5ServeToken = value; } catch { /* kept in memory only */ }
}

function begin() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given !== null) {
    history.replaceState(null, "", location.pathname + location.search);
    keepToken(given.trim());
  }
  loadModel();
}

function askForToken(focus) {
  $("token-problem").textContent = token ? "The service did not accept the token you gave." : "";
  $("token").setAttribute("aria-invalid", token !== "");
  keepToken("");
  $("token-form").hidden = false;
  if (focus) $("token").focus();
}

$("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const value = $("token").value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) {
    $("token-problem").textContent = "That is not a token.";
    return $("token").focus();
  }
  keepToken(value);
  if (!(await loadModel())) return $("token").focus();
  $("token").value = "";
  (refused ? $("go") : text).focus();
  if (refused) summarize();
});

// ---- service ----

function call(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  return fetch(path, { ...options, headers, cache: "no-store" });
}

async function loadModel() {
  const asked = token;
  try {
    const response = await call("v1/models");
    if (asked !== token) return true; // about a token that has been replaced since
    if (response.status === 401) {
      askForToken(false);
      return false;
    }
    $("token-form").hidden = true;
    const model = (await response.json()).data[0];
    $("model-name").textContent = model.id;
    $("model").hidden = false;
    $("beams").placeholder = model.defaults.num_beams;
    maxBytes = model.limits.body_bytes;
    $("beams").max = model.limits.num_beams;
  } catch { /* what is wrong will show on Summarize */ }
  return true;
}

/** Server-sent events: [name, data]. One that the stream breaks off in is dropped. */
async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let name = "";
  let data = [];
  try {
    for (let done = false; !done;) {
      let value;
      ({ value, done } = await reader.read());
      rest += value ?? (rest.endsWith("\r") ? "\n" : "");
      // A CR at the very end may be half of a CRLF: it waits for what follows.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line) {
          if (data.length) yield [name, data.join("\n")];
          name = "";
          data = [];
          continue;
        }
        const [, field, content] = /^([^:]*)(?:: ?([^]*))?$/.exec(line);
        if (field === "data") data.push(content ?? "");
        else if (field === "event") name = content ?? "";
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function requestBody() {
  const body = { text: text.value };
  const bound = form.elements.bound.value;
  if (bound === "sentences") body.length = { sentences: 1 };
  if (bound === "words") body.length = { words: number("words") };
  if ($("beams").value !== "") body.num_beams = number("beams");
  if ($("overflow").value !== "map_reduce") body.on_overflow = $("overflow").value;
  return body;
}

const number = (id) => ($(id).value === "" ? null : Number($(id).value));

async function summarize() {
  if (running) return;
  if (!text.value.trim()) {
    update();
    return text.focus();
  }
  const control = running = new AbortController();
  const watch = { began: performance.now(), first: null };
  refused = false;
  reset();
  update();
  say("Sending the text…");
  // On a phone the summary is below the fold.
  if ($("result").getBoundingClientRect().top > innerHeight - 160) $("result").scrollIntoView();
  try {
    const response = await call("v1/summarize", {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify({ ...requestBody(), stream: true }),
      signal: control.signal,
    });
    if (!response.ok) return await refuse(response);
    const over = await follow(serverEvents(response.body), watch);
    if (!over) throw new Error("the stream ended early");
  } catch (error) {
    if (control.signal.aborted) say("Stopped.");
    else fail(watch.started
      ? { title: "The connection broke", detail: "The summary is not complete. Try again." }
      : { title: "The service cannot be reached", detail: "Check the connection, then try again." });
  } finally {
    const stopped = document.activeElement === $("stop");
    running = null;
    summary.setAttribute("aria-busy", "false");
    progress.hidden = true;
    update();
    if (stopped) $("go").focus();
  }
}

/** Show the events as they come. True when the answer, or an error, was among them. */
async function follow(events, watch) {
  let finished = 0;
  for await (const [name, data] of events) {
    const event = JSON.parse(data);
    if (name === "start") {
      watch.started = true;
      say(event.chunks > 1 ? `Reading ${event.chunks} parts…` : "Reading…");
      showProgress(0, event.chunks);
    } else if (name === "chunk") {
      finished += 1;
      addPart(event);
      showProgress(finished, event.chunks);
      const share = `${finished} of ${event.chunks}`;
      say(finished < event.chunks ? `Part ${share} summarized` : "Putting the parts together…");
      $("parts-title").textContent = `Summaries of the parts (${share})`;
    } else if (name === "delta") {
      if (watch.first === null) {
        watch.first = performance.now();
        say("Writing…");
        progress.hidden = true;
      }
      summary.append(event.text);
    } else if (name === "done") {
      finish(event, watch);
      return true;
    } else if (name === "error") {
      fail(event);
      return true;
    }
  }
  return false;
}

// ---- showing ----

function say(words) {
  if (status.textContent !== words) status.textContent = words;
}

function reset() {
  for (const id of ["empty", "cut", "facts", "parts", "copy"]) $(id).hidden = true;
  for (const id of ["problem", "facts", "part-list"]) $(id).replaceChildren();
  for (const id of Object.values(FIELDS)) $(id).removeAttribute("aria-invalid");
  summary.textContent = "";
  summary.classList.remove("broken");
  summary.setAttribute("aria-busy", "true");
  $("parts").open = false;
}

/** Show what follows from the state of the form. */
function update() {
  const value = text.value;
  const empty = !value.trim();
  const words = value.match(/\S+/g)?.length ?? 0;
  const pairs = value.match(/[\ud800-\udbff][\udc00-\udfff]/g)?.length ?? 0;
  const characters = value.length - pairs;
  $("count").textContent = `${count(words, "word")} · ${count(characters, "character")}`;
  $("clear").hidden = !value;
  $("go").setAttribute("aria-disabled", empty || running !== null);
  $("go").textContent = running ? "Summarizing…" : "Summarize";
  const keys = navigator.platform.startsWith("Mac") ? "⌘ Enter" : "Ctrl + Enter";
  $("go-hint").textContent = running ? "" : empty ? "Put a text in first." : `or press ${keys}`;
  $("stop").hidden = !running;
  document.body.classList.toggle("busy", running !== null);
  if ($("curl-box").open) showCurl();
}

const figure = (n) => n.toLocaleString("en");
const count = (n, noun) => `${figure(n)} ${noun}${n === 1 ? "" : "s"}`;

function showProgress(value, most) {
  progress.hidden = most < 2;
  progress.max = most;
  progress.value = value;
}

function addPart(part) {
  const item = document.createElement("li");
  item.value = part.index;
  const span = `characters ${figure(part.start + 1)} to ${figure(part.end)}`;
  item.append(element("p", `Part ${part.index + 1} · ${span}`), element("p", part.summary || "(nothing)"));
  // Parts finish in any order.
  const list = $("part-list");
  list.insertBefore(item, [...list.children].find((other) => other.value > part.index) ?? null);
  $("parts").hidden = false;
}

function element(tag, words, ...children) {
  const node = document.createElement(tag);
  node.textContent = words;
  node.append(...children);
  return node;
}

function finish(answer, watch) {
  const now = performance.now();
  if (summary.textContent !== answer.summary) summary.textContent = answer.summary;
  say(answer.summary ? `Done in ${time(now - watch.began)}` : "Done: the model’s summary is empty.");
  $("copy").hidden = !answer.summary;
  $("cut").hidden = !answer.truncated;
  const { usage, model } = answer;
  const facts = [
    ["Input", count(usage.input_tokens, "token")],
    ["Output", count(usage.output_tokens, "token")],
    ["First text", watch.first === null ? "none" : time(watch.first - watch.began)],
    ["Total", time(now - watch.began)],
    ["In the queue", time(usage.queue_ms)],
    ["In the model", time(usage.compute_ms)],
    ["Model", model.name],
    ["Revision", model.revision.slice(0, 12)],
    ["Truncated", answer.truncated ? "yes" : "no"],
    ["Finish reason", answer.finish_reason],
  ];
  for (const [name, value] of facts) {
    $("facts").append(element("div", "", element("dt", name), element("dd", value)));
  }
  $("facts").hidden = false;
}

const time = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** An answer with an error status. */
async function refuse(response) {
  let problem = {};
  try { problem = await response.json(); } catch { /* from something in between, not from us */ }
  if (response.status === 401) {
    refused = true;
    say("");
    $("empty").hidden = false;
    return askForToken(true);
  }
  const title = problem.title ?? `The service answered ${response.status}`;
  fail({ ...problem, title }, response.headers.get("Retry-After"));
}

function fail(problem, retryAfter) {
  showProblem(problem, retryAfter);
  summary.classList.add("broken");
  say("");
}

/** A problem document (RFC 9457), shown with each of its field errors. */
function showProblem(problem, retryAfter) {
  const box = element("div", "", element("strong", problem.title ?? "It did not work"));
  box.className = "note bad";
  if (problem.errors?.length) {
    const list = element("ul", "");
    for (const { field, message } of problem.errors) {
      list.append(element("li", `${field}: ${message}`));
      const input = $(FIELDS[field]);
      input?.setAttribute("aria-invalid", "true");
      if (input && $("advanced").contains(input)) $("advanced").open = true;
    }
    box.append(list);
  } else if (problem.detail) {
    box.append(problem.detail);
  }
  if (retryAfter) {
    const when = /^\d+$/.test(retryAfter) ? `in ${count(+retryAfter, "second")}` : `after ${retryAfter}`;
    box.append(element("div", `Try again ${when}.`));
  }
  if (problem.request_id) box.append(element("small", `Request ${problem.request_id}`));
  $("empty").hidden = true;
  $("problem").replaceChildren(box);
}

// ---- curl ----

const quote = (word) => `'${word.replaceAll("'", "'\\''")}'`;

function showCurl() {
  const { text: whole, ...options } = requestBody();
  const address = new URL("v1/summarize", document.baseURI);
  const lines = [`-H "Authorization: Bearer $T5_SERVE_TOKEN"`];
  const json = JSON.stringify({ text: whole, ...options });
  const short = json.length <= CURL_CHARACTERS;
  if (short) {
    lines.push("-H 'Content-Type: application/json'", `--data ${quote(json)}`);
  } else {
    const { length, ...others } = options;
    address.search = new URLSearchParams(Object.entries({ ...length, ...others }));
    lines.push("-H 'Content-Type: text/plain; charset=utf-8'", "--data-binary @text.txt");
  }
  $("curl").textContent = [`curl ${quote(address.href)}`, ...lines].join(" \\\n  ");
  $("curl-hint").hidden = short;
}

async function copy(button, source) {
  const words = source.textContent;
  let copied = true;
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    // Over plain HTTP there is no clipboard object: the old way then.
    getSelection().selectAllChildren(source);
    copied = document.execCommand("copy");
    if (copied) getSelection().removeAllRanges();
  }
  const label = button.dataset.label ??= button.textContent;
  button.textContent = copied ? "Copied" : "Press Ctrl + C";
  setTimeout(() => { button.textContent = label; }, 2000);
}

// ---- files ----

async function load(file) {
  const refuse = (detail) => showProblem({ title: `${file.name} was not loaded`, detail });
  if (file.size > maxBytes) return refuse(`It has ${figure(file.size)} bytes; the service takes ${figure(maxBytes)}.`);
  try {
    const bytes = await file.arrayBuffer();
    let content;
    try {
      content = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    } catch {
      content = new TextDecoder("windows-1252").decode(bytes);
    }
    if (content.includes("\0")) return refuse("It is not a text file.");
    fill(content);
  } catch {
    refuse("It cannot be read. Is it a folder?");
  }
}

function fill(content) {
  $("problem").replaceChildren();
  text.value = content;
  text.setSelectionRange(0, 0);
  text.focus();
  text.scrollTop = 0;
  update();
}

// ---- wiring ----

form.addEventListener("submit", (event) => {
  event.preventDefault();
  summarize();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  if ($("token-form").contains(event.target)) return;
  event.preventDefault();
  summarize();
});
form.addEventListener("input", (event) => {
  event.target.removeAttribute("aria-invalid");
  if (event.target === $("words")) $("by-words").checked = true;
  update();
});
$("words").addEventListener("focus", () => {
  $("by-words").checked = true;
  update();
});
$("stop").addEventListener("click", () => running?.abort());
$("example").addEventListener("click", () => fill(EXAMPLE));
$("clear").addEventListener("click", () => fill(""));
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) load($("file").files[0]);
  $("file").value = "";
});
$("copy").addEventListener("click", () => copy($("copy"), summary));
$("copy-curl").addEventListener("click", () => copy($("copy-curl"), $("curl")));
$("curl-box").addEventListener("toggle", showCurl);

// A file may land anywhere: next to the field, the browser would leave the page to show it.
for (const type of ["dragover", "dragleave", "drop"]) {
  addEventListener(type, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    form.classList.toggle("dropping", type === "dragover");
    if (type === "drop" && event.dataTransfer.files.length) load(event.dataTransfer.files[0]);
  });
}
addEventListener("hashchange", begin);
begin();
update();
