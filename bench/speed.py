# SPDX-License-Identifier: MIT
"""Speed and memory, as ratios taken side by side in one run: the candidates in turn, medians over --repeat rounds.

python -m bench.speed set-loss      setsim.py's set loss against every row x every key in one tensor
python -m bench.speed setsim        a whole iteration of SetSim against plain MoCo-v2 on the same encoder
python -m bench.speed resim         the same for ReSim-C4 and ReSim-FPN, beside the heads' share of multiply-adds
python -m bench.speed prroi         resim.py's Precise RoI Pooling against torchvision's RoIAlign, forward and backward
python -m bench.speed d3ssl         what d3ssl.py's region-level augmentations and composition cost beside an iteration
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align

import common
import d3ssl
import resim
import setsim


def compare(title, candidates, repeat):
    """Print medians and ranges over rounds of what each candidate takes, and of its ratio to the first one.

    candidates: {name: function}, called in turn; the first round warms up. A dict that is returned has other measures,
    or seconds that count instead.
    """
    rounds = []
    for _ in range(repeat + 1):
        rounds.append({})
        for name, run in candidates.items():
            started = time.perf_counter()
            found = run()
            seconds = {"seconds": time.perf_counter() - started}
            rounds[-1][name] = seconds | (found if isinstance(found, dict) else {})
    for name, measures in rounds[-1].items():
        for what in measures:
            values = [r[name][what] for r in rounds[1:]]
            ratios = [r[name][what] / next(iter(r.values()))[what] for r in rounds[1:]]
            texts = [f"{statistics.median(x):.4g} ({min(x):.4g} to {max(x):.4g})" for x in (values, ratios)]
            print(f"{title}, {name}: {what} {texts[0]}, ratio {texts[1]}, n {repeat}", flush=True)


def dense_set_loss(p_q, p_k, positives, queue, temperature):
    """Eq. 8 as it is written: all B x S x K logits at once, masks for the rows without positives."""
    logits = torch.einsum("bid,bjd->bij", p_q, p_k) / temperature
    negatives = torch.einsum("bid,kd->bik", p_q, queue) / temperature  # (B, S, K)
    denominator = (logits.exp() * positives).sum(2) + negatives.exp().sum(2)
    count = positives.sum(2)
    row = -((logits - denominator.log()[:, :, None]) * positives).sum(2) / count.clamp(min=1)
    return (row.sum(1) / (count > 0).sum(1).clamp(min=1)).mean()


LOSSES = {"ours": setsim.set_contrastive_loss, "dense": dense_set_loss}


def one_set_loss(which):
    """Forward and backward of unit vectors and sets that hold about 30 % of the cells, as they do early in training."""
    rng = torch.Generator().manual_seed(0)
    p_q, p_k = F.normalize(torch.randn(2, 32, 49, 128, generator=rng), dim=3)
    set_q, set_k = torch.rand(2, 32, 49, generator=rng) < 0.3
    queue = F.normalize(torch.randn(65536, 128, generator=rng), dim=1)
    positives, before = set_q[:, :, None] & set_k[:, None, :], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    LOSSES[which](p_q.requires_grad_(), p_k, positives, queue, 0.2).backward()
    seconds = time.perf_counter() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "MB beyond the inputs": memory, "gradient": p_q.grad.norm().item()}


def set_loss(args):
    """Each time in a fresh process, because a process remembers its highest memory."""

    def run(which):
        command = [sys.executable, "-m", "bench.speed", "set-loss", "--only", which]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    compare("set loss", {which: lambda which=which: run(which) for which in LOSSES}, args.repeat)


VARIANTS = {  # name: script, flags; each against the first
    "setsim": {
        "MoCo-v2": (setsim, "--loss-weight 0"), "SetSim": (setsim, ""), "SetSim + Geo": (setsim, "--geometry 0.5"),
    },
    "resim": {
        "MoCo-v2": (setsim, "--loss-weight 0"), "ReSim-C4": (resim, "--levels c4"), "ReSim-FPN": (resim, ""),
        "official FPN": (resim, "--preset official"),
    },
}  # fmt: skip


def crops(batch, size):
    """(2, batch, 4): two random crops each of images of 1.5 times the views' size, in pixels."""
    image, boxes = torch.empty(3, size * 3 // 2, size * 3 // 2), []
    with common.drawing("bench"):
        for _ in range(2 * batch):
            top, left, h, w = setsim.transforms.RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))
            boxes.append([left, top, left + w, top + h])
    return torch.tensor(boxes, dtype=torch.float32).view(2, batch, 4)


