# SPDX-License-Identifier: MIT
"""Speed and memory, as ratios taken side by side in one run: the two candidates in turn, medians over --repeat rounds.

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


def dense_set_loss(p_q, p_k, positives, queue, temperature):
    """Eq. 8 as it is written: all B x S x K logits at once, masks for the rows without positives."""
    logits = torch.einsum("bid,bjd->bij", p_q, p_k) / temperature
    negatives = torch.einsum("bid,kd->bik", p_q, queue) / temperature  # (B, S, K)
    denominator = (logits.exp() * positives).sum(2) + negatives.exp().sum(2)
    count = positives.sum(2)
    row = -((logits - denominator.log()[:, :, None]) * positives).sum(2) / count.clamp(min=1)
    return (row.sum(1) / (count > 0).sum(1).clamp(min=1)).mean()


def set_loss_case(batch, cells, dim, queue_size):
    """Unit vectors and sets that hold about 30 % of the cells, as they do early in training."""
    rng = torch.Generator().manual_seed(0)
    p_q, p_k = F.normalize(torch.randn(2, batch, cells, dim, generator=rng), dim=3)
    set_q, set_k = torch.rand(2, batch, cells, generator=rng) < 0.3
    queue = F.normalize(torch.randn(queue_size, dim, generator=rng), dim=1)
    return p_q.requires_grad_(), p_k, set_q[:, :, None] & set_k[:, None, :], queue


def one_set_loss(which):
    """In a process of its own: seconds of forward and backward, megabytes beyond the inputs, value, gradient norm."""
    loss = {"ours": setsim.set_contrastive_loss, "dense": dense_set_loss}[which]
    p_q, p_k, positives, queue = set_loss_case(32, 49, 128, 65536)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    value = loss(p_q, p_k, positives, queue, 0.2)
    value.backward()
    seconds = time.perf_counter() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "MB": memory, "value": value.item(), "gradient": p_q.grad.norm().item()}


def set_loss(repeat):
    """Both losses in turn, each time in a fresh process (a process remembers its highest memory)."""
    runs = {"ours": [], "dense": []}
    for _ in range(repeat):
        for which in runs:
            command = [sys.executable, "-m", "bench.speed", "set-loss", "--only", which]
            runs[which].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for which, rounds in runs.items():
        seconds, memory = ([r[key] for r in rounds] for key in ("seconds", "MB"))
        print(
            f"{which:6} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{statistics.median(memory):.0f} MB, value {rounds[0]['value']:.6f}, gradient {rounds[0]['gradient']:.6f}"
        )
    ratios = [d["seconds"] / o["seconds"] for o, d in zip(runs["ours"], runs["dense"], strict=True)]
    print(
        f"dense / ours: {statistics.median(ratios):.1f} times the time ({min(ratios):.1f} to {max(ratios):.1f}), n {repeat}"
    )


VARIANTS = {  # name: script, flags; each against the first
    "setsim": {
        "MoCo-v2": (setsim, "--loss-weight 0"),
        "SetSim": (setsim, ""),
        "SetSim + Geo": (setsim, "--geometry 0.5"),
    },
    "resim": {
        "MoCo-v2": (setsim, "--loss-weight 0"),
        "ReSim-C4": (resim, "--levels c4"),
        "ReSim-FPN": (resim, ""),
        "official FPN": (resim, "--preset official"),
    },
}


def crops(batch, size):
    """(2, batch, 4): two random crops each of images of 1.5 times the views' size, in pixels."""
    image = torch.empty(3, size * 3 // 2, size * 3 // 2)
    boxes = []
    with common.drawing("bench"):
        for _ in range(2 * batch):
            top, left, h, w = setsim.transforms.RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))
            boxes.append([left, top, left + w, top + h])
    return torch.tensor(boxes, dtype=torch.float32).view(2, batch, 4)


def multiply_adds(encoder, size):
    """Of one view's forward pass, counted by PyTorch on a copy without storage."""
    with FlopCounterMode(display=False) as counter:
        encoder.to("meta").encode(torch.zeros(2, 3, size, size, dtype=torch.uint8, device="meta"))
    return counter.get_total_flops() / 4


def iteration(repeat, arch, size, batch, variants):
    """Forward, backward and step of each variant in turn, on random views."""
    steps, shares = {}, {}
    rng = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (2, batch, 3, size, size), generator=rng, dtype=torch.uint8)
    places = crops(batch, size)
    for name, (script, flags) in variants.items():
        args = script.get_args(
            f"--data x --arch {arch} --size {size} --batch-size {batch} {flags}".split()
        )
        shares[name] = multiply_adds(script.build(args, torch.device("cpu")).query, size)
        method = script.build(args, torch.device("cpu"))
        optimizer = torch.optim.SGD(method.query.parameters(), 0.01, momentum=0.9)

        def step(method=method, optimizer=optimizer):
            started = time.perf_counter()
            loss, _ = method(method.query, views[0], views[1], *places, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return time.perf_counter() - started

        steps[name] = step
        step()
    seconds = {name: [] for name in variants}
    for _ in range(repeat):
        for name, step in steps.items():
            seconds[name].append(step())
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["MoCo-v2"], strict=True)]
        print(
            f"{name:13} {statistics.median(values):.2f} s an iteration, {statistics.median(ratios):.3f} of MoCo-v2's "
            f"({min(ratios):.3f} to {max(ratios):.3f}), multiply-adds {shares[name] / shares['MoCo-v2']:.3f}; "
            f"n {repeat}, batch {batch}, {arch}, {size} pixels, fp32"
        )


