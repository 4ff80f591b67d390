// What is wider than the page scrolls, and whoever has no mouse can scroll it too.
const reachable = () => document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach(e => { if (e.scrollWidth > e.clientWidth) e.tabIndex = 0; });
new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", reachable);
reachable();
