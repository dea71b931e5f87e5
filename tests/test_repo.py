# SPDX-License-Identifier: MIT
"""The repository as a whole: the pages against the code, flags, ids of decisions, imports, and budgets."""

import argparse
import ast
import dis
import importlib
import io
import itertools
import re
import shlex
import sys
import tokenize
import types

import pytest
from helpers import ROOT, defined, lifted, log_lines

import common
import resim
from common import ResNetTrunk

METHODS = ["setsim.py", "resim.py", "d3ssl.py"]
SCRIPTS = [*METHODS, "transfer_det.py", "transfer_seg.py"]
FOLDERS = "harness/*.py", "probes/*.py", "tools/*.py", "bench/*.py"
NAMES = [*SCRIPTS, "common.py", *(x.relative_to(ROOT).as_posix() for f in FOLDERS for x in sorted(ROOT.glob(f)))]
SOURCES = {name: (ROOT / name).read_text() for name in NAMES}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, DOCS = PAGES["README.md"], "\n".join(PAGES.values())


def module(name):
    return importlib.import_module(name.removesuffix(".py").replace("/", "."))


def tables(text):
    """(header, rows) of each table, lists of cells as GitHub splits them: '\\|' does not end a cell."""
    for block in re.findall(r"(?:^ *\| .*\n)+", text + "\n", re.M):
        lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        header, _, *rows = [[cell.strip().replace(r"\|", "|") for cell in line] for line in lines]
        yield header, rows


@pytest.mark.parametrize("name", PAGES)
def test_tables_and_links_are_whole(name):
    """Rows have as many cells as their header. A link leads to a file, and to a heading of it by GitHub's rule."""
    for header, rows in tables(PAGES[name]):
        assert not [row for row in rows if len(row) != len(header)]
    for file, anchor in re.findall(r"\]\((?!http)([^)\s#]*)#?([^)\s]*)\)", PAGES[name]):
        path = ((ROOT if name == "README.md" else ROOT / "docs") / file).resolve() if file else ROOT / name
        headings = re.findall(r"^#+ (.*)$", PAGES[path.name], re.M) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert (not file or path.exists()) and (not anchor or anchor in anchors), f"{file}#{anchor}"


def expand(text):
    """A command with alternatives, '--flag A | B', as a list of commands, lists of words."""
    choices = []
    for part in re.split(r" (?=--)", text):
        first, *more = part.split(" | ")
        choices.append([shlex.split(x) for x in (first, *(f"{first.split()[0]} {other}" for other in more))])
    return [sum(words, []) for words in itertools.product(*choices)]


def commands():
    """Every command of a script in the pages, in code blocks and in lines: (what stands before, "setsim.py", its flags)."""
    texts = re.findall(r"```bash\n(.*?)```", DOCS, re.S) + re.findall(r"`([^`\n]*\.py [^`\n]*)`", DOCS)
    for line in re.split(r"\n|&&", "\n".join(texts).replace(r"\|", "|")):
        match = re.match(rf"(.*?)\b({'|'.join(SCRIPTS)})(?!\w)(.*)", line)
        yield from ((match[1].strip(), match[2], flags) for flags in expand(match[3].strip())) if match else ()


def test_every_command_of_the_pages_parses(monkeypatch):
    """Of scripts, and of modules that have get_args."""
    trained, parsed = {"args": {"task": "scenes"}, "settings": {}}, set()
    monkeypatch.setattr("harness.finetune.load_run", lambda folder, name: trained)
    for _, script, flags in commands():
        given = {"--data", "--demo", "--images", "--predict", "--eval-only"} & {*flags}
        module(script).get_args(flags + ([] if given else ["--data", "/data"]))  # the maps leave it out
    for name, words in re.findall(r"-m ((?:probes|tools|bench|harness)\.\w+)([^`\n]*)", DOCS):
        assert f"{name.replace('.', '/')}.py" in SOURCES, name
        if hasattr(module(name), "get_args") and words.strip() and "--help" not in words:
            module(name).get_args(shlex.split(words))
            parsed.add(name)
    tools = "proposals openimages_mini to_detectron2 figures scenes"
    assert parsed == {*(f"tools.{x}" for x in tools.split()), *(f"probes.{x}" for x in "linear oknn bias".split())}
    assert len([*commands()]) > 150


