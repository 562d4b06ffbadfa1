"""What a run leaves on disk and shows: checkpoints, the record, the monitor, plots and the report. Uses `evaluation`
and what lies below it."""
