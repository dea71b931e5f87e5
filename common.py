# SPDX-License-Identifier: MIT
"""What the three methods share: command line, processes, keys of random draws, the ResNet, groups, MoCo's queue.

No paper's own mathematics is here. What surrounds a training loop (images, checkpoints, log, pictures) is in harness/.
"""

import argparse
import contextlib
import hashlib
import math
import os

import torch
import torch.distributed as dist
import torchvision
from torch import nn

# ==== Command line ====================================================================================================


class UserError(Exception):
    """Something outside the code is wrong. The message is one line that says what to do."""


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high, both included."""

    def parse(text):
        if not low <= kind(text) <= high or kind(text) == math.inf:
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def run_flags(parser, name):
    """Add the 14 flags that every method has: data, encoder, optimisation, and how the run goes."""
    flag, some = parser.add_argument, number(int, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # fmt: off
    flag("--data", metavar="DIR", help="folder of images, searched recursively (its train/ if there is one), or 'scenes[:COUNT]', the built-in scenes")
    flag("--output-dir", default=f"runs/{name}", help="folder for checkpoint.pth, ARCH.pth, log.jsonl and pictures; a run found there is continued")
    flag("--init", metavar="FILE", help="start from the ResNet in this checkpoint, or from 'imagenet', torchvision's supervised weights")
    flag("--arch", default="resnet50", choices=ARCHS, help="torchvision ResNet")
    flag("--size", default=224, type=number(int, 32), help="side of a view in pixels")
    flag("--epochs", default=200, type=some, help="length of the schedule")
    flag("--batch-size", default=256, type=number(int, 2), help="images of all processes together")
    flag("--lr", default=0.03, type=number(float, 0), help="learning rate at batch 256; scaled linearly with the batch")
    flag("--amp", default="none", choices=tuple(AMP), help="precision of the encoders; losses, unit embeddings and queues are always fp32")
    flag("--seed", default=0, type=number(int, 0), help="key of all random draws")
    flag("--steps", type=number(int, 0), help="stop after this many steps in all; the schedule stays as it is")
    flag("--workers", default=min(8, cores), type=number(int, 0), help="loader processes of each training process; results do not depend on it")
    flag("--print-freq", default=10, type=some, help="steps between log lines")
    flag("--save-every", type=some, help="steps between checkpoints; default: an epoch")
    # fmt: on


def parse(parser, argv, presets):
    """Parse a command line. The dict `presets(args)` replaces defaults, so flags that are given win over it."""
    parser.set_defaults(**presets(parser.parse_args(argv)))
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("give --data DIR (a folder of images), or --demo for a small job on built-in scenes")
    return args


# ==== Processes: the same code runs under `python script.py` (a world of one) and under `torchrun` ====================


def start_processes():
    """Join the process group that torchrun announces in the environment, if it does: rank, number of processes, device.

    CUDA processes use nccl, and gloo for CPU tensors; others gloo. Errors: UserError, a process without a GPU.
    """
    number, size, local = (int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    if cuda:
        if local >= gpus:
            raise UserError(f"process {local} of this machine has no GPU: start at most --nproc_per_node {gpus}")
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ and not dist.is_initialized():
        # Restarted workers find the old store. A prefix keeps them from reading the dead workers' addresses.
        store, number, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=number, world_size=size)
    return number, size, torch.device("cuda", local) if cuda else torch.device("cpu")


def processes():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def print0(*words):
    """print on the first process alone."""
    if rank() == 0:
        print(*words, flush=True)


@torch.no_grad()
def all_gather(x):
    """(N, ...) of each process -> (N * processes, ...) in rank order, on every process. No gradient flows through."""
    if processes() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def shuffle(x, permutation):
    """MoCo's shuffling BN: place i gets row permutation[i] of all processes' rows; each process keeps its share.

    Keys are normalised among other images than their queries, so batch statistics cannot give the positive away.
    x: (N, ...) of this process. permutation: (N * processes,) int64, equal on every process. Returns (N, ...).
    """
    return all_gather(x)[permutation.chunk(processes())[rank()].to(x.device)]


def unshuffle(x, permutation):
    """The inverse of `shuffle`: each process gets the rows of its own images back."""
    return shuffle(x, permutation.argsort())


def distributed(network, device):
    """DistributedDataParallel if there are several processes, else the network itself.

    On CPU, find_unused_parameters=True keeps DDP from rebuilding its buckets after step 1, so a resumed run sums
    gradients in the same order, bit for bit. (DDP warns once that none are unused.)
    """
    settings = {"device_ids": [device.index]} if device.type == "cuda" else {"find_unused_parameters": True}
    return nn.parallel.DistributedDataParallel(network, **settings) if processes() > 1 else network


def synchronised_norms(network, device):
    """Batch norm over the images of all processes, as in SimSiam. SyncBatchNorm needs CUDA; elsewhere this is said."""
    several, cuda = processes() > 1, device.type == "cuda"
    if several and not cuda:
        print0("synchronised batch norm needs CUDA: each process takes the statistics of its own images")
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if several and cuda else network


# ==== Randomness without state: every draw is a function of a key, so resuming and worker counts change nothing =======


def key_seed(*key):
    """A 63-bit seed that depends on the key alone, e.g. ("views", seed, epoch, index)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(*key):
    """A CPU generator for one key."""
    return torch.Generator().manual_seed(key_seed(*key))


