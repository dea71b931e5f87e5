# SPDX-License-Identifier: MIT
"""What the two transfer scripts share: settings that a run remembers, trials, shares of a test set, pictures of a folder."""

import argparse
import contextlib
import json
import os

import numpy as np
import torch
import torch.distributed as dist

import common
from common import UserError, number, print0
from harness import images, pictures, run, weights

# Okabe and Ito's colours without black, and three more: colour-blind readers can tell them apart.
COLOURS = "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #AA4499 #88CCEE #999999".split()
SCENE = 136  # pixels a side of built-in scenes
FORGOTTEN = "output_dir trials steps eval_only predict workers print_freq save_every demo".split()


def run_flags(parser, name, model):
    """Add the flags that both scripts have. `model`: "detector" or "segmenter"."""
    flag, some = parser.add_argument, number(int, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # fmt: off
    flag("--output-dir", default=f"runs/{name}", help=f"folder for checkpoint.pth, {model}.pth, log.jsonl, results.jsonl and pictures; a run found there is continued")
    flag("--demo", action="store_true", help="ResNet-18 on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    flag("--weights", default="random", metavar="FILE", help="the pre-trained backbone: any checkpoint with a ResNet in it, 'imagenet' (torchvision's supervised weights) or 'random'")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet")
    flag("--iterations", type=some, help="length of the schedule in the task's batches, drops and warm-up in proportion; default: the task's")
    flag("--batch-size", type=some, help="images of all processes together; the learning rate is scaled with it and the iterations against it; default: the task's")
    flag("--lr", type=number(float, 0), help="learning rate at the task's batch, scaled linearly; default: the task's")
    flag("--amp", default="none", choices=tuple(common.AMP), help="precision of training; losses and testing are always fp32")
    flag("--seed", default=0, type=number(int, 0), help="key of all random draws")
    flag("--trials", default=1, type=some, help="number of runs, with seeds SEED, SEED + 1, ...; prints their mean and deviation")
    flag("--eval-only", action="store_true", help=f"evaluate the {model} in --output-dir, do not train")
    flag("--predict", metavar="DIR", help=f"draw what the {model} in --output-dir finds in a folder of images")
    flag("--steps", type=number(int, 0), help="stop after this many steps in all, schedule unchanged; 0: print settings and model, without data")
    flag("--workers", default=min(4, cores), type=number(int, 0), help="loader processes of each training process; results do not depend on it")
    flag("--print-freq", default=20, type=some, help="steps between log lines")
    flag("--save-every", default=1000, type=some, help="steps between checkpoints")
    # fmt: on


def parse(parser, argv, name, presets, free):
    """Parse a command line. The dict `presets(args)` replaces defaults. --eval-only and --predict also take over the
    settings of the run in --output-dir.

    Args:
        name: of the script. free: settings that --eval-only and --predict may change.
    Returns:
        (arguments; the checkpoint for --eval-only and --predict, else None)
    Errors:
        UserError: no such run, or a flag that the trained model contradicts.
    """
    args, trained = parser.parse_args(argv), None
    if args.eval_only and args.predict:
        parser.error("--eval-only and --predict are two jobs: give one of them")
    if args.eval_only or args.predict:
        trained = load_run(args.output_dir, name)
        parser.set_defaults(**{key: value for key, value in trained["args"].items() if key not in FORGOTTEN})
    elif args.demo:
        parser.set_defaults(task="scenes", arch="resnet18", amp="bf16" if run.bf16_is_fast() else "none")
    if not trained:
        args = parser.parse_args(argv)
        if args.task is None:
            parser.error("give --task, or --demo for a small complete job")
        parser.set_defaults(**presets(args))
    args = parser.parse_args(argv)
    for key, value in trained["settings"].items() if trained else ():
        if key not in free and getattr(args, key, value) != value:
            flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
            raise UserError(f"{flag}: the model in {args.output_dir} was trained with {value}")
    return args, trained


def load_run(folder, name):
    """The checkpoint of a finished or unfinished run. Errors: UserError, there is none of this script."""
    path = os.path.join(folder, "checkpoint.pth")
    if not os.path.exists(path):
        raise UserError(
            f"{path}: no such file; --eval-only and --predict want the --output-dir of a run (seed0, ... of trials)"
        )
    found = weights.load_checkpoint_file(path)
    if not isinstance(found, dict) or found.get("script") != name:
        raise UserError(f"{path}: not a checkpoint of {name}.py")
    return found


def scene_range(data, split):
    """(first, count) of the built-in scenes that `--data scenes[:COUNT]` stands for; default 512, and a quarter to test."""
    data = data or "scenes:512"
    if data.partition(":")[0] != "scenes":
        raise UserError(f"--data {data}: --task scenes wants 'scenes' or 'scenes:COUNT'")
    count = 512 if data == "scenes" else len(images.open_images(data, SCENE, 0))
    return (0, count) if split == "train" else (count, max(count // 4, 8))


def linear_rule(args, protocol):
    """(steps, learning rate) of --batch-size, by the linear rule from those of the protocol's batch."""
    stretch = protocol["batch_size"] / args.batch_size
    return max(round(args.iterations * stretch), 1), args.lr / stretch


def changed(args, protocol, names):
    """ "; changed: lr 0.01, ..." for a result's title: the settings that are not the protocol's; "" if all are."""
    found = [f"{name} {getattr(args, name)}" for name in names.split() if getattr(args, name) != protocol[name]]
    found += [f"amp {args.amp}"] if args.amp != "none" else []
    return f"; changed: {', '.join(found)}" if found else ""


def run_trials(args, trial, numbers):
    """Run `trial(args)` for each seed. results.jsonl gets its result, a dict, as soon as it is there.

    Args:
        trial: function of arguments with their own seed and folder; None: a signal or --steps ended it.
        numbers: function from a result to {name: number}, what is averaged over trials.
    """
    results = []
    for seed in range(args.seed, args.seed + args.trials):
        folder = args.output_dir if args.trials == 1 else os.path.join(args.output_dir, f"seed{seed}")
        result = trial(argparse.Namespace(**vars(args) | {"seed": seed, "output_dir": folder}))
        if result is None:
            return
        results.append(result)
        if common.rank() == 0:  # as many lines as trials are finished, also after a kill
            lines = [json.dumps(one).encode() + b"\n" for one in results]
            weights.write_atomically(os.path.join(args.output_dir, "results.jsonl"), lines)
    if args.trials > 1:
        table = {name: [numbers(result)[name] for result in results] for name in numbers(results[0])}
        text = "; ".join(f"{name} {np.mean(x):.2f} +- {np.std(x, ddof=1):.2f}" for name, x in table.items())
        print0(f"{results[0]['protocol']}; weights {args.weights}; {len(results)} trials: {text}")


# ==== Testing =========================================================================================================


def ready_to_test(model):
    """Evaluation mode. On CPUs each process has its own running statistics: the first one's, which are saved, count."""
    if common.processes() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return model.eval()


class Share(torch.utils.data.Dataset):
    """self[i] -> (index, prepare(index), None) of every n-th index; (index, None, why) if an image cannot be read."""

    def __init__(self, prepare, count):
        self.prepare, self.indices = prepare, range(common.rank(), count, common.processes())

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        index = self.indices[place]
        try:
            return index, self.prepare(index), None
        except OSError as error:
            return index, None, str(error)


def share_of(data, prepare, workers):
    """Yield (index, prepare(index)) of this process's share of a test set. Unreadable images are named and left out.

    Errors:
        UserError at the end: more than 1 % (and more than one) cannot be read.
    """
    share, skipped = Share(prepare, len(data)), 0
    loader = torch.utils.data.DataLoader(
        share, batch_size=None, num_workers=workers, worker_init_fn=images.detach_worker, collate_fn=lambda x: x
    )
    for index, item, why in pictures.progress(loader, len(share)) if common.rank() == 0 else loader:
        if item is None:
            print(f"cannot be read, left out: {data.name(index)} ({why})", flush=True)
            skipped += 1
        else:
            yield index, item
    (skipped,) = run.agree(skipped)
    if skipped > max(1, len(data) // 100):
        raise UserError(f"{skipped} of {len(data)} test images cannot be read (more than 1 %): mend or remove them")


def together(found):
    """A dict with the entries of all processes, on each of them."""
    parts = [found]
    if common.processes() > 1:
        parts = [None] * common.processes()
        dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


# ==== Pictures ========================================================================================================


def folder_to_predict(args):
    """Yield (name, image) of the readable images below --predict."""
    if common.processes() > 1:
        raise UserError("--predict is a job for one process: start it without torchrun")
    names = images.list_images(args.predict, "--predict")
    for name in pictures.progress(names, len(names)):
        try:
            image = images.read_image(os.path.join(args.predict, name))
        except OSError as error:
            print0(f"unreadable, passed over: {name} ({error})")
            continue
        yield name, image


def save_picture(image, *path):
    """Write a PIL image to a PNG whose folder is made if need be."""
    os.makedirs(os.path.dirname(os.path.join(*path)), exist_ok=True)
    image.save(os.path.join(*path))


def first_readable(data, wanted, count=6):
    """(index, image) of the first `count` images with `wanted(index)` that can be read."""
    found = []
    for index in filter(wanted, range(len(data))):
        with contextlib.suppress(OSError):
            found.append((index, data.read(index)))
        if len(found) == count:
            break
    return found
