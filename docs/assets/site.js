// For keyboards and screen readers, what the theme leaves open: wide code and tables can be scrolled with the keyboard,
// and the copy button of a block of code is not a landmark.
function mend() {
  for (const element of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
  }
  for (const nav of document.querySelectorAll("nav.md-code__nav:not([role])")) {
    nav.setAttribute("role", "none");
  }
}

new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
addEventListener("load", mend);
addEventListener("resize", mend);
