"""Runs command lines of ktransfer in forks of one process that has imported everything, and kills them where told.

A new interpreter needs seconds to import torch; a fork needs none. One JSON object a line comes in:
{"argv": [...], "log": path, "cwd": path, "kill": {"step": name, ...}}, one goes out: {"status": exit code, or minus the
signal, "deeds": n}. `kill` says when the child gets `signal`, counted from the moment when the step begins:

    "event": n      at the n-th file operation (opening, renaming, removing, making a folder)
    "seconds": t    after t seconds
    "before": name  when a file of that name is about to be renamed into place
    "behind": name  at the file operation after that
    "done": true    when the step is about to be recorded as done
    "after": true   when that has just happened

`after` seconds the child is killed from outside. `largest` limits the size of every file written, `memory` the bytes of
address space beyond those in use, `limit` the seconds. Under torture/preload.c, `strike` has a kind and the number of
the deed at which it strikes, and the answer counts deeds. `clock` is added to the time of day.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

MODULES = (
    "faiss",
    "h5py",
    "sklearn.metrics",
    "torchvision",
    "ktransfer.pretext.stage",
    "ktransfer.cluster.stage",
    "ktransfer.retrain.stage",
    "ktransfer.retrain.selftraining.study",
    "ktransfer.eval.stage",
)
PRELOADED = ctypes.CDLL(None)
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def watch(rule: dict[str, Any]) -> None:
    from ktransfer import run

    save = run._save
    armed = False
    left = rule.get("event", -1)

    def strike() -> None:
        os.kill(os.getpid(), rule.get("signal", signal.SIGKILL))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if not armed or event not in FILE_EVENTS:
            return
        left -= 1
        placed = Path(os.fsdecode(arguments[1])).name if event == "os.rename" else ""
        if left == 0 or (placed and placed == rule.get("before")):
            strike()
        if placed and placed == rule.get("behind"):
            left = 1

    def wait_and_strike() -> None:
        time.sleep(rule["seconds"])
        strike()

    def watched(folder: Path, name: str, record: dict[str, Any]) -> None:
        nonlocal armed
        if name == rule["step"] and record["state"] == "running":
            armed = True
            if "seconds" in rule:
                threading.Thread(target=wait_and_strike, daemon=True).start()
        if name == rule["step"] and record["state"] == "done" and rule.get("done"):
            strike()
        save(folder, name, record)
        if name == rule["step"] and record["state"] == "done" and rule.get("after"):
            strike()

    run._save = watched
    sys.addaudithook(hook)


def child(order: dict[str, Any]) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(order["cwd"])
    from ktransfer import cli
    from ktransfer.artifacts import features
    from ktransfer.training import checkpoint

    # As often as possible, so that a kill also meets a save in progress.
    checkpoint.SECONDS, checkpoint.SHARE = 0.01, 1.0
    features.create_or_resume.__kwdefaults__["save_seconds"] = 0.0
    if "kill" in order:
        watch(order["kill"])
    if "largest" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
    if "memory" in order:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + order["memory"],) * 2)
    if "clock" in order:
        real, real_ns = time.time, time.time_ns
        time.time = lambda: real() + order["clock"]
        time.time_ns = lambda: real_ns() + order["clock"] * 10**9
    if hasattr(PRELOADED, "torture_arm"):
        PRELOADED.torture_arm(*order.get("strike", (0, -1)))
    signal.alarm(order.get("limit", 0))
    code = cli.main(order["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                child(order)
            finally:
                os._exit(99)
        if "after" in order:
            time.sleep(order["after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        deeds = PRELOADED.torture_count() if hasattr(PRELOADED, "torture_count") else 0
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "deeds": deeds}), flush=True)


if __name__ == "__main__":
    main()