KINDS = {}  # of the commands of methods in code blocks that differ in sizes and folders alone, the first
for before, script, flags in commands():
    if script in METHODS and re.search("python|torchrun", before):
        ignored = r" --(data|proposals|output-dir|epochs|batch-size|lr|queue-size|seed) \S+"
        KINDS.setdefault(re.sub(ignored, "", " ".join([script, *flags])), flags)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_commands_of_the_pages_run(kind, photos, tiny_resnet, quick, tmp_path, monkeypatch):
    """For two steps, small: on a few scenes, or on a folder in place of the one that a test has not."""
    (script, *_), given = kind.split(), {"--data": photos / "images", "--proposals": photos / "boxes"}
    flags = [str(given.get(before, word)) for before, word in zip(["", *KINDS[kind]], KINDS[kind], strict=False)]
    flags += "--arch resnet18 --size 64 --batch-size 6 --workers 0 --steps 2 --output-dir".split() + [str(tmp_path)]
    weights = ResNetTrunk("resnet18").state_dict()
    monkeypatch.setattr("harness.weights.load_backbone", lambda source, arch: (weights, f"{source}"))  # offline
    monkeypatch.setattr("harness.run.MEASURED_IN_DEMO", 32)
    module(script).train(flags + ["--data", "scenes:16"] * ("--demo" in flags))
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [2] and lines[-1]["probe"]["hits"] >= 0
    assert (tmp_path / ("matches_end.png" if script == "setsim.py" else "regions_end.png")).exists()


