"""Commands whose streams are closed, or break while they work: the work goes on, and nothing lands elsewhere."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ktransfer.machine import Lasting, stderr

SHOW = [sys.executable, "-m", "ktransfer"]


def shell(tail, *words, **more):
    line = " ".join(f"'{word}'" for word in (*SHOW, *words))
    return subprocess.run(f"{line} {tail}", shell=True, capture_output=True, text=True, timeout=120, **more)


def test_closed_stderr(run, tmp_path):
    words = "--run", run, "extract", "--size", "48", "--data", "scenes:images=40,size=48", "cluster", "--k", "4"
    done = shell("2>&-", *words)
    assert (done.returncode, done.stdout) == (0, "")
    assert (run / "clusters" / "clusters.h5").is_file() and (run / "clusters" / "quality.json").is_file()
    again = shell("", *words)
    assert again.returncode == 0 and "cluster: done before, skipped" in again.stderr


@pytest.mark.parametrize("tail", [">&-", "2>&- >&-", "<&- >&- 2>&-", "| true", "2>&1 | true"])
def test_streams_that_nobody_reads(run, tail):
    done = shell(f"{tail}; echo rest", "--run", run, "--dry-run", "extract", "--size", "48")
    assert done.stdout == "rest\n" and "Error" not in done.stderr and "Exception" not in done.stderr


def test_a_pipe_that_breaks_while_it_works(run):
    words = "--run", run, "extract", "--size", "48", "--data", "scenes:images=40,size=48", "cluster", "--k", "4"
    reading, writing = os.pipe()
    with subprocess.Popen([*SHOW, *map(str, words)], stderr=writing, stdout=subprocess.PIPE) as work:
        os.close(writing)
        os.close(reading)
        assert work.wait(timeout=120) == 0
    assert (run / "clusters" / "quality.json").is_file()


def test_a_full_disk_behind_stdout_is_said():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*SHOW, "perms", "--count", "5"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1 and "No space left on device" in done.stderr


def test_what_is_written_to_a_closed_stream_is_lost(tmp_path):
    handle = (tmp_path / "x").open("w")
    handle.close()
    for stream in (Lasting(handle), Lasting(None)):
        assert stream.write("gone") == 4 and not stream.isatty()
        stream.flush()
    assert stderr() == stderr() and Lasting(sys.stdout) != stderr()


def test_waiting_for_processes_that_nobody_started(tmp_path):
    """Variables of a torchrun that were left in a shell."""
    left = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
    words = [*SHOW, "--run", str(tmp_path), "pretext", "--data", "scenes:images=40,size=48"]
    began = time.monotonic()
    with subprocess.Popen(words, env=os.environ | left, stderr=subprocess.PIPE, text=True) as work:
        assert work.stderr is not None
        line = next(line for line in work.stderr if line.startswith("ktransfer:"))
        work.kill()
    assert time.monotonic() - began < 60
    assert "waiting for the other 1 of 2 processes at 127.0.0.1:29731" in line and "unset WORLD_SIZE RANK" in line
