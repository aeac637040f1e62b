"""Task files of lm-evaluation-harness for the embedded question sets; `harness_tasks` makes their content."""
