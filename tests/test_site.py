"""The site in a real browser, as wide as a laptop's and a telephone's screen: nothing is cut, links
to code land on their line, equations need no network, search finds papers by title.

Needs docs/requirements.txt, chromium and chromedriver (Debian: apt-get install chromium-driver).
"""

import ast
import base64
import functools
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from conftest import NAMES, ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md")) + [ROOT / "datasets" / "README.md"]
WIDTHS = (1280, 390)
COLUMNS = 80  # of code; more do not fit beside the two side bars at 1280 pixels
SECTIONS = ["In the file", "Flags that matter", "Usage", "Act with a trained policy"]
SECTIONS += ["What is logged", "Details", "Differences", "Results", "Ablations", "Cite"]

every_name = pytest.mark.parametrize("name", NAMES)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def page_of(name: str) -> str:
    return (DOCS / "algorithms" / f"{name}.md").read_text()


def blocks(text: str) -> list[str]:
    return re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------- What is written


@every_name
def test_the_same_template_on_every_page(name):
    found = re.findall("^## (.+)$", page_of(name), re.MULTILINE)
    assert [section for section in found if section in SECTIONS] == SECTIONS
    assert f"<!-- results: {name} -->" in page_of(name)


@every_name
def test_flags_are_shown_with_their_defaults(name):
    tree = ast.parse((ROOT / "algorithms" / f"{name}.py").read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {node.target.id: node.value for node in args.body if isinstance(node, ast.AnnAssign)}
    section = page_of(name).partition("## Flags that matter\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`--.+?) \| (.+?) \| .+ \|$", section, re.MULTILINE)
    assert len(rows) >= 2 and len(rows) == section.count("\n| `--")
    for flags, defaults in rows:
        flags = re.findall(r"`--([\w-]+)`", flags)
        for flag, shown in zip(flags, defaults.split(", "), strict=True):
            value = ast.literal_eval(fields[flag.replace("-", "_")])
            number = re.fullmatch(r"`([\d.e+-]+)`", shown)
            if isinstance(value, bool):
                assert shown == ("on" if value else "off"), flag
            elif value in ("", ()):
                assert shown in ("-", "none"), flag
            elif isinstance(value, tuple):
                assert tuple(float(word) for word in shown.strip("`").split()) == value, flag
            else:
                assert (float(number[1]) if number else shown.strip("`")) == value, flag


@every_page
def test_code_has_80_columns(page):
    lines = [line for block in blocks(page.read_text()) for line in block.splitlines()]
    assert [line for line in lines if len(line) > COLUMNS] == []


@every_page
def test_one_formula_a_line(page):
    shown = re.findall(r"\$\$(.+?)\$\$", page.read_text(), re.DOTALL)
    assert [formula for formula in shown if re.search(r"\\q?quad", formula)] == []


def test_katex_is_the_published_one():
    """The hash with which the content delivery network of npm serves this version's file."""
    found = hashlib.sha384((DOCS / "assets" / "katex" / "katex.min.js").read_bytes()).digest()
    published = "cMkvdD8LoxVzGF/RPUKAcvmm49FQ0oxwDF3BGKtDXcEc+T1b2N+teh/OJfpU0jr6"
    assert base64.b64encode(found).decode() == published
    assert "MIT" in (DOCS / "assets" / "katex" / "LICENSE").read_text()


# -------------------------------------------------------------------------------------- The site


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site as docs/make builds it, with every way to a network closed."""
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocs") is None:
        pytest.skip("docs/requirements.txt is not installed")
    folder = tmp_path_factory.mktemp("site")
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    closed = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | closed | {"PATH": paths}
    run = [str(DOCS / "make"), str(folder)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def hooks():
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("docs/requirements.txt is not installed")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_algorithms_are_listed_by_family(hooks, monkeypatch, tmp_path):
    families = hooks.by_family()
    listed = [page for family in families for pages in family.values() for page in pages]
    assert sorted(listed) == sorted(f"algorithms/{name}.md" for name in NAMES)
    assert list(families[0]) == ["VAE"] and "algorithms/a2po.md" in families[0]["VAE"]
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "docs" / "algorithms" / "another.md").write_text("# Another\n")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    with pytest.raises(hooks.PluginError, match=r"another\.md"):
        hooks.by_family()


def test_the_address_of_the_repository(hooks, monkeypatch, tmp_path):
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    assert hooks.repository() is None
    subprocess.run([*git, "remote", "add", "origin", "/a/folder"], check=True)
    assert hooks.repository() is None, "not an address on the web"
    subprocess.run([*git, "remote", "set-url", "origin", "git@git.example:a/b.git"], check=True)
    assert hooks.repository() == "https://git.example/a/b"
    (tmp_path / "CITATION.cff").write_text('title: x\nrepository-code: "https://x.example/c/d"\n')
    assert hooks.repository() == "https://x.example/c/d"


def test_results_are_those_of_the_benchmark(hooks, monkeypatch, tmp_path):
    """Rows and curves come from the committed files, and from nothing else."""
    folder = tmp_path / "benchmark_results"
    runs = folder / "runs" / "bc" / "hopper"
    for seed in range(2):
        (runs / f"seed{seed}").mkdir(parents=True)
        rows = "".join(f"{step},{step / 10 + seed}\n" for step in (100, 200, 400))
        (runs / f"seed{seed}" / "eval.csv").write_text("step,score\n" + rows)
    table = "| 400 steps | algorithm | seeds | final | best | minutes a run |\n"
    table += "|---|---|--:|--:|--:|--:|\n| hopper | bc | 2 | 30.0 | 41.0 | 3 |\n"
    table += "| hopper | iql | 3 | 7.0 [6.0, 8.0] | 9.0 | 4 |\n"
    (folder / "results.md").write_text(f"# Results\n\n{table}\n\nMore text.\n")
    for where, step in {"hopper": 800, "ant": 300}.items():  # the first has longer runs already
        more = folder / "quarter_hour" / "bc" / where / "seed0"
        more.mkdir(parents=True)
        (more / "eval.csv").write_text(f"step,score\n100,1\n{step},2\n")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    text = hooks.results("bc")
    assert "| 400 steps | hopper | 2 | 30.0 | 41.0 | 3 |" in text and "7.0 [" not in text
    lines = [line.split() for line in re.findall(r'points="([^"]+)"', text)]
    assert [len(line) for line in lines] == [2, 3, 3], "ant's, then both seeds of hopper"
    assert "runs/bc</code> and <code>benchmark_results/quarter_hour/bc</code>" in text
    del lines[0]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in lines[0])
    assert x1 - x0 == pytest.approx((x2 - x0) / 3, abs=0.2), "steps are to scale"
    assert y0 - y1 == pytest.approx((y0 - y2) / 3, abs=0.2), "scores are to scale, upwards"
    assert "| 400 steps | hopper | 3 | 7.0 [6.0, 8.0] | 9.0 | 4 |" in hooks.results("iql")
    assert "No run" in hooks.results("cql")
    (folder / "minutes").mkdir()
    table = "| 15 CPU minutes | algorithm | seeds | final | best | steps | CPU minutes |\n"
    table += "|---|---|--:|--:|--:|--:|--:|\n| hopper | cql | 1 | 5.0 | 6.0 | 4,321 | 15.0 |\n"
    (folder / "minutes" / "results.md").write_text(table)
    row = "| 4,321 steps | hopper | 1 | 5.0 | 6.0 | 15.0 CPU minutes |"
    assert row in hooks.results("cql") and "4,321" not in hooks.results("iql")
    quarter = "| 15 minutes of one CPU thread | steps | hopper | ant |\n|---|--:|--:|--:|\n"
    quarter += "| bc | 90 | 5.0 [4.0, 6.0] (at 2) |  |\n| iql | 80 | 1.5 | 2.5 |\n"
    quarter = f"<!-- quarter: begin -->\n{quarter}<!-- quarter: end -->\n| bc | 1 | 2 | 3 |\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(quarter)
    assert "in brackets: 5.0 [4.0, 6.0] (at 2) on `hopper`.\n" in hooks.results("bc")
    assert "in brackets: 1.5 on `hopper`, 2.5 on `ant`.\n" in hooks.results("iql")
    assert "in brackets" not in hooks.results("cql")


def test_the_site_builds(site):
    assert "A2PO.condition" in (site / "source/algorithms/a2po.py/index.html").read_text()


def test_what_a_shared_link_shows(site):
    for page in ("index.html", "algorithms/a2po/index.html"):
        html = (site / page).read_text()
        (picture,) = re.findall(r'property="og:image" content="([^"]+)"', html)
        (icon,) = re.findall(r'rel="icon" href="([^"]+)"', html)
        for target in (picture, icon):
            assert (site / page).parent.joinpath(target).resolve().is_file(), target


# ------------------------------------------------------------------------------------- A browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Browser:
    """Headless Chromium, driven over the W3C WebDriver protocol, which is JSON over HTTP."""

    FLAGS = "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    FLAGS += " --disable-component-update --disable-sync --hide-scrollbars"

    def __init__(self, chromium: str, chromedriver: str):
        self.profile = tempfile.mkdtemp()
        self.driver = subprocess.Popen(
            [chromedriver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        said = (re.search(r"successfully on port (\d+)", line) for line in self.driver.stdout)
        self.session = f"http://127.0.0.1:{next(found for found in said if found)[1]}/session"
        flags = [*self.FLAGS.split(), f"--user-data-dir={self.profile}"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]  # no network
        flags += ["--no-sandbox"] * (os.geteuid() == 0)  # which root cannot have
        options = {"goog:chromeOptions": {"binary": chromium, "args": flags}}
        started = self.ask("", capabilities={"alwaysMatch": options})
        self.session += f"/{started['sessionId']}"

    def ask(self, command: str, method: str = "POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.session + command, data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def resize(self, width: int) -> None:
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.ask("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)

    def open(self, address: str) -> None:
        """Returns when the page is there, its equations typeset and its fonts read. An address that
        differs from the last by its #anchor alone only moves there."""
        self.ask("/url", url=address)
        self.ask("/execute/async", script=READY, args=[])

    def run(self, script: str, *args):
        return self.ask("/execute/sync", script=script, args=list(args))

    def close(self) -> None:
        try:
            self.ask("", "DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait()
            shutil.rmtree(self.profile, ignore_errors=True)


READY = """
const done = arguments[0], began = Date.now();
const ready = () => {
  const left = [...document.querySelectorAll('.arithmatex')].some(e => !e.querySelector('.katex'));
  if (left && Date.now() - began < 10000) return setTimeout(ready, 20);
  document.fonts.ready.then(() => requestAnimationFrame(() => setTimeout(done, 50)));
};
ready();
"""

# What stands out of its box. A listing of a whole file (.source) scrolls, and a table may, too.
MEASURE = r"""
const all = (selector) => [...document.querySelectorAll('.md-content ' + selector)];
const cut = (e) => e.scrollWidth > e.clientWidth + 1;
const column = document.querySelector('.md-content__inner').getBoundingClientRect();
const start = (e) => e.textContent.trim().slice(0, 60);
const equations = all('.arithmatex');
const scrolls = (e) => e && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
const outside = (e) => {
  const box = (e.closest('.md-typeset__scrollwrap') || e.closest('.md-content__inner'));
  return e.getBoundingClientRect().right > box.getBoundingClientRect().left + box.scrollWidth + 1;
};
const broken = [], range = document.createRange();
for (const code of all(':not(pre):not(h1) > code, .highlight:not(.source) pre > code')) {
  const texts = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  for (let text = texts.nextNode(); text; text = texts.nextNode())
    for (const word of text.data.matchAll(/\S{2,40}/g)) {
      range.setStart(text, word.index);
      range.setEnd(text, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      if (lines.size > 1 && !/\S{41}/.test(text.data)) broken.push(word[0]);
    }
}
return {
  equations: equations.length,
  code: all('.highlight:not(.source) pre > code').length,
  tables: all('table').length,
  page: document.scrollingElement.scrollWidth > arguments[0] ? ['wider than the screen'] : [],
  raw: equations.filter(e => !e.querySelector('.katex') || e.querySelector('.katex-error'))
    .map(start),
  cut_equations: equations.filter(e => {
    const display = e.querySelector('.katex-display');
    return display ? cut(e) || cut(display) : outside(e);
  }).map(e => (e.querySelector('annotation') || e).textContent.trim()),
  cut_code: all('.highlight:not(.source) pre > code').filter(cut).map(start),
  cut_tables: all('table').filter(table => {
    const box = table.closest('.md-typeset__scrollwrap');
    const fits = table.getBoundingClientRect().right <= column.right + 1;
    return !fits && !scrolls(box);
  }).map(start),
  broken_names: broken,
  bad_pictures: all('img').filter(e => !e.naturalWidth || outside(e)).map(e => e.src),
  asked_elsewhere: performance.getEntriesByType('resource').map(e => e.name)
    .filter(name => !name.startsWith(location.origin) && !name.startsWith('data:')),
};
"""


@pytest.fixture(scope="module")  # an open page costs the tests after it a third of a core
def browser():
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("chromium and chromedriver are not installed")
    browser = Browser(chromium, chromedriver)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def pages(site) -> list[str]:
    found = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    return ["" if page == "." else f"{page}/" for page in found]


WRONG = ["page", "raw", "cut_equations", "cut_code", "cut_tables", "broken_names", "bad_pictures"]
WRONG += ["asked_elsewhere"]


@pytest.mark.slow
def test_nothing_is_cut(browser, address, pages):
    """Every page at both widths, with no network: equations, code, tables, names and pictures."""
    wrong, seen = {}, {}
    for page in pages:
        browser.resize(WIDTHS[0])
        browser.open(address + page)
        for width in WIDTHS:
            browser.resize(width)
            found = browser.run(MEASURE, width)
            seen[page, width] = found
            wrong |= {(page, width, what): found[what] for what in WRONG if found[what]}
    assert wrong == {}
    for width in WIDTHS:  # and there was something to measure
        found = seen["algorithms/a2po/", width]
        assert found["equations"] > 20 and found["code"] >= 2 and found["tables"] > 4
        assert sum(found["code"] for (_, w), found in seen.items() if w == width) > 40


@pytest.mark.slow
def test_links_land_on_the_line_that_they_name(browser, address, site, pages):
    """In the upper half of the window, below the header; at the end of a file further down."""
    links = {}
    for page in pages:
        html = (site / page / "index.html").read_text()
        for target in re.findall(r'href="([^"]+\.py/?#[^"]+)"', html):
            link = urllib.parse.urljoin(f"{address}{page}", target.replace("&amp;", "&"))
            links.setdefault(link.partition("#")[0], set()).add(link.partition("#")[2])
    assert sum(map(len, links.values())) > 50
    landing = """
        const [anchors, done] = arguments, found = {};
        const frame = () => new Promise(requestAnimationFrame);
        const look = async () => {
          for (const anchor of anchors) {
            location.hash = anchor, await frame(), await frame();
            const element = document.getElementById(decodeURIComponent(anchor));
            const line = element?.querySelector('.line'), box = line?.getBoundingClientRect();
            const bar = document.querySelector('.md-header').getBoundingClientRect().bottom;
            const end = scrollY + innerHeight >= document.scrollingElement.scrollHeight - 2;
            found[anchor] = line &&
              {text: line.textContent, top: box.top - bar, end, height: innerHeight};
          }
          done(found);
        };
        look();
    """
    wrong = {}
    for width, files in zip(WIDTHS, (sorted(links), sorted(links)[::8])):
        browser.resize(width)
        for file in files:
            first, *others = sorted(links[file])
            browser.open(f"{file}#{first}")  # from another page; the others from within this one
            there = landing.replace("location.hash = anchor, ", "")
            found = browser.ask("/execute/async", script=there, args=[[first]])
            found |= browser.ask("/execute/async", script=landing, args=[others])
            for link, at in found.items():
                name = urllib.parse.unquote(link).rpartition(".")[2]
                ok = at and -2 <= at["top"] <= at["height"] * (0.9 if at["end"] else 0.4)
                if not (ok and re.match(rf"\s*(@|(def|class) {name}\b)", at["text"])):
                    wrong[f"{file}#{link}".removeprefix(address), width] = at
    assert wrong == {}


@pytest.mark.slow
def test_search_finds_a_paper_by_its_title(browser, address):
    """Its page is one of the first three: many titles share most of their words."""
    script = """
        const done = arguments[0], began = Date.now();
        const look = () => {
          const found = [...document.querySelectorAll('.md-search-result__link')];
          if (found.length || Date.now() - began > 10000) return done(found.map(e => e.href));
          setTimeout(look, 50);
        };
        look();
    """
    browser.resize(WIDTHS[0])
    wrong = {}
    for name in NAMES:
        cite = page_of(name).partition("## Cite\n")[2]
        title = re.search(r"^ *title += \{(.+?)\},$", cite, re.MULTILINE | re.DOTALL)
        assert title, f"nothing to cite on the page of {name}"
        words = " ".join(re.sub(r"[{}]", "", title[1]).split())
        browser.open(f"{address}?q={urllib.parse.quote(words)}")
        found = browser.ask("/execute/async", script=script, args=[])
        first = list(dict.fromkeys(urllib.parse.urlsplit(link).path for link in found))[:3]
        if f"/algorithms/{name}/" not in first:
            wrong[words] = first
    assert wrong == {}
