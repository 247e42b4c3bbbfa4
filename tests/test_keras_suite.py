"""The optimizers' own tests of Keras, with ours in the stock class's place.

The wider ones (trainers, models, saving, callbacks, layers, distribution), and the same with
the stock class, take minutes: ``python tests/keras_suite.py`` runs them all.
"""

from __future__ import annotations

from keras_suite import BY_DESIGN, OPTIMIZERS, run


def test_all_pass_but_those_that_lack_a_package() -> None:
    passed, failed = run(OPTIMIZERS, ours=True)
    assert sum(".AdamWTest." in name for name in passed) >= 5
    assert len(passed) >= 180
    for name, message in failed.items():
        assert name in BY_DESIGN or "No module named" in message, f"{name}: {message}"
