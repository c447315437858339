"""dalle2 data check | export: folders of captioned images."""

from __future__ import annotations

import argparse

from dalle2_jax.cli import check, export

HELP = "check a folder of captioned images, or make one of a data set"
USES_JAX = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    checking = actions.add_parser("check", help="what is in a folder of images, and what is wrong with it")
    checking.add_argument("folder")
    checking.add_argument("--out", default=None, help="the contact sheet (default: FOLDER_sheet.png, here)")
    exporting = actions.add_parser("export", help="write images and captions of a data set as a folder")
    exporting.add_argument("name", help="a data set, such as emoji or captioned_shapes/one_object")
    exporting.add_argument("split", help="such as train or validation+test")
    exporting.add_argument("folder", help="the folder to make")
    exporting.add_argument("--count", type=int, help="so many images, spread evenly over the split (default: all)")


def run(options: argparse.Namespace) -> int:
    """Runs one of the two."""
    return {"check": check, "export": export}[options.action].run(options)
