"""The sweep that makes the table of launch configurations, `kernels/sbp_kernels/tuned.json`."""
