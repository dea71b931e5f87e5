# SPDX-License-Identifier: MIT
"""Files of weights: written whole or not at all, loaded safely; the ResNet and the FPN in anybody's checkpoint."""

import argparse
import contextlib
import errno
import importlib
import io
import os
import pathlib
import re
import urllib.error

import numpy as np
import torch
import torchvision

from common import ResNetTrunk, UserError, print0


def is_disk_full(error):
    """True if an OSError says that a file could not grow: no space left, over quota, over the file size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full_line(path):
    return f"no space left to write {path}: free some and run the same command again (what was saved before is intact)"


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


def save_weights(module, path):
    """Write a module's state dict for others to load: contiguous tensors on the CPU.

    Errors:
        UserError: weights that are not finite are not saved.
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(
            f"{path}: the weights are no longer finite; the checkpoint saved before is kept. "
            "Start anew in another --output-dir with a lower --lr"
        )
    save_atomically(state, path)


def make_output_dir(folder):
    """Make a run's output folder if need be. Errors: UserError, a file of that name, no permission."""
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}: give a folder that can be written") from None


def known_as(module, name):
    """A function of numpy's C code under the name by which some version of numpy pickled it."""
    function = getattr(importlib.import_module("numpy._core.multiarray"), name)

    def call(*arguments):
        return function(*arguments)

    call.__module__, call.__name__, call.__qualname__ = module, name, name
    return call


def load_checkpoint_file(path):
    """torch.load in its safe mode, with what published checkpoints carry besides tensors allowed: argparse's
    Namespace, paths, numpy scalars.

    Errors:
        UserError: missing, unreadable, not a checkpoint, or one that needs code to be run to open it.
    """
    safe = [argparse.Namespace, pathlib.PosixPath, np.dtype, np.ndarray]
    safe += [getattr(np.dtypes, name) for name in ("Float64DType", "Float32DType", "Int64DType", "BoolDType")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # the name before and since numpy 2
        safe += [known_as(module, name) for name in ("scalar", "_reconstruct")]
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


def load_checkpoint(path, script, settings):
    """The checkpoint to continue from, which this script must have written with these settings.

    Errors:
        UserError: not a checkpoint, one of another script, or of other settings, which are named.
    """
    found = load_checkpoint_file(path)
    if not isinstance(found, dict) or "script" not in found or "settings" not in found:
        raise UserError(f"{path}: not a checkpoint to continue from (weights alone go to --init)")
    if found["script"] != script:
        raise UserError(f"{path}: a checkpoint of {found['script']}.py; give another --output-dir")
    old, new = found["settings"], settings
    changed = [
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise UserError(
            f"{path}: the run to be continued had other settings ({'; '.join(changed)}): "
            "start it with its own, or give another --output-dir"
        )
    return found


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


def load_into(trunk, source, arch):
    """Load the ResNet of a checkpoint into a ResNetTrunk, and say where it was found. Arguments: see load_backbone."""
    state, line = load_backbone(source, arch)
    trunk.load_state_dict(state)
    print0(line)


# What files call laterals and outputs: torchvision's name, and the number of C2. torchvision and resim.py; ReSim; SoCo.
FPN_PARTS = {
    "inner_blocks.": ("inner_blocks", 0), "layer_blocks.": ("layer_blocks", 0),
    "fpn_lateral": ("inner_blocks", 2), "fpn_output": ("layer_blocks", 2),
    "neck.lateral_convs.": ("inner_blocks", 0), "neck.fpn_convs.": ("layer_blocks", 0),
}  # fmt: skip
FPN_NAME = re.compile(rf"({'|'.join(map(re.escape, FPN_PARTS))})(\d)\.(?:([01]|conv|bn)\.)?(\w+)$")


def fpn_tensors(source, wanted):
    """The convolutions and norms of the FPN in a checkpoint, under torchvision's names: inner_blocks.0.0.weight, ...

    Understood are files of resim.py and torchvision's detectors, released ReSim-FPN and SoCo checkpoints. Of two
    networks, the query one is taken.

    Args:
        wanted: {name: tensor of its shape}, what has a place.
    Returns:
        (those with a place, {} if there is no FPN; sorted names of the others)
    Errors:
        UserError: not a checkpoint, laterals of C3 to C5 missing, another shape, not finite.
    """
    state, found = load_checkpoint_file(source), {}
    for container in ("state_dict", "model", "model_ema"):
        state = state.get(container, state) if isinstance(state, dict) else {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        match = FPN_NAME.search(str(name))
        if match and torch.is_tensor(tensor) and not {"encoder_k", "key"} & {*name.split(".")}:
            part, first = FPN_PARTS[match[1]]
            found[f"{part}.{int(match[2]) - first}.{int(match[3] in ('1', 'bn'))}.{match[4]}"] = tensor
    taken = {name: tensor for name, tensor in found.items() if name in wanted}
    absent = [name for name in (f"inner_blocks.{level}.0.weight" for level in (1, 2, 3)) if name not in taken]
    if taken and absent:
        raise UserError(f"{source}: not a whole pyramid, {', '.join(absent)} (laterals of C3 to C5) are missing")
    for name, tensor in taken.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, wanted {tuple(wanted[name].shape)}"
            raise UserError(f"{source}: {name} is {shapes}: check --arch and the file of the pyramid")
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} is not finite")
    return taken, sorted(found.keys() - taken.keys())


def load_fpn(fpn, source):
    """Copy the FPN of a checkpoint into torchvision's, in place. Returns the line that says what was taken, and what
    had no place: biases, where norms follow. Errors: UserError, no FPN in the file; see fpn_tensors."""
    taken, homeless = fpn_tensors(source, fpn.state_dict())
    if not taken:
        raise UserError(f"{source}: there is no pyramid in it (inner_blocks, fpn_lateral or neck.lateral_convs)")
    fpn.load_state_dict(taken, strict=False)
    line = f"pyramid: {', '.join(sorted(taken))} from {source}"
    return line + (f"; no place in the detector (norms have its biases) for {', '.join(homeless)}" if homeless else "")
