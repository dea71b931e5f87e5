# SPDX-License-Identifier: MIT
"""ReSim-FPN checkpoints in the layout of the released code (Tete-Xiao/ReSim b6a36ee), and back.

    python -m tools.released runs/resim/checkpoint.pth --out released.pth      of a run with --preset official
    python -m tools.released released.pth --out resim_fpn.pth                  backbone and pyramid of a released file

The first writes {"state_dict": ...} with both networks and the queue. The second writes the query network's weights as
`backbone.body.*` and `backbone.fpn.*`. torchvision's FPN detectors load them with strict=False, resim.py takes the
backbone by --init, and transfer_det.py the pyramid by --fpn-weights.
"""

import argparse

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


def from_released(state, names):
    """The tensors `names` (ours) of a ReSim with --preset official from a released checkpoint's state_dict.

    Errors:
        KeyError: the released name of a tensor that is not there.
    """
    found = {name: state[released_name(name)] for name in names}
    return {name: tensor.T if name == "image_queue.vectors" else tensor for name, tensor in found.items()}


def detector_weights(state, arch):
    """Backbone and pyramid of the query network in a released state_dict, under the names of torchvision's detectors.

    Errors:
        KeyError, as from_released. RuntimeError: a tensor of another shape than that of `arch`.
    """
    encoder = resim.Encoder(arch, resim.LEVELS["fpn"], official=True)
    found = from_released(state, [f"query.{name}" for name in encoder.state_dict()])
    encoder.load_state_dict({name.removeprefix("query."): tensor for name, tensor in found.items()})
    parts = {"backbone.body": encoder.trunk, "backbone.fpn": encoder.pyramid}
    return {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}


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
        state = found.get("state_dict", found) if isinstance(found, dict) else {}
        try:
            written = detector_weights(state if isinstance(state, dict) else {}, args.arch)
        except KeyError as error:
            lacking = f"{args.file}: {error.args[0]} is missing"
            raise UserError(f"{lacking}, so this is not a released checkpoint of --arch {args.arch}") from None
        except RuntimeError as error:
            raise UserError(f"{args.file}: check --arch ({' '.join(str(error).split())[:200]})") from None
    weights.save_atomically(written, args.out)
    print(f"{args.out}: {len(written.get('state_dict', written))} tensors", flush=True)


if __name__ == "__main__":
    harness.run.main(main)
