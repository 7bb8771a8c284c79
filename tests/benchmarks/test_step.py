"""`python -m benchmarks.step`: who is timed, what is written, and what happens when time or a candidate runs out."""

import json
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmarks.step.__main__
import benchmarks.step.measure
from benchmarks.step.__main__ import bench
from benchmarks.step.cases import ON_CPU, ROWS, overrides_of
from benchmarks.step.config import BenchConfig
from benchmarks.step.measure import taking_part
from benchmarks.step.memory import saved_bytes, storage_bytes
from benchmarks.step.offload import CpuOffload
from benchmarks.step.parity_check import Difference, StepOutput, difference
from benchmarks.step.profile import kind_of
from megavit.cli.arguments import parse
from megavit.errors import ConfigError
from tests.distributed import run_ranks

SMALL = [
    "model.hidden_size=32",
    "model.ffn_size=64",
    "model.num_heads=4",
    "model.num_layers=2",
    "data.image_size=[32,32]",
    "data.num_classes=10",
]
QUICK = ["rounds=2", "block_s=0", "candidates=megavit,megavit+onednn,timm,hf,plain"]


def lines_in(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]


# oneDNN is for fp32.
TAKING_PART = {
    "vit_b16:fp32": ["megavit", "megavit+onednn", "timm", "hf", "plain"],
    "mae_b16:bf16": ["megavit", "hf", "plain"],
}


def test_onednn_takes_part_in_fp32_alone():
    config = parse("bench", BenchConfig, [QUICK[2]], settings=True)[0]
    assert {row: taking_part(row, config, device="cpu") for row in TAKING_PART} == TAKING_PART


@pytest.mark.parametrize("rows", [["vit_b16:fp32"], pytest.param([*TAKING_PART], marks=pytest.mark.slow)])
def test_everyone_does_the_same_work_and_has_figures_a_table_and_a_picture(rows, tmp_path, capsys):
    assert bench([f"rows={','.join(rows)}", *QUICK, f"dir={tmp_path}", *SMALL]) == 0
    lines = lines_in(tmp_path)
    start, timed = lines[0], [line for line in lines if line["kind"] == "candidate"]
    assert start["versions"]["megatron-core"] == "0.16.1"
    names = {row: [line["candidate"] for line in timed if line["row"] == row] for row in start["rows"]}
    assert names == {row: TAKING_PART[row] for row in rows}
    for line in timed:
        assert line["rounds"] == 2
        assert 0 < line["min_s"] <= line["median_s"] <= line["max_s"]
        assert line["images_per_s"] == pytest.approx(8 / line["median_s"])
        assert line["held_bytes"] > 0 and line["saved_bytes"] > 0
        ratio = line.get("over plain") or line["over megavit"]
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
    looked_into = [line["candidate"].split("+")[0] for line in timed if sum(line["kinds_s"].values()) > 0]
    # The fastest of megavit's and of the others.
    assert looked_into.count("megavit") == len(looked_into) - len(rows) == len(rows)
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [line["row"] for line in rounds] == [row for row in rows for _ in range(2)]
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    for word in ("vit_b16 fp32, 8 images a step", rows[-1].replace(":", " "), "mfu_matmul", "hf", "matmul"):
        assert word in shown


@pytest.mark.slow
def test_two_ranks_and_the_trainers_loop_are_timed_beside_one_rank(tmp_path):
    assert bench(["rows=tp2:fp32,loop:bf16", *QUICK[:2], f"dir={tmp_path}", *SMALL]) == 0
    timed = [line for line in lines_in(tmp_path) if line["kind"] == "candidate"]
    assert [line["candidate"] for line in timed] == [
        "megavit",
        "megavit tp2",
        "megavit+onednn",
        "megavit+onednn tp2",
        "megavit",
        "trainer",
    ]
    assert all(line["rounds"] == 2 for line in timed)


