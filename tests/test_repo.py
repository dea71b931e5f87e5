"""The repository as a whole: README against code, flags, tags, imports, and that each script stands alone."""

import argparse
import ast
import difflib
import importlib
import re
import shlex
import sys

import pytest
import torch
from helpers import ROOT, log_lines, run, write_images

import common
import resim
from common import ResNetTrunk
from tools import proposals

README = (ROOT / "README.md").read_text()
METHODS = ["setsim.py", "resim.py", "d3ssl.py"]
TRANSFERS = ["transfer_det.py", "transfer_seg.py"]
TOOLS = ["tools/proposals.py", "tools/openimages_mini.py", "tools/to_detectron2.py", "tools/figures.py"]
TOOLS += ["probes/frozen.py", "probes/linear.py", "probes/oknn.py", "probes/bias.py"]
SOURCES = {ROOT / name: (ROOT / name).read_text() for name in (*METHODS, *TRANSFERS, "common.py", *TOOLS)}
PICTURES = {"setsim.py": "matches_end.png", "resim.py": "regions_end.png", "d3ssl.py": "regions_end.png"}


def commands():
    """Every command of a script in the README, in code blocks and in tables, as a list of words."""
    found = []
    for text in re.findall(r"```bash\n(.*?)```", README, re.S) + re.findall(r"`([^`\n]*\.py [^`\n]*)`", README):
        for line in text.strip().splitlines():
            found += [
                shlex.split(part)
                for part in line.split("&&")
                if re.search(r"\b(setsim|resim|d3ssl|transfer_det|transfer_seg)\.py\b", part)
            ]
    return found


def script_and_flags(words):
    """("setsim.py", [...]) of a command."""
    place = next(i for i, word in enumerate(words) if word.endswith((*METHODS, *TRANSFERS)))
    return words[place].split("/")[-1], words[place + 1 :]


def module(script):
    return importlib.import_module(script.removesuffix(".py"))


def section(method):
    """The part of the README that maps one paper to commands."""
    return re.split(r"^## ", README.split(f"## From the paper to commands: {method}\n")[1], flags=re.M)[0]


def test_every_command_of_the_readme_parses(monkeypatch):
    assert len(commands()) > 110
    for script in TRANSFERS:
        monkeypatch.setattr(module(script), "remembered", lambda args, given: {"task": "scenes"})
    for words in commands():
        script, flags = script_and_flags(words)
        if script in TRANSFERS and not {"--data", "--demo", "--images", "--predict"} & set(flags):
            flags += ["--data", "/data"]  # the maps leave it out
        module(script).get_args(flags)  # raises for an unknown flag or a setting that makes no sense


MODULES = {"tools.proposals": 4, "tools.openimages_mini": 1, "tools.to_detectron2": 2, "tools.figures": 5, "probes.linear": 3, "probes.oknn": 3,
           "probes.bias": 2}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_every_command_of_a_module_parses(name):
    found = re.findall(rf"-m {re.escape(name)} ([^`\n]*)", README)
    assert len(found) >= MODULES[name]
    for words in found:
        importlib.import_module(name).get_args(shlex.split(words))


def titles(method):
    return [row.split("|")[1].strip() for row in section(method).splitlines() if row.startswith("| ")]


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
    for start, count in ROWS[method].items():
        assert sum(title.startswith(start) for title in titles(method)) == count, start


def mapped(method):
    """(title, script, settings, row) of each row that trains something."""
    for row in section(method).splitlines():
        command = re.search(r"`((?:setsim|resim|d3ssl)\.py) (--data[^`]*)`", row)
        if row.startswith("| ") and command:
            yield row.split("|")[1].strip(), command[1], module(command[1]).get_args(shlex.split(command[2])), row


def test_the_map_gives_each_row_of_setsim_the_flags_it_names():
    for title, script, args, row in mapped("SetSim"):
        assert script == "setsim.py"
        if title.startswith(("Table", "A.2")):
            assert args.epochs == (100 if title[:7] in ("Table 1", "Table 2", "Table 3") else 200)
            assert row.rstrip("| ").endswith("not run")
        if match := re.search(r"Delta (\d+)", title):
            assert args.ratio == int(match[1])
        assert (args.framework == "simsiam") == ("SimSiam" in title or "Table 2" in title)
        if title.endswith((", MoCo-v2", ", SimSiam")):
            assert args.matcher == "none"
        if match := re.search(r"Table 3, (.*)", title):
            assert args.matcher == match[1].lower()
        if title.endswith((", SetSim", "Set + Geo + Sym")):
            assert args.symmetric and args.geometry == 0.5 and args.matcher == "set2set-nn"


