"""The report of a finished run: page, plots, sentences, examples and the terminal's table."""
