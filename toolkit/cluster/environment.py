"""What the ranks find in their environment: threads, accelerator and network here; the exported
variables on other hosts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from importlib import metadata
from pathlib import Path

from toolkit.cluster.words import check_exports
from toolkit.errors import ConfigError, MachineError
from toolkit.redact import is_secret

# DeepSpeed's launcher exports only PYTHON*, NCCL* and a few more by itself
EXPORTED_PREFIXES: tuple[str, ...] = ("FI_", "GLOO_", "NCCL_", "TP_SOCKET_", "UCX_")  # network
EXPORTED_PREFIXES += ("KMP_", "MKL_", "OMP_", "OPENBLAS_")  # threads
EXPORTED_PREFIXES += ("CUDA_DEVICE_", "CUDNN_", "DS_", "HF_", "NVTE_", "PYTORCH_", "TENSORBOARD_", "TOKENIZERS_")  # libraries
EXPORTED_PREFIXES += ("TORCHINDUCTOR_", "TORCH_", "TRITON_", "WANDB_")
EXPORTED_NAMES = ("CC", "CXX", "CUDA_HOME", "LD_LIBRARY_PATH", "MAX_JOBS", "PATH", "TMPDIR", "XDG_CACHE_HOME")
# meant for this process or this host alone, so not exported
KEPT_NAMES = ("DS_ENV_FILE",)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count(environ: Mapping[str, str] | None = None) -> int:
    """GPUs that ranks started with this environment can use, found without importing torch; 0 means
    they train on the CPU.

    A GPU hidden by CUDA_VISIBLE_DEVICES, or one that the installed torch was not built for, does not count.
    """
    environ = os.environ if environ is None else environ
    if environ.get("DS_ACCELERATOR", "cuda") != "cuda" or _torch_is_cpu_only():
        return 0
    here = len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(list(Path("/dev/dri").glob("renderD*")) if Path("/dev/kfd").exists() else [])
    if not here and Path("/dev/dxg").exists():  # WSL: one device node, whatever it holds
        here = 1
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return here if visible is None or not here else len(_device_ids(visible))


def device_ids(num_procs: int, *, environ: Mapping[str, str] | None = None) -> list[str]:
    """Device id of each local rank, in CUDA_VISIBLE_DEVICES' own numbering; "-1" hides a GPU from a
    rank that trains on the CPU.

    Raises MachineError where the machine has GPUs, but fewer than ranks.
    """
    environ = os.environ if environ is None else environ
    gpus = gpu_count(environ)
    if gpus == 0:
        return ["-1"] * num_procs
    if num_procs > gpus:
        raise MachineError(
            f"num_procs={num_procs} is more than the {gpus} GPU{'s' * (gpus > 1)} this machine shows",
            why="each rank needs a GPU of its own",
            fix=f"Set --num-procs to at most {gpus}, or CUDA_VISIBLE_DEVICES=-1 to train on the CPU.",
        )
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return (_device_ids(visible) if visible is not None else [str(i) for i in range(gpus)])[:num_procs]


PLANNED = "TOOLKIT_PLANNED"  # set for ranks whose starting process has already logged what planning logs


SUPERVISED = "TOOLKIT_SUPERVISED"  # set for ranks whose supervisor holds the locks of the run's folders
# what OpenMPI's mpirun calls the place of a rank that it starts
MPI_NAMES = {"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE", "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK"}


def take_place_from_mpi(environ: MutableMapping[str, str] | None = None) -> None:
    """Give a rank that mpirun has started the variables in which every other launcher names its place."""
    environ = os.environ if environ is None else environ
    if "RANK" not in environ and MPI_NAMES["RANK"] in environ:
        environ.update({name: environ[theirs] for name, theirs in MPI_NAMES.items()})


def hosts(environ: Mapping[str, str] | None = None) -> int:
    """Hosts of the run that this rank belongs to, as DeepSpeed's launcher or torchrun has told it;
    1 where nobody has.
    """
    environ = os.environ if environ is None else environ
    return int(environ.get("CROSS_SIZE", environ.get("GROUP_WORLD_SIZE", 1)))


def rank_environment(num_procs: int, *, environ: Mapping[str, str] | None = None, python: str = sys.executable) -> dict[str, str]:
    """The environment local ranks start with: what the user set wins, the rest is chosen for
    num_procs ranks on this machine.
    """
    env = dict(os.environ if environ is None else environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // max(1, num_procs))))
    tools = str(Path(python).parent)
    if tools not in env.get("PATH", "").split(os.pathsep):
        # DeepSpeed looks for ninja on the PATH, which may lack the folder of this interpreter
        env["PATH"] = os.pathsep.join(filter(None, [tools, env.get("PATH")]))
    env.setdefault("PYTHONUNBUFFERED", "1")
    if gpu_count(env) == 0:
        env.setdefault("DS_ACCELERATOR", "cpu")
    if sys.platform == "linux" and Path("/sys/class/net/lo").exists():
        # gloo otherwise binds to whatever the host name resolves to, which on a laptop may be nothing
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env


def cuda_defaults(*, tp: int, zero_stage: int, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that a rank on a GPU should set before it imports torch, without those that the user has set.

    Segments that grow hold less memory beyond what is used where activations of several
    micro-batches come and go. One connection to the device starts kernels in the order in which
    they were issued: with tensor parallelism an all-gather then begins before the multiply that
    hides it. ZeRO-3's gathers run beside compute on their own, and are left alone.
    """
    environ = os.environ if environ is None else environ
    variables = {}
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environ.keys():
        renamed = tuple(int(part) for part in metadata.version("torch").split(".")[:2]) >= (2, 9)
        variables["PYTORCH_ALLOC_CONF" if renamed else "PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if tp > 1 and zero_stage < 3 and "CUDA_DEVICE_MAX_CONNECTIONS" not in environ:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return variables


def deepspeed_env_lines(environ: Mapping[str, str] | None = None) -> list[str]:
    """`NAME=value` lines for a `.deepspeed_env` file: what ranks on other hosts need and
    DeepSpeed's launcher does not export.

    Secrets (…_TOKEN, …_KEY) are left out, since the launcher puts every value on a command line
    that all users of a host can read. Raises ConfigError for a value that no shell would pass on
    unchanged.
    """
    variables = exported_variables(environ)
    check_exports(variables, variables)
    return [f"{name}={value}" for name, value in variables.items()]


def users_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of the user's own files for other hosts, which DeepSpeed's launcher reads at
    home and then here.

    Raises ConfigError naming a line that is no variable; the launcher would end with a traceback there.
    """
    environ = os.environ if environ is None else environ
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for path in dict.fromkeys(Path(place, name) for place in (Path.home(), Path.cwd())):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            variable, equals, value = line.partition("=")
            if not equals:
                raise ConfigError(
                    f"{path}:{number} is {line.strip()!r}",
                    why="DeepSpeed's launcher takes no other lines",
                    fix="Write NAME=value, or delete it.",
                )
            found[variable.strip()] = value.strip()
    return found


def exported_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of this environment that ranks on other hosts get, by name."""
    environ = os.environ if environ is None else environ
    variables = {}
    for name in sorted(environ):
        wanted = name in EXPORTED_NAMES or name.startswith(EXPORTED_PREFIXES)
        if wanted and name not in KEPT_NAMES and not is_secret(name) and environ[name].strip():
            variables[name] = environ[name]
    return variables


def export_environment(path: Path, *, environ: Mapping[str, str] | None = None) -> list[str]:
    """Write deepspeed_env_lines to path, which DS_ENV_FILE then names; returns the lines.

    The file holds nothing else: DeepSpeed's launcher fails at an empty line or a comment in it.
    """
    lines = deepspeed_env_lines(environ)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return lines


def _device_ids(visible: str) -> list[str]:
    ids = [word.strip() for word in visible.split(",") if word.strip()]
    # CUDA itself ignores everything from the first -1 on
    return ids[: ids.index("-1")] if "-1" in ids else ids


def _torch_is_cpu_only() -> bool:
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
