"""Transform images of any size to the network's input size: at random for training, fixed for evaluation."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from megavit.data.config import DataConfig
from megavit.data.decode import Box, Jpeg
from megavit.data.sampler import SampleKey
from megavit.data.transforms.auto_augment import colour_transforms
from megavit.data.transforms.resize import (
    center_box,
    eval_frame,
    named_if_too_large,
    resize,
    resize_nearest,
    resize_part,
)
from megavit.errors import ConfigError
from megavit.parallel.rng import RandomStream, hash_int64
from megavit.plugins import import_plugin


class ImageTransform:
    """Transform an image to uint8 pixels of the network's input size.

    Args:
        config: the data group.
        augment: whether to crop, flip and change images at random; otherwise all are resized and cropped the same way.
    """

    def __init__(self, config: DataConfig, *, augment: bool) -> None:
        self.size, self.crop_pct = config.image_size, config.crop_pct
        self.interpolation = InterpolationMode(config.interpolation.value)
        self.random: list[Callable[[Tensor], Tensor]] = []
        self.reduces = config.reduced_decode
        self.resample = Image.Resampling[config.interpolation.value.upper()]
        self.random_crop: v2.RandomResizedCrop | None = None
        if augment and config.crop_scale is not None:
            low, high = config.crop_scale
            self.random_crop = v2.RandomResizedCrop(
                tuple(config.image_size), scale=(low, high), interpolation=self.interpolation, antialias=True
            )
        self.flip = v2.RandomHorizontalFlip() if augment and config.flip else None
        if self.flip is not None:
            self.random.append(self.flip)
        if augment:
            self.random += colour_transforms(config)
        if augment and config.transform is not None:
            self.random.append(_Own(config.transform))

    def __call__(self, images: Iterable[Tensor | Jpeg], keys: list[SampleKey], *, seed: int) -> list[Tensor]:
        """Transform each image; its random changes are a function of its key and the seed only.

        Args:
            images: uint8 images_CYX of any sizes, or JPEGs to be decoded; read one by one.
            keys: keys of the images.
            seed: `run.seed`.

        Returns:
            uint8 images_CYX of `data.image_size`.
        """
        draws = self.sample_seeds(keys, seed=seed)
        with self.drawing():
            return [self.augment(self.crop(image, draw)) for image, draw in zip(images, draws, strict=True)]

    def preprocess(self, image: Tensor | Jpeg, *, name: str) -> Tensor:
        """Transform one image without random changes.

        Args:
            image: uint8 image_CYX of any size, or a JPEG to be decoded.
            name: name of the image, for the error.

        Returns:
            uint8 image_CYX of `data.image_size`.

        Raises:
            ConfigError: if it cannot be decoded, or is too large to be resized.
        """
        with named_if_too_large(lambda: name):
            return self.crop(image, draw=0)

    def sample_seeds(self, keys: list[SampleKey], *, seed: int) -> list[int]:
        """Return the seed of each image's random changes."""
        columns = torch.tensor([(key.epoch, key.sample_id, key.occurrence) for key in keys]).unbind(dim=1)
        return (hash_int64(seed, *columns, RandomStream.IMAGE_TRANSFORM) & (2**62 - 1)).tolist()

    def drawing(self) -> AbstractContextManager[None]:
        """Return the context in which to crop and augment images; it restores torch's generator at its end."""
        return _as_in_any_process() if self.random_crop is not None or self.random else nullcontext()

    def crop(self, image: Tensor | Jpeg, draw: int) -> Tensor:
        """Crop and resize one image to the network's input size, before `augment`.

        Args:
            image: uint8 image_CYX of any size, or a JPEG to be decoded.
            draw: seed from `sample_seeds`.

        Raises:
            ConfigError: if a JPEG cannot be decoded.
            MemoryError, RuntimeError: if the image is too large to be resized.
        """
        if self.random_crop is None and not self.random:
            return self._fit(image).contiguous()
        # Not torch.manual_seed: it also seeds every GPU, and with it this process's dropout.
        torch.default_generator.manual_seed(draw)
        return (self._fit(image) if self.random_crop is None else self._cut(image, self.random_crop)).contiguous()

    def crop_target(self, target_YX: Tensor, draw: int) -> Tensor:
        """Crop and flip an image's dense target as `crop` and `augment` do with the image and the same seed.

        Args:
            target_YX: target of the image's height and width.
            draw: seed of the image, from `sample_seeds`.

        Returns:
            target_YX in the network's input size; each value is that of the nearest pixel.
        """
        if self.random_crop is None and not self.random:
            return self._fit_target(target_YX)
        torch.default_generator.manual_seed(draw)
        if self.random_crop is None:
            cut = self._fit_target(target_YX)
        else:
            box = _draw_box(self.random_crop, (target_YX.shape[0], target_YX.shape[1]))
            inside = target_YX[box.top : box.top + box.height, box.left : box.left + box.width]
            cut = resize_nearest(inside, self.size, Box(0, 0, *self.size))
        return cut if self.flip is None else self.flip(cut.unsqueeze(0)).squeeze(0)

    def _fit_target(self, target_YX: Tensor) -> Tensor:
        if self.crop_pct is None:
            return resize_nearest(target_YX, self.size, Box(0, 0, *self.size))
        frame = eval_frame((target_YX.shape[0], target_YX.shape[1]), self.size, self.crop_pct)
        return resize_nearest(target_YX, frame, center_box(frame, self.size))

    def augment(self, image: Tensor) -> Tensor:
        """Apply flip and colour changes to the image that was cropped last; torch's generator continues from there."""
        for transform in self.random:
            image = transform(image)
        return image

    def _cut(self, opened: Tensor | Jpeg, crop: v2.RandomResizedCrop) -> Tensor:
        """Crop a random box and resize it; the box depends only on the generator and the image's size."""
        size = (opened.height, opened.width) if isinstance(opened, Jpeg) else opened.shape[1:]
        box = _draw_box(crop, (size[0], size[1]))
        if isinstance(opened, Jpeg):
            reduced = opened.resized(box, self.size, resample=self.resample) if self.reduces else None
            if reduced is not None:
                return reduced
        image = opened.decode() if isinstance(opened, Jpeg) else opened
        return functional.resized_crop(
            image, box.top, box.left, box.height, box.width, self.size, self.interpolation, antialias=True
        )

    def _fit(self, opened: Tensor | Jpeg) -> Tensor:
        """Resize the full image, or with `crop_pct` resize it to cover a larger frame and crop its centre."""
        image = opened.decode() if isinstance(opened, Jpeg) else opened
        if self.crop_pct is None:
            return resize(image, self.size, self.interpolation)
        frame = eval_frame((image.shape[1], image.shape[2]), self.size, self.crop_pct)
        return resize_part(image, frame, center_box(frame, self.size), self.interpolation)


