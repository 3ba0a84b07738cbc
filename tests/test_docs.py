"""The pages say what is so: metrics, flags, commands and links exist, and examples run."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shared_blocks
import test_structure
import torch
import tyro
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
}
OTHERS_FLAGS = {"--help", "--strict", "--write", "--dist"}  # of tyro, mkdocs, tests, pytest

SECTIONS = ["In the file", "Usage", "Act with a trained policy", "What is logged", "Details"]
SECTIONS += ["Differences", "Results"]

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
    assert on_page - logged == set(), "explained, and never logged"


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
            known = args.dataset in (*maker.KNOWN, *maker.SHIPPED)
            others = re.search(r"-v\d+$|^data\.(npz|hdf5)$", args.dataset)
            assert known or others, args.dataset


# A training of a few steps has every part of a long one: batches, updates, evaluations, files.
SHORT = {"steps": 8, "eval_every": 4, "eval_episodes": 1, "device": "cpu", "model_steps": 3}
SHORT |= {"rollout_every": 4, "rollout_batch": 64}
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
        for key, value in (SHORT | (ONLINE if online else {})).items():
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
    """A folder with algorithms/weighted_bc.py, made from bc.py as docs/reading.md tells."""
    text = (ROOT / "algorithms" / "bc.py").read_text()
    docstring = next(block for block in blocks(READING, "python") if block.startswith('"""'))
    text = docstring + text[text.index('"""', 3) + 4 :]
    (changes,) = blocks(READING, "diff")
    for hunk in re.split(r"^@@.*\n", changes, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"not once in bc.py:\n{old}"
        text = text.replace(old, new)
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "algorithms", folder / "algorithms")
    (folder / "algorithms" / "weighted_bc.py").write_text(text)
    return folder


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
    test_structure.test_runs_alone(path, pendulum_file, tmp_path)
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
    examples = [code for code in blocks(READING, "python") if not code.startswith('"""')]
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


def test_the_site_builds(tmp_path):
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocs") is None:
        pytest.skip("docs/requirements.txt is not installed")
    run = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "A2PO.condition" in (tmp_path / "site/source/algorithms/a2po.py/index.html").read_text()


def test_every_file_has_a_page_and_a_place():
    for page in (DOCS / "index.md", DOCS / "map.md", ROOT / "README.md"):
        missing = [name for name in NAMES if f"{name}.md" not in page.read_text()]
        missing = [name for name in missing if f"algorithms/{name}.py" not in page.read_text()]
        assert missing == [], page.name
    pages = {page.stem for page in (DOCS / "algorithms").glob("*.md")}
    assert pages == set(NAMES)
