"""An Omniglot-like set of handwriting, drawn from the fonts that matplotlib ships.

A writer is a font style, a pen width, a size, a slant and a smooth distortion; a further distortion
is drawn afresh each time. All chance comes from uniform draws of one generator in a fixed order,
and outlines are rounded to 1/64 pixel before they are rendered: with one version of matplotlib, and
so of its fonts, a seed gives the same pixels on every machine.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np

SIDE, CAP = 28, 90  # pixels of a drawing each way; characters of one script at most
ALIKE = 0.085  # letters closer than this count as the same; set by looking at the pairs around it
# Spelt as in Omniglot; in capitals they begin Unicode names. Of letters alike the first one stays.
SCRIPTS = """Latin Greek Coptic Cyrillic Armenian Georgian Hebrew Arabic NKo Lao Tifinagh Ogham
    Old_Italic Lisu Canadian_Syllabics""".split()
UNFIT = "\ua66e\ufe73\u04cb\u04f6"  # two that become blobs, two that one font interchanges
# A writer's letters come from the first of these fonts that has the letter, or else from
# REFERENCE, which has them all. Ten styles, two writers each.
REFERENCE = "DejaVuSans"
STYLES = """DejaVuSans, DejaVuSerif DejaVuSans-Oblique, DejaVuSansMono DejaVuSans-Bold,
    STIXGeneral DejaVuSerif, STIXGeneralItalic DejaVuSerif-Italic DejaVuSans-Oblique,
    DejaVuSans-Oblique, DejaVuSans-Bold, DejaVuSerif-Italic DejaVuSans-BoldOblique DejaVuSans-Bold,
    DejaVuSansMono-Oblique DejaVuSans-Oblique, DejaVuSerif-Bold DejaVuSans-Bold"""
WRITERS = 2 * [tuple(style.split()) for style in STYLES.split(",")]
# How far writers differ, and the drawings of one writer, in pen width, slant, turn, width, size
# and place (across, up), in pixels or as shares of the letter.
HABITS = np.array([0.45, 0.15, 0.04, 0.12, 1.2, 0.0, 0.0])
MOODS = np.array([0.15, 0.12, 0.12, 0.12, 1.0, 1.9, 1.9])
TRAITS, WAVES = len(HABITS), 3  # WAVES of five numbers each make one distortion
MOVE, LINE, CURVE, CLOSE = 1, 2, 3, 79  # matplotlib's path codes


def letters(font):
    """(script, letter) of all letters of a font, in the order of SCRIPTS, then of Unicode."""
    names = {}
    for letter in map(chr, sorted(font.get_charmap())):
        fit = unicodedata.is_normalized("NFKD", letter) and letter not in UNFIT
        if fit and unicodedata.category(letter) in ("Lu", "Ll", "Lo"):
            names[letter] = unicodedata.name(letter)
    starts = {script: script.upper().replace("_", " ") + " " for script in SCRIPTS}
    return [(script, c) for script in SCRIPTS for c in names if names[c].startswith(starts[script])]


def outline(vertices, codes):
    """The contours of a font's path: polygons with enough points to bend well."""
    t = np.arange(8) / 8
    bezier = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1)
    contours = []
    for part in np.split(np.arange(len(codes)), np.flatnonzero(codes == MOVE)[1:]):
        points, curve = vertices[part], codes[part] == CURVE
        points[-1] = points[0]  # the last one closes the contour
        ends = np.flatnonzero(~curve | (np.cumsum(curve) % 2 == 0))  # curves: control point, end
        start, end = points[ends[:-1]], points[ends[1:]]
        # A straight line is a curve whose control point lies in its middle.
        control = np.where(curve[ends[1:], None], points[ends[1:] - 1], (start + end) / 2)
        pieces = np.stack([start, control, end], 1)[(start != end).any(1)]
        contours.append((bezier @ pieces).reshape(-1, 2))
    return [contour for contour in contours if len(contour)]


def fitted(points, size=1.0):
    """The points centred, and scaled so that the longer side of their box has this size."""
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) * (size / (high - low).max())


def thinned(contours, share=0.75):
    """Contours moved inwards by `share` of their strokes' width: points of size 1, path codes."""
    pairs = [(contour, np.roll(contour, -1, 0) - contour) for contour in contours]
    twice_area = sum((c[:, 0] * e[:, 1] - c[:, 1] * e[:, 0]).sum() for c, e in pairs)
    length = sum(np.hypot(*edge.T).sum() for _, edge in pairs)
    depth = share * twice_area / length / 2  # a stroke is about twice_area / length wide
    points, codes = [], []
    for contour, edge in pairs:
        normal = np.stack([-edge[:, 1], edge[:, 0]], 1) / np.hypot(*edge.T)[:, None]
        mean = (normal + np.roll(normal, 1, 0)) / 2
        # Exact but in sharp corners, where the bound keeps the point from shooting away.
        moved = contour + depth * mean / np.maximum((mean**2).sum(1, keepdims=True), 0.4)
        points += [moved, moved[:1]]  # the last one goes with the code that closes the contour
        codes += [MOVE] + [LINE] * (len(moved) - 1) + [CLOSE]
    return fitted(np.concatenate(points)), np.array(codes, np.uint8)


