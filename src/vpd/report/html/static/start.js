/* Colours, reloading, and the start. */

function themes(charts) {
  const select = $("#theme");
  const apply = () => {
    if (select.value) document.documentElement.dataset.theme = select.value;
    else delete document.documentElement.dataset.theme;
    remembered.set("theme", select.value);
    charts?.redrawAll();
  };
  select.value = remembered.get("theme") || "";
  if (select.value) document.documentElement.dataset.theme = select.value;
  select.addEventListener("change", apply);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
}

function reloading(seconds) {
  if (!seconds) return;
  const note = $("#reload");
  $("span", note).textContent = String(seconds);
  note.hidden = false;
  setInterval(() => { if ($("#reload-on").checked) location.reload(); }, 1000 * seconds);
}

async function start() {
  const data = JSON.parse(await unpack("#packed-data"));
  new Browser(data);
  reloading(data.reload);
  document.head.append(el("script", {}, await unpack("#packed-library")));
  themes(showCharts(data));
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  const fault = $("#fault");
  fault.hidden = false;
  fault.textContent = `Curves and rollouts cannot be shown (${error.message}); this page needs a browser of 2023 or newer. The tables need nothing.`;
  throw error;
});
