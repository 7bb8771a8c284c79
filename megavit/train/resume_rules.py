"""Define for each setting whether a resume may change it."""

from enum import Enum
from typing import Any

from megavit.config.experiment import ExperimentConfig
from megavit.config.settings import flatten
from megavit.validation import format_value


class Rule(Enum):
    """The rules for a setting that has changed before a resume.

    `free`: the run resumes; training is the same, or the setting matters at the start only. `reported`: the run
    resumes and logs the change. `run`: the resume is rejected, because the images, their order, their meaning or the
    optimizer's state would change; the weights can still be evaluated. `network`: every command that reads the weights
    rejects the change, because the weights have other shapes or compute another function.
    """

    free = "free"
    reported = "reported"
    run = "run"
    network = "network"


_SETTINGS = {
    Rule.free: (
        "run.name run.dir run.ranks run.preflight run.timeout_s "
        # A changed length is logged separately.
        "train.steps train.epochs "
        "train.micro_batch train.gradient_accumulation_fusion train.compile train.eval_every train.stop_at "
        "train.callbacks "
        "parallel.tp parallel.pp parallel.vpp parallel.sequence_parallel parallel.stages "
        "parallel.recompute parallel.recompute_method parallel.recompute_layers parallel.overlap_grad_reduce "
        "parallel.bucket_size parallel.overlap_param_gather parallel.overlap_p2p "
        "model.head_bias model.head_std model.attention_backend "
        "data.max_bad_fraction data.workers data.timeout_s "
        "optim.implementation optim.shorten_warmup "
        "checkpoint.save_every checkpoint.resume checkpoint.keep_last checkpoint.keep_every checkpoint.async_save "
        "checkpoint.best "
        "metrics.log_every metrics.tensorboard metrics.wandb metrics.pictures_every "
        "init_from"
    ),
    Rule.reported: (
        "train.global_batch train.precision train.grad_reduce train.on_nonfinite "
        "model.linear_backend model.hidden_dropout model.attention_dropout model.drop_path "
        "task.label_smoothing task.loss task.class_weights task.baseline_samples "
        "data.path data.on_bad_sample data.crop_scale data.reduced_decode data.flip data.interpolation data.crop_pct "
        "data.transform data.random_shift data.auto_augment data.randaugment_ops data.randaugment_magnitude "
        "data.randaugment_magnitude_std data.randaugment_prob data.color_jitter data.random_erasing data.mixup "
        "data.cutmix "
        "data.mixup_prob data.mixup_switch_prob "
        "optim.lr optim.base_lr optim.min_lr optim.schedule optim.decay_steps optim.warmup_steps optim.weight_decay "
        "optim.betas optim.eps optim.momentum optim.trust_coefficient optim.clip_grad optim.ema"
    ),
    Rule.run: (
        "run.seed "
        "task.implementation task.mask_ratio task.norm_pix_loss "
        "data.source data.val_fraction data.image_size data.mean data.std data.classes data.samples_per_class "
        "data.fraction data.repeats data.multi_label data.class_balanced data.num_classes data.num_samples "
        "optim.name optim.layer_decay optim.freeze"
    ),
    Rule.network: (
        "model.hidden_size model.ffn_size model.num_heads model.num_layers model.patch_size model.class_tokens "
        "model.positions model.pool model.head model.patch_bias model.qk_norm model.layer_scale model.norm_eps "
        "task.name task.decoder_hidden_size task.decoder_ffn_size task.decoder_num_heads task.decoder_num_layers "
        "data.channels"
    ),
}

RULES = {setting: rule for rule, settings in _SETTINGS.items() for setting in settings.split()}


def changes(before: ExperimentConfig, now: ExperimentConfig, *rules: Rule) -> dict[str, tuple[Any, Any]]:
    """Return the settings of these rules that differ, with the old and the new value as a user types them."""
    former, current = flatten(before), flatten(now)
    return {
        setting: (format_value(former.get(setting)), format_value(current.get(setting)))
        for setting in {**former, **current}
        if _rule(setting, now) in rules
        and _meaning(setting, former.get(setting)) != _meaning(setting, current.get(setting))
    }


def _rule(setting: str, now: ExperimentConfig) -> Rule:
    """Return a setting's rule; a task's setting without a rule in this file gets a strict one."""
    group, _, name = setting.partition(".")
    if group == "task" and setting not in RULES:
        return Rule.network if name in now.task.network_settings else Rule.run
    return RULES[setting]


def _meaning(setting: str, value: Any) -> Any:
    # The value of layer_scale is only an initial one; the network differs only if the scales exist or not.
    return value is not None if setting == "model.layer_scale" else value