def written(habit, mood, points, codes):
    """What a hand of this habit writes in this mood: points in pixels, path codes, pen width."""
    for numbers, reach in ((habit, 0.06), (mood, 0.055)):  # points are pushed along smooth waves
        waves = numbers[TRAITS:].reshape(WAVES, 5)
        cycles, phase, push = 2 * waves[:, :2] - 1, waves[:, 2], 2 * waves[:, 3:] - 1
        points = points + reach * np.sin(2 * np.pi * (points @ cycles.T + phase)) @ push
    traits = (2 * habit[:TRAITS] - 1) * HABITS + (2 * mood[:TRAITS] - 1) * MOODS
    pen, slant, turn, width, size = traits[:5]
    points = points @ [[1 + width, turn], [slant - turn, 1.0]]
    return fitted(points, 19 + size) + traits[5:], codes, 1.7 + pen


def rendered(drawings):
    """Render (points, path codes, pen width), each about its centre: uint8 (n, SIDE, SIDE)."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.path import Path
    from matplotlib.transforms import IdentityTransform

    renderer = RendererAgg(SIDE * len(drawings), SIDE, 72)  # at 72 dpi a point is a pixel
    pixels = np.asarray(renderer.buffer_rgba())
    pixels[:] = 255
    pen = renderer.new_gc()  # black, with round joins
    pen.set_snap(False)
    for i, (points, codes, width) in enumerate(drawings):
        pen.set_linewidth(width)
        points = np.round((points + np.array([SIDE * (i + 0.5), SIDE / 2])) * 64) / 64
        renderer.draw_path(pen, Path(points, codes), IdentityTransform(), (0.0, 0.0, 0.0))
    return 255 - pixels[:, :, 0].reshape(SIDE, -1, SIDE).swapaxes(0, 1)


def newness(images):
    """How far (at most 1) each image's blur is from the nearest earlier one that is itself new."""
    blur = images.astype(np.float64)
    for axis in (1, 2, 1, 2):
        blur = np.roll(blur, 1, axis) + 2 * blur + np.roll(blur, -1, axis)
    blur = blur.reshape(len(blur), -1)
    blur /= np.linalg.norm(blur, axis=1, keepdims=True)
    apart, nearest = 1 - blur @ blur.T, np.ones(len(blur))
    for i, row in enumerate(apart):
        if nearest[i] >= ALIKE:
            nearest[i + 1 :] = np.minimum(nearest[i + 1 :], row[i + 1 :])
    return nearest


def draw_glyphs(seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Draw uint8 images (602, 20, 28, 28), ink 255 on 0, and give names "Script/characterNN"."""
    from matplotlib import ft2font, get_data_path

    folder, names = f"{get_data_path()}/fonts/ttf", {REFERENCE}.union(*WRITERS)
    fonts = {name: ft2font.FT2Font(f"{folder}/{name}.ttf") for name in names}

    @cache
    def shape(style, letter):
        font = fonts[next((n for n in style if fonts[n].get_char_index(ord(letter))), REFERENCE)]
        font.load_char(ord(letter), flags=ft2font.LoadFlags.NO_SCALE)
        return thinned(outline(*font.get_path()))

    found = letters(fonts[REFERENCE])
    plain = [shape((), letter) for _, letter in found]
    new = newness(rendered([(20 * points, codes, 2.0) for points, codes in plain]))
    characters = []
    for script in SCRIPTS:  # of a large script, those that differ most from the ones before them
        own = [i for i, (name, _) in enumerate(found) if name == script and new[i] >= ALIKE]
        own = sorted(sorted(own, key=lambda i: -new[i])[:CAP])
        characters += [(f"{script}/character{n:02d}", found[i][1]) for n, i in enumerate(own, 1)]

    uniform = np.random.Generator(np.random.PCG64(seed)).random  # the characters are fixed
    habits = uniform((len(WRITERS), TRAITS + 5 * WAVES))
    moods = uniform((len(characters), len(WRITERS), TRAITS + 5 * WAVES))
    images = []
    for (_, letter), own_moods in zip(characters, moods, strict=True):
        hands = zip(WRITERS, habits, own_moods, strict=True)
        images.append(rendered([written(habit, m, *shape(w, letter)) for w, habit, m in hands]))
    return np.stack(images), [name for name, _ in characters]
