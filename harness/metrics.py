# SPDX-License-Identifier: MIT
"""Average precision of Pascal VOC and of Cityscapes on plain arrays. numpy and pycocotools are enough.

COCO's own metric is pycocotools' COCOeval, which transfer_det.py calls. All results are in percent.
"""

import numpy as np
from pycocotools import mask as rle

THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


def summary(per_class):
    """AP (mean over classes and thresholds), AP50, AP75, and AP at each threshold, percent.

    Args:
        per_class: (thresholds, K) in [0, 1]; nan where a class does not occur.
    """
    per_class = np.asarray(per_class, np.float64)
    by_threshold = np.full(len(THRESHOLDS), np.nan)
    if not np.isnan(per_class).all():
        by_threshold = 100 * np.nanmean(per_class, axis=1)
    curve = {f"{100 * t:.0f}": float(ap) for t, ap in zip(THRESHOLDS, by_threshold, strict=True)}
    return {"AP": float(by_threshold.mean()), "AP50": curve["50"], "AP75": curve["75"], "AP_by_IoU": curve}


# ==== Pascal VOC ======================================================================================================


def voc_ap(recall, precision):
    """VOC 2007's eleven points: the mean over recall 0, .1, ..., 1 of the best precision at that recall or more."""
    return float(np.mean([precision[recall >= point].max(initial=0) for point in np.arange(0, 1.1, 0.1)]))


def voc_match(detections, truth, threshold):
    """Which detections of one class are right, by VOC's rules as detectron2 follows them.

    In the order of their scores, each takes the object of its image that it overlaps most (pixels counted inclusively).
    It is right if the overlap exceeds `threshold` and the object is not taken. Difficult objects make neither right nor
    wrong. Equal scores keep the order they are given in (DEVIATION: F19).

    Args:
        detections: list of (image, score, box). truth: {image: list of (box, difficult)}. box: (4,) x0 y0 x1 y1 as in
        VOC's files, both ends inclusive.
    Returns:
        (right, wrong): bool arrays, best score first.
    """
    order = np.argsort([-score for _, score, _ in detections], kind="stable")
    right, wrong, taken = np.zeros(len(order), bool), np.zeros(len(order), bool), set()
    for place, number in enumerate(order):
        image, _, box = detections[number]
        objects, best = truth.get(image, []), -1.0
        for i, (other, _) in enumerate(objects):
            sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]) + 1
            shared = np.prod(sides.clip(0))
            overlap = shared / (np.prod(box[2:] - box[:2] + 1) + np.prod(other[2:] - other[:2] + 1) - shared)
            if overlap > best:
                best, chosen = overlap, i
        if best <= threshold:
            wrong[place] = True
        elif not objects[chosen][1]:
            right[place] = (image, chosen) not in taken
            wrong[place] = not right[place]
            taken.add((image, chosen))
    return right, wrong


def voc_box(bbox):
    """COCO's x, y, width, height -> VOC's x0 y0 x1 y1, which count pixels from 1, both ends inclusive."""
    x, y, width, height = bbox
    return np.array([x + 1, y + 1, x + width, y + height])


def evaluate_voc(annotations, results, categories):
    """detectron2's VOC evaluator (OFFICIAL: F3): scores to three decimals, boxes to one, eleven points at every threshold.

    Args:
        annotations: COCO's dicts with image_id, category_id, bbox, difficult. results: COCO's dicts with image_id,
        category_id, bbox, score. categories: ids. One without objects counts as 0.
    Returns:
        `summary`.
    """
    per_class = np.zeros((len(THRESHOLDS), len(categories)))
    for column, category in enumerate(categories):
        truth, detections = {}, []
        for one in annotations:
            if one["category_id"] == category:
                truth.setdefault(one["image_id"], []).append((voc_box(one["bbox"]), bool(one["difficult"])))
        for one in results:
            if one["category_id"] == category:
                box = np.array([float(f"{x:.1f}") for x in voc_box(one["bbox"])])
                detections.append((one["image_id"], float(f"{one['score']:.3f}"), box))
        objects = sum(not difficult for part in truth.values() for _, difficult in part)
        for row, threshold in enumerate(THRESHOLDS):
            right, wrong = (np.cumsum(x) for x in voc_match(detections, truth, threshold))
            per_class[row, column] = voc_ap(right / max(objects, 1), right / np.maximum(right + wrong, 1e-12))
    return summary(per_class)


# ==== Cityscapes ======================================================================================================

CITYSCAPES_VOID = [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, -1]  # cityscapesScripts' ignoreInEval


