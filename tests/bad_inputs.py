# SPDX-License-Identifier: MIT
"""Command lines that cannot work, and a part of the one line with which each is refused.

{data}: see conftest.photos. {tmp}: a folder with a file `text`, an empty folder `empty/train`, and two
images in `others`.
"""

PHOTOS = "--data {data}/images"
METHOD = {
    "": "give --data DIR",
    "--data {tmp}/empty": "no images in it or below",
    "--data {tmp}/nowhere": "no such folder",
    "--data scenes:many": "write scenes:4096",
    f"{PHOTOS} --batch-size 64": "12 images are fewer than --batch-size 64",
    f"{PHOTOS} --batch-size 6 --output-dir {{tmp}}/text": "File exists: give a folder",
    f"{PHOTOS} --batch-size 6 --output-dir {{tmp}}/text/below": "Not a directory: give a folder",
    f"{PHOTOS} --batch-size 6 --init {{tmp}}/text": "not a checkpoint that can be read safely",
    f"{PHOTOS} --batch-size 6 --init nowhere.pth": "nowhere.pth: no such file",
    f"{PHOTOS} --epochs 0": "--epochs: 0: must be at least 1",
    f"{PHOTOS} --ema 1.5": "--ema: 1.5: must be between 0 and 1",
}
BOXES = "--proposals {data}/boxes"
DEMO = "--demo --data scenes:8"
TRANSFER = {
    "": "give --task, or --demo",
    "--demo --data {tmp}": "--task scenes wants 'scenes' or 'scenes:COUNT'",
    f"{DEMO} --batch-size 0": "--batch-size: 0: must be at least 1",
    f"{DEMO} --batch-size 64": "images are fewer than --batch-size 64",
    f"{DEMO} --weights nowhere.pth": "nowhere.pth: no such file",
    f"{DEMO} --weights {{tmp}}/text": "not a checkpoint",
    f"{DEMO} --output-dir {{tmp}}/text": "File exists: give a folder",
    "--eval-only --output-dir {tmp}": "want the --output-dir of a run",
    "--predict {tmp} --output-dir {tmp}": "want the --output-dir of a run",
    "--eval-only --predict {tmp}": "two jobs: give one of them",
}
BAD = {
    "setsim": METHOD,
    "resim": METHOD,
    "d3ssl": {(f"{flags} {BOXES}" if "--data" in flags else flags): words for flags, words in METHOD.items()}
    | {
        PHOTOS: "give --proposals DIR, made by: python -m tools.proposals",
        f"{PHOTOS} --batch-size 6 --proposals nowhere": "nowhere/meta.json: No such file",
        f"{PHOTOS} --batch-size 6 --proposals {{tmp}}/text": "text/meta.json: Not a directory",
        f"--data {{tmp}}/others --batch-size 2 {BOXES}": "the first is 0000.png: make proposals of these",
        f"--data scenes:12 --batch-size 6 {BOXES}": "scene",
    },
    "transfer_det": TRANSFER
    | {
        "--task voc": "--task voc wants --data: a folder with VOC2007/",
        "--task voc --data nowhere": "--data nowhere: no such folder; it must be a folder with VOC2007/",
        "--task voc07 --data {tmp}": "no such file; --data must be a folder with VOC2007/",
        "--task coco --data {tmp}": "no such folder of images",
        "--task cityscapes --data {tmp}": "must be a folder with leftImg8bit",
        "--task custom --train-json a.json": "--task custom wants --val-json",
        "--task custom --train-json a.json --val-json b.json --images {tmp}": "a.json: not a JSON file",
        "--task custom --train-json {tmp}/text --val-json b.json --images {tmp}": "text: not a JSON file",
        "--task custom --train-json {tmp}/text --val-json b.json --images nowhere": "nowhere: no such folder of images",
        "--task coco --data x --model c4 --heads 4conv1fc": "--heads 4conv1fc belongs to --model fpn",
        "--task voc --data x --fpn-weights y": "--fpn-weights belong to --model fpn",
        "--task coco-keypoint --data x --model c4": "there is no keypoint head on C4",
        f"{DEMO} --freeze-at 6": "--freeze-at: 6: must be between 0 and 5",
        f"{DEMO} --short-sides 8": "--short-sides: 8: must be at least 32",
        f"{DEMO} --fpn-weights nowhere.pth": "nowhere.pth: no such file",
    },
    "transfer_seg": TRANSFER
    | {
        "--task voc": "--task voc wants --data: a folder with VOC2012/",
        "--task voc --data nowhere": "wanted is a folder with VOC2012/",
        "--task voc --data {tmp}": "a folder with VOC2012/",
        "--task ade20k --data {tmp}": "ADEChallengeData2016",
        "--task cityscapes --data {tmp}": "a folder with leftImg8bit",
        "--task custom --images {data}/images": "--task custom wants --masks",
        "--task custom --images nowhere --masks {data}/masks": "nowhere: no such folder",
        "--task custom --images {data}/images --masks {tmp}/empty": "no images",
        "--task voc --data x --crop 64xa": "invalid height_x_width value: '64xa'",
        "--task voc --data x --crop 8": "--crop: 8: must be at least 32",
        "--task voc --data x --resize 100x100x100": "invalid height_x_width value: '100x100x100'",
        "--task custom --ignore 256": "--ignore: 256: must be between 0 and 255",
    },
    "probes.linear": {
        "--data x": "the following arguments are required: --weights",
        "--data {tmp}/nowhere --weights random": "no such folder",
        "--data {tmp}/empty --weights random": "no images in it",
        "--data {tmp}/others --weights random": "0000.png: in no class folder of train/",
        "--data {tmp}/one --weights random": "one class alone (a): there is nothing to tell apart",
        f"{PHOTOS} --weights random --batch-size 64": "12 images are fewer than --batch-size 64",
        f"{PHOTOS} --weights nowhere.pth --batch-size 6": "nowhere.pth: no such file",
        f"{PHOTOS} --weights {{tmp}}/text --batch-size 6": "not a checkpoint",
        f"{PHOTOS} --weights random --epochs 0": "--epochs: 0: must be at least 1",
    },
}
