# SPDX-License-Identifier: MIT
"""What the method scripts share, and nothing that is a paper's own mathematics.

    processes      World, start_processes, all_gather, shuffle, unshuffle, agree, wrap_distributed, StopSignal
    randomness     key_seed, generator, drawing: every draw is a function of a key, no state is kept
    images         read_image, ImageFolder, Scenes, Batches: from a folder to (epoch, index) pairs
    networks       ResNetTrunk, Queue, momentum_update, load_backbone
    training       cosine_lr, Checkpoints, RunLog, progress, save_figure, draw_curves, run_main

Every function takes what it needs as arguments and works without a process group (a world of one), so that it can be
copied into other code on its own.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import shlex
import signal
import sys
import time
import urllib.error
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from torch import nn

# ======================================================================================================================
# 1. Errors a user can mend
# ======================================================================================================================


class UserError(Exception):
    """Something outside the code is wrong; the message is one line that says what to do. `run_main` exits with 2."""


def run_main(main):
    """Run `main()`; turn UserError and a full disk into one line on stderr and exit code 2.

    Errors:
        SystemExit(2): after a UserError or a write that the file system refused.
    """
    who = os.path.basename(sys.argv[0]) + (f" (process {os.environ['RANK']})" if "RANK" in os.environ else "")
    try:
        main()
    except UserError as error:
        print(f"{who}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"{who}: error: {disk_full_line(error.filename or 'the output')}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_disk_full(error):
    """True if an OSError says that a file could not grow: no space left, over quota, over the file size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full_line(path):
    return f"no space left to write {path}: free some and run the same command again (what was saved before is intact)"


def given_flags(parser, argv):
    """The flags that stand on the command line, as {dest: value}: presets fill in only what is not among them."""
    missing = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), missing))
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not missing}


def check_range(args, **limits):
    """Require low <= value <= high for every `name=(low, high)`; None as value passes, None as limit is open.

    Errors:
        UserError: names the flag, its value and the range.
    """
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is None:
            continue
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {bounds}")


