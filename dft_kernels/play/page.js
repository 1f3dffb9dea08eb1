// The keyboard among tokens, the values of the one that is looked at, the clipboard, a download. Nothing is fetched.
window.dftPlay = {
  say(text) {
    const line = document.getElementById("looked-at");
    if (line) line.textContent = text;
  },
  async copy(text) {
    if (!text) return this.say("Nothing to copy yet: write first.");
    try {
      await navigator.clipboard.writeText(text);
      this.say("The command line is copied.");
    } catch {  // over plain HTTP from another machine there is no clipboard
      const before = document.activeElement;
      const box = document.body.appendChild(document.createElement("textarea"));
      box.value = text;
      box.select();
      const done = document.execCommand("copy");
      box.remove();
      before?.focus();
      this.say(done ? "The command line is copied, the old way." : "The browser forbids copying: select the line above.");
    }
  },
  save(text) {
    if (!text) return this.say("Nothing to save yet: write first.");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
    link.download = "pair.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    this.say("The pair is saved as pair.jsonl.");
  },
};
(() => {
  const token = (event) => (event.target instanceof Element ? event.target.closest(".token") : null);
  const looked = (event) => {
    const found = token(event);
    if (found) window.dftPlay.say(found.title);
  };
  document.addEventListener("focusin", looked);
  document.addEventListener("mouseover", looked);
  document.addEventListener("keydown", (event) => {
    const found = token(event);
    if (!found || event.ctrlKey || event.altKey || event.metaKey) return;
    const to = {
      ArrowRight: found.nextElementSibling,
      ArrowLeft: found.previousElementSibling,
      Home: found.parentElement.firstElementChild,
      End: found.parentElement.lastElementChild,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to) to.focus();
  });
})();
