"""A run of a sweep in a second: it has the folder, the signals and the exit codes of `megavit train`, and no network.

python -m tests.train.sweep_run key=value …
"""

import json
import math
import signal
import sys
import time
from pathlib import Path

from megavit.config.compose import compose
from megavit.config.saved import to_yaml
from megavit.runtime.run_dir import FAULT, FINISHED, STOPPED, claim_folder, write_exit
from megavit.runtime.signals import STOPPING, StopRequest

STEP_S = 0.02
SAVE_EVERY = 3
# It diverges at this learning rate.
DIVERGES_AT = 1.0


def main(overrides: list[str]) -> int:
    stop = StopRequest()
    stop.listen()
    config = compose(overrides)
    run_dir = Path(config.run.dir)
    claim = claim_folder(run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    state = run_dir / "state"
    step = int(state.read_text()) if state.exists() else 0
    with (run_dir / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "monitor": {"metric": "top1", "higher": True}}) + "\n")
    code, error = FINISHED, None
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        while step < config.train.steps:
            time.sleep(STEP_S)
            step += 1
            # Each learning rate has its own curve; 1e-2 is the best.
            top1 = math.exp(-abs(math.log10(config.optim.lr) + 2)) * (1 - math.exp(-step / 5))
            for split in ("train", "val") if step % 2 == 0 else ("train",):
                metrics.write(json.dumps({"step": step, "split": split, "loss": 1 - top1, "top1": top1}) + "\n")
                metrics.flush()
            if config.optim.lr >= DIVERGES_AT and step == 4:
                code, error = FAULT, "megavit: step 5: the gradient norm is nan"
                break
            if step % SAVE_EVERY == 0 or stop.asked_by:
                state.write_text(str(step))
            if stop.asked_by and step < config.train.steps:
                code = STOPPED
                break
    write_exit(run_dir, code, error)
    claim.close()
    return code


if __name__ == "__main__":
    assert set(STOPPING) <= set(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "a signal at the start would be lost"
    sys.exit(main(sys.argv[1:]))
