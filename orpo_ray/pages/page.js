"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  document.documentElement.classList.add("js");

  // Fold long texts. Which ones are long depends on the width.
  const texts = all(".text").map((text) => {
    const more = document.createElement("button");
    more.type = "button";
    more.className = "more";
    more.hidden = true;
    more.addEventListener("click", () => show(text.classList.contains("folded")));
    const show = (open) => {
      text.classList.toggle("folded", !open);
      more.textContent = open ? "less" : "more";
      more.setAttribute("aria-expanded", String(open));
    };
    show(false);
    text.after(more);
    return { text, more };
  });
  const fold = () => {
    const folded = texts.filter(({ text }) => text.classList.contains("folded") && text.offsetParent);
    const long = folded.map(({ text }) => text.scrollHeight > text.clientHeight + 1);
    folded.forEach(({ more }, index) => { more.hidden = !long[index]; });
  };
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(fold, 150); });
  fold();

  // Filter by reason, by kind of warning and by search text, combined.
  const pairs = all(".pair").map((pair) => ({
    pair,
    why: pair.dataset.why,
    kinds: pair.dataset.kinds.split(" "),
    words: all("[data-text]", pair).map((text) => text.textContent).join("\n").toLowerCase(),
  }));
  if (pairs.length) {
    const filters = all(".filter");
    const search = one("#search");
    const wanted = { why: "", kind: "" };
    const apply = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const { pair, why, kinds, words: text } of pairs) {
        const fits = (!wanted.why || wanted.why === why)
          && (!wanted.kind || (wanted.kind === "any" ? kinds[0] !== "" : kinds.includes(wanted.kind)))
          && words.every((word) => text.includes(word));
        pair.hidden = !fits;
        shown += fits ? 1 : 0;
      }
      for (const filter of filters) {
        filter.setAttribute("aria-pressed", String(wanted[filter.dataset.filter] === filter.dataset.value));
      }
      one("#shown").textContent = `${shown} of ${pairs.length} pairs`;
      one("#none-left").hidden = shown > 0;
      fold();
    };
    for (const filter of filters) {
      filter.addEventListener("click", () => {
        const { filter: group, value } = filter.dataset;
        wanted[group] = wanted[group] === value ? "" : value;
        apply();
      });
    }
    search.addEventListener("input", apply);
    one("#reset").addEventListener("click", () => {
      wanted.why = wanted.kind = search.value = "";
      apply();
      search.focus();
    });
    apply();
  }

  // Show one trial of a sweep in all plots: the one under the pointer or the focus, or else the selected one.
  const trials = all("[data-trial]");
  let selected = "";
  const light = (name) => {
    document.documentElement.classList.toggle("lighting", name !== "");
    for (const mark of trials) mark.classList.toggle("lit", name !== "" && mark.dataset.trial === name);
  };
  for (const mark of trials) {
    const name = mark.dataset.trial;
    for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => light(name));
    for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => light(selected));
    mark.addEventListener("click", () => { selected = selected === name ? "" : name; light(selected); });
  }

  // Enlarge images; the arrow keys go through all visible ones.
  const viewer = one("#viewer");
  const image = document.createElement("img");
  let opened = null;
  const open = (thumb) => {
    opened = thumb;
    const small = one("img", thumb);
    image.src = small.src;
    image.alt = small.alt;
    one("p", viewer).textContent = small.alt;
    if (!image.isConnected) viewer.prepend(image);
    if (!viewer.open) viewer.showModal();
  };
  const step = (by) => {
    const thumbs = all(".thumb").filter((thumb) => thumb.offsetParent);
    open(thumbs[(thumbs.indexOf(opened) + by + thumbs.length) % thumbs.length]);
  };
  for (const thumb of all(".thumb")) thumb.addEventListener("click", () => open(thumb));
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => { if (opened) opened.focus(); });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });
  one("#before").addEventListener("click", () => step(-1));
  one("#after").addEventListener("click", () => step(1));
  one("#close").addEventListener("click", () => viewer.close());
})();