def test_python_of_the_pages_runs(tmp_path, monkeypatch):
    """Every Python block, where runs of ReSim and SetSim have left their weights; README's load into torchvision."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.run.Run.measure", lambda *args: None)
    resim.train(
        "--data scenes:4 --size 64 --batch-size 4 --steps 0 --queue-size 8 --workers 0 --preset official".split()
    )
    (tmp_path / "runs" / "setsim").symlink_to(tmp_path / "runs" / "resim")
    printed = []
    for block in re.findall(r"```python\n(.*?)```", DOCS, re.S):
        exec(block, {"print": printed.append})
    assert printed[0].missing_keys == ["fc.weight", "fc.bias"] and len(printed[1].missing_keys) == 6
    assert printed[0].unexpected_keys == printed[1].unexpected_keys == []


def test_first_command_is_the_demo_and_the_gate_finds_the_tests():
    demo = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && .venv/bin/python setsim.py --demo"
    assert README.split("```bash\n")[1].startswith(f"{demo}\n```")
    pattern = re.search(r"sed -n 's/\^\\\((.*)\\\)\$/", (ROOT / ".ci" / "run").read_text())[1]
    assert len(re.findall(f"^{pattern}$", README, re.M)) == 1
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


COUNTS = {
    "setsim": {"Table 1": 4, "Table 2": 9, "Table 3": 5, "Table 4": 5, "Table 5": 11, "Table 6": 8, "Table 7": 8, "Table 8": 8,
               "Table 9": 7, "A.2": 2, **{f"Figure {n}": 1 for n in range(3, 10)}, "Figures 1 and 2": 1},
    "resim": {"Table 1": 4, "Table 2": 4, "Table 3a": 5, "Table 3b": 5, "Section 4.1": 1, "Table 4": 14, "Section 4.2": 2, "Table 5": 9,
              "Table 6, DensePose": 5, "Table 6, Cityscapes": 5, "Table 7": 1, "A.2": 2, "Figures 1 and 2": 1, "Figure 3": 1,
              "Figure 4": 1},
    "d3ssl": {"Table 1": 9, "Table 2": 1, "Table 3": 6, "Table 4": 5, "Table 5": 6, "Table 6": 2, "Table 7": 2,
              "Figures 1, 2 and 5": 1, "Figure 3": 1, "Figure 4": 1},
}  # fmt: skip
FLAGS = {  # a pattern of titles: the flags of their commands, one after the other where a row is folded
    "setsim": {
        "": ["--data /imagenet"], "Table [123],": ["--epochs 100"], "SimSiam|Table 2": ["--framework simsiam"],
        ", (MoCo-v2|SimSiam)$": ["--loss-weight 0"], "Geo$": ["--matcher geometry"],
        r"Set \+ Geo|, SetSim$|Figure": ["--geometry 0.5 --matcher set2set-nn"], r"Sym$|, SetSim$|Figure": ["--symmetric"],
        "Delta": [f"--set {n}%" for n in range(10, 100, 10)],
        "Random, Sort": [f"--matcher {x}" for x in "random sort hungarian set2set set2set-nn".split()],
    },
    "resim": {
        "": ["--data /imagenet"], "Table [123]|Section 4.1": ["--data /in100 --epochs 500"],
        "Table [13]|Section 4.1|Table 2, MoCo": ["--queue-size 16384"], "SimSiam": ["--framework simsiam"],
        ", (MoCo-v2|SimSiam)$": ["--loss-weight 0"], "ReSim-C4$|W16|RoI Align": ["--levels c4"],
        "ReSim-C4, ReSim-FPN$": ["--levels c4", "--levels fpn"], "RoI Align": ["--pool roi_align"],
        "W16": [f"--window {x}" for x in ("16 16", "48 16", "48 32", "64 48")], r"FPN\^T": ["--preset official"],
        "400 ep": ["--epochs 200", "--epochs 400"],
    },
    "d3ssl": {
        "Table [157]": ["--data /coco/train2017"], "Table [346]": ["--data /openimage-mini"],
        "MoCo v2$|ReSim$": ["--epochs 800 --lr 0.3"], "MoCo v2$": ["--loss-weight 0"],
        "Table [157].*(?<!v2)(?<!ReSim)$": ["--proposals coco.proposals"],
        "Table [346].*(?<!v2)(?<!ReSim)$": ["--proposals oim.proposals"], "SoCo": ["--framework soco"],
        "Table [567]": ["--epochs 200"], "Table 5|without": ["--no-depositioning"], "no augmentation": ["--augment"],
        "random cutout": [f"--augment {x}" for x in ("soco-cutout", "prc soco-jitter", "prc", "prc rbj", "prc rbj prm")],
        "D3SSL's": ["--augment soco-cutout", "--augment prc prm rbj"],
    },
}  # fmt: skip


@pytest.mark.parametrize("method", COUNTS)
def test_the_map_has_every_row_of_the_paper_with_its_flags(method):
    """A folded row has a result for each of its commands or files. All settings are compared."""
    text, counted = PAGES[f"{method}.md"], dict.fromkeys(COUNTS[method], 0)
    for title, command, _, printed in (row for header, rows in tables(text) if header[0] == "row" for row in rows):
        found, results = re.findall(r"`(\w+\.py --[^`]*)`", command), printed.split(";")
        counted[max((start for start in counted if re.match(rf"{re.escape(start)}\b", title)), key=len)] += len(results)
        folded = re.search(r"W = `([^`]*)`", command)
        if found:
            script = method if not title.endswith(", ReSim") else "resim"
            script = "setsim" if re.search(", (MoCo.v2|SimSiam)$", title) else script
            flags = [some for pattern, some in FLAGS[method].items() if re.search(pattern, title)]
            wanted = [module(script).get_args(" ".join(words).split()) for words in itertools.product(*flags)]
            got = [module(script).get_args(words[1:]) for words in expand(found[0])]
            assert got == wanted and len(wanted) == len(results), title
            assert found[0].startswith(f"{script}.py ")
        elif folded or (command == "-" and ": " in title):
            names = folded[1].split("|") if folded else title.split(": ")[1].split(", ")
            assert len(names) == len(results), title
    in100 = re.findall(r"\bn\d{8}\b", text)
    assert len(in100) == len({*in100}) == 100 * (method == "resim")
    assert counted == COUNTS[method] and re.search(r"not run|None of these rows was run", text)


# ---- pieces to copy


def pieces():
    """(file, names of pieces, names that they take along, how one is used or "") of every row of the lists of pieces."""
    for header, rows in tables(DOCS):
        for row in rows if header[0].startswith("piece") else ():
            file = (re.search(r"`([^`]*\.py)`", header[0]) or re.search(r"`([^`]*\.py)`", row[1]))[1]
            needs = row[header.index("needs" if "needs" in header else "take along")]
            names, needed = ({*re.findall(r"`(?:\w+\.)*(\w+)`", cell)} for cell in (row[0], needs))
            if "constants of the file" in needs:
                needed |= {name for name in own_names(file) if name.isupper()}
            yield file, names, needed, row[-1].strip("`") if "use" in header else ""


def own_names(name):
    """What a file defines or takes from our other files, as opposed to what libraries give it."""
    found = {"common", "harness"}
    for node in TREES[name].body:
        ours = isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in found
        found |= {alias.name for alias in node.names} if ours else defined(node) - {None}
    return found


def globals_of(name, piece):
    """The names that a top-level definition reads from its file."""
    nodes = [node for node in TREES[name].body if getattr(node, "name", None) == piece]
    codes, found = [compile(ast.Module(nodes, []), name, "exec")], set()
    for code in codes:
        found |= {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found


def test_pieces_of_the_pages_work_with_what_they_need_alone():
    rows = list(pieces())
    assert len(rows) > 45
    for file, names, needed, use in rows:
        alone = file in (*METHODS, "common.py")
        for piece in names | needed if alone else names:
            missing = globals_of(file, piece) & own_names(file) - names - needed
            assert not missing, f"{piece} of {file} needs {missing}"
        if alone:
            lifted(file, *names, *needed)  # executes them with libraries alone
        assert names <= own_names(file) and (not use or any(piece in use for piece in names) and ast.parse(use))


# ---- decisions and equations

ID = r"[SRDBFG]\d+"


def decisions():
    """[(id, last cell)] of every row of a table of decisions."""
    return [(row[0], row[-1]) for _, rows in tables(DOCS) for row in rows if re.fullmatch(ID, row[0])]


def mentioned(source):
    """The ids in comments and strings: (S9), (S4, S5), (section 4.1, S17), (DEVIATION: B7), DEVIATION: S9 in a sentence."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            parts = [
                part for inside in re.findall(r"\(([^()]*)\)", token.string) for part in re.split(r"[\s,;:]+", inside)
            ]
            found |= {part for part in parts if re.fullmatch(ID, part)}
            for ids in re.findall(rf"\b(?:OFFICIAL|DEVIATION|AMBIGUOUS): ({ID}(?:, {ID})*)", token.string):
                found |= {*ids.split(", ")}
    return found


