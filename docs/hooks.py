"""What the site needs beyond MkDocs itself. The pages under docs/ are plain Markdown whose links
work on GitHub; here they come to work on the site too.

- A link out of docs/ to a file of the repository leads to a page of the site that shows the file:
  source code with its sections as headings, and with an anchor for each function, which is how
  `../../algorithms/a2po.py#A2PO.condition` jumps to that method (GitHub opens the file). A folder
  is shown as a list of its files, a picture is copied.
- `<!-- include: ../path/to/file.md -->` is replaced by that file, or by the part of it between
  `<!-- name: begin -->` and `<!-- name: end -->` with `<!-- include: ../path/to/file.md name -->`.
- `<!-- results: a2po -->` is replaced by that algorithm's rows of the result tables and its
  learning curves, read from benchmark_results when the site is built.
- The navigation lists the pages of docs/algorithms by family, as the tables of docs/index.md do.
- The repository's address, which "Edit this page" needs, is `repository-code` in CITATION.cff.
"""

import ast
import csv
import posixpath
import re
import subprocess
from html import escape
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # files of the repository that are, or are part of, a page of their own
    "datasets/README.md": "datasets.md",
    "benchmark_results/results.md": "results.md",
    "benchmark_results/speed.md": "speed.md",
    "docs/algorithms": "algorithms/index.md",
}
PICTURES = (".png", ".svg", ".jpg", ".gif")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"<!-- include: (\S+?)(?: (\S+))? -->")
RESULTS = re.compile(r"<!-- results: (\w+) -->")
# Of curves, legible on white and on black.
COLOURS = ("#3f51b5", "#ef6c00", "#00897b", "#ad1457", "#6d4c41", "#0288d1")


def on_config(config):
    for entry in config.nav:
        if "Algorithms" in entry:
            entry["Algorithms"] = ["algorithms/index.md", *by_family()]
    config.repo_url = repository()
    if config.repo_url:
        config.repo_name = config.repo_url.split("/", 3)[3]
        config.edit_uri = "edit/main/docs/"
        config.theme["features"].append("content.action.edit")
    return config


def by_family() -> list:
    """The pages of docs/algorithms as the families' tables of docs/index.md list them."""
    _, _, tables = (ROOT / "docs/index.md").read_text().partition("<!-- files: begin -->\n")
    nav, missing = [], {path.stem for path in (ROOT / "docs/algorithms").glob("*.md")} - {"index"}
    for family in re.split(r"^### ", tables.partition("<!-- files: end -->")[0], flags=re.M)[1:]:
        found = dict.fromkeys(re.findall(r"\(algorithms/(\w+)\.md\)", family))
        nav.append({family.partition("\n")[0]: [f"algorithms/{name}.md" for name in found]})
        missing -= {*found}
    if missing:
        raise PluginError(f"docs/index.md has no row for algorithms/{sorted(missing)[0]}.md.")
    return nav


def repository() -> str | None:
    """The repository's address: CITATION.cff's, else that of git's origin if it is on the web."""
    found = re.search(r"^repository-code: *\"?(https://\S+?)\"?$", read("CITATION.cff"), re.M)
    if found:
        return found[1].removesuffix(".git")
    ask = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
    try:
        origin = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git
        return None
    found = re.fullmatch(r"(?:https://|ssh://git@|git@)([\w.-]+)[:/]([\w./-]+?)(?:\.git)?", origin)
    return f"https://{found[1]}/{found[2]}" if found else None


def read(path: str) -> str:
    return (ROOT / path).read_text() if (ROOT / path).exists() else ""


def on_files(files, config):
    """Adds a page for every file of the repository that a page of docs/ links to, and for those
    that a Markdown file among them links to."""
    pages, seen = [f"docs/{file.src_uri}" for file in files.documentation_pages()], set()
    for page in pages:  # grows on the way
        text = included((ROOT / page).read_text(), page)
        for _, target, _ in LINK.findall(CODE.sub("", text)):
            path = resolved(page, target)
            if path is None or path in PAGES or path in seen or not is_source(path):
                continue
            seen.add(path)
            files.append(copied(path, config))
            if path.endswith(".md"):
                pages.append(path)
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    if page.file.generated_by:
        path = here.removeprefix("source/")
        path = path if (ROOT / path).exists() else path.removesuffix(".md")
        page.edit_url = f"{config.repo_url}/edit/main/{path}" if config.repo_url else None
        return markdown
    # Words of the tags count for most in the search: the papers' titles find an algorithm.
    cited = re.findall(r"^ *title += \{(.+?)\},$", markdown.partition("## Cite\n")[2], re.M | re.S)
    page.meta["tags"] = [" ".join(re.sub(r"[{}]", "", title).split()) for title in cited]
    markdown = RESULTS.sub(lambda match: results(match[1]), markdown)
    return linked(markdown, f"docs/{here}", here)