def _draw_box(crop: v2.RandomResizedCrop, size: tuple[int, int]) -> Box:
    """Sample the box of a random crop for an image of this height and width."""
    drawn = crop.make_params([torch.empty(1, 1, 1).expand(1, *size)])
    return Box(**{side: int(drawn[side]) for side in ("top", "left", "height", "width")})


class _Own:
    """A user's transform, whose results are checked."""

    def __init__(self, name: str) -> None:
        self._name, self._transform = name, import_plugin(name, "data.transform")
        if isinstance(self._transform, type):
            self._transform = self._transform()
        if not callable(self._transform):
            raise ConfigError(f"data.transform={name} is a {type(self._transform).__name__}; a function is needed")

    def __call__(self, image: Tensor) -> Tensor:
        changed = self._transform(image)
        if not isinstance(changed, Tensor) or (changed.shape, changed.dtype) != (image.shape, image.dtype):
            got = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
            raise ConfigError(
                f"data.transform={self._name} returned {got} for an image of {image.dtype} {list(image.shape)}; it "
                f"must keep type and shape"
            )
        return changed


@contextmanager
def _as_in_any_process() -> Iterator[None]:
    # torchvision samples from torch's default generator, which in this process is also dropout's. A worker process has
    # one thread; one thread here makes an image's sums add up in the same order.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(num_threads)