def test_code_and_tables_name_the_same_decisions():
    text = '# as SimSiam (B16)\nx = "DEVIATION: S9, mean (S4, S5). (section 4.1, S17) F(S1) S2"  # (DEVIATION: B7)\nf(R5)\n'
    assert mentioned(text) == {"B16", "S9", "S4", "S5", "S17", "B7", "S1"}
    rows, named = decisions(), set().union(*map(mentioned, SOURCES.values()))
    ids = [name for name, _ in rows]
    assert len(ids) == len({*ids}) == int(re.search(r"\[(\d+) decisions\]", README)[1])
    assert named <= {*ids}, f"no row: {sorted(named - {*ids})}"
    missing = {name for name, last in rows if "no mention" not in last} - named
    assert not missing, f"not in the code: {sorted(missing)}"


@pytest.mark.parametrize("script, equations", [("setsim.py", 9), ("resim.py", 5), ("d3ssl.py", 10)])
def test_every_equation_of_the_paper_has_its_tag(script, equations):
    found = set()
    for text in re.findall(r"PAPER:([^\n]*)", SOURCES[script]):
        for numbers in re.findall(r"Eqs?\. ((?:[\d, -]|and |to )+)", text):
            found |= {int(n) for n in re.findall(r"\d+", numbers)}
            for first, last in re.findall(r"(\d+)(?:-| to )(\d+)", numbers):
                found |= {*range(int(first), int(last) + 1)}
    assert {*range(1, equations + 1)} <= found


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_few_have_help_and_are_read(script, monkeypatch):
    """14 flags that all methods have, at most 11 of a method's own. Each is read after parsing, not only in checks."""
    seen, shared, original = [], argparse.ArgumentParser(), argparse.ArgumentParser.parse_args
    common.run_flags(shared, "x")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: seen.append(self) or original(self, *a))
    module(script).get_args(["--demo"])
    flags = {action.dest: action for action in seen[0]._actions if action.dest != "help"}
    own = flags.keys() - {action.dest for action in shared._actions}
    assert len(flags) - len(own) == 14 and len(own) <= 11 if script in METHODS else len(flags) <= 30
    files = [script, "common.py", "harness/run.py", *["harness/finetune.py"] * (script not in METHODS)]
    nodes = [(file, node) for file in files for node in TREES[file].body]
    ignored = "get_args", "check_args", "presets", "run_flags"
    nodes = [pair for pair in nodes if getattr(pair[1], "name", None) not in ignored]
    read = "\n".join(ast.get_source_segment(SOURCES[file], node) for file, node in nodes)
    for name, action in flags.items():
        assert len(action.help or "") > 8 and re.search(rf"\bargs\.{name}\b", read), name


