# SPDX-License-Identifier: MIT
"""Pre-trained weights for detectron2: the backbone of any checkpoint, and its feature pyramid.

    python -m tools.to_detectron2 runs/setsim/resnet50.pth setsim.pkl
    python -m tools.to_detectron2 runs/resim/resnet50.pth resim.pkl --fpn runs/resim/fpn.pth
    python -m tools.to_detectron2 resim.pth.tar resim.pkl                     a released file, its pyramid with it

Classifier, heads, queues and the key network are left out. docs/probes-tools.md lists the settings that detectron2 needs.
Its log says which parameters it did not match; these start at random.
"""

import argparse
import io
import os
import pickle
import re

import numpy as np
import torch
from torchvision.ops import FeaturePyramidNetwork

import common
import harness.run
from common import UserError
from harness import weights

RENAMED = [  # torchvision's names, and detectron2's
    (r"^(conv1|bn1)\.", r"stem.\1."), *((rf"^layer{i}\.", f"res{i + 1}.") for i in (1, 2, 3, 4)),
    (r"\bbn(\d)", r"conv\1.norm"), (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"),
    *((rf"inner_blocks\.{i}\.", f"fpn_lateral{i + 2}.") for i in range(4)),
    *((rf"layer_blocks\.{i}\.", f"fpn_output{i + 2}.") for i in range(4)),
    (r"^(fpn_\w+)\.0", r"\1"), (r"^(fpn_\w+)\.1", r"\1.norm"),
]  # fmt: skip


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m tools.to_detectron2", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("file", metavar="FILE", help="a checkpoint with a ResNet in it, or 'imagenet' for torchvision's supervised weights")
    flag("out", metavar="OUT.pkl", help="the file to write, for detectron2's MODEL.WEIGHTS")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="the ResNet in FILE")
    flag("--fpn", metavar="FILE", help="take the pyramid from this file (fpn.pth of resim.py), not from FILE")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.out.endswith(".pkl"):
        raise UserError(f"{args.out}: the name has to end in .pkl, or detectron2 takes the file for something else")
    return args


def detectron2_name(name):
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight, inner_blocks.0.0.bias -> fpn_lateral2.bias, and so on."""
    for pattern, theirs in RENAMED:
        name = re.sub(pattern, theirs, name)
    return name


def to_pickle(tensors):
    """detectron2's file as bytes: {name: tensor} as float32 arrays, and the note that it matches names by their ends.

    Arrays are stored as calls of numpy.ndarray, which every version of NumPy has; by default the file of NumPy 2 names
    a module that NumPy before 1.26, still found beside detectron2, cannot open.
    """

    def plain(array):
        return np.ndarray, (array.shape, "<f4", bytearray(array.astype("<f4").tobytes()))

    arrays = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    pickler = pickle.Pickler(buffer := io.BytesIO(), protocol=4)
    pickler.dispatch_table = {np.ndarray: plain}
    pickler.dump({"model": arrays, "__author__": "tools/to_detectron2.py", "matching_heuristics": True})
    return buffer.getvalue()


def main(argv=None):
    args = get_args(argv)
    state, line = weights.load_backbone(args.file, args.arch)
    print(line, flush=True)
    with torch.device("meta"):
        widths = common.ResNetTrunk(args.arch).widths
        plain, norms = (FeaturePyramidNetwork(widths, 256, norm_layer=norm) for norm in (None, torch.nn.BatchNorm2d))
    source, fpn = args.fpn or args.file, {}
    if source != "imagenet":
        fpn, _ = weights.fpn_tensors(source, plain.state_dict() | norms.state_dict())
    if args.fpn and not fpn:
        raise UserError(f"--fpn {args.fpn}: there is no pyramid in it: give fpn.pth of resim.py")
    beside = os.path.join(os.path.dirname(args.file), "fpn.pth")
    if not fpn and os.path.exists(beside):
        print(f"{beside} is there and was not taken: add --fpn {beside}", flush=True)
    found = {detectron2_name(name): x for name, x in (state | fpn).items() if not name.endswith("num_batches_tracked")}
    weights.write_atomically(args.out, [to_pickle(found)])
    print(f"{args.out}: {len(found)} tensors: {' '.join(sorted({name.split('.')[0] for name in found}))}", flush=True)


if __name__ == "__main__":
    harness.run.main(main)
