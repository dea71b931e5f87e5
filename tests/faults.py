# SPDX-License-Identifier: MIT
"""Planted faults: does the suite notice when the code goes a little wrong?

    python -m tests.faults [WORDS] [--clean]

Each row of FAULTS is one small wrong behaviour, and the quickest tests that catch it. Those rows whose description or file
name contains all the WORDS are tried, two side by side: the fault is put into a temporary copy of the repository, only its
tests run there, and one of them has to fail. --clean first demands that the tests pass without faults. The exit code is 0
if every fault is caught.
"""

import argparse
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
PYTEST += ["-o", "addopts=--strict-markers --strict-config"]
SIDE_BY_SIDE, TOO_LONG = 2, 300  # faults, seconds


class Fault(NamedTuple):
    """One row: in `file`, `old` (which stands there once) becomes `new`; one of `tests` must fail then."""

    what: str
    file: str
    old: str
    new: str
    tests: str  # ids, separated by spaces; one with a space in its brackets stands alone


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="try only faults whose description or file contains all of these")
    parser.add_argument("--clean", action="store_true", help="first run the tests without faults: they must pass")
    args = parser.parse_args(argv)
    chosen = [f for f in FAULTS if all(word.lower() in f"{f.what} {f.file}".lower() for word in args.words)]
    started, copies = time.time(), queue.Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for number in range(SIDE_BY_SIDE):
            copies.put(copy_repository(pathlib.Path(folder) / str(number)))
        if args.clean:
            code, output = run_tests(copies.queue[0], sorted({test for f in chosen for test in ids(f)}), 20 * TOO_LONG)
            print(f"without faults: {'all tests pass' if code == 0 else output}", flush=True)
            if code:
                return 1
        outcomes = list(pool.map(lambda fault: try_fault(fault, copies), chosen))
    caught = outcomes.count("caught")
    print(f"{caught} of {len(chosen)} faults are caught, {time.time() - started:.0f} s")
    return int(caught < len(chosen))


def ids(fault):
    """The tests of a fault, as pytest wants them."""
    return re.findall(r"tests/\S+?\.py::\w+(?:\[[^\]]*\])?", fault.tests)


def copy_repository(folder):
    """Copy what git tracks or would track to `folder`."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    for name in filter(None, names.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(folder, tests, limit=TOO_LONG):
    """Run tests in a copy. Returns: pytest's exit code, None if it took too long; its output."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # files change within a second
    with tempfile.TemporaryDirectory() as scratch:
        command = [*PYTEST, f"--basetemp={scratch}/pytest", *tests]
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return None, "too long"
    return done.returncode, done.stdout + done.stderr


def try_fault(fault, copies):
    """Put one fault into a free copy, run its tests, mend the copy. Returns and prints what came of it."""
    started, folder = time.time(), copies.get()
    path = folder / fault.file
    whole = path.read_text() if path.exists() else ""
    if whole.count(fault.old) != 1 or fault.old == fault.new:
        outcome = "patch does not apply"
    else:
        path.write_text(whole.replace(fault.old, fault.new))
        code, output = run_tests(folder, ids(fault))
        path.write_text(whole)
        if code == 1 and re.search(r"^\d+ failed", output.splitlines()[-1]):
            outcome = "caught"
        elif code in (0, None):
            outcome = "SURVIVED" if code == 0 else f"no result after {TOO_LONG} s"
        elif run_tests(folder, ids(fault))[0] == 0:
            outcome = "the patched file cannot be imported or used at all"
        else:
            outcome = "tests do not pass or exist without the fault"
    copies.put(folder)
    print(f"{outcome}: {fault.what} ({fault.file}, {time.time() - started:.0f} s)", flush=True)
    return outcome


