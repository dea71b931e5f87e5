# SPDX-License-Identifier: MIT
"""Pre-trained weights for detectron2: the backbone of any checkpoint, and the convolutions of its feature pyramid.

    python -m tools.to_detectron2 runs/setsim/resnet50.pth setsim.pkl
    python -m tools.to_detectron2 runs/resim/resnet50.pth resim.pkl --fpn runs/resim/fpn.pth
    python -m tools.to_detectron2 resim.pth.tar resim.pkl                     a released file, its pyramid with it

Read is whatever `harness.weights.load_backbone` reads. Written is detectron2's pickle: {"model": {name: float32 array},
"__author__": ..., "matching_heuristics": True}, where names are matched by their ends:
    conv1, bn1                stem.conv1, stem.conv1.norm
    layer1 .. layer4          res2 .. res5
    convK, bnK                convK, convK.norm
    downsample.0, .1          shortcut, shortcut.norm
    laterals of C2 .. C5      fpn_lateral2 .. fpn_lateral5
    outputs of P2 .. P5       fpn_output2 .. fpn_output5, their norms fpn_output2.norm, ...
Running statistics are kept. The classifier, projectors, predictors, queues, the key network and the batch counters
(num_batches_tracked) are left out. Biases of a pyramid find no place in a detector whose pyramid has norms
(MODEL.FPN.NORM), and detectron2 then says so.

detectron2's own backbone was trained otherwise, so its settings have to say:
    INPUT.FORMAT RGB
    MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]    MODEL.PIXEL_STD [58.395, 57.12, 57.375]
    MODEL.RESNETS.STRIDE_IN_1X1 False             MODEL.RESNETS.DEPTH (and RES2_OUT_CHANNELS 64 for 18 and 34)
    MODEL.RESNETS.NORM SyncBN                     MODEL.BACKBONE.FREEZE_AT 0
the last line as the papers fine-tune: with the default, frozen statistics, the loss of self-supervised weights may become
not finite at the usual learning rate. For a pyramid with norms MODEL.FPN.NORM SyncBN, too. detectron2's log has to be
read: whatever it does not match starts at random. Opening a pickle may run anything that its
author wanted, so there is no way back from one here.
"""

import argparse
import io
import os
import pickle
import re

import numpy as np
import torch

import common
import harness.run
import harness.weights
from common import UserError

PYRAMID = 256  # channels of a pyramid, detectron2's MODEL.FPN.OUT_CHANNELS
# What the files call the convolutions and norms of a pyramid's level, (number + offset), and what detectron2 does.
LAYERS = (
    (r"module\.encoder_q\.fpn_lateral([2-5])(?:\.0)?", 0, "fpn_lateral{}"),  # released ReSim; with .0 and .1: --fpn-bn
    (r"module\.encoder_q\.fpn_output([2-5])(?:\.0)?", 0, "fpn_output{}"),
    (r"module\.encoder_q\.fpn_lateral([2-5])\.1", 0, "fpn_lateral{}.norm"),
    (r"module\.encoder_q\.fpn_output([2-5])\.1", 0, "fpn_output{}.norm"),
    (r"(?:module\.)?neck\.lateral_convs\.([0-3])\.conv", 2, "fpn_lateral{}"),  # released SoCo
    (r"(?:module\.)?neck\.fpn_convs\.([0-3])\.conv", 2, "fpn_output{}"),
    (r"(?:module\.)?neck\.lateral_convs\.([0-3])\.bn", 2, "fpn_lateral{}.norm"),
    (r"(?:module\.)?neck\.fpn_convs\.([0-3])\.bn", 2, "fpn_output{}.norm"),
    (r"(?:query\.pyramid\.|backbone\.fpn\.)?inner_blocks\.([0-3])\.0", 2, "fpn_lateral{}"),  # resim.py; detector.pth
    (r"(?:query\.pyramid\.|backbone\.fpn\.)?layer_blocks\.([0-3])\.0", 2, "fpn_output{}"),
    (r"backbone\.fpn\.inner_blocks\.([0-3])\.1", 2, "fpn_lateral{}.norm"),
    (r"backbone\.fpn\.layer_blocks\.([0-3])\.1", 2, "fpn_output{}.norm"),
)
KINDS = r"\.(weight|bias|running_mean|running_var)"


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m tools.to_detectron2", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("file", metavar="FILE", help="a checkpoint with a ResNet in it, or 'imagenet' for torchvision's supervised weights")
    flag("out", metavar="OUT.pkl", help="the file to write, for detectron2's MODEL.WEIGHTS")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="the ResNet in FILE")
    flag("--fpn", metavar="FILE", help="take the pyramid's convolutions from this file (fpn.pth of resim.py), not from FILE")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.out.endswith(".pkl"):
        raise UserError(f"{args.out}: the name has to end in .pkl, or detectron2 takes the file for something else")
    return args


