"""Hosts without a cloud or a container engine: each has its own addresses, processes, files, memory and sshd. Linux, root, iproute2, openssh-server.

A host is a network namespace on a bridge of the laptop's, with pid, mount, uts, ipc and cgroup namespaces and an overlay of `/` beside it; what it writes goes with it. Folders in `shared` are the same for all: the interpreter, the code, and what
stands for a network's file system. The laptop is a host, too, without an sshd. Nothing of it is reachable from outside, and whatever runs on a host dies with it.
"""
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

_BOOT = r"""
set -euo pipefail
name=$1 ip=$2 lab=$3; shift 3; h=$lab/$name; r=$h/root
mkdir -p $h; mount -t tmpfs -o size=4g tmpfs $h; mkdir -p $h/up $h/wk $r
mount -t overlay overlay -o lowerdir=/,upperdir=$h/up,workdir=$h/wk $r
mount -t proc proc $r/proc; mount -t sysfs sysfs $r/sys
if [ -d /sys/fs/cgroup/memory ]; then mkdir -p $r/sys/fs/cgroup; mount -t tmpfs tmpfs $r/sys/fs/cgroup; mkdir $r/sys/fs/cgroup/memory; mount -t cgroup -o memory cgroup $r/sys/fs/cgroup/memory; fi
mount --rbind /dev $r/dev; mount -t tmpfs -o size=2g tmpfs $r/dev/shm; mount -t devpts -o newinstance,ptmxmode=0666 devpts $r/dev/pts
mount -t tmpfs -o mode=1777 tmpfs $r/tmp; mount -t tmpfs tmpfs $r/run
for s in "$@"; do mkdir -p $r$s; mount --bind $s $r$s; done
hostname $name
rm -rf $r/root/.ray $r/root/.ssh $r/root/.aws $r/root/.mlray $r/root/.mlray-env; mkdir -p -m 700 $r/root/.ssh; chmod 755 $r/root
cp $lab/id.pub $r/root/.ssh/authorized_keys; cp $lab/profile $r/root/.bash_profile; cp $lab/profile $r/root/.bashrc
[ -d $lab/skel ] && cp -r $lab/skel/. $r/root/
[ $name = laptop ] && install -m 600 $lab/id $r/root/.ssh/id_ed25519
printf '127.0.0.1 localhost\n%s %s\n' $ip $name > $r/etc/hosts
mkdir -p $r/run/sshd; rm -f $r/etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' -f $r/etc/ssh/ssh_host_ed25519_key
printf 'ListenAddress %s\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nMaxStartups 50\nSubsystem sftp internal-sftp\n' $ip > $r/etc/ssh/sshd_config
mkdir -p $r/.old; cd $r; pivot_root . .old; umount -l /.old; cd /
[ $name = laptop ] || /usr/sbin/sshd -E /tmp/sshd.log
echo up >&9; exec 9>&-
trap : CHLD; while :; do sleep 3600 & wait; done
"""


def missing() -> str:
    "Why there can be no hosts here; empty where there can be."
    if os.getuid(): return "needs root"
    absent = [t for t in ("ip", "unshare", "nsenter", "rsync", "ssh-keygen") if not shutil.which(t)] + ["sshd"] * (not Path("/usr/sbin/sshd").exists())
    if absent: return f"needs {', '.join(absent)} (apt-get install iproute2 util-linux rsync openssh-server)"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "may not make namespaces"


def _call(*words: str, **named) -> subprocess.CompletedProcess: return subprocess.run(words, check=True, capture_output=True, text=True, **named)


_NETWORKS = count(1)