def test_the_map_gives_each_row_of_resim_the_flags_it_names():
    count = 0
    for title, script, args, row in mapped("ReSim"):
        if not title.startswith(("Table", "Section", "A.2")):
            continue
        small = title.startswith(("Table 1", "Table 2", "Table 3", "Section 4.1"))  # IN-100
        assert args.data == ("/in100" if small else "/imagenet") and row.rstrip("| ").endswith("not run")
        assert args.epochs == (500 if small else 400 if "400 ep" in title else 200)
        assert (args.framework == "simsiam") == ("SimSiam" in title)
        if args.framework == "moco":
            assert args.queue_size == (16384 if small else 65536)
        if title.endswith((", MoCo-v2", ", SimSiam")):
            assert script == "setsim.py" and args.matcher == "none"
            continue
        assert script == "resim.py" and args.levels == ("fpn" if "FPN" in title else "c4")
        assert args.preset == ("official" if "FPN^T" in title else "paper")
        assert args.pool == ("roi_align" if "RoI Align" in title else "prroi")
        match = re.search(r"W(\d+)-S(\d+)", title)
        if args.levels == "c4":
            assert (args.window, args.stride) == (([int(match[1])], [int(match[2])]) if match else ([48], [32]))
        count += 1
    assert count == 26


def test_the_map_gives_each_row_of_d3ssl_the_flags_it_names():
    count = 0
    for title, script, args, row in mapped("D3SSL"):
        coco = title.startswith(("Table 1", "Table 5", "Table 7"))
        assert args.data == ("/coco/train2017" if coco else "/openimage-mini") and row.rstrip("| ").endswith("not run")
        assert args.epochs == (200 if title.startswith(("Table 5", "Table 6", "Table 7")) else 800) and args.lr == 0.3
        if script != "d3ssl.py":
            assert script == ("setsim.py" if "MoCo" in title else "resim.py")
            continue
        assert args.proposals == ("coco.proposals" if coco else "oim.proposals")
        assert (args.framework == "soco") == ("SoCo" in title)
        assert args.depositioning == (
            title.startswith(("Table 1", "Table 3", "Table 4", "Table 7, with L")) and "SoCo" not in title
        )
        if title.startswith("Table 5"):
            assert args.cutout == ("prc" if "PRC" in title else "soco" if "random" in title else "none")
            assert args.jitter == ("rbj" if "RBJ" in title else "soco" if "jittering" in title else "none")
        augmented = "SoCo" not in title or "augmentations" in title
        assert args.prm == ("keep" if augmented and (not title.startswith("Table 5") or "PRM" in title) else "none")
        if not title.startswith("Table 5"):
            assert (args.cutout, args.jitter) == (("prc", "rbj") if augmented else ("soco", "none"))
        count += 1
    assert count == 16


IN_BLOCKS = [words for words in commands() if words[0] in (".venv/bin/python", "python", "torchrun")]
IN_BLOCKS = [words for i, words in enumerate(IN_BLOCKS) if words not in IN_BLOCKS[:i]]
IN_BLOCKS = [words for words in IN_BLOCKS if script_and_flags(words)[0] in METHODS]  # the others: in files of their own


