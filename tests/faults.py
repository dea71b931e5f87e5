# SPDX-License-Identifier: MIT
"""Planted faults: does the suite notice when the code goes a little wrong?

    python -m tests.faults [WORDS] [--clean]

Each row of FAULTS is one small wrong behaviour, and the quickest tests that catch it. Those rows whose description or file
name contains all the WORDS are tried, two side by side: the fault is put into a temporary copy of the repository, only its
tests run there, and one of them has to fail. --clean first demands that the tests pass without faults. The exit code is 0
if every fault is caught. Needs fork, so not Windows; most faults take a second or two, as torch is imported only once.
"""

import argparse
import contextlib
import importlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--strict-markers --strict-config"]
IMPORTED_ONCE = "pytest numpy scipy.io scipy.optimize scipy.ndimage PIL.Image pycocotools.cocoeval torch torchvision.models.detection"
SIDE_BY_SIDE, TOO_LONG = 2, 300  # faults, seconds


class Fault(NamedTuple):
    """One row: in `file`, `old` (which stands there once) becomes `new`; one of `tests` must fail then."""

    what: str
    file: str
    old: str
    new: str
    tests: str  # ids, separated by spaces


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="try only faults whose description or file contains all of these")
    parser.add_argument("--clean", action="store_true", help="first run the tests without faults: they must pass")
    args = parser.parse_args(argv)
    chosen = [f for f in FAULTS if all(word.lower() in f"{f.what} {f.file}".lower() for word in args.words)]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # files change within a second
    sys.dont_write_bytecode = True
    for name in IMPORTED_ONCE.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as scratch:
        copies = [copy_repository(pathlib.Path(scratch) / str(number)) for number in range(SIDE_BY_SIDE)]
        if args.clean:
            pid = start_tests(copies[0], sorted({test for fault in chosen for test in ids(fault)}), limit=0)
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
                print(f"without faults not all tests pass:\n{output(copies[0])}")
                return 1
            print("without faults all tests pass", flush=True)
        started, caught = time.time(), try_all(chosen, copies)
    print(f"{caught} of {len(chosen)} faults are caught, {time.time() - started:.0f} s")
    return int(caught < len(chosen))


def try_all(faults, copies):
    """Try faults, one in each copy at a time; print a line for each. Returns: how many are caught."""
    waiting, running, caught = list(faults), {}, 0  # running: {process: (fault, copy, whole text of its file, start)}
    while waiting or running:
        if waiting and copies:
            fault, folder = waiting.pop(0), copies[-1]
            path = folder / fault.file
            whole = path.read_text() if path.exists() else ""
            if whole.count(fault.old) != 1 or fault.old == fault.new:
                print(f"patch does not apply: {fault.what} ({fault.file})", flush=True)
                continue
            path.write_text(whole.replace(fault.old, fault.new))
            running[start_tests(folder, ids(fault))] = fault, copies.pop(), whole, time.time()
            continue
        pid, status = os.wait()
        fault, folder, whole, started = running.pop(pid)
        (folder / fault.file).write_text(whole)
        outcome = judge(os.waitstatus_to_exitcode(status), fault, folder)
        copies.append(folder)
        caught += outcome == "caught"
        print(f"{outcome}: {fault.what} ({fault.file}, {time.time() - started:.0f} s)", flush=True)
    return caught


def judge(code, fault, folder):
    """What came of a fault, from pytest's exit code; a test that cannot even be started does not catch anything."""
    if code == 0:
        return "SURVIVED"
    if code == -signal.SIGALRM:
        return f"no result after {TOO_LONG} s"
    if code == 1 and re.search(r"^\d+ failed", output(folder).splitlines()[-1]):
        return "caught"
    again = os.waitpid(start_tests(folder, ids(fault)), 0)[1]
    return (
        "tests do not pass or exist without the fault" if again else "the patched file cannot even be imported or used"
    )


def ids(fault):
    """The tests of a fault, as pytest wants them; there may be blanks in brackets."""
    return re.findall(r"tests/\S+?\.py::\w+(?:\[[^\]]*\])?", fault.tests)