def on_page_content(html, page, config, files):
    """Names, `--eval-every` and hopper-medium-replay, do not break at a hyphen or a slash: in the
    text, in cells of tables, and in code, which wraps on a narrow screen."""

    def kept(match):
        if match[0].startswith("<pre><code>"):
            return match[0]  # the listing of a file, which scrolls
        if match[0].startswith("<pre>"):
            return re.sub(r"(?<=>)[^<>]+", unbroken, match[0])
        return re.sub(r"(?<=>)[^<]+", unbroken, match[0])

    parts = r"<pre>.*?</pre>|<code>[^<]+</code>|<td>[\w.]+(?:-[\w.]+)+</td>"
    return re.sub(parts, kept, html, flags=re.DOTALL)


def unbroken(text) -> str:
    """Words of up to 40 characters as what site.css keeps on one line; longer ones may not fit."""

    def whole(word):
        return f'<span class="name">{word[0]}</span>' if len(word[0]) <= 40 else word[0]

    return re.sub(r"\S{2,}", whole, text[0])


def linked(markdown: str, page: str, here: str) -> str:
    """The text of a file of the repository, with the links that it needs as page `here`."""

    def rewrite(match):
        path = resolved(page, match[2])
        if path is None:
            return match[0]
        anchor = match[2].partition("#")[2]
        target = posixpath.relpath(uri(path), posixpath.dirname(here) or ".")
        return match[1] + target + (f"#{anchor}" if anchor else "") + match[3]

    parts = CODE.split(included(markdown, page))  # text and code by turns
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))


def resolved(page: str, target: str) -> str | None:
    """The path in the repository that a page's link leads to; none for other sites and anchors."""
    if re.match(r"[a-z]+:|#", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target.partition("#")[0]))
    if not (ROOT / path).exists():
        raise PluginError(f"{page} links to {target}, which does not exist.")
    return path


def is_source(path: str) -> bool:
    """Whether a file of the repository is none of the site's own pages and pictures."""
    return not path.startswith("docs/") or path.endswith(".py")


def uri(path: str) -> str:
    """Where on the site a file of the repository is shown."""
    if path in PAGES:
        return PAGES[path]
    if not is_source(path):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith((*PICTURES, ".md")) else f"source/{path}.md"


def copied(path: str, config) -> File:
    place = ROOT / path
    if path.endswith(PICTURES):
        return File.generated(config, uri(path), abs_src_path=str(place))
    head = (
        f"---\ntitle: {path}\nhide: [navigation]\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n"
    )
    if path.endswith(".md"):
        body, head = linked(place.read_text(), path, uri(path)), head.partition("# ")[0]
    elif place.is_dir():
        names = sorted(item.name + "/" * item.is_dir() for item in place.iterdir())
        body = "".join(f"- `{name}`\n" for name in names if not name.startswith((".", "__")))
    else:
        page = ROOT / "docs" / "algorithms" / f"{place.stem}.md"
        if path.startswith("algorithms/") and page.exists():
            head += f"[What this file is about](../../algorithms/{page.name}).\n\n"
        head += "*The whole file. On a narrow screen its lines scroll sideways.*\n\n"
        body = shown(place)
    return File.generated(config, uri(path), content=head + body)


def shown(path: Path) -> str:
    """A source file as highlighted HTML: sections under headings, an anchor at each function. The
    anchor is a `span`: the theme takes an `a` in a code block for a line number and moves it."""
    text, headings, anchors = path.read_text(), {}, {}
    if path.suffix == ".py":
        tree = ast.parse(text)
        for node in tree.body:
            for name, part in names(node):
                anchors[part.lineno - len(part.decorator_list)] = name
        for number, line in enumerate(text.splitlines(), 1):
            divider = re.fullmatch(r"# -{5,} (.+)", line)
            if divider:
                headings[number] = divider[1]
    try:
        lexer = get_lexer_for_filename(path.name, stripnl=False)
    except ClassNotFound:
        lexer = get_lexer_for_filename("a.txt", stripnl=False)
    lines = highlight(text, lexer, HtmlFormatter(nowrap=True)).splitlines()

    html, opened = [], False
    for number, line in enumerate(lines, 1):
        if number in headings or not opened:
            html.append("</code></pre></div>\n\n" if opened else "")
            html.append(f"## {headings[number]}\n\n" if number in headings else "")
            html.append('<div class="highlight source"><pre><code>')
            opened = True
        line = f'<span class="line" id="L{number}" data-n="{number}">{line}\n</span>'
        name = f'<span id="{escape(anchors[number])}">' if number in anchors else ""
        html.append(f"{name}{line}</span>" if name else line)
    return "".join(html) + "</code></pre></div>\n"


def results(name: str) -> str:
    """An algorithm's rows of the tables in benchmark_results and docs/results.md; its curves."""
    rows = []
    pages = read("benchmark_results/results.md") + read("benchmark_results/minutes/results.md")
    tables = re.findall(r"(?:^\|.*\n)+", pages, re.MULTILINE)
    for table in tables:
        head, *lines = [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()]
        if head[1:2] == ["algorithm"] and "minutes a run" in head:
            rows += [[head[0], *line] for line in lines if line[1] == name]
        if head[-1] == "CPU minutes":
            rows += [
                [f"{line[-2]} steps", *line[:-2], f"{line[-1]} CPU minutes"]
                for line in lines
                if line[1] == name
            ]
    text = ""
    if rows:
        text += "| after | data | seeds | final | best | minutes |\n|---|---|--:|--:|--:|--:|\n"
    for after, data, _, *numbers in rows:
        text += f"| {after} | {data} | {' | '.join(numbers)} |\n"
    text += quarter_hour(name) + curves(name)
    return text or "No run of this file is in `benchmark_results` yet.\n"


