"""A `metrics.jsonl` whose last line is incomplete, as after a full disk or a killed run."""

import json

from tests import ranks
from tests.distributed import run_ranks
from tests.reference import SMALL


def test_a_run_continues_below_an_incomplete_line_and_draws_its_curves(tmp_path):
    settings = [*SMALL, f"run.dir={tmp_path}"]
    run_ranks(ranks.train_and_keep, 1, [*settings, "train.stop_at=2"])
    lines = tmp_path / "metrics.jsonl"
    full = len(lines.read_text().splitlines())
    with lines.open("a") as file:
        file.write('{"step": 3, "spl')
    (tmp_path / "pictures" / "curves.png").unlink()
    code = run_here([*settings, "train.stop_at=4"])
    assert code == 75
    output = lines.read_text().splitlines()
    assert output[full] == '{"step": 3, "spl'
    steps = [json.loads(line)["step"] for line in output[full + 1 :]]
    assert steps == [3, 4, 4]
    assert (tmp_path / "pictures" / "curves.png").stat().st_size > 1000


def run_here(overrides: list[str]) -> int:
    return run_ranks(code_of, 1, overrides)[0]


def code_of(overrides: list[str]) -> int:
    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    return Trainer(compose(overrides), evaluates=False).run()
