"""What must survive a crash or stay private on disk: files, logs, keys, purge."""