def quarter_hour(name: str) -> str:
    """What docs/results.md says of an algorithm in its table of a quarter of an hour."""
    text = read("docs/results.md").partition("<!-- quarter: begin -->")[2]
    text = text.partition("<!-- quarter: end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[1:]]
    for row in rows:
        if row[0] == name:
            there = [f"{score} on `{data}`" for data, score in zip(rows[0], row) if score][2:]
            span = "[15 minutes of one CPU thread](../results.md#a-quarter-of-an-hour)"
            return f"\nAfter {span}, or at the minute in brackets: {', '.join(there)}.\n"
    return ""


def curves(name: str) -> str:
    """The score at each evaluation of an algorithm's longest runs, as a drawing."""
    lines, folders = {}, []  # data set -> [[(step, score)]]
    for folder in ("runs", "quarter_hour"):
        found = {}
        paths = (ROOT / "benchmark_results" / folder / name).glob("*/seed*/eval.csv")
        for path in sorted(paths):
            rows = csv.DictReader(path.read_text().splitlines())
            points = [(float(row["step"]), float(row["score"])) for row in rows if row["score"]]
            if len(points) > 1 and path.parts[-3] not in lines:  # one point is no curve
                found.setdefault(path.parts[-3], []).append(points)
        folders += [f"<code>benchmark_results/{folder}/{name}</code>"] * bool(found)
        lines |= found
    return drawn(lines, " and ".join(folders)) if lines else ""


def drawn(lines: dict, where: str) -> str:
    points = [point for group in lines.values() for run in group for point in run]
    last, low = max(x for x, _ in points), min(0.0, *(y for _, y in points))
    high = max(100.0, *(y for _, y in points))
    width, top, tall = 480, 12 + 17 * len(lines), 190

    def at(x, y):
        return f"{44 + x / last * (width - 56):.1f},{top + (high - y) / (high - low) * tall:.1f}"

    svg = [f'<svg viewBox="0 0 {width} {top + tall + 40}" role="img" aria-label="learning curves">']
    for y in range(0, int(high) + 1, 25):
        left, right = at(0, y).split(","), at(last, y).split(",")
        svg.append(f'<path class="grid" d="M{left[0]} {left[1]}H{right[0]}"/>')
        svg.append(f'<text x="38" y="{float(left[1]) + 4:.1f}" text-anchor="end">{y}</text>')
    for k in range(5):
        x = at(last * k / 4, low).split(",")[0]
        end = ' text-anchor="end"' if k == 4 else ' text-anchor="middle"' if k else ""
        svg.append(f'<text x="{x}" y="{top + tall + 18}"{end}>{last * k / 4:,.0f}</text>')
    svg.append(f'<text x="{width / 2}" y="{top + tall + 36}" text-anchor="middle">steps</text>')
    for k, (dataset, group) in enumerate(sorted(lines.items())):
        colour = COLOURS[k % len(COLOURS)]
        svg.append(f'<path stroke="{colour}" stroke-width="3" d="M44 {9 + 17 * k}h18"/>')
        svg.append(f'<text x="68" y="{13 + 17 * k}">{dataset}</text>')
        svg += [
            f'<polyline stroke="{colour}" points="{" ".join(at(x, y) for x, y in run)}"/>'
            for run in group
        ]
    caption = f"Score at each evaluation, a line for each seed, from {where}."
    svg.append(f"</svg><figcaption>{caption}</figcaption>")
    return f'\n<figure class="curves">{"".join(svg)}</figure>\n'


def names(node, prefix=""):
    """Qualified names of the functions and classes in a syntax tree."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield prefix + node.name, node
        for child in node.body if isinstance(node, ast.ClassDef) else ():
            yield from names(child, f"{prefix}{node.name}.")


def included(text: str, page: str) -> str:
    """The text with its includes filled in, whose links then start from the page."""

    def fill(match):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[1]))
        if not (ROOT / path).exists():
            raise PluginError(f"{page} includes {match[1]}, which does not exist.")
        part = (ROOT / path).read_text()
        if match[2]:
            part = part.partition(f"<!-- {match[2]}: begin -->\n")[2]
            part = part.partition(f"<!-- {match[2]}: end -->")[0]
            if not part:
                raise PluginError(f"{page}: {match[1]} has no part '{match[2]}'.")

        def move(link):
            if re.match(r"[a-z]+:|#", link[2]):
                return link[0]
            place = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[2]))
            return link[1] + posixpath.relpath(place, posixpath.dirname(page)) + link[3]

        return LINK.sub(move, re.sub(r"\A# .*\n", "", part))

    return INCLUDE.sub(fill, text)
