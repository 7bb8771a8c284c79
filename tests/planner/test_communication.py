import pytest

from megavit.planner.communication import Share, Split, Work, padded_values, tensor_exchanges
from megavit.planner.flops import NetworkShape

B16 = NetworkShape(hidden=768, ffn=3072, layers=12, tokens=204, patches=196, patch_values=768, classes=1000)
WORK = Work(micro_batch=16, num_microbatches=8, value_bytes=2, grad_bytes=4, image_bytes=150_528, label_bytes=8)


def layers_bytes(split: Split) -> float:
    exchanges = tensor_exchanges(B16, split=split, work=WORK, share=Share(0, [12], [], summed=0))
    return sum(exchange.sent_bytes for exchange in exchanges if exchange.purpose == "layers")


@pytest.mark.parametrize(("recomputes", "times"), [(False, 10 / 8), (True, 14 / 12)])
def test_sequence_parallelism_sends_a_quarter_more_and_under_full_recompute_a_sixth(recomputes, times):
    for tp in (2, 4, 12):
        split, alone = (
            Split(tp=tp, sequence_parallel=splits, recomputes_layers=recomputes) for splits in (True, False)
        )
        assert layers_bytes(split) == pytest.approx(times * layers_bytes(alone))


def test_an_all_reduce_sends_twice_what_a_reduce_scatter_sends():
    tokens = 204 * 16 * 768 * 2
    assert layers_bytes(Split(tp=4)) == 12 * 8 * 4 * 2 * 3 / 4 * tokens


@pytest.mark.parametrize(
    ("weights", "dp", "values"), [([1], 1, 128), ([64, 64], 2, 128), ([65, 64], 2, 256), ([100, 100], 3, 384)]
)
def test_a_buffer_begins_each_weight_at_64_values_and_ends_at_128_of_equal_parts(weights, dp, values):
    assert padded_values(weights, dp=dp) == values
