"""The contract of a stage and what it stands on: files, manifest, progress, processes and executors."""
