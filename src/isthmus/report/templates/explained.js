// Of several panels one is shown: chosen from a list, by buttons or by arrow keys. Without this script all are shown.
for (const chooser of document.querySelectorAll(".chooser")) {
  const select = chooser.querySelector(".choice");
  const panels = [...chooser.querySelectorAll(":scope > .panel")];
  const control = (name) => chooser.querySelector(`select.${name}`);
  const arrange = () => {
    const [filter, sort, order] = ["filter", "sort", "order"].map((name) => control(name)?.value ?? "");
    const panel = panels[select.selectedIndex];
    const cards = [...panel.querySelectorAll(".unit")];
    const score = (card) => (sort === "" ? null : JSON.parse(card.dataset.scores)[Number(sort)]);
    const place = new Map(original.get(panel).map((card, index) => [card, index]));
    const direction = Number(order) || -1;
    cards.sort((a, b) => {
      const [first, second] = [score(a), score(b)];
      if (first !== null && second !== null && first !== second) return direction * (first - second);
      if ((first === null) !== (second === null)) return first === null ? 1 : -1; // what was not measured comes last
      return place.get(a) - place.get(b);
    });
    panel.append(...cards);
    cards.forEach((card) => { card.hidden = filter !== "" && card.dataset.label !== filter; });
    const shown = cards.filter((card) => !card.hidden).length;
    const status = chooser.querySelector(".shown");
    if (status) status.textContent = `${shown} of ${cards.length} chosen units shown`;
    const orders = control("order");
    if (orders) orders.disabled = sort === "";
  };
  const original = new Map(panels.map((panel) => {
    const cards = [...panel.querySelectorAll(".unit")];
    return [panel, cards.sort((a, b) => Number(a.dataset.rank) - Number(b.dataset.rank))];
  }));
  const steps = [...chooser.querySelectorAll(".step")];
  const choose = (index) => {
    select.selectedIndex = Math.min(Math.max(index, 0), panels.length - 1);
    panels.forEach((panel, place) => { panel.hidden = place !== select.selectedIndex; });
    steps.forEach((step) => { step.disabled = !panels[select.selectedIndex + Number(step.dataset.step)]; });
    arrange();
  };
  select.addEventListener("change", () => choose(select.selectedIndex));
  select.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    choose(select.selectedIndex + step);
  });
  steps.forEach((step) => step.addEventListener("click", () => choose(select.selectedIndex + Number(step.dataset.step))));
  ["filter", "sort", "order"].forEach((name) => control(name)?.addEventListener("change", arrange));
  // A link to a hidden panel shows it, before the browser looks for where to go.
  const reveal = (id) => {
    const index = panels.findIndex((panel) => panel.id !== "" && panel.id === id);
    if (index >= 0) choose(index);
    return index >= 0;
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (link) reveal(link.hash.slice(1));
  });
  chooser.querySelector(".controls").hidden = false;
  if (!reveal(location.hash.slice(1))) choose(Math.max(select.selectedIndex, 0));
}
