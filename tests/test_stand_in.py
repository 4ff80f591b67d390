"""HAProxy is killed, with no Ray around it: a stand-in answers, gives the ports back to the next one, and goes when all goes."""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from mlray.engines.haproxy import _said, _standing
from tests.conftest import free_port, gone

MANAGER = "import json, subprocess, sys\nfor line in sys.stdin: print(subprocess.Popen([sys.executable, '-c', 'from mlray.engines.haproxy import main; main()', *json.loads(line)]).pid, flush=True)"
NODE = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {MANAGER!r}]).wait()\ntime.sleep(600)" # all ends with it, as with a raylet


def until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.02)


class Proxy:
    "HAProxy as Ray Serve runs it: a configuration, and a process for each state of it."

    def __init__(self, folder: Path):
        self.path, self.port = folder / "haproxy.cfg", free_port()
        self.node = subprocess.Popen([sys.executable, "-c", NODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def start(self, word: str, *arguments: str, routed: bool = True) -> int: # its process
        routes = "    use_backend http-mlray if { path / }\nbackend http-mlray\n    server one 127.0.0.1:1 check" if routed else ""
        self.path.write_text(f"global\n    stats socket {self.path.with_name('admin.sock')} mode 666 level admin expose-fd listeners\ndefaults\n    mode http\n    timeout connect 5s\n    timeout client 5s\n    timeout server 5s\n"
                             f"frontend http_frontend\n    bind 127.0.0.1:{self.port}\n    # as use_backend selects\n    http-request return status 200 content-type text/plain string {word} if {{ path /who }}\n{routes}\n")
        self.node.stdin.write(json.dumps(["-db", "-f", str(self.path), "-dR", *arguments]) + "\n")
        self.node.stdin.flush()
        pid = int(self.node.stdout.readline())
        until(lambda: f"Pid: {pid}\n" in _said(self.path.with_name("admin.sock"), "show info"))
        return pid

    def who(self) -> str: # answers; empty: nobody
        try: return httpx.get(f"http://127.0.0.1:{self.port}/who", timeout=5).text
        except httpx.HTTPError: return ""


@pytest.fixture
def proxy(tmp_path_factory) -> Iterator[Proxy]:
    made = Proxy(tmp_path_factory.mktemp("p"))
    yield made
    for process in [*psutil.Process(made.node.pid).children(recursive=True), made.node] if made.node.poll() is None else []: process.kill()
    made.node.wait(10)


def test_a_stand_in_answers_until_the_next_one_does(proxy):
    first = proxy.start("first")
    until(lambda: proxy.who() == "first")
    os.kill(first, signal.SIGKILL)
    until(lambda: proxy.who() == "first") # the same configuration, another process
    standing = _standing(proxy.path)
    assert standing
    before = psutil.Process(standing)
    assert not _said(proxy.path.with_name("admin.sock"), "show info") # Ray Serve still sees that its own is missing
    heard_nothing = proxy.start("nothing", routed=False)
    assert proxy.who() == "first" and _standing(proxy.path) == standing # knows of no replicas yet, so nobody is sent there
    second = proxy.start("second", "-sf", str(heard_nothing), "-x", str(proxy.path.with_name("admin.sock")))
    until(lambda: proxy.who() == "second")
    until(lambda: gone(before))
    third = proxy.start("third", "-sf", str(second), "-x", str(proxy.path.with_name("admin.sock"))) # as at any other time
    until(lambda: proxy.who() == "third")
    os.kill(third, signal.SIGKILL) # and once more
    until(lambda: proxy.who() == "third")
    for process in (psutil.Process(proxy.node.pid), *psutil.Process(proxy.node.pid).children()): process.kill()
    proxy.node.wait(10)
    until(lambda: not proxy.who())


def test_a_stand_in_answers_when_who_started_haproxy_is_killed(proxy):
    pid = proxy.start("first")
    until(lambda: proxy.who() == "first")
    (manager,) = [p for p in psutil.Process(proxy.node.pid).children() if p.pid != pid]
    manager.kill()
    until(lambda: gone(manager))
    os.kill(pid, signal.SIGKILL)
    until(lambda: proxy.who() == "first")
    assert _standing(proxy.path)
    proxy.node.kill()
    proxy.node.wait(10)
    until(lambda: not proxy.who())
