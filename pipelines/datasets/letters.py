"""Letters to begin with, without a download: those of the fonts that Matplotlib ships, each moved, slanted, resized."""

import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, FINER = 28, 4  # they are drawn four times as large, and made smaller
FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cm")
# Symbols, small capitals for size and what has no letters of its own.
WITHOUT = ("Display", "cmex", "cmsy", "cmmi")
SEED = 20160119


def fonts() -> list[Path]:
    """Return the fonts that have letters: of several weights, upright and oblique, with serifs and without."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    found = sorted(font for font in folder.glob("*.ttf") if font.stem.startswith(FAMILIES))
    return [font for font in found if not any(word in font.stem for word in WITHOUT)]


def random_font(file: Path, random: np.random.RandomState) -> ImageFont.FreeTypeFont:
    """Return a font in one of the sizes that letters come in."""
    return ImageFont.truetype(str(file), int(random.uniform(19, 24) * FINER))


def random_letter(text: str, font: ImageFont.FreeTypeFont, random: np.random.RandomState) -> np.ndarray:
    """Return one letter as (28, 28) uint8 strengths of ink: its middle in the middle, then slanted and moved."""
    large, slant = SIDE * FINER, random.uniform(-0.25, 0.25)
    image = Image.new("L", (large, large))
    left, top, right, bottom = font.getbbox(text)
    ImageDraw.Draw(image).text(((large - left - right) / 2, (large - top - bottom) / 2), text, font=font, fill=255)
    x, y = FINER * random.uniform(-1.5, 1.5, 2)
    # From each pixel of the result to where it is taken: a row is shifted by its distance from the middle one.
    image = image.transform(
        image.size, Image.Transform.AFFINE, (1, slant, -slant * large / 2 - x, 0, 1, -y), Image.Resampling.BILINEAR
    )
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def write_letters(path: Path, variants: int) -> int:
    """Write `.npz` of images, labels and their names, A to Z and a to z; return how many. Equal fonts give equal bytes.

    Each letter stands there in each font, in so many variants. ValueError if `path` does not end in `.npz`.
    """
    if path.suffix != ".npz":
        raise ValueError(f"{path} must end in .npz.")
    random, names, images = np.random.RandomState(SEED), list(string.ascii_uppercase + string.ascii_lowercase), []
    for file in fonts():
        for _ in range(variants):
            font = random_font(file, random)
            images += [random_letter(name, font, random) for name in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.arange(len(images)) % len(names)
    np.savez(path, images=np.stack(images), labels=labels, label_names=np.array(names))
    return len(images)
