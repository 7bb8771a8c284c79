"""`megavit reconstruct from=RUN images=PATH`: what a masked autoencoder makes of a few images, as a picture."""

from pathlib import Path

import torch

from megavit.cli.arguments import parse_arguments
from megavit.data.sources.image_files import find_images
from megavit.inference.trained_run import open_run, read_run, split_settings, with_settings
from megavit.metrics.plots import plot_image_grid
from megavit.runtime.output import complete_file
from megavit.validation import parse_int


def reconstruct(arguments: list[str]) -> int:
    """Mask, reconstruct and draw.

    Args:
        arguments: `from=RUN images=PATH`, and optionally `out=PICTURE.png count=8`, and data.mean, data.std,
            data.crop_pct and data.interpolation other than the run's.

    Raises:
        ConfigError: if the run is no masked autoencoder's, or the images cannot be read.
    """
    pixels, rest = split_settings(arguments)
    args = parse_arguments("reconstruct", rest, needed=("from", "images"), optional=("out", "count"))
    weights, config = read_run(args["from"], classifies=False, does="reconstructs")
    config = with_settings(config, pixels)
    count = parse_int("count", args.get("count", "8"))
    paths = find_images(Path(args["images"]))
    chosen = paths[:count]
    trained = open_run(config, weights, num_classes=0)
    with torch.no_grad():
        output, outputs = trained.network.task.visualize(trained.batch(chosen), trained.network.chunks["model"])
        image_grid = outputs(output)[1]["image_grid"]
    out = Path(args.get("out", weights.checkpoint.parent.parent / "pictures" / "reconstruct.png"))
    with complete_file(out) as temporary:
        plot_image_grid(image_grid, titles=trained.network.task.image_grid, path=temporary)
    print(f"{out}: {len(chosen)} of {len(paths)} images of {args['images']}, by {weights}")
    return 0
