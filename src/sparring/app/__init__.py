"""The command: settings, run folders, evaluation folders, progress."""
