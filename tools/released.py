# SPDX-License-Identifier: MIT
"""ReSim-FPN checkpoints in the layout of the released code (Tete-Xiao/ReSim b6a36ee), and back.

    python -m tools.released runs/resim/checkpoint.pth --out released.pth      of a run with --preset official
    python -m tools.released released.pth --out resim_fpn.pth                  backbone and pyramid of a released file

The first writes {"state_dict": ...} with both networks and the queue. The second writes the query network's weights as
`backbone.body.*` and `backbone.fpn.*`. torchvision's FPN detectors load them with strict=False, resim.py takes the
backbone by --init, and transfer_det.py the pyramid by --fpn-weights.
"""

import argparse

import torch

import common
import harness.run
import resim
from common import UserError
from harness import weights

# Ours with --preset official: what the released code calls it.
RELEASED = {
    "query.": "module.encoder_q.", "key.": "module.encoder_k.", "trunk.": "", "image_head.": "fc.",
    **{f"pyramid.inner_blocks.{i}.0": f"fpn_lateral{i + 2}" for i in (1, 2, 3)},
    **{f"pyramid.layer_blocks.{i}.0": f"fpn_output{i + 2}" for i in (1, 2)},
    "image_queue.vectors": "module.queue", "image_queue.pointer": "module.queue_ptr",
}  # fmt: skip


def released_name(name):
    """query.pyramid.inner_blocks.2.0.weight -> module.encoder_q.fpn_lateral4.weight, and so on."""
    for ours, theirs in RELEASED.items():
        name = name.replace(ours, theirs)
    return name


def to_released(state):
    """The state_dict of a released checkpoint from that of a ReSim with --preset official."""
    return {
        released_name(name): tensor.T if name == "image_queue.vectors" else tensor for name, tensor in state.items()
    }


def detector_weights(file, arch):
    """Backbone and pyramid of the query network in a released file, under the names of torchvision's detectors.

    Errors:
        UserError: not a checkpoint, or a tensor is missing or of another shape than that of `arch`.
    """
    backbone, _ = weights.load_backbone(file, arch)
    with torch.device("meta"):
        wanted = resim.Encoder(arch, resim.LEVELS["fpn"], official=True).pyramid.state_dict()
    pyramid, _ = weights.fpn_tensors(file, wanted)
    if wanted.keys() - pyramid.keys():
        raise UserError(f"{file}: {min(wanted.keys() - pyramid.keys())} is missing, so this is no released ReSim-FPN")
    parts = {"backbone.body": backbone, "backbone.fpn": pyramid}
    return {f"{part}.{name}": x for part, state in parts.items() for name, x in state.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.released", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", help="checkpoint.pth of resim.py --preset official, or a released file")
    parser.add_argument("--out", metavar="OUT", required=True, help="the file to write")
    parser.add_argument("--arch", default="resnet50", choices=common.ARCHS, help="the ResNet in a released file")
    args = parser.parse_args(argv)
    found = weights.load_checkpoint_file(args.file)
    if isinstance(found, dict) and found.get("script") == "resim":
        if found.get("settings", {}).get("preset") != "official":
            raise UserError(f"{args.file}: not a run with --preset official, so the released code has no place for it")
        written = {"state_dict": to_released(found["model"])}
    else:
        written = detector_weights(args.file, args.arch)
    weights.save_atomically(written, args.out)
    print(f"{args.out}: {len(written.get('state_dict', written))} tensors", flush=True)


if __name__ == "__main__":
    harness.run.main(main)
