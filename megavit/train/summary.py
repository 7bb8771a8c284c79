"""Describe a run in log lines before the first step: layout, data, batch, optimizer, kernel, schedule."""

from collections.abc import Iterator, Mapping

import torch

from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import ResolvedRun
from megavit.config.settings import flatten
from megavit.config.train import Precision
from megavit.config.untested import untested
from megavit.data.sources.base import Source
from megavit.data.sources.label_checks import describe_oddities
from megavit.model.config import AttentionBackend
from megavit.model.layers.attention_backends import sdpa_choice
from megavit.optim.config import ENCODER, OptimConfig
from megavit.optim.optimizer import find_spec, state_bytes
from megavit.optim.registry import is_sharded
from megavit.parallel.layout import ParallelLayout
from megavit.planner.flops import NetworkShape, embedding_flops, forward_flops, head_flops, layer_flops
from megavit.planner.stage_balance import useful_stages
from megavit.plugins import is_plugin, origin
from megavit.train.freeze import count_weights
from megavit.train.setup import ModelSetup
from megavit.validation import AUTO

_FP32_BYTES = 4

# After this many times 1 / (1 - decay) steps, the initial weights still make up 5 % (e ** -3) of an average.
_TIME_CONSTANTS = 3


def describe_run(
    config: ExperimentConfig,
    layout: ParallelLayout,
    network: ModelSetup,
    *,
    sources: Mapping[str, Source],
    from_scratch: bool,
) -> Iterator[str]:
    """Yield the lines in order; every rank calls this.

    Args:
        config: the run's configuration.
        layout: this rank's place.
        network: this rank's part of the network.
        sources: the data of `train` and, if it exists, of `val`.
        from_scratch: whether the weights are the random initial ones.
    """
    model = config.model
    yield f"run {config.run.name} in {config.run.dir}: {layout.describe()}"
    yield describe_data(config, sources)
    yield from describe_oddities(sources)
    resolved = network.resolved
    stages = f", layers per stage {resolved.stages}" if layout.pp > 1 else ""
    yield (
        f"{config.encoder_tokens} tokens, {model.num_layers} layers of {model.hidden_size}{stages}; "
        f"{config.train.global_batch} images per step = {resolved.num_microbatches} micro "
        f"batches of {resolved.micro_batch} × DP {layout.dp}"
    )
    decoder = resolved.shape.decoder
    if decoder is not None:
        yield (
            f"{config.visible_patches} of {config.num_patches} patches are visible; the decoder, {decoder.layers} "
            f"layers of {decoder.hidden} on {decoder.tokens} tokens, costs as much as "
            f"{head_flops(resolved.shape) / layer_flops(resolved.shape):.1f} encoder layers"
            f"{describe_costly_decoder(resolved.shape)}"
        )
    plugins = {
        "data.source": config.data.source,
        "data.transform": config.data.transform,
        "task.implementation": config.task.implementation,
        "optim.name": config.optim.name,
    }
    callbacks = [("train.callbacks", name) for name in config.train.callbacks or ()]
    for setting, name in (*plugins.items(), *callbacks):
        if name is not None and is_plugin(name):
            yield f"{setting} is {name}, from {origin(name)}"
    yield from idle_stages(config, resolved.shape)
    trained, every = count_weights(network.chunks, layout=layout)
    bf16 = config.train.precision is Precision.bf16_o2
    yield describe_optimizer(config.optim, num_trained=trained, num_weights=every, bf16=bf16, dp=layout.dp)
    warning = warn_of_optimizer(config.optim, from_scratch=from_scratch)
    if warning is not None:
        yield warning
    if from_scratch and ENCODER in config.frozen:
        yield "warning: the encoder is frozen with random initial weights; set init_from=RUN to load pretrained ones"
    yield f"precision {config.train.precision.value}; attention kernel {_kernel(config, layout, network)}"
    settings = untested(flatten(config), device=layout.device.type)
    if settings:
        yield f"not verified on a GPU yet: {', '.join(settings)}"


def describe_costly_decoder(shape: NetworkShape) -> str:
    """Describe a decoder that costs more than its encoder; return an empty text for any other."""
    decoder = head_flops(shape)
    encoder = forward_flops(shape) - decoder
    if decoder <= encoder:
        return ""
    return (
        f", {decoder / encoder:.1f} times the full encoder: fewer task.decoder_num_layers or a smaller "
        f"task.decoder_hidden_size cost less"
    )


def describe_data(config: ExperimentConfig, sources: Mapping[str, Source]) -> str:
    """Describe the number of images, of classes, and of training and validation images."""
    place = f" {config.data.path}" if config.data.path is not None else ""
    train, val = (len(sources[split]) if split in sources else 0 for split in ("train", "val"))
    classes = len(sources["train"].classes)
    return (
        f"data {config.data.source}{place}: {train + val:,} images{f' of {classes:,} classes' if classes else ''}, "
        f"{train:,} for training and {f'{val:,}' if val else 'none'} for validation"
    )


