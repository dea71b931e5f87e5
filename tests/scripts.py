# SPDX-License-Identifier: MIT
"""The six runs: how each is started on conftest.photos, and what it leaves. A run has six steps of six images, or five."""

import importlib
from typing import NamedTuple


class Script(NamedTuple):
    """A row of the table."""

    job: str  # the function that the file's last line runs
    flags: str  # {data}: see conftest.photos
    exports: dict  # files for others: {name: where their tensors stand in the checkpoint's model}
    files: str  # what else is left beside checkpoint.pth, log.jsonl and curves.png
    values: str  # what each line of the log has beside `TIMES`
    init: tuple  # the flag of the first weights; where the ResNet then stands in the checkpoint's model
    other: str  # a setting that makes another run
    named: str  # how it is refused


ALL = "--arch resnet18 --batch-size 6 --workers 0 --print-freq 1"
METHOD = f"{ALL} --data {{data}}/images --size 64 --epochs 3 --lr 0.1 --queue-size 20"
CUSTOM = f"{ALL} --task custom --images {{data}}/images --iterations 2"
BACKBONE, TWICE = {"resnet18.pth": "query.trunk."}, ("--init", "query.trunk.", "key.trunk.")
LEVELS = "{0}_p4 {0}_p3"
SCRIPTS = {
    "setsim": Script(
        "train", METHOD, BACKBONE, "matches_start.png matches_end.png",
        "loss_image loss_set loss_chance std_image std_dense std_spread positives rows empty", TWICE,
        "--set 0.6", "set '0.7' -> '0.6'",
    ),
    "resim": Script(
        "train", f"{METHOD} --window 16 16", BACKBONE | {"fpn.pth": "query.pyramid."}, "regions_start.png regions_end.png",
        "loss_image loss_chance std_image std_spread "
        + " ".join(LEVELS.format(name) for name in ("loss", "chance", "valid", "empty", "std", "spread")), TWICE,
        "--window 16 24", "window [16, 16] -> [16, 24]",
    ),
    "d3ssl": Script(
        "train", f"{METHOD} --proposals {{data}}/boxes", BACKBONE, "regions_start.png regions_end.png",
        "loss_dc loss_dp loss_chance std std_spread proposals empty shift stuck", TWICE,
        "--augment rbj prc", "augment ['prc', 'prm', 'rbj'] -> ['prc', 'rbj']",
    ),
    "transfer_det": Script(
        "job", f"{CUSTOM} --train-json {{data}}/train.json --val-json {{data}}/val.json --model c4 --short-sides 64 72 "
        "--test-side 64 --precise-bn 2", {"detector.pth": ""}, "predictions.png results.jsonl",
        "loss_objectness loss_rpn_box_reg loss_class loss_box loss_mask foreground", ("--weights", "backbone."),
        "--freeze-at 1", "freeze_at 0 -> 1",
    ),
    "transfer_seg": Script(
        "job", f"{CUSTOM} --masks {{data}}/masks --crop 64 --resize 128x64", {"segmenter.pth": ""},
        "predictions.png results.jsonl", "loss_head loss_auxiliary accuracy", ("--weights", "backbone."),
        "--linear-probe", "linear_probe False -> True",
    ),
    "probes.linear": Script(
        "job", f"{ALL} --data {{data}}/images --size 32 --epochs 3 --lr 0.1 --weights random", {"fc.pth": ""},
        "results.json", "top1 top5", ("--weights",), "--preset moco", "preset 'setsim' -> 'moco'",
    ),
}  # fmt: skip
METHODS, TRANSFERS = ["setsim", "resim", "d3ssl"], ["transfer_det", "transfer_seg"]
TIMES = "step epoch lr loss images_per_s data_share bad_images"


def job(name):
    return getattr(importlib.import_module(name), SCRIPTS[name].job)


def flags_of(name, data, folder, *flags):
    return [*SCRIPTS[name].flags.format(data=data).split(), "--output-dir", str(folder), *map(str, flags)]


def train(name, data, folder, *flags):
    """Run a script within this process; importing torch anew takes seconds. Of equal flags the last one counts."""
    job(name)(flags_of(name, data, folder, *flags))
