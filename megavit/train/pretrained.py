"""Open pretrained weights: another run's checkpoint, or another library's file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from megavit.checkpoint import shards
from megavit.checkpoint.convert.external_model import ExternalModel, are_sincos, usual_heads
from megavit.checkpoint.convert.read import KINDS, fetch, read_external
from megavit.checkpoint.find import CheckpointRef, resolve_checkpoint
from megavit.checkpoint.param_mapping import Dims, from_timm, to_timm_name
from megavit.checkpoint.state import read_state
from megavit.config.saved import from_yaml
from megavit.data.class_names import are_numbers
from megavit.data.config import PIXEL_SETTINGS
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig, Positions
from megavit.model.init import copy_part, whole_shape
from megavit.model.vit import EncoderStage, parameter_names
from megavit.parallel.collectives import broadcast_from_rank0, raise_on_all_ranks, wait_for_rank_zero
from megavit.parallel.layout import ParallelLayout

_SETTING = "init_from"
# Training uses its own crop and interpolation, not those of the pretrained weights.
_OWN_PIXELS = ("data.crop_pct", "data.interpolation")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WeightsInfo:
    """Metadata of pretrained weights.

    Attributes:
        called: name of the weights, for log lines.
        model: sizes of the network.
        image_size: [height, width] in pixels.
        channels: channels of an image.
        mean, std: normalisation of the images, per channel.
        guessed: settings among these that no file states.
        classes: names of a classifier's classes, in the order of its scores; empty without a classifier.
        names_classes: whether `classes` are names rather than numbers.
        is_probe: whether the classifier normalises its features by their statistics.
        decoder_heads: heads of a masked autoencoder's decoder, None without one.
        notes: lines on what the files state besides weights, and on what was assumed.
    """

    called: str
    model: ModelConfig
    image_size: list[int]
    channels: int
    mean: list[float]
    std: list[float]
    classes: tuple[str, ...]
    names_classes: bool
    is_probe: bool = False
    decoder_heads: int | None = None
    guessed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class WeightSource(Protocol):
    """Pretrained weights by megavit's parameter names."""

    weights_info: WeightsInfo

    def shapes(self, chunks: Mapping[str, EncoderStage], layout: ParallelLayout) -> tuple[Shapes, Shapes]:
        """Return the full shapes of the pretrained weights for this rank, and of its own parameters."""
        ...

    def load_into(
        self, chunks: Mapping[str, EncoderStage], names: set[str], layout: ParallelLayout, *, full: Shapes
    ) -> Mapping[str, Tensor]:
        """Load this rank's part of the named weights, and return the weights of `full` unsplit; every rank calls it."""
        ...


class RunWeights:
    """Weights of a megavit run.

    Args:
        weights: the checkpoint.
    """

    def __init__(self, weights: CheckpointRef) -> None:
        config = from_yaml((weights.checkpoint / "run.yaml").read_text())
        state = read_state(weights.checkpoint)
        decoder = config.task.decoder(config.model)
        self._weights = weights
        self.weights_info = WeightsInfo(
            called=str(weights),
            model=config.model,
            image_size=config.data.image_size,
            channels=config.data.channels,
            mean=config.data.mean,
            std=config.data.std,
            classes=tuple(state.classes),
            names_classes=state.names_classes,
            is_probe=config.task.norms_features,
            decoder_heads=None if decoder is None else decoder.num_heads,
            guessed=frozenset(state.assumed),
        )

    def shapes(self, chunks: Mapping[str, EncoderStage], layout: ParallelLayout) -> tuple[Shapes, Shapes]:
        """See `WeightSource`."""
        return shards.shapes_of(self._weights.checkpoint, chunks, averaged=self._weights.averaged)

    def load_into(
        self, chunks: Mapping[str, EncoderStage], names: set[str], layout: ParallelLayout, *, full: Shapes
    ) -> Mapping[str, Tensor]:
        """See `WeightSource`."""
        checkpoint, averaged = self._weights.checkpoint, self._weights.averaged
        return shards.load_some_weights(checkpoint, chunks, names, full=full, averaged=averaged)


