// A page about something that goes on asks for itself again, and keeps what the reader has chosen.
const EVERY_MS = 3000;

const chosen = () => new Set([...document.querySelectorAll("main input[name=run]:checked")].map((box) => box.value));
const place = (element) => element?.id || element?.getAttribute("href") || element?.value;

const refresh = async () => {
  const main = document.querySelector("main");
  if (main.dataset.live === undefined) return;
  const active = document.activeElement;
  if (!document.hidden && !active?.matches("select, input[type=search]")) {
    const answer = await fetch(location.href).catch(() => null);  // the server may be away for a while
    if (answer?.ok) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
      const selected = chosen();
      const focused = main.contains(active) ? place(active) : null;
      main.replaceWith(fresh);
      for (const box of fresh.querySelectorAll("input[name=run]")) box.checked = selected.has(box.value);
      if (focused) [...fresh.querySelectorAll("a, input, button, summary")].find((e) => place(e) === focused)?.focus();
      listen();
    }
  }
  setTimeout(refresh, EVERY_MS);
};

const listen = () => {
  for (const control of document.querySelectorAll("form.choice select, form.choice input[type=checkbox]")) {
    control.addEventListener("change", () => control.form.requestSubmit());
  }
};

listen();
setTimeout(refresh, EVERY_MS);
