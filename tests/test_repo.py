"""The repository as a whole: README against code, flags, tags, imports, and that each script stands alone."""

import argparse
import ast
import re
import shlex
import sys

import pytest
import torch
from helpers import ROOT, log_lines, run, write_images

import setsim
from common import ResNetTrunk

README = (ROOT / "README.md").read_text()
METHODS = [name for name in ("setsim.py", "resim.py", "d3ssl.py") if (ROOT / name).exists()]
SOURCES = {path: path.read_text() for path in (ROOT / name for name in (*METHODS, "common.py"))}


def commands():
    """Every command of a method script in the README, in code blocks and in tables, as a list of words."""
    found = []
    for text in re.findall(r"```bash\n(.*?)```", README, re.S) + re.findall(r"`([^`\n]*\.py [^`\n]*)`", README):
        for line in text.strip().splitlines():
            found += [
                shlex.split(part) for part in line.split("&&") if re.search(r"\b(setsim|resim|d3ssl)\.py\b", part)
            ]
    return found


def flags_of(words):
    return words[next(i for i, word in enumerate(words) if word.endswith(tuple(METHODS))) + 1 :]


def test_every_command_of_the_readme_parses():
    assert len(commands()) > 40
    for words in commands():
        setsim.get_args(flags_of(words))  # raises for an unknown flag or a setting that makes no sense


def test_the_map_has_every_row_of_the_paper():
    titles = [
        row.split("|")[1].strip() for row in README.splitlines() if row.startswith(("| Table", "| Figure", "| A.2"))
    ]
    rows = {
        "Table 1": 4,
        "Table 2": 9,
        "Table 3": 5,
        "Table 4": 5,
        "Table 5": 11,
        "Table 6": 8,
        "Table 7": 8,
        "Table 8": 8,
        "Table 9": 7,
    }
    for table, count in rows.items():
        assert sum(title.startswith(table) for title in titles) == count, table
    for number in range(3, 10):
        assert any(title.startswith(f"Figure {number}") for title in titles)
    assert sum(title.startswith("A.2") for title in titles) == 2 and "Figures 1 and 2, idea and architecture" in titles


def test_the_map_gives_each_row_the_flags_it_names():
    for row in README.splitlines():
        command = re.search(r"`setsim\.py (--data[^`]*)`", row)
        if not row.startswith("| ") or not command:
            continue
        args, title = setsim.get_args(shlex.split(command[1])), row.split("|")[1].strip()
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


IN_BLOCKS = [words for words in commands() if words[0] in (".venv/bin/python", "python", "torchrun")]


@pytest.mark.slow
@pytest.mark.parametrize("words", IN_BLOCKS, ids=" ".join)
def test_commands_of_the_readme_run(words, tmp_path, monkeypatch):
    """The commands in code blocks for three steps; folders that a test has not are replaced, and made small."""
    flags = [*flags_of(words), "--steps", "3", "--output-dir", str(tmp_path / "run")]
    if "--demo" in flags:
        processes = int(words[words.index("--nproc_per_node") + 1]) if words[0] == "torchrun" else 0
        run("setsim.py", *flags, processes=processes)
    else:
        folder = write_images(tmp_path / "images", 16)
        weights = ResNetTrunk("resnet18").state_dict()
        monkeypatch.setattr("common.load_backbone", lambda source, arch: (weights, f"{source}"))  # imagenet: offline
        flags[flags.index("--data") + 1] = str(folder)
        setsim.main([*flags, *"--arch resnet18 --size 64 --batch-size 8 --workers 0".split()])
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [3] and lines[-1]["probe"]["hits"] >= 0
    assert (tmp_path / "run" / "matches_end.png").exists()


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    """The lines that load a backbone into torchvision, on a file with that name."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "runs" / "setsim").mkdir(parents=True)
    torch.save(ResNetTrunk("resnet50").state_dict(), tmp_path / "runs" / "setsim" / "resnet50.pth")
    monkeypatch.chdir(tmp_path)
    printed = []
    exec(block, {"print": printed.append})
    assert printed[0].missing_keys == ["fc.weight", "fc.bias"] and printed[0].unexpected_keys == []


def test_test_command_is_what_the_gate_runs():
    gate = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n 's/\^\\\((.*)\\\)\$/", gate)[1]
    assert len(re.findall("^" + pattern + "$", README, re.M)) == 1
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_tags_and_table_name_each_other():
    rows = set(re.findall(r"^\| ([SRDB]\d+) \|", README, re.M))
    tagged = set()
    for path, source in SOURCES.items():
        for kind, rest in re.findall(r"(OFFICIAL|DEVIATION|AMBIGUOUS): ?(?=(.{0,40}))", source):
            ids = re.match(r"((?:[SRDB]\d+)(?:, [SRDB]\d+)*)", rest)
            assert ids or "tag" in rest or path.name in METHODS and "released" in rest, f"{path.name}: {kind}: {rest}"
            tagged |= set(ids[1].split(", ")) if ids else set()
    assert tagged == rows, f"only in code {tagged - rows}, only in README {rows - tagged}"


def test_every_equation_of_the_paper_has_its_tag():
    source = SOURCES[ROOT / "setsim.py"]
    for number in range(1, 10):
        assert re.search(rf"PAPER:[^\n]*Eq\. {number}\b", source) or re.search(
            rf"PAPER: Eqs?\. [\d-]*{number}\b", source
        ), number


@pytest.mark.parametrize("script", METHODS)
def test_no_dead_flags(script):
    """Every flag is read somewhere after parsing (in the script, not only in its checks)."""
    source = SOURCES[ROOT / script]
    after = source[source.index("# Views:") :]
    parser_source = source[: source.index("# Views:")]
    names = [name[2:].replace("-", "_") for name in re.findall(r'flag\("(--[a-z-]+)"', parser_source)]
    assert 25 <= len(names) <= 36
    for name in names:
        assert f"args.{name}" in after, name


@pytest.mark.parametrize("script", METHODS)
def test_help_says_something_about_every_flag(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    seen = []
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: seen.append(self) or original(self, *a))
    setsim.get_args(["--demo"])
    for action in seen[0]._actions:
        assert action.help and len(action.help) > 8, action.option_strings


@pytest.mark.parametrize("script", METHODS)
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
