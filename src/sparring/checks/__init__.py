"""When not to believe a robustness number."""
