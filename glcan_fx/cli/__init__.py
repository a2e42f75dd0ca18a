"""The command line: arguments alone; what runs lies in the other rooms."""
