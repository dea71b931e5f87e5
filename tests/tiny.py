# SPDX-License-Identifier: MIT
"""A ResNet that takes milliseconds, in place of torchvision's resnet18. Its tensors have the same names.

python tests/tiny.py setsim.py --data DIR ...      a script on it, as its user starts it
"""

import pathlib
import runpy
import sys

import torch
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet


class TinyResNet(ResNet):
    """One block a stage, C2 to C5 have 16 to 128 channels: a fortieth of ResNet-18's weights."""

    def __init__(self, weights=None, **settings):
        super().__init__(BasicBlock, [1, 1, 1, 1], **settings)
        self.fc = torch.nn.Linear(128, 1000)

    def _make_layer(self, block, planes, *settings, **more):
        return super()._make_layer(block, planes // 4, *settings, **more)


if __name__ == "__main__":
    root = pathlib.Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    del sys.argv[0]
    torchvision.models.resnet18 = TinyResNet
    sys.modules |= dict.fromkeys(("matplotlib", "tqdm", "cv2"))  # not installed: no script needs them to train
    if sys.argv[0].endswith(".py"):
        runpy.run_path(str(root / sys.argv[0]), run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
