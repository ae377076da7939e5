"""Folders of runs: named after the prompt, and no two runs in one."""

import multiprocessing
import threading

import pytest

from guidekit.outputs.folders import new_folder, removed_if_empty, slug


def claim(out, barrier, found, count):
    """Asks for the same folder again and again, at the same moments as others."""
    for _ in range(count):
        barrier.wait()
        found.put(str(new_folder(out, "")))


@pytest.mark.parametrize("exists", [False, True])
def test_processes_at_once_get_folders_of_their_own(tmp_path, exists):
    if exists:
        (tmp_path / "o").mkdir()
    fork = multiprocessing.get_context("fork")
    barrier, found, count = fork.Barrier(4), fork.Queue(), 25
    workers = [
        fork.Process(target=claim, args=(tmp_path / "o", barrier, found, count)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    folders = [found.get(timeout=60) for _ in range(4 * count)]
    for worker in workers:
        worker.join()
    assert len(set(folders)) == 4 * count
    assert str(tmp_path / "o") in folders


def test_a_run_that_gives_its_folder_up_harms_no_other(tmp_path):
    """One claims and fails, over and over, while another wants the same name."""
    stop = threading.Event()

    def fail():
        while not stop.is_set():
            folder = new_folder(tmp_path / "o", "")
            try:
                with removed_if_empty(folder):
                    raise RuntimeError
            except RuntimeError:
                pass

    thread, kept = threading.Thread(target=fail, daemon=True), []
    thread.start()
    try:
        for i in range(100):
            kept.append(new_folder(tmp_path / "o", ""))
            (kept[-1] / "image.png").write_text(str(i))
    finally:
        stop.set()
        thread.join()
    assert [int((folder / "image.png").read_text()) for folder in kept] == list(range(100))


def test_what_was_written_stays(tmp_path):
    folder = new_folder(tmp_path / "o", "")
    with pytest.raises(KeyError), removed_if_empty(folder):
        (folder / "0.png").touch()
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["0.png"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A red circle!", "a-red-circle"),
        ("a very long prompt about a castle on a hill", "a-very-long-prompt-about-a-castle-on-a"),
        ("x" * 50, "x" * 40),
        ("", "image"),
        ("красный круг", "image"),
    ],
)
def test_names_cut_no_word(text, name):
    assert slug(text) == name
