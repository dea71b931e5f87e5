# SPDX-License-Identifier: MIT
"""What surrounds a training loop: processes, output folder, checkpoints, log, signals.

    run = Run("setsim", args)                          join the processes, open --data, refuse what cannot work
    run.resume(method, optimizer, scaler, exports)     continue from OUTPUT_DIR/checkpoint.pth if it exists
    for batch in run.steps(two_views):                 batches on the device, from run.step to the last one
        ...                                            forward, backward, optimizer step
        run.log(loss=loss, lr=lr, **values)            tensors are averaged over steps and processes

A model with a method `measure` is drawn and measured on fixed views before and after training. `draw(path, *batch)`
writes the picture, `picture` names it; `measure(*batch)` returns sums: hits, chance, count; `measured` ends the
sentence. The transfer scripts and probes/linear.py bring their own data set, and evaluate after the loop.

Attributes of a Run: rank, processes, device, images, epoch_steps, step (the one under way), epoch, total, ended.
"""

import contextlib
import copy
import json
import math
import os
import platform
import shlex
import signal
import sys
import time

import torch
import torch.distributed as dist
import torchvision

import common
from common import UserError, print0
from harness import images as data
from harness import pictures, weights

# These may differ when a run is continued.
NO_INFLUENCE = "data proposals output_dir demo steps workers print_freq save_every".split()
NO_INFLUENCE += "train_json val_json images masks trials eval_only predict".split()
MEASURED, MEASURED_IN_DEMO, BATCH = 32, 256, 32  # images that are measured; images encoded at a time


