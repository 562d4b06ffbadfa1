"""What a training loop holds: the capture of the heads, the objective, the pool, the step window, the temperature and
the meter. Knows neither TRL nor `Trainer`. Uses `data` and what lies below it."""
