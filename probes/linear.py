# SPDX-License-Identifier: MIT
"""Linear evaluation: how well a linear classifier on the frozen backbone tells image classes apart.

    image --crop, flip--> x --frozen ResNet--> C5 --mean over cells--> h --fc--> logits --> cross entropy

    N images of this process    s side of x    C channels of C5    classes of DATA/train

    python -m probes.linear --data /imagenet --weights runs/setsim/resnet50.pth                  SetSim's: 90 epochs, cosine
    python -m probes.linear --data /imagenet --weights runs/resim/resnet50.pth --preset moco     ReSim's: 100 epochs, steps
    torchrun --nproc_per_node 8 -m probes.linear --data /imagenet --weights FILE                 the same on eight GPUs

DATA/train/CLASS/... and DATA/val/CLASS/... hold the images. OUTPUT_DIR gets checkpoint.pth, fc.pth (weight and bias under
torchvision's names), log.jsonl, curves.png and, after each epoch, results.json. The same command continues a killed run.
The learning rate of 30 fits a plain mean over cells; a loss in the thousands says that features have another scale.
"""

import argparse
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import common
from common import UserError, number, print0
from harness import pictures
from harness.images import BadImages, ImageFolder, detach_worker, list_images
from harness.run import Run, agree, main
from probes.frozen import CORES, frozen_trunk, require_own_folder, write_results

EPOCHS = {"setsim": 90, "moco": 100}


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m probes.linear", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, some = parser.add_argument, number(int, 1)
    flag("--data", required=True, metavar="DIR", help="folder with train/CLASS/ and val/CLASS/ full of images")
    flag("--weights", required=True, metavar="FILE", help="backbone to be evaluated: any checkpoint with a ResNet in it, 'imagenet' or 'random'")
    flag("--output-dir", default="runs/linear", help="results.json, fc.pth, checkpoint.pth and log.jsonl go there; a run found there is continued")
    flag("--preset", default="setsim", choices=tuple(EPOCHS), help="setsim: 90 epochs, cosine; moco (ReSim's, too): 100 epochs, x 0.1 after 60 %% and 80 %% of them")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet that the weights belong to")
    flag("--size", default=224, type=number(int, 32), help="side of a crop in pixels; test images are resized to 8/7 of it and cropped")
    flag("--epochs", type=some, help="the schedule's length; default: the preset's")
    flag("--batch-size", default=256, type=some, help="images of all processes together")
    flag("--lr", default=30.0, type=number(float, 0), help="at batch 256, scaled linearly with the batch; no other value than 30 is comparable with the papers")
    flag("--amp", default="none", choices=tuple(common.AMP), help="precision of the frozen backbone; the classifier is fp32 always")
    flag("--seed", default=0, type=number(int, 0), help="of crops, flips, order, fc's first weights and random backbones")
    flag("--steps", type=number(int, 0), help="stop after this many steps in all; the schedule stays as it is")
    flag("--workers", default=min(8, CORES), type=number(int, 0), help="loader processes of each process; results do not depend on it")
    flag("--print-freq", default=10, type=some, help="steps between log lines")
    flag("--save-every", type=some, help="steps between checkpoints; default: an epoch")
    # fmt: on
    args = parser.parse_args(argv)
    args.epochs = args.epochs or EPOCHS[args.preset]
    return args


def learning_rate(preset, lr, epoch, epochs):
    """The rate of an epoch: cosine (PAPER: SetSim A.2), or MoCo's steps, x 0.1 at 60 and 80 of 100 (ReSim, too)."""
    if preset == "setsim":
        return common.cosine_lr(lr, epoch, epochs)
    return lr * 0.1 ** ((10 * epoch >= 6 * epochs) + (10 * epoch >= 8 * epochs))


class ClassFolder(ImageFolder):
    """The images below root/CLASS/. classes: names of folders, those of the training set. labels: (images,) int64.

    Errors: UserError, no such folder, no images, images in no class folder or in one that the training set has not.
    """

    def __init__(self, root, classes=None):
        paths = list_images(root)
        names = [path.split(os.sep)[0] if os.sep in path else None for path in paths]
        self.root, self.paths = root, np.array([os.fsencode(path) for path in paths])
        self.classes = classes or sorted(set(names) - {None})
        position = {name: i for i, name in enumerate(self.classes)}
        if strange := [path for path, name in zip(paths, names, strict=True) if name not in position]:
            where = f"{os.path.join(root, strange[0])}: in no class folder of train/"
            raise UserError(f"{where}: --data needs train/CLASS/IMAGE and val/CLASS/IMAGE")
        self.labels = torch.tensor([position[name] for name in names])


class Crops(Dataset):
    """`self[epoch, index]` is (x (3, s, s) uint8, its label, index, unreadable images passed over: see ImageFolder).

    Training: RandomResizedCrop (0.08 to 1 of the area) and a flip, drawn from (seed, epoch, index) and nothing else.
    Testing: the centre of the image at 8/7 of the size (256 for 224).
    """

    def __init__(self, images, size, seed, training):
        self.images, self.seed = images, seed
        cut = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        if training:
            cut = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*cut, transforms.PILToTensor()])

    def __getitem__(self, key):
        epoch, index = key
        image, passed = self.images[index]
        with common.drawing("crop", self.seed, epoch, index):
            x = self.transform(image)
        return x, self.images.labels[(index + passed) % len(self.images)], index, passed


@torch.no_grad()
def features(trunk, x, amp="none"):
    """(N, 3, s, s) uint8 -> (N, C) float32: C5 averaged over its cells, neither normalised nor scaled."""
    with common.autocast(amp, x.device):
        C5 = trunk(common.normalise(x))[-1]
    return C5.float().mean((2, 3))