# ======================================================================================================================
# 2. Processes: the same code under `python script.py` (a world of one) and `torchrun`
# ======================================================================================================================


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank among `size` processes, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def start_processes():
    """Join the process group that torchrun announces in the environment; without torchrun, be a world of one.

    CUDA processes talk through nccl, and through gloo for the few numbers that live on the CPU; CPU processes through
    gloo.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own: start at most "
                f"--nproc_per_node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ:
        # Restarted workers find the same store: without a name of their own they would read the dead ones' addresses.
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, local_rank, torch.device("cuda", local_rank) if cuda else torch.device("cpu"))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def all_gather(x):
    """Concatenate equally shaped tensors of all processes in rank order; no gradient flows through it.

    Args:
        x: (N, ...) of this process.
    Returns:
        (N * processes, ...), the same on every process; `x` itself in a world of one.
    """
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def shuffle(x, permutation):
    """Deal the images of all processes out anew (MoCo's shuffling BN): row i of the whole becomes row permutation[i].

    With groups of images instead of GPUs (see `encode_in_groups`) this also means something in a single process: the
    keys are normalised in other company than their queries, so batch statistics cannot give the positive away.

    Args:
        x: (N, ...) of this process. permutation: (N * processes,) int64, equal on every process.
    Returns:
        (N, ...): this process's slice of the permuted whole. `unshuffle` with the same permutation undoes it.
    """
    share = len(permutation) // world_size()
    rank = dist.get_rank() if dist.is_initialized() else 0
    return all_gather(x)[permutation[rank * share : (rank + 1) * share].to(x.device)]


def unshuffle(x, permutation):
    """The inverse of `shuffle`: every process gets back the rows that belong to its own images."""
    return shuffle(x, torch.argsort(permutation))


def agree(*flags):
    """Sum small integers over all processes, on the CPU, so that all take the same decision at the same step."""
    total = torch.tensor(flags, dtype=torch.int64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def wrap_distributed(network, world):
    """DistributedDataParallel where there are several processes, the network itself otherwise.

    On CPUs, looking for unused parameters (there are none, and DDP warns of it once) has a side effect that is wanted:
    DDP leaves its buckets as they are after the first step, so a resumed run adds up in the same order, bit for bit.
    """
    if world.size == 1:
        return network
    if world.device.type == "cuda":
        return nn.parallel.DistributedDataParallel(network, [world.local_rank])
    return nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)


def require_agreement(value, complaint):
    """Stop with a UserError on all processes if `value` is not the same on all of them."""
    if len(all_gather(torch.tensor([key_seed(value)])).unique()) > 1:
        raise UserError(complaint)


def mean_over_processes(x):
    """Mean of a tensor over the processes; in place where there are several."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


class StopSignal:
    """Remembers that SIGTERM or Ctrl-C arrived, so that a step can end and be saved. A second Ctrl-C stops at once."""

    def __init__(self):
        self.arrived = 0
        self.listen()

    def listen(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def exit_at_once(self):
        """From now on a signal ends the process, with exit code 0: there is nothing to save."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))

    def remember(self, number, frame):
        self.arrived = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)


def detach_worker(_):
    """worker_init_fn of a loader: a process group of its own, so that a SIGTERM or Ctrl-C meant for the training does
    not kill its workers before the step is finished and saved."""
    if os.name == "posix":
        os.setpgrp()


def usable_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ======================================================================================================================
# 3. Randomness without state
# ======================================================================================================================


def key_seed(*key):
    """A 63-bit seed that depends on nothing but the key, e.g. ("views", seed, epoch, index).

    Resuming, another number of workers or another order of calls cannot change what is drawn for a key.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(*key):
    """A CPU generator for one key."""
    return torch.Generator().manual_seed(key_seed(*key))


@contextlib.contextmanager
def drawing(*key):
    """Inside, torch's global CPU generator (which torchvision's transforms draw from) starts from the key."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


# ======================================================================================================================
# 4. Images
# ======================================================================================================================

EXTENSIONS = set(".jpg .jpeg .jpe .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm .jp2 .avif".split())
TRIES = 20  # neighbours to try in place of an unreadable image, before the folder is called broken


def read_image(path):
    """Decode an image file to RGB: EXIF rotation applied, grey, 16-bit, palette, alpha and CMYK converted.

    Transparent pixels come out white. Of an animation the first frame is taken.

    Returns:
        PIL.Image.Image, mode RGB.
    Errors:
        OSError (with its many relatives of Pillow's decoders turned into it): unreadable, truncated, or above
        Pillow's limit of 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; both decode well
            with Image.open(path) as image:
                image.load()
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion to RGB would clip it at 255
                    image = Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) >> 8).astype(np.uint8))
                if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
        raise OSError(f"{type(error).__name__}: {error}") from error


def list_images(root, flag="--data"):
    """Relative paths of all images below a folder, sorted; hidden files are passed over, links are followed once.

    Errors:
        UserError: not a folder, a folder that may not be read, or no image in it.
    """

    def refuse(error):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    if not os.path.isdir(root):
        raise UserError(f"{flag} {root}: no such folder (give a folder of images)")
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above would never end
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in files
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        ]
    if not found:
        raise UserError(f"{flag} {root}: no images in it or below (looked for {' '.join(sorted(EXTENSIONS))})")
    return sorted(found)


