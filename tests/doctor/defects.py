"""Defects to plant on one of two hosts, each with the red line in which doctor must find it.

`plant` and `mend` are lines for the host's own shell, with these variables: FOLDER (the test's,
shared by both hosts), SITE (the interpreter's packages), REPO, PYTHON. A mount is seen on that host
alone. Nothing outlives the hosts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


@dataclass(frozen=True, kw_only=True)
class Defect:
    """One defect. check, found: the row's check, and a pattern in what it says or in its fix;
    alone: it needs a run of its own, because it hides others (an unreachable host says nothing
    more). words: more words for doctor; environ: of its caller.
    """

    name: str
    check: str
    found: str
    plant: str
    mend: str = ""
    host: str = "host-b"
    on: str = "host-b"  # the host that the row names
    alone: bool = False
    default: bool = False  # in `make test` too
    words: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a file without which the test is skipped


def _limit(name: str, value: str) -> dict[str, str]:
    """sshd's soft limit, which what it starts inherits."""
    hard = f"$(prlimit --pid 1 --noheadings -o HARD --{name})"
    return {"plant": f"prlimit --pid 1 --{name}={value}:", "mend": f"prlimit --pid 1 --{name}={hard}:"}


def _over(path: str, text: str) -> dict[str, str]:
    """Another text in the place of a file."""
    return {"plant": f"{text} > $FOLDER/other && mount --bind $FOLDER/other {path}", "mend": f"umount {path}"}


def _version(package: str, version: str) -> dict[str, str]:
    path = f"$SITE/{package}-*.dist-info/METADATA"
    new = f"sed 's/^Version: .*/Version: {version}/' {path} > $FOLDER/{package} && mount --bind $FOLDER/{package} {path}"
    return {"plant": new, "mend": f"umount {path}"}


def _tmpfs(path: str, options: str = "size=64m") -> dict[str, str]:
    return {"plant": f"mount -t tmpfs -o {options} other {path}", "mend": f"umount {path}"}


HIDING = [  # a host that is not reached, or whose probe does not start
    Defect(name="its key is refused", check="reach", found=r"refuses user \w+ with key .*authorized_keys", alone=True,
           plant="mount --bind /dev/null $FOLDER/key.pub", mend="umount $FOLDER/key.pub", default=True),
    Defect(name="its cable is out", check="reach", found="does not answer|no route", alone=True,
           plant="ip link set eth0 down", mend="ip link set eth0 up"),
    Defect(name="its sshd listens elsewhere", check="reach", found="nothing listens at port 2222.*sshd", alone=True, host="host-a",
           plant="{ cat $FOLDER/ssh_config; echo '  Port 2222'; } > $FOLDER/ssh-2 && mount --bind $FOLDER/ssh-2 /etc/ssh/ssh_config",
           mend="umount /etc/ssh/ssh_config"),
    Defect(name="its host key is unknown", check="reach", found="does not trust.*known_hosts", alone=True, host="host-a",
           plant="mount --bind /dev/null $FOLDER/known_hosts", mend="umount $FOLDER/known_hosts"),
    Defect(name="its name is unknown", check="reach", found="no address is known.*hostfile", alone=True, host="host-a",
           plant="grep -v host-b /etc/hosts > $FOLDER/hosts-2; mount --bind $FOLDER/hosts-2 /etc/hosts", mend="umount /etc/hosts"),
    Defect(name="the toolkit is not there", check="reach", found="has no toolkit|no module|another one", alone=True, **_tmpfs("$REPO/toolkit")),
    Defect(name="the toolkit is older than doctor", check="reach", found="another one.*Install toolkit", alone=True,
           plant="cp -r $REPO/toolkit $FOLDER/old && rm -r $FOLDER/old/doctor && mount --bind $FOLDER/old $REPO/toolkit",
           mend="umount $REPO/toolkit"),
    Defect(name="the interpreter is not there", check="reach", found="no interpreter", alone=True,
           plant="mount --bind /dev/null $(readlink -f $PYTHON)", mend="umount $(readlink -f $PYTHON)"),
    Defect(name="the working folder is not there", check="reach", found="no folder", alone=True,
           **_tmpfs("$FOLDER/work"), environ={"TEST_FOLDER": "work/here"}),
    Defect(name="its shell talks", check="reach", found="login prints 'Welcome", alone=True,
           plant="{ cat $FOLDER/sshd_config; echo 'ForceCommand echo Welcome; eval \"$SSH_ORIGINAL_COMMAND\"'; } > $FOLDER/sshd-2;"
                 "mount --bind $FOLDER/sshd-2 $FOLDER/sshd_config; RESTART_SSHD",
           mend="umount $FOLDER/sshd_config; RESTART_SSHD"),
]  # fmt: skip

