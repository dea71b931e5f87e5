"""The README's path for one's own images, from a folder to predictions, each step as its user types it."""

import json

import pytest
import torch
from helpers import checkpoint, log_lines, run

from tools.scenes import write_coco

TINY = "--arch resnet18 --workers 0 --batch-size 4".split()
DETECTOR = "--short-sides 64 --test-side 64 --precise-bn 1 --iterations 1".split()
SEGMENTER = "--crop 64 --resize 256x64 --iterations 12 --batch-size 8".split()


def results(folder):
    (line,) = (folder / "results.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.mark.slow
def test_from_a_folder_of_images_to_predictions(tmp_path):
    write_coco(tmp_path / "data", 0, 32, 64)
    photos, labels = tmp_path / "data" / "images", tmp_path / "boxes.json"
    told = json.loads((tmp_path / "data" / "annotations.json").read_text())
    for row in told["annotations"]:  # boxes alone: heads for masks and keypoints take minutes on a CPU
        del row["segmentation"], row["keypoints"]
    labels.write_text(json.dumps(told))
    flags = "--size 64 --epochs 2 --queue-size 32 --lr 0.1".split()
    run("setsim.py", "--data", photos, *TINY, *flags, "--output-dir", tmp_path / "pre")
    weights = tmp_path / "pre" / "resnet18.pth"

    # a few labels, from these weights and from random ones
    seg = ["transfer_seg.py", "--task", "custom", "--images", photos, "--masks", tmp_path / "data" / "semantic"]
    det = ["transfer_det.py", "--task", "custom", "--train-json", labels, "--val-json", labels, "--images", photos]
    found = {}
    for name, start in (("ours", weights), ("random", "random")):
        text = run(*seg, *TINY, *SEGMENTER, "--weights", start, "--output-dir", tmp_path / f"seg_{name}")
        assert ("120 tensors of resnet18" in text) == (name == "ours")
        found[name] = results(tmp_path / f"seg_{name}")
        assert found[name]["weights"] == str(start) and found[name]["mIoU"] > 5  # background alone: 100 / 11 at most
    assert found["ours"]["protocol"] == found["random"]["protocol"]
    losses = [log_lines(tmp_path / f"seg_{name}")[1]["loss"] for name in found]
    assert losses[0] != losses[1]  # another start, the same images, seed and settings

    run(*det, *TINY, *DETECTOR, "--weights", weights, "--freeze-at", 5, "--output-dir", tmp_path / "det")
    frozen, pretrained = checkpoint(tmp_path / "det")["model"], torch.load(weights)
    weights = {
        key: x for key, x in pretrained.items() if not key.endswith("num_batches_tracked")
    }  # frozen norms count none
    assert all(torch.equal(frozen[f"backbone.body.{key}"], x) for key, x in weights.items())
    assert results(tmp_path / "det")["box"]["AP"] >= 0

    # others' images
    for script, folder in (("transfer_seg.py", "seg_ours"), ("transfer_det.py", "det")):
        run(script, "--predict", photos, "--output-dir", tmp_path / folder)
        assert len(list((tmp_path / folder / "predictions").rglob("*.png"))) >= 32
