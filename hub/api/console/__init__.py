"""The console: static files of `hub/web`, a client of the public HTTP API and of nothing else."""
