"""Makes photographs of small images: `python -m tests.support.odd_photographs FOLDER OUT NUM_CLASSES NUM_IMAGES`.

FOLDER has `train/<class>/*` and `test/<class>/*`, as CIFAR-100 unpacked. Of the first classes the first images, and a
fifth as many of `test`, become JPEGs of 70 to 220 pixels and any aspect ratio up to 2, a third of them turned by EXIF.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

UPRIGHT, TURNED = 1, 6  # EXIF: as it is; to be turned by 90 degrees clockwise


def enlarge(image: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, Image.Exif]:
    """Return an image at a random size, and EXIF that turns it back where it was turned."""
    shorter = int(generator.integers(70, 111))
    sides = [shorter, int(shorter * generator.uniform(1, 2))]
    generator.shuffle(sides)
    image, exif = image.convert("RGB").resize((sides[0], sides[1]), Image.Resampling.BICUBIC), Image.Exif()
    is_turned = generator.random() < 1 / 3
    exif[ExifTags.Base.Orientation] = TURNED if is_turned else UPRIGHT
    return image.transpose(Image.Transpose.ROTATE_90) if is_turned else image, exif


def main() -> None:
    """Write the folder."""
    folder, out, num_classes, num_images = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for split, count in (("train", num_images), ("test", num_images // 5)):
        for source in itertools.islice(sorted((folder / split).iterdir()), num_classes):
            (place := out / split / source.name).mkdir(parents=True)
            for number, path in enumerate(itertools.islice(sorted(source.iterdir()), count)):
                generator = np.random.default_rng([num_classes, number, *source.name.encode()])
                image, exif = enlarge(Image.open(path), generator)
                image.save(place / f"{path.stem}.jpg", "JPEG", quality=int(generator.integers(70, 96)), exif=exif)


if __name__ == "__main__":
    main()
