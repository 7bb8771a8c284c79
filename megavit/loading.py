"""`megavit.load`: a trained network as an ordinary torch module, on one device and without Megatron-Core inside.

Shapes: B images, C channels, N tokens, H hidden, K classes.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megavit.checkpoint.names import Dims, to_plain
from megavit.checkpoint.state import read_state
from megavit.data.decode import open_image
from megavit.data.transforms import Normalize
from megavit.data.views import View
from megavit.model.config import Pool
from megavit.model.plain import PlainViT
from megavit.model.vit import parameter_names
from megavit.search import find_checkpoint
from megavit.task.config import TaskName
from megavit.trained import TrainedRun, open_run, read_classes, read_config


class TrainedEncoder(torch.nn.Module):
    """Images as they are to features; evaluating, in fp32, on the CPU until it is moved.

    Args:
        run: an open run.
        num_classes: K; 0 for a masked autoencoder, whose decoder is left away, and for a model without a classifier.
    """

    def __init__(self, run: TrainedRun, *, num_classes: int = 0) -> None:
        super().__init__()
        config = run.config
        self._data = config.data
        self.normalize = Normalize(config.data.mean, config.data.std)
        self._pools = config.task.name is TaskName.classify
        # An autoencoder's encoder ends with the norm of its tokens, whichever of them are looked at afterwards.
        model = config.model if self._pools else replace(config.model, pool=Pool.cls)
        self.vit = PlainViT(
            model, image_size=config.data.image_size, channels=config.data.channels, num_classes=num_classes
        )
        dropped = ("mae_decoder.",) if num_classes else ("mae_decoder.", "head.out.")
        whole = {
            name: weight.detach().float().cpu()
            for name, weight in parameter_names(run.network.chunks["model"]).items()
            if not name.startswith(dropped)
        }
        self.vit.load_state_dict(to_plain(whole, Dims(config.model.num_heads, config.model.patch_size)))
        self.eval()

    def read(self, *paths: str | Path) -> Tensor:
        """Read images from files, as the run evaluated them: uint8 images_BCYX.

        Raises:
            ConfigError: for a file that is no image.
        """
        channels, view = self._data.channels, View(self._data, augment=False)
        images = (open_image(Path(path), channels=channels, name=str(path)) for path in paths)
        # Nothing is drawn for an image that is only looked at.
        return torch.stack([view.cut(image, draw=0) for image in images])

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """The features of uint8 images of the run's size, features_BH."""
        return self.features(images_BCYX)

    def tokens(self, images_BCYX: Tensor) -> Tensor:
        """All tokens of uint8 images after the last layer, class tokens first: tokens_BNH."""
        return self.vit.tokens(self.normalize(images_BCYX))

    def features(self, images_BCYX: Tensor) -> Tensor:
        """One vector for each of uint8 images, features_BH.

        What the head reads; of an autoencoder the first class token, or the patches' mean where there is none.
        """
        if self._pools:
            return self.vit.features(self.normalize(images_BCYX))
        tokens_BNH = self.tokens(images_BCYX)
        return tokens_BNH[:, 0] if self.vit.class_tokens else tokens_BNH.mean(dim=1)


class TrainedClassifier(TrainedEncoder):
    """Images as they are to scores or features.

    Args:
        run: an open run of task=classify.
        classes: names, in the order of the scores.
    """

    def __init__(self, run: TrainedRun, classes: tuple[str, ...]) -> None:
        super().__init__(run, num_classes=len(classes))
        self.classes = classes

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Score uint8 images of the run's size: logits_BK."""
        return self.vit(self.normalize(images_BCYX))


def load(path: str | Path) -> TrainedEncoder:
    """Load a run's newest checkpoint, or the checkpoint named.

    Args:
        path: a run's folder or one of its checkpoints.

    Returns:
        A `TrainedClassifier`, or of a masked autoencoder its encoder, a `TrainedEncoder`.

    Raises:
        ConfigError: if there is none.
    """
    checkpoint = find_checkpoint(Path(path))
    config = read_config(checkpoint)
    if config.task.name is TaskName.mae:
        return TrainedEncoder(open_run(config, checkpoint, num_classes=0))
    state = read_state(checkpoint)
    if not state.classes and not state.optimizer:
        # Converted from a model without a classifier.
        return TrainedEncoder(open_run(config, checkpoint, num_classes=1))
    classes = read_classes(checkpoint)
    return TrainedClassifier(open_run(config, checkpoint, num_classes=len(classes)), classes)
