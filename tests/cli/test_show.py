import io

from rich.console import Console

from tfxfer.cli import show


def test_rows_stay_on_a_terminal_where_notes_do_not(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=100)
    monkeypatch.setattr(show, "stderr", console)
    with show.Live() as live:
        live.phase("trials", 3)
        live.row("trial 1 [bold]0.5")
        live.note("a detail")
    text = console.file.getvalue()
    assert "trial 1 [bold]0.5" in text and "a detail" not in text


def test_elsewhere_both_are_lines(monkeypatch):
    console = Console(file=io.StringIO(), width=100)
    monkeypatch.setattr(show, "stderr", console)
    with show.Live() as live:
        live.row("trial 1")
        live.note("a detail")
    assert [line.split("] ")[1] for line in console.file.getvalue().splitlines()] == ["trial 1", "a detail"]


FOUND = {
    "trials": 5, "tuner": "grid", "failed": 1, "stopped_early": 0, "metric": "macro_f1",
    "values": {"freeze_depth": 3, "learning_rate": 0.00123},
    "score": {"value": 0.9, "corrected": 0.87, "low": 0.8, "high": 0.93},
    "equal": [{"freeze_depth": 3}, {"freeze_depth": 1}],
    "passes": {"computed": 300, "without_sharing": 15000, "saved_seconds": 41.7},
}  # fmt: skip


def test_a_search_is_told_with_what_its_best_is_worth():
    lines = dict(show.describe_search(FOUND))
    assert lines["search"] == "5 trials by grid, 1 failed; taken: freeze_depth 3, learning_rate 0.00123"
    assert "validation macro f1 0.900" in lines["best of them"]
    assert "0.870 (0.800 to 0.930)" in lines["best of them"]
    assert lines["equal depths"].startswith("3, 1 frozen blocks")
    assert lines["shared"] == "300 images through frozen blocks instead of 15,000; 42 s saved"
    assert show.describe_search(None) == []
