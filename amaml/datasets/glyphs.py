"""An Omniglot-like set of handwriting, drawn from the fonts that matplotlib ships.

For readers without the Omniglot data: 602 characters of 15 scripts, each drawn once by the same
20 writers. A writer is a font style, a pen width, a size, a slant and a smooth distortion, to
which comes a further distortion drawn afresh each time, as a hand varies. Of letters that look
alike (o and O, or A in Latin, Greek and Cyrillic) one is kept, and of a large script at most 90.

All chance comes from uniform draws of one generator in a fixed order, and outlines are rounded to
1/64 pixel before they are rendered: with one version of matplotlib, and so of its fonts, a seed
gives the same pixels on every machine.
"""

import unicodedata
from functools import cache
from pathlib import Path

import numpy as np

SIDE = 28  # pixels of a drawing, each way
CAP = 90  # characters of one script at most
ALIKE = 0.085  # letters closer than this count as the same; set by looking at the pairs around it
# Of letters that look alike the one in the earlier script stays. The names are spelt as Omniglot
# would spell them; in capitals they begin the Unicode names of the script's letters.
ALPHABETS = """Latin Greek Coptic Cyrillic Armenian Georgian Hebrew Arabic NKo Lao Tifinagh Ogham
    Old_Italic Lisu Canadian_Syllabics"""
SCRIPTS = ALPHABETS.split()
UNFIT = "\ua66e\ufe73\u04cb\u04f6"  # two that become blobs, two that one font interchanges
# What each writer's letters are made of: the first of these fonts that has the letter, or else
# REFERENCE, which has them all. Ten styles, two writers each.
REFERENCE = "DejaVuSans"
STYLES = """DejaVuSans, DejaVuSerif DejaVuSans-Oblique, DejaVuSansMono DejaVuSans-Bold,
    STIXGeneral DejaVuSerif, STIXGeneralItalic DejaVuSerif-Italic DejaVuSans-Oblique,
    DejaVuSans-Oblique, DejaVuSans-Bold, DejaVuSerif-Italic DejaVuSans-BoldOblique DejaVuSans-Bold,
    DejaVuSansMono-Oblique DejaVuSans-Oblique, DejaVuSerif-Bold DejaVuSans-Bold"""
WRITERS = 2 * [style.split() for style in STYLES.split(",")]
# How far writers differ in pen width, slant, turn, width, size and place (across, up), in pixels
# or as shares of the letter, and how far the drawings of one writer do.
HABITS = np.array([0.45, 0.15, 0.04, 0.12, 1.2, 0.0, 0.0])
MOODS = np.array([0.15, 0.12, 0.12, 0.12, 1.0, 1.9, 1.9])
TRAITS, WAVES = len(HABITS), 3  # WAVES of five numbers each make one distortion
MOVE, LINE, CURVE, CLOSE = 1, 2, 3, 79  # matplotlib's path codes


def letters(font):
    """(script, letter) of all letters of a font, in the order of SCRIPTS, then of Unicode."""
    whole = [
        c
        for c in map(chr, sorted(font.get_charmap()))
        if unicodedata.category(c) in ("Lu", "Ll", "Lo") and unicodedata.normalize("NFKD", c) == c
    ]
    names = {c: unicodedata.name(c) for c in whole if c not in UNFIT}
    starts = {script: script.upper().replace("_", " ") + " " for script in SCRIPTS}
    return [(script, c) for script in SCRIPTS for c in names if names[c].startswith(starts[script])]


def outline(font, letter):
    """The contours of a letter in font units: polygons of so many points that they bend well."""
    from matplotlib.ft2font import LoadFlags

    font.load_char(ord(letter), flags=LoadFlags.NO_SCALE)
    vertices, codes = font.get_path()
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
    """Nearly the skeleton of a letter, for a pen of any width: points of size 1, path codes.

    The contours are moved inwards until `share` of the width of the strokes is gone.
    """
    edges = [np.roll(contour, -1, 0) - contour for contour in contours]
    pairs = list(zip(contours, edges, strict=True))
    twice_area = sum((c[:, 0] * e[:, 1] - c[:, 1] * e[:, 0]).sum() for c, e in pairs)
    length = sum(np.hypot(*edge.T).sum() for edge in edges)
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


