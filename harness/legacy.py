# SPDX-License-Identifier: MIT
"""Helpers of the transfer scripts, probes and tools that the method scripts no longer need: see harness/run.py."""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

import common
from common import UserError, all_gather, key_seed, print0
from harness import images
from harness.pictures import pyplot, read_log, save_figure
from harness.weights import load_checkpoint_file, make_output_dir, save_atomically


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


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank among `size` processes, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def start_processes():
    """common.start_processes, as a World."""
    rank, size, device = common.start_processes()
    return World(rank, size, device.index or 0, device)


def wrap_distributed(network, world):
    """common.distributed."""
    return common.distributed(network, world.device)


def require_agreement(value, complaint):
    """Stop with a UserError on all processes if `value` is not the same on all of them."""
    if len(all_gather(torch.tensor([key_seed(value)])).unique()) > 1:
        raise UserError(complaint)


def mean_over_processes(x):
    """Mean of a tensor over the processes; in place where there are several."""
    if common.processes() > 1:
        dist.all_reduce(x)
        x /= common.processes()
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


def usable_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Batches(images.Batches):
    """images.Batches of a World."""

    def __init__(self, count, batch_size, world, seed, start, stop):
        super().__init__(count, batch_size, world.rank, world.size, seed, start, stop)


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