def test_a_deadline_leaves_what_was_measured_and_says_what_was_not(tmp_path, capsys):
    assert bench(["rows=vit_b16:fp32", "deadline_s=0.1", f"dir={tmp_path}", *SMALL]) == 0
    assert "deadline_s=0.1 is over" in capsys.readouterr().out
    timed = [line for line in lines_in(tmp_path) if line["kind"] == "candidate"]
    assert {line["without"] for line in timed} == {"not reached before deadline_s"}


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("row=vit_b16:fp32", "python -m benchmarks.step knows no row=; did you mean rows=?"),
        ("rows=vit_b17:fp32", "there is no row vit_b17:fp32; a row is NAME:PRECISION, of vit_b16,"),
        ("rows=vit_b16:fp8", "there is no row vit_b16:fp8"),
        ("rounds=0", "rounds=0 must be a whole number of at least 1"),
        ("rounds=many", "rounds=many must be a whole number of at least 1"),
        ("candidates=tim", "candidates: there is no tim; known: megavit,"),
        ("model.hidden_sise=3", "did you mean model.hidden_size"),
    ],
)
def test_a_mistake_gives_one_message(argument, says, tmp_path):
    with pytest.raises(ConfigError) as output:
        bench([argument, f"dir={tmp_path}"])
    assert says in str(output.value)
    assert not (tmp_path / "bench.jsonl").exists()


def test_the_verb_leaves_code_2_and_one_line_without_a_stack():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", "rows=nothing"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks.step: rows: there is no row nothing")
    assert "Traceback" not in done.stderr


def sabotaged() -> dict[str, bool]:
    """A peer whose work is not megavit's: another weight, another weight decay, no clipping; and one that is."""
    from benchmarks.step.runner import CaseRunner

    runner = CaseRunner([*overrides_of(ROWS["vit_b16"], "fp32", 8), *SMALL])
    runner.build("megavit")

    def spoil_weight(peer) -> None:
        with torch.no_grad():
            peer._model.blocks[1].mlp.fc2.bias[0] += 0.3

    def spoil_decay(peer) -> None:
        peer._optimizer.param_groups[0]["weight_decay"] = 0.0
        for group in peer._optimizer.param_groups:
            group["lr"] *= 1.1

    def spoil_loss(peer) -> None:
        output_and_loss = peer._output_and_loss
        peer._output_and_loss = lambda images, shared_masks: (
            output_and_loss(images, shared_masks)[0],
            output_and_loss(images, shared_masks)[1] * 1.001,
        )

    def outputs(name: str) -> list[StepOutput]:
        seen = [StepOutput(*runner.outputs(name))]
        runner.warm_up(name, 2)
        return [*seen, StepOutput(*runner.outputs(name))]

    reference = outputs("megavit")
    admitted = {}
    spoils = {"none": lambda peer: None, "weight": spoil_weight, "rate": spoil_decay, "loss": spoil_loss}
    for spoil, how in spoils.items():
        runner.build("plain")
        how(runner._candidates["plain"])
        apart = [difference(mine, theirs) for mine, theirs in zip(outputs("plain"), reference, strict=True)]
        admitted[spoil] = all(one is not None and one.is_small("fp32") for one in apart)
    return admitted


def test_who_does_other_work_is_not_timed():
    assert run_ranks(sabotaged, 1)[0] == {"none": True, "weight": False, "rate": False, "loss": False}


def test_what_is_not_a_number_or_of_another_shape_is_never_the_same_work():
    right = StepOutput(np.ones((2, 3)), 1.0)
    assert difference(StepOutput(np.ones((2, 4)), 1.0), right) is None
    assert not difference(StepOutput(np.full((2, 3), np.nan), 1.0), right).is_small("bf16")
    assert not Difference(0.0, float("nan")).is_small("bf16")
    assert difference(right, right).is_small("fp32")


def test_saved_bytes_are_what_a_forward_pass_keeps_beside_the_weights():
    weight = torch.randn(32, 16, requires_grad=True)
    x = torch.randn(8, 16)

    def forward() -> torch.Tensor:
        hidden = (x @ weight.t()).relu()
        return (hidden * hidden).sum()

    # x for the weight's gradient; relu's output, once, for relu and for the square.
    assert saved_bytes(forward, [weight]) == 4 * (8 * 16 + 8 * 32)
    assert storage_bytes([weight, weight[:1], x]) == 4 * (32 * 16 + 8 * 16)


class Holder:
    def __init__(self) -> None:
        buffer = torch.randn(1000)
        self.tensors = [buffer, buffer[10:20], torch.randn(3, 4)]

    def held(self) -> list[torch.Tensor]:
        return self.tensors


