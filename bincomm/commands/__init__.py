"""The commands of the command line, one file each: its arguments, and a call of the same Python function that
users can call."""