def hits(logits, labels):
    """(N, classes), (N,) -> (N, 2) bool: whether the label is the highest, and one of the five highest."""
    best = logits.topk(min(5, logits.shape[1])).indices  # (N, 5)
    return torch.stack([best[:, 0] == labels, (best == labels[:, None]).any(1)], 1)


def fingerprint(trunk):
    """A name for the weights and running statistics of a network, whatever file they came from."""
    found = (name.encode() + tensor.cpu().numpy().tobytes() for name, tensor in trunk.state_dict().items())
    return f"sha256 {hashlib.sha256(b''.join(found)).hexdigest()[:16]}"


def require_frozen(trunk, wanted):
    """Errors: RuntimeError if a weight or a running statistic is not what it was at fingerprint `wanted`."""
    if fingerprint(trunk) != wanted:
        raise RuntimeError("the frozen backbone has changed")


@torch.no_grad()
def evaluate(run, trunk, fc, loader, bad):
    """{"top1", "top5" in percent, "images"}, from the shares of the test images of all processes; None after a signal.

    loader: of `Crops`. bad: BadImages of the test images. Errors: UserError, too many images, or all, cannot be read.
    """
    found = [torch.zeros(0, 2, dtype=torch.bool)]
    shown = pictures.progress(loader, len(loader), what="batches of test images") if run.rank == 0 else loader
    for x, labels, index, passed in shown:
        right = hits(fc(features(trunk, x.to(run.device), run.args.amp)), labels.to(run.device)).cpu()
        found.append(right[passed == 0])  # an image in the place of an unreadable one would count twice
        bad.note(index, passed)
        if run.signalled:
            break
    found = torch.cat(found)
    run.stop, unreadable, count, *right = agree(run.signalled, len(bad.new), len(found), *found.sum(0).tolist())
    if unreadable:
        bad.share()
    if run.stop:
        return None
    if not count:
        raise UserError(f"none of the {len(bad.source)} test images can be read")
    return {"top1": 100 * right[0] / count, "top5": 100 * right[1] / count, "images": count}


def job(argv=None):
    args = get_args(argv)
    images = ClassFolder(os.path.join(args.data, "train"))
    tests = ClassFolder(os.path.join(args.data, "val"), images.classes)
    if len(images.classes) < 2:
        raise UserError(f"{images.root}: one class alone ({images.classes[0]}): there is nothing to tell apart")
    run = Run("linear", args, images, least=1, test_files=tests.fingerprint())
    trunk = frozen_trunk(args.weights, args.arch, args.seed, run.device)
    run.settings["weights"] = fingerprint(trunk)  # of the same weights, wherever their file lies
    fc = nn.Linear(trunk.widths[-1], len(images.classes))
    nn.init.normal_(fc.weight, 0, 0.01, generator=common.generator("fc", args.seed))
    nn.init.zeros_(fc.bias)
    fc.to(run.device)
    lr = args.lr * args.batch_size / 256  # DEVIATION: B4. MoCo and released ReSim leave scaling to their user
    optimizer = torch.optim.SGD(fc.parameters(), lr, momentum=0.9)
    model, scaler = nn.ModuleDict({"fc": fc}), torch.amp.GradScaler(run.device.type, enabled=False)
    run.resume(model, optimizer, scaler, {"fc.pth": model}, results=[], bad_tests=[])
    require_own_folder(args.output_dir, run.settings)
    network, bad_tests = common.distributed(fc, run.device), BadImages(tests, run.kept["bad_tests"], "it is left out")
    print0(f"{len(images.classes)} classes; {len(tests)} test images; learning rates of {args.preset}")
    crops = Crops(tests, args.size, args.seed, False)
    mine = [(0, index) for index in range(run.rank, len(tests), run.processes)]
    test_loader = DataLoader(crops, run.share, sampler=mine, num_workers=args.workers, worker_init_fn=detach_worker)

    def evaluated():
        """Evaluate and write results.json. None: a signal came before it was there."""
        require_frozen(trunk, run.settings["weights"])
        found, results = evaluate(run, trunk, fc, test_loader, bad_tests), run.kept["results"]
        run.kept["bad_tests"] = sorted(bad_tests.found)
        if found:
            results.append({"epoch": run.step / run.epoch_steps, "step": run.step, **found})
            best = max(results, key=lambda one: one["top1"])
            told = {**results[-1], "best_top1": best["top1"], "best_epoch": best["epoch"], "evaluations": results}
            if run.rank == 0:
                write_results(args.output_dir, "probes.linear", argv, run.settings, told)
            run.write(result=results[-1])
            text = "top-1 {top1:.2f} top-5 {top5:.2f} on {images} images after epoch {epoch:g}, "
            print0((text + "best top-1 {best_top1:.2f} after epoch {best_epoch:g}").format(**told))
        return found

    for x, labels in run.steps(Crops(images, args.size, args.seed, True)):
        # The checkpoint of the epoch's end is saved: a run that is killed here evaluates again.
        if run.step and run.step % run.epoch_steps == 0 and not evaluated():
            run.save()
            print0(f"stopped by a signal and saved at step {run.step}; the same command continues")
            return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.preset, lr, run.epoch, args.epochs)
        logits = network(features(trunk, x, args.amp))  # (N, classes)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        top1, top5 = 100 * hits(logits, labels).float().mean(0)
        run.log(loss=loss, lr=group["lr"], top1=top1, top5=top5)
    if not (run.stop or run.result):
        evaluated()


if __name__ == "__main__":
    main(job)
