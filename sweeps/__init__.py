"""What is run, and where: sweep files, plans, the results folder, launchers, the command line."""
