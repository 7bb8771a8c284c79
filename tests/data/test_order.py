from megavit.data.order import SampleOrder


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    order = SampleOrder(97, seed=5)
    epochs = [[order.at(epoch * 97 + i) for i in range(97)] for epoch in range(3)]
    for number, keys in enumerate(epochs):
        assert sorted(key.sample_id for key in keys) == list(range(97))
        assert {key.epoch for key in keys} == {number}
    ids = [[key.sample_id for key in keys] for keys in epochs]
    assert ids[0] != ids[1] != ids[2]


def test_order_depends_on_the_seed_and_on_nothing_before():
    straight = SampleOrder(50, seed=1)
    walked = [straight.at(i) for i in range(120)]
    assert SampleOrder(50, seed=1).at(119) == walked[119]
    assert [SampleOrder(50, seed=2).at(i) for i in range(50)] != walked[:50]