@pytest.mark.slow
@pytest.mark.parametrize("words", IN_BLOCKS, ids=" ".join)
def test_commands_of_the_readme_run(words, tmp_path, monkeypatch):
    """The commands in code blocks for three steps; scenes, and folders that a test has not, are made small."""
    script, flags = script_and_flags(words)
    flags = [*flags, "--steps", "3", "--output-dir", str(tmp_path / "run")]
    if "--demo" in flags:
        flags += "--data scenes:192 --size 64".split()
        processes = int(words[words.index("--nproc_per_node") + 1]) if words[0] == "torchrun" else 0
        run(script, *flags, processes=processes)
    else:
        folder = write_images(tmp_path / "images", 16)
        weights = ResNetTrunk("resnet18").state_dict()
        monkeypatch.setattr("common.load_backbone", lambda source, arch: (weights, f"{source}"))  # imagenet: offline
        flags[flags.index("--data") + 1] = str(folder)
        if script == "d3ssl.py":
            flags[flags.index("--proposals") + 1] = str(tmp_path / "boxes")
            proposals.make(common.open_images(str(folder), 0, 0), str(tmp_path / "boxes"))
        module(script).main([*flags, *"--arch resnet18 --size 64 --batch-size 8 --workers 0".split()])
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [3] and lines[-1]["probe"]["hits"] >= 0
    assert (tmp_path / "run" / PICTURES[script]).exists()


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    """The lines that load weights into torchvision, and ours into the released layout, on files with those names."""
    torchvision_alone, detector, released = re.findall(r"```python\n(.*?)```", README, re.S)
    args = resim.get_args(["--data", "x", "--preset", "official", "--queue-size", "8"])
    method = resim.build(args, common.World(0, 1, 0, torch.device("cpu")))
    for folder in ("setsim", "resim"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
        for name, weights in resim.exports(args, method).items():
            torch.save(weights, tmp_path / "runs" / folder / name)
    torch.save({"model": method.state_dict()}, tmp_path / "runs" / "resim" / "checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    printed = []
    for block in (torchvision_alone, detector, released):
        exec(block, {"print": printed.append})
    assert printed[0].missing_keys == ["fc.weight", "fc.bias"] and printed[0].unexpected_keys == []
    assert len(printed[1].missing_keys) == 6 and printed[1].unexpected_keys == []
    state = torch.load("resim_fpn.pth.tar")["state_dict"]
    assert "module.encoder_q.fpn_output3.weight" in state and state["module.queue"].shape == (128, 8)


def test_in100_is_a_list_of_a_hundred_classes():
    names = re.findall(r"\bn\d{8}\b", README)
    assert len(names) == len(set(names)) == 100


def test_test_command_is_what_the_gate_runs():
    gate = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n 's/\^\\\((.*)\\\)\$/", gate)[1]
    assert len(re.findall("^" + pattern + "$", README, re.M)) == 1
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_tags_and_table_name_each_other():
    rows = set(re.findall(r"^\| ([SRDBFG]\d+) \|", README, re.M))
    tagged = set()
    for path, source in SOURCES.items():
        for kind, rest in re.findall(r"(OFFICIAL|DEVIATION|AMBIGUOUS): ?(?=(.{0,40}))", source):
            ids = re.match(r"((?:[SRDBFG]\d+)(?:, [SRDBFG]\d+)*)", rest)
            assert ids or "tag" in rest or path.name in METHODS and "released" in rest, f"{path.name}: {kind}: {rest}"
            tagged |= set(ids[1].split(", ")) if ids else set()
    assert tagged == rows, f"only in code {tagged - rows}, only in README {rows - tagged}"


@pytest.mark.parametrize("script, equations", [("setsim.py", 9), ("resim.py", 5), ("d3ssl.py", 10)])
def test_every_equation_of_the_paper_has_its_tag(script, equations):
    for number in range(1, equations + 1):
        assert re.search(rf"PAPER:[^\n]*(Eq\. {number}\b|Eqs\. [\d and-]*\b{number}\b)", SOURCES[ROOT / script]), number


REPEATED = "NegativeLogSumExp negative_logsumexp image_contrastive_loss image_cosine_loss cell_centres".split()
REPEATED += "correspondence_accuracy fit_batch_and_queue main FREE".split()


def definition(script, name):
    """The syntax tree of a top-level function, class or constant, without docstrings."""
    for node in ast.parse(SOURCES[ROOT / script]).body:
        if getattr(node, "name", None) == name or isinstance(node, ast.Assign) and node.targets[0].id == name:
            for inner in ast.walk(node):
                if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner):
                    inner.body = inner.body[1:]
            return ast.dump(node)
    raise AssertionError(f"{script}: no {name}")


@pytest.mark.parametrize("name", REPEATED)
def test_blocks_repeated_on_purpose_are_equal(name):
    """What the methods share and a reader wants to see in each file: the same code, whatever its comments say."""
    assert definition("resim.py", name) == definition("setsim.py", name)
    if name in ("NegativeLogSumExp", "negative_logsumexp"):
        assert definition("d3ssl.py", name) == definition("setsim.py", name)


OF_D3SSL = """
images = with_proposals(args, images, world, stop_signal)
method = build(args, world, total, None if state else args.init)
optimizer = torch.optim.SGD(network.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay)
region_views(images, args)
group['lr'] = common.cosine_lr(lr, step // epoch_steps, args.epochs)
drawn = Drawn(*(x.to(world.device, non_blocking=True) for x in batch))
loss, values = method(network, drawn, step)
""".strip().splitlines()


def test_d3ssls_main_differs_in_these_lines_alone():
    mains = []
    for script in ("setsim.py", "d3ssl.py"):
        (node,) = (node for node in ast.parse(SOURCES[ROOT / script]).body if getattr(node, "name", None) == "main")
        mains.append(ast.unparse(node).splitlines())
    added = [line[2:].strip() for line in difflib.ndiff(*mains) if line.startswith("+ ")]
    assert len(added) == len(OF_D3SSL)
    for line, known in zip(added, OF_D3SSL, strict=True):
        assert known in line, line
    gone = [line for line in difflib.ndiff(*mains) if line.startswith("- ")]
    assert len(gone) == 12, gone


@pytest.mark.parametrize("name", "SCENE DEMO MOMENTUM FORGOTTEN COLOURS to_tensor".split())
def test_blocks_of_both_transfer_scripts_are_equal(name):
    assert definition("transfer_det.py", name) == definition("transfer_seg.py", name)


@pytest.mark.parametrize("name, lines", {"remembered": 4, "main": 17, "fine_tune": 49}.items())
def test_transfer_scripts_differ_where_they_have_to(name, lines):
    """Both do a run in the same way: a change in one of them that should be in the other shows as more lines."""
    sources = []
    for script in TRANSFERS:
        (node,) = (node for node in ast.parse(SOURCES[ROOT / script]).body if getattr(node, "name", None) == name)
        node.body = node.body[1:] if ast.get_docstring(node) else node.body
        sources.append(ast.unparse(node).splitlines())
    assert sum(line[0] in "+-" for line in difflib.ndiff(*sources)) == lines


@pytest.mark.parametrize("script", [*METHODS, *TRANSFERS])
def test_no_dead_flags(script):
    """Every flag is read somewhere after parsing (in the script, not only in its checks)."""
    source = SOURCES[ROOT / script]
    flags = re.findall(r'flag\("(--[a-z-]+)"(?:, dest="(\w+)")?', source)
    names = [dest or name[2:].replace("-", "_") for name, dest in flags]
    assert 25 <= len(names) <= 37
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in ("get_args", "check_args"):
            source = source.replace(ast.get_source_segment(source, node) or "", "")
    for name in names:
        assert f"args.{name}" in source, name


@pytest.mark.parametrize("script", [*METHODS, *TRANSFERS])
def test_help_says_something_about_every_flag(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    seen = []
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: seen.append(self) or original(self, *a))
    module(script).get_args(["--demo"])
    for action in seen[0]._actions:
        assert action.help and len(action.help) > 8, action.option_strings


@pytest.mark.parametrize("script", [*METHODS, *TRANSFERS])
def test_scripts_stand_alone(script):
    """No method script imports another; at import time only the card's packages (and Pillow) are needed."""
    allowed = {"torch", "torchvision", "numpy", "scipy", "PIL", "common"} | set(sys.stdlib_module_names)
    for path in (ROOT / script, ROOT / "common.py"):
        for node in ast.parse(SOURCES[path]).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert {name.split(".")[0] for name in names} <= allowed


def test_common_holds_no_method():
    """What common.py defines is used by the scripts, and no loss, matcher or augmentation is among it."""
    names = [node.name for node in ast.parse(SOURCES[ROOT / "common.py"]).body if hasattr(node, "name")]
    assert not [name for name in names if re.search(r"loss|match|view|augment|attention", name)]
    everything = "\n".join(SOURCES.values())
    unused = [name for name in names if len(re.findall(rf"\b{name}\b", everything)) < 2]
    assert unused == []


def test_public_functions_have_docstrings():
    for path, source in SOURCES.items():
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in (
                "get_args",
                "main",
                "conv1x1",
                "disk_full_line",
                "world_size",
            ):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_no_literal_sizes_in_shape_comments():
    for path, source in SOURCES.items():
        for number, line in enumerate(source.splitlines(), 1):
            for shape in re.findall(r"#\s+\(([^)]*)\)", line):
                assert not re.search(r"\b(49|128|2048|65536|256)\b", shape), f"{path.name}:{number}: {line.strip()}"
