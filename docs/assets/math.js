// Typesets the pages' equations with KaTeX, fetched by the reader's browser, pinned and verified.
(() => {
  const source = "https://cdn.jsdelivr.net/npm/katex@0.16.22/dist/";
  const fetched = (tag, options) =>
    new Promise((resolve) => {
      const element = Object.assign(document.createElement(tag), options);
      element.crossOrigin = "anonymous";
      element.onload = resolve;
      document.head.append(element);
    });
  const script = (src, integrity) => fetched("script", { src: source + src, integrity });
  const run = async () => {
    if (!document.querySelector(".arithmatex")) return;
    fetched("link", {
      rel: "stylesheet",
      href: source + "katex.min.css",
      integrity: "sha384-5TcZemv2l/9On385z///+d7MSYlvIEw9FuZTIdZ14vJLqWphw7e7ZPuOiCHJcFCP",
    });
    await script(
      "katex.min.js",
      "sha384-cMkvdD8LoxVzGF/RPUKAcvmm49FQ0oxwDF3BGKtDXcEc+T1b2N+teh/OJfpU0jr6",
    );
    await script(
      "contrib/auto-render.min.js",
      "sha384-hCXGrW6PitJEwbkoStFjeJxv+fSOOQKOPbJxSfM6G5sWZjAyWhXiTIIAmQqnlLlh",
    );
    for (const element of document.querySelectorAll(".arithmatex"))
      renderMathInElement(element, {
        delimiters: [
          { left: "\\(", right: "\\)", display: false },
          { left: "\\[", right: "\\]", display: true },
        ],
        throwOnError: false,
      });
  };
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", run) : run();
})();
