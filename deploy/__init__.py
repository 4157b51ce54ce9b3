"""How the service is run. Documents and files for each way stand beside; `deploy/check` holds them against the code."""