# ---- structure


def layer(name):
    """common <- harness <- the five scripts <- probes, tools, bench"""
    return 0 if name == "common.py" else 1 if name.startswith("harness/") else 2 if name in SCRIPTS else 3


def imported(nodes):
    """The names of modules that import statements open, or may open: `from harness import run` opens harness.run."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            yield from names if isinstance(node, ast.Import) else [node.module, *(f"{node.module}.{x}" for x in names)]


CARD = {"torch", "torchvision", "numpy", "scipy", "PIL", "pycocotools", "common", "harness", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_one_way(name):
    """Scripts never import one another; nothing below imports probes, tools or bench. What pictures, progress and
    proposals need besides the card's packages is imported where it is used.
    """
    for opened in imported(ast.walk(TREES[name])):
        file = f"{opened.replace('.', '/')}.py"
        below = file not in SOURCES or layer(file) < layer(name) or layer(file) == layer(name) in (1, 3)
        assert below, f"{name} imports {file}"
    assert layer(name) == 3 or {opened.split(".")[0] for opened in imported(TREES[name].body)} <= CARD


BUDGETS = {  # lines of all files of a pattern together
    **dict.fromkeys(METHODS, 570), "common.py": 290, "README.md": 300, "transfer_det.py": 1180, "transfer_seg.py": 760,
    "harness/*.py": 2600, "probes/*.py": 850, "tools/*.py": 850, "bench/*.py": 260, "tests/**/*.py": 7700,
}  # fmt: skip


@pytest.mark.parametrize("pattern", BUDGETS)
def test_files_stay_within_their_budget(pattern):
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob(pattern) if path.name != "faults.py"}
    assert 0 < sum(lines.values()) <= BUDGETS[pattern], lines


@pytest.mark.parametrize("name", [*SCRIPTS, "common.py"])
def test_functions_and_code_are_short(name):
    """Without docstrings: 40 lines a function, 50 in the transfer scripts; 330 lines of code in a method."""
    nodes, most = [*ast.walk(TREES[name])], 50 if "transfer" in name else 40
    documented = [
        x for x in nodes if isinstance(x, (ast.Module, ast.ClassDef, ast.FunctionDef)) if ast.get_docstring(x)
    ]
    left_out = {n for x in documented for n in range(x.body[0].lineno, x.body[0].end_lineno + 1)}
    for node in (x for x in nodes if isinstance(x, ast.FunctionDef)):
        length = len({*range(node.lineno, node.end_lineno + 1)} - left_out)
        assert length <= most, f"{node.name}: {length}"
    code = [n for n, line in enumerate(SOURCES[name].splitlines(), 1) if line.strip() and line.strip()[0] != "#"]
    assert name not in METHODS or len({*code} - left_out) <= 330


def test_common_holds_no_method():
    """What common.py defines is used elsewhere, and no loss, matcher or augmentation is among it."""
    names = [node.name for node in TREES["common.py"].body if hasattr(node, "name")]
    everything = "\n".join(SOURCES.values())
    assert not [name for name in names if re.search(r"loss|match|view|augment|attention", name)]
    assert not [name for name in names if len(re.findall(rf"\b{name}\b", everything)) < 2]


@pytest.mark.parametrize("name", SOURCES)
def test_remarks_are_in_order(name):
    """Public definitions have docstrings. A word for a decision is followed by its id. Shape comments have letters."""
    kinds, exempt = (ast.FunctionDef, ast.ClassDef), {"get_args", "main", "train", "job", "disk_full_line"}
    for node in TREES[name].body if not name.startswith("bench/") else ():
        if isinstance(node, kinds) and not node.name.startswith("_") and node.name not in exempt:
            assert ast.get_docstring(node), node.name
    for kind, rest in re.findall(r"\b(OFFICIAL|DEVIATION|AMBIGUOUS): ?(?=(.{0,40}))", SOURCES[name]):
        assert re.match(ID, rest), f"{kind}: {rest}"
    for shape in re.findall(r"#\s+\(([^)\n]*)\)", SOURCES[name]):
        assert not re.search(r"\b(49|128|2048|65536|256)\b", shape), shape
