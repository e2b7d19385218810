"""Starts command lines of ktransfer in several processes as torchrun does, forked from one that has all imported.

One JSON object a line comes in: {"argv": [...], "world": n, "logs": folder, "fault": {"rank": r, "scan": s, "kind":
k}}, one goes out: {"status": [exit code of each, or minus the signal]}. At its s-th scan ("scan": s) or call of a
function ("call": "MODULE:NAME", "at": s), process r gets the fault: "error", an exception; "kill", SIGKILL; "stop",
SIGINT to all processes as Ctrl-C gives it. "file": its feature file is another one. Checkpoints are written after every
step of a training.
"""

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

MODULES = (
    "faiss",
    "h5py",
    "sklearn.metrics",
    "torch.distributed",
    "ktransfer.cluster.extraction",
    "ktransfer.cluster.distributed",
    "ktransfer.cluster.stage",
    "ktransfer.pretext.stage",
    "ktransfer.retrain.stage",
    "ktransfer.eval.stage",
)


def plant_call(fault: dict[str, Any]) -> None:
    module, name = fault["call"].split(":")
    home, left = importlib.import_module(module), fault["at"]
    function = getattr(home, name)

    def faulty(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0 and fault["kind"] == "stop":
            os.killpg(0, signal.SIGINT)
        if left == 0 and fault["kind"] == "error":
            raise MemoryError("no room")
        return function(*arguments, **named)

    setattr(home, name, faulty)


def plant(fault: dict[str, Any]) -> None:
    if "call" in fault:
        plant_call(fault)
        return
    from ktransfer.cluster import distributed

    scan, left = distributed._scan, fault.get("scan", 0)

    def faulty(engine: Any, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0 and fault["kind"] == "stop":
            os.killpg(0, signal.SIGINT)
        if left == 0 and fault["kind"] == "error":

            def broken(*_: Any) -> Any:
                raise MemoryError("no room")

            engine = engine._replace(scan=broken)
        return scan(engine, *arguments)

    distributed._scan = faulty
    if fault["kind"] == "file":
        facts = distributed._facts
        distributed._facts = lambda features: facts(features) | {"rows": [1, 2]}


def child(order: dict[str, Any], rank: int, port: int) -> int:
    log = os.open(Path(order["logs"]) / str(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    if order["world"] > 1:
        given = {"RANK": rank, "WORLD_SIZE": order["world"], "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": order["world"]}
        os.environ.update({name: str(value) for name, value in given.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    from ktransfer import cli
    from ktransfer.training import checkpoint, loop

    loop.LOG_SECONDS, checkpoint.SECONDS, checkpoint.SHARE = 0.0, 0.0, 1e9
    if order.get("fault", {}).get("rank") == rank:
        plant(order["fault"])
    code = cli.main(order["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids: list[int] = []
        for rank in range(order["world"]):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, pids[0] if pids else 0)
                code = 99
                try:
                    code = child(order, rank, port)
                except BaseException:
                    traceback.print_exc()  # nothing else tells why a process went
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            os.setpgid(pid, pids[0] if pids else pid)
            pids.append(pid)
        print(json.dumps({"status": [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]}), flush=True)


if __name__ == "__main__":
    main()
