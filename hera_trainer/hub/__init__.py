"""What of a finished folder goes to the Hub: the model card, the choice of files, the push. Uses `runs` and what lies
below it."""
