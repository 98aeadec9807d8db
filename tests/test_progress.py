import itertools
import logging

from covidjax import progress


def test_a_log_gets_a_line_every_tenth_or_half_minute_whichever_is_later(monkeypatch, caplog):
    caplog.set_level(logging.INFO, 'covidjax')
    seconds = itertools.count(0, 5)
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(seconds))
    assert list(progress.track(range(20), 'slow', 20, 'slice')) == list(range(20))
    # 5 s a slice: 30 s are 6 slices, more than a tenth.
    assert [record.message for record in caplog.records] == [
        'slow: 6 of 20 slices (30 %)',
        'slow: 12 of 20 slices (60 %)',
        'slow: 18 of 20 slices (90 %)',
    ]
    caplog.clear()
    with progress.open_progress('long', 1000, 'step', initial=500) as bar:
        bar.set_postfix_str('loss 0.1')
        for _ in range(250):
            bar.update()
    # A tenth are 100 steps, 500 s.
    assert [record.message for record in caplog.records] == [
        'long: 600 of 1000 steps (60 %), loss 0.1',
        'long: 700 of 1000 steps (70 %), loss 0.1',
    ]


def test_short_work_and_silent_processes_log_nothing(caplog):
    caplog.set_level(logging.INFO, 'covidjax')
    list(progress.track(range(5), 'short', 5, 'slice'))
    list(progress.track(range(5), 'silent', 5, 'slice', is_shown=False))
    assert not caplog.records
