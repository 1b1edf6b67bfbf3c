import io

from PIL import Image

from resnet_ensemble.export import drawings
from resnet_ensemble.export.bundle import Bundle


def test_drawings_are_the_same_every_time() -> None:
    assert drawings.pictures() == drawings.pictures()


def test_the_shipped_golden_pictures_are_these_drawings(shipped: Bundle) -> None:
    """Pixels, not bytes: another Pillow may compress differently."""
    for name, png in drawings.pictures().items():
        with Image.open(io.BytesIO(png)) as drawn, Image.open(shipped.path / "golden" / f"{name}.png") as kept:
            assert drawn.size == kept.size
            assert drawn.tobytes() == kept.tobytes()


def test_drawings_are_portrait_landscape_smaller_and_larger_than_a_crop() -> None:
    sizes = [Image.open(io.BytesIO(png)).size for png in drawings.pictures().values()]

    assert any(w > h for w, h in sizes)
    assert any(w < h for w, h in sizes)
    assert min(min(size) for size in sizes) < 32 < max(max(size) for size in sizes)