@dataclass
class Hosts:
    "A network of hosts; `laptop` is 10.77.0.1, `n1` is 10.77.0.11."
    folder: Path                            # for keys and what hosts write
    shared: Sequence[Path] = ()             # the same for all
    variables: Mapping[str, str] = field(default_factory=dict) # of every login, unless they are set (what SSH starts reads ~/.bashrc in every shell of its first level, workers of Ray among them)
    memory_mb: int = 6144                   # of a host; on a busy one Ray starts many processes of 0.2 GB at once
    prefix: str = field(default_factory=lambda: f"h{os.getpid()}x{next(_NETWORKS)}") # of its own, for a process may have two networks at a time

    def __enter__(self) -> "Hosts":
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "boot.sh").write_text(_BOOT)
        (self.folder / "profile").write_text("".join(f"export {k}=\"${{{k}:-{v}}}\"\n" if k != "PATH" else f"export PATH={v}\n" for k, v in self.variables.items()))
        if not (self.folder / "id").exists(): _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "id"))
        self.inits: dict[str, int] = {}
        self.start("laptop")
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.inits): self.kill(name)
        for line in _call("ip", "netns", "list").stdout.splitlines():
            if (ns := line.split()[0]).startswith(f"{self.prefix}-"): _call("ip", "netns", "del", ns)
        for group in Path("/sys/fs/cgroup/memory").glob(f"{self.prefix}-*"):
            for _ in range(100):
                try: group.rmdir()
                except OSError: time.sleep(0.05)
                else: break

    def ip(self, name: str) -> str: return "10.77.0.1" if name == "laptop" else f"10.77.0.{10 + int(name[1:])}"

    def _wire(self, name: str) -> None:
        ns, at = f"{self.prefix}-{name}", f"{self.prefix}-laptop"
        _call("ip", "netns", "add", ns)
        _call("ip", "-n", ns, "link", "set", "lo", "up")
        if name == "laptop":
            for words in (("link", "add", "br0", "type", "bridge"), ("addr", "add", f"{self.ip(name)}/24", "dev", "br0"), ("link", "set", "br0", "up")): _call("ip", "-n", ns, *words)
            return
        _call("ip", "-n", at, "link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", ns)
        _call("ip", "-n", at, "link", "set", f"v-{name}", "master", "br0", "up")
        for words in (("addr", "add", f"{self.ip(name)}/24", "dev", "eth0"), ("link", "set", "eth0", "up"), ("route", "add", "default", "via", self.ip("laptop"))): _call("ip", "-n", ns, *words)

    def start(self, *names: str) -> None:
        "Switch hosts on; they answer SSH when this returns."
        for name in names:
            if not Path(f"/run/netns/{self.prefix}-{name}").exists(): self._wire(name)
            group = Path(f"/sys/fs/cgroup/memory/{self.prefix}-{name}")
            if group.parent.is_dir():
                group.mkdir(exist_ok=True)
                (group / "memory.limit_in_bytes").write_text(str(self.memory_mb * 2**20))
            (self.folder / name).mkdir(exist_ok=True)
            (ready := self.folder / f"{name}.ready").write_text("")
            join = f"echo $BASHPID > {group}/cgroup.procs; " if group.is_dir() else ""
            command = f"{join}exec setsid ip netns exec {self.prefix}-{name} unshare --mount --uts --ipc --pid --cgroup --fork --kill-child --propagation private bash {self.folder}/boot.sh {name} {self.ip(name)} {self.folder} {' '.join(map(str, self.shared))}"
            with open(self.folder / f"{name}.log", "w") as log, open(ready, "w") as told:
                outer = subprocess.Popen(["bash", "-c", f"exec 9>&{told.fileno()}; {command}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[told.fileno()])
            end = time.monotonic() + 60
            while not ready.read_text():
                if outer.poll() is not None or time.monotonic() > end: raise RuntimeError(f"{name} does not start: {(self.folder / f'{name}.log').read_text()}")
                time.sleep(0.02)
            self.inits[name] = next(int(p) for p in Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split())

    def kill(self, name: str) -> None:
        "Cut a host's power."
        os.kill(self.inits[name], 9)
        while Path(f"/proc/{self.inits[name]}").exists() and Path(f"/proc/{self.inits[name]}/stat").read_text().split(")")[1].split()[0] != "Z": time.sleep(0.02)
        del self.inits[name]

    def cable(self, name: str, plugged: bool) -> None:
        "Pull the cable of a host, or plug it in again."
        _call("ip", "-n", f"{self.prefix}-laptop", "link", "set", f"v-{name}", "up" if plugged else "down")

    def words(self, name: str, *command: str, **variables: str) -> list[str]:
        "How a command runs on a host as a login of root's would."
        group = f"/sys/fs/cgroup/memory/{self.prefix}-{name}/cgroup.procs"
        set_ = " ".join(f"export {k}='{v}';" for k, v in variables.items())
        inside = ["nsenter", "-t", str(self.inits[name]), "-m", "-u", "-i", "-n", "-p", "-C", "env", "-i", "HOME=/root", "TERM=dumb", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "bash", "-c", f'cd /root; . ~/.bashrc; {set_} exec "$@"', "-", *command]
        return ["bash", "-c", f'[ -e {group} ] && echo $BASHPID > {group}; exec "$@"', "-", *inside]

    def run(self, name: str, *command: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess:
        "A command on a host, to its end."
        return subprocess.run(self.words(name, *command, **variables), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def popen(self, name: str, *command: str, variables: Mapping[str, str] | None = None, **named) -> subprocess.Popen:
        "A command on a host, while others run."
        return subprocess.Popen(self.words(name, *command, **(variables or {})), stdin=subprocess.DEVNULL, text=True, **named)

    def _inside(self, name: str) -> list[tuple[int, str]]:
        space, found = os.readlink(f"/proc/{self.inits[name]}/ns/pid"), []
        for p in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(p / "ns/pid") == space and int(p.name) != self.inits[name]: found.append((int(p.name), (p / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()))
            except OSError: continue
        return [(pid, c) for pid, c in found if c and not c.startswith(("sshd:", "/usr/sbin/sshd", "sleep 3600"))]

    def processes(self, name: str) -> list[str]:
        "Command lines of what runs on a host, but for its init and its sshd."
        return sorted(c for _, c in self._inside(name))

    def signal(self, name: str, number: str) -> None:
        "A signal to all that runs on a host, such as STOP."
        for pid, _ in self._inside(name):
            with suppress(ProcessLookupError): os.kill(pid, getattr(signal, f"SIG{number}"))

    def crash(self, name: str) -> None:
        "End all that runs on a host, without a word to it; its disk stays, and its sshd answers."
        while left := self._inside(name):
            for pid, _ in left:
                with suppress(ProcessLookupError): os.kill(pid, 9)
            time.sleep(0.1)
