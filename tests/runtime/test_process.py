"""The end of a process after SIGTERM, in real processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tfxfer.runtime.process import end_after_sigterm, ended_by

CODE = """
import hashlib, signal, sys, time
from tfxfer.runtime.process import end_after_sigterm
signal.signal(signal.SIGTERM, lambda *_: {handler})
with end_after_sigterm(0.5, "went"):
    print("ready", flush=True)
    {work}
"""
# Native code that holds the main thread for long; it lets other threads work.
BUSY = "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**27)"


@pytest.mark.parametrize(
    ("handler", "work", "told"),
    [("None", BUSY, "went\n"), ("None", "time.sleep(60)", "went\n"), ("sys.exit(143)", "time.sleep(60)", "")],
)
def test_a_process_is_gone_in_time_whatever_holds_it(handler, work, told):
    code = CODE.format(handler=handler, work=work)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] == told and process.returncode == 143
    assert time.monotonic() - began < 5


def test_a_process_that_hears_of_none_in_time_lives_on():
    """Whoever calls the command line from Python may get a SIGTERM of their own later."""
    before, threads = signal.signal(signal.SIGTERM, lambda *_: None), threading.active_count()
    try:
        with end_after_sigterm(0.0, "went"):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # it would be gone
        assert threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_ends_a_wait_in_native_code_and_the_handlers_are_back_afterwards():
    code = CODE.replace('end_after_sigterm(0.5, "went")', "ended_by(signal.SIGTERM)")
    code = code.replace("import end_after_sigterm", "import ended_by").format(handler="sys.exit(3)", work=BUSY)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM

    before = signal.getsignal(signal.SIGINT)
    with ended_by(signal.SIGINT):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
