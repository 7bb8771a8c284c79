"""Check that optional packages work: import each, and call it on CUDA."""

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from megavit.cli.doctor.finding import Finding, State, in_a_line


def check_torch() -> list[Finding]:
    """Check that torch can be imported and computes."""
    import torch

    assert float(torch.ones(2, 2).mm(torch.ones(2, 2)).sum()) == 8
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return [
        Finding("imports", "torch", State.ok, f"computes; built with {built}", figures={"cuda": torch.version.cuda})
    ]


def check_training() -> list[Finding]:
    """Check that training's modules can be imported: Megatron-Core as megavit patches it, and megavit's own."""
    importlib.import_module("megatron.core.parallel_state")
    importlib.import_module("megavit.train.trainer")
    return [Finding("imports", "megavit.train.trainer", State.ok, "imported, with Megatron-Core")]


def check_flash_attn() -> list[Finding]:
    """Check that `flash_attn` computes."""
    return [
        _usable("flash-attn", "model.attention_backend=flash_attn", "pip install 'megavit[flash]'", _call_flash_attn)
    ]


def check_transformer_engine() -> list[Finding]:
    """Check that Transformer Engine computes."""
    for_what = "model.attention_backend=te, model.linear_backend=te and optim.implementation=te"
    return [_usable("transformer-engine", for_what, "pip install 'megavit[te]'", _call_transformer_engine)]


def check_apex() -> list[Finding]:
    """Check that `apex` is NVIDIA's and computes: `apex` on PyPI is another project, a toolkit for Pyramid."""
    build = (
        "only needed by optim.implementation=apex: build github.com/NVIDIA/apex with its CUDA extensions, or use "
        "NVIDIA's container; apex on PyPI is another project"
    )
    installed = _version("apex")
    try:
        apex = importlib.import_module("apex")
    except ModuleNotFoundError as error:
        if error.name == "apex":
            return [_apex("not installed", build, None)]
        return [_apex(f"{installed} is installed, and {in_a_line(error)}", build, installed)]
    except Exception as error:
        return [_apex(f"{installed} is installed, and its import fails: {in_a_line(error)}", build, installed)]
    try:
        importlib.import_module("apex.optimizers")
    except ModuleNotFoundError as error:
        if error.name != "apex.optimizers":
            return [_apex(f"{installed} at {_place(apex)}, and {in_a_line(error)}", build, installed)]
        message = f"{installed or 'a module'} at {_place(apex)} is another project with this name, not NVIDIA's"
        return [_apex(message, f"pip uninstall apex; {build}", installed)]
    try:
        importlib.import_module("amp_C")
    except ImportError:
        return [_apex(f"{installed}, NVIDIA's, without its CUDA extensions (amp_C)", build, installed)]
    return [_usable("apex", "optim.implementation=apex", build, _call_apex)]


def _apex(message: str, advice: str, installed: str | None) -> Finding:
    return Finding("imports", "apex", State.missing, message, advice, {"version": installed})


def _place(module: ModuleType) -> str:
    return str(module.__file__ or next(iter(module.__path__)))


def _usable(name: str, settings: str, install: str, call: object) -> Finding:
    """Check a package that only some settings need: import it, and call it on CUDA."""
    assert callable(call)
    installed, advice = _version(name), f"only needed by {settings}: {install}"
    figures = {"version": installed, "settings": settings}

    def without(message: str, advice: str = advice) -> Finding:
        return Finding("imports", name, State.missing, message, advice, figures)

    if installed is None and importlib.util.find_spec(name.replace("-", "_")) is None:
        return without("not installed")
    try:
        ran = call()
    except Exception as error:
        return without(f"{installed} is installed, and does not work: {in_a_line(error)}")
    if not ran:
        return without(f"{installed} is imported and not called: it runs only on CUDA, and training is on the CPU")
    return Finding("imports", name, State.ok, f"{installed} computes: {settings}", figures=figures)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _call_flash_attn() -> bool:
    # The function that megavit.model.layers.attention_backends imports.
    from flash_attn import flash_attn_func

    from megavit.parallel.cpu_backend import run_on_cpu

    if run_on_cpu():
        return False
    import torch

    part = torch.randn(1, 16, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    flash_attn_func(part, part, part).sum().backward()
    torch.cuda.synchronize()
    return True


def _call_transformer_engine() -> bool:
    from megavit.parallel.cpu_backend import run_on_cpu

    te = importlib.import_module("transformer_engine.pytorch")
    importlib.import_module("transformer_engine.pytorch.optimizers")
    if run_on_cpu():
        return False
    import torch

    # The shapes that megavit.model.layers passes: 16 tokens, one image, two heads of 64.
    tokens = torch.randn(1, 16, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    heads = te.Linear(128, 128, params_dtype=torch.bfloat16)(tokens).unflatten(2, (2, 64))
    core = te.DotProductAttention(2, 64, qkv_format="bshd", attn_mask_type="no_mask")
    core(heads, heads, heads).sum().backward()
    torch.cuda.synchronize()
    return True


def _call_apex() -> bool:
    from megavit.parallel.cpu_backend import run_on_cpu

    optimizers = importlib.import_module("apex.optimizers")
    if run_on_cpu():
        return False
    import torch

    weight = torch.ones(8, device="cuda", requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizers.FusedAdam([weight]).step()
    torch.cuda.synchronize()
    return True
