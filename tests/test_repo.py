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
from helpers import ROOT, keep_signals, log_lines, run, write_images  # noqa: F401

import common
import harness.images
import harness.proposals
import harness.scenes
import resim
from common import ResNetTrunk, UserError

METHODS = ["setsim.py", "resim.py", "d3ssl.py"]
TRANSFERS = ["transfer_det.py", "transfer_seg.py"]
FOLDERS = ["harness", "probes", "tools", "bench"]
NAMES = [
    *METHODS,
    *TRANSFERS,
    "common.py",
    *sorted(f"{f}/{path.name}" for f in FOLDERS for path in (ROOT / f).glob("*.py")),
]
SOURCES = {name: (ROOT / name).read_text() for name in NAMES}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, DOCS = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
PICTURES = {"setsim.py": "matches_end.png", "resim.py": "regions_end.png", "d3ssl.py": "regions_end.png"}


def module(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def get_args(script, words):
    """The settings of a command line. Fails for an unknown flag or a setting that makes no sense."""
    try:
        return module(script).get_args(words)
    except (SystemExit, UserError) as error:
        raise AssertionError(f"{script} {' '.join(words)}: {error}") from error


# ---- the pages: tables and links


def tables(text):
    """Each table of a page as a list of rows, each row a list of cells, as GitHub splits them: '\\|' does not end a cell."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("| "):
            cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
            rows.append([cell.strip().replace(r"\|", "|") for cell in cells])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_row_of_a_table_has_as_many_cells_as_its_header(path):
    """An unescaped | inside backticks would cut a cell in two."""
    for header, *rows in tables(PAGES[path]):
        for row in rows:
            assert len(row) == len(header), f"{path.name}: {row}"


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[path]):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", PAGES[file], re.M)
            assert anchor in map(slug, headings), f"{path.name}: {target}"


# ---- the pages: commands


def expand(text):
    """A command with alternatives as a list of commands, lists of words: '--flag A | B' and 'x{A,B}y' have two each."""
    words, choices = shlex.split(text), []
    while words:
        length = next((i for i, word in enumerate(words[1:], 1) if word.startswith("--")), len(words))
        part, words = words[:length], words[length:]
        places = [-1, *(i for i, word in enumerate(part) if word == "|"), len(part)]
        alternatives = [part[a + 1 : b] for a, b in itertools.pairwise(places)]
        if len(alternatives) > 1:  # the flag stands before all of them
            alternatives = [part[:1] + alternative[not i :] for i, alternative in enumerate(alternatives)]
        choices.append(
            [words for alternative in alternatives for words in itertools.product(*map(braces, alternative))]
        )
    return [list(itertools.chain(*combination)) for combination in itertools.product(*choices)]


def braces(word):
    """'{10,20}%' -> ['10%', '20%']"""
    match = re.fullmatch(r"(.*)\{([^{}]+,[^{}]*)\}(.*)", word)
    return [match[1] + part + match[3] for part in match[2].split(",")] if match else [word]


def test_alternatives_are_expanded():
    assert expand("a.py --x 1 --set 10% | 20% --y") == [
        ["a.py", *f"--x 1 --set {n} --y".split()] for n in ("10%", "20%")
    ]
    assert expand("a.py --w 16 16 | 48 16") == [["a.py", "--w", "16", "16"], ["a.py", "--w", "48", "16"]]
    assert expand("a.py --set {10,20}%") == [["a.py", "--set", "10%"], ["a.py", "--set", "20%"]]
    assert expand("a.py --augment | prc rbj --z") == [
        ["a.py", "--augment", "--z"],
        ["a.py", *"--augment prc rbj --z".split()],
    ]
    assert expand("a.py b --c") == [["a.py", "b", "--c"]]


def commands():
    """Every command of a script in the pages, in code blocks and in lines, as (the text, a list of words)."""
    found = []
    for text in re.findall(r"```bash\n(.*?)```", DOCS, re.S) + re.findall(r"`([^`\n]*\.py [^`\n]*)`", DOCS):
        for line in text.replace(r"\|", "|").strip().splitlines():
            for part in line.split("&&"):
                if re.search(r"\b(setsim|resim|d3ssl|transfer_det|transfer_seg)\.py\b", part):
                    found += [(part, words) for words in expand(part)]
    return found


def script_and_flags(words):
    """("setsim.py", [...]) of a command."""
    place = next(i for i, word in enumerate(words) if word.endswith((*METHODS, *TRANSFERS)))
    return words[place].split("/")[-1], words[place + 1 :]


def test_every_command_of_the_pages_parses(monkeypatch):
    assert len(commands()) > 150
    for script in TRANSFERS:
        monkeypatch.setattr(module(script), "remembered", lambda args, given: {"task": "scenes"})
    for _, words in commands():
        script, flags = script_and_flags(words)
        if not {"--data", "--demo", "--images", "--predict"} & set(flags):
            flags += ["--data", "/data"]  # the maps leave it out
        get_args(script, flags)


MODULES = "tools.proposals tools.openimages_mini tools.to_detectron2 tools.figures probes.linear probes.oknn probes.bias".split()


@pytest.mark.parametrize("name", MODULES)
def test_every_command_of_a_module_parses(name):
    found = {words for words in re.findall(rf"-m {re.escape(name)} ([^`\n]*)", DOCS) if "--help" not in words}
    assert found
    for words in found:
        get_args(name, shlex.split(words))


def test_modules_of_the_pages_exist():
    names = set(re.findall(r"-m ((?:probes|tools|bench|harness)\.\w+)", DOCS))
    assert names > set(MODULES) and "harness.scenes" in names
    for name in names:
        assert f"{name.replace('.', '/')}.py" in SOURCES, name


def test_commands_of_scenes_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sorted(set(re.findall(r"-m harness\.scenes ([^`\n]*)", DOCS)))
    assert len(found) >= 2
    for words in found:
        assert not harness.scenes.main(shlex.split(words))
    assert (tmp_path / "scenes.png").exists()


# ---- the maps from the papers' tables to commands


def page(method):
    return PAGES.get(ROOT / "docs" / f"{method.lower()}.md", "")


def mapped(method):
    """Each row of a method's map: title, results printed in the paper, settings of its commands, the commands' script."""
    for header, *rows in tables(page(method)):
        for title, command, _, printed in rows if header[0] == "row" else ():
            texts = re.findall(r"`((?:setsim|resim|d3ssl)\.py --[^`]*)`", command)
            assert len(texts) <= 1, title
            words = expand(texts[0]) if texts else []
            results = [part.strip() for part in printed.split(";")] if printed else []
            yield title, command, results, [get_args(w[0], w[1:]) for w in words], words[0][0] if words else None


ROWS = {
    "SetSim": {"Table 1": 4, "Table 2": 9, "Table 3": 5, "Table 4": 5, "Table 5": 11, "Table 6": 8, "Table 7": 8, "Table 8": 8,
               "Table 9": 7, "A.2": 2, **{f"Figure {n}": 1 for n in range(3, 10)}, "Figures 1 and 2": 1},
    "ReSim": {"Table 1": 4, "Table 2": 4, "Table 3a": 5, "Table 3b": 5, "Section 4.1": 1, "Table 4": 14, "Section 4.2": 2, "Table 5": 9,
              "Table 6, DensePose": 5, "Table 6, Cityscapes": 5, "Table 7": 1, "A.2": 2, "Figures 1 and 2": 1, "Figure 3": 1,
              "Figure 4": 1},
    "D3SSL": {"Table 1": 9, "Table 2": 1, "Table 3": 6, "Table 4": 5, "Table 5": 6, "Table 6": 2, "Table 7": 2,
              "Figures 1, 2 and 5": 1, "Figure 3": 1, "Figure 4": 1},
}  # fmt: skip


@pytest.mark.parametrize("method", ROWS)
def test_the_map_has_every_row_of_the_paper(method):
    """A folded row counts as many times as it has results."""
    rows = list(mapped(method))
    for start, count in ROWS[method].items():
        own = [max(len(row[2]), 1) for row in rows if re.match(rf"{re.escape(start)}\b", row[0])]
        assert sum(own) == count, start
    assert re.search(r"not run|None of these rows was run", page(method))


@pytest.mark.parametrize("method", ROWS)
def test_a_folded_row_has_a_result_for_each_of_its_commands(method):
    for title, command, results, settings, _ in mapped(method):
        if settings:
            assert len(settings) == max(len(results), 1), title
        elif "W = `" in command:
            assert len(re.search(r"W = `([^`]*)`", command)[1].split("|")) == len(results), title
        elif command == "-" and ": " in title:
            assert len(title.split(": ")[1].split(", ")) == len(results), title


def test_the_map_gives_each_row_of_setsim_the_flags_it_names():
    seen = {"Table 2": [], "Table 3": []}
    for title, _, _, settings, script in mapped("SetSim"):
        for args in settings:
            assert script == "setsim.py" and args.data == "/imagenet"
            if title.startswith(("Table", "A.2")):
                assert args.epochs == (100 if title[:7] in ("Table 1", "Table 2", "Table 3") else 200)
            assert (args.framework == "simsiam") == ("SimSiam" in title or "Table 2" in title)
            assert args.loss_weight == (0 if title.endswith((", MoCo-v2", ", SimSiam")) else 0.5)
            if title.startswith("Table 2"):
                seen["Table 2"].append(args.set)
            if title.startswith("Table 3"):
                seen["Table 3"].append(args.matcher)
            if title.startswith("Table 4"):
                assert (args.matcher == "geometry") == title.endswith(", Geo")
                assert (args.geometry == 0.5) == ("Set + Geo" in title) and args.symmetric == ("Sym" in title)
            if title.endswith((", SetSim", "Set + Geo + Sym")) or title.startswith(
                tuple(f"Figure {n}" for n in range(4, 10))
            ):
                assert args.symmetric and args.geometry == 0.5 and args.matcher == "set2set-nn"
    assert seen["Table 2"] == [f"{n}%" for n in range(10, 100, 10)]
    assert seen["Table 3"] == ["random", "sort", "hungarian", "set2set", "set2set-nn"]


def test_the_map_gives_each_row_of_resim_the_flags_it_names():
    count = 0
    for title, _, _, settings, script in mapped("ReSim"):
        if not settings or title.startswith("Figure"):
            continue
        small = title.startswith(("Table 1", "Table 2", "Table 3", "Section 4.1"))  # IN-100
        windows = [[int(n) for n in match] for match in re.findall(r"W(\d+)-S(\d+)", title)] or [[48, 32]] * len(
            settings
        )
        levels = ["c4" if small else kind.lower() for kind in re.findall(r"ReSim-(C4|FPN)", title)] or ["c4"] * len(
            settings
        )
        for number, args in enumerate(settings):
            long = "400 ep" in title and number == len(settings) - 1
            assert args.data == ("/in100" if small else "/imagenet")
            assert args.epochs == (500 if small else 400 if long else 200), title
            assert (args.framework == "simsiam") == ("SimSiam" in title)
            if args.framework == "moco":
                assert args.queue_size == (16384 if small else None)
            if title.endswith((", MoCo-v2", ", SimSiam")):
                assert script == "setsim.py" and args.loss_weight == 0
                continue
            assert script == "resim.py" and args.levels == levels[number], title
            assert args.preset == ("official" if "FPN^T" in title else "paper")
            assert args.pool == ("roi_align" if "RoI Align" in title else "prroi")
            assert list(args.window) == windows[number], title
            count += 1
    assert count == 26


def test_the_map_gives_each_row_of_d3ssl_the_flags_it_names():
    count, seen = 0, {"Table 5": [], "Table 6": [], "Table 7": []}
    for title, _, _, settings, script in mapped("D3SSL"):
        coco, table = title.startswith(("Table 1", "Table 5", "Table 7")), title[:7]
        for args in settings:
            assert args.data == ("/coco/train2017" if coco else "/openimage-mini"), title
            assert args.epochs == (200 if table in seen else 800) and args.lr == 0.3, title
            if script != "d3ssl.py":
                assert script == ("setsim.py" if "MoCo" in title else "resim.py")
                assert script == "resim.py" or args.loss_weight == 0
                continue
            assert args.proposals == ("coco.proposals" if coco else "oim.proposals")
            assert (args.framework == "soco") == ("SoCo" in title)
            if table in seen:
                seen[table].append((args.depositioning, set(args.augment)))
            else:
                assert args.depositioning == ("D3SSL" in title)
                assert set(args.augment) == ({"soco-cutout"} if "SoCo" in title else {"prc", "prm", "rbj"})
            count += 1
    assert count == 16
    everything, steps = {"prc", "prm", "rbj"}, ["", "soco-cutout", "prc soco-jitter", "prc", "prc rbj", "prc rbj prm"]
    assert seen["Table 5"] == [(False, set(names.split())) for names in steps]
    assert seen["Table 6"] == [(False, {"soco-cutout"}), (False, everything)]
    assert seen["Table 7"] == [(False, everything), (True, everything)]


def test_in100_is_a_list_of_a_hundred_classes():
    names = re.findall(r"\bn\d{8}\b", DOCS)
    assert len(names) == len(set(names)) == 100


# ---- the pages: what runs


def in_blocks():
    """The commands of the methods in code blocks; of those that differ in launcher, sizes and folders alone, the first.

    Those for eight GPUs are left out: the paper-size tests of each script take two steps of them.
    """
    found = {}
    for _, words in commands():
        here = words[0] in (".venv/bin/python", "python", "torchrun") and "8" not in words
        if here and script_and_flags(words)[0] in METHODS:
            script, flags = script_and_flags(words)
            text = re.sub(
                r" --(data|proposals|output-dir|epochs|batch-size|lr|queue-size|seed) \S+", "", " ".join(["", *flags])
            )
            found.setdefault((script, text, "2" in words and "--demo" in words), words)
    return list(found.values())


IN_BLOCKS = in_blocks()


@pytest.mark.slow
@pytest.mark.parametrize("words", IN_BLOCKS, ids=" ".join)
def test_commands_of_the_pages_run(words, tmp_path, monkeypatch):
    """The commands of the methods for three steps; scenes, and folders that a test has not, are made small."""
    script, flags = script_and_flags(words)
    flags = [*flags, "--steps", "3", "--output-dir", str(tmp_path / "run")]
    if "--demo" in flags:
        flags += "--data scenes:192 --size 64".split()
        processes = int(words[words.index("--nproc_per_node") + 1]) if words[0] == "torchrun" else 0
        run(script, *flags, processes=processes)
    else:
        folder = write_images(tmp_path / "images", 16)
        weights = ResNetTrunk("resnet18").state_dict()
        monkeypatch.setattr("harness.weights.load_backbone", lambda source, arch: (weights, f"{source}"))  # offline
        flags[flags.index("--data") + 1] = str(folder)
        if script == "d3ssl.py":
            flags[flags.index("--proposals") + 1] = str(tmp_path / "boxes")
            harness.proposals.make(harness.images.open_images(str(folder), 0, 0), str(tmp_path / "boxes"))
        module(script).train([*flags, *"--arch resnet18 --size 64 --batch-size 8 --workers 0".split()])
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [3] and lines[-1]["probe"]["hits"] >= 0
    assert (tmp_path / "run" / PICTURES[script]).exists()


def test_python_of_the_pages_runs(tmp_path, monkeypatch):
    """Every Python block, where runs of ReSim and SetSim have left their weights; README's load into torchvision."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.run.Run.measure", lambda *args: None)
    resim.train(
        "--data scenes:8 --size 64 --batch-size 4 --steps 0 --queue-size 8 --workers 0 --preset official".split()
    )
    (tmp_path / "runs" / "setsim").mkdir()
    (tmp_path / "runs" / "setsim" / "resnet50.pth").symlink_to(tmp_path / "runs" / "resim" / "resnet50.pth")
    printed = []
    for text in PAGES.values():
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(block, {"print": printed.append})
    assert printed[0].missing_keys == ["fc.weight", "fc.bias"] and printed[0].unexpected_keys == []
    assert len(printed[1].missing_keys) == 6 and printed[1].unexpected_keys == []


def test_test_command_is_what_the_gate_runs():
    gate = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n 's/\^\\\((.*)\\\)\$/", gate)[1]
    assert len(re.findall("^" + pattern + "$", README, re.M)) == 1
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_first_command_of_the_readme_is_the_demo():
    demo = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && .venv/bin/python setsim.py --demo"
    assert README.split("```bash\n")[1].startswith(f"{demo}\n```")


def pieces():
    """(file, names of pieces, names that they take along, how one is used or "") of every row of the lists of pieces."""
    for header, *rows in (table for text in PAGES.values() for table in tables(text)):
        for row in rows if header[0].startswith("piece") else ():
            file = re.search(r"`([^`]*\.py)`", header[0]) or re.search(r"`([^`]*\.py)`", row[1])
            needs = row[header.index("needs" if "needs" in header else "take along")]
            names, needed = ({*re.findall(r"`(?:\w+\.)*(\w+)`", cell)} for cell in (row[0], needs))
            if "constants of the file" in needs:
                needed |= {name for name in own_names(file[1]) if name.isupper()}
            yield file[1], names, needed, row[-1] if "use" in header else ""


def own_names(name):
    """What a file defines or takes from our other files, as opposed to what libraries give it."""
    found = set()
    for node in TREES[name].body:
        if hasattr(node, "name"):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {word.id for target in node.targets for word in ast.walk(target) if isinstance(word, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and files_of(node.module, ""):
            found |= {alias.name for alias in node.names}
    return found | {"common", "harness"}


def globals_of(name, piece):
    """The names that a top-level definition reads from its file."""
    (node,) = (node for node in TREES[name].body if getattr(node, "name", None) == piece)
    codes, found = [compile(ast.Module([node], []), name, "exec")], set()
    for code in codes:
        found |= {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found


def test_pieces_of_the_pages_exist_and_name_what_they_need():
    rows = list(pieces())
    assert len(rows) > 45
    for file, names, needed, use in rows:
        for piece in names:
            missing = globals_of(file, piece) & own_names(file) - names - needed
            assert not missing, f"{piece} of {file} needs {missing}"
        code = re.fullmatch(r"`(.*)`", use)
        assert not use or any(piece in code[1] for piece in names) and ast.parse(code[1])


# ---- decisions and equations

ID = r"[SRDBFG]\d+"


def decisions():
    """[(id, last cell)] of every row of a table of decisions."""
    rows = [row for text in PAGES.values() for _, *rows in tables(text) for row in rows]
    return [(row[0], row[-1]) for row in rows if re.fullmatch(ID, row[0])]


def remarks(source):
    """The comments and strings of a source, where ids may stand."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}
    return [token.string for token in tokens if token.type in kinds]


def mentioned(source):
    """The ids that a source names: (S9), (S4, S5), (section 4.1, S17), (DEVIATION: B7), or DEVIATION: S9 in a sentence."""
    found = set()
    for text in remarks(source):
        for inside in re.findall(r"\(([^()]*)\)", text):
            found |= {part for part in re.split(r"[\s,;:]+", inside) if re.fullmatch(ID, part)}
        for ids in re.findall(rf"\b(?:OFFICIAL|DEVIATION|AMBIGUOUS): ({ID}(?:, {ID})*)", text):
            found |= set(ids.split(", "))
    return found


def test_ids_in_brackets_and_behind_a_word_are_found():
    text = '# as SimSiam (B16)\nx = "DEVIATION: S9, mean (S4, S5). (section 4.1, S17) F(S1) S2"  # (DEVIATION: B7)\nf(R5)\n'
    assert mentioned(text) == {"B16", "S9", "S4", "S5", "S17", "B7", "S1"}


def test_code_and_tables_name_the_same_decisions():
    rows = decisions()
    ids = [name for name, _ in rows]
    assert len(ids) == len(set(ids)), sorted(name for name in set(ids) if ids.count(name) > 1)
    named = set().union(*map(mentioned, SOURCES.values()))
    exempt = {name for name, last in rows if "no mention" in last}
    assert named <= set(ids), f"no row: {sorted(named - set(ids))}"
    assert set(ids) - exempt <= named, f"not in the code: {sorted(set(ids) - exempt - named)}"


def test_readme_counts_the_decisions():
    assert int(re.search(r"\[(\d+) decisions\]", README)[1]) == len(decisions())


@pytest.mark.parametrize("name", SOURCES)
def test_a_word_for_a_decision_is_followed_by_its_id(name):
    for kind, rest in re.findall(r"\b(OFFICIAL|DEVIATION|AMBIGUOUS): ?(?=(.{0,40}))", SOURCES[name]):
        assert re.match(ID, rest), f"{name}: {kind}: {rest}"


@pytest.mark.parametrize("script, equations", [("setsim.py", 9), ("resim.py", 5), ("d3ssl.py", 10)])
def test_every_equation_of_the_paper_has_its_tag(script, equations):
    for number in range(1, equations + 1):
        found = False
        for text in re.findall(r"PAPER:([^\n]*)", SOURCES[script]):
            for numbers in re.findall(r"Eqs?\. ((?:[\d, -]|and |to )+)", text):
                single = {int(n) for n in re.findall(r"\d+", numbers)}
                for first, last in re.findall(r"(\d+)(?:-| to )(\d+)", numbers):
                    single |= set(range(int(first), int(last) + 1))
                found |= number in single
        assert found, number


# ---- flags


def flags_of(script, monkeypatch):
    """The actions of a script's parser, without --help."""
    seen, original = [], argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: seen.append(self) or original(self, *a))
        module(script).get_args(["--demo"])
    return [action for action in seen[0]._actions if action.dest != "help"]


def shared_flags():
    parser = argparse.ArgumentParser()
    common.run_flags(parser, "x")
    return {action.dest for action in parser._actions if action.dest != "help"}


def without(script, *names):
    """A source without some of its top-level functions."""
    source = SOURCES[script]
    for node in TREES[script].body:
        if getattr(node, "name", None) in names:
            source = source.replace(ast.get_source_segment(SOURCES[script], node), "")
    return source


@pytest.mark.parametrize("script", METHODS)
def test_flags_stay_within_the_budget(script, monkeypatch):
    """14 flags that all methods have, and at most 11 of a method's own."""
    names = {action.dest for action in flags_of(script, monkeypatch)}
    assert len(shared_flags()) == 14 and shared_flags() <= names
    assert len(names - shared_flags()) <= 11, sorted(names - shared_flags())


@pytest.mark.parametrize("script", [*METHODS, *TRANSFERS])
def test_no_dead_flags(script, monkeypatch):
    """Every flag is read somewhere after parsing, not only in its checks."""
    names = [action.dest for action in flags_of(script, monkeypatch)]
    assert 20 <= len(names) <= 37
    read = without(script, "get_args", "check_args", "presets")
    if script in METHODS:
        read += without("common.py", "run_flags", "parse") + SOURCES["harness/run.py"]
    for name in names:
        assert re.search(rf"\bargs\.{name}\b", read), name


@pytest.mark.parametrize("script", [*METHODS, *TRANSFERS])
def test_help_says_something_about_every_flag(script, monkeypatch):
    for action in flags_of(script, monkeypatch):
        assert action.help and len(action.help) > 8, action.option_strings


# ---- structure


def layer(name):
    """common <- harness <- the five scripts <- probes, tools, bench"""
    folder = name.split("/")[0]
    return 0 if name == "common.py" else 1 if folder == "harness" else 2 if name in (*METHODS, *TRANSFERS) else 3


def imported(nodes):
    """The modules that import statements name, with the names that they take: {("harness.run", "Run"), ("torch", "")}"""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def files_of(module_name, name):
    """The project's files that an import statement opens."""
    paths = [f"{part.replace('.', '/')}.py" for part in (module_name, f"{module_name}.{name}")]
    return [path for path in paths if path in SOURCES]


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_one_way(name):
    """Anywhere in a file. Scripts never import one another; nothing below imports probes, tools or bench."""
    for module_name, what in imported(ast.walk(TREES[name])):
        for file in files_of(module_name, what):
            own_folder = layer(file) == layer(name) in (1, 3)
            assert layer(file) < layer(name) or own_folder, f"{name} imports {file}"


@pytest.mark.parametrize("name", [name for name in SOURCES if layer(name) < 3])
def test_scripts_need_the_cards_packages_alone(name):
    """At import time; what pictures, progress and proposals need besides is imported where it is used."""
    allowed = {"torch", "torchvision", "numpy", "scipy", "PIL", "common", "harness"} | set(sys.stdlib_module_names)
    assert {module_name.split(".")[0] for module_name, _ in imported(TREES[name].body)} <= allowed


def docstring_lines(tree):
    """The numbers of the lines of all docstrings in a tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def code_lines(name):
    """The lines of a file that are not blank, comment or docstring."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline)
    lines = {n for token in tokens if token.type not in nothing for n in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstring_lines(TREES[name]))


@pytest.mark.parametrize("name", METHODS)
def test_methods_stay_within_their_budget(name):
    assert code_lines(name) <= 330
    assert len(SOURCES[name].splitlines()) <= 570


def test_common_and_readme_stay_within_their_budget():
    assert len(SOURCES["common.py"].splitlines()) <= 290
    assert len(README.splitlines()) <= 300


@pytest.mark.parametrize("name", [*METHODS, "common.py"])
def test_no_function_is_longer_than_40_lines(name):
    """Without its docstring."""
    documented = docstring_lines(TREES[name])
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            length = len(set(range(node.lineno, node.end_lineno + 1)) - documented)
            assert length <= 40, f"{node.name}: {length}"


def test_common_holds_no_method():
    """What common.py defines is used elsewhere, and no loss, matcher or augmentation is among it."""
    names = [node.name for node in TREES["common.py"].body if hasattr(node, "name")]
    assert not [name for name in names if re.search(r"loss|match|view|augment|attention", name)]
    everything = "\n".join(SOURCES.values())
    unused = [name for name in names if len(re.findall(rf"\b{name}\b", everything)) < 2]
    assert unused == []


def definition(script, name):
    """The syntax tree of a top-level function, class or constant, without docstrings."""
    for node in ast.parse(SOURCES[script]).body:
        if getattr(node, "name", None) == name or isinstance(node, ast.Assign) and node.targets[0].id == name:
            for inner in ast.walk(node):
                if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner):
                    inner.body = inner.body[1:]
            return ast.dump(node)
    raise AssertionError(f"{script}: no {name}")


@pytest.mark.parametrize("name", ["image_contrastive_loss", "image_cosine_loss"])
def test_losses_repeated_on_purpose_are_equal(name):
    """A reader wants to see them in both files: the same code, whatever its docstring says."""
    assert definition("resim.py", name) == definition("setsim.py", name)


@pytest.mark.parametrize("name", "SCENE DEMO MOMENTUM FORGOTTEN COLOURS to_tensor".split())
def test_blocks_of_both_transfer_scripts_are_equal(name):
    assert definition("transfer_det.py", name) == definition("transfer_seg.py", name)


UNDOCUMENTED = {"get_args", "main", "train", "disk_full_line"}


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.startswith("bench/")])
def test_public_functions_have_docstrings(name):
    for node in TREES[name].body:
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
            and node.name not in UNDOCUMENTED
        ):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", SOURCES)
def test_no_literal_sizes_in_shape_comments(name):
    for number, line in enumerate(SOURCES[name].splitlines(), 1):
        for shape in re.findall(r"#\s+\(([^)]*)\)", line):
            assert not re.search(r"\b(49|128|2048|65536|256)\b", shape), f"{number}: {line.strip()}"
