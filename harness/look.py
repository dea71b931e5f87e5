# SPDX-License-Identifier: MIT
"""What a method sees: two measures and three pictures. Pictures show the very tensors that the loss uses.

correspondence, found_again                     sums over cells or regions: hits, chance, count
draw_matches, draw_windows, draw_regions        a PNG each: SetSim's Figure 3, ReSim's 2 and 3, D3SSL's 2 and 5
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms import functional as TF

import common
from harness.weights import write_atomically

ORANGE, BLUE, RED = (255, 176, 0), (64, 176, 255), (230, 40, 40)
COLOURS = ((255, 255, 255), ORANGE, (64, 200, 255), (230, 60, 60), (110, 220, 90), (200, 120, 255))
SHOWN = 6  # images of a picture


def correspondence(similarity, window_q, window_k, H, W):
    """How often the most similar key cell lies within one cell of the true place.

    Args:
        similarity: (B, S, S), of every query cell to every key cell, row by row of H x W.
        window_q, window_k: (B, 4), the image coordinates of each view's left, top, right and bottom edge.
    Returns:
        hits, chance, count. count: query cells whose centre lies in the key view. hits: those whose arg-max is at most
        one row and one column away from the true place. chance: the hits that an arg-max drawn evenly would have.
    """
    cell = torch.arange(H * W, device=similarity.device)
    grid = torch.stack([cell % W, cell // W], 1)  # (S, 2)
    size = torch.tensor([W, H], device=similarity.device)
    (start_q, end_q), (start_k, end_k) = ((w[:, None, :2], w[:, None, 2:]) for w in (window_q, window_k))
    centre = start_q + (grid + 0.5) / size * (end_q - start_q)  # (B, S, 2), of query cells in the image
    place = (centre - start_k) / (end_k - start_k)  # 0 to 1 across the key view
    inside = ((place >= 0) & (place < 1)).all(2)  # (B, S)
    offset = (place * size - 0.5)[:, :, None] - grid  # (B, S, S, 2), in cells
    near = (offset.abs() < 1.001).all(3)  # (B, S, S)
    hit = near.gather(2, similarity.argmax(2, keepdim=True))[:, :, 0]
    return hit[inside].sum().item(), near[inside].float().mean(1).sum().item(), int(inside.sum())


def found_again(student, teacher, known):
    """How often the most similar region of the same image in the other view is the same region.

    Args:
        student, teacher: (B, K, C), the regions of either view. known: (B, K) bool, which of them are different regions.
    Returns:
        hits, chance, count of known regions. chance: the hits that a guess among an image's known regions would have.
    """
    similarity = F.normalize(student.float(), dim=2) @ F.normalize(teacher.float(), dim=2).transpose(1, 2)  # (B, K, K)
    nearest = similarity.masked_fill(~known[:, None], -2).argmax(2)  # (B, K)
    same = nearest == torch.arange(known.shape[1], device=known.device)
    chance = known / known.sum(1, keepdim=True).clamp(min=1)
    return (same & known).sum().item(), chance.sum().item(), int(known.sum())


# ==== Pictures ========================================================================================================


class Sheet:
    """A grid of square panels under column titles. Boxes and points are in pixels of a picture of `size` pixels."""

    def __init__(self, rows, titles, size, side=224, gap=6):
        self.side, self.pitch, self.gap, self.zoom = side, side + gap, gap, side / size
        self.canvas = Image.new("RGB", (len(titles) * self.pitch + gap, rows * self.pitch + 20), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        for column, title in enumerate(titles):
            self.draw.text((self.corner(0, column)[0], 4), title, fill="black")

    def corner(self, row, column):
        return np.array([self.gap + column * self.pitch, 20 + row * self.pitch])

    def at(self, row, column, point):
        """Canvas coordinates of a point of a panel's picture."""
        return self.corner(row, column) + np.asarray(point) * self.zoom

    def paste(self, row, column, picture):
        picture = picture.resize((self.side, self.side), Image.Resampling.NEAREST)
        self.canvas.paste(picture, tuple(self.corner(row, column).tolist()))

    def box(self, row, column, box, colour, width=2):
        x0, y0, x1, y1 = (float(x) for x in box)
        start, end = self.at(row, column, (x0, y0)), self.at(row, column, (x1, y1)) - 1
        self.draw.rectangle((*start, *np.maximum(start, end)), outline=colour, width=width)

    def disc(self, row, column, point, radius, **style):
        centre = self.at(row, column, point)
        self.draw.ellipse((*(centre - radius), *(centre + radius)), **style)

    def save(self, path):
        """Write a PNG file, or nothing if `path` is None."""
        if path:
            buffer = io.BytesIO()
            self.canvas.save(buffer, "png")
            write_atomically(path, [buffer.getbuffer()])


