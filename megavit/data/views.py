"""Images of any size to the size that the network sees: at random for training, always alike for evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from megavit.data.augment import colour_transforms
from megavit.data.config import DataConfig
from megavit.data.order import SampleKey
from megavit.errors import ConfigError
from megavit.extension import by_name
from megavit.parallel.rng import hash_int64

# What the draws are for (see transforms.py).
_VIEW = 3


class View:
    """An image as the network sees it, uint8.

    Args:
        config: the data group.
        augment: crop and flip at random, or resize and crop alike always.
    """

    def __init__(self, config: DataConfig, *, augment: bool) -> None:
        self.size, self.eval_crop = config.image_size, config.eval_crop
        self.interpolation = InterpolationMode(config.interpolation.value)
        self.random: list[Callable[[Tensor], Tensor]] = []
        self.crops = augment and config.crop_scale is not None
        if augment and config.crop_scale is not None:
            low, high = config.crop_scale
            self.random.append(
                v2.RandomResizedCrop(
                    tuple(config.image_size), scale=(low, high), interpolation=self.interpolation, antialias=True
                )
            )
        if augment and config.flip:
            self.random.append(v2.RandomHorizontalFlip())
        if augment:
            self.random += colour_transforms(config)
        if augment and config.transform is not None:
            self.random.append(_Own(config.transform))

    def __call__(self, images: list[Tensor], keys: list[SampleKey], *, seed: int) -> list[Tensor]:
        """See each image; what is random is a function of its key and the seed alone.

        Args:
            images: uint8 images_CYX of any sizes.
            keys: theirs.
            seed: `run.seed`.
        """
        if not self.crops:
            images = [self._fit(image) for image in images]
        if not self.random:
            return images
        columns = torch.tensor([(key.epoch, key.sample_id, key.occurrence) for key in keys]).unbind(dim=1)
        draws = (hash_int64(seed, *columns, _VIEW) & (2**62 - 1)).tolist()
        seen = []
        with _as_in_any_process():
            for image, draw in zip(images, draws, strict=True):
                # Not torch.manual_seed: that seeds every GPU too, and this process's dropout with it.
                torch.default_generator.manual_seed(draw)
                for transform in self.random:
                    image = transform(image)
                seen.append(image)
        return seen

    def _fit(self, image: Tensor) -> Tensor:
        """Resize the whole image; or, with `eval_crop`, cover a frame larger by as much and cut its centre out."""
        height, width = self.size
        if list(image.shape[1:]) == [height, width] and self.eval_crop is None:
            return image
        if self.eval_crop is None:
            return functional.resize(image, [height, width], self.interpolation, antialias=True)
        factor = max(height / self.eval_crop / image.shape[1], width / self.eval_crop / image.shape[2])
        covering = [max(height, round(image.shape[1] * factor)), max(width, round(image.shape[2] * factor))]
        resized = functional.resize(image, covering, self.interpolation, antialias=True)
        return functional.center_crop(resized, [height, width])


class _Own:
    """A user's transform, held to what it promises."""

    def __init__(self, name: str) -> None:
        self._name, self._transform = name, by_name(name, "data.transform")
        if isinstance(self._transform, type):
            self._transform = self._transform()
        if not callable(self._transform):
            raise ConfigError(f"data.transform={name} is a {type(self._transform).__name__}; a function is needed")

    def __call__(self, image: Tensor) -> Tensor:
        changed = self._transform(image)
        if not isinstance(changed, Tensor) or (changed.shape, changed.dtype) != (image.shape, image.dtype):
            got = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
            raise ConfigError(
                f"data.transform={self._name} made {got} of an image of {image.dtype} {list(image.shape)}; it must "
                f"keep type and shape"
            )
        return changed


@contextmanager
def _as_in_any_process() -> Iterator[None]:
    # torchvision draws from torch's default generator, which in this process also drives the dropout. A worker process
    # has one thread; with one here too, an image's sums are added up in the same order.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(num_threads)
