"""The serial computation that distributed tests compare with: plain torch, no Megatron-Core."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megavit.checkpoint.names import Dims, to_plain
from megavit.compose import compose
from megavit.config import RunConfig
from megavit.data.digits import Digits
from megavit.data.order import SampleOrder
from megavit.model.config import ModelConfig
from megavit.model.plain import PlainViT
from megavit.optim.config import Decay, Optimizer

# A model small enough for a test and odd enough to show a mistake; ten steps on real digits without augmentation.
SMALL = [
    "model.hidden_size=32",
    "model.ffn_size=64",
    "model.num_heads=4",
    "model.num_layers=4",
    "model.drop_path=0",
    "data.shift=0",
    "train.steps=10",
    "train.global_batch=16",
    "train.micro_batch=4",
    "train.eval_every=null",
    "optim.lr=1e-3",
    "optim.warmup_steps=2",
    "metrics.every=1",
    "metrics.tensorboard=false",
]


@dataclass
class Result:
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]


def dims_of(config: ModelConfig) -> Dims:
    return Dims(config.num_heads, config.patch_size)


def plain_model(config: RunConfig) -> PlainViT:
    """The plain ViT with the weights that megavit starts from."""
    from megavit.model.init import initial_weight

    model = PlainViT(config.model, image_size=config.data.image_size, channels=config.data.channels, num_classes=10)
    model.load_state_dict(to_plain(initial_weights(model, config, initial_weight), dims_of(config.model)))
    return model


def initial_weights(model: PlainViT, config: RunConfig, initial_weight) -> dict[str, torch.Tensor]:
    from megavit.checkpoint.names import from_plain

    ours = from_plain(model.state_dict(), dims_of(config.model))
    return {
        name: initial_weight(name, weight.shape, config.model, seed=config.run.seed) for name, weight in ours.items()
    }


def decays(name: str, weight: torch.Tensor) -> bool:
    return weight.ndim > 1 and name not in ("cls_token", "pos_embed")


def learning_rate(config: RunConfig, step: int, steps: int) -> float:
    peak, warmup = config.optim.peak_lr(config.train.global_batch), config.optim.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if config.optim.decay is Decay.constant:
        return peak
    fraction = (step - warmup) / (steps - warmup)
    if config.optim.decay is Decay.wsd:
        fraction = max(0, step - (steps - config.optim.decay_steps)) / config.optim.decay_steps
    if config.optim.decay in (Decay.linear, Decay.wsd):
        return peak + (config.optim.min_lr - peak) * fraction
    return config.optim.min_lr + (peak - config.optim.min_lr) * 0.5 * (1 + math.cos(math.pi * fraction))


def make_optimizer(model: PlainViT, config: RunConfig) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.optim.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    if config.optim.name is Optimizer.sgd:
        return torch.optim.SGD(groups, lr=1.0, momentum=config.optim.momentum)
    return torch.optim.AdamW(groups, lr=1.0, betas=tuple(config.optim.betas), eps=config.optim.eps)


def train_plain(overrides: list[str]) -> Result:
    """Train the plain model as the configuration says, step by step, whole batches on one process."""
    torch.set_num_threads(1)
    config = compose(overrides)
    source = Digits("train")
    steps = config.num_steps(len(source))
    model, order = plain_model(config), SampleOrder(len(source), seed=config.run.seed)
    optimizer = make_optimizer(model, config)
    result = Result([], [], {})
    size = config.train.global_batch
    for step in range(steps):
        ids = [order.at(step * size + i).sample_id for i in range(size)]
        images = torch.stack([source.image(i) for i in ids]).float() / 255
        images = (images - config.data.mean[0]) / config.data.std[0]
        labels = torch.tensor([source.label(i) for i in ids])
        loss = F.cross_entropy(model(images), labels, label_smoothing=config.task.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step + 1, steps)
        optimizer.step()
        result.losses.append(loss.item())
        result.grad_norms.append(norm.item())
    result.weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    return result