@contextlib.contextmanager
def drawing(*key):
    """Inside, torch's global CPU generator (torchvision's transforms draw from it) starts from the key."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


# ==== Networks ========================================================================================================

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GROUP = 32  # images whose batch statistics are taken together, as on one of the papers' GPUs (B15)


class ResNetTrunk(nn.Module):
    """torchvision's ResNet without its classifier, under the same key names. widths: channels of C2, C3, C4, C5."""

    def __init__(self, arch="resnet50", zero_init_residual=False):
        super().__init__()
        resnet = getattr(torchvision.models, arch)(zero_init_residual=zero_init_residual)
        self.widths = [resnet.fc.in_features // n for n in (8, 4, 2, 1)]
        for name, module in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)

    def forward(self, x, stages=4):
        """(N, 3, H, W), normalised -> [C2, C3, C4, C5], after their ReLU, at strides 4, 8, 16, 32; or the first few."""
        x, maps = self.maxpool(self.relu(self.bn1(self.conv1(x)))), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[:stages]:
            x = stage(x)
            maps.append(x)
        return maps


def normalise(images):
    """uint8 (N, 3, H, W) -> float32 with ImageNet's mean and deviation, channels-last (convolutions are faster so)."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def autocast(amp, device):
    """The context of encoders, see --amp. With one for all views, each weight is cast once."""
    return torch.autocast(device.type, AMP[amp], enabled=amp != "none")


def encode_in_groups(network, group, *inputs):
    """Call `network.encode` on groups of consecutive images, one after the other: batch statistics are per group.

    On a paper's GPU the statistics are those of its own 32 images. With groups, one process with 64 images equals two
    with 32 (B15). Only the first group updates running statistics, as if the buffers of GPU 0 were broadcast (B17).

    network: module whose encode(n rows of each input) returns tensors with n rows. group: at most this many images;
    groups differ by one image at most. inputs: (N, ...) each. Returns fp32 tensors with N rows.
    """
    parts = math.ceil(len(inputs[0]) / group)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    outputs = []
    for rows in zip(*(x.tensor_split(parts) for x in inputs), strict=True):
        for norm in norms:
            norm.track_running_stats = not outputs
        outputs.append(network.encode(*rows))
    for norm in norms:
        norm.track_running_stats = True
    return [torch.cat(rows).float() for rows in zip(*outputs, strict=True)]


@torch.no_grad()
def momentum_update(key_network, query_network, m):
    """key <- m key + (1 - m) query, for parameters only: running statistics are each network's own (B1)."""
    for key, query in zip(key_network.parameters(), query_network.parameters(), strict=True):
        key.lerp_(query, 1 - m)


class Queue(nn.Module):
    """MoCo's queue of keys, (K, D) unit rows. The oldest is overwritten first, at any batch size (DEVIATION: B12).

    Rows are random until they have been filled once (B11). The next key goes to row `pointer`.
    """

    def __init__(self, size, dim, rng):
        super().__init__()
        self.register_buffer("vectors", nn.functional.normalize(torch.randn(size, dim, generator=rng), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys):
        """Write (N, D) keys, equal on all processes, at the pointer. If N > K, the last K stay."""
        size, kept = len(self.vectors), keys[-len(self.vectors) :]
        first = self.pointer + len(keys) - len(kept)
        self.vectors[(first + torch.arange(len(kept), device=keys.device)) % size] = kept
        self.pointer.copy_((self.pointer + len(keys)) % size)


class NegativeLogSumExp(torch.autograd.Function):
    """log sum_k exp(q . k / tau) over vectors that need no gradient, without keeping R x K logits.

    The gradient is a softmax-weighted mean of the vectors, (R, D), computed chunk by chunk beside the value.
    """

    @staticmethod
    def forward(ctx, q, vectors, temperature):
        values, gradients = [], []
        for rows in q.split(max(1, 2**24 // len(vectors))):
            logits = rows @ vectors.T / temperature  # (r, K)
            values.append(logits.logsumexp(1))
            gradients.append((logits - values[-1][:, None]).exp_() @ vectors / temperature)  # (r, D)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, None] * ctx.saved_tensors[0], None, None


def negative_logsumexp(q, vectors, temperature):
    """The negatives' part of a contrastive denominator: (R, D) with gradient, (K, D) without, tau -> (R,)."""
    return NegativeLogSumExp.apply(q, vectors, temperature)


def cosine_lr(lr, epoch, epochs):
    """lr / 2 (1 + cos(pi epoch / epochs)), constant within an epoch (B5)."""
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