def heat(values, size):
    """(h, w) values -> a picture of that (width, height): dark blue lowest, yellow highest."""
    values = values.float().cpu().nan_to_num()
    value = ((values - values.min()) / (values.max() - values.min()).clamp(min=1e-6)).numpy()[..., None]
    value = 255 * np.concatenate([value, 0.8 * value, 0.5 - 0.5 * value], 2)
    return Image.fromarray(value.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def grey(picture):
    """A picture without colours, RGB."""
    return picture.convert("L").convert("RGB")


def draw_matches(path, view_q, view_k, found, H, W, rows=SHOWN):
    """PAPER: SetSim, Figure 3. A row per image: view q, its attention and set, view k, its attention and set.

    The most attentive cell of view q that has a positive is linked to all its positives in view k. Red circles are the
    nearest neighbours (Eq. 5) of all cells that have a positive.

    Args:
        view_q, view_k: (B, 3, size, size) uint8. found: setsim.Match of these images. rows: images that are drawn.
    """
    size, rows = view_q.shape[2], min(rows, len(view_q))
    titles = ("view q, one cell", "attention and set q", "view k: its positives, neighbours red", "attention and set k")
    sheet = Sheet(rows, titles, size)
    similarity, positives = found.similarity.cpu(), found.positives.cpu()

    def centre(cell):
        return (np.array([cell % W, cell // W]) + 0.5) * size / (W, H)

    for row in range(rows):
        for column, views, i, colour in ((0, view_q, 0, ORANGE), (2, view_k, 1, BLUE)):
            picture = TF.to_pil_image(views[row].cpu())
            sheet.paste(row, column, picture)
            attention = heat(found.attention[i][row].view(H, W), picture.size)
            sheet.paste(row, column + 1, Image.blend(grey(picture), attention, 0.6))
            for cell in found.sets[i][row].nonzero()[:, 0].tolist():
                half = np.array([size / W, size / H]) / 2 - size / sheet.side
                sheet.box(row, column + 1, (*(centre(cell) - half), *(centre(cell) + half)), colour, width=3)
        linked = positives[row].any(1)
        if linked.any():
            start = found.attention[0][row].cpu().nan_to_num().masked_fill(~linked, -1).argmax().item()
            for cell in positives[row, start].nonzero()[:, 0].tolist():
                line = *sheet.at(row, 0, centre(start)), *sheet.at(row, 2, centre(cell))
                sheet.draw.line(line, fill=ORANGE, width=2)
                sheet.disc(row, 2, centre(cell), 4, fill=BLUE, outline="black")
            sheet.disc(row, 0, centre(start), 6, fill=ORANGE, outline="black")
        for cell in similarity[row].argmax(1)[linked].unique().tolist():
            sheet.disc(row, 2, centre(cell), 10, outline=RED, width=3)
    sheet.save(path)


def draw_windows(path, view_q, view_k, shared_q, shared_k, levels):
    """PAPER: ReSim, Figures 2 and 3. A row per image and, for each level, three panels: view q, view k, similarities.

    What a view does not share with the other is dark. Up to five valid windows and their places in view k have matching
    colours. The third panel is view k with the similarity of the white window to each neighbourhood of the key map, at
    the neighbourhood's centre.

    Args:
        view_q, view_k: (B, 3, size, size) uint8. shared_q, shared_k: (B, 4), pixels of the views.
        levels: (name, stride, kernel, pairs, similarity) of each level. pairs: resim.Pairs. similarity: (B, A, h, w).
    """
    size, rows = view_q.shape[2], min(SHOWN, len(view_q))
    titles = ("{}: view q", "{}: view k, the same windows", "{}: view k, similarity to the white one")
    sheet = Sheet(rows, [title.format(level[0].upper()) for level in levels for title in titles], size)

    def panel(row, column, picture, shared):
        dark = Image.eval(picture, lambda value: value // 3)
        x0, y0, x1, y1 = (round(x) for x in shared.clamp(0, size).tolist())
        if x0 < x1 and y0 < y1:
            dark.paste(picture.crop((x0, y0, x1, y1)), (x0, y0))
        sheet.paste(row, column, dark)

    for column, (_, stride, kernel, pairs, similarity) in zip(range(0, 3 * len(levels), 3), levels, strict=True):
        for row in range(rows):
            picture_q, picture_k = (TF.to_pil_image(view[row].cpu()) for view in (view_q, view_k))
            panel(row, column, picture_q, shared_q[row])
            panel(row, column + 1, picture_k, shared_k[row])
            under = grey(picture_k)
            valid = pairs.valid[row].nonzero()[:, 0].tolist()
            order = torch.randperm(len(valid), generator=common.generator("windows", row))[:5]
            windows = [valid[i] for i in order.tolist()]
            if windows:
                similar, over = similarity[row, windows[0]], under.copy()
                first = round(stride * (kernel - 2) / 2)  # a cell's square, around its neighbourhood's centre
                over.paste(heat(similar, [stride * n for n in similar.shape[::-1]]), (first, first))
                under = Image.blend(under, over, 0.6)
            sheet.paste(row, column + 2, under)
            for window, colour in reversed([*zip(windows, COLOURS, strict=False)]):
                sheet.box(row, column, pairs.boxes_q[row, window], colour)
                sheet.box(row, column + 1, pairs.boxes_k[row, window], colour)
            if windows:
                sheet.box(row, column + 2, pairs.boxes_k[row, windows[0]], COLOURS[0])
    sheet.save(path)


def draw_regions(path, views, mask, similarity):
    """PAPER: D3SSL, Figures 2 and 5. A row per image: each view as the networks see it, its regions in matching colours.

    Then Eq. 7's mask, and how similar the student's regions (rows) in its last view are to the teacher's in x2 (columns).

    Args:
        views: {title: (x (B, 3, s, s) normalised, boxes (B, K, 4))}. mask: (B, S, S) bool, or None if there is no x3.
        similarity: (B, K, K) cosines.
    """
    rows = min(SHOWN, len(similarity))
    titles = [*views, *(["mask of x3, cut"] if mask is not None else []), "similarity to x2's regions"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (common.PIXEL_MEAN, common.PIXEL_STD))
    sheet = Sheet(rows, titles, size=1)
    for row in range(rows):
        for column, (x, boxes) in enumerate(views.values()):
            picture = ((x[row].float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
            sheet.paste(row, column, TF.to_pil_image(picture))
            for number, box in reversed([*enumerate(boxes[row].cpu() / x.shape[-1])]):
                sheet.box(row, column, box, COLOURS[number % len(COLOURS)])
        if mask is not None:
            sheet.paste(row, len(views), TF.to_pil_image(mask[row].cpu().byte() * 255))
        sheet.paste(row, len(titles) - 1, heat(similarity[row], (sheet.side, sheet.side)))
    sheet.save(path)
