# SPDX-License-Identifier: MIT
"""Procedural scenes: the built-in data set, a stand-in for natural images with dense annotations.

A scene is a pure function of (seed, index, size): a cluttered, textured background and 2 to 8 annotated objects of ten
classes. Classes differ in shape and texture, and every colour is drawn at random: the form of an object tells its
class, the colours do not. Objects vary in size, rotation, proportions and shading, and occlude each other. One core
makes about 280 scenes of 136 x 136 pixels a second. `python -m tools.scenes` draws and writes scenes.

Coordinates are continuous: pixel (row i, column j) covers [j, j + 1) x [i, i + 1). A horizontal flip maps x to
width - x and swaps left_side and right_side: the sides of an object as a viewer sees them who turns it until its head
points up. Every class has a recognisable head, so the image shows which side is which.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from scipy import ndimage

LANDMARKS = ("head", "left_side", "right_side", "tail")
MIN_SIZE = 16  # pixels
MIN_OBJECTS, MAX_OBJECTS = 2, 8
MIN_VISIBLE_FRACTION = 0.35  # an object less visible than this stays in the image but is not annotated
MIN_VISIBLE_AREA = 40 / 136**2  # the same, as a fraction of the squared shorter image side

# ==== Shape primitives ================================================================================================
# An object lives in local coordinates: v runs from the head (-1) to the tail (+1), u to the right, a = |u|. Distances
# are negative inside and in local units. They are exact enough near the contour, where they are used.


def _ellipse(u, v, cu, cv, ru, rv):
    return (np.sqrt(((u - cu) * (1 / ru)) ** 2 + ((v - cv) * (1 / rv)) ** 2) - 1) * min(ru, rv)


def _taper(a, v, v0, w0, v1, w1):
    """Symmetric trapezoid between v0 (half-width w0) and v1 (half-width w1)."""
    slope = (w1 - w0) / (v1 - v0)
    side = (a - w0 - slope * (v - v0)) * (1 / math.hypot(1, slope))
    return np.maximum(side, np.abs(v - (v0 + v1) / 2) - (v1 - v0) / 2)


def _union(*distances):
    return functools.reduce(np.minimum, distances)


def _inside(distance, soft):
    """Coverage in [0, 1] of a shape, with an edge of one pixel (`soft`, local units)."""
    return np.clip(0.5 - distance * (1 / soft), 0, 1)


def _wave(phase, sharpness=2.0):
    """Stripes in [0, 1] with period 1 in `phase`."""
    return np.clip(0.5 + sharpness * np.sin((2 * np.pi) * phase), 0, 1)


# ==== Classes =========================================================================================================
# Each drawer takes (u, v, a, soft, p), p = four numbers in [0, 1) that vary the instance, and returns the distance to
# the contour, the weight of the second colour and the weight of the third colour.


def _fish(u, v, a, soft, p):
    body = _ellipse(u, v, 0, -0.27, 0.4 + 0.1 * p[0], 0.73)
    tail = np.maximum(_taper(a, v, 0.3, 0.05, 1.0, 0.6), -_taper(a, v, 0.72, 0.0, 1.01, 0.25))
    fins = _ellipse(a, v, 0.45, 0.0, 0.27, 0.13)
    k = 2.6 + p[1]
    scales = _wave(k * (u + v) + p[2], 1.6) * _wave(k * (u - v), 1.6)
    rays = _wave(u * 5)
    pattern = np.where(v > 0.4, rays, scales * (v > -0.5))
    pattern = np.where(body > 0, rays, pattern)
    return _union(body, tail, fins), pattern, _inside(_ellipse(a, v, 0.2, -0.64, 0.11, 0.11), soft)


def _house(u, v, a, soft, p):
    eaves = -0.3 + 0.2 * p[0]
    roof = _taper(a, v, -1.0, 0.0, eaves, 0.82)
    wall = _taper(a, v, eaves, 0.6, 1.0, 0.6)
    row = v * 3.2 + p[2]
    course = np.floor(row)
    column = u * 2 + 0.5 * course
    joint = np.minimum(row - course, 1.5 * (column - np.floor(column))) - 0.28
    pattern = np.where(v < eaves, _wave(row * 1.6), _inside(joint, 4 * soft))
    door = _taper(a, v, 0.45, 0.17, 1.1, 0.17)
    windows = np.maximum(np.abs(a - 0.34), np.abs(v - 0.12 - 0.1 * p[1])) - 0.14
    return np.minimum(roof, wall), pattern, _inside(np.minimum(door, windows), soft)


def _fir(u, v, a, soft, p):
    w = 0.62 + 0.14 * p[0]
    crown = _union(
        _taper(a, v, -1.0, 0.0, -0.35, 0.62 * w),
        _taper(a, v, -0.6, 0.1, 0.15, 0.82 * w),
        _taper(a, v, -0.15, 0.15, 0.65, w),
    )
    trunk = _taper(a, v, 0.6, 0.13, 1.0, 0.15)
    needles = _wave(3.2 * v - 2.4 * np.abs(np.mod(u * 2.5 + p[1], 1) - 0.5), 1.5)
    return np.minimum(crown, trunk), needles, _inside(-_taper(a, v, -2, 3, 0.65, 3), soft)


def _mushroom(u, v, a, soft, p):
    rim = -0.05 + 0.2 * p[0]
    cap = np.maximum(_ellipse(u, v, 0, rim, 0.86, 1 + rim), v - rim)
    stem = _taper(a, v, rim, 0.2, 1.0, 0.26 + 0.12 * p[1])
    dots = _union(
        _ellipse(u, v, 0.1 * (p[2] - 0.5), rim - 0.62, 0.17, 0.17),
        _ellipse(a, v, 0.45, rim - 0.35, 0.15, 0.15),
        _ellipse(u, v, 0.2 * (p[3] - 0.5), rim - 0.2, 0.12, 0.12),
    )
    return np.minimum(cap, stem), _inside(np.maximum(dots, v - rim), soft), (v > rim) * (0.55 + 0.45 * _wave(u * 5, 1))


def _beetle(u, v, a, soft, p):
    shell = _ellipse(u, v, 0, 0.26, 0.52 + 0.08 * p[0], 0.74)
    head = _ellipse(u, v, 0, -0.6, 0.3, 0.27)
    slant = 0.5 * (a - 0.4)
    legs = _union(np.abs(v + 0.12 + slant), np.abs(v - 0.3 - 0.3 * slant), np.abs(v - 0.65 - 1.2 * slant)) - 0.055
    horns = np.abs(a - 0.13 - 0.5 * (-0.75 - v)) - 0.05
    limbs = np.minimum(np.maximum(legs, a - 0.9), np.maximum(horns, np.abs(v + 0.8) - 0.2))
    spots = _union(
        *(_ellipse(a, v, x, y + 0.1 * p[1], 0.12, 0.12) for x, y in ((0.24, -0.1), (0.3, 0.3), (0.18, 0.65)))
    )
    seam = a - 0.035
    pattern = _inside(np.minimum(spots, seam), soft) * (shell < 0)
    return _union(shell, head, limbs), pattern, _inside(-np.minimum(shell, 0.3 + v), soft)


def _key(u, v, a, soft, p):
    hole = _ellipse(u, v, 0, -0.55, 0.2 + 0.05 * p[0], 0.2)
    bow = np.maximum(_ellipse(u, v, 0, -0.55, 0.56, 0.45), -hole)
    bit = 0.42 + 0.1 * p[1]
    shaft = _taper(a, v, -0.2, 0.13, 1.0, 0.13)
    teeth = np.minimum(_taper(a, v, 0.4, bit, 0.6, bit), _taper(a, v, 0.76, bit * 0.8, 0.94, bit * 0.8))
    hatching = _wave(3.5 * (u + v) + p[2], 1.2)
    return _union(bow, shaft, teeth), hatching * (v > -0.1), _inside(hole - 0.09, soft)


def _rocket(u, v, a, soft, p):
    hull = np.maximum(_ellipse(u, v, 0, 0.05, 0.36 + 0.06 * p[0], 1.05), v - 0.62)
    fins = np.maximum(_taper(a, v, 0.05, 0.25, 0.75, 0.8), -_taper(a, v, 0.62, 0.3, 0.8, 0.5))
    flame = _taper(a, v, 0.6, 0.26, 1.0, 0.02)
    bands = _wave(2.2 * v + 0.25 * p[1], 3) * (hull < 0) * (np.abs(v + 0.2) > 0.27)
    ring = np.abs(_ellipse(u, v, 0, -0.2, 0.18, 0.18)) - 0.06
    return _union(hull, fins, flame), np.maximum(bands, v > 0.62), _inside(np.minimum(ring, -hull), soft)


def _butterfly(u, v, a, soft, p):
    upper = _ellipse(a + 0.5 * (v + 0.35), v, 0.5, -0.42, 0.42, 0.42 + 0.08 * p[0])
    lower = _ellipse(a - 0.3 * (v - 0.45), v, 0.36, 0.48, 0.32, 0.36)
    body = _ellipse(u, v, 0, 0.05, 0.12, 0.85)
    feelers = np.maximum(np.abs(a - 0.06 - 0.6 * (-0.7 - v)) - 0.045, np.abs(v + 0.82) - 0.18)
    wings = np.minimum(upper, lower)
    rings = _wave(wings * (4 + 1.5 * p[1]) + 0.1, 2)
    return _union(wings, body, feelers), rings, _inside(np.minimum(body, feelers), soft)


def _bottle(u, v, a, soft, p):
    w = 0.38 + 0.08 * p[0]
    neck = _taper(a, v, -0.9, 0.15, -0.3, 0.17)
    shoulder = _taper(a, v, -0.42, 0.15, -0.12, w)
    flank = np.minimum(_taper(a, v, -0.13, w, 1.0, w), shoulder)
    cap = _taper(a, v, -1.0, 0.22, -0.78, 0.22)
    label = np.abs(v - 0.42 - 0.1 * p[1]) - 0.3
    lines = _wave(7 * v, 2) * (a < 0.7 * w) * (label < -0.05)
    gloss = _inside(np.abs(u + w * 0.5) - 0.07, soft)
    pattern = np.where(label < 0, 1 - lines, gloss)
    return _union(neck, flank, cap), pattern, _inside(np.minimum(cap, np.maximum(lines * -1.0 + 0.5, label)), soft)


def _flower(u, v, a, soft, p):
    dv = v + 0.42
    radius, angle = np.sqrt(u * u + dv * dv), np.arctan2(a, -dv)
    petals = radius - 0.45 - 0.13 * np.cos(angle * (5 + 2 * (p[0] > 0.5)))
    stem = _taper(a, v, -0.1, 0.075, 1.0, 0.1)
    leaves = _ellipse(a, v - 0.45 + 0.55 * a, 0.4, 0.25, 0.38, 0.14)
    veins = _wave(7 * np.abs(v - 0.45 + 0.55 * a), 1)
    pattern = np.where(petals < 0, np.clip(1.7 - 4 * radius, 0, 1) + 0.0, veins)
    green = np.minimum(stem, leaves)
    return np.minimum(petals, green), pattern, _inside(np.minimum(np.maximum(stem, -petals), radius - 0.2), soft)


# name: (drawer, half-width, landmark positions (u, v) in LANDMARKS order, all of them inside the shape)
_SPECS = {
    "fish": (_fish, 0.75, ((0, -0.9), (-0.6, 0.0), (0.6, 0.0), (0, 0.65))),
    "house": (_house, 0.82, ((0, -0.9), (-0.54, 0.9), (0.54, 0.9), (0, 0.93))),
    "fir": (_fir, 0.78, ((0, -0.88), (-0.53, 0.59), (0.53, 0.59), (0, 0.93))),
    "mushroom": (_mushroom, 0.88, ((0, -0.93), (-0.74, -0.1), (0.74, -0.1), (0, 0.93))),
    "beetle": (_beetle, 0.92, ((0, -0.8), (-0.46, 0.26), (0.46, 0.26), (0, 0.92))),
    "key": (_key, 0.58, ((0, -0.88), (-0.44, -0.55), (0.44, -0.55), (0, 0.93))),
    "rocket": (_rocket, 0.8, ((0, -0.86), (-0.58, 0.6), (0.58, 0.6), (0, 0.85))),
    "butterfly": (_butterfly, 1.05, ((0, -0.5), (-0.8, -0.6), (0.8, -0.6), (0, 0.6))),
    "bottle": (_bottle, 0.48, ((0, -0.93), (-0.32, 0.0), (0.32, 0.0), (0, 0.93))),
    "flower": (_flower, 0.82, ((0, -0.9), (-0.6, 0.37), (0.6, 0.37), (0, 0.93))),
}
CLASSES = tuple(_SPECS)  # class ids are the 1-based positions in this tuple; 0 is the background

# ==== Colours and background ==========================================================================================


def _random_colors(rng, *shape):
    """Random colours (*shape, 3), float32 RGB in [0, 1], uniform in hue."""
    hue, saturation, value = np.moveaxis(rng.random((*shape, 3), np.float32), -1, 0)[..., None]
    sector = np.mod(6 * hue + np.array([5, 3, 1], np.float32), 6)
    value = 0.25 + 0.75 * value
    return value - value * (0.1 + 0.85 * saturation) * np.clip(np.minimum(sector, 4 - sector), 0, 1)


def _object_colors(rng, count, palette):
    """Three colours of each object, (count, 3, 3): of a few random ones, the farthest from those before it.

    Before the first colour stand the background's, `palette`.
    """
    draws = _random_colors(rng, count, 11)
    before, colors = palette[None], []
    for candidates in (draws[:, :3], draws[:, 3:7], draws[:, 7:]):
        distance = np.abs(candidates[:, :, None] - before[:, None]).sum(-1).min(-1)
        colors.append(candidates[np.arange(count), distance.argmax(1)])
        before = np.stack(colors, 1)
    return before


def _resize(array, width, height):
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC))


def _noise(rng, height, width, octaves=5, persistence=0.6):
    """Multi-octave noise (H, W), roughly in [0, 1]. The random grids do not depend on the size of the image."""
    side, amplitude, field = 3, 1.0, rng.random((3, 3), np.float32) - np.float32(0.5)
    for _ in range(octaves - 1):
        side, amplitude = side * 2, amplitude * persistence
        field = _resize(field, side, side) + np.float32(amplitude) * (rng.random((side, side), np.float32) - 0.5)
    field = _resize(field, width, height)
    sample = field[::4, ::4]
    return (field - sample.mean()) * (0.24 / (sample.std() + np.float32(1e-3))) + np.float32(0.5)


def _texture(rng, x, y, noise):
    """One random texture field (H, W) in [0, 1] of a random family; x, y in units of the shorter image side."""
    family, angle, scale, phase, warp = rng.integers(7), *rng.random(4).tolist()
    c, s = math.cos(math.pi * angle), math.sin(math.pi * angle)
    frequency = 4 + 7 * scale
    along = (c * frequency) * x + (s * frequency) * y + (0.4 + 1.6 * warp) * noise + phase
    if family == 0:  # clouds
        return np.clip(noise, 0, 1)
    if family == 1:  # wavy stripes
        return _wave(along, 1.0)
    across = (-s * frequency) * x + (c * frequency) * y + 0.8 * noise
    if family == 2:  # warped checker
        parity = (np.floor(along) + np.floor(across)) * 0.5
        return 0.15 + 1.4 * (parity - np.floor(parity))
    if family == 3:  # blotches with hard borders
        return np.floor(np.clip(noise, 0, 0.999) * 4) * np.float32(1 / 3)
    if family == 4:  # bricks, each row with its own offset and every brick with its own tone
        row = np.floor(along)
        across = across * 0.5 + row * 0.37
        column = np.floor(across)
        tone = row * 0.618 + column * 0.414
        joint = np.minimum(along - row, (across - column) * 2) > 0.17
        return (0.35 + 0.65 * (tone - np.floor(tone))) * joint
    if family == 5:  # dots
        du, dv = along - np.floor(along) - 0.5, across - np.floor(across) - 0.5
        return np.clip(1.6 - (8 + 4 * phase) * (du * du + dv * dv), 0, 1)
    lines = noise * (3 + 4 * scale) + phase  # contour lines, as in wood or marble
    return 2 * np.abs(lines - np.floor(lines + 0.5))


def _gray(field):
    return Image.fromarray((np.clip(field, 0, 1) * 255).astype(np.uint8))


def _clutter(rng, image, palette, scale):
    """Draw strokes, dots, arcs, leaves and scraps that belong to no class. `scale` is the shorter side in pixels."""
    draw = ImageDraw.Draw(image)
    count, leafy = int(rng.integers(14, 34)), rng.random() < 0.3
    kinds = rng.integers(0, 5, count).tolist()
    tones = palette[rng.integers(0, len(palette), count)] * (0.6 + 0.8 * rng.random((count, 1)))
    colors = [tuple(color) for color in np.clip(tones * 255, 0, 255).astype(int).tolist()]
    for kind, color, (px, py, size, turn, extra) in zip(kinds, colors, rng.random((count, 5)).tolist(), strict=True):
        px, py, turn = px * image.width, py * image.height, 2 * math.pi * turn
        r, dx, dy = (0.015 + 0.06 * size) * scale, math.cos(turn), math.sin(turn)
        thickness = max(1, round((0.006 + 0.018 * extra) * scale))
        if leafy or kind > 2:  # a leaf or a scrap with three corners
            shape = ((r, 0), (-r * extra, r), (-r, -r * 0.6))
            if leafy or kind == 3:
                half, w = r * 1.7, r * (0.4 + 0.4 * extra)
                shape = ((-half, 0), (-half / 2, w), (half / 3, w), (half, 0), (half / 3, -w), (-half / 2, -w))
            draw.polygon([(px + i * dx - j * dy, py + i * dy + j * dx) for i, j in shape], color)
        elif kind == 0:  # a crooked stroke
            x, y, bend = px + r * dx * 1.5, py + r * dy * 1.5, (extra - 0.5) * 2
            draw.line([(px, py), (x, y), (x + r * (dx - bend * dy), y + r * (dy + bend * dx))], color, thickness)
        elif kind == 1:
            draw.ellipse((px - r * 0.5, py - r * 0.5, px + r * 0.5, py + r * 0.5), color)
        else:
            start = math.degrees(turn)
            draw.arc((px - r, py - r, px + r, py + r), start, start + 90 + 150 * extra, color, thickness)


def _background(rng, height, width, palette):
    """Two textures, divided by a winding border, and clutter: float32 (3, H, W) in [0, 1]."""

    def two_tone(dark, light):
        texture = _gray(_texture(rng, x, y, noise))
        texture.putpalette((dark + ramp * (light - dark)).astype(np.uint8).tobytes())  # it becomes a palette image
        return texture.convert("RGB")

    scale = min(height, width)
    x = (np.arange(width, dtype=np.float32) + 0.5)[None] * np.float32(1 / scale)
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None] * np.float32(1 / scale)
    noise = _noise(rng, height, width)
    ramp, tones = np.linspace(0, 1, 256, dtype=np.float32)[:, None], palette * 255
    first, second = two_tone(*tones[:2]), two_tone(*tones[2:])
    direction = rng.random() * 2 * math.pi
    slope = math.cos(direction) * (x - x.mean()) + math.sin(direction) * (y - y.mean())
    image = Image.composite(first, second, _gray((noise - 0.5 + 1.2 * slope) * 12 + 0.5))
    drift = _gray(0.6 + 0.5 * noise)  # keeps the repeated elements of a texture apart from each other
    image = ImageChops.multiply(image, Image.merge("RGB", (drift, drift, drift)))
    image = image.resize((2 * width, 2 * height), Image.Resampling.NEAREST)  # clutter gets smooth edges this way
    _clutter(rng, image, palette, 2 * scale)
    return np.asarray(image.reduce(2)).transpose(2, 0, 1) * np.float32(1 / 255)


# ==== Scenes ==========================================================================================================


def _layout(rng, height, width):
    """Object parameters in relative units: a list of (class position, center x, y, half-length, angle, stretch, p)."""
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    aspect_x, aspect_y = width / min(height, width), height / min(height, width)
    kinds = rng.integers(0, len(CLASSES), count).tolist()
    draws = rng.random((count, 7)).tolist()
    spots = (0.12 + 0.76 * rng.random((count, 5, 2))).tolist()
    placed = []
    for kind, (size, angle, stretch, *p), candidates in zip(kinds, draws, spots, strict=True):
        half = (0.15 + 0.16 * size) * (1 - 0.045 * (count - MIN_OBJECTS))
        points = [(px * aspect_x, py * aspect_y) for px, py in candidates]
        gaps = [min([0, *(math.dist(q, o[1:3]) - 0.7 * (half + o[3]) for o in placed)]) for q in points]
        placed.append((kind, *points[gaps.index(max(gaps))], half, 2 * math.pi * angle, 0.85 + 0.35 * stretch, p))
    return placed


def _paint(canvas, owner, number, item, colors, light):
    """Draw one object over `canvas` and `owner`. Returns its area in pixels, hidden parts too, and its landmarks (4, 2)."""
    kind, cx, cy, half, angle, stretch, p = item
    drawer, half_width, points = _SPECS[CLASSES[kind]]
    height, width = owner.shape
    scale = min(height, width)
    half, cx, cy = half * scale, cx * scale, cy * scale
    c, s = math.cos(angle), math.sin(angle)
    reach_u, reach_v = half * half_width * stretch, half
    margin = 1 + 0.1 * half  # room for the shadow
    reach_x = abs(c) * reach_u + abs(s) * reach_v + margin
    reach_y = abs(s) * reach_u + abs(c) * reach_v + margin
    x0, x1 = math.floor(cx - reach_x), math.ceil(cx + reach_x)
    y0, y1 = math.floor(cy - reach_y), math.ceil(cy + reach_y)
    dx = (np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - cx))[None]
    dy = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - cy))[:, None]
    u = dx * (c / (half * stretch)) + dy * (s / (half * stretch))
    v = dx * (-s / half) + dy * (c / half)
    soft = 1 / half
    distance, second, third = drawer(u, v, np.abs(u), soft, p)
    full_area = int(np.count_nonzero(distance < 0))

    window = slice(max(y0, 0), min(y1, height)), slice(max(x0, 0), min(x1, width))
    inner = slice(window[0].start - y0, window[0].stop - y0), slice(window[1].start - x0, window[1].stop - x0)
    distance, second, third = distance[inner], second[inner], third[inner]
    shade = (1 + (0.3 * light[0] / half) * dx[:, inner[1]]) + (0.3 * light[1] / half) * dy[inner[0]]
    shade *= np.clip(0.62 - distance * 4.5, 0.62, 1.06)  # darker rim, as on a rounded body
    alpha = _inside(distance, soft)
    shade *= alpha
    third = third * shade
    second = second * (shade - third)
    paint = np.tensordot(colors.T, np.stack([shade - third - second, second, third]), 1)
    shadow = (1 - alpha) * np.clip(0.6 + distance * 4, 0, 1)  # soft contact shadow around the object
    canvas[(slice(None), *window)] = canvas[(slice(None), *window)] * shadow + paint
    owner[window][distance < 0] = number
    rotation = np.array([[c * half * stretch, s * half * stretch], [-s * half, c * half]])
    return full_area, np.asarray(points) @ rotation + (cx, cy)


def _annotate(owner, areas, landmarks, classes):
    """Annotations of the objects in `owner` (H, W; 0 = background, k = k-th object) that are visible enough."""
    height, width = owner.shape
    visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:]
    least = max(4, MIN_VISIBLE_AREA * min(height, width) ** 2)
    keep = np.flatnonzero(visible >= np.maximum(least, MIN_VISIBLE_FRACTION * np.array(areas)))
    windows = ndimage.find_objects(owner, len(areas))
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in (windows[k] for k in keep)]
    keypoints = np.zeros((len(keep), len(LANDMARKS), 3), np.float32)
    for row, k in enumerate(keep):
        for column, (x, y) in enumerate(landmarks[k].astype(np.float32)):
            if 0 <= x < width and 0 <= y < height:
                keypoints[row, column] = x, y, 1 if owner[int(y), int(x)] not in (0, k + 1) else 2
    ids = np.zeros(len(areas) + 1, np.uint8)
    ids[keep + 1] = labels = np.array(classes, np.int64)[keep] + 1
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "labels": labels,
        "masks": owner == (keep + 1)[:, None, None],
        "semantic": ids[owner],
        "keypoints": keypoints,
    }


def make_scene(seed, index, height=136, width=None):
    """Scene number `index` of the data set `seed`, the same one on every call.

    Args:
        height, width: at least 16 pixels; without `width` the scene is square. Another size shows the same objects at
            the same places; another aspect ratio may move them.
    Returns:
        dict of arrays, N = 2 .. 8 objects:
        image      uint8 (H, W, 3), RGB
        boxes      float32 (N, 4), x0 y0 x1 y1 in pixels around the visible part; right and bottom edges are exclusive
        labels     int64 (N,), class ids 1 .. 10; the name of class i is CLASSES[i - 1]
        masks      bool (N, H, W), visible part of each object; no two overlap
        semantic   uint8 (H, W), class id of each pixel, 0 = background
        keypoints  float32 (N, 4, 3), x y v of LANDMARKS in pixels; v = 0 outside the image (then x = y = 0),
                   1 hidden by another object, 2 visible
    Errors:
        ValueError: a size under 16, a negative seed or index.
    """
    width = height if width is None else width
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"scene size must be at least {MIN_SIZE} x {MIN_SIZE} pixels, got {height} x {width}")
    rng = np.random.default_rng([seed, index])  # refuses negative numbers
    palette = _random_colors(rng, 4)
    background = _background(rng, height, width, palette)
    direction, strength, gamma = rng.random(3).tolist()
    light = math.cos(2 * math.pi * direction), math.sin(2 * math.pi * direction)
    while True:  # a layout that leaves fewer than two recognisable objects is drawn anew; this is rare
        items = _layout(rng, height, width)
        canvas = background.copy()
        owner = np.zeros((height, width), np.int32)
        objects = enumerate(zip(items, _object_colors(rng, len(items), palette), strict=True), 1)
        painted = [_paint(canvas, owner, number, item, colors, light) for number, (item, colors) in objects]
        scene = _annotate(owner, *zip(*painted, strict=True), [item[0] for item in items])
        if len(scene["labels"]) >= MIN_OBJECTS:
            break
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None] * light[0]
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * light[1]
    canvas *= (255 + (51 + 153 * strength) * across) + (51 + 153 * strength) * down
    tones = (np.linspace(0, 1, 256) ** (0.65 + 0.55 * gamma) * 255).round().astype(np.uint8)
    image = tones.take(np.clip(canvas, 0, 255).astype(np.uint8)).transpose(1, 2, 0)
    return {"image": np.ascontiguousarray(image), **scene}
