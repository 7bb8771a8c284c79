"""Check a full configuration: settings of one group against those of another, and against the world size."""

from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import check_warmup, resolve_micro_batch, resolve_num_microbatches
from megavit.config.train import Compile, GradReduce, Precision
from megavit.errors import ConfigError
from megavit.model.config import AttentionBackend, LinearBackend
from megavit.optim.config import ENCODER
from megavit.optim.registry import is_sharded
from megavit.parallel.config import Recompute
from megavit.parallel.stages import plan_stages
from megavit.plugins import check_name
from megavit.validation import format_value, require_number, require_steps


def validate(config: ExperimentConfig, world_size: int) -> None:
    """Check each group, then the groups against each other and against the world size.

    The first check that fails is reported: later checks compute with what earlier ones have accepted.

    Args:
        config: of the run.
        world_size: number of ranks.

    Raises:
        ConfigError: with the setting, the arithmetic and the way out.
    """
    config.run.check(world_size)
    groups = (config.parallel, config.model, config.task, config.data, config.optim, config.checkpoint, config.metrics)
    for group in groups:
        group.check()
    for check in _CHECKS:
        check(config, world_size)


def _check_init_from(config: ExperimentConfig, world_size: int) -> None:
    if config.init_from is not None and config.checkpoint.resume not in ("auto", "never"):
        raise ConfigError(
            f"init_from={config.init_from} and checkpoint.resume={config.checkpoint.resume} exclude each other: a run "
            f"starts from weights, or continues with all its state"
        )


def _check_layer_decay(config: ExperimentConfig, world_size: int) -> None:
    if config.optim.layer_decay is not None and ENCODER in config.frozen:
        raise ConfigError(
            f"optim.layer_decay={config.optim.layer_decay} would be ignored: no layer of the encoder is trained; set "
            f"it to null"
        )


def _check_stages(config: ExperimentConfig, world_size: int) -> None:
    plan_stages(config.parallel, config.network_shape(num_classes=config.data.num_classes or 0))


def _check_train(config: ExperimentConfig, world_size: int) -> None:
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        both = f"train.steps={format_value(train.steps)} and train.epochs={format_value(train.epochs)}"
        raise ConfigError(
            "say how long to train: train.epochs=10 or train.steps=1000, for example"
            if train.steps is None
            else f"{both} both say how long to train; set one of them to null"
        )
    require_number("train", train, "steps", "global_batch", "micro_batch", "stop_at", at_least=1)
    require_steps("train", train, "eval_every", at_least=1)
    for name in train.callbacks or ():
        check_name(name, "train.callbacks")
    require_number("train", train, "epochs", above=0)
    if train.stop_at is not None and train.steps is not None and train.stop_at > train.steps:
        raise ConfigError(f"train.stop_at={train.stop_at} is after the last step, train.steps={train.steps}")
    if train.steps is not None:
        check_warmup(config, train.steps)
    if isinstance(train.eval_every, int) and config.data.val_fraction == 0:
        raise ConfigError(
            f"train.eval_every={train.eval_every} would be ignored: data.val_fraction=0 leaves no images to "
            f"validate on; set train.eval_every=null, or data.val_fraction=0.1 for example"
        )
    peak = config.optim.peak_lr(train.global_batch)
    if config.optim.min_lr > peak:
        raise ConfigError(f"optim.min_lr={config.optim.min_lr} is above the peak learning rate {peak:g}; lower it")


def _check_precision(config: ExperimentConfig, world_size: int) -> None:
    train, model = config.train, config.model
    if train.grad_reduce is GradReduce.bf16 and train.precision is not Precision.bf16_o2:
        raise ConfigError(
            "train.grad_reduce=bf16 needs bf16 gradients, and train.precision=fp32 makes none; set "
            "train.precision=bf16_o2 or train.grad_reduce=fp32"
        )
    if (
        model.attention_backend in (AttentionBackend.sdpa_flash, AttentionBackend.flash_attn)
        and train.precision is Precision.fp32
    ):
        raise ConfigError(
            f"model.attention_backend={model.attention_backend.value} computes in bf16 alone, and "
            "train.precision=fp32; set "
            f"train.precision=bf16_o2 or model.attention_backend=sdpa"
        )
    if train.compile is Compile.layer:
        if config.parallel.tp > 1:
            raise ConfigError(
                f"train.compile=layer makes one graph of a layer, and parallel.tp={config.parallel.tp} breaks it at "
                f"every all-reduce; set parallel.tp=1 or train.compile=none"
            )
        if config.parallel.recompute is Recompute.selective:
            raise ConfigError(
                "train.compile=layer and parallel.recompute=selective exclude each other: the compiler decides "
                "itself what a layer keeps; set parallel.recompute to none or full"
            )
        if model.linear_backend is LinearBackend.te or model.attention_backend in (
            AttentionBackend.te,
            AttentionBackend.flash_attn,
        ):
            raise ConfigError(
                "train.compile=layer needs torch's own parts: set model.linear_backend=local and "
                "model.attention_backend to sdpa "
                "or sdpa_flash, or train.compile=none"
            )


