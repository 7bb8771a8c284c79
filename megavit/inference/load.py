"""Load a trained network as an ordinary torch module on one device, without Megatron-Core inside (`megavit.load`).

Shapes: B images, C channels, N tokens, H hidden, K classes.
"""

import os
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
from megavit.parallel.layout import ParallelLayout, temporary_world
from megavit.runtime.startup import import_warnings_silenced


class TrainedEncoder(torch.nn.Module):
    """Compute features of uint8 images with a trained encoder.

    The module is in evaluation mode, in fp32, and on the CPU until it is moved. It normalises the images itself.

    Args:
        run: an opened run.
        num_classes: K; 0 for a masked autoencoder, whose decoder is dropped, and for a model without a classifier.

    Attributes:
        pool: the default pooling of `features`.
    """

    def __init__(self, run: TrainedRun, *, num_classes: int = 0) -> None:
        super().__init__()
        config = run.config
        self._data = config.data
        self.normalize = Normalize(config.data.mean, config.data.std)
        self.pool, model = config.model.pool, config.model
        if not config.task.has_classes:
            self.pool = Pool.cls if model.class_tokens else Pool.mean
            # With pool=cls the module normalises all tokens at its end; `features` then pools either way.
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
        """Read images from files and preprocess them as the run's evaluation does.

        Args:
            paths: image files.

        Returns:
            uint8 images_BCYX, of the run's image size.

        Raises:
            ConfigError: if a file is not an image.
        """
        channels, view = self._data.channels, ImageTransform(self._data, augment=False)
        names = [printable(str(path)) for path in paths]
        images = (open_image(Path(path), channels=channels, name=name) for path, name in zip(paths, names, strict=True))
        return torch.stack([view.preprocess(image, name=name) for name, image in zip(names, images, strict=True)])

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Return the features of images with the default pooling.

        Args:
            images_BCYX: uint8 images of the run's image size.

        Returns:
            fp32 features_BH.
        """
        return self.features(images_BCYX)

    def tokens(self, images_BCYX: Tensor) -> Tensor:
        """Return all tokens of images after the last layer.

        Args:
            images_BCYX: uint8 images of the run's image size.

        Returns:
            fp32 tokens_BNH, class tokens first.
        """
        return self.vit.tokens(self.normalize(images_BCYX))

    def features(self, images_BCYX: Tensor, *, pool: Pool | None = None) -> Tensor:
        """Return one feature vector per image.

        Args:
            images_BCYX: uint8 images of the run's image size.
            pool: `cls` takes the first class token after the last layer, `mean` the mean of the patch tokens; both
                apply the model's norm. None pools as the head does; for an autoencoder it takes the first class
                token, or the mean of the patch tokens if the model has no class token.

        Returns:
            fp32 features_BH.

        Raises:
            ConfigError: if `pool` is `cls` and the model has no class token.
        """
        check_pool(pool, self._model)
        return self.vit.features(self.normalize(images_BCYX), pool=pool or self.pool)


class TrainedClassifier(TrainedEncoder):
    """Classify uint8 images, or compute their features.

    Args:
        run: an opened run of a classifier.
        classes: class names, in the order of the scores.

    Attributes:
        classes: class names, in the order of the scores.
    """

    def __init__(self, run: TrainedRun, classes: tuple[str, ...]) -> None:
        super().__init__(run, num_classes=len(classes))
        self.classes = classes

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Return the score of each class.

        Args:
            images_BCYX: uint8 images of the run's image size.

        Returns:
            fp32 logits_BK, before softmax or sigmoid.
        """
        return self.vit(self.normalize(images_BCYX))


def load(path: str | os.PathLike[str], *settings: str) -> TrainedEncoder:
    """Load a run's newest checkpoint, or a given checkpoint, as a torch module.

    Args:
        path: a `Run`, a run's folder or one of its checkpoints; the prefix `ema:` loads the moving average of the
            weights.
        settings: values that replace the run's data.mean, data.std, data.crop_pct or data.interpolation, each as a
            command-line setting such as "data.crop_pct=0.875".

    Returns:
        A `TrainedClassifier`; for a masked autoencoder its encoder, a `TrainedEncoder`.

    Raises:
        ConfigError: if there is no checkpoint, or a setting is wrong.
    """
    with import_warnings_silenced(), temporary_world():
        weights = resolve_checkpoint(os.fspath(path))
        return open_encoder(with_settings(read_config(weights.checkpoint), list(settings)), weights)[0]


def open_encoder(config: ExperimentConfig, weights: CheckpointRef) -> tuple[TrainedEncoder, ParallelLayout]:
    """Load a checkpoint's network with a given configuration.

    Args:
        config: configuration from `read_config`, possibly with changed settings.
        weights: checkpoint from `resolve_checkpoint`.

    Returns:
        The module that `load` returns, and the layout of one rank, whose device may be a GPU.

    Raises:
        ConfigError: if the checkpoint does not name its classes.
    """
    if not config.task.has_classes:
        run = open_run(config, weights, num_classes=0)
        return TrainedEncoder(run), run.layout
    state = read_state(weights.checkpoint)
    if not state.classes and not state.optimizer:
        # The checkpoint was converted from a model without a classifier.
        run = open_run(config, weights, num_classes=1)
        return TrainedEncoder(run), run.layout
    classes = read_classes(weights.checkpoint)
    run = open_run(config, weights, num_classes=len(classes))
    return TrainedClassifier(run, classes), run.layout


def check_pool(pool: Pool | None, model: ModelConfig) -> None:
    """Raise ConfigError if `pool` is `cls` and the model has no class token."""
    if pool is Pool.cls and not model.class_tokens:
        raise ConfigError("pool=cls needs a class token, and the model has model.class_tokens=0; choose pool=mean")
