"""What tests and ``tools/gpu_report.py`` check alike: plain functions, which need no pytest."""