def _check_fusion(config: ExperimentConfig, world_size: int) -> None:
    train, tp = config.train, config.parallel.tp
    if not train.gradient_accumulation_fusion:
        return
    instead = "or train.gradient_accumulation_fusion=false"
    if tp > 1:
        raise ConfigError(
            f"train.gradient_accumulation_fusion=true is for layers that one rank computes, and "
            f"parallel.tp={tp} splits them; set parallel.tp=1, {instead}"
        )
    if config.model.linear_backend is not LinearBackend.local:
        raise ConfigError(
            "train.gradient_accumulation_fusion=true would be ignored: "
            f"model.linear_backend={config.model.linear_backend.value} "
            f"multiplies by itself; set model.linear_backend=local, {instead}"
        )
    if train.compile is Compile.layer:
        raise ConfigError(
            "train.gradient_accumulation_fusion=true would be ignored: train.compile=layer leaves the products to "
            f"the compiler; set train.compile=none, {instead}"
        )


def _check_linears(config: ExperimentConfig, world_size: int) -> None:
    linears, precision = config.model.linear_backend, config.train.precision
    if linears is LinearBackend.onednn:
        if precision is not Precision.fp32:
            raise ConfigError(
                "model.linear_backend=onednn is for fp32: torch itself gives bf16 products to oneDNN; set "
                "model.linear_backend=local, or train.precision=fp32"
            )
        if config.parallel.sequence_parallel:
            raise ConfigError(
                "model.linear_backend=onednn does not split tokens; set model.linear_backend=local or "
                "parallel.sequence_parallel=false"
            )
    if linears is LinearBackend.fp8:
        if precision is not Precision.bf16_o2:
            raise ConfigError(
                "model.linear_backend=fp8 rounds bf16 numbers, and train.precision=fp32 has none; set "
                "train.precision=bf16_o2 or model.linear_backend=local"
            )
        for group, prefix in _groups_of_sizes(config):
            _check_eight_bit_sizes(config, group, f"{prefix}hidden_size", f"{prefix}ffn_size")


def _groups_of_sizes(config: ExperimentConfig) -> list[tuple[str, str]]:
    """Return the group and the prefix of the settings of each transformer: the encoder's, and the decoder's if any."""
    decoder = config.task.decoder(config.model)
    return [("model", "")] if decoder is None else [("model", ""), ("task", "decoder_")]


def _check_eight_bit_sizes(config: ExperimentConfig, group: str, *keys: str) -> None:
    """Refuse widths whose part on a rank cuBLAS cannot multiply in 8 bits; on a CPU too, as a GPU would."""
    tp = config.parallel.tp
    for key in keys:
        size = getattr(getattr(config, group), key)
        if size is not None and size % (16 * tp):
            raise ConfigError(
                "model.linear_backend=fp8 needs widths in multiples of 16 on every rank, and "
                f"{group}.{key}={size} over "
                f"parallel.tp={tp} is none: {size} mod {16 * tp} = {size % (16 * tp)}; set "
                "model.linear_backend=local, or "
                f"change {group}.{key}{' or lower parallel.tp' if tp > 1 else ''}"
            )