SOFTWARE = [
    Defect(name="another toolkit version", check="versions", found="toolkit 9.9.9, where the others have", alone=True,
           **_over("$REPO/toolkit/__init__.py", "sed 's/^__version__ = .*/__version__ = \"9.9.9\"/' $REPO/toolkit/__init__.py")),
    Defect(name="other code of the same version", check="versions", found="other files than the others'", default=True,
           **_over("$REPO/toolkit/errors.py", "{ cat $REPO/toolkit/errors.py; echo '# changed'; }")),
    Defect(name="another torch", check="versions", found="torch 2.5.0, where the others have.*Install torch", default=True,
           **_version("torch", "2.5.0")),
    Defect(name="a torch that is damaged", check="torch", found="torch does not start: .*libtorch", alone=True,
           plant="mount --bind /dev/null $SITE/torch/lib/libtorch_cpu.so", mend="umount $SITE/torch/lib/libtorch_cpu.so"),
    Defect(name="another deepspeed", check="versions", found="deepspeed 0.1", **_version("deepspeed", "0.1")),
    Defect(name="another megatron-core", check="versions", found="megatron-core 0.15", **_version("megatron_core", "0.15")),
    Defect(name="no compiler on the PATH", check="needs", found=r"needs a C\+\+ compiler.*g\+\+",
           plant="mount --bind /dev/null $(readlink -f /usr/bin/c++)", mend="umount $(readlink -f /usr/bin/c++)",
           words=("zero.offload_optimizer=cpu",), alone=True, needs="/usr/bin/c++"),
    Defect(name="no libaio to link with", check="needs", found="needs libaio with its headers", alone=True,
           plant="mount --bind /dev/null $(readlink -f /usr/lib/*/libaio.so)", mend="umount $(readlink -f /usr/lib/*/libaio.so)",
           needs="/usr/include/libaio.h", words=("zero.stage=3", "zero.offload_param=nvme", "zero.nvme_path=/tmp")),
    Defect(name="a monitor that is not installed", check="needs", found="needs the package wandb", on="host-a", alone=True,
           plant=":", words=("log.wandb=true",)),
    Defect(name="a lock of a killed build", check="builds", found="left by a build that was killed.*Delete", default=True,
           plant="mkdir -p $FOLDER/own-ext/cpu_adam && touch -d '1 hour ago' $FOLDER/own-ext/cpu_adam $FOLDER/own-ext/cpu_adam/lock && "
                 "mount --bind $FOLDER/own-ext $FOLDER/extensions",
           mend="umount $FOLDER/extensions"),
    Defect(name="an extension that all may write", check="security", found=r"cpu_adam.so \(writable by all", default=False,
           plant="mkdir -p $FOLDER/open-ext/cpu_adam && touch $FOLDER/open-ext/cpu_adam/cpu_adam.so && "
                 "chmod 666 $FOLDER/open-ext/cpu_adam/cpu_adam.so && mount --bind $FOLDER/open-ext $FOLDER/extensions",
           mend="umount $FOLDER/extensions", alone=True),
    Defect(name="an extension of another user", check="security", found="owned by user 4711", alone=True,
           plant="mkdir -p $FOLDER/their-ext/cpu_adam && touch $FOLDER/their-ext/cpu_adam/cpu_adam.so && "
                 "chown 4711 $FOLDER/their-ext/cpu_adam/cpu_adam.so && mount --bind $FOLDER/their-ext $FOLDER/extensions",
           mend="umount $FOLDER/extensions"),
    Defect(name="code that all may write", check="security", found=r"toolkit \(writable by all", default=True,
           plant="cp -r $REPO/toolkit $FOLDER/open && chmod 777 $FOLDER/open && mount --bind $FOLDER/open $REPO/toolkit", mend="umount $REPO/toolkit",
           alone=True),
]  # fmt: skip

