# SPDX-License-Identifier: MIT
"""Linear evaluation: how well a linear classifier on the frozen backbone tells image classes apart.

    image --crop, flip--> x --frozen ResNet--> C5 --mean over cells--> h --fc--> logits --> cross entropy

    N images of this process    s side of x    C channels of C5    classes of DATA/train

    python -m probes.linear --data /imagenet --weights runs/setsim/resnet50.pth                  SetSim's: 90 epochs, cosine
    python -m probes.linear --data /imagenet --weights runs/resim/resnet50.pth --preset moco     ReSim's: 100 epochs, steps
    torchrun --nproc_per_node 8 -m probes.linear --data /imagenet --weights FILE                 the same on eight GPUs

DATA/train/CLASS/... and DATA/val/CLASS/... hold the images; class folders may have subfolders. The last batch of an epoch
that is not full is left out (an epoch's order is a new one). Every image of val counts once, however many processes.

The learning rate of 30 is right for a mean over cells as it is, without weight decay; features of another scale need
another (SwAV's: 0.3): a loss in the thousands says so, as with random weights. It is the value at batch 256, scaled
linearly.

OUTPUT_DIR gets checkpoint.pth, fc.pth (weight and bias under torchvision's names), log.jsonl, curves.png and, after each
epoch, results.json. A run that was killed goes on from its last checkpoint with the same command, and ends with the same
weights, bit for bit on CPUs.
"""

import argparse
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms

import common
import harness.images
import harness.legacy
import harness.pictures
import harness.run
from common import UserError, print0
from probes.frozen import frozen_trunk, header, require_own_folder, write_results

# ======================================================================================================================
# Settings
# ======================================================================================================================

EPOCHS = {"setsim": 90, "moco": 100}
MOMENTUM, WEIGHT_DECAY = 0.9, 0.0
AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m probes.linear", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", required=True, metavar="DIR", help="folder with train/CLASS/ and val/CLASS/ full of images")
    flag("--weights", required=True, metavar="FILE", help="backbone to be evaluated: any checkpoint with a ResNet in it, 'imagenet' or 'random'")
    flag("--output-dir", default="runs/linear", help="results.json, fc.pth, checkpoint.pth and log.jsonl go there; a run found there is continued")
    flag("--preset", default="setsim", choices=tuple(EPOCHS), help="setsim: 90 epochs, cosine; moco (ReSim's, too): 100 epochs, x 0.1 after 60 %% and 80 %% of them")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet that the weights belong to")
    flag("--size", default=224, type=int, help="side of a crop in pixels; test images are resized to 8/7 of it and cropped")
    flag("--epochs", default=None, type=int, help="the schedule's length; default the preset's")
    flag("--batch-size", default=256, type=int, help="over all processes; must be divisible by their number")
    flag("--lr", default=30.0, type=float, help="at batch 256, scaled linearly with the batch; no other value than 30 is comparable with the papers")
    flag("--amp", default="none", choices=tuple(AMP), help="autocast of the frozen backbone, faster where the hardware has it; the classifier is fp32 always")
    flag("--seed", default=0, type=int, help="of crops, flips, order, fc's first weights and random backbones")
    flag("--steps", default=None, type=int, help="stop after so many steps in all, schedule unchanged")
    flag("--workers", default=min(8, harness.legacy.usable_cores()), type=int, help="loader processes for each process; no influence on results")
    flag("--print-freq", default=10, type=int, help="steps between log lines")
    flag("--save-every", default=None, type=int, help="steps between checkpoints besides those at the end of each epoch")
    # fmt: on
    args = parser.parse_args(argv)
    harness.legacy.check_range(
        args, size=(32, None), epochs=(1, None), batch_size=(1, None), lr=(0, None), seed=(0, None), steps=(0, None),
        workers=(0, None), print_freq=(1, None), save_every=(1, None),
    )  # fmt: skip
    args.epochs = args.epochs or EPOCHS[args.preset]
    return args


def learning_rate(preset, lr, epoch, epochs):
    """The rate of an epoch: cosine (PAPER: SetSim A.2), or MoCo's steps, x 0.1 at 60 and 80 of 100 (ReSim, too)."""
    if preset == "setsim":
        return common.cosine_lr(lr, epoch, epochs)
    return lr * 0.1 ** ((10 * epoch >= 6 * epochs) + (10 * epoch >= 8 * epochs))


