"""A bundle's golden pictures, drawn by code: no licence, no download, the same on every machine.

They are odd in size and shape on purpose (portrait, landscape, tiny, larger than any crop), so that a mistake in
resizing, padding or cropping changes some probability.
"""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SKY, SEA, GRASS, SAND = (150, 195, 235), (35, 85, 140), (85, 130, 60), (205, 185, 140)


def pictures() -> dict[str, bytes]:
    """Name → PNG."""
    drawn = {
        "ship": _ship(),
        "airplane": _airplane(),
        "truck": _truck(),
        "frog": _frog(),
        "texture": _noise((47, 33), seed=1, blur=1.0),
        "portrait": _noise((97, 301), seed=2, blur=9.0),
        "landscape": _noise((403, 129), seed=3, blur=14.0),
        "tiny": _noise((5, 7), seed=4, blur=0.0),
    }
    return {name: _png(image) for name, image in drawn.items()}


def _ship() -> Image.Image:
    image = Image.new("RGB", (320, 240), SKY)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 165, 320, 240), fill=SEA)
    draw.polygon([(40, 145), (285, 145), (255, 190), (70, 190)], fill=(120, 30, 30))
    draw.rectangle((40, 138, 285, 147), fill=(235, 235, 235))
    draw.rectangle((95, 105, 215, 140), fill=(245, 245, 245))
    draw.rectangle((120, 80, 190, 106), fill=(240, 240, 240))
    draw.rectangle((145, 45, 170, 82), fill=(190, 60, 40))
    for x in range(105, 210, 18):
        draw.rectangle((x, 115, x + 8, 125), fill=(60, 80, 110))
    return image.filter(ImageFilter.GaussianBlur(1.5))


def _airplane() -> Image.Image:
    image = Image.new("RGB", (301, 201), SKY)
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 85, 265, 118), fill=(225, 228, 232))
    draw.polygon([(140, 100), (185, 100), (120, 165), (100, 165)], fill=(180, 185, 195))
    draw.polygon([(150, 92), (180, 92), (140, 50), (128, 50)], fill=(200, 204, 212))
    draw.polygon([(45, 98), (75, 92), (48, 50), (33, 50)], fill=(190, 60, 60))
    return image.filter(ImageFilter.GaussianBlur(1.5))


def _truck() -> Image.Image:
    image = Image.new("RGB", (280, 220), (200, 205, 210))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 165, 280, 220), fill=(95, 95, 98))
    draw.rectangle((85, 55, 255, 160), fill=(230, 150, 40))
    draw.polygon([(30, 160), (30, 110), (48, 80), (85, 80), (85, 160)], fill=(170, 40, 35))
    draw.polygon([(38, 108), (52, 87), (76, 87), (76, 108)], fill=(70, 90, 110))
    for x in (50, 160, 215):
        draw.ellipse((x, 145, x + 38, 183), fill=(25, 25, 25))
        draw.ellipse((x + 12, 157, x + 26, 171), fill=(140, 140, 140))
    return image.filter(ImageFilter.GaussianBlur(1.5))


def _frog() -> Image.Image:
    image = Image.new("RGB", (240, 241), SAND)
    draw = ImageDraw.Draw(image)
    draw.ellipse((45, 85, 200, 205), fill=GRASS)
    draw.ellipse((75, 45, 175, 135), fill=(95, 145, 65))
    for x in (82, 140):
        draw.ellipse((x, 38, x + 28, 66), fill=(150, 170, 60))
        draw.ellipse((x + 8, 46, x + 20, 58), fill=(15, 15, 15))
    draw.ellipse((25, 160, 85, 215), fill=(75, 115, 50))
    draw.ellipse((160, 160, 220, 215), fill=(75, 115, 50))
    return image.filter(ImageFilter.GaussianBlur(1.5))


def _noise(size: tuple[int, int], *, seed: int, blur: float) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur))
    return image.point(lambda value: min(255, max(0, round(128 + (value - 128) * (1 + blur)))))


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()
