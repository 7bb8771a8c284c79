"""Weight gradients added straight to the gradient buffers: equal to autograd's, without a temporary tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megavit.model.layers.linear import accumulating_linear
from tests.distributed import run_ranks
from tests.reference import SMALL


def buffered(weight: torch.Tensor) -> torch.nn.Parameter:
    """Return a weight at the start of a step, with the last step's gradient in its buffer."""
    parameter = torch.nn.Parameter(weight)
    parameter.main_grad = torch.full_like(weight, torch.nan)
    parameter.is_grad_stale, parameter.grad_added_to_main_grad = True, False
    return parameter


@pytest.mark.parametrize("shape", [(5, 7, 12), (3, 12), (1, 1, 12)])
def test_micro_batches_leave_the_sum_of_their_gradients_and_pass_theirs_on(shape):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 12, generator=generator), torch.randn(8, generator=generator, requires_grad=True)
    ours, theirs = buffered(weight), torch.nn.Parameter(weight.double())
    their_bias = bias.detach().double().requires_grad_()
    for _ in range(3):
        x = torch.randn(shape, generator=generator, requires_grad=True)
        its = x.detach().double().requires_grad_()
        product, want = accumulating_linear(x, ours, bias), F.linear(its, theirs, their_bias)
        onward = torch.randn(product.shape, generator=generator)
        product.backward(onward)
        want.backward(onward.double())
        ours.is_grad_stale, ours.grad = False, None
        torch.testing.assert_close(product.double(), want, atol=2e-6, rtol=0)
        torch.testing.assert_close(x.grad.double(), its.grad, atol=2e-6, rtol=0)
    assert ours.grad_added_to_main_grad
    torch.testing.assert_close(ours.main_grad.double(), theirs.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(bias.grad.double(), their_bias.grad, atol=1e-5, rtol=0)


class Written(TorchDispatchMode):
    """Record the operators that made or changed a tensor of a shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.found = shape, set()

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        output = operator(*arguments, **(named or {}))
        if torch.is_tensor(output) and output.shape == self.shape and not operator.is_view:
            self.found.add(operator.overloadpacket.__name__)
        return output


def writers_of_a_step(overrides: list[str]) -> tuple[set[str], bool]:
    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    config = compose(overrides)
    trainer = Trainer(config)
    (chunk,) = trainer.chunks.values()
    weight = chunk.blocks.layers[0].mlp.fc1.weight
    written = Written(weight.shape)
    batches = trainer.train_loader.train_batches(0, num_steps=1, global_batch=config.train.global_batch)
    with written:
        trainer.engine.accumulate(batches, trainer.resolved.num_microbatches)
    return written.found, weight.grad is None


def test_no_matrix_of_a_layer_has_a_gradient_outside_its_buffer(tmp_path):
    """In two micro batches only the product writes a tensor of the matrix's shape: no copy and no addition does."""
    keys = [
        *SMALL,
        "train.gradient_accumulation_fusion=true",
        "train.steps=1",
        "optim.warmup_steps=0",
        "train.micro_batch=3",
        "train.global_batch=6",
    ]
    found, has_no_gradient = run_ranks(writers_of_a_step, 1, [*keys, f"run.dir={tmp_path}"])[0]
    assert found == {"addmm"}
    assert has_no_gradient
