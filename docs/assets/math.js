// Typesets the pages' equations with KaTeX 0.16.22, which lies beside this file: no network needed.
(() => {
  const folder = new URL("katex/", document.currentScript.src);
  const fetched = (tag, options) =>
    new Promise((resolve) => {
      const element = Object.assign(document.createElement(tag), options);
      element.onload = resolve;
      document.head.append(element);
    });
  const run = async () => {
    const equations = document.querySelectorAll(".arithmatex");
    if (!equations.length) return;
    await Promise.all([
      fetched("link", { rel: "stylesheet", href: new URL("katex.min.css", folder) }),
      fetched("script", { src: new URL("katex.min.js", folder) }),
    ]);
    for (const element of equations)
      katex.render(element.textContent.slice(2, -2), element, {
        displayMode: element.tagName === "DIV", // \[...\] in a div, \(...\) in a span
        throwOnError: false,
      });
    // An equation changes the page's length: go once more to where the address points.
    if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  };
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", run) : run();
})();