def class_of(number):
    """The label id of a value of an instance map: 1000 x label + number for objects, the label alone for groups."""
    return number // 1000 if number >= 1000 else number


def cityscapes_ap(matched, wrong, missed):
    """Area under the precision-recall curve in steps. Every distinct score is a point, as in cityscapesScripts.

    Args:
        matched, wrong: scores of right and wrong detections. missed: number of objects that no detection matches.
    """
    scores = np.concatenate([matched, wrong])
    if not len(scores):
        return 0.0
    points = np.unique(scores)  # ascending; at each, all detections with this score or more count
    right = np.array([(np.asarray(matched) >= point).sum() for point in points], np.float64)
    precision = right / np.array([(scores >= point).sum() for point in points])
    recall = right / max(len(matched) + missed, 1)
    precision, recall = np.append(precision, 1.0), np.append(recall, 0.0)  # the curve's artificial last point
    edges = np.concatenate([recall[:1], recall, [0.0]])
    return float((precision * (edges[:-2] - edges[2:]) / 2).sum())


def cityscapes_overlaps(ids, detections):
    """What the rules need to know of one image.

    Args:
        ids: (H, W) instance map, label ids. detections: list of (label id, score, COCO's RLE of the mask).
    Returns:
        ({object or group: pixels}, list of (label id, score, pixels, pixels on void, {object: shared pixels}) of the
        detections that are not empty)
    """
    numbers, counts = np.unique(ids, return_counts=True)
    void, found = np.isin(ids, CITYSCAPES_VOID), []
    for label, score, code in detections:
        mask = rle.decode(code).astype(bool)
        shared = dict(zip(*(x.tolist() for x in np.unique(ids[mask], return_counts=True)), strict=True))
        if mask.any():
            found.append((label, score, int(mask.sum()), int(void[mask].sum()), shared))
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True)), found


def cityscapes_match(images, label, threshold):
    """Match the detections of one class, see `evaluate_cityscapes`.

    Args:
        images: of `cityscapes_overlaps`. label: id.
    Returns:
        (scores of right ones, scores of wrong ones, objects missed, objects)
    """
    matched, wrong, missed, objects = [], [], 0, 0
    for sizes, rows in images:
        own = {number: size for number, size in sizes.items() if class_of(number) == label}
        real = [number for number, size in own.items() if number >= 1000 and size >= 100]
        rows, objects = [row for row in rows if row[0] == label], objects + len(real)
        overlaps = [{n: s.get(n, 0) / (own[n] + pixels - s.get(n, 0)) for n in own} for *_, pixels, _, s in rows]
        for number in real:
            scores = sorted(row[1] for row, overlap in zip(rows, overlaps, strict=True) if overlap[number] > threshold)
            missed += not scores
            matched += scores[-1:]
            wrong += scores[:-1]
        for (_, score, pixels, on_void, shared), overlap in zip(rows, overlaps, strict=True):
            if max(overlap.values(), default=0) <= threshold:
                ignored = on_void + sum(shared.get(n, 0) * ((n < 1000) + (own[n] < 100)) for n in own)
                wrong += [score] if ignored / pixels <= threshold else []
    return matched, wrong, missed, objects


def evaluate_cityscapes(maps, detections, categories):
    """Cityscapes' instance AP and AP50: the metric of cityscapesScripts 2.3.0, which itself stops on current numpy.

    An object (1000 or more in the instance map, at least 100 pixels) is found by a detection of its class that overlaps
    it by more than the threshold. Of several, all but the best are wrong. A detection without object is wrong unless more
    than the threshold's share of it lies on void, groups and small objects.

    Args:
        maps: iterable of (H, W) instance maps. detections: for each, see `cityscapes_overlaps`. categories: {label id:
        name}. One without objects counts in no mean.
    Returns:
        `summary` and AP_by_class.
    """
    images = [cityscapes_overlaps(ids, found) for ids, found in zip(maps, detections, strict=True)]
    per_class = np.full((len(THRESHOLDS), len(categories)), np.nan)
    for column, label in enumerate(categories):
        for row, threshold in enumerate(THRESHOLDS):
            matched, wrong, missed, objects = cityscapes_match(images, label, threshold)
            if objects:
                per_class[row, column] = cityscapes_ap(matched, wrong, missed)
    aps = 100 * per_class.mean(0)
    by_class = {name: float(ap) for name, ap in zip(categories.values(), aps, strict=True) if ap == ap}
    return summary(per_class) | {"AP_by_class": by_class}
