"""What an experiment compares, declared once: arms, stages and their costs, the runner, results and report."""