def copy_repository(folder):
    """Copy what git tracks or would track to `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def output(folder):
    return folder.with_suffix(".txt").read_text()


def start_tests(folder, tests, limit=TOO_LONG):
    """Run tests in a copy, in a process of its own. Returns: its number; it ends with pytest's exit code."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        signal.alarm(limit)
        text = os.open(folder.with_suffix(".txt"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(text, 1), os.dup2(text, 2)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(place for place in sys.path if pathlib.Path(place).resolve() != ROOT)]
        import pytest

        code = int(pytest.main([*PYTEST, f"--basetemp={folder}.tmp", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


# fmt: off
FAULTS = [
    # ---- transfer_det.py
    Fault("RPN: sampled negatives are left out of the loss", "transfer_det.py",
          "sampled, total = positive | negative,", "sampled, total = positive,",
          "tests/test_transfer_det.py::test_rpn_loss_by_hand"),
    Fault("RPN: losses are means over the anchors sampled, not over 256 an image", "transfer_det.py",
          "self.fg_bg_sampler.batch_size_per_image * len(labels)", "int((positive | negative).sum())",
          "tests/test_transfer_det.py::test_rpn_loss_by_hand"),
    Fault("RPN: smooth L1 with beta 1/9, torchvision's, for boxes instead of L1", "transfer_det.py",
          'F.l1_loss(pred_bbox_deltas[positive], wanted[positive], reduction="sum")',
          'F.smooth_l1_loss(pred_bbox_deltas[positive], wanted[positive], reduction="sum", beta=1 / 9)',
          "tests/test_transfer_det.py::test_rpn_loss_by_hand"),
    Fault("anchors have twice the side", "transfer_det.py",
          "width = math.sqrt(size**2 / ratio)", "width = 2 * math.sqrt(size**2 / ratio)",
          "tests/test_transfer_det.py::test_anchors_of_both_models"),
    Fault("anchors: the stride is guessed from the padded size", "transfer_det.py",
          "[(s, s) for s in self.strides]", "[(s, images.tensors.shape[-1] // x.shape[-1]) for s, x in zip(self.strides, maps)]",
          "tests/test_transfer_det.py::test_anchors_stand_at_multiples_of_the_stride_whatever_the_padding"),
    Fault("RoIAlign of the detector without half-pixel alignment", "transfer_det.py",
          "self.size, 1 / stride, sampling_ratio=0, aligned=True", "self.size, 1 / stride, sampling_ratio=0, aligned=False",
          "tests/test_transfer_det.py::test_pooling_on_a_ramp_gives_cell_centres"),
    Fault("the level of the pyramid is rounded, not floored", "transfer_det.py",
          "sides / 224 + 1e-8)).floor()", "sides / 224 + 1e-8)).round()",
          "tests/test_transfer_det.py::test_pooling_equals_torchvisions_operator_box_by_box"),
    Fault("boxes are regressed for the class before their own", "transfer_det.py",
          "[foreground, labels[foreground]]", "[foreground, labels[foreground] - 1]",
          "tests/test_transfer_det.py::test_box_losses_by_hand[0.0]"),
    Fault("the box loss is a mean over the foreground alone", "transfer_det.py",
          'reduction="sum", beta=beta) / len(labels)', 'reduction="sum", beta=beta) / len(foreground)',
          "tests/test_transfer_det.py::test_box_losses_by_hand[0.5]"),
    Fault("masks of the next class are trained and shown", "transfer_det.py",
          "device=logits.device), torch.cat(labels)]", "device=logits.device), torch.cat(labels) - 1]",
          "tests/test_transfer_det.py::test_heads_detect_what_torchvisions_do"),
    Fault("mask targets of polygons are not moved to the box's corner", "transfer_det.py",
          "(np.reshape(part, (-1, 2)) - start) * size", "np.reshape(part, (-1, 2)) * size",
          "tests/test_transfer_det.py::test_mask_targets_of_polygons"),
    Fault("mask targets of flipped views are not flipped", "transfer_det.py",
          "return targets.flip(2) if view.flipped else targets", "return targets",
          "tests/test_transfer_det.py::test_mask_targets_of_polygons"),
    Fault("precise batch norm counts every batch alike", "transfer_det.py",
          "count = x.numel() // x.shape[1]", "count = 1000",
          "tests/test_transfer_det.py::test_precise_bn_is_the_population"),
    Fault("precise batch norm: the biased variance", "transfer_det.py",
          ".clamp(min=0) * count / (count - 1))", ".clamp(min=0))",
          "tests/test_transfer_det.py::test_precise_bn_is_the_population"),
    Fault("left and right keypoints keep their places in a flip", "transfer_det.py",
          "    points = points[:, order] if view.flipped else points\n", "",
          "tests/test_transfer_det.py::test_objects_follow_a_resize_and_a_flip"),
    Fault("boxes are flipped about the last pixel's centre", "transfer_det.py",
          "        points = np.asarray(points, np.float64) * self.scale\n        return np.stack([self.size[1] - points", "        points = np.asarray(points, np.float64) * self.scale\n        return np.stack([self.size[1] - 1 - points",
          "tests/test_transfer_det.py::test_objects_follow_a_resize_and_a_flip"),
    Fault("resizing cuts half a pixel off instead of rounding", "transfer_det.py",
          "return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)",
          "return max(int(height * scale), 1), max(int(width * scale), 1)",
          "tests/test_transfer_det.py::test_resized"),
    Fault("crowds are trained on", "transfer_det.py",
          "self.data.objects(self.usable[index])", "self.data.annotations(self.usable[index])",
          "tests/test_transfer_det.py::test_coco_data_copes_with_what_files_hold"),
    Fault("score threshold of detections is one half", "transfer_det.py",
          "score_thresh=0.05", "score_thresh=0.5",
          "tests/test_transfer_det.py::test_heads_detect_what_torchvisions_do"),
    Fault("NMS of detections over all classes together", "transfer_det.py",
          "boxes, scores, labels = self.postprocess_detections(scores, deltas, proposals, image_sizes)",
          "boxes, scores, labels = self.postprocess_detections(scores, deltas, proposals, image_sizes)\n"
          "            keep = [ops.nms(b, s, self.nms_thresh) for b, s in zip(boxes, scores)]\n"
          "            boxes, scores, labels = ([x[k] for x, k in zip(part, keep)] for part in (boxes, scores, labels))",
          "tests/test_transfer_det.py::test_heads_detect_what_torchvisions_do"),
    Fault("NMS threshold of detections is that of proposals", "transfer_det.py",
          "score_thresh=0.05, nms_thresh=0.5", "score_thresh=0.05, nms_thresh=0.7",
          "tests/test_transfer_det.py::test_heads_detect_what_torchvisions_do"),
    Fault("batch statistics of frozen stages move", "transfer_det.py",
          "    if isinstance(module, nn.BatchNorm2d):\n        frozen =", "    if False:\n        frozen =",
          "tests/test_transfer_det.py::test_what_is_frozen_stays_as_it_is[fpn-2]"),
    Fault("weight decay on norms of the detector", "transfer_det.py",
          '"weight_decay": 0.0}', '"weight_decay": weight_decay}',
          "tests/test_transfer_det.py::test_norms_have_no_weight_decay"),
    Fault("the learning rate drops a step late", "transfer_det.py",
          "sum(step >= drop for drop in drops)", "sum(step > drop for drop in drops)",
          "tests/test_transfer_det.py::test_learning_rate_of_voc"),
    Fault("the detector's learning rate is not scaled with the batch", "harness/finetune.py",
          "args.lr / stretch", "args.lr",
          "tests/test_transfer_det.py::test_the_linear_rule"),
    Fault("padding of the batch is black, not the mean colour", "transfer_det.py",
          "            padded[:, : image.shape[1], : image.shape[2]] = common.normalise(image[None])[0]\n",
          "            padded[:] = common.normalise(F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))[None])[0]\n",
          "tests/test_transfer_det.py::test_the_batch_is_normalised_then_padded"),
    Fault("pasted masks are half a pixel off", "transfer_det.py",
          "xs = (torch.arange(left, right) + 0.5 - x0)", "xs = (torch.arange(left, right) - x0)",
          "tests/test_transfer_det.py::test_paste_mask"),
    Fault("keypoints of detections keep the corner's convention", "transfer_det.py",
          "points[:, :2] = points[:, :2] * scale - 0.5", "points[:, :2] = points[:, :2] * scale",
          "tests/test_transfer_det.py::test_detections_go_back_to_the_original_image"),
    Fault("COCO results with corners in place of width and height", "transfer_det.py",
          'one["bbox"] = [x0, y0, x1 - x0, y1 - y0]', 'one["bbox"] = [x0, y0, x1, y1]',
          "tests/test_transfer_det.py::test_detections_go_back_to_the_original_image"),
    Fault("VOC: difficult objects count as objects to be found", "harness/metrics.py",
          "objects = sum(not difficult for part in truth.values() for _, difficult in part)", "objects = sum(True for part in truth.values() for _, difficult in part)",
          "tests/test_transfer_det.py::test_voc_evaluation"),
    Fault("VOC: detections of difficult objects are right", "harness/metrics.py",
          "elif not objects[chosen][1]:", "else:",
          "tests/test_transfer_det.py::test_voc_rules_on_worked_examples"),
    Fault("VOC: an overlap of just the threshold is enough", "harness/metrics.py",
          "if best <= threshold:", "if best < threshold:",
          "tests/test_transfer_det.py::test_voc_rules_on_worked_examples"),
    Fault("VOC: the area under the curve instead of eleven points", "harness/metrics.py",
          "np.arange(0, 1.1, 0.1)]", "np.arange(0, 1.001, 0.01)]",
          "tests/test_transfer_det.py::test_eleven_points"),
    Fault("Cityscapes: small objects count", "harness/metrics.py",
          "if number >= 1000 and size >= 100]", "if number >= 1000]",
          "tests/test_transfer_det.py::test_cityscapes_rules_on_worked_examples"),
    Fault("batches mix wide and high images", "harness/images.py",
          "own = order[self.kinds[order] == kind]", "own = order[torch.arange(len(order)) % 2 == int(kind)]",
          "tests/test_harness.py::test_batches_of_kinds"),
    # ---- transfer_seg.py
    Fault("segmentation loss is a mean over the pixels that count", "transfer_seg.py",
          'F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean()',
          "F.cross_entropy(logits, labels, ignore_index=IGNORED)",
          "tests/test_transfer_seg.py::test_loss_is_averaged_over_all_pixels_ignored_ones_too"),
    Fault("evaluation counts ignored pixels as class 0", "transfer_seg.py",
          "kept = labels != IGNORED\n", "kept, labels = labels >= 0, np.where(labels == IGNORED, 0, labels)\n",
          "tests/test_transfer_seg.py::test_scores_against_a_loop"),
    Fault("accuracy in training is over all pixels, ignored ones too", "transfer_seg.py",
          "right.sum() / valid.sum().clamp(min=1)", "right.sum() / valid.numel()",
          "tests/test_transfer_seg.py::test_logged_accuracy_is_of_the_pixels_that_count"),
    Fault("classes that do not occur count as IoU 0", "transfer_seg.py",
          "np.mean(iou[union > 0])", "np.mean(np.nan_to_num(iou))",
          "tests/test_transfer_seg.py::test_scores_against_a_loop"),
    Fault("mean accuracy divides by predictions, not by truth", "transfer_seg.py",
          "100 * right / union, 100 * right / truth", "100 * right / union, 100 * right / predicted",
          "tests/test_transfer_seg.py::test_scores_against_a_loop"),
    Fault("the scaling ratio of training images is log-uniform", "transfer_seg.py",
          "ratio = SCALES[0] + (SCALES[1] - SCALES[0]) * ratio", "ratio = SCALES[0] * (SCALES[1] / SCALES[0]) ** ratio",
          "tests/test_transfer_seg.py::test_scale_is_uniform_between_a_half_and_two"),
    Fault("labels are not flipped with their image", "transfer_seg.py",
          "image, labels = image.flip(2), labels.flip(1)", "image, labels = image.flip(2), labels",
          "tests/test_transfer_seg.py::test_labels_follow_their_image"),
    Fault("padding of labels counts as class 0", "transfer_seg.py",
          "F.pad(labels, padding, value=IGNORED)", "F.pad(labels, padding, value=0)",
          "tests/test_transfer_seg.py::test_labels_follow_their_image"),
    Fault("crops: ignored pixels count in the three quarters", "transfer_seg.py",
          "counts.max() < most * counts.sum()", "counts.max() < most * inside.numel()",
          "tests/test_transfer_seg.py::test_crops_have_two_classes_and_none_on_three_quarters"),
    Fault("crops never reach the last row and column", "transfer_seg.py",
          "top = int(down * (max(height - crop[0], 0) + 1))", "top = int(down * max(height - crop[0], 0))",
          "tests/test_transfer_seg.py::test_crops_reach_both_ends"),
    Fault("the contrast is always changed first", "transfer_seg.py",
          '{"contrast_first": coins[4] < 0.5}', '{"contrast_first": True}',
          "tests/test_transfer_seg.py::test_colours_are_drawn_in_their_ranges"),
    Fault("the last sliding window reaches out of the grid's end", "transfer_seg.py",
          "windows.append((max(bottom - crop[0], 0), max(right - crop[1], 0), bottom, right))",
          "windows.append((row * stride[0], column * stride[1], bottom, right))",
          "tests/test_transfer_seg.py::test_slide_grid_of_cityscapes"),
    Fault("logits of sliding windows are added, not averaged", "transfer_seg.py",
          "return total / count", "return total",
          "tests/test_transfer_seg.py::test_one_window_equals_the_whole_and_several_are_averaged"),
    Fault("the first convolution of a dilated stage looks as far as the others", "transfer_seg.py",
          "here = dilation // 2 if conv.stride == (2, 2) else dilation", "here = dilation",
          "tests/test_transfer_seg.py::test_every_fourth_cell_of_the_dilated_c5_is_the_old_c5"),
    Fault("the auxiliary loss weighs as much as the head's", "transfer_seg.py",
          "self.probe, self.auxiliary_weight = align_corners, probe, 0.4", "self.probe, self.auxiliary_weight = align_corners, probe, 1.0",
          "tests/test_transfer_seg.py::test_every_parameter_gets_a_gradient_and_the_auxiliary_loss_weighs_four_tenths"),
    Fault("batch statistics of the linear probe's backbone move", "transfer_seg.py",
          "self.backbone.eval()  # batch statistics are frozen, too", "pass",
          "tests/test_transfer_seg.py::test_the_probe_trains_one_convolution_and_freezes_statistics"),
    Fault("the segmenter's learning rate has no floor", "transfer_seg.py",
          "return (lr - floor) * (1 - step / iterations) ** 0.9 + floor", "return lr * (1 - step / iterations) ** 0.9",
          "tests/test_transfer_seg.py::test_poly_with_floor"),
    Fault("the segmenter has no weight decay on norms and biases", "transfer_seg.py",
          "trained = [p for p in model.parameters() if p.requires_grad]\n    return torch.optim.SGD(trained,",
          'trained = [{"params": [p for p in model.parameters() if p.requires_grad and p.dim() > 1]}]\n'
          '    trained += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]\n'
          "    return torch.optim.SGD(trained,",
          "tests/test_transfer_seg.py::test_norms_and_biases_have_weight_decay_too"),
    Fault("ADE20K: classes are not moved down by one", "transfer_seg.py",
          "table_of(range(1, 151), [0, IGNORED])", "table_of(range(150), [150, IGNORED])",
          "tests/test_transfer_seg.py::test_ade20k_reader"),
    Fault("VOC: SBD's list keeps images of VOC's val", "transfer_seg.py",
          'extra -= {*own["train"], *own["val"]}', 'extra -= {*own["train"]}',
          "tests/test_transfer_seg.py::test_voc_reader"),
    # ---- probes
    Fault("linear probe: top-5 counts the six best", "probes/linear.py",
          "logits.topk(min(5, logits.shape[1]))", "logits.topk(min(6, logits.shape[1]))",
          "tests/test_probes.py::test_linear_counts_what_is_right"),
    Fault("linear probe: an image in the place of an unreadable one is counted", "probes/linear.py",
          "own = passed == 0 ", "own = passed >= 0 ",
          "tests/test_probes.py::test_linear_counts_what_is_right"),
    Fault("linear probe: MoCo's rate drops an epoch late", "probes/linear.py",
          "(10 * epoch >= 6 * epochs)", "(10 * epoch > 6 * epochs)",
          "tests/test_probes.py::test_linear_schedules"),
    Fault("linear probe: class folders are numbered from the last to the first", "probes/linear.py",
          "self.classes = classes or sorted(set(names) - {None})", "self.classes = classes or sorted(set(names) - {None})[::-1]",
          "tests/test_probes.py::test_linear_crops_are_drawn_from_seed_epoch_and_index_alone"),
    Fault("linear probe: the label of the unreadable image is kept", "probes/linear.py",
          "self.images.labels[(index + passed) % len(self)]", "self.images.labels[index]",
          "tests/test_probes.py::test_linear_unreadable_images_lend_no_label"),
    Fault("linear probe: test images are resized to the crop's own size", "probes/linear.py",
          "transforms.Resize(round(size * 256 / 224))", "transforms.Resize(size)",
          "tests/test_probes.py::test_linear_crops_cover_what_the_protocol_says"),
    Fault("linear probe: the backbone's features are normalised", "probes/linear.py",
          "return C5.float().mean((2, 3))", "return F.normalize(C5.float().mean((2, 3)), dim=1)",
          "tests/test_faults_gaps.py::test_linear_features_are_plain_means_over_cells"),
    Fault("frozen backbone is left in training mode", "probes/frozen.py",
          ".eval().requires_grad_(False), state, line", ".requires_grad_(False), state, line",
          "tests/test_probes.py::test_frozen_trunk"),
    Fault("probes: COCO boxes are read as corners", "probes/frozen.py",
          "        boxes[:, 2:] += boxes[:, :2]\n", "",
          "tests/test_probes.py::test_coco_objects"),
    Fault("probes: crowds are objects", "probes/frozen.py",
          'if not a.get("iscrowd", 0)]', "]",
          "tests/test_probes.py::test_coco_objects"),
    Fault("k-NN: votes are not weighted by similarity", "probes/oknn.py",
          "/ temperature).exp()", "/ temperature).exp() * 0 + 1",
          "tests/test_probes.py::test_knn_on_features_with_a_known_answer"),
    Fault("k-NN: one neighbour too few", "probes/oknn.py",
          "everything.topk(similarity.shape[1])", "everything.topk(similarity.shape[1] - 1)",
          "tests/test_probes.py::test_knn_against_a_loop[20-0.07-7]"),
    Fault("k-NN: only the last part of the bank counts", "probes/oknn.py",
          "torch.cat([similarity, q @ bank.T], 1)", "torch.cat([similarity * 0 - torch.inf, q @ bank.T], 1)",
          "tests/test_probes.py::test_knn_against_a_loop[20-0.07-7]"),
    Fault("k-NN: ties count as won", "probes/oknn.py",
          "(scores >= own).sum(1) <= n)", "(scores > own).sum(1) < n)",
          "tests/test_probes.py::test_knn_on_features_with_a_known_answer"),
    Fault("k-NN: features have no unit length", "probes/oknn.py",
          "return F.normalize(regions.float().mean((2, 3)), dim=1).unflatten", "return regions.float().mean((2, 3)).unflatten",
          "tests/test_probes.py::test_object_features"),
    Fault("k-NN: bank and queries share scenes", "probes/oknn.py",
          "starts = {HELD_OUT: count, HELD_OUT + count: -(-count // 4)}", "starts = {HELD_OUT: count, HELD_OUT + 1: -(-count // 4)}",
          "tests/test_probes.py::test_scenes_of_bank_and_queries_are_different_ones"),
    Fault("disturbed k-NN: the surroundings stay and the objects are replaced", "probes/oknn.py",
          "torch.where(inside, image, other)", "torch.where(inside, other, image)",
          "tests/test_probes.py::test_disturbing_leaves_box_pixels_unchanged"),
    Fault("disturbed k-NN: the other image may be the image itself", "probes/oknn.py",
          "if further < harness.images.TRIES and (another + further - index - passed) % len(self):", "if further < harness.images.TRIES:",
          "tests/test_probes.py::test_the_other_image_is_drawn_and_never_the_image_itself"),
    Fault("coupling rate is upside down", "probes/bias.py",
          "F.cosine_similarity(a_beside_b, b) / F.cosine_similarity(a_alone, b)",
          "F.cosine_similarity(a_alone, b) / F.cosine_similarity(a_beside_b, b)",
          "tests/test_probes.py::test_coupling_rate_and_mean_cosine_in_closed_form"),
    Fault("mean cosine counts the middle place's cosine with itself", "probes/bias.py",
          "(cosines.sum(1) - cosines[:, 4]) / 8", "cosines.sum(1) / 9",
          "tests/test_probes.py::test_coupling_rate_and_mean_cosine_in_closed_form"),
    Fault("bias probe: the pair may be of one category", "probes/bias.py",
          "other, other_row = self.draw(rng, item.labels[row])", "other, other_row = self.draw(rng, None)",
          "tests/test_probes.py::test_pairs_are_of_two_categories_and_drawn_from_seed_and_number"),
    # ---- tools, harness/proposals.py, harness/scenes.py
    Fault("proposals: OpenCV's widths and heights are taken as corners", "harness/proposals.py",
          "-(-(start + extent) * (W, H) // small.size)", "-(-extent * (W, H) // small.size)",
          "tests/test_proposals.py::test_boxes_of_scenes_lie_on_their_objects"),
    Fault("proposals: colours go to OpenCV as RGB", "harness/proposals.py",
          "np.asarray(small)[:, :, ::-1]", "np.asarray(small)",
          "tests/test_proposals.py::test_colours_go_to_opencv_as_it_wants_them"),
    Fault("proposals: the size rule takes the share of the area for that of the side", "harness/proposals.py",
          "(w * h * 100**2 >= SMALLEST**2 * W * H)", "(w * h * 100 >= SMALLEST * W * H)",
          "tests/test_proposals.py::test_filter_equals_a_literal_loop"),
    Fault("proposals: a ratio of just the limit is out", "harness/proposals.py",
          "ratio = long <= RATIO * short", "ratio = long < RATIO * short",
          "tests/test_proposals.py::test_filter_at_its_limits"),
    Fault("proposals: without a box after three rules all are kept", "harness/proposals.py",
          "enumerate((side & ratio & size, ratio, side))", "enumerate((side & ratio & size, ratio | True, side))",
          "tests/test_proposals.py::test_filter_equals_a_literal_loop"),
    Fault("proposals: a torn record is read", "harness/proposals.py",
          'return record if zlib.crc32(record[4:]) == checksum else b""', "return record",
          "tests/test_proposals.py::test_cut_at_any_byte_a_run_ends_with_the_same_bytes"),
    Fault("Open Images: an image may overfill a class", "tools/openimages_mini.py",
          "all(used[c] + n <= limits[c] for c, n in found)", "all(used[c] < limits[c] for c, n in found)",
          "tests/test_openimages.py::test_the_list_against_a_slow_loop"),
    Fault("Open Images: a class is never filled to COCO's count", "tools/openimages_mini.py",
          "used[c] + n <= limits[c]", "used[c] + n < limits[c]",
          "tests/test_openimages.py::test_the_list_against_a_slow_loop"),
    Fault("Open Images: boxes of the JSON are corners", "tools/openimages_mini.py",
          "(x0 * width, y0 * height, w, h)]", "(x0 * width, y0 * height, x1 * width, y1 * height)]",
          "tests/test_openimages.py::test_the_json_holds_the_boxes_in_pixels"),
    Fault("Open Images: sizes forget the EXIF rotation", "tools/openimages_mini.py",
          "return file.size[::-1] if turned else file.size", "return file.size",
          "tests/test_openimages.py::test_the_json_holds_the_boxes_in_pixels"),
    Fault("detectron2: stages keep torchvision's numbers", "tools/to_detectron2.py",
          'f"res{int(match[1]) + 1}"', 'f"res{int(match[1])}"',
          "tests/test_tools.py::test_names_and_values_of_the_backbone[resnet18-100]"),
    Fault("detectron2: the first convolution is turned from RGB to BGR", "tools/to_detectron2.py",
          "arrays = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}",
          "arrays = {name: (tensor.flip(1) if tensor.dim() == 4 and tensor.shape[1] == 3 else tensor).detach().float().numpy() "
          "for name, tensor in tensors.items()}",
          "tests/test_tools.py::test_names_and_values_of_the_backbone[resnet18-100]"),
    Fault("detectron2: levels of the pyramid are one off", "tools/to_detectron2.py",
          'inner_blocks\\.([0-3])\\.0", 2, "fpn_lateral{}")', 'inner_blocks\\.([0-3])\\.0", 1, "fpn_lateral{}")',
          "tests/test_tools.py::test_pyramids_with_norms_keep_them[detector]"),
    Fault("figures: the gain is over the last run", "tools/figures.py",
          "means[-1] - means[0], error,", "means[-1] - means[-1], error,",
          "tests/test_figures.py::test_ap_is_the_mean_over_trials_and_the_gain_is_over_the_first_run"),
    Fault("figures: the deviation divides by n", "tools/figures.py",
          "values.std(0, ddof=1) if n > 1", "values.std(0, ddof=0) if n > 1",
          "tests/test_figures.py::test_ap_is_the_mean_over_trials_and_the_gain_is_over_the_first_run"),
    Fault("figures: results of different protocols are drawn together", "tools/figures.py",
          "if len(set.union(*protocols)) > 1:", "if len(set.union(*protocols)) > 9:",
          "tests/test_figures.py::test_differing_protocols_are_named_and_not_drawn"),
    Fault("scenes: boxes lose their last row and column", "harness/scenes.py",
          "columns.stop, rows.stop)", "columns.stop - 1, rows.stop - 1)",
          "tests/test_scenes.py::test_annotations_agree_with_each_other"),
    Fault("scenes: hidden landmarks are called visible", "harness/scenes.py",
          "1 if owner[int(y), int(x)] not in (0, k + 1) else 2", "2",
          "tests/test_scenes.py::test_visible_landmarks_lie_on_their_object_and_all_visibilities_and_classes_occur"),
    Fault("scenes: written boxes are corners", "tools/scenes.py",
          '"bbox": [x0, y0, x1 - x0, y1 - y0],', '"bbox": [x0, y0, x1, y1],',
          "tests/test_scenes.py::test_written_data_set_opens_with_pycocotools_and_equals_the_scenes"),
    Fault("scenes: objects that are mostly hidden are annotated", "harness/scenes.py",
          "np.maximum(least, MIN_VISIBLE_FRACTION * np.array(areas))", "least",
          "tests/test_scenes.py::test_objects_hidden_too_much_or_too_small_are_not_annotated"),
    Fault("recall counts overlaps above 0.3 as found", "bench/recall.py",
          "(chosen >= limit)", "(chosen >= limit - 0.2)",
          "tests/test_faults_gaps.py::test_recall_of_proposals_at_its_two_limits"),
    # ---- common.py and the rest of harness
    Fault("images: EXIF rotation is forgotten", "harness/images.py",
          "                image = ImageOps.exif_transpose(image)\n", "",
          "tests/test_harness.py::test_read_image_turns_by_exif"),
    Fault("images: 16-bit grey is clipped at 255", "harness/images.py",
          "(np.asarray(image, np.int64).clip(0, 65535) >> 8)", "np.asarray(image, np.int64).clip(0, 255)",
          "tests/test_harness.py::test_read_image_gives_rgb_for_every_mode"),
    Fault("images: alpha is composited on black", "harness/images.py",
          'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")',
          "tests/test_harness.py::test_read_image_gives_rgb_for_every_mode"),
    Fault("images: the list of a folder runs backwards", "harness/images.py",
          "return sorted(found)\n\n\nclass", "return sorted(found, reverse=True)\n\n\nclass",
          "tests/test_harness.py::test_folder_lists_images_recursively_in_order"),
    Fault("images: an unreadable one is replaced by the one before", "harness/images.py",
          "self.name((index + passed) % len(self))", "self.name((index - passed) % len(self))",
          "tests/test_harness.py::test_unreadable_images_are_replaced_named_and_counted"),
    Fault("images: more than one percent unreadable is no reason to stop", "harness/images.py",
          "if len(self.found) > max(1, len(self.source) // 100):", "if len(self.found) > len(self.source):",
          "tests/test_harness.py::test_unreadable_images_are_replaced_named_and_counted"),
    Fault("images: the fingerprint does not see the names", "harness/images.py",
          "hashlib.sha256(b'|'.join(self.paths.tolist()))", "hashlib.sha256(b'|'.join(self.paths.tolist()[:0]))",
          "tests/test_harness.py::test_fingerprint_knows_the_files_and_not_the_folder"),
    Fault("batches: the last incomplete batch of an epoch is kept", "harness/images.py",
          "divmod(step, self.images // self.batch_size)", "divmod(step, -(-self.images // self.batch_size))",
          "tests/test_harness.py::test_batches_are_the_same_for_any_number_of_processes_and_after_a_resume"),
    Fault("batches: each rank takes a strided share", "harness/images.py",
          "order[first : first + share].tolist()]",
          "order[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.processes].tolist()]",
          "tests/test_harness.py::test_batches_are_the_same_for_any_number_of_processes_and_after_a_resume"),
    Fault("batches: the same order in each epoch", "harness/images.py",
          'generator("order", self.seed, epoch))', 'generator("order", self.seed))',
          "tests/test_harness.py::test_batches_are_the_same_for_any_number_of_processes_and_after_a_resume"),
    Fault("batches: a resumed run begins the epoch anew", "harness/images.py",
          "for step in range(self.start, self.stop):", "for step in range(self.stop - self.start):",
          "tests/test_harness.py::test_batches_are_the_same_for_any_number_of_processes_and_after_a_resume"),
    Fault("draws depend on what was drawn before (the worker)", "common.py",
          "    torch.default_generator.manual_seed(key_seed(*key))\n", "",
          "tests/test_common.py::test_draws_depend_on_the_key_alone"),
    Fault("a draw changes torch's generator for what follows", "common.py",
          "        torch.set_rng_state(state)\n", "        pass\n",
          "tests/test_common.py::test_draws_depend_on_the_key_alone"),
    Fault("normalise: the deviation is left out", "common.py",
          "((images / 255 - mean) / std)", "(images / 255 - mean)",
          "tests/test_common.py::test_normalise_is_torchvisions"),
    Fault("queue: the pointer is not wrapped but starts again at 0", "common.py",
          "self.pointer.copy_((self.pointer + len(keys)) % size)",
          "self.pointer.copy_((self.pointer + len(keys)) * (self.pointer + len(keys) < size))",
          "tests/test_common.py::test_queue_holds_the_newest_keys_in_ring_order"),
    Fault("queue: of more keys than fit the first ones stay", "common.py",
          "keys[-len(self.vectors) :]", "keys[: len(self.vectors)]",
          "tests/test_common.py::test_queue_holds_the_newest_keys_in_ring_order"),
    Fault("queue: it starts with rows that have no unit length", "common.py",
          "nn.functional.normalize(torch.randn(size, dim, generator=rng), dim=1)", "torch.randn(size, dim, generator=rng)",
          "tests/test_common.py::test_queue_holds_the_newest_keys_in_ring_order"),
    Fault("momentum and its complement are swapped", "common.py",
          "key.lerp_(query, 1 - m)", "key.lerp_(query, m)",
          "tests/test_common.py::test_momentum_update_is_the_formula_and_leaves_buffers"),
    Fault("buffers of the key network are averaged too", "common.py",
          "        key.lerp_(query, 1 - m)\n",
          "        key.lerp_(query, 1 - m)\n"
          "    for key, query in zip(key_network.buffers(), query_network.buffers(), strict=True):\n"
          "        key.copy_(key.lerp(query, 1 - m) if key.is_floating_point() else query)\n",
          "tests/test_common.py::test_momentum_update_is_the_formula_and_leaves_buffers"),
    Fault("batch norm over the whole batch: all groups are one", "common.py",
          "parts = math.ceil(len(inputs[0]) / group)", "parts = 1",
          "tests/test_common.py::test_groups_have_their_own_batch_statistics"),
    Fault("batch norm: all groups update the running statistics (B17)", "common.py",
          "norm.track_running_stats = not outputs", "norm.track_running_stats = True",
          "tests/test_common.py::test_only_the_first_group_updates_running_statistics"),
    Fault("settings: presets win over the command line", "common.py",
          "    parser.set_defaults(**presets(parser.parse_args(argv)))\n    args = parser.parse_args(argv)\n",
          "    args = parser.parse_args(argv)\n    vars(args).update(presets(args))\n",
          "tests/test_common.py::test_presets_replace_defaults_and_the_command_line_wins"),
    Fault("unshuffle applies the permutation once more", "common.py",
          "return shuffle(x, permutation.argsort())", "return shuffle(x, permutation)",
          "tests/test_faults_gaps.py::test_unshuffle_undoes_shuffle"),
    Fault("weights: the key encoder's backbone is taken", "harness/weights.py",
          "min(places, key=lambda p: any(w in", "max(places, key=lambda p: any(w in",
          "tests/test_harness.py::test_load_backbone_understands"),
    Fault("weights: a missing tensor is filled up with zeros", "harness/weights.py",
          'if state[name] is None and name.endswith("num_batches_tracked"):', "if state[name] is None:",
          "tests/test_harness.py::test_load_backbone_refuses_a_single_missing_or_misshapen_tensor"),
    Fault("weights: checkpoints may run code when they are opened", "harness/weights.py",
          'torch.load(path, map_location="cpu", weights_only=True)', 'torch.load(path, map_location="cpu", weights_only=False)',
          "tests/test_harness.py::test_load_backbone_never_runs_code"),
    Fault("cosine schedule: half a period too long", "common.py",
          "math.cos(math.pi * epoch / epochs)", "math.cos(0.5 * math.pi * epoch / epochs)",
          "tests/test_common.py::test_cosine_lr"),
    Fault("files are written in place, without a rename", "harness/weights.py",
          'temporary = f"{path}.tmp"', "temporary = path",
          "tests/test_harness.py::test_saving_replaces_the_old_file_only_when_the_new_one_is_whole"),
    Fault("log lines after the checkpoint's step are kept", "harness/legacy.py",
          'if step and line.get("step", 0) <= step]', "if step]",
          "tests/test_harness.py::test_log_drops_what_comes_after_the_checkpoint_and_torn_lines"),
    Fault("weights that are not finite are saved over the last good checkpoint", "harness/legacy.py",
          "if not all(tensor.isfinite().all() for weights", "if not any(tensor.isfinite().all() for weights",
          "tests/test_harness.py::test_weights_that_are_not_finite_are_not_saved"),
    Fault("a loss that is not finite does not stop the run", "harness/legacy.py",
          'if not math.isfinite(means["loss"]):', 'if means["loss"] is None:',
          "tests/test_harness.py::test_meter_takes_means_and_stops_at_nan"),
    Fault("logged values are those of the last step, not means", "harness/legacy.py",
          "self.sums = row if self.sums is None else self.sums + row", "self.sums = row",
          "tests/test_harness.py::test_meter_takes_means_and_stops_at_nan"),
    Fault("run: log lines after the checkpoint's step are kept", "harness/run.py",
          'if self.step and x.get("step", 0) <= self.step]', "if self.step]",
          "tests/test_harness.py::test_a_continued_run_drops_later_and_torn_lines"),
    Fault("run: weights that are not finite are saved over the last good ones", "harness/weights.py",
          "if not all(tensor.isfinite().all() for tensor in state.values()):",
          "if not any(tensor.isfinite().all() for tensor in state.values()):",
          "tests/test_harness.py::test_weights_for_others_are_finite_and_contiguous"),
    Fault("run: a loss that is not finite does not stop it", "harness/run.py",
          'if not math.isfinite(means["loss"]):', 'if means["loss"] is None:',
          "tests/test_harness.py::test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved"),
    Fault("run: logged values are those of the last step, not means", "harness/run.py",
          "for step in self.values]).mean(0)", "for step in self.values])[-1]",
          "tests/test_harness.py::test_lines_of_a_run_are_means_since_the_line_before"),
    Fault("run: a signal that comes while the processes agree is forgotten", "harness/run.py",
          "self.stop, unreadable = agree(self.signalled, len(self.bad.new))",
          "self.stop, unreadable, self.signalled = *agree(self.signalled, len(self.bad.new)), 0",
          "tests/test_harness.py::test_a_signal_at_any_moment_is_kept_and_the_run_saved"),
    Fault("run: the queue is not shrunk to the data", "harness/run.py",
          "return size or min(most, fitting)", "return size or most",
          "tests/test_harness.py::test_a_queue_is_as_long_as_the_images_allow"),
    Fault("run: the bank is as long as if each image had one region", "harness/run.py",
          "* self.args.batch_size * keys\n", "* self.args.batch_size\n",
          "tests/test_d3ssl.py::test_bank_shrinks_to_the_data"),
    Fault("run: measuring is done on the live method and moves its running statistics", "harness/run.py",
          "method, images = copy.deepcopy(self.method), self.images", "method, images = self.method, self.images",
          "tests/test_harness.py::test_measuring_changes_nothing_and_shows_the_same_views_each_time"),
    Fault("run: a resumed one reads --init again", "harness/run.py",
          'return None if os.path.exists(self.path("checkpoint.pth")) else self.args.init', "return self.args.init",
          "tests/test_harness.py::test_weights_are_loaded_at_the_start_alone"),
    # ---- setsim.py
    Fault("SetSim: min-max normalisation of the attention is dropped", "setsim.py",
          "return (activity - low) / (high - low)", "return activity",
          "tests/test_setsim.py::test_attention_on_a_worked_example"),
    Fault("SetSim: the attention is normalised over the batch, not each map", "setsim.py",
          "activity.amin(1, keepdim=True), activity.amax(1, keepdim=True)", "activity.amin(), activity.amax()",
          "tests/test_setsim.py::test_a_map_without_contrast_selects_nothing tests/test_setsim.py::test_threshold_at_its_ends"),
    Fault("SetSim: the attention adds up features with their signs", "setsim.py",
          "if square else z.abs().sum(1)", "if square else z.sum(1)",
          "tests/test_setsim.py::test_attention_on_a_worked_example"),
    Fault("SetSim: Eq. 4 with > for >=", "setsim.py",
          "return A >= delta", "return A > delta",
          "tests/test_setsim.py::test_threshold_at_its_ends"),
    Fault("SetSim: the ratio of cells rounds down", "setsim.py",
          "int(percent * A.shape[1] / 100 + 0.5)", "int(percent * A.shape[1] / 100)",
          "tests/test_setsim.py::test_ratio_takes_the_highest_cells"),
    Fault("SetSim: the ratio takes the lowest cells", "setsim.py",
          "order = A.argsort(dim=1, descending=True, stable=True)", "order = A.argsort(dim=1, descending=False, stable=True)",
          "tests/test_setsim.py::test_ratio_takes_the_highest_cells[10-5]"),
    Fault("SetSim: --set 30% is an attention of at least 0.30", "setsim.py",
          'return ratio_set(A, float(rule[:-1])) if rule.endswith("%") else',
          'return threshold_set(A, float(rule[:-1]) / 100) if rule.endswith("%") else',
          "tests/test_setsim.py::test_set_is_a_threshold_or_a_share[30%]"),
    Fault("SetSim: cosine of cells without the keys' normalisation", "setsim.py",
          "F.normalize(z_q, dim=1), F.normalize(z_k, dim=1)", "F.normalize(z_q, dim=1), z_k",
          "tests/test_setsim.py::test_cosine_similarity_against_a_loop"),
    Fault("SetSim: Eq. 6's comparison is flipped", "setsim.py",
          "else similarity <= mu", "else similarity >= mu",
          "tests/test_setsim.py::test_set_to_set_against_a_double_loop"),
    Fault("SetSim: Eq. 6 keeps similarities of just mu, as the released code", "setsim.py",
          "else similarity <= mu", "else similarity < mu",
          "tests/test_setsim.py::test_set_to_set_against_a_double_loop"),
    Fault("SetSim: the nearest neighbour is taken over queries instead of keys", "setsim.py",
          "s = F.one_hot(similarity.argmax(2), similarity.shape[2]).bool()",
          "s = F.one_hot(similarity.argmax(1), similarity.shape[2]).bool()",
          "tests/test_setsim.py::test_set_to_set_against_a_double_loop"),
    Fault("SetSim: neighbours are taken from the key's set alone", "setsim.py",
          "s = F.one_hot(similarity.argmax(2),", "s = F.one_hot(similarity.masked_fill(~set_k[:, None], -2).argmax(2),",
          "tests/test_setsim.py::test_set_to_set_against_a_double_loop"),
    Fault("SetSim: official mu is the paper's", "setsim.py",
          "mu, nearest = 0.2 if official else 0.0,", "mu, nearest = 0.0,",
          "tests/test_setsim.py::test_match_hands_each_matcher_the_right_tensors[True]"),
    Fault("SetSim: random pairs are those of one order", "setsim.py",
          "j = j[torch.randperm(len(j), generator=rng).to(j.device)]", "j = j + 0",
          "tests/test_setsim.py::test_random_pairs"),
    Fault("SetSim: sorted pairs match the highest with the lowest", "setsim.py",
          "(x[A[b, x].argsort(descending=True, stable=True)] for x, A in", "(x[A[b, x].argsort(descending=A is A_q, stable=True)] for x, A in",
          "tests/test_setsim.py::test_sorted_pairs_against_python_sort"),
    Fault("SetSim: the Hungarian assignment has the largest distance", "setsim.py",
          "linear_sum_assignment(1 - similarity[b]", "linear_sum_assignment(similarity[b]",
          "tests/test_setsim.py::test_hungarian_finds_the_optimum"),
    Fault("SetSim: hungarian takes the rows of the wrong view", "setsim.py",
          "similarity[b][i][:, j].cpu()", "similarity[b][j][:, i].cpu()",
          "tests/test_setsim.py::test_hungarian_finds_the_optimum"),
    Fault("SetSim: geometry takes the shorter diagonal", "setsim.py",
          "T * torch.maximum(diagonal_q, diagonal_k)", "T * torch.minimum(diagonal_q, diagonal_k)",
          "tests/test_setsim.py::test_geometry_against_a_double_loop"),
    Fault("SetSim: centres of cells lie at their corners", "setsim.py",
          "x = x0[:, None] + (torch.arange(W, device=window.device) + 0.5)", "x = x0[:, None] + torch.arange(W, device=window.device)",
          "tests/test_setsim.py::test_geometry_against_a_double_loop"),
    Fault("SetSim: the flip is forgotten in the window", "setsim.py",
          "view, x0, x1 = TF.hflip(view), x1, x0", "view = TF.hflip(view)",
          "tests/test_setsim.py::test_windows_say_where_every_cell_lies"),
    Fault("SetSim: crops of 8 to 100 percent of the area", "setsim.py",
          "scale=(0.2, 1.0)", "scale=(0.08, 1.0)",
          "tests/test_setsim.py::test_views_follow_the_recipe"),
    Fault("SetSim: both views are the same draw", "setsim.py",
          "(view_k, window_k) = random_view(image, size), random_view(image, size)", "(view_k, window_k) = 2 * (random_view(image, size),)",
          "tests/test_faults_gaps.py::test_the_two_views_are_different_draws"),
    Fault("SetSim: the positive is left out of the denominator of Eq. 1", "setsim.py",
          "return (torch.logaddexp(positive, negative_logsumexp(q, queue, temperature)) - positive).mean()",
          "return (negative_logsumexp(q, queue, temperature) - positive).mean()",
          "tests/test_losses.py::test_with_one_positive_a_row_it_is_cross_entropy"),
    Fault("SetSim: each positive of Eq. 8 has itself alone in the denominator", "setsim.py",
          "row_loss = torch.logaddexp(positive, negative) - (logits * c).sum(1) / c.sum(1)",
          "row_loss = ((torch.logaddexp(logits, negative[:, None]) - logits) * c).sum(1) / c.sum(1)",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("SetSim: the sum over positives is not divided by their number", "setsim.py",
          "(logits * c).sum(1) / c.sum(1)", "(logits * c).sum(1)",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("SetSim: set loss is a mean over all rows of the batch, not per image", "setsim.py",
          "return (row_loss / has_positive.sum(1)[image]).sum() / len(p_q)", "return row_loss.sum() / has_positive.sum().clamp(min=1)",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("SetSim: images without rows are left out of the mean", "setsim.py",
          ".sum() / len(p_q)", ".sum() / has_positive.any(1).sum().clamp(min=1)",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("SetSim: the temperature is missing in the negatives", "common.py",
          "logits = rows @ vectors.T / temperature", "logits = rows @ vectors.T",
          "tests/test_losses.py::test_with_one_positive_a_row_it_is_cross_entropy"),
    Fault("SetSim: the gradient of the negatives forgets the temperature", "common.py",
          ".exp_() @ vectors / temperature)", ".exp_() @ vectors)",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("SetSim: set loss and image loss change their weights", "setsim.py",
          "return (1 - self.loss_weight) * image_loss + self.loss_weight * set_loss,",
          "return self.loss_weight * image_loss + (1 - self.loss_weight) * set_loss,",
          "tests/test_setsim.py::test_iteration_by_hand[moco]"),
    Fault("SetSim: momentum update after the keys instead of before", "setsim.py",
          "        common.momentum_update(self.key, self.query, self.ema)\n"
          "        batch = len(views[0]) * common.processes()\n"
          '        permutation = torch.randperm(batch, generator=common.generator("shuffle", self.seed, step))\n'
          "        keys = self.key(*(common.shuffle(view, permutation) for view in views))\n",
          "        batch = len(views[0]) * common.processes()\n"
          '        permutation = torch.randperm(batch, generator=common.generator("shuffle", self.seed, step))\n'
          "        keys = self.key(*(common.shuffle(view, permutation) for view in views))\n"
          "        common.momentum_update(self.key, self.query, self.ema)\n",
          "tests/test_setsim.py::test_iteration_by_hand[moco]"),
    Fault("SetSim: keys are enqueued before they are compared", "setsim.py",
          "        windows = (window_q, window_k), (window_k, window_q)\n"
          '        rng = common.generator("match", self.seed, step, common.rank())\n'
          "        pairs = zip(queries, keys[::-1], windows)  # noqa: B905  one direction has one query, one key\n"
          "        losses, values = zip(*(self.compare(query, key, *w, rng) for query, key, w in pairs), strict=True)\n"
          "        # 4. the keys of this step become negatives of later ones\n"
          "        if self.key:\n"
          "            for key in keys:\n"
          "                self.image_queue.enqueue(all_gather(F.normalize(key.image, dim=1)))\n"
          "                if self.query.dense:  # averaged over the cells, then normalised (S11)\n"
          "                    self.set_queue.enqueue(all_gather(F.normalize(key.cells.mean(1), dim=1)))\n",
          "        if self.key:\n"
          "            for key in keys:\n"
          "                self.image_queue.enqueue(all_gather(F.normalize(key.image, dim=1)))\n"
          "                if self.query.dense:  # averaged over the cells, then normalised (S11)\n"
          "                    self.set_queue.enqueue(all_gather(F.normalize(key.cells.mean(1), dim=1)))\n"
          "        windows = (window_q, window_k), (window_k, window_q)\n"
          '        rng = common.generator("match", self.seed, step, common.rank())\n'
          "        pairs = zip(queries, keys[::-1], windows)  # noqa: B905  one direction has one query, one key\n"
          "        losses, values = zip(*(self.compare(query, key, *w, rng) for query, key, w in pairs), strict=True)\n",
          "tests/test_setsim.py::test_iteration_by_hand[moco]"),
    Fault("SetSim: keys are not brought back in order", "setsim.py",
          "(common.unshuffle(x, permutation) for x in key if x is not None)", "(x for x in key if x is not None)",
          "tests/test_setsim.py::test_iteration_by_hand[moco]"),
    Fault("SetSim: dense keys are normalised before they are averaged", "setsim.py",
          "F.normalize(key.cells.mean(1), dim=1)", "F.normalize(F.normalize(key.cells, dim=2).mean(1), dim=1)",
          "tests/test_setsim.py::test_iteration_by_hand[moco]"),
    Fault("SetSim: the symmetric loss gives the way back the windows of the way there", "setsim.py",
          "windows = (window_q, window_k), (window_k, window_q)", "windows = (window_q, window_k), (window_q, window_k)",
          "tests/test_setsim.py::test_iteration_by_hand[symmetric]"),
    Fault("SetSim: the matcher sees the projections, not C5", "setsim.py",
          "found = self.match(query.z.detach(), key.z.detach(), window_q",
          "maps = (x.cells.detach().transpose(1, 2).unflatten(2, x.z.shape[2:]) for x in (query, key))\n        found = self.match(*maps, window_q",
          "tests/test_setsim.py::test_iteration_by_hand[moco]"),
    Fault("SimSiam of SetSim: the gradient flows through the projection of cells", "setsim.py",
          "F.normalize(projection.detach(), dim=2)", "F.normalize(projection, dim=2)",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("SimSiam of SetSim: the gradient flows through the projection of images", "setsim.py",
          "return -F.cosine_similarity(prediction, projection.detach(), dim=1).mean()",
          "return -F.cosine_similarity(prediction, projection, dim=1).mean()",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("SetSim: the predictor's learning rate decays", "setsim.py",
          'optimizer.param_groups[0]["lr"] = common.cosine_lr(lr, run.epoch, args.epochs)',
          'optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = common.cosine_lr(lr, run.epoch, args.epochs)',
          "tests/test_faults_gaps.py::test_predictors_keep_their_rate_and_everything_decays"),
    Fault("SetSim: weight decay is missing", "setsim.py",
          "lr, momentum=0.9, weight_decay=1e-4)", "lr, momentum=0.9)",
          "tests/test_faults_gaps.py::test_predictors_keep_their_rate_and_everything_decays"),
    Fault("SetSim: the cosine schedule goes step by step", "setsim.py",
          "common.cosine_lr(lr, run.epoch, args.epochs)", "common.cosine_lr(lr, run.step / run.epoch_steps, args.epochs)",
          "tests/test_faults_gaps.py::test_a_run_in_two_parts_is_the_whole_run[setsim]"),
    Fault("SetSim: a run is resumed without its queues", "harness/run.py",
          'method.load_state_dict(state["model"])',
          'method.load_state_dict({k: v for k, v in state["model"].items() if "queue" not in k}, strict=False)',
          "tests/test_faults_gaps.py::test_a_run_in_two_parts_is_the_whole_run[setsim]"),
    Fault("SetSim: a run is resumed without its optimiser", "harness/run.py",
          '            optimizer.load_state_dict(state["optimizer"])\n', "",
          "tests/test_faults_gaps.py::test_a_run_in_two_parts_is_the_whole_run[setsim]"),
    Fault("SetSim: a run is resumed without the scale of fp16", "harness/run.py",
          '            scaler.load_state_dict(state["scaler"])\n', "",
          "tests/test_faults_gaps.py::test_a_run_in_two_parts_is_the_whole_run[setsim]"),
    Fault("SetSim: a resumed run counts its steps from 0", "harness/run.py",
          'self.step, self.bad.found = state["step"], set(state["bad_images"])', 'self.bad.found = set(state["bad_images"])',
          "tests/test_faults_gaps.py::test_a_run_in_two_parts_is_the_whole_run[setsim]"),
    Fault("checkpoints: one with other settings is accepted", "harness/legacy.py",
          '        if changed:\n            raise UserError(\n                f"{source}: the run',
          '        if changed and not new:\n            raise UserError(\n                f"{source}: the run',
          "tests/test_faults_gaps.py::test_a_checkpoint_of_other_settings_or_another_script_is_refused[load_of_a_transfer_script]"),
    Fault("checkpoints: one of another script is accepted", "harness/legacy.py",
          'if found["script"] != self.script:', 'if not found["script"]:',
          "tests/test_faults_gaps.py::test_a_checkpoint_of_other_settings_or_another_script_is_refused[load_of_a_transfer_script]"),
    Fault("run: a checkpoint with other settings is accepted", "harness/weights.py",
          '    if changed:\n        raise UserError(\n            f"{path}: the run',
          '    if changed and not new:\n        raise UserError(\n            f"{path}: the run',
          "tests/test_faults_gaps.py::test_a_checkpoint_of_other_settings_or_another_script_is_refused[load_of_a_method]"),
    Fault("run: a checkpoint of another script is accepted", "harness/weights.py",
          'if found["script"] != script:', 'if not found["script"]:',
          "tests/test_faults_gaps.py::test_a_checkpoint_of_other_settings_or_another_script_is_refused[load_of_a_method]"),
    # ---- resim.py
    Fault("ReSim: the grid has one window too many", "resim.py",
          "start = torch.arange(0, size - window, stride, dtype=torch.float32)",
          "start = torch.arange(0, size - window + 1, stride, dtype=torch.float32)",
          "tests/test_resim.py::test_window_counts"),
    Fault("ReSim: windows go column by column", "resim.py",
          'y, x = torch.meshgrid(start, start, indexing="ij")', 'x, y = torch.meshgrid(start, start, indexing="ij")',
          "tests/test_resim.py::test_window_counts"),
    Fault("ReSim: regions that end with the view are valid", "resim.py",
          "(boxes[..., 2:] < size).all(2)", "(boxes[..., 2:] <= size).all(2)",
          "tests/test_resim.py::test_inside_is_strict_on_the_far_side_only"),
    Fault("ReSim: a region is valid if one of its corners is seen", "resim.py",
          "(boxes[..., :2] >= 0).all(2) & (boxes[..., 2:] < size).all(2)", "(boxes[..., :2] >= 0).all(2) | (boxes[..., 2:] < size).all(2)",
          "tests/test_resim.py::test_map_boxes_and_valid_against_a_loop"),
    Fault("ReSim: regions are shifted the wrong way", "resim.py",
          "shift = (crop_q[:, :2] - crop_k[:, :2]) * size / side_k", "shift = (crop_k[:, :2] - crop_q[:, :2]) * size / side_k",
          "tests/test_resim.py::test_map_boxes_and_valid_against_a_loop"),
    Fault("ReSim: regions are zoomed by the inverse", "resim.py",
          "zoom = side_q / side_k", "zoom = side_k / side_q",
          "tests/test_resim.py::test_map_boxes_and_valid_against_a_loop"),
    Fault("ReSim: each view has a flip of its own", "resim.py",
          '    for _ in "qk":\n', '    for _ in "qk":\n        image = TF.hflip(image) if torch.rand(()).item() < 0.5 else image\n',
          "tests/test_resim.py::test_crops_say_what_the_views_show_and_flips_are_shared"),
    Fault("PrRoIPool: weights are not divided by the length", "resim.py",
          "integrals / length.where(length > 0, 1), 0)", "integrals, 0)",
          "tests/test_resim.py::test_prroi_pool_weights_of_the_papers_window"),
    Fault("PrRoIPool: tent integrals leave out the peak", "resim.py",
          "return trapezoid + triangle", "return trapezoid",
          "tests/test_resim.py::test_prroi_pool_weights_of_the_papers_window"),
    Fault("PrRoIPool: half a pixel's shift is added", "resim.py",
          "(boxes.to(dtype) * spatial_scale).unbind(2)", "(boxes.to(dtype) * spatial_scale - 0.5).unbind(2)",
          "tests/test_resim.py::test_prroi_pool_weights_of_the_papers_window"),
    Fault("PrRoIPool: a list of boxes belongs to the images in reverse", "resim.py",
          "(boxes.to(dtype) * spatial_scale).unbind(2)", "(boxes.flip(0).to(dtype) * spatial_scale).unbind(2)",
          "tests/test_resim.py::test_prroi_pool_takes_boxes_as_torchvision_does"),
    Fault("ReSim: regions are always pooled by RoIAlign", "resim.py",
          'if pool == "roi_align":', "if pool:",
          "tests/test_resim.py::test_pool_regions_hands_boxes_to_either_operator"),
    Fault("ReSim: neighbourhoods are one cell larger", "resim.py",
          "F.avg_pool2d(feature_map.float(), kernel, stride=1)", "F.avg_pool2d(feature_map.float(), kernel + 1, stride=1)",
          "tests/test_resim.py::test_neighbourhoods_against_a_loop"),
    Fault("ReSim: neighbourhoods do not overlap", "resim.py",
          "F.avg_pool2d(feature_map.float(), kernel, stride=1)", "F.avg_pool2d(feature_map.float(), kernel)",
          "tests/test_resim.py::test_neighbourhoods_against_a_loop"),
    Fault("ReSim: P3 is merged from C5, past P4", "resim.py",
          "+ F.interpolate(p4, c3.shape[2:])", '+ F.interpolate(self.inner_blocks["3"](c5), c3.shape[2:])',
          "tests/test_resim.py::test_pyramid_against_torchvision[official-side0]"),
    Fault("ReSim: the pyramid is upsampled bilinearly", "resim.py",
          'F.interpolate(self.inner_blocks["3"](c5), c4.shape[2:])',
          'F.interpolate(self.inner_blocks["3"](c5), c4.shape[2:], mode="bilinear")',
          "tests/test_resim.py::test_pyramid_against_torchvision[official-side0]"),
    Fault("ReSim: the region loss is a mean over all windows instead of per image", "resim.py",
          "    if not per_image:\n", "    if per_image or not per_image:\n",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("ReSim: images without valid regions count as 0", "resim.py",
          ".sum() / valid.any(1).sum().clamp(min=1)", ".sum() / len(valid)",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("ReSim: the positive is left out of the regions' denominator", "resim.py",
          "row_loss = torch.logaddexp(positive, negative_logsumexp(q, negatives, temperature)) - positive",
          "row_loss = negative_logsumexp(q, negatives, temperature) - positive",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("ReSim: the temperature is missing in the regions' positives", "resim.py",
          "positive = (q * k).sum(1) / temperature  # (R,)", "positive = (q * k).sum(1)  # (R,)",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("ReSim: invalid regions are compared, too", "resim.py",
          "valid, losses, values = pairs.valid, [], {}", "valid, losses, values = pairs.valid | True, [], {}",
          "tests/test_resim.py::test_a_level_against_double_loops_with_its_in_batch_negatives[paper-64-16-16-1]"),
    Fault("ReSim: negatives come from the wrong group", "resim.py",
          "for x in (q, k, valid, near)), strict=True)", "for x in (q, k, valid, near.roll(common.GROUP, 0))), strict=True)",
          "tests/test_resim.py::test_a_level_against_double_loops_with_its_in_batch_negatives[paper-64-16-16-1]"),
    Fault("ReSim: negatives are the queries' neighbourhoods", "resim.py",
          "near = neighbourhoods(map_k, level.kernel)", "near = neighbourhoods(map_q.detach(), level.kernel)",
          "tests/test_resim.py::test_a_level_against_double_loops_with_its_in_batch_negatives[paper-64-16-16-1]"),
    Fault("ReSim: lambda weighs the regions, not the image", "resim.py",
          "return region_loss + self.loss_weight * image_loss, values", "return self.loss_weight * region_loss + image_loss, values",
          "tests/test_resim.py::test_total_loss_adds_the_levels_and_weighs_the_image"),
    Fault("ReSim: momentum update after the keys instead of before", "resim.py",
          "        common.momentum_update(self.key, self.query, self.ema)  # once a step, before its keys\n"
          '        order = torch.randperm(len(view) * common.processes(), generator=common.generator("shuffle", self.seed, step))\n'
          "        image, maps = self.key(common.shuffle(view, order))\n",
          '        order = torch.randperm(len(view) * common.processes(), generator=common.generator("shuffle", self.seed, step))\n'
          "        image, maps = self.key(common.shuffle(view, order))\n"
          "        common.momentum_update(self.key, self.query, self.ema)  # once a step, before its keys\n",
          "tests/test_resim.py::test_momentum_update_before_the_keys_and_parameters_only"),
    Fault("ReSim: maps of the keys stay shuffled", "resim.py",
          "[common.unshuffle(x, order) for x in maps]", "maps",
          "tests/test_resim.py::test_regions_are_pooled_from_unshuffled_keys_of_the_key_network"),
    Fault("SimSiam of ReSim: the gradient flows through the projection of regions", "resim.py",
          "F.cosine_similarity(prediction, projection.detach(), dim=1), valid", "F.cosine_similarity(prediction, projection, dim=1), valid",
          "tests/test_losses.py::test_loss_against_a_loop_value_and_gradient"),
    Fault("SimSiam of ReSim: invalid regions enter the batch statistics", "resim.py",
          "self.region_heads[level.name](vectors[v])", "self.region_heads[level.name](vectors.flatten(0, 1))[v.flatten()]",
          "tests/test_resim.py::test_simsiam_iteration_by_hand"),
    Fault("ReSim: a run is resumed without its optimiser", "harness/run.py",
          '            optimizer.load_state_dict(state["optimizer"])\n', "",
          "tests/test_faults_gaps.py::test_a_run_in_two_parts_is_the_whole_run[resim]"),
    Fault("ReSim: a run is resumed without its queue", "harness/run.py",
          'method.load_state_dict(state["model"])',
          'method.load_state_dict({k: v for k, v in state["model"].items() if "queue" not in k}, strict=False)',
          "tests/test_faults_gaps.py::test_a_run_in_two_parts_is_the_whole_run[resim]"),
    # ---- d3ssl.py
    Fault("D3SSL: a flip does not change left and right of a box", "d3ssl.py",
          "return torch.stack([size - x1, y0, size - x0, y1], -1)", "return torch.stack([x0, y0, x1, y1], -1)",
          "tests/test_d3ssl.py::test_boxes_show_the_same_in_every_view"),
    Fault("D3SSL: both views share one flip's boxes", "d3ssl.py",
          "boxes = flip_boxes(boxes, size) if flipped else boxes", "boxes = flip_boxes(boxes, size) if flipped and divisor > 1 else boxes",
          "tests/test_d3ssl.py::test_boxes_show_the_same_in_every_view"),
    Fault("D3SSL: boxes that reach out of the crop come first", "d3ssl.py",
          "(~wholly[order]).int().argsort(stable=True)", "wholly[order].int().argsort(stable=True)",
          "tests/test_d3ssl.py::test_boxes_wholly_inside_the_crop_come_first"),
    Fault("PRC goes from the smallest box to the largest", "d3ssl.py",
          "boxes[area.argsort(descending=True, stable=True)]", "boxes[area.argsort(descending=False, stable=True)]",
          "tests/test_d3ssl.py::test_prc_on_nested_boxes_cuts_what_the_rule_says"),
    Fault("PRC: a box that was cut too much does not come back", "d3ssl.py",
          "            region.fill_(True)\n            cut = 0\n", "            continue\n",
          "tests/test_d3ssl.py::test_prc_on_nested_boxes_cuts_what_the_rule_says"),
    Fault("PRC: earlier cuts are not subtracted from the share", "d3ssl.py",
          "math.sqrt(share - cut)", "math.sqrt(share)",
          "tests/test_d3ssl.py::test_prc_against_sets_of_pixels"),
    Fault("PRC: the sides of a cut are rounded, not its edges (D19)", "d3ssl.py",
          "region[round(top) : round(top + scale * rows), round(left) : round(left + scale * columns)]",
          "region[round(top) :, round(left) :][: round(scale * rows), : round(scale * columns)]",
          "tests/test_d3ssl.py::test_prc_rounds_each_edge_of_a_cut[23-37-0.3]"),
    Fault("PRM hides boxes", "d3ssl.py",
          "(foreground_mask(boxes, *shown.shape) | (~shown if erase else shown))", "(~shown if erase else shown)",
          "tests/test_d3ssl.py::test_prm_shows_background_from_all_sides_and_never_touches_boxes"),
    Fault("PRM hides the rectangle instead of showing it", "d3ssl.py",
          "(~shown if erase else shown)", "(shown if erase else ~shown)",
          "tests/test_d3ssl.py::test_prm_shows_background_from_all_sides_and_never_touches_boxes"),
    Fault("RBJ enlarges boxes", "d3ssl.py",
          "side * (1 - shrink * torch.rand_like(side))", "side * (1 + shrink * torch.rand_like(side))",
          "tests/test_d3ssl.py::test_rbj_stays_inside_and_is_never_larger"),
    Fault("D3SSL: PRM and PRC share a generator, so that one changes the other's draws", "d3ssl.py",
          '    with common.drawing("mask", *key):\n        if "prm" in augment', '        if "prm" in augment',
          "tests/test_d3ssl.py::test_each_kind_of_draw_has_a_generator_of_its_own"),
    Fault("the shift is applied with the wrong sign", "d3ssl.py",
          "columns = (torch.arange(W, device=view.device) - shift[:, :1]) % W", "columns = (torch.arange(W, device=view.device) + shift[:, :1]) % W",
          "tests/test_d3ssl.py::test_composition_moves_pixels_by_exactly_t"),
    Fault("the mask is not used in the composition", "d3ssl.py",
          "return torch.where(mask[:, None], moved.permute(0, 3, 1, 2), background)", "return moved.permute(0, 3, 1, 2)",
          "tests/test_d3ssl.py::test_composition_moves_pixels_by_exactly_t tests/test_d3ssl.py::test_x3_is_composed_on_another_images_x2"),
    Fault("the composed background is from the image itself", "d3ssl.py",
          "images.roll(1 + int(where * (len(images) - 1)))", "images.roll(0)",
          "tests/test_d3ssl.py::test_background_is_another_image_of_the_group"),
    Fault("the range of shifts lets boxes leave the view", "d3ssl.py",
          "(size - boxes[..., 2:]).amin(-2).floor().long()", "(size - boxes[..., 2:]).amax(-2).floor().long()",
          "tests/test_d3ssl.py::test_shift_range_by_trying_all_shifts"),
    Fault("a shift never reaches the far end of its range", "d3ssl.py",
          "torch.rand(2) * (most - least + 1)", "torch.rand(2) * (most - least)",
          "tests/test_d3ssl.py::test_shifts_are_drawn_evenly_over_their_range"),
    Fault("D3SSL: boxes of x3 do not move with it", "d3ssl.py",
          "(x3, drawn.boxes_2 + drawn.shift.repeat(1, 2)[:, None])", "(x3, drawn.boxes_2)",
          "tests/test_d3ssl.py::test_x3_is_composed_on_another_images_x2"),
    Fault("the teacher's x2 is masked as well", "d3ssl.py",
          "        (x2, drawn.boxes_2),\n",
          "        (x2 * F.interpolate(drawn.keep_2[:, None].float(), scale_factor=2), drawn.boxes_2),\n",
          "tests/test_d3ssl.py::test_iteration_by_hand[True]"),
    Fault("x2-s keeps the boxes of the large view", "d3ssl.py",
          "(x2_s * drawn.keep_2[:, None], drawn.boxes_2 / 2)", "(x2_s * drawn.keep_2[:, None], drawn.boxes_2)",
          "tests/test_d3ssl.py::test_iteration_by_hand[True]"),
    Fault("D3SSL: RoIAlign without half-pixel alignment", "d3ssl.py",
          "1 / CELL, aligned=True)", "1 / CELL, aligned=False)",
          "tests/test_d3ssl.py::test_the_region_of_a_whole_view_is_torchvisions_resnet[112]"),
    Fault("D3SSL: the positive is left out of the denominator", "d3ssl.py",
          "return (torch.logaddexp(match, negative_logsumexp(z, bank, temperature)) - match).mean()",
          "return (negative_logsumexp(z, bank, temperature) - match).mean()",
          "tests/test_d3ssl.py::test_loss_against_a_naive_loop_value_and_gradient"),
    Fault("D3SSL: loss_dp misses its second term", "d3ssl.py",
          "compare(z_s[2], z_t[1]) + compare(z_s[2], z_t[0])", "compare(z_s[2], z_t[1])",
          "tests/test_d3ssl.py::test_iteration_by_hand[True]"),
    Fault("D3SSL: views are compared with themselves, not crosswise", "d3ssl.py",
          "compare(z_s[0], z_t[1]) + compare(z_s[1], z_t[0])", "compare(z_s[0], z_t[0]) + compare(z_s[1], z_t[1])",
          "tests/test_d3ssl.py::test_iteration_by_hand[False]"),
    Fault("D3SSL: the bank gets the student's z_s", "d3ssl.py",
          "self.bank.enqueue(all_gather(z_t[0]).flatten(0, 1))", "self.bank.enqueue(all_gather(z_s[0]).flatten(0, 1))",
          "tests/test_d3ssl.py::test_iteration_by_hand[False]"),
    Fault("D3SSL: boxes are not shuffled with their images", "d3ssl.py",
          "[[common.shuffle(x, permutation) for x in view] for view in views]",
          "[[common.shuffle(view[0], permutation), view[1]] for view in views]",
          "tests/test_d3ssl.py::test_images_and_boxes_stay_together_through_shuffling"),
    Fault("SoCo: the momentum is constant", "d3ssl.py",
          "m = self.ema if self.bank else 1 - (1 - self.ema) * (1 + math.cos(math.pi * step / self.total)) / 2", "m = self.ema",
          "tests/test_d3ssl.py::test_soco_iteration_by_hand"),
    Fault("SoCo: the loss is not doubled", "d3ssl.py",
          "return -2 * F.cosine_similarity(", "return -F.cosine_similarity(",
          "tests/test_d3ssl.py::test_soco_loss_and_its_stop_gradient"),
    Fault("SoCo: the gradient flows through the teacher's projection", "d3ssl.py",
          "F.cosine_similarity(prediction, projection.detach(), dim=-1)", "F.cosine_similarity(prediction, projection, dim=-1)",
          "tests/test_d3ssl.py::test_soco_loss_and_its_stop_gradient"),
    Fault("D3SSL: an unreadable image keeps its own boxes", "harness/proposals.py",
          "self.rows[(index + passed) % len(self)]", "self.rows[index]",
          "tests/test_d3ssl.py::test_boxes_belong_to_the_image_that_is_read"),
    Fault("D3SSL: a run is resumed without its optimiser", "harness/run.py",
          '            optimizer.load_state_dict(state["optimizer"])\n', "",
          "tests/test_faults_gaps.py::test_a_run_in_two_parts_is_the_whole_run[d3ssl]"),
]
# fmt: on

if __name__ == "__main__":
    sys.exit(main())
