"""What a run leaves on disk and shows: checkpoints, the record, the monitor, plots and the report. Uses `alignment` and
what lies below it."""