MACHINE = [
    Defect(name="a full disk", check="disk", found="TMPDIR.*cannot be written to: no space left", default=True,
           plant="mount -t tmpfs -o size=64k full $FOLDER/tmp && { head -c 1m /dev/zero > $FOLDER/tmp/full 2>/dev/null || true; }",
           mend="umount $FOLDER/tmp"),
    Defect(name="a disk too small for the checkpoints", check="disk", found="run.dir: .* free, and .* are needed", default=True,
           **_tmpfs("$FOLDER/runs", "size=700m")),
    Defect(name="a folder that is read only", check="disk", found="run.dir: .*read-only", alone=True,
           plant="mount --bind $FOLDER/runs $FOLDER/runs && mount -o remount,bind,ro $FOLDER/runs", mend="umount $FOLDER/runs"),
    Defect(name="a run folder of its own", check="shared", found=r"run.dir: .*this host's own \(tmpfs", default=True,
           **_tmpfs("$FOLDER/runs", "size=2g"), alone=True),
    Defect(name="no inodes", check="disk", found="room for .* more files|no space", **_tmpfs("$FOLDER/tmp", "size=8g,nr_inodes=50"), alone=True),
    Defect(name="data that is not there", check="data", found="text is not there", default=True, **_tmpfs("$FOLDER/data")),
    Defect(name="a small /dev/shm", check="memory", found="/dev/shm has 1.0 MiB free.*--shm-size", default=True, **_tmpfs("/dev/shm", "size=1m")),
    Defect(name="few open files", check="limits", found="ulimit nofile: 256 open files", default=True, **_limit("nofile", "256")),
    Defect(name="few threads", check="limits", found="ulimit nproc: 200 ", **_limit("nproc", "200")),
    Defect(name="short files", check="limits", found="ulimit fsize: files end at 1.4 MiB", **_limit("fsize", "1500000")),
    Defect(name="little address space", check="limits", found="ulimit as: 12.0 GiB", **_limit("as", "12884901888")),
    Defect(name="few cores", check="memory", found="1 cores may be used by 2 ranks", alone=True,
           plant="taskset -p 1 1; sed -i 's/slots=1/slots=2/' $FOLDER/hostfile",
           mend="sed -i 's/slots=2/slots=1/' $FOLDER/hostfile; taskset -p ffffffff 1"),
    Defect(name="a wrong clock", check="clock", found="90.. s ahead of", needs=FAKETIME, alone=True,
           plant=f"{{ cat $FOLDER/sshd_config; echo SetEnv LD_PRELOAD={FAKETIME} FAKETIME=+90s FAKETIME_DONT_FAKE_MONOTONIC=1; }} > $FOLDER/sshd-3;"
                 "mount --bind $FOLDER/sshd-3 $FOLDER/sshd_config; RESTART_SSHD",
           mend="umount $FOLDER/sshd_config; RESTART_SSHD"),
]  # fmt: skip

NETWORK = [
    Defect(name="a slow link", check="link", found="MB/s to host-a; the fastest", default=True,
           plant="tc qdisc add dev eth0 root tbf rate 200mbit burst 256kbit latency 50ms", mend="tc qdisc del dev eth0 root"),
    Defect(name="the meeting port is closed", check="port", found="cannot reach host-a at port 29500.*Open that port", default=True,
           plant="ip rule add ipproto tcp dport 29500 prohibit", mend="ip rule del ipproto tcp dport 29500 prohibit"),
    Defect(name="the meeting port is taken", check="port", found="29500.*address already in use.*process \\d+ \\(python",
           host="host-a", on="host-a", alone=True,
           plant="$PYTHON -m http.server 29500 >/dev/null 2>&1 & echo $! > $FOLDER/server; until ss -lnt | grep -q :29500; do sleep 0.1; done",
           mend="kill $(cat $FOLDER/server)"),
    Defect(name="all free ports are closed", check="link", found="no connection to host-.*Open all ports", alone=True, on="host-a",
           plant="ip rule add ipproto tcp sport 1024-65534 dport 1024-65534 prohibit",
           mend="ip rule del ipproto tcp sport 1024-65534 dport 1024-65534 prohibit"),
    Defect(name="an interface of another name", check="interface", found="GLOO_SOCKET_IFNAME=eth0 names no interface", alone=True,
           plant="ip link set eth0 down; ip link set eth0 name eth7; ip link set eth7 up",
           mend="ip link set eth7 down; ip link set eth7 name eth0; ip link set eth0 up"),
    Defect(name="an own name that is a loopback address", check="interface", found="knows itself as 127.0.1.1", alone=True,
           plant=":", environ={"GLOO_SOCKET_IFNAME": ""}),
    Defect(name="another MTU", check="interface", found="MTU 1400, the others' have 1500",
           plant="ip link set eth0 mtu 1400", mend="ip link set eth0 mtu 1500"),
    Defect(name="another address for the first host", check="names", found="knows host-a as 10.77.0.99", alone=True,
           plant="sed 's/10.77.0.1 /10.77.0.99 /' /etc/hosts > $FOLDER/hosts-3; mount --bind $FOLDER/hosts-3 /etc/hosts",
           mend="umount /etc/hosts"),
    Defect(name="one machine twice", check="names", found="they are one machine, 10.77.0.1", on="host-a", alone=True, host="host-a",
           plant="sed 's/^host-b/10.77.0.1/' $FOLDER/hostfile > $FOLDER/twice; mount --bind $FOLDER/twice $FOLDER/hostfile",
           mend="umount $FOLDER/hostfile"),
]  # fmt: skip

CONFIGURATION = [
    Defect(name="a layout that the rules refuse", check="config", found="parallel.tp=3", plant=":", on="", alone=True, words=("parallel.tp=3",)),
    Defect(name="a variable that cannot be exported", check="config", found="NCCL_DEBUG.*cannot be exported", plant=":", on="", alone=True,
           environ={"NCCL_DEBUG": "a$b"}),
]  # fmt: skip

DEFECTS = [*HIDING, *SOFTWARE, *MACHINE, *NETWORK, *CONFIGURATION]
