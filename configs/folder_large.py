"""Your own images on an accelerator: configs/folder.py in the networks of configs/emoji_large.py, for twice its steps.

python -m train configs/folder_large.py IMAGES all
"""

from configs import emoji_large
from configs.folder import STEPS, on_folder
from train.config.system import System


def system(folder: str) -> System:
    """The cascade of configs/emoji_large.py for the images in `folder`; the run is named after it."""
    return on_folder(emoji_large.system(), folder, {name: 2 * steps for name, steps in STEPS.items()})
