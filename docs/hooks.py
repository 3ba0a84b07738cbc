"""What the site needs beyond MkDocs itself. The pages under docs/ are plain Markdown whose links
work on GitHub; here they come to work on the site too.

- A link out of docs/ to a file of the repository leads to a page of the site that shows the file:
  source code with its sections as headings, and with an anchor for each function, which is how
  `../../algorithms/a2po.py#A2PO.condition` jumps to that method (GitHub opens the file). A folder
  is shown as a list of its files, a picture is copied.
- `<!-- include: ../path/to/file.md -->` is replaced by that file, or by the part of it between
  `<!-- name: begin -->` and `<!-- name: end -->` with `<!-- include: ../path/to/file.md name -->`.
- The navigation lists every page of docs/algorithms.
"""

import ast
import posixpath
import re
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
    "docs/algorithms": "map.md",
}
PICTURES = (".png", ".svg", ".jpg", ".gif")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"<!-- include: (\S+?)(?: (\S+))? -->")


def on_config(config):
    pages = sorted(path.name for path in (ROOT / "docs" / "algorithms").glob("*.md"))
    for entry in config.nav:
        if "Algorithms" in entry:
            entry["Algorithms"] = [f"algorithms/{name}" for name in pages]
    return config


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
    return markdown if page.file.generated_by else linked(markdown, f"docs/{here}", here)


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
        body = shown(place)
    return File.generated(config, uri(path), content=head + body)


def shown(path: Path) -> str:
    """A source file as highlighted HTML: sections under headings, an anchor at each function."""
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
        anchor = f'<a id="{escape(anchors[number])}"></a>' if number in anchors else ""
        html.append(f'{anchor}<span class="line" id="L{number}" data-n="{number}">{line}\n</span>')
    return "".join(html) + "</code></pre></div>\n"


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
