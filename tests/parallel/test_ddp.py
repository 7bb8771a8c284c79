"""The gradient buffers: a step's first micro batch writes, the others add, and unused weights have zeros."""

import torch

from tests.distributed import run_ranks
from tests.reference import SMALL


def gradients_of_two_steps(overrides: list[str]) -> dict:
    """Train all weights, then all but one; return the gradient of this one and of another."""
    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    trainer = Trainer(compose(overrides), on_step_end=[lambda report: at_end(report)], evaluates=False, saves=False)
    (chunk,) = trainer.chunks.values()
    unused, used = chunk.head.out.bias, chunk.head.out.weight
    found = {"held": []}

    def at_end(report) -> None:
        # The buffers after the step: nothing has written to them since.
        found["held"].append((unused.main_grad.clone(), used.main_grad.clone()))
        # Remove the head's bias, so that it gets no gradient in the next step.
        chunk.head.out.forward = lambda features: features @ used.t()

    trainer.run()
    return found


def test_a_weight_that_takes_no_part_in_a_step_has_no_gradient_left_from_the_last(tmp_path):
    overrides = [*SMALL, "train.steps=2", "optim.warmup_steps=1", f"run.dir={tmp_path}"]
    first, second = run_ranks(gradients_of_two_steps, 1, overrides)[0]["held"]
    assert first[0].abs().max() > 0
    assert torch.equal(second[0], torch.zeros_like(second[0]))
    assert second[1].abs().max() > 0
    assert not torch.equal(first[1], second[1])
