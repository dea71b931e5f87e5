# SPDX-License-Identifier: MIT
"""What processes under torchrun do in test_runs.py.

several.py all FOLDER PHOTOS                       run_all
several.py RANK FOLDER setsim.py --data ...        a script; the process of this rank is killed once, when its log has four lines
"""

import importlib
import os
import pathlib
import runpy
import shutil
import sys
import threading
import time

import pytest
import torch
import torchvision
from scripts import METHODS, SCRIPTS, TRANSFERS, train
from tiny import TinyResNet

import common
from harness import pictures
from harness.run import Run, agree

SHARED = {  # a run that several processes share: script and flags
    "setsim": "setsim --symmetric --geometry 0.5",
    "resim official": "resim --preset official",
    **{name: name for name in SCRIPTS if name != "setsim"},
}


class FirstOnes:
    """In place of torchvision's sampler of anchors and boxes: the first positive and 15 negatives of each image."""

    def __init__(self, count, share):
        self.batch_size_per_image = 16

    def __call__(self, matched):
        masks = []
        for labels in matched:
            found = [labels >= 1, labels == 0]
            masks.append([mask & (mask.cumsum(0) <= most) for mask, most in zip(found, (1, 15), strict=True)])
        return [list(mask) for mask in zip(*masks, strict=True)]


def run_all(folder, photos):
    """Run scripts, under torchrun or alone, so that nothing depends on which of 12 images share a process; copy what is
    there after the first step.

    Groups are of two images, the methods compute in double precision, as rounding would hide small differences. The
    transfer scripts' batch norms use running statistics: those of the batch are not synchronised on CPUs. Dropout is off,
    and samples are not drawn.
    """
    number, size, _ = common.start_processes()
    assert (number, size) == (common.rank(), common.processes()) and agree(number, 1) == [sum(range(size)), size]
    x, permutation = torch.arange(12.0).view(12, 1), torch.randperm(12, generator=common.generator("p"))
    mine = x.chunk(size)[number]
    dealt = common.shuffle(mine, permutation)
    assert torch.equal(common.all_gather(mine), x) and torch.equal(common.all_gather(dealt), x[permutation])
    assert torch.equal(common.unshuffle(dealt, permutation), mine)
    save, steps, normalise = Run.save, Run.steps, common.normalise

    def frozen(module, x):
        return torch.nn.functional.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)

    def save_and_copy(run):
        save(run)
        if run.rank == 0 and run.step == 1:
            shutil.copytree(run.args.output_dir, f"{run.args.output_dir} first")

    def double(x):
        return x.double() if x.is_floating_point() else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save_and_copy)
        patch.setattr(Run, "measure", lambda *_: None)
        patch.setattr(pictures, "draw_curves", lambda *_: None)
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(torchvision.models, "resnet18", TinyResNet)
        train("setsim", photos, folder / "whole")  # plainly
        patch.setattr(common, "GROUP", 2)
        patch.setattr(torch.nn.functional, "dropout2d", lambda x, *_: x)
        patch.setattr("torchvision.models.detection._utils.BalancedPositiveNegativeSampler", FirstOnes)
        for label, line in SHARED.items():
            name, *flags = line.split()
            with pytest.MonkeyPatch.context() as more:
                if name in METHODS:
                    module = importlib.import_module(name)
                    more.setattr(module, "build", lambda *a, build=module.build: build(*a).double())
                    more.setattr(torch.Tensor, "float", torch.Tensor.double)
                    more.setattr(common, "normalise", lambda images: normalise(images).double())
                    more.setattr(Run, "steps", lambda *a: ([*map(double, batch)] for batch in steps(*a)))
                elif name in TRANSFERS:
                    more.setattr(torch.nn.modules.batchnorm._BatchNorm, "forward", frozen)
                train(name, photos, folder / label, "--save-every", 1, "--batch-size", 12, *flags)
    if size > 1:
        torch.distributed.destroy_process_group()


def die_once(folder):
    """Exit when the log has four lines."""
    log = pathlib.Path(folder, "log.jsonl")
    while not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.01)
    pathlib.Path(folder, "killed").touch()
    os._exit(1)


if __name__ == "__main__":
    what, place, *rest = sys.argv[1:]
    if what == "all":
        run_all(pathlib.Path(place), rest[0])
        sys.exit()
    if os.environ["RANK"] == what and not os.path.exists(f"{place}/killed"):
        threading.Thread(target=die_once, args=[place], daemon=True).start()
    sys.argv[1:] = rest
    runpy.run_path(os.path.join(os.path.dirname(__file__), "tiny.py"), run_name="__main__")
