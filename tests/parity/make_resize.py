"""Make references/resize.npz: OpenCV's resizing of a random image.

Needs opencv-python-headless, which the tests do not: `python -m tests.parity.make_resize`.
"""

import cv2
import numpy as np

from tests.parity.reference import to_write

METHODS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}
SIZES = [(11, 7), (32, 24), (45, 50), (16, 12)]


def main() -> None:
    image = np.random.default_rng(0).random((32, 24, 3)).astype(np.float32)
    references = {"image": image}
    for name, method in METHODS.items():
        for height, width in SIZES:
            references[f"{name}/{height}x{width}"] = cv2.resize(image, (width, height), interpolation=method)
    path = to_write("resize")
    np.savez_compressed(path, **references)
    print(f"{path.name}: {len(references)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
