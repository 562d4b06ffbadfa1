"""What every folder may use and nothing of what this library is about: files that survive a kill, processes, random
states, digests of weights, and what of a machine stays private. Uses no other folder."""