# ======================================================================================================================
# Data
# ======================================================================================================================


class ClassFolder(harness.images.ImageFolder):
    """The images below root/CLASS/, read as ImageFolder does, and the class of each.

    Args:
        root: a folder of class folders. classes: those of the training set; None: the names of the folders, sorted.
    Attributes:
        classes: their names. labels: (images,) int64, positions in `classes`.
    Errors:
        UserError: no such folder, no images, images in no class folder or in one that the training set has not.
    """

    def __init__(self, root, classes=None):
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such folder: --data needs train/CLASS/IMAGE and val/CLASS/IMAGE")
        paths = harness.images.list_images(root)
        names = [path.split(os.sep)[0] if os.sep in path else None for path in paths]
        self.root, self.paths = root, np.array([os.fsencode(path) for path in paths])
        self.classes = classes or sorted(set(names) - {None})
        position = {name: i for i, name in enumerate(self.classes)}
        for path, name in zip(paths, names, strict=True):
            if name not in position:
                place = "in no class folder" if name is None else "in a class folder that train/ has not"
                raise UserError(f"{os.path.join(root, path)}: {place}: --data needs train/CLASS/IMAGE, val/CLASS/IMAGE")
        self.labels = torch.tensor([position[name] for name in names])


class Crops(torch.utils.data.Dataset):
    """Labelled crops. Training: RandomResizedCrop (0.08 to 1 of the area) and a flip, drawn from (seed, epoch, index) and
    nothing else; testing: the centre of the image at 8/7 of the size (256 for 224).

    `self[epoch, index]` is (x (3, s, s) uint8, its label, index, unreadable images passed over: see ImageFolder).
    """

    def __init__(self, images, size, seed, training):
        self.images, self.seed = images, seed
        cut = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        if training:
            cut = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*cut, transforms.PILToTensor()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        image, passed = self.images[index]
        with common.drawing("crop", self.seed, epoch, index):
            x = self.transform(image)
        return x, self.images.labels[(index + passed) % len(self)], index, passed


# ======================================================================================================================
# Features and their evaluation
# ======================================================================================================================


@torch.no_grad()
def features(trunk, x, amp="none"):
    """(N, 3, s, s) uint8 -> (N, C) float32: C5 averaged over its cells, neither normalised nor scaled."""
    with torch.autocast(x.device.type, AMP[amp], enabled=amp != "none"):
        C5 = trunk(common.normalise(x))[-1]
    return C5.float().mean((2, 3))


def hits(logits, labels):
    """(N, classes), (N,) -> (N, 2) bool: whether the label is the highest, and one of the five highest."""
    best = logits.topk(min(5, logits.shape[1])).indices  # (N, 5)
    return torch.stack([best[:, 0] == labels, (best == labels[:, None]).any(1)], 1)


def require_frozen(trunk, state):
    """Errors: RuntimeError if a weight or a running statistic of the backbone is not what was loaded, bit for bit."""
    moved = [name for name, tensor in trunk.state_dict().items() if not torch.equal(tensor.cpu(), state[name])]
    if moved:
        raise RuntimeError(f"the frozen backbone has changed: {len(moved)} tensors, the first is {moved[0]}")