def test_who_is_parked_holds_nothing_and_comes_back_to_the_bit():
    parking, holder = CpuOffload(torch.device("cuda")), Holder()
    before = [tensor.clone() for tensor in holder.tensors]
    parking.offload({"one": holder})
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in holder.tensors)
    parking.offload({"one": holder})
    parking.restore("one")
    assert all(torch.equal(tensor, value) for tensor, value in zip(holder.tensors, before, strict=True))
    holder.tensors[0][10] = 7.0
    assert holder.tensors[1][0] == 7.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matmul"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNN", "matmul"),
        ("megavit::onednn_product", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::native_layer_norm_backward", "norm"),
        ("void at::native::vectorized_layer_norm_kernel", "norm"),
        ("triton_per_fused_add_native_layer_norm_0", "compiled"),
        ("aten::gelu_backward", "gelu"),
        ("aten::copy_", "copy"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("aten::sum", "reduction"),
        ("void at::native::vectorized_elementwise_kernel", "elementwise"),
        ("aten::empty", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(name, kind):
    assert kind_of(name) == kind


def test_settings_of_the_bench_are_read_beside_those_of_the_network():
    typed = ["rows=[vit_b16:fp32,tp2:fp32]", "batch=null", "model.num_layers=3"]
    config, others = parse("bench", BenchConfig, typed, settings=True)
    assert config.rows == ("vit_b16:fp32", "tp2:fp32")
    assert config.batch is None
    assert others == ["model.num_layers=3"]


def test_a_process_that_is_gone_is_a_fault_of_its_candidates_and_no_stack():
    from benchmarks.step.processes import Fault, WorkerPool

    world = WorkerPool([*overrides_of(ROWS["vit_b16"], "fp32", 8), *SMALL])
    try:
        until = time.monotonic() + 60
        assert world.call("about", until=until)["device"] == "CPU"
        with pytest.raises(Fault, match=r"KeyError: 'nobody'"):
            world.call("run", "nobody", 1, until=until)
        for process, _ in world._workers:
            process.kill()
            process.join()
        for _ in range(2):
            with pytest.raises(Fault, match="its process died"):
                world.call("about", until=until)
    finally:
        world.close()


class Pretended:
    """Processes that take time by a clock of their own.

    Args:
        overrides: of the row.
        clock: seconds, in a list of one.
        ready_s: until a candidate is ready, and until the process has started.
        step_s: of a step in fp32; half of it in bf16.
    """

    def __init__(self, overrides: list[str], *, ranks: int = 1, clock: list[float], ready_s: float, step_s: float):
        self.clock, self.ready_s = clock, ready_s
        self.step_s = step_s if "train.precision=fp32" in overrides else step_s / 2

    def call(self, name: str, *arguments, until: float, patience_s: float = 0.0):
        spent, answer = {
            "about": (self.ready_s, {"device": "CPU", "threads": 2}),
            "build": (self.ready_s, None),
            "outputs": (0, (np.ones(2), 1.0)),
            "warm_up": (2 * self.step_s, self.step_s),
            "rates": (1, {"matmul_flops": 4e11, "copy_bytes": 4e10}),
            "run": (self.step_s, self.step_s),
            "memory": (self.step_s / 3, {"held_bytes": 1, "saved_bytes": 1}),
            "profile": (1.5 * self.step_s, {"matmul": 1.0}),
            "loop": (self.ready_s + 8 * self.step_s, {"megavit": [self.step_s] * 3, "trainer": [self.step_s] * 3}),
        }[name]
        self.clock[0] += spent
        return answer

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("ready_s", "step_s", "fewest"), [(5, 3, 3), (10, 3, 1), (5, 5, 1)])
def test_on_a_slow_machine_rows_have_fewer_rounds_and_none_is_left_out(ready_s, step_s, fewest, tmp_path, monkeypatch):
    clock = [0.0]
    for module in (benchmarks.step.__main__, benchmarks.step.measure):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(
        benchmarks.step.measure, "WorkerPool", partial(Pretended, clock=clock, ready_s=ready_s, step_s=step_s)
    )
    assert bench([f"dir={tmp_path}"]) == 0
    timed = [line for line in lines_in(tmp_path) if line["kind"] == "candidate"]
    assert {line["row"] for line in timed} == set(ON_CPU)
    assert min(line["rounds"] for line in timed) == fewest
    assert clock[0] <= 840
