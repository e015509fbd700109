"""Where characters come from: Omniglot's files, and glyphs drawn in their place.

Each gives uint8 images (characters, 20, 28, 28), ink = 255, and names; neither imports `amaml`.
"""
