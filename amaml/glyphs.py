"""An Omniglot-like set of handwriting, drawn from the fonts that matplotlib ships.

For readers without the Omniglot data: every character here is drawn once by each of the same 20
"writers". A writer is a font style, a pen width, a size, a slant and a smooth distortion of its
own; to that comes a smaller distortion drawn afresh for each drawing, as a hand varies.
The fonts hold 15 scripts; CAP limits the large ones, so that none dominates, which leaves
000 characters. Letters that look alike (o and O, or A in Latin, Greek and Cyrillic) are kept once.

All chance comes from uniform draws of one PCG64 generator in a fixed order, and outlines are
rounded to 1/64 pixel before they are rendered: one seed gives the same pixels on every machine.
"""

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np

SIDE = 28  # pixels of a drawing, each way
CAP = 80  # characters of one script at most
# Script names as in the list of names, and how the Unicode names of their letters begin. Of
# letters that look alike, the one in the earlier script stays.
SCRIPTS = {
    "Latin": "LATIN",
    "Greek": "GREEK",
    "Coptic": "COPTIC",
    "Cyrillic": "CYRILLIC",
    "Armenian": "ARMENIAN",
    "Georgian": "GEORGIAN",
    "Hebrew": "HEBREW",
    "Arabic": "ARABIC",
    "NKo": "NKO",
    "Lao": "LAO",
    "Tifinagh": "TIFINAGH",
    "Ogham": "OGHAM",
    "Old_Italic": "OLD ITALIC",
    "Lisu": "LISU",
    "Canadian_Syllabics": "CANADIAN SYLLABICS",
}
REFERENCE = "DejaVuSans"  # the one font that has every character
# The writers' fonts; where one lacks a character, its writer takes the next, then REFERENCE.
STYLES = [
    ["DejaVuSans"],
    ["DejaVuSerif", "DejaVuSans-Oblique"],
    ["DejaVuSansMono", "DejaVuSans-Bold"],
    ["STIXGeneral", "DejaVuSerif", "DejaVuSans"],
    ["DejaVuSans-Oblique"],
    ["STIXGeneralItalic", "DejaVuSerif-Italic", "DejaVuSans-Oblique"],
    ["DejaVuSans-Bold"],
    ["DejaVuSerif-Italic", "DejaVuSans-BoldOblique", "DejaVuSans-Bold"],
    ["DejaVuSansMono-Oblique", "DejaVuSans-Oblique"],
    ["DejaVuSerif-Bold", "DejaVuSans-Bold"],
]
STYLES = STYLES * 2
WAVES = 3  # of each distortion
HABITS = 6 + 5 * WAVES


def outline(font, character):
    """The contours of a glyph in font units, as closed polygons fine enough to be bent."""
    from matplotlib.ft2font import LoadFlags
    from matplotlib.path import Path as Outline

    font.load_char(ord(character), flags=LoadFlags.NO_SCALE)
    vertices, codes = font.get_path()
    steps = np.arange(8)[:, None] / 8
    contours = []
    for part in np.split(np.arange(len(codes)), np.flatnonzero(codes == Outline.MOVETO)[1:]):
        points, kinds = vertices[part], codes[part]
        points[-1] = points[0]  # the last one closes the contour
        ends = np.flatnonzero((kinds != Outline.CURVE3) | (np.cumsum(kinds == 3) % 2 == 0))
        start, end = points[ends[:-1]], points[ends[1:]]
        # A straight line is a quadratic curve whose control point lies in its middle.
        curved = (kinds[ends[1:]] == Outline.CURVE3)[:, None]
        control = np.where(curved, points[ends[1:] - 1], (start + end) / 2)
        real = (start != end).any(1)
        a, b, c = start[real], control[real], end[real]
        fine = [(1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for t in steps]
        contours.append(np.stack(fine, 1).reshape(-1, 2))
    return [c for c in contours if len(c)]


def thinned(contours, share=0.8):
    """Contours moved inwards until `share` of the glyph's own stroke width is gone.

    What is left is close to a skeleton, to be drawn with a pen of any width. Returns the points,
    with each contour's first one repeated at its end, and matplotlib's path codes.
    """
    nexts = [np.roll(c, -1, 0) for c in contours]
    area = sum(np.sum(c[:, 0] * n[:, 1] - c[:, 1] * n[:, 0]) for c, n in zip(contours, nexts)) / 2
    length = sum(np.hypot(*(n - c).T).sum() for c, n in zip(contours, nexts))
    depth = share * area / length  # a stroke of width w has area / length = w / 2
    points, codes = [], []
    for contour, after in zip(contours, nexts):
        edge = after - contour
        normal = edge[:, ::-1] * [-1, 1] / np.hypot(*edge.T)[:, None]
        both = normal + np.roll(normal, 1, 0)
        # Exact in corners up to about 100 degrees, less in sharper ones to keep them in place.
        moved = contour + depth * both / np.maximum((both**2).sum(1, keepdims=True) / 2, 0.8)
        points += [moved, moved[:1]]
        codes += [1] + [2] * (len(moved) - 1) + [79]
    return np.concatenate(points), np.array(codes, np.uint8)


def fitted(points, size=1.0):
    """The points, centred and scaled so that the longer side of their box has this size."""
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) * (size / (high - low).max())


