"""`megavit submit cluster=… key=value …`: check a job here, write it down, hand it to a cluster."""

import sys
from dataclasses import dataclass
from pathlib import Path

from megavit.cli.arguments import argument
from megavit.cli.config_flags import ConfigFlags, show_configuration
from megavit.cluster.backend import Backend, Submitted
from megavit.cluster.job import Job, gather_array, plan_job
from megavit.cluster.registry import get_backend, split_cluster
from megavit.cluster.render import refuse_secret_names, refuse_secrets
from megavit.config.compose import AUTO_MODEL
from megavit.config.overrides import key_of
from megavit.config.search_path import split_search_path
from megavit.config.settings import flatten
from megavit.config.sweep import base_name, expand, read_sweep, split_sweep
from megavit.errors import ConfigError

_FOLDER = "launch"


@dataclass(frozen=True)
class SubmitArgs(ConfigFlags):
    """The command's own arguments, in addition to the settings `cluster=NAME` and `cluster.KEY=VALUE`.

    Attributes:
        multirun: submit a job for each combination of settings with several values.
    """

    multirun: bool = argument(False, key="--multirun", short="-m")


def submit(args: SubmitArgs, settings: list[str]) -> int:
    """Submit one job, or with --multirun one for each combination of settings; nothing unless all of them are right.

    Args:
        args: the command's own.
        settings: `cluster=local|slurm|kubernetes|azureml|FILE.yaml`, `cluster.KEY=VALUE` and the run's settings.

    Raises:
        ConfigError: for a setting that is wrong, or a cluster that takes no such job.
    """
    cluster_args, overrides = split_cluster(settings)
    if args.only_shows:
        show_configuration(args, _resolve_auto(overrides, mark="# "))
        return 0
    search, _ = split_search_path(settings)
    backend = get_backend(cluster_args, search=search)
    refuse_secret_names(backend.config.env)
    runs = split_sweep(overrides) if args.multirun else [overrides]
    jobs = [plan_job(run, backend.config, resolve=_resolve_auto) for run in runs]
    _refuse_shared_folders(jobs)
    if getattr(backend.config, "array", False):
        if not args.multirun:
            raise ConfigError("cluster.array=true is for the runs of a sweep; add --multirun and several values")
        jobs = [gather_array(jobs, name=_sweep_name(overrides))]
    # Before the quoting, which would hide a secret that holds a quote.
    refuse_secrets("\n".join([*settings, *map(str, flatten(backend.config).values())]))
    texts = [backend.render(job) for job in jobs]
    for text in texts:
        refuse_secrets(text)
    if backend.config.dry_run:
        for job, text in zip(jobs, texts, strict=True):
            print(f"# {job.run_dir / _FOLDER / backend.file_name}: {job}, not submitted (cluster.dry_run=true)")
            print(text)
        return 0
    backend.try_out(texts)
    files = [_keep(job, text, file_name=backend.file_name) for job, text in zip(jobs, texts, strict=True)]
    return max(submitted.code for submitted in _hand_over(backend, files, jobs))


def _sweep_name(overrides: list[str]) -> str:
    """Return the name that a run has without the sweep's values."""
    first = expand(read_sweep(overrides))[0]
    return base_name([text for text in first.overrides if key_of(text) != "run.name" or "run.name" not in first.varied])


def _resolve_auto(overrides: list[str], *, mark: str = "") -> list[str]:
    """Replace `model=auto` by the model of the weights, which are read on this machine."""
    if AUTO_MODEL not in overrides:
        return overrides
    from megavit.train.auto_model import resolve_auto

    resolved, taken = resolve_auto(overrides)
    print(f"{mark}{taken}")
    return resolved


def _hand_over(backend: Backend, files: list[Path], jobs: list[Job]) -> list[Submitted]:
    """Submit all, or none."""
    taken: list[Submitted] = []
    for file, job in zip(files, jobs, strict=True):
        print(f"{job}\n  script  {file}", flush=True)
        try:
            submitted = backend.submit(file, job)
        except ConfigError:
            for earlier in taken:
                backend.take_back(earlier)
                print(f"megavit: job {earlier.job_id} was taken back", file=sys.stderr)
            raise
        taken.append(submitted)
        for name, text in submitted.lines.items():
            print(f"  {name:<6}  {text}", flush=True)
    return taken


def _refuse_shared_folders(jobs: list[Job]) -> None:
    folders = [job.run_dir for job in jobs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(
                f"{folders.count(folder)} of the jobs would share the folder {folder}; sweep run.name too"
            )


def _keep(job: Job, text: str, *, file_name: str) -> Path:
    """Write what is submitted into the run's folder."""
    file = job.run_dir / _FOLDER / file_name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"run.dir={job.config.run.dir} cannot be written: {error.strerror}; choose another"
        ) from error
    return file
