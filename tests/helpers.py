# SPDX-License-Identifier: MIT
"""What several test files use: runs of the scripts as their users would start them, and small folders of images."""

import ast
import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import typing

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

ROOT = pathlib.Path(__file__).resolve().parent.parent


def command(script, *flags, processes=0):
    """What a user types; processes > 0: through torchrun, on a free port."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *launcher, str(ROOT / script), *map(str, flags)]


def run(script, *flags, processes=0, expect=0, env=None):
    """Run a script (with torchrun if `processes`), require its exit code, return stdout + stderr."""
    done = subprocess.run(
        command(script, *flags, processes=processes),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=400,
    )
    text = done.stdout + done.stderr
    assert done.returncode == expect, text
    return text


def signal_after(script, *flags, line, number, processes=0):
    """Start a script, send it a signal once its log holds `line` lines, return (exit code, its output)."""
    folder = pathlib.Path(flags[flags.index("--output-dir") + 1])
    process = subprocess.Popen(
        command(script, *flags, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        log = folder / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= line:
            break
        time.sleep(0.02)
    if processes:
        process.send_signal(number)  # torchrun passes it on to the groups of its workers
    else:
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


@contextlib.contextmanager
def signals_given_back():
    """A run within this process takes SIGTERM and Ctrl-C over."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def keep_signals():
    """Every test gives signals back."""
    with signals_given_back():
        yield


def log_lines(folder):
    return [json.loads(line) for line in (pathlib.Path(folder) / "log.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(pathlib.Path(folder) / "checkpoint.pth")


def assert_same(a, b, path=""):
    """Bitwise equality of nested dicts, lists and tensors."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def write_images(folder, count, size=(40, 48), seed=0):
    """A folder of PNG files of random blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        block = rng.integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(block).resize(size, Image.NEAREST).save(folder / f"{i:04}.png")
    return folder


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def coordinate_image(width=256, height=200):
    """Pixel (x, y) holds its own place: red x / width, green y / height, in 256 steps, by the pixel's centre."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, 0 * x], 2) * 256).astype(np.uint8))


def block_views(count):
    """(2, count, 3, 64, 64) uint8 of random blocks, 16 pixels a side."""
    blocks = torch.randint(0, 256, (2, count, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return blocks.repeat_interleave(16, 3).repeat_interleave(16, 4)


def record_operations(monkeypatch, *others):
    """A list of the colour operations as they happen, and of `others` in TF. All of them leave images as they are."""
    seen = []

    def note(name):
        return lambda image, *_: seen.append(name) or image

    for name in ("rgb_to_grayscale", *others):
        monkeypatch.setattr(transforms.functional, name, note(name))
    monkeypatch.setattr(transforms, "ColorJitter", lambda *strength: note(f"jitter {strength}"))
    monkeypatch.setattr(Image.Image, "filter", lambda image, blur: note(f"blur {0.1 <= blur.radius <= 2}")(image))
    return seen


def refused(capsys, get_args, flags):
    """The one line with which a command line is refused, after "error: "."""
    with pytest.raises(SystemExit) as error:
        get_args(flags.split())
    usage, message = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and usage.startswith("usage: ")
    return message.split(": error: ")[1]


def lifted(script, *names):
    """Execute some top-level definitions of a script on their own, with only libraries in scope. Returns them in order.

    A name that the script does not define is taken from common.py, as the script's own import does.
    """
    import scipy.optimize
    import torch.nn.functional as F
    import torchvision
    from PIL import ImageFilter

    scope = {
        "math": math,
        "dist": torch.distributed,
        "torch": torch,
        "F": F,
        "np": np,
        "nn": torch.nn,
        "transforms": transforms,
        "ops": torchvision.ops,
        "NamedTuple": typing.NamedTuple,
        "partial": functools.partial,
        "TF": transforms.functional,
        "ImageFilter": ImageFilter,
        "linear_sum_assignment": scipy.optimize.linear_sum_assignment,
    }
    for file in ("common.py", script):
        for node in ast.parse((ROOT / file).read_text()).body:
            if defined(node) & {*names}:
                exec(compile(ast.Module([node], []), file, "exec"), scope)
    missing = {*names} - scope.keys()
    assert not missing, f"neither {script} nor common.py defines {missing}"
    return [scope[name] for name in names]


def defined(node):
    """The names that a top-level statement gives: of a function, a class, or constants."""
    if isinstance(node, ast.Assign):
        return {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {getattr(node, "name", None)}