# fmt: off
FAULTS = [
    # ---- transfer_det.py
    Fault("RPN: sampled negatives are left out of the loss", "transfer_det.py",
          "sampled = positive | negative", "sampled = positive",
          "tests/test_transfer_det.py::test_rpn_loss_by_hand"),
    Fault("RPN: losses are means over the anchors sampled, not over 256 an image", "transfer_det.py",
          "total = self.fg_bg_sampler.batch_size_per_image * len(labels)", "total = int(sampled.sum())",
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
          'reduction="sum", beta=beta) / len(\n        labels\n    )', 'reduction="sum", beta=beta) / len(\n        foreground\n    )',
          "tests/test_transfer_det.py::test_box_losses_by_hand[0.5]"),
    Fault("masks of the next class are trained and shown", "transfer_det.py",
          "logits = logits[torch.arange(len(classes), device=classes.device), classes]",
          "logits = logits[torch.arange(len(classes), device=classes.device), classes - 1]",
          "tests/test_transfer_det.py::test_heads_detect_what_torchvisions_do"),
    Fault("mask targets of polygons are not moved to the box's corner", "transfer_det.py",
          "((part.reshape(-1, 2) - [x0, y0]) * scale)", "(part.reshape(-1, 2) * scale)",
          "tests/test_transfer_det.py::test_mask_targets_of_polygons"),
    Fault("mask targets of bitmaps forget the pixel of padding", "transfer_det.py",
          "torch.tensor([left - 1.0, top - 1.0])", "torch.tensor([left - 0.0, top - 0.0])",
          "tests/test_transfer_det.py::test_mask_targets_of_bitmaps_are_roi_align_cut_at_one_half"),
    Fault("precise batch norm counts every batch alike", "transfer_det.py",
          "count = x.numel() // x.shape[1]", "count = 1000",
          "tests/test_transfer_det.py::test_precise_bn_is_the_population"),
    Fault("precise batch norm: the biased variance", "transfer_det.py",
          ".clamp(min=0) * total[0] / (total[0] - 1)", ".clamp(min=0)",
          "tests/test_transfer_det.py::test_precise_bn_is_the_population"),
    Fault("left and right keypoints keep their places in a flip", "transfer_det.py",
          "            moved = moved[order]\n", "",
          "tests/test_transfer_det.py::test_objects_follow_a_resize_and_a_flip"),
    Fault("boxes are flipped about the last pixel's centre", "transfer_det.py",
          "boxes[..., 0] = new_width - boxes[:, ::-1, 0]", "boxes[..., 0] = new_width - 1 - boxes[:, ::-1, 0]",
          "tests/test_transfer_det.py::test_objects_follow_a_resize_and_a_flip"),
    Fault("resizing cuts half a pixel off instead of rounding", "transfer_det.py",
          "return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)",
          "return max(int(height * scale), 1), max(int(width * scale), 1)",
          "tests/test_transfer_det.py::test_resized"),
    Fault("crowds are trained on", "transfer_det.py",
          'rows = [row for row in self.data.annotations(place) if not row["crowd"]]', "rows = self.data.annotations(place)",
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
          "        for module in self.frozen_modules():\n            module.eval()\n", "",
          "tests/test_transfer_det.py::test_what_is_frozen_stays_as_it_is[fpn-2-3]"),
    Fault("weight decay on norms of the detector", "transfer_det.py",
          '"weight_decay": 0.0}', '"weight_decay": weight_decay}',
          "tests/test_transfer_det.py::test_norms_have_no_weight_decay"),
    Fault("the learning rate drops a step late", "transfer_det.py",
          "sum(step >= drop for drop in drops)", "sum(step > drop for drop in drops)",
          "tests/test_transfer_det.py::test_learning_rate_of_voc"),
    Fault("the detector's learning rate is not scaled with the batch", "transfer_det.py",
          '"lr": args.lr * args.batch_size / batch,', '"lr": args.lr,',
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
          '{"bbox": [x0, y0, x1 - x0, y1 - y0], "score": one["score"]}', '{"bbox": [x0, y0, x1, y1], "score": one["score"]}',
          "tests/test_transfer_det.py::test_results_carry_the_data_sets_own_ids"),
    Fault("VOC: difficult objects count as objects to be found", "transfer_det.py",
          "objects = sum(not difficult for part in truth.values() for _, difficult in part)",
          "objects = sum(True for part in truth.values() for _, difficult in part)",
          "tests/test_transfer_det.py::test_voc_evaluation"),
    Fault("VOC: detections of difficult objects are right", "transfer_det.py",
          "elif not objects[chosen][1]:", "else:",
          "tests/test_transfer_det.py::test_voc_rules_on_worked_examples"),
    Fault("VOC: an overlap of just the threshold is enough", "transfer_det.py",
          "if best <= threshold:", "if best < threshold:",
          "tests/test_transfer_det.py::test_voc_rules_on_worked_examples"),
    Fault("VOC: the area under the curve instead of eleven points", "transfer_det.py",
          "np.arange(0, 1.1, 0.1)]", "np.arange(0, 1.001, 0.01)]",
          "tests/test_transfer_det.py::test_eleven_points"),
    Fault("Cityscapes: small objects count", "transfer_det.py",
          "if n >= 1000 and size >= 100}", "if n >= 1000}",
          "tests/test_transfer_det.py::test_cityscapes_rules_on_worked_examples"),
    Fault("batches mix wide and high images", "transfer_det.py",
          "basket = baskets[bool(self.wide[order[place]])]", "basket = baskets[True]",
          "tests/test_transfer_det.py::test_batches_hold_one_kind_of_images_and_resume_exactly[1]"),
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
]
# fmt: on

if __name__ == "__main__":
    sys.exit(main())
