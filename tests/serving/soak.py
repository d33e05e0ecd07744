"""``make test-soak``: 64 clients of every manner for minutes, against a server in another process.

Prints what it has seen, and fails if an answer was not that of ``generate``, a request was an error
of the server, or its memory went on growing.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from serving.test_load import BODIES, N_CLIENTS, PATH, Client, expected

import multicolm
from multicolm.serving.server import Server

NAP = 0.01  # seconds


@dataclass(frozen=True)
class Remote:
    """A server of which only the address is known."""

    address: str


def report(kind: str, seconds: float) -> None:
    """Print a line at once and whole, whatever other threads print."""
    sys.stdout.write(f"{kind} {seconds}\n")
    sys.stdout.flush()


def sleep() -> None:
    """Print how late a thread wakes that does nothing but sleep: what the machine adds to gaps."""
    while True:
        start = time.monotonic()
        time.sleep(NAP)
        report("late", time.monotonic() - start - NAP)


def watch(address: str) -> None:
    """Read texts one after another, and print the seconds between events, one a line."""
    threading.Thread(target=sleep, daemon=True).start()
    place = urlsplit(address)
    body = json.dumps({"model": "tiny", "prompt": "What is 2 * x?", "max_tokens": 200,
                       "temperature": 1, "stream": True})  # fmt: skip
    while True:
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        last: float | None = None
        while line := reply.readline():
            now = time.monotonic()
            if last is not None and line.startswith(b"data: {"):
                report("gap", now - last)
            if line.startswith(b"data: {"):
                last = now
        connection.close()


def megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--watch")
    given = parser.parse_args()
    if given.watch:
        watch(given.watch)
        return
    alone = multicolm.load("tiny")
    texts = [expected(alone, body) for body in BODIES]
    command = [sys.executable, "-m", "multicolm", "serve", "tiny", "--port", "0", "--no-access-log"]
    waiting = ["--max-waiting", str(3 * N_CLIENTS)]
    server = subprocess.Popen([*command, *waiting], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    address = None
    while address is None:
        line = server.stderr.readline()
        assert line, "the server has ended"
        address = re.search(r"served at (http://\S+\d)", line)
    threading.Thread(target=server.stderr.read, daemon=True).start()
    watcher = subprocess.Popen(
        [sys.executable, __file__, "--watch", address[1]], stdout=subprocess.PIPE, text=True
    )
    seen: dict[str, list[float]] = {"gap": [], "late": []}
    assert watcher.stdout is not None
    lines = watcher.stdout

    def collect() -> None:
        for line in lines:
            kind, _, seconds = line.partition(" ")
            seen[kind].append(float(seconds))

    threading.Thread(target=collect, daemon=True).start()
    first, done, wrong, memory = 0, Counter[str](), [], []
    while len(seen["gap"]) < 500:
        time.sleep(0.1)
    quiet = {kind: list(seconds) for kind, seconds in seen.items()}
    start = time.monotonic()
    try:
        while time.monotonic() - start < given.seconds:
            clients = [
                Client(first + i, cast("Server", Remote(address[1])), texts)
                for i in range(N_CLIENTS)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
                done += client.done
                wrong += client.wrong
            first += N_CLIENTS
            memory.append(megabytes(server.pid))
        place = urlsplit(address[1])
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        connection.request("GET", "/metrics")
        metrics = connection.getresponse().read().decode()
    finally:
        watcher.terminate()
        server.terminate()
    failed = re.findall(r'requests_total\{.*status="5\d\d"\} \S+', metrics)
    loud = {kind: seconds[len(quiet[kind]) :] for kind, seconds in seen.items()}
    for name, some in (("undisturbed", quiet), ("under load", loud)):
        gaps = sorted(some["gap"])
        print(
            f"gaps {name}: median {statistics.median(gaps):.3f} s, 99 % below "
            f"{gaps[len(gaps) * 99 // 100]:.3f} s, worst {gaps[-1]:.3f} s; who only sleeps wakes "
            f"up to {max(some['late']):.3f} s late"
        )
    half = len(memory) // 2
    print(f"requests: {sum(done.values())} {dict(done)}; wrong: {wrong}; server errors: {failed}")
    print(f"memory: {memory[0]:.0f} MB after the first wave, {memory[half]:.0f} half way, "
          f"{memory[-1]:.0f} at the end, of {len(memory)} waves")  # fmt: skip
    assert not wrong and not failed and memory[-1] < 1.1 * memory[half]


if __name__ == "__main__":
    main()
