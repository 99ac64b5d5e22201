"""The operations of discrete communication, one file each; see `bincomm` for the public names."""
