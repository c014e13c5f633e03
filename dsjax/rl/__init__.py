"""Learning from rewards: so far the sandbox that runs model-written programs, and the programs that it is given."""