def _check_overlap(config: ExperimentConfig, world_size: int) -> None:
    dp = config.parallel.data_parallel_size(world_size)
    if config.parallel.overlap_grad_reduce and dp == 1:
        raise ConfigError(
            f"parallel.overlap_grad_reduce=true would be ignored: world size {world_size} leaves data-parallel "
            f"size 1, nothing is reduced; set it to false"
        )
    if config.parallel.overlap_param_gather and not is_sharded(config.optim.name):
        raise ConfigError(
            f"parallel.overlap_param_gather=true needs weights that the optimizer shards, as optim=adamw does; "
            f"optim.name={config.optim.name} does not shard them: set it to false"
        )
    if config.parallel.overlap_param_gather and config.optim.ema is not None:
        raise ConfigError(
            f"optim.ema={config.optim.ema} averages the weights after each step, and parallel.overlap_param_gather="
            f"true gathers them only during the next one; set one of them to null or false"
        )
    portions = resolve_num_microbatches(config, world_size)
    if config.parallel.vpp > 1 and portions % config.parallel.pp:
        raise ConfigError(
            f"parallel.vpp={config.parallel.vpp} needs micro batches per step in multiples of parallel.pp="
            f"{config.parallel.pp}, not train.global_batch={config.train.global_batch} / (train.micro_batch="
            f"{resolve_micro_batch(config, world_size)} × data-parallel size {dp}) = {portions}; change "
            f"train.global_batch or train.micro_batch"
        )


def check_task(config: ExperimentConfig) -> None:
    """Raise ConfigError for settings of other groups that the task would ignore."""
    config.task.check_groups(model=config.model, data=config.data, optim=config.optim)
    if config.metrics.pictures_every is not None and not config.task.makes_pictures:
        raise ConfigError(
            f"metrics.pictures_every={config.metrics.pictures_every} would be ignored by task.name="
            f"{config.task.name}, which has nothing to paint; set it to null"
        )


def _check_tensor_parallel(config: ExperimentConfig, world_size: int) -> None:
    for group, prefix in _groups_of_sizes(config):
        _check_splits(config, group, f"{prefix}num_heads", f"{prefix}ffn_size")
    tp, tokens, seen = config.parallel.tp, config.encoder_tokens, config.visible_patches
    if config.parallel.sequence_parallel and tokens % tp:
        hides = f" (task.mask_ratio={getattr(config.task, 'mask_ratio', None)} hides {config.num_patches - seen})"
        others = [count for count in (0, 1, 8) if (seen + count) % tp == 0]
        ways = [f"model.class_tokens={count} ({seen} + {count} = {seen + count})" for count in others]
        raise ConfigError(
            f"parallel.sequence_parallel=true splits {seen} patches{hides if seen < config.num_patches else ''} + "
            f"{config.model.class_tokens} class tokens = "
            f"{tokens} tokens over parallel.tp={tp} ranks: {tokens} mod {tp} = {tokens % tp}; "
            f"set {' or '.join([*ways, 'parallel.sequence_parallel=false'])}, or change data.image_size"
        )


def _check_splits(config: ExperimentConfig, group: str, heads_key: str, ffn_key: str) -> None:
    """Refuse heads or an MLP that cannot be split over the tensor-parallel ranks."""
    tp, sizes = config.parallel.tp, getattr(config, group)
    heads, ffn = getattr(sizes, heads_key), getattr(sizes, ffn_key)
    for key, value in ((heads_key, heads), (ffn_key, ffn)):
        if value is not None and value % tp:
            fits = next(size for size in range(tp, 0, -1) if heads % size == 0 == ffn % size)
            raise ConfigError(
                f"{group}.{key}={value} is not divided by parallel.tp={tp}: {value} mod {tp} = {value % tp}; "
                f"set parallel.tp={fits}, or change {group}.{key}"
            )


def _check_batch(config: ExperimentConfig, world_size: int) -> None:
    dp = config.parallel.data_parallel_size(world_size)
    micro = resolve_micro_batch(config, world_size)
    portion = micro * dp
    if config.train.global_batch % portion:
        near = max(1, round(config.train.global_batch / portion)) * portion
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} is not a multiple of train.micro_batch="
            f"{micro} × data-parallel size {dp} = {portion}; set train.global_batch={near}, or "
            f"a train.micro_batch that divides {config.train.global_batch / dp:g}"
        )
    if config.data.mixes and micro % 2:
        key = "mixup" if config.data.mixup is not None else "cutmix"
        raise ConfigError(
            f"data.{key}={getattr(config.data, key)} mixes the images of a micro batch in pairs, and "
            f"train.micro_batch={micro} leaves one over: {micro} mod 2 = 1; set "
            f"train.micro_batch={max(2, micro - 1)}, and a train.global_batch that it divides"
        )


def _check_task(config: ExperimentConfig, world_size: int) -> None:
    check_task(config)


# In this order: a check may rely on those before it.
_CHECKS = (
    _check_init_from,
    _check_train,
    _check_task,
    _check_layer_decay,
    _check_tensor_parallel,
    _check_batch,
    _check_precision,
    _check_linears,
    _check_fusion,
    _check_overlap,
    _check_stages,
)
