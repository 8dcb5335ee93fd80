# SPDX-License-Identifier: Apache-2.0
"""What C code prints reaches the standard error, and the standard output is whole again afterwards."""

import ctypes
import os
import threading

import pytest

from remattools.terminal.native_output import redirect_native_stdout

LIBC = ctypes.CDLL(None)


def _print_from_c(text: bytes) -> None:
    LIBC.puts(text)  # held in the buffer of the C library, as what HiGHS prints to a pipe


def test_what_c_code_prints_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with redirect_native_stdout():
        _print_from_c(b"noise")
    _print_from_c(b"answer")  # control: without the block it is printed where it was
    LIBC.fflush(None)
    captured = capfd.readouterr()
    assert captured.out == "answer\n"
    assert captured.err == "noise\n"


def test_what_c_code_printed_before_stays_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    _print_from_c(b"before")
    with redirect_native_stdout():
        pass
    assert capfd.readouterr().out == "before\n"


def test_blocks_can_be_nested_and_fail(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with redirect_native_stdout():
            with redirect_native_stdout():
                os.write(1, b"inner ")
            os.write(1, b"outer")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    os.write(1, b"answer")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("answer", "inner outer")


def test_threads_restore_stdout_together(capfd: pytest.CaptureFixture[str]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with redirect_native_stdout():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    with redirect_native_stdout():
        leave.set()
        thread.join()
        os.write(1, b"noise")
    os.write(1, b"answer")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("answer", "noise")