def iteration(script, flags, args, *batch):
    """Forward, backward and step of a method on a batch, as a function; and the method."""
    flags = f"--data x --arch {args.arch} --size {args.size} --batch-size {args.batch} {flags}"
    method = script.build(script.get_args(flags.split()), torch.device("cpu"))
    optimizer = torch.optim.SGD(method.query.parameters(), 0.01, momentum=0.9)

    def step():
        loss, _ = method(method.query, *batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, method


def iterations(args):
    """Forward, backward and step of each variant, on random views; multiply-adds of one view's forward pass."""
    views = torch.randint(0, 256, (2, args.batch, 3, args.size, args.size), dtype=torch.uint8)
    batch, candidates = (*views, *crops(args.batch, args.size)), {}
    for name, (script, flags) in VARIANTS[args.what].items():
        run, _ = iteration(script, flags, args, *batch)
        _, method = iteration(script, flags, args)
        with FlopCounterMode(display=False) as counter:  # on a copy without storage
            method.query.to("meta").encode(torch.zeros(2, *views.shape[2:], dtype=torch.uint8, device="meta"))
        work = {"multiply-adds": counter.get_total_flops() / 4}
        candidates[name] = lambda run=run, work=work: run() or work
    compare(f"batch {args.batch}, {args.arch}, {args.size} pixels, fp32", candidates, args.repeat)


def regions(args):
    """An iteration beside region-level augmentations (one core, all views) and composing x3, normalised, of a batch.

    D3SSL adds what augmentations and composing take, less what normalising takes.
    """
    size, batch = args.size, args.batch
    corner = torch.rand(batch, 20, 2) * size / 2
    proposals = torch.cat([corner, corner + size / 8 + torch.rand(batch, 20, 2) * size / 4], 2)
    items = [(Image.new("RGB", (size, size)), boxes) for boxes in proposals]
    views = torch.randint(0, 256, (2, batch, 3, size, size), dtype=torch.uint8)
    d3ssl.distorted_view = lambda image, crop, size: (views[0, 0], False)  # any method distorts its views

    def augment():
        with common.drawing("bench"):
            drawn = [d3ssl.draw_views(item, size, ["prc", "prm", "rbj"]) for item in items]
        return d3ssl.Drawn(*(torch.stack(field) for field in zip(*drawn, strict=True)))

    drawn, others = augment()._replace(view_1=views[0], view_2=views[1]), d3ssl.other_images(batch, 32, 0.5)
    candidates = {
        "iteration": iteration(d3ssl, "--proposals x", args, drawn)[0],
        "augment": augment,
        "compose": lambda: d3ssl.network_inputs(drawn, others),
        "normalise": lambda: [common.normalise(view) for view in views],  # that much any method does
    }
    compare(f"batch {batch}, {args.arch}, {size} pixels, fp32", candidates, args.repeat)


def prroi(args):
    """32 images, all windows of each level's views at their places in the key views; 128 channels, as in training."""
    for name, side, stride, window, step in (("C4, P4", 14, 16, 48, 32), ("P3", 28, 8, 32, 24)):
        feature = torch.randn(32, 128, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        boxes = resim.region_pairs(*crops(32, 224), 224, window, step).boxes_k
        pools = {
            "prroi_pool": lambda f=feature, b=boxes, s=stride: resim.prroi_pool(f, b, 1, 1 / s),
            "roi_align": lambda f=feature, b=boxes, s=stride: roi_align(f, list(b), 1, 1 / s, aligned=True),
        }
        title = f"{name}, {len(boxes)} x {len(boxes[0])} boxes"
        compare(f"{title}, forward", pools, args.repeat)
        both = {which: lambda pool=pool: pool().square().sum().backward() for which, pool in pools.items()}
        compare(f"{title}, forward and backward", both, args.repeat)


CASES = {"set-loss": set_loss, "setsim": iterations, "resim": iterations, "prroi": prroi, "d3ssl": regions}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--repeat", type=common.number(int, 1), default=5, help="rounds")
    parser.add_argument("--arch", default="resnet50", choices=common.ARCHS, help="of an iteration")
    parser.add_argument("--size", type=int, default=224, help="of an iteration: side of a view")
    parser.add_argument("--batch", type=int, default=32, help="of an iteration: images")
    parser.add_argument("--only", choices=LOSSES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.only:
        print(json.dumps(one_set_loss(args.only)))
    else:
        CASES[args.what](args)


if __name__ == "__main__":
    main()
