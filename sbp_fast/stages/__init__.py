"""The stages, one file a command: each wires library functions into the contract of `pipeline.stage`."""
