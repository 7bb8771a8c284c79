"""Draw a masked autoencoder's reconstruction of a few images (`megavit reconstruct from=RUN images=PATH`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from megavit.cli.arguments import argument
from megavit.data.config import PIXEL_SETTINGS
from megavit.data.sources.image_files import find_images
from megavit.inference.trained_run import open_run, read_run, with_settings
from megavit.metrics.plots import plot_image_grid
from megavit.runtime.output import complete_file


@dataclass(frozen=True)
class ReconstructArgs:
    """The command's own arguments.

    Attributes:
        from_: a run's folder or one of its checkpoints; ema:RUN is the moving average of its weights.
        images: an image, or a folder of images.
        out: the picture; without it RUN/pictures/reconstruct.png.
        count: number of images to draw.
    """

    SETTINGS: ClassVar = PIXEL_SETTINGS
    from_: str = argument(form="RUN")
    images: Path = argument(form="PATH")
    out: Path | None = argument(None, form="PICTURE.png")
    count: int = 8


def reconstruct(args: ReconstructArgs, settings: list[str]) -> int:
    """Mask images, reconstruct them and draw the result.

    Args:
        args: the command's own arguments.
        settings: `PIXEL_SETTINGS` that replace the run's, as `key=value`.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: if the run is not a masked autoencoder, or the images cannot be read.
    """
    weights, config = read_run(args.from_, classifies=False, does="reconstructs")
    config = with_settings(config, settings)
    paths = find_images(args.images)
    chosen = paths[: args.count]
    trained = open_run(config, weights, num_classes=0)
    with torch.no_grad():
        output, loss_function = trained.network.task.visualize(trained.batch(chosen), trained.network.chunks["model"])
        image_grid = loss_function(output)[1]["image_grid"]
    out = args.out or weights.checkpoint.parent.parent / "pictures" / "reconstruct.png"
    with complete_file(out) as temporary:
        plot_image_grid(image_grid, titles=trained.network.task.image_grid, path=temporary)
    print(f"{out}: {len(chosen)} of {len(paths)} images in {args.images}, from {weights}")
    return 0