class Run:
    """See above.

    Args:
        name: of the script. args: what common.run_flags declares, and `demo`; here too: batch_size, seed, steps, workers,
        print_freq, save_every, output_dir, amp, lr. images: a data set for `steps` with name(index) and fingerprint();
        default: the images of --data. total: steps in all; default: --epochs. least: images a process needs.
        settings: more plain values that a continued run must share, such as the name of the test data.
    """

    def __init__(self, name, args, images=None, total=None, least=2, **settings):
        self.name, self.args, self.step, self.values, self.kept, self.result = name, args, 0, [], {}, None
        self.rank, self.processes, self.device = common.start_processes()
        self.signalled, self.stop = 0, 0  # a signal came to this process; all processes have agreed to stop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember_signal)
        self.images = data.open_images(args.data, args.size, args.seed) if images is None else images
        self.share = args.batch_size // self.processes
        if args.batch_size % self.processes:
            raise UserError(f"--batch-size {args.batch_size} is not divisible by {self.processes} processes")
        if self.share < least:
            raise UserError(f"--batch-size {args.batch_size} leaves one image for each process: batch norm needs two")
        if len(self.images) < args.batch_size:
            raise UserError(
                f"{len(self.images)} images are fewer than --batch-size {args.batch_size}: give a smaller one"
            )
        self.epoch_steps = len(self.images) // args.batch_size
        self.total = total or args.epochs * self.epoch_steps
        self.last = self.total if args.steps is None else min(self.total, args.steps)
        self.settings = settings
        weights.make_output_dir(args.output_dir)

    def remember_signal(self, number, frame):
        """SIGTERM or Ctrl-C: finish the step, save, exit 0. The next Ctrl-C stops at once."""
        self.signalled = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def epoch(self):
        return self.step // self.epoch_steps

    @property
    def ended(self):
        """True after the last step of the schedule, without a signal that all have seen."""
        return self.step >= self.total and not self.stop

    @property
    def continued(self):
        """True if there is a checkpoint to continue from."""
        return os.path.exists(self.path("checkpoint.pth"))

    @property
    def init(self):
        """--init, or None if the run is continued."""
        return None if self.continued else self.args.init

    def path(self, name):
        return os.path.join(self.args.output_dir, name)

    def fit_queue(self, size, most=65536, keys=1):
        """K of a MoCo method: --queue-size, or by default `most`, or less so that the queue holds less than an epoch.

        Args:
            size: --queue-size or None. keys: what an image adds to the queue at each step.
        """
        groups = math.ceil(self.share / common.GROUP)
        if self.share != groups * common.GROUP:
            print0(f"batch norm: groups of {self.share // groups} images instead of {common.GROUP}")
        if groups * self.processes == 1:
            print0("warning: one group of images: shuffling batch norm does nothing, and keys may leak through it")
        fitting = max(1, self.epoch_steps - 1) * self.args.batch_size * keys
        if size and size > fitting:
            print0(f"warning: --queue-size {size} holds more than an epoch, so several keys of one image")
        elif not size and fitting < most:
            print0(f"queue: {fitting} keys instead of {most}, less than an epoch of {len(self.images)} images")
        return size or min(most, fitting)

    # checkpoints ------------------------------------------------------------------------------------------------------

    def resume(self, method, optimizer, scaler, exports, **kept):
        """Continue from the checkpoint in the output folder, if it exists. Its settings must be those of this run.

        Args:
            exports: {file name: module}, the weights that are saved beside the checkpoint for others to load.
            kept: more values for the checkpoint; those of the checkpoint take their place in `self.kept`.
        """
        self.method, self.optimizer, self.scaler, self.exports, self.kept = method, optimizer, scaler, exports, kept
        self.bad = data.BadImages(self.images)
        own = {name: value for name, value in vars(self.args).items() if name not in NO_INFLUENCE}
        self.settings = own | self.settings | {"files": self.images.fingerprint(), "processes": self.processes}
        if self.continued:
            state = weights.load_checkpoint(self.path("checkpoint.pth"), self.name, self.settings)
            method.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            self.step, self.bad.found = state["step"], set(state["bad_images"])
            self.kept = {name: state[name] for name in kept}
        seen = common.all_gather(torch.tensor([common.key_seed(self.settings["files"], self.step)]))
        if len(seen.unique()) > 1:
            raise UserError(
                "the processes see different images or checkpoints: --data and --output-dir must be the same on all "
                "machines"
            )

    def save(self):
        """Write the exports, then the checkpoint, on the first process. The checkpoint holds the queues too (S23)."""
        if self.rank > 0:
            return
        for name, module in self.exports.items():
            weights.save_weights(module, self.path(name))
        state = {"script": self.name, "settings": self.settings, "step": self.step, "model": self.method.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        state |= {"bad_images": sorted(self.bad.found), **self.kept}
        weights.save_atomically(state, self.path("checkpoint.pth"))

    # steps ------------------------------------------------------------------------------------------------------------

    def steps(self, views, plain_views=None):
        """Yield the batches of all steps that are left. Between them: log, save, and stop at a signal.

        Args:
            views: function from an item of the images to tensors, which may draw from torch's global generator; or a
            data set, see `loader`. plain_views: the same for `method.measure`; default `views`.
        """
        measure = self.measure if hasattr(self.method, "measure") else lambda *_: None
        if not self.open_log():
            return
        if self.step == 0:
            measure("start", views, plain_views or views)
        dataset = data.Views(self.images, views, self.args.seed) if callable(views) else views
        first, loader = self.step, self.loader(dataset, self.step, self.last)
        with self.progress() as bar:
            self.started, self.waited, batches = time.time(), 0.0, iter(loader)
            (self.stop,) = agree(self.signalled)
            while self.step < self.last and not self.stop:
                asked = time.time()
                *batch, index, passed = next(batches)
                self.waited += time.time() - asked
                yield [x.to(self.device, non_blocking=True) if torch.is_tensor(x) else x for x in batch]
                self.step += 1
                self.end_step(index, passed, bar)
        if self.step == first:
            self.save()  # no step was taken
        if self.stop:
            print0(f"stopped by a signal and saved at step {self.step}; the same command continues")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit())  # all is saved; the same command does the rest again
        if self.rank == 0:
            pictures.draw_curves(self.args.output_dir)  # first: a run with a last measurement counts as finished
        if self.step >= self.last:
            measure("end", views, plain_views or views)
        if self.rank == 0:
            print0(f"{self.args.output_dir}: {', '.join(sorted(os.listdir(self.args.output_dir)))}")

    def loader(self, dataset, start, stop):
        """Batches of the steps from `start` to `stop`.

        Args:
            dataset: dataset[epoch, index] -> *tensors, index, unreadable images passed over. It may have `kinds`, see
            images.Batches, and `collate`, a function from the items of a batch to what `steps` yields.
        """
        return torch.utils.data.DataLoader(
            dataset,
            batch_sampler=data.Batches(
                len(self.images), self.args.batch_size, self.rank, self.processes, self.args.seed, start, stop,
                getattr(dataset, "kinds", None),
            ),
            collate_fn=getattr(dataset, "collate", None),
            num_workers=self.args.workers,
            worker_init_fn=data.detach_worker,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def end_step(self, index, passed, bar):
        """What follows a step: agree with the other processes, log, save."""
        args = self.args
        self.bad.note(index, passed)
        self.stop, unreadable = agree(self.signalled, len(self.bad.new))
        if unreadable:
            self.bad.share()
        ending = self.stop or self.step == self.last
        saving = ending or self.step % (args.save_every or self.epoch_steps) == 0
        logging = ending or self.step % args.print_freq == 0
        if saving or logging:
            means = self.means()  # before saving: it refuses a loss that was not finite
        if logging:
            seconds = time.time() - self.started
            pace, share = len(self.values) * args.batch_size / seconds, self.waited / seconds
            line = {"epoch": self.step / self.epoch_steps, **means, "images_per_s": pace, "data_share": share}
            self.write(**line, bad_images=len(self.bad.found))
            names = [name for name in means if name not in self.constants and not name.startswith("std")]
            shown = f"epoch {line['epoch']:.2f} {' '.join(f'{name} {means[name]:.3f}' for name in names)} "
            self.show(bar, f"{shown}{pace:.0f} img/s data {share:.0%}", pace)
            self.values, self.started, self.waited = [], time.time(), 0.0
        if saving:
            self.save()

    def measure(self, title, views, plain_views):
        """Draw and measure what the method makes of fixed views; the same on all processes.

        Uses a copy in training mode, so batch statistics are those of the loss and the method stays unchanged.
        """
        method, images = copy.deepcopy(self.method), self.images

        def batch(views, items, first):
            rows = []
            for i, item in enumerate(items, first):
                with common.drawing("probe", self.args.seed, i):
                    rows.append(views(item))
            return [torch.stack([*x]).to(self.device) for x in zip(*rows, strict=True)]

        with torch.no_grad():
            some = [images[common.key_seed("picture", i) % len(images)][0] for i in range(BATCH)]
            path = self.path(f"{method.picture}_{title}.png") if self.rank == 0 else None
            method.draw(path, *batch(views, some, 0))
            sums = 0
            for first in range(0, MEASURED_IN_DEMO if self.args.demo else MEASURED, BATCH):
                items = [images.probe(i) for i in range(first, first + BATCH)]
                sums += torch.tensor(method.measure(*batch(plain_views, items, first)), dtype=torch.float64)
        count = max(int(sums[2]), 1)
        hits, chance = (sums[:2] / count).tolist()
        where = "held-out scenes" if images.held_out else "images of --data"
        print0(f"{title} of training: {hits:.1%} of {count} {method.measured}, in {where} (chance {chance:.1%})")
        self.write(probe={"hits": hits, "chance": chance, "count": count})

    # log --------------------------------------------------------------------------------------------------------------

    def open_log(self):
        """Start log.jsonl, or drop what follows the checkpoint's step from it. False if the run is finished."""
        lines = [x for x in pictures.read_log(self.path("log.jsonl")) if self.step and x.get("step", 0) <= self.step]
        last = [line for line in lines if line.get("step") == self.step and ("probe" in line or "result" in line)]
        if self.step >= self.last and last:
            self.result = last[-1].get("result")
            where = f"at step {self.step} of {self.last}; give another --output-dir for a new run"
            print0(f"{self.args.output_dir}: finished, {where}")
            return False
        lines = lines or [{"command": command(), "versions": versions(), "settings": self.settings}]
        if self.rank == 0:
            weights.write_atomically(self.path("log.jsonl"), [json.dumps(line).encode() + b"\n" for line in lines])
        if self.step:
            print0(f"continued from step {self.step}")
        print0(
            f"{self.name}: {self.settings['files']}; {self.epoch_steps} steps an epoch, {self.last} in all; "
            f"batch {self.args.batch_size} = {self.processes} x {self.share} on {self.device.type}; "
            f"lr {self.optimizer.defaults['lr']:g} (--lr {self.args.lr:g} scaled to this batch); amp {self.args.amp}"
        )
        return True

    def log(self, **values):
        """The values of this step: scalar tensors, or plain numbers. Nothing waits for the device."""
        self.values.append({name: x.detach() if torch.is_tensor(x) else x for name, x in values.items()})

    def means(self):
        """{name: number}: of the tensors the means since the last line over all processes, of the numbers the last.

        Errors:
            UserError: the loss was not finite at one of the steps, on any process.
        """
        last = self.values[-1]
        names = [name for name, value in last.items() if torch.is_tensor(value)]
        self.constants = last.keys() - set(names)
        sums = torch.stack([torch.stack([step[name].float() for name in names]) for step in self.values]).mean(0)
        if self.processes > 1:
            dist.all_reduce(sums)
        means = last | dict(zip(names, (sums / self.processes).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"the loss is not finite (steps {self.step - len(self.values) + 1} to {self.step}); the checkpoint saved "
                "before is kept. Start anew in another --output-dir with a lower --lr; with --amp fp16, try bf16 or none"
            )
        return means

    def write(self, **values):
        """Append a line to log.jsonl."""
        if self.rank == 0:
            with open(self.path("log.jsonl"), "a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")

    def progress(self):
        """A bar on a terminal, if tqdm is installed."""
        if self.rank == 0 and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                return tqdm(total=self.last, initial=self.step, unit="step", dynamic_ncols=True)
        return contextlib.nullcontext()

    def show(self, bar, text, pace):
        """Move the bar, or print a line."""
        if bar is not None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(self.step - bar.n)
            return
        left = int((self.last - self.step) * self.args.batch_size / pace)
        print0(f"step {self.step}/{self.last} {text} eta {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")


def agree(*numbers):
    """Sums of small integers over all processes, so that all decide alike at the same step. Works on the CPU."""
    total = torch.tensor(numbers)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def command():
    """This run's command line, as it would be typed."""
    return shlex.join([os.path.basename(sys.executable), *sys.argv])


def versions():
    """{package: version} of what results depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}


def bf16_is_fast():
    """True if bf16 autocast saves time here: GPUs since Ampere, CPUs with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def main(train):
    """Run `train()`. A UserError or a full disk is one line on stderr and exit code 2."""
    who = os.path.basename(sys.argv[0]) + (f" (process {os.environ['RANK']})" if "RANK" in os.environ else "")
    try:
        train()
    except UserError as error:
        print(f"{who}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if not weights.is_disk_full(error):
            raise
        line = weights.disk_full_line(error.filename or "the output")
        print(f"{who}: error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
