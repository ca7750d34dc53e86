"""What stands around the encoder; `python -m tools --help` lists the commands."""