def describe_pace(config: ExperimentConfig, resolved: ResolvedRun) -> Iterator[str]:
    """Describe the values of `auto`, a shortened warm-up, and a moving average that is too slow.

    Args:
        config: the run's configuration.
        resolved: the run's length and intervals.
    """
    pace, num_steps = resolved.pace, resolved.num_steps
    often = {"train.eval_every": (config.train.eval_every, pace.eval_every)}
    often["checkpoint.save_every"] = (config.checkpoint.save_every, pace.save_every)
    chosen = [f"{key}={steps}" for key, (asked, steps) in often.items() if asked == AUTO and steps is not None]
    if chosen:
        yield f"by default {' and '.join(chosen)} of {num_steps} steps: once an epoch, at most 50 times a run"
    warmup = config.optim.warmup_steps
    if warmup == AUTO:
        yield f"by default optim.warmup_steps={pace.warmup_steps} of {num_steps} steps: 5 %, at most 5 epochs"
    elif warmup != pace.warmup_steps:
        falling = config.optim.decay_steps
        beside = f" with optim.decay_steps={falling}" if falling is not None else ""
        yield (
            f"optim.warmup_steps={warmup} does not fit the run's {num_steps} steps{beside}: shortened to "
            f"{pace.warmup_steps}, at most 5 % of them"
        )
    warning = warn_of_average(config.optim, num_steps=num_steps)
    if warning is not None:
        yield warning


def idle_stages(config: ExperimentConfig, shape: NetworkShape) -> Iterator[str]:
    """Warn if all pipeline stages wait for the last one, which holds the whole decoder."""
    parallel = config.parallel
    if shape.decoder is None or parallel.pp == 1 or parallel.stages is not None or parallel.vpp > 1:
        return
    layer = layer_flops(shape)
    costs = {"first_cost": embedding_flops(shape) / layer, "last_cost": head_flops(shape) / layer}
    useful = useful_stages(shape.layers, parallel.pp, **costs)
    if useful == parallel.pp:
        return
    full = shape.layers + sum(costs.values())
    yield (
        f"parallel.pp={parallel.pp} is no faster than {useful}: the last stage holds the whole decoder, "
        f"{costs['last_cost']:.1f} of {full:.1f} encoder layers, and the others wait for it; at most "
        f"{full / costs['last_cost']:.1f} times one stage's speed. Give the ranks to data or tensor parallelism"
    )


def _kernel(config: ExperimentConfig, layout: ParallelLayout, network: ModelSetup) -> str:
    model = config.model
    if model.attention_backend is not AttentionBackend.sdpa:
        return model.attention_backend.value
    heads, width = model.num_heads // layout.tp, model.hidden_size // model.num_heads
    dtype = network.mcore_config.params_dtype
    queries = torch.empty(1, heads, config.encoder_tokens, width, dtype=dtype, device=layout.device)
    return f"sdpa, for which torch chooses {sdpa_choice(queries)}"


def describe_optimizer(config: OptimConfig, *, num_trained: int, num_weights: int, bf16: bool, dp: int) -> str:
    """Describe in one line the optimizer, its bytes per weight, and the number of trained weights.

    Args:
        config: the optim group.
        num_trained: number of weights of the full model that are not frozen.
        num_weights: number of weights of the full model.
        bf16: whether the optimizer updates fp32 copies of bf16 weights.
        dp: number of data-parallel ranks, over which Adam's state is sharded.
    """
    parts = [f"{state_bytes(config)} bytes of state for each weight"]
    if bf16:
        parts.append(f"{_FP32_BYTES} of its fp32 copy")
    shared = is_sharded(config.name) and dp > 1
    held = f"shared by {dp} data-parallel ranks" if shared else ("on every data-parallel rank" if dp > 1 else "")
    of_all = "all" if num_trained == num_weights else f"{num_trained:,} of the"
    trains = f"trains {of_all} {num_weights:,} weights"
    return f"optimizer {config.name}: {' + '.join(parts)}{f', {held}' if held else ''}; {trains}"


def warn_of_optimizer(config: OptimConfig, *, from_scratch: bool) -> str | None:
    """Return a warning of the literature against this optimizer; None if there is none.

    Args:
        config: the optim group.
        from_scratch: whether the trained weights start from random initial values.
    """
    warning = find_spec(config).warning_from_scratch
    return f"warning: {warning}" if warning is not None and from_scratch else None


def warn_of_average(config: OptimConfig, *, num_steps: int) -> str | None:
    """Return a warning if a run is too short for the moving average of its weights, else None.

    Args:
        config: the optim group.
        num_steps: number of steps of the full run.
    """
    if config.ema is None or num_steps * (1 - config.ema) >= _TIME_CONSTANTS:
        return None
    # Rounding 5 / steps to one digit lowers it by a third at most, so the rounded value still fits.
    fitting = 1 - float(f"{5 / num_steps:.1g}")
    way_out = f"optim.ema={fitting:g}" if fitting > 0 else "optim.ema=null"
    return (
        f"warning: optim.ema={config.ema:g} averages over about {1 / (1 - config.ema):,.0f} steps and the run has "
        f"{num_steps:,}: the average, by which the best checkpoint is chosen, stays close to the initial weights; set "
        f"{way_out}"
    )
