"""Submit a job to Slurm with sbatch; srun starts torchrun on each node (`cluster=slurm`)."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from megavit.cluster.backend import Submitted
from megavit.cluster.config import ClusterConfig, Container, SlurmConfig
from megavit.cluster.job import ArrayJob, Job
from megavit.cluster.paths import local_init_from, own_data_path
from megavit.cluster.render import render_shell
from megavit.errors import ConfigError

# Time limit in seconds for a command of Slurm, which itself retries longer if the controller does not answer.
_PATIENCE_S = 60
_WORDS = ("partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude", "time", "mem")


class Slurm:
    """The backend for a Slurm cluster."""

    config_class: ClassVar[type[ClusterConfig]] = SlurmConfig
    file_name: ClassVar[str] = "job.sbatch"

    def __init__(self, config: ClusterConfig) -> None:
        assert isinstance(config, SlurmConfig)
        self.config: ClusterConfig = config
        self._slurm = config

    def render(self, job: Job) -> str:
        """Render the batch script.

        Raises:
            ConfigError: if the container cannot access the job's files.
        """
        slurm = self._slurm
        tasks = job.tasks if isinstance(job, ArrayJob) else ()
        pattern = "%A_%a" if tasks else "%j"
        log = f"{job.run_dir / 'launch' / 'slurm-'}".replace("%", "%%") + f"{pattern}.log"
        gpus = f"{slurm.gpu_type}:{job.gpus_per_node}" if slurm.gpu_type else job.gpus_per_node
        words = {name: value for name in _WORDS if (value := getattr(slurm, name)) is not None}
        words |= {"exclusive": None} if slurm.exclusive else {}
        words |= slurm.options
        # The same for all tasks; each is checked.
        containers = [self._container(each) for each in tasks or (job,)]
        in_container = slurm.container is not Container.none
        return render_shell(
            "slurm.sh.j2",
            {
                "job_name": re.sub(r"[^\w.+-]", "_", job.name),
                "nodes": job.nodes,
                "ranks": job.ranks_per_node,
                "cpus_per_node": job.ranks_per_node * slurm.cpus_per_rank,
                "gpus": gpus if job.gpus_per_node else None,
                "options": [f"--{name}={value}" if value else f"--{name}" for name, value in words.items()],
                # Escape percent signs of the folder's name, which Slurm would read as patterns.
                "log": log,
                "tasks": tasks,
                "array": _array(len(tasks), slurm.array_limit),
                "grace_s": slurm.grace_s,
                "requeue": slurm.requeue,
                "max_restarts": slurm.max_restarts,
                "workdir": Path.cwd(),
                "run_dir": job.run_dir,
                "modules": slurm.modules,
                "device": job.device,
                # A rank with a GPU computes on it; the loader's workers are separate processes.
                "threads": 1 if job.gpus_per_node else slurm.cpus_per_rank,
                "env": slurm.env,
                "settings": job.overrides,
                "port": slurm.port,
                "container": containers[0],
                "python": slurm.python or ("python" if in_container else sys.executable),
            },
        )

    def _container(self, job: Job) -> list[str]:
        """Return the words of the command between srun and Python."""
        slurm, workdir = self._slurm, str(Path.cwd())
        if slurm.container is Container.none:
            return []
        if set(workdir) & set(",:"):
            raise ConfigError(f"the folder {workdir} cannot be mounted: , and : separate mounts; submit from another")
        mounts = [f"{workdir}:{workdir}", *slurm.mounts]
        seen = [Path(mount.split(":")[1]) for mount in mounts]
        weight_source = local_init_from(job)
        for key, path in (
            ("data.path", own_data_path(job)),
            ("run.dir", str(job.run_dir)),
            ("init_from", weight_source and weight_source[1]),
        ):
            if path is None:
                continue
            full = Path(path).absolute()
            if not any(full.is_relative_to(place) for place in seen):
                raise ConfigError(
                    f"{key}={path} is not in the container, which mounts {', '.join(map(str, seen))}; add "
                    f"cluster.mounts=[{full}:{full}]"
                )
        assert slurm.image is not None
        if slurm.container is Container.pyxis:
            return [
                f"--container-image={slurm.image}",
                f"--container-mounts={','.join(mounts)}",
                f"--container-workdir={workdir}",
                "--no-container-mount-home",
            ]
        binds = [word for mount in mounts for word in ("--bind", mount)]
        gpus = ["--nv"] if job.gpus_per_node else []
        return ["apptainer", "exec", *gpus, *binds, "--pwd", workdir, slurm.image]

    def try_out(self, texts: list[str]) -> None:
        """Check every script with sbatch.

        Raises:
            ConfigError: if Slurm rejects one, with its message.
        """
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "cluster=slurm: sbatch is not installed on this machine; run this on a login node of the cluster, or "
                "set cluster.dry_run=true to see the script"
            )
        # Check the controller first, because sbatch retries for many seconds.
        _ask(["scontrol", "ping"], refused="Slurm's controller does not answer; contact the cluster's administrators")
        for text in texts:
            _ask(["sbatch", "--test-only"], stdin=text)

    def submit(self, file: Path, job: Job) -> Submitted:
        """Submit the script with sbatch.

        Raises:
            ConfigError: if Slurm rejects the job, with its message.
        """
        job_id = _ask(["sbatch", "--parsable", str(file)]).split(";")[0].strip()
        task = "_0" if isinstance(job, ArrayJob) else ""
        log = str(job.run_dir / "launch" / f"slurm-{job_id}{task}.log")
        return Submitted(
            job_id,
            {
                "job": job_id,
                "log": log,
                "follow": f"squeue -j {job_id}; tail -F {shlex.quote(log)}",
                "stop": f"scancel {job_id}; with --signal=USR1 the job saves and is queued again",
            },
        )

    def take_back(self, submitted: Submitted) -> None:
        """Cancel the job."""
        _ask(["scancel", submitted.job_id])


def _array(count: int, limit: int | None) -> str:
    """Return the numbers of an array's tasks in Slurm's form."""
    return f"0-{count - 1}" + (f"%{limit}" if limit is not None else "")


def _ask(command: list[str], *, stdin: str | None = None, refused: str = "Slurm rejects the job") -> str:
    """Run a command of Slurm and return its output."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]} did not answer in {_PATIENCE_S} s; nothing was submitted") from error
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip("* ")]
        raise ConfigError(f"{refused}: {'; '.join(said)}{_way_out(said)}; nothing was submitted")
    return done.stdout


def _way_out(said: list[str]) -> str:
    if any("partition" in line.lower() for line in said):
        known = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True).stdout.split()
        return f" (partitions here: {', '.join(known)}; set cluster.partition)" if known else ""
    return ""
