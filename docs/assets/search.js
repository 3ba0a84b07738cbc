// Two faults of the search, each of which finds nothing at all for "RT-1: ...".
(() => {
  const SETUP = 0, QUERY = 2;
  const post = Worker.prototype.postMessage;
  let mended;

  // Its index (lunr 2.3.9) tells states of an automaton apart by a string in which a digit may be a
  // letter or belong to a number. Then some words with digits lead to words that are not there. So
  // the index is built by a second worker, in which something stands between the two.
  const key = `function () {
    const letters = Object.keys(this.edges).sort();
    const edges = letters.map((letter) => [letter, this.edges[letter].id]);
    return this._str ?? JSON.stringify([this.final, edges]);
  }`;

  function mend(worker) {
    const { search } = JSON.parse(document.getElementById("__config").textContent);
    const script = JSON.stringify(new URL(search, location.href).href);
    const code = `importScripts(${script}); lunr.TokenSet.prototype.toString = ${key}`;
    mended = new Worker(URL.createObjectURL(new Blob([code])));
    mended.onmessage = ({ data }) => worker.dispatchEvent(new MessageEvent("message", { data }));
  }

  Worker.prototype.postMessage = function (message, ...rest) {
    if (message?.type === SETUP) mend(this);
    // The end of "RT-1:" would be taken for a field's name.
    if (message?.type === QUERY)
      message = { ...message, data: message.data.replace(/:(?=\s|$)/g, "") };
    return post.call(mended ?? this, message, ...rest);
  };
})();