def fingerprint(state):
    """A name for these weights, whatever file they came from: a resumed run must find the same ones."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def evaluate(trunk, fc, loader, amp, bad, world, stop_signal):
    """Top-1 and top-5 accuracy on this process's share of the test images, added up over all processes.

    Returns:
        {"top1", "top5" in percent, "images"}; None after a signal: what came so far is dropped.
    Errors:
        UserError: no image can be read.
    """
    right, count = torch.zeros(2, dtype=torch.int64), 0
    batches = (
        harness.pictures.progress(loader, len(loader), what="batches of test images") if world.rank == 0 else loader
    )
    for x, labels, index, passed in batches:
        with torch.no_grad():
            logits = fc(features(trunk, x.to(world.device), amp))
        own = passed == 0  # an image in the place of an unreadable one would count twice
        right += hits(logits, labels.to(world.device)).cpu()[own].sum(0)
        count += int(own.sum())
        bad.note(index, passed)
        if stop_signal.arrived:
            break
    stop, unreadable, count, *right = harness.run.agree(stop_signal.arrived, len(bad.new), count, *right.tolist())
    if unreadable:
        bad.share()
    if stop:
        return None
    if not count:
        raise UserError(f"none of the {len(bad.source)} test images can be read")
    return {"top1": 100 * right[0] / count, "top5": 100 * right[1] / count, "images": count}


# ======================================================================================================================
# Training
# ======================================================================================================================

NAME = "linear"
CURVES = {
    "loss": ["loss"],
    "top-1, %": ["train_top1", "top1"],
    "top-5, %": ["train_top5", "top5"],
    "learning rate": ["lr"],
}
SETTINGS = "preset arch size epochs batch_size lr amp seed".split()


def report(results):
    """What results.json says: the last evaluation, the best top-1, and all evaluations. Args: see `results` in main."""
    best = max(results, key=lambda result: result["top1"])
    return {**results[-1], "best_top1": best["top1"], "best_epoch": best["epoch"], "evaluations": results}


def summary(results):
    """The same as a line for the eye."""
    return (
        "top-1 {top1:.2f} top-5 {top5:.2f} on {images} images after epoch {epoch:g}, "
        "best top-1 {best_top1:.2f} after epoch {best_epoch:g}"
    ).format(**report(results))


def main(argv=None):
    args = get_args(argv)
    world = harness.legacy.start_processes()
    stop_signal = harness.legacy.StopSignal()

    # data -------------------------------------------------------------------------------------------------------------
    images = ClassFolder(os.path.join(args.data, "train"))
    tests = ClassFolder(os.path.join(args.data, "val"), images.classes)
    if len(images.classes) < 2:
        raise UserError(f"{images.root}: one class alone ({images.classes[0]}): there is nothing to tell apart")
    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by {world.size} processes")
    if len(images) < args.batch_size:
        raise UserError(f"{len(images)} images are fewer than --batch-size {args.batch_size}: give a smaller one")
    epoch_steps = len(images) // args.batch_size
    total = args.epochs * epoch_steps
    last = total if args.steps is None else min(total, args.steps)

    # network, optimiser, resume ---------------------------------------------------------------------------------------
    trunk, loaded, line = frozen_trunk(args.weights, args.arch, args.seed, world.device)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"weights": fingerprint(loaded), "processes": world.size}
    settings |= {"files": images.fingerprint(), "test_files": tests.fingerprint()}
    checkpoints = harness.legacy.Checkpoints(args.output_dir, NAME, settings)
    state = checkpoints.load()
    if not state:
        require_own_folder(args.output_dir, settings)
    harness.legacy.require_agreement(
        (settings["files"], settings["test_files"], settings["weights"], state and state["step"]),
        "the processes see different images, weights or checkpoints: --data, --weights and --output-dir must be the same "
        "on all machines",
    )
    fc = nn.Linear(trunk.widths[-1], len(images.classes))
    nn.init.normal_(fc.weight, 0, 0.01, generator=common.generator("fc", args.seed))
    nn.init.zeros_(fc.bias)
    fc.to(world.device)
    lr = args.lr * args.batch_size / 256  # DEVIATION: B4. MoCo and released ReSim leave scaling to their user
    optimizer = torch.optim.SGD(fc.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    step, results = 0, []  # results: one {"epoch", "step", "top1", "top5", "images"} for each evaluation
    unreadable = [], []  # those named before, of train and of val
    if state:
        fc.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, results = state["step"], state["results"]
        unreadable = state["bad_images"]
        print0(f"continued from step {step}; another --output-dir begins a new run")
    bad = harness.images.BadImages(images, unreadable[0])
    bad_tests = harness.images.BadImages(tests, unreadable[1], outcome="it is left out")
    network = harness.legacy.wrap_distributed(fc, world)

    # start ------------------------------------------------------------------------------------------------------------
    print0(line)
    print0(
        f"{NAME}: {images.fingerprint()}; {len(images.classes)} classes; {len(tests)} test images; {epoch_steps} steps an "
        f"epoch, {last} in all; batch {args.batch_size} = {world.size} x {args.batch_size // world.size} on "
        f"{world.device.type}; lr {lr:g} = {args.lr:g} x {args.batch_size}/256, {args.preset}; amp {args.amp}"
    )
    run = header("probes.linear", argv, settings)
    log = harness.legacy.RunLog(args.output_dir, run, step, last, world.rank == 0)
    loading = dict(
        num_workers=args.workers, worker_init_fn=harness.images.detach_worker, pin_memory=world.device.type == "cuda"
    )
    loader = torch.utils.data.DataLoader(
        Crops(images, args.size, args.seed, training=True),
        batch_sampler=harness.legacy.Batches(len(images), args.batch_size, world, args.seed, step, last),
        **loading,
    )
    test_loader = torch.utils.data.DataLoader(
        Crops(tests, args.size, args.seed, training=False),
        sampler=[(0, index) for index in range(world.rank, len(tests), world.size)],
        batch_size=args.batch_size // world.size,
        **loading,
    )

    def save():
        if world.rank == 0:
            weights = {f"fc.{name}": tensor for name, tensor in fc.state_dict().items()}
            checkpoints.save(
                {"fc.pth": weights}, step=step, model=fc.state_dict(), optimizer=optimizer.state_dict(),
                results=results, bad_images=[sorted(bad.found), sorted(bad_tests.found)],
            )  # fmt: skip

    def due():
        """Whether an evaluation belongs to this step: at the end of each epoch, and of the run."""
        return step == last or step > 0 and step % epoch_steps == 0

    def evaluated():
        return bool(results) and results[-1]["step"] == step

    def end_epoch():
        """Check that the backbone stood still, evaluate, save the result. False: a signal came before it was there."""
        require_frozen(trunk, loaded)
        found = evaluate(trunk, fc, test_loader, args.amp, bad_tests, world, stop_signal)
        if found is None:
            return False
        results.append({"epoch": step / epoch_steps, "step": step, **found})
        if world.rank == 0:
            write_results(args.output_dir, run | report(results))
        save()
        log.write(results[-1])
        print0(summary(results))
        return True

    # steps ------------------------------------------------------------------------------------------------------------
    meter, save_every = harness.legacy.Meter(args.batch_size), args.save_every or epoch_steps
    stop = due() and not evaluated() and not end_epoch()  # killed between training and evaluating an epoch
    for x, labels, index, passed in () if stop else meter.timed(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.preset, lr, step // epoch_steps, args.epochs)
        x, labels = x.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
        logits = network(features(trunk, x, args.amp))  # (N, classes)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1

        top1, top5 = 100 * hits(logits, labels).float().mean(0)
        meter.add({"loss": loss, "train_top1": top1, "train_top5": top5})
        bad.note(index, passed)
        stop, unreadable = harness.run.agree(stop_signal.arrived, len(bad.new))
        if unreadable:
            bad.share()
        saving = stop or due() or step % save_every == 0
        logging = stop or due() or step % args.print_freq == 0
        if saving or logging:
            line = {"epoch": step / epoch_steps, "lr": optimizer.param_groups[0]["lr"], **meter.means(step)}
        if saving:
            save()
        if due() and not stop:
            stop = not end_epoch()
        if logging:
            log.step(step, line | {"bad_images": len(bad.found)}, shown(line))
            meter.reset()
        if stop:
            break

    # results ----------------------------------------------------------------------------------------------------------
    log.close()
    if stop:
        print0(f"stopped by a signal and saved at step {step}; the same command continues")
        return
    print0(f"finished, at step {step} of {last}: {summary(results)}")
    if world.rank == 0:
        harness.legacy.draw_curves(args.output_dir, CURVES)
        print0(f"{args.output_dir}: {', '.join(sorted(os.listdir(args.output_dir)))}")


def shown(line):
    """The part of a log line that the eye follows."""
    return (
        f"epoch {line['epoch']:.2f} loss {line['loss']:.3f} train top-1 {line['train_top1']:.1f} "
        f"{line['images_per_s']:.0f} img/s data {line['data_share']:.0%}"
    )


if __name__ == "__main__":
    harness.run.main(main)
