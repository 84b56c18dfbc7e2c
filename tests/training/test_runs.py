"""Numbered folders for runs."""

import pytest

from slimkernels.training.runs import newest_run, run_folders, start_run


def test_runs_are_numbered_and_never_reused(tmp_path):
    parent = tmp_path / "runs"
    assert run_folders(parent) == []
    first, second = start_run(parent), start_run(parent)
    assert [first.name, second.name] == ["001", "002"]
    (parent / "notes").mkdir()
    (parent / "0999").mkdir()
    assert start_run(parent).name == "1000"
    assert [folder.name for folder in run_folders(parent)] == ["001", "002", "0999", "1000"]


def test_the_newest_run_is_one_with_a_checkpoint(tmp_path):
    assert newest_run(tmp_path / "runs") is None
    first, second, third = (start_run(tmp_path) for _ in range(3))
    assert newest_run(tmp_path) is None
    (first / "step-00000005").mkdir()
    (second / "step-00000003").mkdir()
    (third / ".writing-step-00000001").mkdir()
    assert newest_run(tmp_path) == second


def test_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    sentence = "^--out .*link cannot be a folder for runs: file exists$"
    with pytest.raises(ValueError, match=sentence):
        start_run(tmp_path / "link")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(ValueError, match="^--out .* cannot be a folder for runs: "):
            start_run(parent)


def test_a_number_that_is_taken_by_a_file_is_passed_over(tmp_path):
    start_run(tmp_path)
    (tmp_path / "002").write_text("")
    (tmp_path / "003").symlink_to(tmp_path / "nowhere")
    assert start_run(tmp_path).name == "004"


def test_only_ascii_digits_are_a_number(tmp_path):
    for name in ("\u00b2", "\u0663", "1_0", "-1"):
        (tmp_path / name).mkdir()
    assert run_folders(tmp_path) == [] and start_run(tmp_path).name == "001"
