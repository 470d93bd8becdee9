"""The house: which rooms there are, which way imports run, how large and how wide files may be."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train.py", "evaluate.py", "sample.py", "hypotheses.py", "lift.py", "prepare_data.py",
           "pack.py", "ablate.py"}
MODULES = {"generation.py", "hipart.py", "baselines.py", "distributed.py", "survival.py",
           "checkpoints.py", "training_loop.py", "curves.py", "tables.py", "studies.py"}
FOLDERS = {"kernels", "sources", "tests", "benchmarks", "docs", "results", "examples", "weights"}
MADE = {"data", "runs"}  # by the scripts; git ignores them
# A room may import from those that stand before it.
ORDER = ("kernels", "distributed", "generation", "hipart", "baselines", "sources", "survival",
         "checkpoints", "training_loop", "train", "curves", "tables", "evaluate", "sample",
         "hypotheses", "lift", "pack", "studies", "ablate")  # fmt: skip
MAY_IMPORT = {room: set(ORDER[:i]) for i, room in enumerate(ORDER)} | {
    "sources": {"hipart", "kernels", "distributed"},
    "prepare_data": {"hipart", "sources", "survival"},
}
# Imports that may fail or wait: Anny is never installed, PyTorch's builder of extensions looks for
# compilers as soon as it is imported, and Windows has no fcntl.
LATE = {("sources/bodies.py", "anny"), ("kernels/__init__.py", "torch.utils"),
        ("kernels/__init__.py", "fcntl"), ("survival.py", "fcntl")}  # fmt: skip
MOST_LINES = {
    "distributed.py": 130, "generation.py": 122, "hipart.py": 920, "baselines.py": 428,
    "survival.py": 180, "checkpoints.py": 250, "training_loop.py": 240, "train.py": 711,
    "curves.py": 90, "tables.py": 390, "evaluate.py": 670, "sample.py": 570, "lift.py": 365,
    "prepare_data.py": 347,
    "hypotheses.py": 320, "studies.py": 186, "ablate.py": 395,
    "kernels/quantizer.cu": 260, "kernels/quantizer.cpp": 400, "kernels/quantizer_cuda.cpp": 100,
    "tests/cuda_emulator.h": 150,
}  # fmt: skip


def project_files():
    """What belongs to the project: what git tracks, or without git all that no script has made."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [p for p in (ROOT / name for name in listed.stdout.splitlines()) if p.is_file()]
    skipped = MADE | {".git", ".venv", "venv", "__pycache__"}
    found = (p for p in ROOT.rglob("*") if p.is_file())
    return [p for p in found if not skipped & set(p.relative_to(ROOT).parts)]


FILES = project_files()


def files(*endings):
    return sorted(p for p in FILES if p.name.endswith(endings))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


SOURCES = [p for p in files(".py") if p.parent.name in ("kernels", "sources") or p.parent == ROOT]


def imports(path, everywhere=False):
    """The modules that a file imports: at its top, or everywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from . import reference` in a package, and `from sources import smpl`, name modules
            own = node.module in (None, *FOLDERS)
            base = node.module or path.parent.name
            yield from (f"{base}.{alias.name}" for alias in node.names) if own else (node.module,)


def test_the_top_level_is_what_a_user_types_and_the_model():
    assert {p.name for p in files(".py") if p.parent == ROOT} == SCRIPTS | MODULES
    folders = {p.relative_to(ROOT).parts[0] for p in FILES if p.parent != ROOT}
    assert {name for name in folders if not name.startswith(".")} == FOLDERS
    assert "utils.py" not in {p.name for p in FILES}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_one_way(path):
    room = path.stem if path.parent == ROOT else path.parent.name
    rooms = {name.split(".")[0] for name in imports(path, everywhere=True)}
    ours = rooms & {*ORDER, "prepare_data"} - {room}
    assert ours <= MAY_IMPORT[room], f"{name_of(path)} imports {ours - MAY_IMPORT[room]}"


def test_no_module_imports_itself_through_others():
    graph = {}
    for path in SOURCES:
        module = name_of(path).removesuffix(".py").replace("/", ".")
        graph[module.removesuffix(".__init__")] = set(imports(path, everywhere=True))
    while free := [name for name, needs in graph.items() if not needs & graph.keys() - {name}]:
        for name in free:
            del graph[name]
    assert not graph, f"these import one another: {sorted(graph)}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_import_hides_in_a_function(path):
    late = sorted(set(imports(path, everywhere=True)) - set(imports(path)))
    assert [name for name in late if (name_of(path), name) not in LATE] == []


def test_no_line_of_code_is_wider_than_100_columns():
    wide = [f"{name_of(path)}:{i}" for path in files(".py", ".cpp", ".cu", ".h")
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100]  # fmt: skip
    assert wide == []


@pytest.mark.parametrize("name", MOST_LINES)
def test_files_stay_readable(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MOST_LINES[name]


def test_the_readme_can_be_read():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 12_000


PAGES = files(".md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    dead = []
    for link in (x for x in links if "://" not in x):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def anchors(page):
    """The anchors that headings get on GitHub."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_commands_of_the_pages_exist():
    """Every `python X.py --option` of the pages names a script and an option that there are."""
    options = {a for action in train.arguments()._actions for a in action.option_strings}
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = re.findall(r"python ((?:benchmarks/|examples/)?\w+\.py)([^`#&\n|)]*)", text)
    assert len(commands) > 10
    for script, rest in commands:
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"--[\w-]+", rest):
            known = option in options if script == "train.py" else f'"{option}"' in source
            assert known, f"{script} has no option {option}"
