"""`megavit.load`: a trained classifier as an ordinary torch module, on one device and without Megatron-Core inside.

Shapes: B images, C channels, H hidden, K classes.
"""

from pathlib import Path

import torch
from torch import Tensor

from megavit.checkpoint.names import Dims, to_plain
from megavit.data.decode import decode_image
from megavit.data.transforms import Normalize
from megavit.data.views import View
from megavit.model.plain import PlainViT
from megavit.model.vit import parameter_names
from megavit.task.config import TaskName
from megavit.trained import TrainedRun, open_run, read_classes, read_run


class TrainedClassifier(torch.nn.Module):
    """Images as they are to scores or features; evaluating, in fp32, on the CPU until it is moved.

    Args:
        run: an open run of task=classify.
        classes: names, in the order of the scores.
    """

    def __init__(self, run: TrainedRun, classes: tuple[str, ...]) -> None:
        super().__init__()
        config = run.config
        self.classes, self._data, self._seed = classes, config.data, config.run.seed
        self.normalize = Normalize(config.data.mean, config.data.std)
        self.vit = PlainViT(
            config.model, image_size=config.data.image_size, channels=config.data.channels, num_classes=len(classes)
        )
        whole = {
            name: weight.detach().float().cpu() for name, weight in parameter_names(run.network.chunks["model"]).items()
        }
        self.vit.load_state_dict(to_plain(whole, Dims(config.model.num_heads, config.model.patch_size)))
        self.eval()

    def read(self, *paths: str | Path) -> Tensor:
        """Read images from files, as the run evaluated them: uint8 images_BCYX.

        Raises:
            ConfigError: for a file that is no image.
        """
        channels, view = self._data.channels, View(self._data, augment=False)
        images = [decode_image(Path(path), channels=channels, name=str(path)) for path in paths]
        return torch.stack(view(images, [], seed=self._seed))

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Score uint8 images of the run's size: logits_BK."""
        return self.vit(self.normalize(images_BCYX))

    def features(self, images_BCYX: Tensor) -> Tensor:
        """What the head reads of uint8 images: features_BH."""
        return self.vit.features(self.normalize(images_BCYX))


def load(path: str | Path) -> TrainedClassifier:
    """Load a run's newest checkpoint, or the checkpoint named.

    Args:
        path: a run's folder or one of its checkpoints.

    Raises:
        ConfigError: if there is none, or it is no classifier's.
    """
    checkpoint, config = read_run(Path(path), TaskName.classify, does="can be loaded so far")
    classes = read_classes(checkpoint)
    return TrainedClassifier(open_run(config, checkpoint, num_classes=len(classes)), classes)
