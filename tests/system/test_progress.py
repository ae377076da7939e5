"""How far a work has come, told where there is a terminal and where there is none."""

import os
import pty
import subprocess
import sys
import termios

from guidekit.system.progress import Progress

WORK = "from guidekit.system.progress import Progress\n"
WORK += "with Progress('drawing', total=3) as p:\n    p(2)\n"


def test_lines_say_what_is_left(capsys):
    with Progress("vae", total=10, done=4, seconds=0) as progress:
        progress(6, words="loss 0.25")
    assert capsys.readouterr().out == "vae      step 6 of 10, loss 0.25, 0 s, about 0 s left\n"


def test_what_has_no_known_end_is_counted(capsys):
    with Progress("encoding", "image", seconds=0) as progress:
        progress.add()
        progress.add(2)
    first, second = capsys.readouterr().out.splitlines()
    assert (first, second) == ("encoding image 1, 0 s", "encoding image 3, 0 s")


def test_names_steer_no_terminal(capsys):
    with Progress("a\x1b]0;owned\x07", seconds=0) as progress:
        progress.add()
    assert "\x1b" not in capsys.readouterr().out


def test_a_terminal_gets_a_bar_and_a_pipe_none():
    own, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 80))
    piped = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True)
    with_bar = subprocess.run([sys.executable, "-c", WORK], stderr=other, stdout=other)
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, "", "")
    assert with_bar.returncode == 0
    os.set_blocking(own, False)
    shown = os.read(own, 10_000)
    assert b"drawing" in shown
    assert b"2/3" in shown
    os.close(own)
    os.close(other)
