"""The serial computation that distributed tests compare with: plain torch, no Megatron-Core."""

import math
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from timm.optim import Lars

from benchmarks.step.torch_mae import TorchMae
from megavit.checkpoint.param_mapping import Dims, to_timm
from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_num_steps
from megavit.data.sampler import DeterministicSampler, SampleKey
from megavit.data.sources.digits import Digits
from megavit.model.torch_vit import TorchViT
from megavit.optim.config import Schedule
from megavit.task.masking import random_keep

# A model small enough for a test and odd enough to show a mistake; ten steps on real digits without augmentation.
SMALL = [
    "model.hidden_size=32",
    "model.ffn_size=64",
    "model.num_heads=4",
    "model.num_layers=4",
    "model.drop_path=0",
    "data.random_shift=0",
    "train.steps=10",
    "train.global_batch=16",
    "train.micro_batch=4",
    "train.eval_every=null",
    "optim.lr=1e-3",
    "optim.warmup_steps=2",
    "metrics.log_every=1",
    "metrics.tensorboard=false",
    # These have tests of their own.
    "run.preflight=false",
    "checkpoint.best=false",
]


@dataclass
class Result:
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]
    averages: dict[str, torch.Tensor] | None = None


def dims_of(config: ExperimentConfig) -> Dims:
    decoder = config.task.decoder(config.model)
    return Dims(config.model.num_heads, config.model.patch_size, 0 if decoder is None else decoder.num_heads)


def plain_model(config: ExperimentConfig) -> TorchViT | TorchMae:
    """The plain model with the weights that megavit starts from."""
    from megavit.model.init import initial_weight

    shape = {"image_size": config.data.image_size, "channels": config.data.channels}
    if config.task.name == "mae":
        model = TorchMae(config.model, config.task.decoder(config.model), **shape)
    else:
        model = TorchViT(config.model, **shape, num_classes=10)
    model.load_state_dict(to_timm(initial_weights(model, config, initial_weight), dims_of(config)))
    return model


def initial_weights(model: torch.nn.Module, config: ExperimentConfig, initial_weight) -> dict[str, torch.Tensor]:
    from megavit.checkpoint.param_mapping import from_timm

    ours = from_timm(model.state_dict(), dims_of(config))
    return {
        name: initial_weight(name, weight.shape, config.model, seed=config.run.seed) for name, weight in ours.items()
    }


def decays(name: str, weight: torch.Tensor) -> bool:
    return weight.ndim > 1 and name not in ("cls_token", "pos_embed", "mask_token")


def learning_rate(config: ExperimentConfig, step: int, steps: int) -> float:
    peak, warmup = config.optim.peak_lr(config.train.global_batch), config.optim.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if config.optim.schedule is Schedule.constant:
        return peak
    fraction = (step - warmup) / (steps - warmup)
    if config.optim.schedule is Schedule.wsd:
        fraction = max(0, step - (steps - config.optim.decay_steps)) / config.optim.decay_steps
    if config.optim.schedule in (Schedule.linear, Schedule.wsd):
        return peak + (config.optim.min_lr - peak) * fraction
    return config.optim.min_lr + (peak - config.optim.min_lr) * 0.5 * (1 + math.cos(math.pi * fraction))


def layer_share(name: str, config: ExperimentConfig) -> float:
    """Of the learning rate, by the plain name: the embedding's is the smallest, the last norm's and the head's 1."""
    above = 0
    if name.startswith("blocks."):
        above = config.model.num_layers - int(name.split(".")[1])
    elif name.startswith(("patch_embed", "cls_token", "pos_embed")):
        above = config.model.num_layers + 1
    return (config.optim.layer_decay or 1.0) ** above


def make_optimizer(model: torch.nn.Module, config: ExperimentConfig) -> torch.optim.Optimizer:
    groups = []
    for name, weight in model.named_parameters():
        decayed = decays(name, weight)
        groups.append({"params": [weight], "weight_decay": config.optim.weight_decay if decayed else 0.0})
        groups[-1]["share"] = layer_share(name, config)
        if config.optim.name == "lars":
            groups[-1]["always_adapt"] = decayed
    if config.optim.name == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=config.optim.momentum)
    if config.optim.name == "lars":
        return Lars(groups, lr=1.0, momentum=config.optim.momentum, trust_coeff=config.optim.trust_coefficient)
    return torch.optim.AdamW(groups, lr=1.0, betas=tuple(config.optim.betas), eps=config.optim.eps)


def masks_of(keys: list[SampleKey], config: ExperimentConfig) -> torch.Tensor:
    ids, epochs = torch.tensor([key.sample_id for key in keys]), torch.tensor([key.epoch for key in keys])
    kept = config.task.num_visible_patches(config.num_patches)
    return random_keep(ids, epochs, torch.zeros_like(ids), config.num_patches, num_kept=kept, seed=config.run.seed)


def mae_loss(model: TorchMae, images: torch.Tensor, keep: torch.Tensor, *, norm_pix_loss: bool) -> torch.Tensor:
    """As in the paper, written anew: mean squared error of the hidden patches, their values row, column, channel."""
    p = model.patch_size
    target = F.unfold(images, p, stride=p).unflatten(1, (-1, p * p)).permute(0, 3, 2, 1).flatten(2)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (model(images, keep) - target).square().mean(-1)
    hidden = [[patch for patch in range(error.shape[1]) if patch not in set(row)] for row in keep.tolist()]
    return error.gather(1, torch.tensor(hidden)).mean()


def train_torch(overrides: list[str]) -> Result:
    """Train the plain model as the configuration says, step by step, whole batches on one process."""
    torch.set_num_threads(1)
    config = compose(overrides)
    source = Digits("train")
    steps = resolve_num_steps(config, len(source))
    model, order = plain_model(config), DeterministicSampler(len(source), seed=config.run.seed)
    probes, feature_norm = config.task.name == "linear_probe", None
    if probes:
        feature_norm = torch.nn.BatchNorm1d(config.model.hidden_size, eps=1e-6, affine=False)
    for name, weight in model.named_parameters():
        frozen = any(fnmatch(name, pattern) for pattern in config.optim.freeze or ())
        weight.requires_grad_(name.startswith("head.") if probes else not frozen)
    optimizer = make_optimizer(model, config)
    result = Result([], [], {})
    size, ema = config.train.global_batch, config.optim.ema
    averages = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    for step in range(steps):
        ids = [order.at(step * size + i).sample_id for i in range(size)]
        images = torch.stack([source.image(i) for i in ids]).float() / 255
        images = (images - config.data.mean[0]) / config.data.std[0]
        if config.task.name == "mae":
            keys = [order.at(step * size + i) for i in range(size)]
            loss = mae_loss(model, images, masks_of(keys, config), norm_pix_loss=config.task.norm_pix_loss)
        else:
            labels = torch.tensor([source.label(i) for i in ids])
            scores = model.head(feature_norm(model.features(images))) if probes else model(images)
            loss = F.cross_entropy(scores, labels, label_smoothing=config.task.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step + 1, steps) * group["share"]
        optimizer.step()
        for name, weight in model.state_dict().items():
            averages[name] = (ema or 0) * averages[name] + (1 - (ema or 0)) * weight
        result.losses.append(loss.item())
        result.grad_norms.append(norm.item())
    result.weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    result.averages = averages
    return result