def prroi(repeat):
    """32 images, all windows of each level's views at their places in the key views; 128 channels, as in training."""
    for name, side, stride, window, step in (("C4, P4", 14, 16, 48, 32), ("P3", 28, 8, 32, 24)):
        feature = torch.randn(32, 128, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        boxes = resim.region_pairs(*crops(32, 224), 224, window, step).boxes_k

        def run(pool, feature=feature, boxes=boxes, stride=stride):
            started = time.perf_counter()
            pooled = pool(feature, boxes, stride)
            forward = time.perf_counter() - started
            pooled.square().sum().backward()
            return forward, time.perf_counter() - started

        pools = {
            "prroi_pool": lambda f, b, s: resim.prroi_pool(f, b, 1, 1 / s),
            "roi_align": lambda f, b, s: roi_align(f, list(b), 1, 1 / s, aligned=True),
        }
        rounds = {which: [] for which in pools}
        for _ in range(repeat + 1):
            for which, pool in pools.items():
                rounds[which].append(run(pool))
        for what, column in (("forward", 0), ("forward and backward", 1)):
            ours, theirs = ([r[column] for r in rounds[which][1:]] for which in pools)  # the first one warms up
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            print(
                f"{name}, {len(boxes)} x {len(boxes[0])} boxes, {what}: prroi_pool {1e3 * statistics.median(ours):.1f} ms, "
                f"roi_align {1e3 * statistics.median(theirs):.1f} ms; roi_align / prroi_pool "
                f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}), n {repeat}"
            )


def regions(repeat, arch, size, batch):
    """Region-level augmentations of a batch (one core, all views), composing x3 (on the device), and an iteration."""
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(batch, 20, 2, generator=rng) * size / 2
    proposals = torch.cat([corner, corner + size / 8 + torch.rand(batch, 20, 2, generator=rng) * size / 4], 2)
    items = [(Image.new("RGB", (size, size)), boxes) for boxes in proposals]
    args = d3ssl.get_args(
        f"--data x --proposals x --arch {arch} --size {size} --batch-size {batch}".split()
    )
    method = d3ssl.build(args, torch.device("cpu"))
    optimizer = torch.optim.SGD(method.query.parameters(), 0.01, momentum=0.9)
    views = torch.randint(0, 256, (2, batch, 3, size, size), generator=rng, dtype=torch.uint8)
    d3ssl.distorted_view = lambda image, crop, size: (views[0, 0], False)  # any method distorts its views

    def augment():
        with common.drawing("bench"):
            drawn = [d3ssl.draw_views(item, size, args.augment) for item in items]
        return d3ssl.Drawn(*(torch.stack(field) for field in zip(*drawn, strict=True)))

    def step():
        loss, _ = method(method.query, drawn, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    drawn = augment()._replace(view_1=views[0], view_2=views[1])
    others = d3ssl.other_images(batch, 32, 0.5)
    work = {
        "augment": augment,
        "compose": lambda: d3ssl.network_inputs(drawn, others),
        "normalise": lambda: [common.normalise(view) for view in views],  # that much any method does
        "iteration": step,
    }
    seconds = {name: [] for name in work}
    for _ in range(repeat + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    rounds = [*zip(*seconds.values(), strict=True)][1:]  # the first warms up
    rows = [dict(zip(seconds, values, strict=True)) for values in rounds]
    shares = [(r["augment"] + r["compose"] - r["normalise"]) / r["iteration"] for r in rows]
    print(
        "; ".join(f"{name} {statistics.median(r[name] for r in rows):.3f} s" for name in work)
        + f"; (augment + compose - normalise) / iteration {statistics.median(shares):.1%} ({min(shares):.1%} to "
        f"{max(shares):.1%}); n {repeat}, batch {batch}, {arch}, {size} pixels, fp32"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("set-loss", "prroi", "d3ssl", *VARIANTS))
    parser.add_argument("--repeat", type=int, default=5, help="rounds; medians and ranges are over them")
    parser.add_argument("--arch", default="resnet50", help="of an iteration")
    parser.add_argument("--size", type=int, default=224, help="of an iteration: side of a view")
    parser.add_argument("--batch", type=int, default=32, help="of an iteration: images")
    parser.add_argument("--only", choices=("ours", "dense"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one_set_loss(args.only)))
    elif args.what == "set-loss":
        set_loss(args.repeat)
    elif args.what == "prroi":
        prroi(args.repeat)
    elif args.what == "d3ssl":
        regions(args.repeat, args.arch, args.size, args.batch)
    else:
        iteration(args.repeat, args.arch, args.size, args.batch, VARIANTS[args.what])


if __name__ == "__main__":
    main()