class ImageFolder:
    """All images below a folder (its `train/` if there is one), with or without class folders, labels unused.

    `self[index]` is an RGB image and the number of unreadable neighbours passed over to get one: 0 nearly always; n
    means that files index .. index + n - 1 (modulo the length) could not be read.
    """

    held_out = False

    def __init__(self, root):
        train = os.path.join(root, "train")
        self.root = train if os.path.isdir(train) else root
        # One array of bytes: a list of a million strings would be copied into every worker as its counters change.
        self.paths = np.array([os.fsencode(path) for path in list_images(self.root)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        for passed in range(TRIES):
            try:
                return read_image(os.path.join(self.root, self.name((index + passed) % len(self)))), passed
            except OSError:
                continue
        return Image.new("RGB", (8, 8)), TRIES

    def name(self, index):
        return os.fsdecode(bytes(self.paths[index]))

    def probe(self, index):
        """Image `index` of those that pictures and the closing measurement are made with."""
        return self[key_seed("probe", index) % len(self)][0]

    def fingerprint(self):
        """A name for this list of files, whatever folder it lies in: a resumed run must see the same one."""
        return f"{len(self)} images, sha256 {hashlib.sha256(b'|'.join(self.paths.tolist())).hexdigest()[:16]}"


class Scenes:
    """The built-in procedural scenes of tools/scenes.py, in place of a folder."""

    held_out = True

    def __init__(self, count, size, seed):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        from tools.scenes import make_scene

        return Image.fromarray(make_scene(self.seed, index, self.size)["image"]), 0

    def name(self, index):
        return f"scene {index}"

    def probe(self, index):
        """Scene `index` of those that no training step sees."""
        return self[self.count + index][0]

    def fingerprint(self):
        return f"{self.count} scenes of {self.size} pixels, seed {self.seed}"


def open_images(data, size, seed):
    """The images that `--data` names: 'scenes' or 'scenes:COUNT' (procedural), else a folder ('./scenes' is one)."""
    word, _, count = data.partition(":")
    if word == "scenes":
        if count and not (count.isdecimal() and int(count) > 0):
            raise UserError(f"--data {data}: write scenes:4096 for 4096 scenes")
        return Scenes(int(count or 4096), size, seed)
    return ImageFolder(data)


class Batches(torch.utils.data.Sampler):
    """This process's batches from step `start` to `stop`, as lists of (epoch, index), over as many epochs as needed.

    Each epoch has its own permutation, a function of (seed, epoch) alone; the last incomplete batch is dropped. The
    global batch is cut into consecutive shares, rank by rank: one process and several see the same images in the same
    order.
    """

    def __init__(self, images, batch_size, world, seed, start, stop):
        self.images, self.batch_size, self.world, self.seed = images, batch_size, world, seed
        self.start, self.stop = start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        share = self.batch_size // self.world.size
        current = None
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, self.images // self.batch_size)
            if epoch != current:
                order, current = torch.randperm(self.images, generator=generator("order", self.seed, epoch)), epoch
            first = batch * self.batch_size + self.world.rank * share
            yield [(epoch, index) for index in order[first : first + share].tolist()]


class BadImages:
    """Names every unreadable image once and stops the run when there are too many (more than 1 % and more than one).

    Args:
        source: of the images. found: those named before. outcome: what becomes of one, for the message.
    """

    def __init__(self, source, found=(), outcome="another one takes its place"):
        self.source, self.found, self.new, self.outcome = source, set(found), set(), outcome

    def note(self, indices, passed):
        """Args: (N,) int64 each, as the loader gives them: see ImageFolder."""
        for index, count in zip(indices.tolist(), passed.tolist(), strict=True):
            self.new |= {(index + i) % len(self.source) for i in range(count)} - self.found

    def share(self):
        """Exchange what is new with the other processes and say it; call it on all of them alike."""
        new = [sorted(self.new)]
        if world_size() > 1:
            new = [None] * world_size()
            dist.all_gather_object(new, sorted(self.new))
        new = {index for part in new for index in part} - self.found
        self.found |= new
        self.new = set()
        for index in sorted(new):
            print0(f"unreadable image, {self.outcome}: {self.source.name(index)}")
        if len(self.found) > max(1, len(self.source) // 100):
            raise UserError(
                f"{len(self.found)} of {len(self.source)} images cannot be read (more than 1 %): mend or remove them; "
                f"the last is {self.source.name(max(new))}"
            )


# ======================================================================================================================
# 5. Networks
# ======================================================================================================================

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class ResNetTrunk(nn.Module):
    """torchvision's ResNet without its classifier: same modules, same key names, all four stages as output.

    Attributes:
        widths: channels of C2, C3, C4, C5.
    """

    def __init__(self, arch="resnet50", zero_init_residual=False):
        super().__init__()
        if arch not in ARCHS:
            raise ValueError(f"arch {arch!r} is not one of {ARCHS}")
        resnet = getattr(torchvision.models, arch)(zero_init_residual=zero_init_residual)
        self.widths = [resnet.fc.in_features // 8, resnet.fc.in_features // 4, resnet.fc.in_features // 2]
        self.widths += [resnet.fc.in_features]
        for name, module in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)

    def forward(self, x, stages=4):
        """(N, 3, H, W), normalised -> [C2, C3, C4, C5], each after its ReLU, at strides 4, 8, 16, 32; or the first few."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[:stages]:
            x = stage(x)
            maps.append(x)
        return maps


PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(images):
    """uint8 (N, 3, H, W) -> float32 with ImageNet's mean and deviation, channels-last: convolutions are faster so."""
    mean = torch.tensor(PIXEL_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=images.device).view(3, 1, 1)
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def encode_in_groups(encode, group_size, *inputs):
    """Apply `encode` to groups of consecutive images one after the other, so that batch norm works per group.

    DEVIATION: B15. A paper's GPU holds 32 images, and batch statistics are its own. Groups of 32 give the same whatever
    the number of processes: one process with 64 images equals two with 32.

    Args:
        encode: function of n rows of each input that returns a tuple of tensors with n rows.
        group_size: at most so many images in a group; all groups of a batch are equal to within one image.
        inputs: (N, ...) each: images, and what belongs to them.
    Returns:
        tuple of tensors with N rows.
    """
    parts = math.ceil(len(inputs[0]) / group_size)
    groups = zip(*(x.tensor_split(parts) for x in inputs), strict=True)
    return tuple(torch.cat(parts) for parts in zip(*(encode(*group) for group in groups), strict=True))


@torch.no_grad()
def momentum_update(key_network, query_network, m):
    """key <- m key + (1 - m) query. OFFICIAL: B1. Parameters only: running statistics are each network's own."""
    for key, query in zip(key_network.parameters(), query_network.parameters(), strict=True):
        key.lerp_(query, 1 - m)


class Queue(nn.Module):
    """MoCo's queue of keys, oldest overwritten first. DEVIATION: B12. Any batch size, wrapping around at the end.

    Attributes:
        vectors: (K, D) fp32, unit rows; until it has been filled once, the rest is noise (OFFICIAL: B11).
        pointer: (1,) int64, the row that the next key goes to.
    """

    def __init__(self, size, dim, rng):
        super().__init__()
        self.register_buffer("vectors", nn.functional.normalize(torch.randn(size, dim, generator=rng), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys):
        """Write (N, D) keys, equal on all processes, at the pointer. Of more keys than fit, the last ones stay."""
        size = len(self.vectors)
        kept = keys[-size:].to(self.vectors.dtype)
        first = self.pointer + len(keys) - len(kept)
        self.vectors[(first + torch.arange(len(kept), device=keys.device)) % size] = kept
        self.pointer.copy_((self.pointer + len(keys)) % size)


def load_checkpoint_file(path):
    """torch.load in its safe mode, with what published checkpoints carry besides tensors allowed: argparse's
    Namespace, paths, numpy scalars.

    Errors:
        UserError: missing, unreadable, not a checkpoint, or one that needs code to be run to open it.
    """
    multiarray = np._core.multiarray
    safe = [argparse.Namespace, pathlib.PosixPath, np.dtype, np.ndarray]
    safe += [getattr(np.dtypes, name) for name in ("Float64DType", "Float32DType", "Int64DType", "BoolDType")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # the name before and since numpy 2
        safe += [(multiarray.scalar, f"{module}.scalar"), (multiarray._reconstruct, f"{module}._reconstruct")]
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        # of torch's message the first sentence alone: it goes on to advise to trust the file
        sentence = (str(error).strip().splitlines() or [""])[0].split(". ")[0]
        reason = ": ".join(filter(None, (type(error).__name__, sentence[:150])))
        raise UserError(f"{path}: not a checkpoint that can be read safely ({reason})") from None


def load_backbone(source, arch):
    """The ResNet inside any checkpoint, under torchvision's own names.

    Understood are our own files and, whatever wraps them, the layouts of MoCo, SetSim, ReSim, DenseCL, PixPro, SoCo,
    SimSiam, SwAV, DINO, InfoMin and torchvision, detectors included: the place is found from where `conv1.weight` and
    `layer4` lie. Where a file holds two networks, the query, online or teacher one is taken (each method's choice for
    transfer).

    Args:
        source: a file, or "imagenet" for torchvision's supervised weights (IMAGENET1K_V1).
        arch: one of ARCHS.
    Returns:
        (state dict for ResNetTrunk(arch), the line that says what was taken)
    Errors:
        UserError: not a checkpoint, no ResNet in it, or a single backbone tensor missing or of another shape.
    """
    with torch.device("meta"):
        wanted = ResNetTrunk(arch).state_dict()
    if source == "imagenet":
        try:
            checkpoint = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.get_state_dict()
        except (urllib.error.URLError, OSError) as error:
            raise UserError(f"torchvision's {arch} weights cannot be downloaded ({error}): give a file") from None
    else:
        checkpoint = load_checkpoint_file(source)

    places = []  # (container, dict, prefix, prefix of layer4): everywhere that a ResNet stands

    def search(container, values):
        if not isinstance(values, dict):
            return
        names = [name for name in values if isinstance(name, str)]
        prefixes = [name.removesuffix("conv1.weight") for name in names if name.endswith("conv1.weight")]
        prefixes = [prefix for prefix in prefixes if f"{prefix}layer3.0.conv1.weight" in values]
        tails = [name.removesuffix("layer4.0.conv1.weight") for name in names if name.endswith("layer4.0.conv1.weight")]
        places.extend((container, values, prefix, prefix) for prefix in prefixes if prefix in tails)
        if len(prefixes) == len(tails) == 1 and prefixes != tails:  # detectors on C4 have the last stage in the head
            places.append((container, values, prefixes[0], tails[0]))
        for name in names:
            search(f"{container}{name}.", values[name])

    search("", checkpoint)
    if not places:
        raise UserError(f"{source}: there is no ResNet in it (no '...conv1.weight' with a '...layer4.0.conv1.weight')")
    second = ("encoder_k", "key", "student", "model_ema", "target", "momentum", "encoder_ema")
    container, values, prefix, tail = min(places, key=lambda p: any(w in (p[0] + p[2]).split(".") for w in second))

    place = {name: (tail if name.startswith("layer4.") else prefix) + name for name in wanted}
    state = {name: values.get(place[name]) for name in wanted}
    for name, tensor in wanted.items():
        if state[name] is None and name.endswith("num_batches_tracked"):  # files older than PyTorch 0.4.1 lack them
            state[name] = torch.zeros((), dtype=torch.int64)
        elif not isinstance(state[name], torch.Tensor):
            raise UserError(f"{source}: {place[name]} is missing, so this is not a whole {arch}: check --arch")
        elif state[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {place[name]} is {tuple(state[name].shape)}, {arch} has {tuple(tensor.shape)}: check --arch"
            )
        elif not torch.isfinite(state[name]).all():
            raise UserError(f"{source}: {place[name]} is not finite")
    where = f"'{container}{prefix}*'" if container + prefix else "the top level"
    where += f" and '{container}{tail}layer4.*'" if tail != prefix else ""
    left = len(values) - sum(name in values for name in place.values())
    line = f"backbone: {len(state)} tensors of {arch} from {source}, {where}; {left} others beside them not used"
    return state, line


# ======================================================================================================================
# 6. Training: schedule, checkpoints, log
# ======================================================================================================================


def cosine_lr(lr, epoch, epochs):
    """lr / 2 (1 + cos(pi epoch / epochs)). OFFICIAL: B5. Constant within an epoch; the last one is not quite 0."""
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def bf16_is_fast(device):
    """Whether bf16 autocast saves time: GPUs since Ampere, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def write_atomically(path, pieces):
    """Write bytes to a temporary file beside `path`, synced and renamed: a kill at any instant leaves old or new.

    Args:
        pieces: iterable of bytes.
    Errors:
        UserError: no space, no permission; the temporary file is removed, the old file is intact.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the renaming itself is on disk only when the folder is
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if is_disk_full(error):
            raise UserError(disk_full_line(path)) from None
        raise UserError(f"{path}: {error.strerror}: give a file that can be written") from None


def save_atomically(value, path):
    """torch.save by `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, [buffer.getbuffer()])


def make_output_dir(folder):
    """Make a run's output folder if need be. Errors: UserError, a file of that name, no permission."""
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}: give a folder that can be written") from None


class Checkpoints:
    """`checkpoint.pth` of one run, and beside it the weights for others to take (`<arch>.pth`, ...).

    Args:
        folder: the run's output folder, made if need be.
        script: "setsim", ...: a checkpoint of another script is refused.
        settings: plain values that change the mathematics; a resume must find the same.
    Errors:
        UserError: the folder is a file or cannot be made.
    """

    def __init__(self, folder, script, settings):
        self.path, self.script, self.settings = os.path.join(folder, "checkpoint.pth"), script, settings
        make_output_dir(folder)

    def load(self, resume=None):
        """The state to continue from, or None: the folder's own checkpoint or `resume`, whichever is further.

        Errors:
            UserError: no such file, not a checkpoint of this script, other settings.
        """
        if resume and not os.path.exists(resume):
            raise UserError(f"--resume {resume}: no such file")
        found = [self.read(path) for path in (resume, self.path) if path and os.path.exists(path)]
        return max(found, key=lambda state: state["step"], default=None)

    def read(self, source):
        found = load_checkpoint_file(source)
        if not isinstance(found, dict) or "script" not in found or "settings" not in found:
            raise UserError(f"{source}: not a checkpoint to resume from (weights alone go to --init)")
        if found["script"] != self.script:
            raise UserError(f"{source}: a checkpoint of {found['script']}.py; give another --output-dir")
        old, new = found["settings"], self.settings
        changed = [
            f"{name} {old.get(name)!r} -> {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise UserError(
                f"{source}: the run to be continued had other settings ({'; '.join(changed)}): "
                "start it with its own, or give another --output-dir"
            )
        return found

    def save(self, exports, **state):
        """Write the weights for others, then the checkpoint (`state` besides script and settings), which is what counts.

        DEVIATION: S23. Released SetSim leaves the queues out of its checkpoints and cannot resume.

        Args:
            exports: {file name: state dict}, the backbone among them.
        Errors:
            UserError: no space, or weights that are not finite: they are not saved, the last good checkpoint stays.
        """
        if not all(tensor.isfinite().all() for weights in exports.values() for tensor in weights.values()):
            raise UserError(
                f"the weights are no longer finite at step {state['step']}; the checkpoint saved before is kept. "
                "Start anew in another --output-dir with a lower --lr"
            )
        for name, weights in exports.items():
            weights = {key: tensor.contiguous().cpu() for key, tensor in weights.items()}
            save_atomically(weights, os.path.join(os.path.dirname(self.path), name))
        save_atomically({"script": self.script, "settings": self.settings, **state}, self.path)


def command():
    """This run's command line, as it would be typed."""
    return shlex.join([os.path.basename(sys.executable), *sys.argv])


def versions():
    """{package: version} of what the results depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}


def print0(*words):
    """print on the first process alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, flush=True)


class Meter:
    """Means of a step's values over the steps since the last reset and over all processes, and where the time went.

    The sums stay on the device: nothing waits for it before `means` is called.
    """

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.reset()

    def reset(self):
        self.sums, self.steps, self.started, self.waited = None, 0, time.time(), 0.0

    def timed(self, loader):
        """Iterate over the loader and count the time that is spent waiting for it."""
        batches = iter(loader)
        while True:
            asked = time.time()
            batch = next(batches, None)
            self.waited += time.time() - asked
            if batch is None:
                return
            yield batch

    def add(self, values):
        """Args: {name: scalar tensor}, the same names at every step."""
        row = torch.stack([value.detach().float() for value in values.values()])
        self.names = list(values)
        self.sums = row if self.sums is None else self.sums + row
        self.steps += 1

    def means(self, step):
        """{name: float} and the pace; equal on all processes, but for the pace.

        Errors:
            UserError: `loss` was not finite at one of the steps, on any process.
        """
        means = dict(zip(self.names, mean_over_processes(self.sums / self.steps).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"the loss is not finite (steps {step - self.steps + 1} to {step}); the checkpoint saved before is kept. "
                "Start anew in another --output-dir with a lower --lr; with --amp fp16, try bf16 or none"
            )
        seconds = time.time() - self.started
        pace = {"images_per_s": self.steps * self.batch_size / seconds, "data_share": self.waited / seconds}
        return means | pace


class RunLog:
    """`log.jsonl` (a header, then one JSON object per line), and progress for the eye. Idle on all ranks but the first.

    On a terminal the progress is one bar (if tqdm is there), elsewhere a plain line at every log point.

    Args:
        folder: the output folder. header: the first line's values. step: the step that is resumed from; what was
        logged after it, and a line torn by a kill, is dropped. last: the step that the run ends with.
        active: whether this process writes at all.
    """

    def __init__(self, folder, header, step, last, active):
        self.path, self.started, self.first, self.last = os.path.join(folder, "log.jsonl"), time.time(), step, last
        self.active, self.bar = active, None
        if not active:
            return
        kept = [line for line in read_log(self.path) if step and line.get("step", 0) <= step] or [header]
        with open(f"{self.path}.tmp", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(f"{self.path}.tmp", self.path)
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=last, initial=step, unit="step", dynamic_ncols=True)

    def step(self, step, values, shown):
        """Log `values` (plain numbers) of a finished step; `shown` is the text for the eye."""
        self.write({"step": step, **values})
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.active:
            left = int((time.time() - self.started) / max(step - self.first, 1) * (self.last - step))
            print(f"step {step}/{self.last} {shown} eta {left // 3600}:{left // 60 % 60:02}:{left % 60:02}", flush=True)

    def write(self, values):
        """Append one JSON line."""
        if self.active:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")

    def close(self):
        if self.bar is not None:
            self.bar.close()


def read_log(path):
    """The JSON objects of a log file, without a torn last line; [] if there is no file."""
    if not os.path.exists(path):
        return []
    lines = []
    with open(path) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def progress(items, total, done=0, what="images", size=lambda item: 1):
    """Yield the items; meanwhile one bar on a terminal (if tqdm is there), elsewhere a line every ten seconds.

    Args:
        total: what the sizes of all items add up to, those that were done before (`done`) included. what: the unit.
        size: of an item.
    """
    bar = contextlib.nullcontext()
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(initial=done, total=total, unit=f" {what}", dynamic_ncols=True)
    first, started, said = done, time.time(), time.time()
    with bar as shown:
        for item in items:
            yield item
            done += size(item)
            if shown is not None:
                shown.update(done - shown.n)
            elif time.time() - said >= 10:
                said = time.time()
                pace = max(done - first, 1e-9) / (said - started)
                left = int((total - done) / pace)
                eta = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
                print(f"{done}/{total} {what}, {pace:.1f} a second, eta {eta}", flush=True)


def pyplot():
    """matplotlib's pyplot, which draws to files alone. Errors: UserError, it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is needed to draw: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, path, dpi):
    """Write a matplotlib figure to a PNG file by `write_atomically`, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    pyplot().close(figure)
    write_atomically(path, [buffer.getvalue()])


def draw_curves(folder, panels):
    """`curves.png` from `log.jsonl`: one panel per entry of `panels`, {title: names of logged values}.

    A name that starts with "=" is drawn as a dashed line: a value to compare with. Does nothing without matplotlib.
    """
    try:
        plt = pyplot()
    except UserError:
        print0("matplotlib is not installed: no curves.png")
        return
    lines = [line for line in read_log(os.path.join(folder, "log.jsonl")) if "step" in line]
    if not any("loss" in line for line in lines):
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            key = name.removeprefix("=")
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                style = "k--" if name != key else "-" if len(points) > 20 else ".-"
                axis.plot(*zip(*points, strict=True), style, lw=1.2, label=key)
                axis.legend(fontsize=7)
        axis.set(title=title, xlabel="step")
    save_figure(figure, os.path.join(folder, "curves.png"), dpi=110)