class ExternalWeights:
    """Weights of another library; each rank reads its own part.

    Args:
        place: value of `init_from`.
        external: the other library's model.

    Raises:
        ConfigError: if the model has weights that megavit's network lacks.
    """

    def __init__(self, place: str, external: ExternalModel) -> None:
        self._external = external
        model, heads = external.model, external.decoder.get("decoder_num_heads")
        self._dims = Dims(model.num_heads, model.patch_size, heads or 0)
        unknown = external.unknown()
        if unknown:
            raise ConfigError(
                f"{_SETTING}={place}: megavit's network has no weight for {unknown[0]} ({len(unknown)} such weights), "
                f"and would compute another function without it"
            )
        grid = model.patch_grid(external.image_size)
        # An encoder without a decoder stores fixed positions as ordinary weights.
        if are_sincos(external.weight("pos_embed")[0], grid, class_tokens=model.class_tokens):
            model = replace(model, positions=Positions.sincos)
        usual = usual_heads(model.hidden_size, model.num_layers)
        unusual = "model.num_heads" in external.assumed and model.num_heads != usual
        not_stated = (
            f"note: {place} does not state its heads; model.num_heads={model.num_heads} is used, and {usual} is usual"
        )
        self.weights_info = WeightsInfo(
            called=place,
            model=model,
            image_size=external.image_size,
            channels=external.channels,
            mean=external.pixels.mean,
            std=external.pixels.std,
            # A classifier with another pooling cannot be used.
            classes=tuple(external.classes) if external.other_pooling is None else (),
            names_classes=not are_numbers(external.classes),
            decoder_heads=heads,
            guessed=frozenset((*external.assumed, *external.pixels.assumed)),
            notes=(*((not_stated,) if unusual else ()), *external.notes, *external.assumptions(typed=PIXEL_SETTINGS)),
        )

    def shapes(self, chunks: Mapping[str, EncoderStage], layout: ParallelLayout) -> tuple[Shapes, Shapes]:
        """See `WeightSource`."""
        params = {name: param for chunk in chunks.values() for name, param in parameter_names(chunk).items()}
        there = {}
        for name in params:
            weight = self._weight(name)
            if weight is not None:
                there[name] = tuple(weight.shape)
        return there, {name: tuple(whole_shape(param, layout)) for name, param in params.items()}

    def load_into(
        self, chunks: Mapping[str, EncoderStage], names: set[str], layout: ParallelLayout, *, full: Shapes
    ) -> Mapping[str, Tensor]:
        """See `WeightSource`."""
        for chunk in chunks.values():
            for name, param in parameter_names(chunk).items():
                if name in names:
                    copy_part(self._known(name), param, layout)
        return {name: self._known(name) for name in full}

    def _weight(self, name: str) -> Tensor | None:
        """Return a weight by megavit's name and in megavit's layout; None if missing."""
        try:
            timm_name = to_timm_name(name)
            return from_timm({timm_name: self._external.weight(timm_name)}, self._dims)[name]
        except (KeyError, ConfigError):
            return None

    def _known(self, name: str) -> Tensor:
        weight = self._weight(name)
        assert weight is not None
        return weight


def open_external(place: str, *, num_heads: int | None) -> ExternalModel:
    """Open another library's model, on this machine or downloaded from the hub.

    Args:
        place: value of `init_from`, with the kind of file before a colon.
        num_heads: attention heads if the files do not state them; None for the usual number.

    Raises:
        ConfigError: if the model cannot be read.
    """
    kind, _, rest = place.partition(":")
    return read_external(kind, fetch(kind, rest, setting=_SETTING), num_heads=num_heads, typed=_OWN_PIXELS)


def open_weights(place: str, *, num_heads: int) -> WeightSource:
    """Open the weights that a user names; every rank calls this.

    Args:
        place: a run or checkpoint, prefixed with `ema:` for its moving average; or `hf:`, `timm:`, `mae:` or `nemo:`
            and a path. `hf:` and `timm:` also accept an id of the Hugging Face hub.
        num_heads: attention heads of the new network, used if the files do not state them.

    Raises:
        ConfigError: on every rank, if the weights do not exist or a rank cannot read them.
    """
    kind, _, rest = place.partition(":")
    if kind not in KINDS:
        return RunWeights(broadcast_from_rank0(lambda: resolve_checkpoint(place, setting=_SETTING)))

    def look() -> None:
        fetch(kind, rest, setting=_SETTING)

    # Rank 0 downloads first, without a time limit; the others find the file or download it to their machine.
    wait_for_rank_zero(look)
    weight_source, refused = None, None
    try:
        weight_source = ExternalWeights(place, open_external(place, num_heads=num_heads))
    except ConfigError as error:
        refused = str(error)
    raise_on_all_ranks(refused)
    assert weight_source is not None
    return weight_source
