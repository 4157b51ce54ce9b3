"use strict";
// Fetches the page again every few seconds and puts in what has changed. Without this the page is the same, but not live.
(() => {
  const EVERY_MS = 3000;
  const PATIENCE_MS = 5000;
  const stale = document.getElementById("stale");
  const state = document.getElementById("state");

  const take = (fresh) => {
    const come = fresh.getElementById("state");
    if (come.textContent !== state.textContent) {
      state.textContent = come.textContent; // a status: a screen reader says it once
      state.className = come.className;
      document.title = fresh.title;
    }
    document.getElementById("up").textContent = fresh.getElementById("up").textContent;
    for (const section of fresh.querySelectorAll("main > section")) {
      const shown = document.getElementById(section.id);
      const holdsFocus = shown.contains(document.activeElement); // who reads with the keyboard is not thrown out
      if (!holdsFocus && shown.innerHTML !== section.innerHTML) shown.replaceChildren(...section.childNodes);
    }
  };

  const look = async () => {
    try {
      const answer = await fetch("/", { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      take(new DOMParser().parseFromString(await answer.text(), "text/html"));
      stale.hidden = true;
    } catch {
      stale.hidden = false;
    }
    setTimeout(look, EVERY_MS);
  };
  setTimeout(look, EVERY_MS);
})();
