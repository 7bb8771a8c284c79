"""`megavit.load`: a trained network as an ordinary torch module, on one device and without Megatron-Core inside.

Shapes: B images, C channels, N tokens, H hidden, K classes.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megavit.checkpoint.find import CheckpointRef, resolve_checkpoint
from megavit.checkpoint.param_mapping import Dims, to_timm
from megavit.checkpoint.state import read_state
from megavit.config.experiment import ExperimentConfig
from megavit.data.decode import open_image
from megavit.data.transforms.image import ImageTransform
from megavit.data.transforms.normalize import Normalize
from megavit.errors import ConfigError, printable
from megavit.inference.trained_run import TrainedRun, open_run, read_classes, read_config, with_settings
from megavit.model.config import ModelConfig, Pool
from megavit.model.parameters import is_decoder, is_last_layer
from megavit.model.torch_vit import TorchViT
from megavit.model.vit import parameter_names
from megavit.parallel.layout import ParallelLayout


class TrainedEncoder(torch.nn.Module):
    """Images as they are to features; evaluating, in fp32, on the CPU until it is moved.

    Args:
        run: an open run.
        num_classes: K; 0 for a masked autoencoder, whose decoder is left away, and for a model without a classifier.

    Attributes:
        pool: the tokens that features are made of, where none are asked for.
    """

    def __init__(self, run: TrainedRun, *, num_classes: int = 0) -> None:
        super().__init__()
        config = run.config
        self._data = config.data
        self.normalize = Normalize(config.data.mean, config.data.std)
        self.pool, model = config.model.pool, config.model
        if not config.task.has_classes:
            self.pool = Pool.cls if model.class_tokens else Pool.mean
            # It ends with the norm of its tokens, whichever of them are looked at afterwards.
            model = replace(model, pool=Pool.cls)
        self._model = model
        self.vit = TorchViT(
            model, image_size=config.data.image_size, channels=config.data.channels, num_classes=num_classes
        )
        full = {
            name: weight.detach().float().cpu()
            for name, weight in parameter_names(run.network.chunks["model"]).items()
            if not is_decoder(name) and (num_classes or not is_last_layer(name))
        }
        head = run.network.chunks["model"].head if num_classes else None
        if head is not None:
            full |= {name: weight.cpu() for name, weight in head.weights_without_norm().items()}
        self.vit.load_state_dict(to_timm(full, Dims(config.model.num_heads, config.model.patch_size)))
        self.eval()

    def read(self, *paths: str | Path) -> Tensor:
        """Read images from files, as the run evaluated them: uint8 images_BCYX.

        Raises:
            ConfigError: for a file that is no image.
        """
        channels, view = self._data.channels, ImageTransform(self._data, augment=False)
        names = [printable(str(path)) for path in paths]
        images = (open_image(Path(path), channels=channels, name=name) for path, name in zip(paths, names, strict=True))
        return torch.stack([view.preprocess(image, name=name) for name, image in zip(names, images, strict=True)])

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """The features of uint8 images of the run's size, features_BH."""
        return self.features(images_BCYX)

    def tokens(self, images_BCYX: Tensor) -> Tensor:
        """All tokens of uint8 images after the last layer, class tokens first: tokens_BNH."""
        return self.vit.tokens(self.normalize(images_BCYX))

    def features(self, images_BCYX: Tensor, *, pool: Pool | None = None) -> Tensor:
        """One vector for each of uint8 images, features_BH.

        Args:
            images_BCYX: uint8, of the run's size.
            pool: `cls`, the first class token after the last layer; `mean`, the mean of the patches there; either
                normed as the model norms. None for what the head reads; of an autoencoder the first class token, or
                the patches' mean where there is none.

        Raises:
            ConfigError: for a class token that the model does not have.
        """
        check_pool(pool, self._model)
        return self.vit.features(self.normalize(images_BCYX), pool=pool or self.pool)


class TrainedClassifier(TrainedEncoder):
    """Images as they are to scores or features.

    Args:
        run: an open run of a classifier.
        classes: names, in the order of the scores.
    """

    def __init__(self, run: TrainedRun, classes: tuple[str, ...]) -> None:
        super().__init__(run, num_classes=len(classes))
        self.classes = classes

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Score uint8 images of the run's size: logits_BK."""
        return self.vit(self.normalize(images_BCYX))


def load(path: str | Path, *settings: str) -> TrainedEncoder:
    """Load a run's newest checkpoint, or the checkpoint named.

    Args:
        path: a run's folder or one of its checkpoints; with `ema:` before it, the moving average of its weights.
        settings: data.mean, data.std, data.crop_pct and data.interpolation other than the run's, each as it is typed:
            "data.crop_pct=0.875".

    Returns:
        A `TrainedClassifier`, or of a masked autoencoder its encoder, a `TrainedEncoder`.

    Raises:
        ConfigError: if there is none, or a setting does not fit.
    """
    weights = resolve_checkpoint(str(path))
    return open_encoder(with_settings(read_config(weights.checkpoint), list(settings)), weights)[0]


def open_encoder(config: ExperimentConfig, weights: CheckpointRef) -> tuple[TrainedEncoder, ParallelLayout]:
    """Load a checkpoint's network, whichever data it is to look at.

    Args:
        config: from `read_config`, or with settings on top.
        weights: from `resolve_checkpoint`.

    Returns:
        What `load` does, and the layout of one rank, whose device may be a GPU.
    """
    if not config.task.has_classes:
        run = open_run(config, weights, num_classes=0)
        return TrainedEncoder(run), run.layout
    state = read_state(weights.checkpoint)
    if not state.classes and not state.optimizer:
        # Converted from a model without a classifier.
        run = open_run(config, weights, num_classes=1)
        return TrainedEncoder(run), run.layout
    classes = read_classes(weights.checkpoint)
    run = open_run(config, weights, num_classes=len(classes))
    return TrainedClassifier(run, classes), run.layout


def check_pool(pool: Pool | None, model: ModelConfig) -> None:
    """Raise ConfigError for a class token that the model does not have."""
    if pool is Pool.cls and not model.class_tokens:
        raise ConfigError("pool=cls needs a class token, and the model has model.class_tokens=0; choose pool=mean")