def detectron2_name(name):
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight, and so on: torchvision's name of a backbone's tensor."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def pyramid(state):
    """The convolutions (and norms) of a feature pyramid in {name: tensor}: {detectron2's name: tensor}, {} if there are none."""
    found = {}
    for pattern, offset, theirs in LAYERS:
        for name, tensor in state.items():
            match = re.fullmatch(pattern + KINDS, str(name))
            if match and isinstance(tensor, torch.Tensor):
                found[f"{theirs.format(int(match[1]) + offset)}.{match[2]}"] = tensor
    return found


def check_pyramid(found, widths, source):
    """Require the shapes that detectron2 has over C2..C5 of `widths` channels; elsewhere it would only warn.

    Errors:
        UserError: another shape, or values that are not finite.
    """
    for name, tensor in found.items():
        level = int(re.search(r"\d", name)[0])
        inputs = [widths[level - 2], 1, 1] if name.startswith("fpn_lateral") else [PYRAMID, 3, 3]
        wanted = [PYRAMID] if name.endswith("bias") or ".norm." in name else [PYRAMID, *inputs]
        if list(tensor.shape) != wanted:
            raise UserError(
                f"{source}: {name} is {tuple(tensor.shape)}, wanted {tuple(wanted)}: check --arch and --fpn"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{source}: {name} is not finite")


def read_pyramid(source, widths):
    """The convolutions of a feature pyramid in a file, bare or in a `state_dict` or `model`: as `pyramid`.

    Errors:
        UserError: not a checkpoint; see check_pyramid.
    """
    state = harness.weights.load_checkpoint_file(source)
    for container in ("state_dict", "model", "model_ema"):
        if isinstance(state, dict) and isinstance(state.get(container), dict):
            state = state[container]
    found = pyramid(state) if isinstance(state, dict) else {}
    check_pyramid(found, widths, source)
    return found


def to_pickle(tensors):
    """detectron2's file as bytes: {name: tensor} as float32 arrays, and the note that names are to be matched.

    Arrays are stored as calls of numpy.ndarray, which every version of NumPy has; by default the file of NumPy 2 names
    a module that NumPy before 1.26, still found beside detectron2, cannot open.
    """

    def plain(array):
        return np.ndarray, (array.shape, "<f4", bytearray(array.astype("<f4").tobytes()))

    arrays = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    content = {"model": arrays, "__author__": "tools/to_detectron2.py", "matching_heuristics": True}
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    pickler.dispatch_table = {np.ndarray: plain}
    pickler.dump(content)
    return buffer.getvalue()


def main(argv=None):
    args = get_args(argv)
    state, line = harness.weights.load_backbone(args.file, args.arch)
    print(line, flush=True)
    backbone = {
        detectron2_name(name): tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
    with torch.device("meta"):
        widths = common.ResNetTrunk(args.arch).widths
    source = args.fpn or args.file
    fpn = {} if source == "imagenet" else read_pyramid(source, widths)
    if args.fpn and not fpn:
        raise UserError(f"--fpn {args.fpn}: no convolutions of a pyramid in it: give fpn.pth of resim.py")
    modules = sorted({name.split(".")[0] for name in fpn})
    print(f"pyramid: {len(fpn)} tensors from {source}: {' '.join(modules)}" if fpn else "pyramid: none", flush=True)
    beside = os.path.join(os.path.dirname(args.file), "fpn.pth")
    if not fpn and os.path.exists(beside):
        print(f"{beside} is there and was not taken: add --fpn {beside}", flush=True)
    harness.weights.write_atomically(args.out, [to_pickle(backbone | fpn)])
    depth = int(args.arch.removeprefix("resnet"))
    narrow = ", MODEL.RESNETS.RES2_OUT_CHANNELS 64" if depth < 50 else ""
    print(
        f"{args.out}: {len(backbone) + len(fpn)} tensors; left out: {len(state) - len(backbone)} batch counters, and all "
        "that is neither backbone nor pyramid. Set, as on top of tools/to_detectron2.py, INPUT.FORMAT RGB, MODEL.PIXEL_MEAN, "
        f"MODEL.PIXEL_STD, MODEL.RESNETS.STRIDE_IN_1X1 False, MODEL.RESNETS.DEPTH {depth}{narrow}, MODEL.RESNETS.NORM SyncBN, "
        "MODEL.BACKBONE.FREEZE_AT 0",
        flush=True,
    )


if __name__ == "__main__":
    harness.run.main(main)
