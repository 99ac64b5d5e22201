"""The commands of the command line, a file each: its arguments, and a call of what Python users call, too."""