def bent(points, numbers, reach):
    """The points of a unit box pushed along smooth waves, which are made of numbers in [0, 1)."""
    waves = numbers.reshape(WAVES, 5)
    cycles, phase, push = 2 * waves[:, :2] - 1, waves[:, 2], 2 * waves[:, 3:] - 1
    return points + reach * np.sin(2 * np.pi * (points @ cycles.T + phase)) @ push


def written(points, codes, habit, mood):
    """What the hand of this habit writes in this mood: points in pixels, path codes, pen width."""
    points = bent(bent(points, habit[TRAITS:], 0.06), mood[TRAITS:], 0.055)
    traits = (2 * habit[:TRAITS] - 1) * HABITS + (2 * mood[:TRAITS] - 1) * MOODS
    pen, slant, turn, width, size = traits[:5]
    points = points @ [[1 + width, turn], [slant - turn, 1.0]]
    return fitted(points, 19 + size) + traits[5:], codes, 1.7 + pen


def rendered(drawings):
    """Render (points, path codes, pen width), each about its centre: uint8 (n, SIDE, SIDE)."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.path import Path as Outline
    from matplotlib.transforms import IdentityTransform

    renderer = RendererAgg(SIDE * len(drawings), SIDE, 72)  # at 72 dpi a point is a pixel
    pixels = np.asarray(renderer.buffer_rgba())
    pixels[:] = 255
    pen = renderer.new_gc()  # black, with round joins
    pen.set_snap(False)
    for i, (points, codes, width) in enumerate(drawings):
        pen.set_linewidth(width)
        points = np.round((points + np.array([SIDE * (i + 0.5), SIDE / 2])) * 64) / 64
        renderer.draw_path(pen, Outline(points, codes), IdentityTransform(), (0.0, 0.0, 0.0))
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


def draw_glyphs(seed=0):
    """Draw the set: images (characters, 20, 28, 28) in uint8, ink 255 on 0, and their names.

    A name is "Script/characterNN". The characters are the same for all seeds; the writers' hands
    and their drawings are not.
    """
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    folder = Path(get_data_path(), "fonts", "ttf")
    fonts = {name: FT2Font(str(folder / f"{name}.ttf")) for name in {REFERENCE}.union(*WRITERS)}

    @cache
    def shape(name, letter):
        return thinned(outline(fonts[name], letter))

    found = letters(fonts[REFERENCE])
    plain = [shape(REFERENCE, letter) for _, letter in found]
    new = newness(rendered([(20 * points, codes, 2.0) for points, codes in plain]))
    characters = []
    for script in SCRIPTS:  # of a large script, those that differ most from the ones before them
        own = [i for i, (name, _) in enumerate(found) if name == script and new[i] >= ALIKE]
        own = sorted(sorted(own, key=lambda i: -new[i])[:CAP])
        characters += [(f"{script}/character{n:02d}", found[i][1]) for n, i in enumerate(own, 1)]

    uniform = np.random.Generator(np.random.PCG64(seed)).random
    habits = uniform((len(WRITERS), TRAITS + 5 * WAVES))
    moods = uniform((len(characters), len(WRITERS), TRAITS + 5 * WAVES))
    images = np.empty((len(characters), len(WRITERS), SIDE, SIDE), np.uint8)
    for image, (_, letter), own_moods in zip(images, characters, moods, strict=True):
        has = {name: font.get_char_index(ord(letter)) > 0 for name, font in fonts.items()}
        own = [next((name for name in style if has[name]), REFERENCE) for style in WRITERS]
        hands = zip(own, habits, own_moods, strict=True)
        image[:] = rendered([written(*shape(n, letter), habit, mood) for n, habit, mood in hands])
    return images, [name for name, _ in characters]
