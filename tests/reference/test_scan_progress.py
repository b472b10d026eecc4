"""What a long scan prints."""

from __future__ import annotations

from dpsims_reference.data.scan_progress import ScanProgress


def test_lines_tell_what_is_done_and_end_with_all(capsys):
    progress = ScanProgress(every=0)
    for done in range(401, 404):
        progress(done, 403)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["401/403", "402/403", "403/403"]
    assert lines[-1].endswith("0 s left")


def test_a_short_scan_prints_nothing(capsys):
    progress = ScanProgress()
    for done in range(1, 50):
        progress(done, 49)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_one_line_and_one_line_end(capsys, monkeypatch):
    progress = ScanProgress(every=0)
    progress.terminal = True
    for done in (1, 2, 3):
        progress(done, 3)
    text = capsys.readouterr().out
    assert text.count("\r") == 3
    assert text.endswith("\n")
    assert text.count("\n") == 1
