"""What ``gpu_report.py`` is made of: parts that are processes, their record, and its page."""
