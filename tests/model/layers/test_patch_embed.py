import math

import torch

from megavit.model.layers.pos_embed import sincos_positions


def test_sincos_positions_are_sines_and_cosines_of_column_then_row():
    positions = sincos_positions((2, 3), 8, class_tokens=1)
    assert positions.shape == (7, 8)
    assert positions[0].eq(0).all()
    row, column = 1, 2
    want = []
    for place in (column, row):
        angles = [place / 10000 ** (i / 2) for i in range(2)]
        want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(positions[1 + row * 3 + column], torch.tensor(want), atol=1e-6, rtol=0)
