"""What ``parity.py`` is made of: tasks, arms, populations of trainings, the judge and its page."""
