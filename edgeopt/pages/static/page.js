// Reloads the page of a running study, keeping the selected trials and the focus.
const REFRESH_MS = 3000;

const selectedRuns = () => new Set([...document.querySelectorAll("main input[name=run]:checked")].map((box) => box.value));
const keyOf = (element) => element?.id || element?.getAttribute("href") || element?.value;

const refresh = async () => {
  const main = document.querySelector("main");
  if (main.dataset.live === undefined) return;
  const active = document.activeElement;
  if (!document.hidden && !active?.matches("select, input[type=search]")) {
    const response = await fetch(location.href).catch(() => null);  // the server may be down for a while
    if (response?.ok) {
      const fresh = new DOMParser().parseFromString(await response.text(), "text/html").querySelector("main");
      const selected = selectedRuns();
      const focused = main.contains(active) ? keyOf(active) : null;
      main.replaceWith(fresh);
      for (const box of fresh.querySelectorAll("input[name=run]")) box.checked = selected.has(box.value);
      if (focused) [...fresh.querySelectorAll("a, input, button, summary")].find((e) => keyOf(e) === focused)?.focus();
      listenToControls();
    }
  }
  setTimeout(refresh, REFRESH_MS);
};

const listenToControls = () => {
  for (const control of document.querySelectorAll("form.choice select, form.choice input[type=checkbox]")) {
    control.addEventListener("change", () => control.form.requestSubmit());
  }
};

listenToControls();
setTimeout(refresh, REFRESH_MS);
