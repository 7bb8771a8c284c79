"""megavit trains Vision Transformers with model parallelism on Megatron-Core."""

from megavit.parallel import cpu as _cpu

__version__ = "0.1.0"

# Whoever imports any part of megavit before Megatron-Core gets a Megatron-Core that runs on this machine.
_cpu.install_import_hook()