def bent(points, waves, amount):
    """Points of a unit box pushed by smooth waves; `waves` are (WAVES, 5) numbers in [0, 1)."""
    cycles, phase, push = waves[:, :2] * 2 - 1, waves[:, 2], waves[:, 3:] * 2 - 1
    return points + amount * np.sin(2 * np.pi * (points @ cycles.T + phase)) @ push


def sheet(drawings, pens):
    """Render (points, codes), in pixels about the centre of a cell: (n, SIDE, SIDE) uint8."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.path import Path as Outline
    from matplotlib.transforms import IdentityTransform

    renderer = RendererAgg(SIDE * len(drawings), SIDE, 72)  # at 72 dpi a point is a pixel
    pixels = np.asarray(renderer.buffer_rgba())
    pixels[:] = 0, 0, 0, 255
    for i, ((points, codes), pen) in enumerate(zip(drawings, pens)):
        ink = renderer.new_gc()
        ink.set_foreground("white")
        ink.set_linewidth(pen)
        ink.set_joinstyle("round")
        ink.set_snap(False)
        points = np.round((points + [SIDE * (i + 0.5), SIDE / 2]) * 64) / 64
        renderer.draw_path(ink, Outline(points, codes), IdentityTransform(), (1.0, 1.0, 1.0))
    return pixels[:, :, 0].reshape(SIDE, -1, SIDE).swapaxes(0, 1).copy()


def look_alikes(images, threshold=0.1):
    """For each image, whether an earlier one looks the same: their blurs are close."""
    grey = images.astype(np.float64)
    for axis in (1, 2, 1, 2):
        grey = (np.roll(grey, 1, axis) + 2 * grey + np.roll(grey, -1, axis)) / 4
    flat = grey.reshape(len(grey), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return np.tril(1 - flat @ flat.T < threshold, -1).any(1)


def letters(font):
    """(script, character) of each letter of the font, in the order of SCRIPTS and of Unicode."""
    whole = [
        c
        for c in map(chr, sorted(font.get_charmap()))
        if unicodedata.category(c) in ("Lu", "Ll", "Lo") and unicodedata.normalize("NFKD", c) == c
    ]
    return [
        (script, c)
        for script, start in SCRIPTS.items()
        for c in whole
        if unicodedata.name(c).startswith(start + " ")
    ]


def chosen(shape, candidates):
    """The candidates that look like no earlier one, at most CAP evenly spread ones of a script."""
    drawings = [shape(REFERENCE, c) for _, c in candidates]
    images = sheet([(points * 20, codes) for points, codes in drawings], [2.0] * len(drawings))
    new = [x for x, double in zip(candidates, look_alikes(images)) if not double]
    kept = []
    for script in SCRIPTS:
        own = [x for x in new if x[0] == script]
        n = min(CAP, len(own))
        kept += [own[i * len(own) // n] for i in range(n)]
    return kept


def draw_glyphs(seed=0):
    """Draw the set: uint8 images (characters, 20, 28, 28), ink 255 on 0, and the names.

    The names are "Script/characterNN", in the order of the images. The characters don't depend
    on the seed; the writers and their drawings do.
    """
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    folder = Path(get_data_path(), "fonts", "ttf")
    names = {REFERENCE}.union(*STYLES)
    fonts = {name: FT2Font(str(folder / f"{name}.ttf")) for name in names}

    @cache
    def shape(name, character):
        points, codes = thinned(outline(fonts[name], character))
        return fitted(points), codes

    characters = chosen(shape, letters(fonts[REFERENCE]))
    uniform = np.random.Generator(np.random.PCG64(seed)).random
    writers = uniform((len(STYLES), HABITS))
    moods = uniform((len(characters), len(STYLES), HABITS))
    images = []
    for (_, character), mood in zip(characters, moods):
        drawings, pens = [], []
        for style, habit, now in zip(STYLES, writers, mood):
            has = [name for name in style + [REFERENCE] if fonts[name].get_char_index(ord(character))]
            points, codes = shape(has[0], character)
            drawings.append((written(points, habit, now), codes))
            pens.append(1.1 + 0.9 * habit[0] + 0.3 * now[0])
        images.append(sheet(drawings, pens))
    counts = {}
    labels = []
    for script, _ in characters:
        counts[script] = counts.get(script, 0) + 1
        labels.append(f"{script}/character{counts[script]:02d}")
    return np.stack(images), labels


def written(points, habit, now):
    """The points as one writer writes them this time, in pixels about the cell's centre."""
    points = bent(points, habit[6:].reshape(WAVES, 5), 0.06)
    points = bent(points, now[6:].reshape(WAVES, 5), 0.045)
    habit, now = 2 * habit - 1, 2 * now - 1
    slant = 0.15 * habit[1] + 0.1 * now[1]
    turn = 0.04 * habit[2] + 0.08 * now[2]
    width = 1 + 0.12 * habit[3] + 0.08 * now[3]
    points = points @ [[width, turn], [slant - turn, 1.0]]
    return fitted(points, 18.5 + 1.2 * habit[4] + 0.8 * now[4]) + now[5:7]
